//! How long the held are held, and what they are told when that is over: by their routes, by their own deadlines, by
//! what stands in front of the proxy.

use cutover_protocol::hold::Gate;
use cutover_protocol::id::Site;
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::seen::{EndsBy, Forecast, HeldEntry, Look, Seen};
use http::Request;

use crate::client2::Client2;
use crate::client3::NAME;
use crate::holding::{balanced, two_sites};
use crate::process::{run, text};
use crate::world::{Message, Origin, Plan, Stage, World, web};

/// A proxy that holds, with these keys and routes of its service.
fn holding(service: &str) -> (World, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .service(service)
        .start();
    world.hold();
    (world, source)
}

/// What a client gets that asks with these lines while the service is held.
fn told(world: &World, method: &str, path: &str, lines: &str) -> Message {
    let mut client = world.client();
    client.send(format!(
        "{method} {path} HTTP/1.1\r\nHost: h\r\n{lines}\r\n"
    ));
    match method {
        "HEAD" => client.head(),
        _ => client.message(),
    }
}

fn reaches_nobody(world: &World, source: &Origin) {
    world.reopen();
    world.until(|status| status.gate == Gate::Open && status.held_now == 0);
    assert_eq!(source.seen(), Vec::<String>::new());
    balanced(world);
}

const PAGE: &str =
    "[[service.route]]\nname = \"shop\"\nhold_ms_max = 30\nat_limit = \"retry_page\"\n";
const BROWSER: &str = "Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\n";

#[test]
fn a_request_whose_own_deadline_passes_is_answered_then_and_never_executed() {
    let (world, source) = holding("");
    for line in ["Connect-Timeout-Ms: 30\r\n", "Grpc-Timeout: 30m\r\n"] {
        let answer = told(&world, "GET", "/", line);
        assert_eq!((answer.status(), answer.field("Retry-After")), (504, None));
        assert!(answer.body.contains("nothing was carried out"));
    }
    let answer = told(&world, "GET", "/", "X-Request-Timeout: 1\r\n");
    assert_eq!(answer.status(), 504);
    assert_eq!(world.status().evicted, 3);
    reaches_nobody(&world, &source);
}

#[test]
fn a_client_of_grpc_is_told_in_its_own_words() {
    let (world, source) = holding("[[service.route]]\nname = \"all\"\nhold_ms_max = 200\n");
    let mut client = Client2::connect(world.address());
    let mut ask = |timeout: &str| {
        let request = Request::post("http://h/pay.Till/Charge")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", timeout)
            .header("te", "trailers");
        let stream = client.send(request.body(()).unwrap(), true);
        client.answer(stream)
    };
    // The first by its deadline, the other by its route's limit.
    for (timeout, status) in [("30m", "4"), ("1H", "14")] {
        let answer = ask(timeout);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.fields["grpc-status"], status);
        assert_eq!(answer.fields["content-type"], "application/grpc");
        assert!(answer.fields.contains_key("grpc-message"));
        // Trailers only: nothing comes behind the head.
        assert_eq!((answer.body.as_str(), answer.trailer), ("", None));
    }
    reaches_nobody(&world, &source);
}

#[test]
fn over_http3_deadlines_and_limits_are_kept_as_well() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let http3 = Plan::new(source.address(), target.address())
        .service("at_limit = \"retry_page\"\nhold_ms_max = 200")
        .start_http3();
    http3.world.hold();
    let mut client = http3.client();
    for (name, value, status) in [
        ("connect-timeout-ms", "30", 504),
        ("accept", "text/html", 503),
    ] {
        let request = Request::get(format!("https://{NAME}/a")).header(name, value);
        let mut stream = client.send(request.body(()).unwrap());
        client.wait(stream.finish()).unwrap();
        let answer = client.answer(stream);
        assert_eq!(answer.status, status, "{answer:?}");
        let is_page = answer.text().contains("http-equiv=\"refresh\"");
        assert_eq!(is_page, status == 503);
    }
    reaches_nobody(&http3.world, &source);
}

