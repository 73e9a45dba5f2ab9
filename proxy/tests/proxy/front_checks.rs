//! Front checks: health probes of balancers in front of us are green while their service is held, take no place among
//! the held, reach no application, and tell the truth at any other time.

use cutover_protocol::id::Site;
use http::{Method, Request};

use crate::client2::Client2;
use crate::client3::NAME;
use crate::holding::balanced;
use crate::world::{Control, Nobody, Origin, PATIENCE, Peer, Plan, Stage, World, hold};

const METRICS: &str =
    "[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"\nformat = \"text\"";

fn plan(source: &Origin, target: &Origin, service: &str) -> Plan {
    Plan::new(source.address(), target.address())
        .table(METRICS)
        .service(service)
}

/// How many were answered, by metrics and by `ctl status`.
fn answered(world: &World) -> u64 {
    let name = "hopgate_front_checks_answered_total{service=\"web\"} ";
    let metrics = world.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    let count = line.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap();
    assert_eq!(world.status().front_checks_answered, count);
    count
}

fn say(client: &mut Peer, head: &str) {
    client.send(format!("{head}\r\n\r\n"));
}

#[test]
fn a_check_by_path_is_green_while_held_and_tells_the_truth_otherwise() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let check = "[[service.front_check]]\npath = \"/healthz\"";
    let mut world = plan(&source, &target, check).start();
    let mut balancer = world.client();
    assert_eq!(
        balancer.get("/healthz").message().body,
        "source GET /healthz"
    );
    world.hold();
    let mut client = world.client();
    client.get("/page");
    world.until_held(1);
    // As often as it likes, on one connection.
    for _ in 0..3 {
        let answer = balancer.get("/healthz?from=lb").message();
        assert_eq!(answer.first_line, "HTTP/1.1 200 OK");
        assert_eq!(answer.body, "ok\n");
        assert_eq!(answer.field("Cache-Control"), Some("no-store"));
        assert_eq!(answer.field("Connection"), None);
    }
    say(&mut balancer, "HEAD /healthz HTTP/1.1\r\nHost: h");
    let head = balancer.head();
    assert_eq!(
        (head.status(), head.field("Content-Length")),
        (200, Some("3"))
    );
    assert_eq!(answered(&world), 4);
    let status = world.status();
    assert_eq!((status.held_now, status.held, status.in_flight), (1, 1, 0));
    world.move_to(Site::Target);
    assert_eq!(client.message().body, "target GET /page");
    world.until(|status| status.gate == cutover_protocol::hold::Gate::Open);
    assert_eq!(
        balancer.get("/healthz").message().body,
        "target GET /healthz"
    );
    assert_eq!(answered(&world), 4);
    assert_eq!(source.seen(), ["GET /healthz"]);
    assert_eq!(target.seen(), ["GET /page", "GET /healthz"]);
    balanced(&world);
    world.proxy.take().unwrap().stop(PATIENCE);
    let log = std::fs::read_to_string(world.folder.path().join("access.log")).unwrap();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" answered_by=front_check id="))
        .collect();
    assert_eq!(lines.len(), 4, "{log}");
    assert!(
        lines[0].contains("request=\"GET /healthz?from=lb\" status=200"),
        "{log}"
    );
    assert!(lines[0].contains("held_ms=0.000 upstream=- "), "{log}");
}

#[test]
fn nothing_but_a_check_is_answered_for_an_application() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let check = "[[service.front_check]]\npath = [\"/healthz\", \"*\"]\nuser_agent = [\"kube-probe/\", \"ELB-\"]";
    let world = plan(&source, &target, check).start();
    world.hold();
    let checks = [
        "GET /healthz HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33",
        "OPTIONS * HTTP/1.1\r\nHost: h\r\nUser-Agent: ELB-HealthChecker/2.0",
        "GET /healthz HTTP/1.0\r\nHost: h\r\nUser-Agent: ELB-",
    ];
    for head in checks {
        let mut client = world.client();
        say(&mut client, head);
        assert_eq!(client.message().status(), 200, "{head}");
    }
    let others = [
        "GET /healthz HTTP/1.1\r\nHost: h",
        "GET /healthz HTTP/1.1\r\nHost: h\r\nUser-Agent: Mozilla/5.0 kube-probe/1.33",
        "GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33",
        "GET /healthz/ HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33",
        "POST /healthz HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33\r\nContent-Length: 0",
        "GET /healthz HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33\r\nContent-Length: 2",
        "GET /healthz HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.33\r\nConnection: upgrade\r\nUpgrade: websocket",
    ];
    let mut clients = Vec::new();
    for (index, head) in others.into_iter().enumerate() {
        let mut client = world.client();
        say(&mut client, head);
        world.until_held(index as u64 + 1);
        clients.push(client);
    }
    assert_eq!(answered(&world), 3);
    assert_eq!(source.seen(), [""; 0]);
}

