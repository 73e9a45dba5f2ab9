//! Requests and answers, in every framing, with an open gate.

use std::io::Write;
use std::thread;

use crate::world::{Nobody, Origin, Peer, Plan, Stage, World};

fn echo() -> (World, Origin) {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), Nobody::new().address()).start();
    (world, origin)
}

fn staged() -> (World, Stage) {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), Nobody::new().address()).start();
    (world, stage)
}

#[test]
fn a_get_arrives_with_the_clients_address_and_its_host() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send("GET /a?b=c HTTP/1.1\r\nHost: example.org:81\r\nX-Forwarded-Proto: https\r\nAccept: x\r\n\r\n");
    let mut upstream = stage.accept();
    let request = upstream.message();
    assert_eq!(request.first_line, "GET /a?b=c HTTP/1.1");
    assert_eq!(request.field("Host"), Some("example.org:81"));
    assert_eq!(request.field("X-Forwarded-For"), Some("127.0.0.1"));
    assert_eq!(request.field("X-Forwarded-Proto"), Some("http"));
    assert_eq!(request.field("Accept"), Some("x"));
    assert!(request.field("X-Request-Id").is_some());
    upstream.send("HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nSet-Cookie: a\r\nConnection: X-Own\r\nX-Own: 1\r\n\r\nok");
    let answer = client.message();
    assert_eq!(
        (answer.first_line.as_str(), answer.body.as_str()),
        ("HTTP/1.1 200 Fine", "ok")
    );
    assert_eq!(answer.field("Set-Cookie"), Some("a"));
    assert_eq!(
        (answer.field("X-Own"), answer.field("Connection")),
        (None, None)
    );
}

#[test]
fn one_client_connection_and_one_upstream_connection_serve_many_requests() {
    let (world, origin) = echo();
    let mut client = world.client();
    for number in 0..50 {
        let path = format!("/{number}");
        assert_eq!(
            client.get(&path).message().body,
            format!("source GET {path}")
        );
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let (world, _origin) = echo();
    let mut client = world.client();
    client.get("/1").post("/2", "two").get("/3");
    assert_eq!(client.message().body, "source GET /1");
    assert_eq!(client.message().body, "source POST /2 two");
    assert_eq!(client.message().body, "source GET /3");
}

#[test]
fn a_head_that_arrives_byte_by_byte_is_read() {
    let (world, _origin) = echo();
    let mut client = world.client();
    for byte in b"\r\nPOST /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" {
        client.send([*byte]);
    }
    assert_eq!(client.message().body, "source POST /slow abc");
}

#[test]
fn a_chunked_upload_arrives_whole_with_its_trailers_and_without_its_extensions() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n");
    let mut upstream = stage.accept();
    let request = upstream.head();
    assert_eq!(
        (
            request.field("Transfer-Encoding"),
            request.field("Content-Length")
        ),
        (Some("chunked"), None)
    );
    client.send("4\r\nde");
    client.send("fg\r\n0\r\nX-Sum: 7\r\n\r\n");
    assert_eq!(upstream.chunks(), b"abcdefg{X-Sum: 7}");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
}

#[test]
fn a_chunked_answer_keeps_both_connections() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/1");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel");
    upstream.send("lo\r\n1\r\n!\r\n0\r\nX-End: 1\r\n\r\n");
    assert_eq!(client.message().body, "hello!{X-End: 1}");
    client.get("/2");
    assert_eq!(upstream.message().first_line, "GET /2 HTTP/1.1");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.message().status(), 204);
}

#[test]
fn an_answer_until_the_close_is_chunked_for_a_new_client_and_closed_for_an_old_one() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.0 200 OK\r\n\r\nuntil here");
    drop(upstream);
    assert_eq!(client.message().body, "until here");

    let mut old = world.client();
    old.send("GET / HTTP/1.0\r\n\r\n");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nold!\r\n0\r\n\r\n");
    let head = old.head();
    assert_eq!(
        (head.field("Connection"), head.field("Transfer-Encoding")),
        (Some("close"), None)
    );
    assert_eq!(old.rest(), "old!");
}

#[test]
fn an_old_client_may_keep_its_connection() {
    let (world, _origin) = echo();
    let mut old = world.client();
    for _ in 0..2 {
        old.send("GET /k HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        let answer = old.message();
        assert_eq!(
            (answer.field("Connection"), answer.body.as_str()),
            (Some("keep-alive"), "source GET /k")
        );
    }
}

#[test]
fn answers_without_a_body_keep_the_connection() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send("HEAD /h HTTP/1.1\r\nHost: h\r\n\r\n");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n");
    assert_eq!(client.head().field("Content-Length"), Some("99"));
    for answer in [
        "204 No Content\r\n",
        "304 Not Modified\r\nContent-Length: 9\r\n",
    ] {
        client.get("/");
        upstream.message();
        upstream.send(format!("HTTP/1.1 {answer}\r\n"));
        assert!(answer.starts_with(&client.head().status().to_string()));
    }
    client.get("/last");
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.message().body, "ok");
}