#[test]
fn what_is_left_of_a_deadline_goes_upstream() {
    let (source, target) = (Origin::new("source"), Stage::new());
    let world = Plan::new(source.address(), target.address()).start();
    world.hold();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHost: h\r\nGrpc-Timeout: 1H\r\nX-After: it\r\n\r\n");
    world.until_held(1);
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    let request = upstream.message();
    let left = request.field("Grpc-Timeout").unwrap();
    let left_ms: u64 = left.strip_suffix('m').unwrap().parse().unwrap();
    assert!(left_ms < 3_600_000, "{left}");
    assert_eq!(request.field("X-After"), Some("it"));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
    // Who is not held says the same upstream as here.
    world.until(|status| status.gate == Gate::Open);
    client.send("GET / HTTP/1.1\r\nHost: h\r\nGrpc-Timeout: 1H\r\n\r\n");
    assert_eq!(upstream.message().field("Grpc-Timeout"), Some("1H"));
}

#[test]
fn a_stream_that_was_held_says_what_is_left_as_well() {
    let (source, target) = (Origin::new("source"), Stage::new());
    let world = Plan::new(source.address(), target.address()).start();
    world.hold();
    let mut client = Client2::connect(world.address());
    let request = Request::get("http://h/a").header("grpc-timeout", "60S");
    let stream = client.send(request.body(()).unwrap(), true);
    world.until_held(1);
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    let request = upstream.message();
    let left = request.field("Grpc-Timeout").unwrap();
    let left_us: u64 = left.strip_suffix('u').unwrap().parse().unwrap();
    assert!(left_us < 60_000_000, "{left}");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.answer(stream).status, 200);
}

#[test]
fn a_browser_gets_a_page_that_asks_again_and_everybody_else_an_error() {
    let (world, source) = holding(PAGE);
    let page = told(&world, "GET", "/basket", BROWSER);
    assert_eq!(page.status(), 503);
    assert_eq!(page.field("Retry-After"), Some("5"));
    assert_eq!(page.field("Cache-Control"), Some("no-store"));
    assert_eq!(page.field("Content-Type"), Some("text/html; charset=utf-8"));
    let refresh = "<meta http-equiv=\"refresh\" content=\"5\">";
    assert!(page.body.contains(refresh), "{}", page.body);
    let head = told(&world, "HEAD", "/basket", BROWSER);
    assert_eq!(head.status(), 503);
    assert_eq!(head.field("Content-Type"), Some("text/html; charset=utf-8"));
    let length = |message: &Message| message.field("Content-Length").map(str::to_owned);
    assert_eq!(length(&head), length(&page));
    let post = format!("{BROWSER}Content-Length: 0\r\n");
    for other in [
        told(&world, "POST", "/basket", &post),
        told(&world, "GET", "/basket", "Accept: application/json\r\n"),
        told(&world, "GET", "/basket", ""),
    ] {
        assert_eq!(
            (other.status(), other.field("Retry-After")),
            (503, Some("5"))
        );
        let kind = other.field("Content-Type");
        assert_eq!(kind, Some("text/plain; charset=utf-8"));
    }
    reaches_nobody(&world, &source);
}

#[test]
fn over_http2_the_page_is_the_same() {
    let (world, source) = holding(PAGE);
    let mut client = Client2::connect(world.address());
    let request = Request::get("http://h/basket").header("accept", "text/html");
    let stream = client.send(request.body(()).unwrap(), true);
    let page = client.answer(stream);
    assert_eq!(page.status, 503);
    assert_eq!(page.fields["retry-after"], "5");
    assert!(page.body.contains("http-equiv=\"refresh\""));
    reaches_nobody(&world, &source);
}

#[test]
fn each_route_says_how_long_its_requests_are_held() {
    let (world, source) = holding(
        "[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\nhold_ms_max = 30\n\
         [[service.route]]\nname = \"slow\"\npath_prefix = \"/slow\"\nat_limit = \"wait\"",
    );
    let mut patient = world.client();
    patient.get("/slow");
    world.until_held(1);
    let answer = told(&world, "GET", "/api", "");
    assert_eq!(
        (answer.status(), answer.field("Retry-After")),
        (503, Some("5"))
    );
    assert_eq!(world.status().held_now, 1);
    world.reopen();
    assert_eq!(patient.message().body, "source GET /slow");
    assert_eq!(source.seen(), ["GET /slow"]);
    balanced(&world);
}

#[test]
fn nobody_is_held_for_longer_than_somebody_in_front_waits() {
    let (world, source) = holding("front_timeout_ms = 40\nat_limit = \"wait\"");
    assert_eq!(told(&world, "GET", "/", "").status(), 503);
    reaches_nobody(&world, &source);
}

