//! HTTP/2 to upstreams: one connection for many requests, of HTTP/1 and HTTP/2 clients alike, drained like any other
//! at a hold, and no request sent twice that may have been processed.

use std::thread;

use bytes::Bytes;
use cutover_protocol::hold::Gate;
use cutover_protocol::id::Site;
use h2::Reason;
use h2::ext::Protocol;
use h2::server::Builder;
use http::{HeaderMap, HeaderValue, Method, Request};

use crate::client2::{Client2, Stream2};
use crate::stage2::{Asked2, Stage2};
use crate::world::{Origin, Plan, Stage, World};

fn world(source: std::net::SocketAddr, target: std::net::SocketAddr) -> World {
    with_table(source, target, "")
}

fn with_table(source: std::net::SocketAddr, target: std::net::SocketAddr, table: &str) -> World {
    let group = |name: &str, address| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nprotocol = \"http2\"\nservers = [{{ address = \"{address}\" }}]\n"
        )
    };
    let mut plan = Plan::new(source, target)
        .table(table)
        .table(&group("at-source", source))
        .table(&group("at-target", target));
    // One worker, so that one connection is enough for all.
    plan.workers = 1;
    plan.named("at-source", "at-target").start()
}

fn staged() -> (World, Stage2) {
    let stage = Stage2::new();
    (world(stage.address(), stage.address()), stage)
}

fn names(map: &HeaderMap) -> Vec<&str> {
    map.keys().map(http::HeaderName::as_str).collect()
}

#[test]
fn requests_of_all_clients_share_one_connection() {
    let (world, stage) = staged();
    let mut plain = world.client();
    plain.get("/plain");
    let connection = stage.accept();
    let first = connection.next();
    assert_eq!(first.request.uri().path(), "/plain");
    assert_eq!(first.request.uri().authority().unwrap().as_str(), "h");
    let fields = names(first.request.headers());
    assert_eq!(
        fields,
        ["x-forwarded-for", "x-forwarded-proto", "x-request-id", "te"]
    );
    let mut client = Client2::connect(world.address());
    let streams: Vec<Stream2> = (0..20)
        .map(|number| client.get(&format!("/{number}")))
        .collect();
    let asked: Vec<Asked2> = streams.iter().map(|_| connection.next()).collect();
    for asked in asked {
        let path = asked.request.uri().path().to_owned();
        asked.answer(&path);
    }
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(client.answer(stream).body, format!("/{number}"));
    }
    first.answer("late");
    assert_eq!(plain.message().body, "late");
    assert!(stage.is_deserted());
    assert_eq!(world.status().upstream_connections, 1);
}

#[test]
fn bodies_and_trailers_pass_both_ways_for_both_kinds_of_clients() {
    let (world, stage) = staged();
    let mut trailer = HeaderMap::new();
    trailer.insert("x-sum", HeaderValue::from_static("5"));

    let mut plain = world.client();
    plain.send("POST /plain HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 5\r\n\r\n");
    let connection = stage.accept();
    let mut asked = connection.next();
    assert_eq!(
        stage.body(&mut asked.body),
        ("hello".to_owned(), Some(trailer.clone()))
    );
    let mut answer = asked.head(200, false);
    answer.send_data(Bytes::from_static(b"ok"), false).unwrap();
    answer.send_trailers(trailer.clone()).unwrap();
    assert_eq!(plain.message().body, "ok{x-sum: 5}");

    let mut client = Client2::connect(world.address());
    let mut stream = client.begin(Method::POST, "/stream", false);
    stream
        .body
        .send_data(Bytes::from_static(b"hello"), false)
        .unwrap();
    stream.body.send_trailers(trailer.clone()).unwrap();
    let mut asked = connection.next();
    assert_eq!(
        stage.body(&mut asked.body),
        ("hello".to_owned(), Some(trailer.clone()))
    );
    let mut answer = asked.head(200, false);
    answer.send_data(Bytes::from_static(b"ok"), false).unwrap();
    answer.send_trailers(trailer.clone()).unwrap();
    let answer = client.answer(stream);
    assert_eq!(
        (answer.body.as_str(), answer.trailer),
        ("ok", Some(trailer))
    );
}