#[test]
fn a_client_that_expects_100_continue_gets_the_upstreams() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    let mut upstream = stage.accept();
    assert_eq!(upstream.head().field("Expect"), Some("100-continue"));
    upstream.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n");
    assert_eq!(client.head().status(), 100);
    assert_eq!(client.head().field("Link"), Some("x"));
    client.send("body");
    assert_eq!(upstream.bytes(4), b"body");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
}

#[test]
fn an_early_refusal_ends_an_upload_and_is_read_by_the_client() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nsome");
    let mut upstream = stage.accept();
    upstream.head();
    upstream.send("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno");
    let answer = client.message();
    assert_eq!(
        (
            answer.status(),
            answer.field("Connection"),
            answer.body.as_str()
        ),
        (413, Some("close"), "no")
    );
    assert!(client.is_closed());
}

#[test]
fn large_bodies_pass_in_both_directions_at_once() {
    const BYTES: usize = 8 << 20;
    let (world, stage) = staged();
    let client = world.client();
    let sender = client.socket().try_clone().unwrap();
    let writes = thread::spawn(move || {
        let mut sender = sender;
        write!(
            sender,
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {BYTES}\r\n\r\n"
        )
        .unwrap();
        sender.write_all(&vec![b'u'; BYTES]).unwrap();
    });
    let upstream_works = thread::spawn(move || {
        let mut upstream = stage.accept();
        upstream.head();
        upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        for _ in 0..BYTES / (1 << 16) {
            let block = upstream.bytes(1 << 16);
            assert!(block.iter().all(|byte| *byte == b'u'));
            upstream
                .send("10000\r\n")
                .send(vec![b'd'; 1 << 16])
                .send("\r\n");
        }
        upstream.send("0\r\n\r\n");
    });
    let mut client = client;
    client.head();
    let body = client.chunks();
    assert!(body.len() == BYTES && body.iter().all(|byte| *byte == b'd'));
    writes.join().unwrap();
    upstream_works.join().unwrap();
}

#[test]
fn a_large_answer_that_pauses_where_a_read_ends_arrives_up_to_there() {
    const BYTES: usize = 1 << 20;
    /// The proxy's read takes so much at once.
    const READ_BYTES: usize = 16 * 1024;
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n");
    let body: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    let (first, rest) = body.split_at(READ_BYTES - head.len());
    upstream.send([head.as_bytes(), first].concat());
    assert_eq!(client.head().status(), 200);
    assert!(client.bytes(first.len()) == first);
    upstream.send(rest);
    assert!(client.bytes(rest.len()) == rest);
}

#[test]
fn a_websocket_passes_both_ways_and_only_after_101() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.send(
        "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly",
    );
    let mut upstream = stage.accept();
    let request = upstream.message();
    assert_eq!(
        (request.field("Connection"), request.field("Upgrade")),
        (Some("upgrade"), Some("websocket"))
    );
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-A: 1\r\n\r\nhello");
    let answer = client.head();
    assert_eq!(
        (
            answer.status(),
            answer.field("Upgrade"),
            answer.field("X-A")
        ),
        (101, Some("websocket"), Some("1"))
    );
    assert_eq!(client.bytes(5), b"hello");
    assert_eq!(upstream.bytes(5), b"early");
    client.send("up");
    assert_eq!(upstream.bytes(2), b"up");
    upstream.send("down");
    assert_eq!(client.bytes(4), b"down");
    assert_eq!(world.status().in_flight, 1);
    drop(client);
    assert!(upstream.is_closed());
}

#[test]
fn a_refused_upgrade_stays_http() {
    let (world, stage) = staged();
    let mut client = world.client();
    client
        .send("GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .get("/next");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 426);
    assert_eq!(upstream.message().first_line, "GET /next HTTP/1.1");
}

#[test]
fn a_kept_connection_that_the_upstream_closed_is_not_used() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/1");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    client.message();
    drop(upstream);
    client.post("/2", "x");
    let mut upstream = stage.accept();
    assert_eq!(upstream.message().body, "x");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
}

/// A kept connection that dies with the request on it, unanswered.
fn dies_under(request: &str) -> (World, Stage, Peer) {
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/1");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    client.message();
    client.send(request);
    upstream.message();
    drop(upstream);
    (world, stage, client)
}

#[test]
fn a_get_that_met_a_dying_connection_is_asked_again() {
    let (_world, stage, mut client) = dies_under("GET /again HTTP/1.1\r\nHost: h\r\n\r\n");
    let mut upstream = stage.accept();
    assert_eq!(upstream.message().first_line, "GET /again HTTP/1.1");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
}

#[test]
fn a_post_that_met_a_dying_connection_is_never_sent_twice() {
    let (_world, stage, mut client) =
        dies_under("POST /once HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx");
    assert_eq!(client.message().status(), 502);
    assert!(stage.is_deserted());
}

#[test]
fn an_upstream_that_is_not_there_is_a_502_and_the_client_stays() {
    let nobody = Nobody::new();
    let world = Plan::new(nobody.address(), nobody.address()).start();
    let mut client = world.client();
    for _ in 0..2 {
        let answer = client.get("/").message();
        assert_eq!((answer.status(), answer.field("Connection")), (502, None));
    }
}