#[test]
fn a_raw_connection_is_closed_at_its_limit() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = Plan::new(source.address(), target.address())
        .tcp()
        .service("hold_ms_max = 30")
        .start();
    world.hold();
    assert!(world.client().is_closed());
    assert!(source.is_deserted() && target.is_deserted());
    balanced(&world);
}

fn look(world: &World, look: &Look) -> Seen {
    let mut control = ControlClient::connect(&world.folder.path().join("control.sock")).unwrap();
    control.look(look).unwrap()
}

#[test]
fn whoever_looks_sees_how_long_each_has_left_and_why() {
    let (world, _source) = holding("hold_ms_max = 50000\nfront_timeout_ms = 30000");
    let mut plain = world.client();
    plain.get("/plain");
    world.until_held(1);
    let mut urgent = world.client();
    urgent.send("GET /urgent HTTP/1.1\r\nHost: h\r\nRequest-Timeout: 20\r\n\r\n");
    world.until_held(2);
    let Seen::Held { services } = look(&world, &Look::Held { service: None }) else {
        panic!()
    };
    let ends = |entry: &HeldEntry| (entry.left_ms.unwrap(), entry.ends_by.unwrap());
    let [first, second] = &services[0].oldest[..] else {
        panic!("{services:?}")
    };
    let (left_ms, by) = ends(first);
    assert!(left_ms <= 29_000 && by == EndsBy::Limit, "{first:?}");
    let (left_ms, by) = ends(second);
    assert!(left_ms <= 20_000 && by == EndsBy::Deadline, "{second:?}");
    let output = run(&world.folder, &["ctl", "--socket", "control.sock", "held"]);
    let said = text(&output.stdout);
    assert!(said.contains(" ms to its deadline"), "{said}");
}

#[test]
fn a_dry_run_tells_which_deadlines_and_limits_would_not_be_kept() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .service("front_timeout_ms = 100\n[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\nhold_ms_max = 50")
        .start();
    let forecast = || -> Forecast {
        let service = web();
        let duration_ms = 400;
        match look(
            &world,
            &Look::Forecast {
                service,
                duration_ms,
            },
        ) {
            Seen::Forecast(forecast) => *forecast,
            other => panic!("{other:?}"),
        }
    };
    std::thread::scope(|scope| {
        let watching = scope.spawn(forecast);
        // Until it is counted: when the watching begins nobody is told.
        while !watching.is_finished() {
            let mut client = world.client();
            client.send("GET / HTTP/1.1\r\nHost: h\r\nConnect-Timeout-Ms: 1\r\n\r\n");
            client.message();
        }
        let forecast = watching.join().unwrap();
        assert!(forecast.out_of_time >= 1, "{forecast:?}");
        let met = forecast.limits.iter();
        let met: Vec<(&str, u64, Option<&str>)> = met
            .map(|met| (met.limit.as_str(), met.most, met.who.as_deref()))
            .collect();
        assert!(met.contains(&("front_timeout_ms", 80, None)), "{met:?}");
        let route = ("hold_ms_max", 50, Some("route api"));
        assert!(met.contains(&route), "{met:?}");
    });
}

#[test]
fn an_operator_who_expects_a_stall_too_long_for_those_in_front_is_warned() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .service("front_timeout_ms = 10000")
        .start();
    let hold = |expect: &str| {
        let arguments = [
            "ctl",
            "--socket",
            "control.sock",
            "hold",
            "web",
            "--expect",
            expect,
        ];
        let output = run(&world.folder, &arguments);
        assert!(output.status.success());
        text(&output.stderr)
    };
    assert_eq!(hold("8s"), "");
    let said = hold("9s");
    assert!(
        said.contains("a stall of 9000 ms passes 0.8 of front_timeout_ms = 10000"),
        "{said}"
    );
    assert_eq!(world.status().front_timeout_ms, Some(10_000));
}

#[test]
fn a_reload_sets_another_limit_also_for_those_who_are_held() {
    let (world, source, _target) = two_sites();
    world.hold();
    let mut client = world.client();
    client.get("/held");
    world.until_held(1);
    let path = world.folder.path().join("proxy.toml");
    let before = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        before.replace(
            "protocol = \"http\"",
            "protocol = \"http\"\nhold_ms_max = 30",
        ),
    )
    .unwrap();
    let output = run(
        &world.folder,
        &["ctl", "--socket", "control.sock", "reload"],
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(client.message().status(), 503);
    reaches_nobody(&world, &source);
}