#[test]
fn an_answer_without_a_body_leaves_an_http1_client_its_connection() {
    let (world, stage) = staged();
    let mut plain = world.client();
    plain.get("/empty");
    let connection = stage.accept();
    drop(connection.next().head(200, true));
    let answer = plain.message();
    assert_eq!(
        (answer.status(), answer.field("content-length")),
        (200, Some("0"))
    );
    plain.send("HEAD /head HTTP/1.1\r\nHost: h\r\n\r\n");
    drop(connection.next().head(200, true));
    assert_eq!(plain.head().status(), 200);
    plain.post("/counted", "hello");
    let mut asked = connection.next();
    assert_eq!(asked.request.headers()["content-length"], "5");
    assert_eq!(stage.body(&mut asked.body).0, "hello");
    asked.answer("ok");
    assert_eq!(plain.message().body, "ok");
}

#[test]
fn no_more_streams_are_opened_than_the_upstream_takes() {
    let mut builder = Builder::new();
    builder.max_concurrent_streams(2);
    let stage = Stage2::with(builder);
    let world = world(stage.address(), stage.address());
    let mut client = Client2::connect(world.address());
    // What the upstream takes is known once it has said so.
    let settled = client.get("/first");
    let first = stage.accept();
    first.next().answer("");
    assert_eq!(client.answer(settled).status, 200);
    let streams: Vec<Stream2> = (0..4)
        .map(|number| client.get(&format!("/{number}")))
        .collect();
    let second = stage.accept();
    let asked = [first.next(), first.next(), second.next(), second.next()];
    assert!(first.is_quiet() && second.is_quiet());
    for asked in asked {
        asked.answer("ok");
    }
    for stream in streams {
        assert_eq!(client.answer(stream).body, "ok");
    }
}

#[test]
fn a_refused_stream_is_asked_again_unless_its_body_has_left_us() {
    let (world, stage) = staged();
    let mut client = Client2::connect(world.address());
    let stream = client.get("/refused");
    let connection = stage.accept();
    connection.next().respond.send_reset(Reason::REFUSED_STREAM);
    connection.next().answer("second");
    assert_eq!(client.answer(stream).body, "second");

    let stream = client.post("/refused", "body");
    let mut asked = connection.next();
    stage.body(&mut asked.body);
    asked.respond.send_reset(Reason::REFUSED_STREAM);
    assert_eq!(client.answer(stream).status, 502);
    assert!(connection.is_quiet());
}

#[test]
fn a_post_that_may_have_been_processed_is_never_sent_again() {
    let (world, stage) = staged();
    let mut client = Client2::connect(world.address());
    let stream = client.post("/", "once");
    let connection = stage.accept();
    connection.next().respond.send_reset(Reason::INTERNAL_ERROR);
    assert_eq!(client.answer(stream).status, 502);
    assert!(connection.is_quiet() && stage.is_deserted());
}

#[test]
fn an_upstream_that_leaves_finishes_what_it_has_and_gets_no_more() {
    let (world, stage) = staged();
    let mut client = Client2::connect(world.address());
    let stream = client.get("/last");
    let mut connection = stage.accept();
    let last = connection.next();
    connection.leave();
    // It still takes what was under way when it spoke; then everything goes to another connection.
    loop {
        let next = client.get("/next");
        let (asked, moved) = loop {
            if let Some(asked) = connection.try_next() {
                break (asked, false);
            }
            if let Some(other) = stage.try_accept() {
                break (other.next(), true);
            }
            thread::yield_now();
        };
        asked.answer("next");
        assert_eq!(client.answer(next).body, "next");
        if moved {
            break;
        }
    }
    last.answer("last");
    assert_eq!(client.answer(stream).body, "last");
    assert!(connection.is_closed());
}

#[test]
fn a_hold_closes_the_connection_once_its_last_answer_is_out() {
    let (source, target) = (Stage2::new(), Stage2::new());
    let world = world(source.address(), target.address());
    let mut client = Client2::connect(world.address());
    let running = client.get("/running");
    let connection = source.accept();
    let asked = connection.next();
    let mut control = world.control();
    let epoch = world.status().register.epoch;
    let holding = thread::spawn(move || control.hold(epoch));
    world.until(|status| status.gate == Gate::Draining);
    let held = client.get("/held");
    world.until_held(1);
    assert_eq!(world.status().upstream_connections, 1);
    asked.answer("done");
    assert_eq!(client.answer(running).body, "done");
    let status = holding.join().unwrap();
    assert_eq!((status.in_flight, status.upstream_connections), (0, 0));
    assert!(connection.is_closed());
    world.move_to(Site::Target);
    let moved = target.accept();
    moved.next().answer("target");
    assert_eq!(client.answer(held).body, "target");
    assert!(source.is_deserted());
}