#[test]
fn whoever_is_known_by_its_address_alone_must_not_speak_for_others() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let check = "[[service.front_check]]\nfrom = [\"192.0.2.0/24\", \"127.0.0.1\"]\nstatus = 204";
    let world = plan(&source, &target, check).start();
    world.hold();
    let mut balancer = world.client();
    let answer = balancer.get("/").message();
    assert_eq!(answer.first_line, "HTTP/1.1 204 OK");
    assert_eq!(
        (answer.field("Content-Length"), &answer.body[..]),
        (None, "")
    );
    assert_eq!(balancer.get("/again").message().status(), 204);
    let mut clients = Vec::new();
    for (count, field) in [
        "X-Forwarded-For: 198.51.100.1",
        "Forwarded: for=198.51.100.1",
        "Via: 1.1 lb",
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = world.client();
        say(
            &mut client,
            &format!("GET / HTTP/1.1\r\nHost: h\r\n{field}"),
        );
        world.until_held(count as u64 + 1);
        clients.push(client);
    }
    assert_eq!(answered(&world), 2);
}

#[test]
fn a_route_has_checks_of_its_own() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let service = "[[service.front_check]]\npath = \"/up\"\n\
                   [[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\n\
                   [[service.route.front_check]]\npath = \"/api/up\"\nstatus = 202\nbody = \"api held\"\n\
                   [[service.route]]\nname = \"plain\"\npath_prefix = \"/plain\"";
    let world = plan(&source, &target, service).start();
    world.hold();
    let mut balancer = world.client();
    assert_eq!(balancer.get("/up").message().body, "ok\n");
    let own = balancer.get("/api/up").message();
    assert_eq!((own.status(), &own.body[..]), (202, "api held"));
    assert_eq!(answered(&world), 2);
    // What is none for the route is held; a route that says nothing has its service's.
    let (mut first, mut second) = (world.client(), world.client());
    first.get("/api/other");
    second.get("/plain/up");
    world.until_held(2);
}

#[test]
fn checks_over_streams_are_answered_as_well() {
    let check = "[[service.front_check]]\nuser_agent = \"GoogleHC/\"";
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = plan(&source, &target, check).start();
    world.hold();
    let ask = |uri: &str, method: Method| {
        let request = Request::builder().method(method).uri(uri);
        request
            .header("user-agent", "GoogleHC/1.0")
            .body(())
            .unwrap()
    };
    let mut client = Client2::connect(world.address());
    let held = client.get("/page");
    world.until_held(1);
    let check = client.send(ask("http://h/", Method::GET), true);
    let answer = client.answer(check);
    assert_eq!((answer.status, &answer.body[..]), (200, "ok\n"));
    let check = client.send(ask("http://h/", Method::HEAD), true);
    let answer = client.answer(check);
    assert_eq!((answer.status, &answer.body[..]), (200, ""));
    assert_eq!((answered(&world), world.status().held_now), (2, 1));
    world.reopen();
    assert_eq!(client.answer(held).body, "source GET /page");

    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let check = "[[service.front_check]]\nuser_agent = \"GoogleHC/\"";
    let world = plan(&source, &target, check).start_http3();
    world.world.hold();
    let mut client = world.client();
    let held = client.get("/page");
    world.world.until_held(1);
    let mut check = client.send(ask(&format!("https://{NAME}/"), Method::GET));
    client.wait(check.finish()).unwrap();
    let answer = client.answer(check);
    assert_eq!((answer.status, answer.text()), (200, "ok\n"));
    assert_eq!(
        (answered(&world.world), world.world.status().held_now),
        (1, 1)
    );
    world.world.reopen();
    assert_eq!(client.answer(held).text(), "source GET /page");
    assert_eq!(source.seen(), ["GET /page"]);
}

#[test]
fn a_check_is_green_while_others_still_drain_and_while_the_held_are_let_through() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = Plan::new(source.address(), target.address())
        .table(METRICS)
        .service("[[service.front_check]]\npath = \"/healthz\"")
        .start();
    let mut busy = world.client();
    busy.get("/long");
    let mut upstream = source.accept();
    upstream.message();
    let mut control = Control::connect(&world.folder);
    let draining = std::thread::spawn(move || {
        let epoch = control.status().register.epoch;
        control.say(&hold(epoch, 60_000, 20_000))
    });
    world.until(|status| status.gate == cutover_protocol::hold::Gate::Draining);
    let mut balancer = world.client();
    assert_eq!(balancer.get("/healthz").message().body, "ok\n");
    upstream.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    assert_eq!(busy.message().status(), 204);
    drop(upstream);
    crate::world::done(draining.join().unwrap());
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    world.move_to(Site::Target);
    // The canary is with the target, and the gate is not open yet.
    let mut upstream = target.accept();
    upstream.message();
    assert_eq!(balancer.get("/healthz").message().body, "ok\n");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(held.message().status(), 204);
    assert_eq!(answered(&world), 2);
    assert!(source.is_deserted());
}

#[test]
fn a_full_queue_leaves_checks_green_and_an_open_gate_leaves_them_true() {
    let nobody = Nobody::new();
    let world = Plan::new(nobody.address(), nobody.address())
        .table(METRICS)
        .limits("held_max = 0")
        .service("[[service.front_check]]\npath = \"/healthz\"")
        .start();
    let mut balancer = world.client();
    assert_eq!(balancer.get("/healthz").message().status(), 502);
    world.hold();
    let mut balancer = world.client();
    assert_eq!(balancer.get("/healthz").message().status(), 200);
    assert_eq!(balancer.get("/page").message().status(), 503);
    assert_eq!(answered(&world), 1);
}
