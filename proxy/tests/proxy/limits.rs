//! Each limit, provoked: the exact answer, the counter that says why, and what the origin saw of it.

use std::io::Write;

use crate::world::{Origin, Peer, Plan, Stage, World, hold};

fn world(origin: &Origin, limits: &str, service: &str) -> World {
    Plan::new(origin.address(), origin.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .limits(limits)
        .service(service)
        .start()
}

/// How many were refused for this reason. Also checks that nothing else was.
pub(crate) fn refused(world: &World, reason: &str) -> u64 {
    let label = format!("reason=\"{reason}\"");
    let lines = world.metrics();
    let mut count = None;
    for line in lines
        .lines()
        .filter(|line| line.starts_with("hopgate_refused_total{"))
    {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let value: u64 = value.parse().unwrap();
        if name.contains(&label) {
            count = Some(value);
        } else {
            assert_eq!(value, 0, "{name}");
        }
    }
    count.unwrap_or_else(|| panic!("no counter for {reason}"))
}

fn post_chunks(client: &mut Peer, chunks: &[&str]) {
    client.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n");
    for chunk in chunks {
        // The proxy may close after the answer, and need not read the rest.
        let _ = client
            .socket()
            .write_all(format!("{:x}\r\n{chunk}\r\n", chunk.len()).as_bytes());
    }
    let _ = client.socket().write_all(b"0\r\n\r\n");
}

#[test]
fn a_client_beyond_its_rate_gets_429_and_how_long_to_wait() {
    let origin = Origin::new("source");
    let world = world(&origin, "", "rate = { requests_per_s = 0.01, burst = 2 }");
    let mut client = world.client();
    assert_eq!(client.get("/1").message().status(), 200);
    assert_eq!(world.client().get("/2").message().status(), 200);
    let answer = client.get("/3").message();
    assert_eq!(answer.first_line, "HTTP/1.1 429 Too Many Requests");
    assert_eq!(answer.field("Retry-After"), Some("100"));
    assert_eq!(
        answer.body,
        "Too Many Requests: too many requests; come back in 100 s\n"
    );
    // The connection goes on: a new one would cost us both more.
    assert_eq!(client.get("/4").message().status(), 429);
    assert_eq!(origin.seen(), ["GET /1", "GET /2"]);
    assert_eq!(refused(&world, "rate"), 2);
}

#[test]
fn a_route_has_a_rate_of_its_own() {
    let origin = Origin::new("source");
    let route = "[[service.route]]\nname = \"login\"\npath_prefix = \"/login\"\n\
                 rate = { requests_per_s = 0.01, burst = 1, by = \"all\" }";
    let world = world(&origin, "", route);
    let mut client = world.client();
    assert_eq!(client.post("/login", "a").message().status(), 200);
    assert_eq!(client.get("/").message().status(), 200);
    client.post("/login", "b");
    let answer = client.message();
    assert_eq!(answer.status(), 429);
    // Its body was not read, so the connection cannot go on.
    assert_eq!(answer.field("Connection"), Some("close"));
    assert_eq!(origin.seen(), ["POST /login a", "GET /"]);
    assert_eq!(refused(&world, "rate"), 1);
}

#[test]
fn a_declared_body_is_taken_up_to_the_limit_and_refused_beyond_it_unread() {
    let origin = Origin::new("source");
    let world = world(&origin, "body_bytes_max = 5", "");
    let mut client = world.client();
    assert_eq!(client.post("/", "12345").message().status(), 200);
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\n");
    let answer = client.message();
    assert_eq!(answer.first_line, "HTTP/1.1 413 Content Too Large");
    assert_eq!(
        answer.body,
        "Content Too Large: the request body is longer than allowed\n"
    );
    assert_eq!(origin.seen(), ["POST / 12345"]);
    assert_eq!(refused(&world, "body_bytes"), 1);
}

#[test]
fn a_chunked_body_is_refused_where_it_passes_the_limit() {
    let origin = Origin::new("source");
    let world = world(&origin, "body_bytes_max = 5", "");
    let mut client = world.client();
    post_chunks(&mut client, &["123", "45"]);
    assert_eq!(client.message().status(), 200);
    post_chunks(&mut client, &["123", "456"]);
    let answer = client.message();
    assert_eq!(answer.status(), 413);
    assert_eq!(answer.field("Connection"), Some("close"));
    assert!(client.is_closed());
    assert_eq!(origin.seen(), ["POST / 12345"]);
    assert_eq!(refused(&world, "body_bytes"), 1);
}

#[test]
fn a_route_may_have_nothing_but_a_time_of_its_own() {
    let stage = Stage::new();
    let route =
        "[[service.route]]\nname = \"quick\"\npath_prefix = \"/quick\"\nrequest_ms_max = 50";
    let world = Plan::new(stage.address(), stage.address())
        .service(route)
        .start();
    let mut client = world.client();
    client.get("/quick");
    let mut upstream = stage.accept();
    upstream.message();
    assert_eq!(client.message().status(), 504);
}

#[test]
fn a_route_may_take_longer_bodies_than_the_rest() {
    let origin = Origin::new("source");
    let route =
        "[[service.route]]\nname = \"upload\"\npath_prefix = \"/upload\"\nbody_bytes_max = 6";
    let world = world(&origin, "body_bytes_max = 5", route);
    assert_eq!(
        world.client().post("/upload", "123456").message().status(),
        200
    );
    assert_eq!(
        world.client().post("/upload", "1234567").message().status(),
        413
    );
    assert_eq!(world.client().post("/", "123456").message().status(), 413);
    assert_eq!(refused(&world, "body_bytes"), 2);
}

#[test]
fn a_body_slower_than_its_least_pace_gets_408() {
    let limits = "client_body_bytes_per_s_min = 1000\nclient_body_window_ms = 50";
    for framing in [
        "Content-Length: 1000000",
        "Content-Length: 100",
        "Transfer-Encoding: chunked",
    ] {
        let stage = Stage::new();
        let world = Plan::new(stage.address(), stage.address())
            .table("[metrics]\nlisten = \"127.0.0.1:0\"")
            .limits(limits)
            .start();
        let mut client = world.client();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n3\r\nabc\r\n"
        ));
        let mut upstream = stage.accept();
        assert_eq!(upstream.head().first_line, "POST / HTTP/1.1");
        let answer = client.message();
        assert_eq!(answer.first_line, "HTTP/1.1 408 Request Timeout");
        assert_eq!(
            answer.body,
            "Request Timeout: the request body comes too slowly\n"
        );
        assert!(client.is_closed());
        assert_eq!(refused(&world, "body_slow"), 1);
    }
}

