//! HTTP/2 from clients: every stream is a request like any other, held ones included, and a connection lives through
//! a hold.

use std::future::poll_fn;
use std::io::Write;
use std::thread;

use bytes::Bytes;
use cutover_protocol::hold::Gate;
use cutover_protocol::id::Site;
use h2::Reason;
use h2::client::Builder;
use h2::ext::Protocol;
use http::{HeaderMap, HeaderValue, Method, Request};

use crate::client2::{Client2, Stream2};
use crate::holding::{balanced, two_sites};
use crate::world::{Nobody, Origin, PATIENCE, Plan, Stage, World};

fn staged() -> (World, Stage) {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address()).start();
    (world, stage)
}

fn client(world: &World) -> Client2 {
    Client2::connect(world.address())
}

#[test]
fn streams_of_one_connection_are_answered_each_with_its_own() {
    let (world, source, _target) = two_sites();
    let mut client = client(&world);
    let streams: Vec<Stream2> = (0..60)
        .map(|number| client.post(&format!("/{number}"), "body"))
        .collect();
    for (number, stream) in streams.into_iter().enumerate() {
        let answer = client.answer(stream);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body, format!("source POST /{number} body"));
    }
    assert_eq!(source.seen().len(), 60);
    world.until(|status| status.in_flight == 0);
}

#[test]
fn a_stream_reaches_the_upstream_as_an_http1_request() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let request = Request::builder()
        .uri("http://example.org/a?b=c")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("x-forwarded-for", "10.0.0.1")
        .body(())
        .unwrap();
    let stream = client.send(request, true);
    let mut upstream = stage.accept();
    let message = upstream.message();
    assert_eq!(message.first_line, "GET /a?b=c HTTP/1.1");
    assert_eq!(message.field("host"), Some("example.org"));
    assert_eq!(message.field("cookie"), Some("a=1; b=2"));
    // A stranger's word about its address is replaced.
    assert_eq!(message.field("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(message.field("transfer-encoding"), None);
    assert_eq!(message.field("connection"), None);
    upstream.send("HTTP/1.1 200 OK\r\nConnection: X-Gone\r\nX-Gone: 1\r\nSet-Cookie: c\r\nSet-Cookie: d\r\nContent-Length: 2\r\n\r\nok");
    let answer = client.answer(stream);
    assert_eq!(answer.body, "ok");
    assert_eq!(answer.fields.get_all("set-cookie").iter().count(), 2);
    assert_eq!(answer.fields.get("content-length").unwrap(), "2");
    assert!(!answer.fields.contains_key("connection") && !answer.fields.contains_key("x-gone"));
}

#[test]
fn a_counted_body_stays_counted_and_an_uncounted_one_comes_in_chunks() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let uncounted = client.post("/chunks", "hello");
    let mut upstream = stage.accept();
    let message = upstream.message();
    assert_eq!(message.field("transfer-encoding"), Some("chunked"));
    assert_eq!(message.body, "hello");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.answer(uncounted).status, 204);

    let request = Request::post("http://h/counted").header("content-length", "5");
    let mut counted = client.send(request.body(()).unwrap(), false);
    counted
        .body
        .send_data(Bytes::from_static(b"hello"), true)
        .unwrap();
    let message = upstream.message();
    assert_eq!(message.field("content-length"), Some("5"));
    assert_eq!(message.body, "hello");
    upstream.send(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    );
    let answer = client.answer(counted);
    assert_eq!(answer.body, "abcde");
    assert!(!answer.fields.contains_key("transfer-encoding"));
}

#[test]
fn a_body_of_another_length_than_announced_ends_the_stream_and_not_the_connection() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let request = Request::post("http://h/short").header("content-length", "9");
    let mut short = client.send(request.body(()).unwrap(), false);
    short
        .body
        .send_data(Bytes::from_static(b"hello"), false)
        .unwrap();
    let mut upstream = stage.accept();
    upstream.head();
    // The wrong end may undo what has come with it and is not yet passed on.
    assert_eq!(upstream.bytes(5), b"hello");
    short.body.send_data(Bytes::new(), true).unwrap();
    assert_eq!(client.reset(short), Some(Reason::PROTOCOL_ERROR));
    assert_eq!(upstream.rest(), "");
    let next = client.get("/next");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.answer(next).status, 204);
}