#[test]
fn a_reset_stream_resets_the_upstreams_and_leaves_the_connection() {
    let (world, stage) = staged();
    let mut client = Client2::connect(world.address());
    let mut stream = client.get("/");
    let connection = stage.accept();
    let mut asked = connection.next();
    stream.body.send_reset(Reason::CANCEL);
    let reset = stage.wait(std::future::poll_fn(|context| {
        asked.respond.poll_reset(context)
    }));
    assert_eq!(reset.unwrap(), Reason::CANCEL);
    let next = client.get("/next");
    connection.next().answer("ok");
    assert_eq!(client.answer(next).body, "ok");
}

fn websocket() -> Builder {
    let mut builder = Builder::new();
    builder.enable_connect_protocol();
    builder
}

#[test]
fn an_http1_websocket_becomes_an_extended_connect() {
    let stage = Stage2::with(websocket());
    let world = world(stage.address(), stage.address());
    let mut plain = world.client();
    plain.send("GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n");
    let connection = stage.accept();
    let mut asked = connection.next();
    assert_eq!(asked.request.method(), Method::CONNECT);
    assert_eq!(
        asked
            .request
            .extensions()
            .get::<Protocol>()
            .unwrap()
            .as_str(),
        "websocket"
    );
    assert!(!asked.request.headers().contains_key("sec-websocket-key"));
    let mut down = asked.head(200, false);
    let answer = plain.head();
    assert_eq!(answer.status(), 101);
    assert_eq!(
        answer.field("sec-websocket-accept"),
        Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    );
    plain.send("up");
    let up = stage.wait(asked.body.data()).unwrap().unwrap();
    assert_eq!(up, "up");
    down.send_data(Bytes::from_static(b"down"), false).unwrap();
    assert_eq!(plain.bytes(4), b"down");
    plain.socket().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stage.body(&mut asked.body).0, "");
    down.send_data(Bytes::from_static(b"!"), true).unwrap();
    assert_eq!(plain.rest(), "!");
    world.until(|status| status.in_flight == 0);
}

#[test]
fn a_stream_websocket_goes_through_and_one_that_is_not_offered_is_a_502() {
    let stage = Stage2::with(websocket());
    let world = world(stage.address(), stage.address());
    let mut client = Client2::connect(world.address());
    client.ping();
    let open = |client: &mut Client2| {
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri("http://h/chat")
            .body(())
            .unwrap();
        request
            .extensions_mut()
            .insert(Protocol::from_static("websocket"));
        client.send(request, false)
    };
    let mut stream = open(&mut client);
    let connection = stage.accept();
    let mut asked = connection.next();
    let mut down = asked.head(200, false);
    down.send_data(Bytes::from_static(b"down"), true).unwrap();
    stream
        .body
        .send_data(Bytes::from_static(b"up"), true)
        .unwrap();
    assert_eq!(stage.body(&mut asked.body).0, "up");
    assert_eq!(client.answer(stream).body, "down");

    let (world, _stage) = staged();
    let mut client = Client2::connect(world.address());
    client.ping();
    let stream = open(&mut client);
    let answer = client.answer(stream);
    assert_eq!(answer.status, 502);
    assert_eq!(
        answer.body,
        "Bad Gateway: the upstream's HTTP/2 offers no such tunnel\n"
    );
}

#[test]
fn an_upstream_that_answers_no_ping_is_given_up() {
    let stage = Stage::new();
    let world = with_table(
        stage.address(),
        stage.address(),
        "[http2]\nupstream_ping_ms = 50",
    );
    let mut client = Client2::connect(world.address());
    let stream = client.get("/");
    let mut upstream = stage.accept();
    // A server in name only: it says SETTINGS, and nothing after.
    upstream.send([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    let answer = client.answer(stream);
    assert_eq!(answer.status, 502);
    world.until(|status| status.in_flight == 0);
}

#[test]
fn an_upstream_that_speaks_only_http1_is_a_502() {
    let origin = Origin::new("source");
    let world = world(origin.address(), origin.address());
    assert_eq!(world.client().get("/").message().status(), 502);
}