#[test]
fn a_head_past_its_limits_is_counted_by_which() {
    let origin = Origin::new("source");
    for (request, reason, status) in [
        (
            format!(
                "GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n",
                "a".repeat(1100)
            ),
            "head_bytes",
            431,
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "a:\r\n".repeat(200)),
            "head_fields",
            431,
        ),
        (
            "GET / HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n".to_owned(),
            "head",
            400,
        ),
        ("GET / HTTP/1.1\r\nHo".to_owned(), "head_slow", 408),
    ] {
        let world = world(
            &origin,
            "head_bytes_max = 1024\nclient_head_ms_max = 50",
            "",
        );
        let mut client = world.client();
        client.send(request);
        assert_eq!(client.message().status(), status, "{reason}");
        assert!(client.is_closed(), "{reason}");
        assert_eq!(refused(&world, reason), 1);
    }
}

#[test]
fn a_bad_chunk_is_counted_as_a_bad_body() {
    let origin = Origin::new("source");
    let world = world(&origin, "", "");
    let mut client = world.client();
    client.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n");
    assert_eq!(client.message().status(), 400);
    assert_eq!(refused(&world, "body"), 1);
}

#[test]
fn whoever_cannot_be_held_is_counted() {
    let origin = Origin::new("source");
    let world = world(&origin, "held_max = 0", "");
    world.hold();
    let answer = world.client().get("/").message();
    assert_eq!(
        (answer.status(), answer.field("Retry-After")),
        (503, Some("5"))
    );
    assert_eq!(refused(&world, "held_full"), 1);
}

#[test]
fn an_address_with_all_its_connections_gets_no_other_until_one_ends() {
    let origin = Origin::new("source");
    let world = world(&origin, "address_connections_max = 2", "");
    let (mut first, mut second) = (world.client(), world.client());
    assert_eq!(first.get("/1").message().status(), 200);
    assert_eq!(second.get("/2").message().status(), 200);
    assert!(world.client().is_closed());
    assert_eq!(refused(&world, "address_connections"), 1);
    drop(first);
    // Its place is free once the proxy has seen it go.
    let served = (0..10_000).any(|_| {
        let mut next = world.client();
        let _ = next
            .socket()
            .write_all(b"GET /3 HTTP/1.1\r\nHost: h\r\n\r\n");
        !next.is_closed()
    });
    assert!(served);
}