#[test]
fn a_counted_body_is_whole_upstream_only_once_its_stream_has_ended() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let request = Request::post("http://h/").header("content-length", "5");
    let mut stream = client.send(request.body(()).unwrap(), false);
    stream
        .body
        .send_data(Bytes::from_static(b"hel"), false)
        .unwrap();
    let mut upstream = stage.accept();
    upstream.head();
    assert_eq!(upstream.bytes(3), b"hel");
    stream
        .body
        .send_data(Bytes::from_static(b"lo"), false)
        .unwrap();
    // The proxy has seen the rest when it answers this.
    client.ping();
    stream.body.send_reset(Reason::CANCEL);
    assert_eq!(upstream.rest(), "");
}

#[test]
fn trailers_pass_both_ways() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let mut stream = client.begin(Method::POST, "/", false);
    stream
        .body
        .send_data(Bytes::from_static(b"hello"), false)
        .unwrap();
    let mut trailer = HeaderMap::new();
    trailer.insert("x-sum", HeaderValue::from_static("5"));
    stream.body.send_trailers(trailer).unwrap();
    let mut upstream = stage.accept();
    assert_eq!(upstream.message().body, "hello{x-sum: 5}");
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nGrpc-Status: 0\r\n\r\n");
    let answer = client.answer(stream);
    assert_eq!(answer.body, "ok");
    assert_eq!(answer.trailer.unwrap().get("grpc-status").unwrap(), "0");
}

#[test]
fn continue_and_early_hints_are_passed_on() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let request = Request::post("http://h/").header("expect", "100-continue");
    let mut stream = client.send(request.body(()).unwrap(), false);
    let mut upstream = stage.accept();
    assert_eq!(upstream.head().field("expect"), Some("100-continue"));
    let interim = |stream: &mut Stream2| {
        client
            .wait(poll_fn(|context| stream.answer.poll_informational(context)))
            .unwrap()
            .unwrap()
    };
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(interim(&mut stream).status().as_u16(), 100);
    stream
        .body
        .send_data(Bytes::from_static(b"hello"), true)
        .unwrap();
    assert_eq!(upstream.chunks(), b"hello");
    upstream.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    let hints = interim(&mut stream);
    assert_eq!(
        (
            hints.status().as_u16(),
            hints.headers()["link"].to_str().unwrap()
        ),
        (103, "</a>")
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.answer(stream).status, 200);
}

#[test]
fn a_slow_client_slows_its_upstream_and_fills_no_memory() {
    let (world, stage) = staged();
    let mut builder = Builder::new();
    builder.initial_window_size(1000);
    let mut client = Client2::with(world.address(), &builder);
    let stream = client.get("/large");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send(format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
        64 << 20
    ));
    let socket = upstream.socket();
    socket.set_nonblocking(true).unwrap();
    // The kernel's two socket buffers and ours take some; then writing stops for good.
    let (mut taken, mut refusals) = (0, 0);
    while refusals < 20 {
        match (&*socket).write(&[b'x'; 65_536]) {
            Ok(count) => (taken, refusals) = (taken + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                refusals += 1;
                // Whatever the proxy was about to read it has read when it has answered this.
                assert_eq!(world.client().send("x\r\n\r\n").message().status(), 400);
            }
        }
    }
    assert!(
        taken < 32 << 20,
        "{taken} bytes were taken for a client that reads nothing"
    );
    drop(stream);
}

#[test]
fn an_upstream_that_reads_nothing_gets_its_client_no_credit() {
    let (world, stage) = staged();
    let mut client = client(&world);
    world.hold();
    let mut stream = client.begin(Method::POST, "/held", false);
    world.until_held(1);
    stream.body.reserve_capacity(10 << 20);
    let mut sent = 0;
    while sent < 65_536 {
        let room = client.room(&mut stream.body).min(65_536 - sent);
        stream
            .body
            .send_data(Bytes::from(vec![b'x'; room]), false)
            .unwrap();
        sent += room;
    }
    // The window is used up; a PING comes back behind everything that could have widened it.
    client.ping();
    assert_eq!(stream.body.capacity(), 0);
    world.reopen();
    let mut upstream = stage.accept();
    upstream.head();
    // Bytes reach the upstream only from here on, and credit comes with them.
    assert!(client.room(&mut stream.body) > 0);
}