#[test]
fn an_upstream_that_is_silent_is_a_504() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .limits("response_ms_max = 50")
        .start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    assert_eq!(client.message().status(), 504);
    // What it does is waited for, and its connection is not used again.
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert!(upstream.is_closed());
}

#[test]
fn an_upstream_that_stops_in_the_middle_of_its_answer_ends_the_connection() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .limits("between_bytes_ms_max = 50")
        .start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    assert!(client.rest().ends_with("\r\n\r\nhalf"));
    assert!(upstream.is_closed());
}

#[test]
fn a_request_has_its_time_in_all() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .limits("request_ms_max = 50")
        .start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    assert_eq!(client.message().status(), 504);
    // What it does is waited for.
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert!(upstream.is_closed());
}

#[test]
fn an_upstream_that_does_not_speak_http_is_a_502() {
    for nonsense in [
        "SSH-2.0-x\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ] {
        let (world, stage) = staged();
        let mut client = world.client();
        client.get("/");
        let mut upstream = stage.accept();
        upstream.message();
        upstream.send(nonsense);
        assert_eq!(client.message().status(), 502, "{nonsense}");
    }
}

#[test]
fn an_answer_that_breaks_off_breaks_the_clients_connection() {
    let (world, stage) = staged();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    drop(upstream);
    client.head();
    assert_eq!(client.rest(), "half");
}

#[test]
fn a_raw_connection_passes_bytes_and_half_closes() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address()).tcp().start();
    let mut client = world.client();
    let mut upstream = stage.accept();
    upstream.send("server speaks first\n");
    assert_eq!(client.line(), "server speaks first");
    client.send("over to you\n");
    client.socket().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(upstream.rest(), "over to you\n");
    upstream.send("and back");
    drop(upstream);
    assert_eq!(client.rest(), "and back");
}

#[test]
fn more_clients_than_allowed_wait_for_one_to_leave() {
    let origin = Origin::new("source");
    let mut plan = Plan::new(origin.address(), origin.address())
        .limits("connections_max = 1")
        .table("[metrics]\nlisten = \"127.0.0.1:0\"");
    // One worker: it has seen the second client when it answers what the first one asks after that.
    plan.workers = 1;
    let world = plan.start();
    let waited = |count| {
        let line = format!("hopgate_connections_waited_total{{service=\"web\"}} {count}\n");
        world.metrics().contains(&line)
    };
    let mut first = world.client();
    assert_eq!(first.get("/first").message().status(), 200);
    let mut second = world.client();
    second.get("/second");
    assert_eq!(first.get("/first").message().status(), 200);
    assert!(waited(0));
    drop(first);
    assert_eq!(second.message().status(), 200);
    assert!(waited(1));
    assert_eq!(origin.seen(), ["GET /first", "GET /first", "GET /second"]);
}

/// What the access log says of one request.
fn logged(format: &str) -> (String, Origin) {
    let origin = Origin::new("source");
    let table = format!("[access_log]\npath = \"access.log\"\nformat = \"{format}\"");
    let world = Plan::new(origin.address(), origin.address())
        .table(&table)
        .start();
    world.client().get("/say\"so").message();
    let World { mut proxy, folder } = world;
    proxy.take().unwrap().stop(crate::world::PATIENCE);
    let log = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    (log, origin)
}

#[test]
fn a_line_of_the_access_log_may_be_an_object() {
    let (log, origin) = logged("json");
    let line: serde_json::Value = serde_json::from_str(&log).unwrap();
    assert_eq!(line["request"], "GET /say\"so");
    assert_eq!(line["status"], 200);
    assert_eq!(line["service"], "web");
    assert_eq!(line["upstream"], origin.address().to_string());
    assert_eq!(
        (&line["site"], &line["epoch"]),
        (&"source".into(), &1.into())
    );
    assert!(line["held_ms"].as_f64().is_some_and(|ms| ms < 1.0), "{log}");
}

#[test]
fn a_line_of_the_access_log_may_have_the_common_form() {
    let (log, _origin) = logged("common");
    assert!(log.starts_with("127.0.0.1 - - ["), "{log}");
    assert!(log.contains(" +0000] \"GET /say\\\"so\" 200 "), "{log}");
}

#[test]
fn every_request_has_a_line_in_the_access_log() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .table("[access_log]\npath = \"access.log\"")
        .start();
    let mut client = world.client();
    client.get("/say\"so").message();
    client.send("BAD\r\n\r\n").message();
    let World { mut proxy, folder } = world;
    proxy.take().unwrap().stop(crate::world::PATIENCE);
    let log = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 2, "{log}");
    let expected = [
        "service=web client=127.0.0.1:",
        "request=\"GET /say\\\"so\" status=200 bytes=",
        "held_ms=0.000",
        &format!("upstream={} site=source epoch=1 id=", origin.address()),
    ];
    for part in expected {
        assert!(lines[0].contains(part), "{part} in {log}");
    }
    assert!(
        lines[1].contains("request=\"(the request has a line that is not HTTP)\" status=400"),
        "{log}"
    );
}