#[test]
fn a_trusted_peer_has_as_many_connections_as_it_wants() {
    let origin = Origin::new("source");
    let world = world(
        &origin,
        "address_connections_max = 1",
        "trusted_from = \"127.0.0.1\"",
    );
    let mut clients: Vec<Peer> = (0..5).map(|_| world.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/").message().status(), 200);
    }
}

#[test]
fn a_proxy_without_memory_to_spare_answers_503_and_recovers() {
    let origin = Origin::new("source");
    let world = world(
        &origin,
        "memory_bytes_max = 400000000\nmemory_percent_max = 0",
        "",
    );
    let pressed = || world.metrics().contains("hopgate_memory_pressed 1\n");
    let mut idle = world.client();
    assert_eq!(idle.get("/1").message().status(), 200);
    let mut busy = world.client();
    busy.send("GET /2 HTTP/1.1\r\n");
    let ballast = vec![1_u8; 600_000_000];
    while !pressed() {
        std::thread::yield_now();
    }
    assert!(idle.is_closed());
    busy.send("Host: h\r\n\r\n");
    let answer = busy.message();
    assert_eq!(answer.first_line, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(answer.field("Retry-After"), Some("5"));
    assert_eq!(
        answer.body,
        "Service Unavailable: this proxy has no memory to spare\n"
    );
    assert_eq!(refused(&world, "memory"), 1);
    // Whoever comes now waits until there is memory again.
    let mut newcomer = world.client();
    newcomer.get("/3");
    assert_eq!(
        ballast.iter().map(|byte| usize::from(*byte)).sum::<usize>(),
        ballast.len()
    );
    drop(ballast);
    assert_eq!(newcomer.message().status(), 200);
    assert!(!pressed());
    assert_eq!(origin.seen(), ["GET /1", "GET /3"]);
}

#[test]
fn a_path_of_two_readings_is_counted_as_such() {
    let origin = Origin::new("source");
    let route = "[[service.route]]\nname = \"admin\"\npath_prefix = \"/admin\"";
    let world = world(&origin, "", route);
    let answer = world.client().get("/x/../admin").message();
    assert_eq!(answer.first_line, "HTTP/1.1 400 Bad Request");
    assert_eq!(refused(&world, "path"), 1);
    assert_eq!(origin.seen(), [""; 0]);
}

#[test]
fn whoever_is_held_for_too_long_is_counted() {
    let origin = Origin::new("source");
    let world = world(&origin, "hold_ms_max = 50\nretry_after_s = 7", "");
    world.hold();
    let answer = world.client().get("/").message();
    assert_eq!(
        (
            answer.status(),
            answer.field("Retry-After"),
            &answer.body[..]
        ),
        (
            503,
            Some("7"),
            "Service Unavailable: the service did not come back in time\n"
        )
    );
    assert_eq!(refused(&world, "held_too_long"), 1);
    assert_eq!(origin.seen(), [""; 0]);
}

#[test]
fn whoever_is_cut_is_counted() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .service("at_cut = \"cut\"")
        .start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    let epoch = world.status().register.epoch;
    world.control().say(&hold(epoch, 60_000, 50));
    let answer = client.message();
    assert_eq!(answer.first_line, "HTTP/1.1 504 Gateway Timeout");
    assert!(answer.field("X-Request-Id").is_some());
    assert_eq!(refused(&world, "cut"), 1);
}

#[test]
fn a_request_that_comes_back_is_refused_and_counted() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .service("loop_id = \"edge-a\"")
        .start();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHost: h\r\nCDN-Loop: edge-b\r\nConnection: CDN-Loop\r\n\r\n");
    // What the upstream got, as another proxy would send it back.
    let mut upstream = stage.accept();
    let sent = upstream.message();
    let passed: Vec<_> = sent
        .fields
        .iter()
        .filter(|(name, _)| name == "CDN-Loop")
        .map(|(_, value)| &value[..])
        .collect();
    assert_eq!(passed, ["edge-b", "edge-a"]);
    let lines: String = sent
        .fields
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let answer = world
        .client()
        .send(format!("{}\r\n{lines}\r\n", sent.first_line))
        .message();
    assert_eq!(answer.first_line, "HTTP/1.1 508 Loop Detected");
    assert_eq!(refused(&world, "loop"), 1);
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.message().body, "ok");
}