#[test]
fn a_stream_that_is_reset_lets_go_of_its_upstream() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let mut stream = client.begin(Method::POST, "/", false);
    stream
        .body
        .send_data(Bytes::from_static(b"half"), false)
        .unwrap();
    let mut upstream = stage.accept();
    upstream.head();
    assert_eq!(upstream.bytes(9), b"4\r\nhalf\r\n");
    stream.body.send_reset(Reason::CANCEL);
    assert_eq!(upstream.rest(), "");
    world.until(|status| status.in_flight == 0);
    // While it waits for an answer, too.
    let mut stream = client.get("/wait");
    let mut upstream = stage.accept();
    upstream.message();
    stream.body.send_reset(Reason::CANCEL);
    assert!(upstream.is_closed());
    client.ping();
}

#[test]
fn an_answer_that_breaks_off_resets_its_stream_only() {
    let (world, stage) = staged();
    let mut client = client(&world);
    let stream = client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    drop(upstream);
    assert_eq!(client.reset(stream), Some(Reason::INTERNAL_ERROR));
    client.ping();
}

#[test]
fn an_upstream_that_is_not_there_is_a_502_and_the_connection_stays() {
    let nobody = Nobody::new();
    let world = Plan::new(nobody.address(), nobody.address()).start();
    let mut client = client(&world);
    for _ in 0..2 {
        let stream = client.get("/");
        let answer = client.answer(stream);
        assert_eq!(answer.status, 502);
        assert!(
            answer
                .body
                .starts_with("Bad Gateway: the upstream cannot be reached"),
            "{}",
            answer.body
        );
    }
}

#[test]
fn held_streams_go_each_once_to_the_target_and_the_connection_lives_on() {
    let (world, source, target) = two_sites();
    let mut client = client(&world);
    let before = client.get("/before");
    assert_eq!(client.answer(before).body, "source GET /before");
    world.hold();
    let streams: Vec<Stream2> = (0..100)
        .map(|number| client.post(&format!("/{number}"), "once"))
        .collect();
    world.until_held(100);
    client.ping();
    world.move_to(Site::Target);
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(
            client.answer(stream).body,
            format!("target POST /{number} once")
        );
    }
    assert_eq!(source.seen(), ["GET /before"]);
    let mut seen = target.seen();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((seen.len(), target.seen().len()), (100, 100));
    balanced(&world);
    // No GOAWAY has come: the connection takes new streams.
    let after = client.get("/after");
    assert_eq!(client.answer(after).body, "target GET /after");
}

#[test]
fn a_stream_reset_while_held_frees_its_place_and_reaches_nobody() {
    let (world, source, target) = two_sites();
    let mut client = client(&world);
    world.hold();
    let mut plain = client.get("/plain");
    let mut unread = client.post("/unread", &"x".repeat(60_000));
    let stays = client.get("/stays");
    world.until_held(3);
    plain.body.send_reset(Reason::CANCEL);
    unread.body.send_reset(Reason::CANCEL);
    world.until_held(1);
    assert_eq!(world.status().gave_up, 2);
    world.move_to(Site::Target);
    assert_eq!(client.answer(stays).body, "target GET /stays");
    assert_eq!(
        (source.seen(), target.seen()),
        (vec![], vec!["GET /stays".to_owned()])
    );
    balanced(&world);
}

#[test]
fn a_connection_that_dies_while_its_streams_are_held_frees_all_their_places() {
    let (world, source, target) = two_sites();
    let mut client = client(&world);
    world.hold();
    let streams: Vec<Stream2> = (0..10)
        .map(|number| client.get(&format!("/{number}")))
        .collect();
    world.until_held(10);
    drop((streams, client));
    world.until_held(0);
    assert_eq!(world.status().gave_up, 10);
    world.move_to(Site::Target);
    world.until(|status| status.gate == Gate::Open);
    assert_eq!((source.seen(), target.seen()), (vec![], vec![]));
    balanced(&world);
}

#[test]
fn a_stop_says_goaway_and_finishes_what_runs() {
    let (mut world, stage) = staged();
    let mut client = client(&world);
    let stream = client.get("/last");
    let mut upstream = stage.accept();
    upstream.message();
    let proxy = world.proxy.take().unwrap();
    let stopping = thread::spawn(move || proxy.stop(PATIENCE));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(stream).body, "ok");
    assert_eq!(client.end(), None);
    stopping.join().unwrap();
}

#[test]
fn an_idle_connection_is_told_to_go() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .limits("client_idle_ms_max = 50")
        .start();
    let mut client = client(&world);
    let stream = client.get("/");
    assert_eq!(client.answer(stream).status, 200);
    assert_eq!(client.end(), None);
}

#[test]
fn a_connection_of_a_held_service_is_not_idle() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let plan = || Plan::new(source.address(), target.address()).limits("client_idle_ms_max = 50");
    let (world, other) = (plan().start(), plan().start());
    let mut ours = client(&world);
    let stream = ours.get("/");
    assert_eq!(ours.answer(stream).status, 200);
    world.hold();
    let mut elsewhere = client(&other);
    let stream = elsewhere.get("/");
    assert_eq!(elsewhere.answer(stream).status, 200);
    assert_eq!(elsewhere.end(), None);
    let held = ours.get("/held");
    world.until_held(1);
    world.move_to(Site::Target);
    assert_eq!(ours.answer(held).body, "target GET /held");
}

fn websocket(client: &mut Client2) -> Stream2 {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://h/chat")
        .header("sec-websocket-version", "13")
        .body(())
        .unwrap();
    request
        .extensions_mut()
        .insert(Protocol::from_static("websocket"));
    client.send(request, false)
}

fn accept_of(key: &str) -> String {
    let mut text = key.to_owned();
    text.push_str("258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let digest = aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY,
        text.as_bytes(),
    );
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = digest
        .as_ref()
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .collect();
    let mut out: String = bits
        .chunks(6)
        .map(|six| {
            let index = (0..6).fold(0, |sum, at| {
                sum << 1 | usize::from(six.get(at).copied().unwrap_or(0))
            });
            char::from(letters[index])
        })
        .collect();
    out.push('=');
    out
}

#[test]
fn a_websocket_over_http2_becomes_an_upgrade_upstream() {
    let (world, stage) = staged();
    let mut client = client(&world);
    client.ping();
    let mut stream = websocket(&mut client);
    let mut upstream = stage.accept();
    let request = upstream.head();
    assert_eq!(request.first_line, "GET /chat HTTP/1.1");
    assert_eq!(request.field("upgrade"), Some("websocket"));
    let accept = accept_of(request.field("sec-websocket-key").unwrap());
    upstream.send(format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\nhello"
    ));
    let answer = client.wait(&mut stream.answer).unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    assert!(!answer.headers().contains_key("sec-websocket-accept"));
    stream
        .body
        .send_data(Bytes::from_static(b"up"), false)
        .unwrap();
    assert_eq!(upstream.bytes(2), b"up");
    // The client has said all; the upstream has not.
    stream.body.send_data(Bytes::new(), true).unwrap();
    assert_eq!(upstream.rest(), "");
    upstream.send(" and goodbye");
    drop(upstream);
    assert_eq!(
        client.rest(answer.into_body()).unwrap().0,
        "hello and goodbye"
    );
    world.until(|status| status.in_flight == 0);
}

#[test]
fn a_websocket_without_the_right_key_is_a_502() {
    let (world, stage) = staged();
    let mut client = client(&world);
    client.ping();
    let stream = websocket(&mut client);
    let mut upstream = stage.accept();
    upstream.head();
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n");
    let answer = client.answer(stream);
    assert_eq!(answer.status, 502);
}

#[test]
fn an_upstream_that_stops_in_the_middle_of_its_answer_resets_the_stream() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .limits("between_bytes_ms_max = 50")
        .start();
    let mut client = client(&world);
    let stream = client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    assert_eq!(client.reset(stream), Some(Reason::INTERNAL_ERROR));
    assert!(upstream.is_closed());
    client.ping();
}
