//! HTTP/3 from clients: every stream is a request like any other, held ones included; a connection lives through a
//! hold, and through a change of its client's address.

use std::thread;
use std::time::Duration;

use bytes::Bytes;
use cutover_protocol::hold::Gate;
use cutover_protocol::id::Site;
use h3::error::{Code, StreamError};
use http::{HeaderMap, HeaderValue, Method, Request};
use quinn::{ConnectionError, TransportConfig};

use crate::client3::{Client3, NAME, Stream3, World3, tls_get};
use crate::holding::balanced;
use crate::world::{Nobody, Origin, Peer, Plan, Stage};

fn staged() -> (World3, Stage) {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address()).start_http3();
    (world, stage)
}

fn two_sites() -> (World3, Origin, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address()).start_http3();
    (world, source, target)
}

/// The code of a stream that was reset.
fn code(error: &StreamError) -> Option<Code> {
    match error {
        StreamError::RemoteTerminate { code, .. } => Some(*code),
        _ => None,
    }
}

#[test]
fn a_hundred_streams_of_one_connection_are_answered_each_with_its_own() {
    let (world, source, _target) = two_sites();
    let mut client = world.client();
    let streams: Vec<Stream3> = (0..100)
        .map(|number| client.post(&format!("/{number}"), "body"))
        .collect();
    for (number, stream) in streams.into_iter().enumerate() {
        let answer = client.answer(stream);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.text(), format!("source POST /{number} body"));
    }
    assert_eq!(source.seen().len(), 100);
    world.world.until(|status| status.in_flight == 0);
}

#[test]
fn connections_over_quic_and_over_tcp_are_counted_together_for_their_address() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .limits("address_connections_max = 2")
        .start_http3();
    let (mut first, mut second) = (world.client(), world.client());
    for client in [&mut first, &mut second] {
        let stream = client.get("/");
        assert_eq!(client.answer(stream).status, 200);
    }
    let connect = || {
        let transport = TransportConfig::default();
        Client3::connect(world.world.address(), &world.certificate, transport)
    };
    assert!(connect().is_err());
    assert!(Peer::connect(world.world.address()).is_closed());
    let metrics = world.world.metrics();
    let counted = "hopgate_refused_total{service=\"web\",reason=\"address_connections\"} 2\n";
    assert!(metrics.contains(counted), "{metrics}");
    // Whoever is there goes on.
    let stream = first.get("/");
    assert_eq!(first.answer(stream).status, 200);
    second.leave();
    // Its place is free once the proxy has seen it go.
    let served = (0..10_000).any(|_| connect().is_ok());
    assert!(served);
}

#[test]
fn a_stream_reaches_the_upstream_as_an_http1_request() {
    let (world, stage) = staged();
    let mut client = world.client();
    let request = Request::builder()
        .uri("https://example.org/a?b=c")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(())
        .unwrap();
    let mut stream = client.send(request);
    client.wait(stream.finish()).unwrap();
    let mut upstream = stage.accept();
    let message = upstream.message();
    assert_eq!(message.first_line, "GET /a?b=c HTTP/1.1");
    assert_eq!(message.field("host"), Some("example.org"));
    assert_eq!(message.field("cookie"), Some("a=1; b=2"));
    assert_eq!(message.field("x-forwarded-proto"), Some("https"));
    assert_eq!(message.field("transfer-encoding"), None);
    upstream.send("HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\nX-Kept: yes\r\n\r\n");
    let answer = client.answer(stream);
    assert_eq!(answer.status, 204);
    assert_eq!(answer.fields.get("x-kept").unwrap(), "yes");
    assert_eq!(answer.fields.get("connection"), None);
}

#[test]
fn large_bodies_pass_both_ways_unchanged() {
    const BYTES: usize = 3_000_000;
    let (world, stage) = staged();
    let mut client = world.client();
    let data: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    let expected = data.clone();
    let echoing = thread::spawn(move || {
        let mut upstream = stage.accept();
        let head = upstream.head();
        assert_eq!(head.field("content-length"), Some("3000000"));
        let got = upstream.bytes(BYTES);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n");
        upstream.send(head).send(&got);
        (got, stage)
    });
    let request = Request::post(format!("https://{NAME}/echo")).header("content-length", BYTES);
    let mut stream = client.send(request.body(()).unwrap());
    client.wait(stream.send_data(Bytes::from(data))).unwrap();
    client.wait(stream.finish()).unwrap();
    let answer = client.answer(stream);
    assert!(answer.body == expected, "the answer differs");
    let (got, _stage) = echoing.join().unwrap();
    assert!(got == expected, "the request differs");
}

#[test]
fn trailers_pass_both_ways() {
    let (world, stage) = staged();
    let mut client = world.client();
    let mut stream = client.begin(Method::POST, "/call");
    client.data(&mut stream, "question");
    let mut trailer = HeaderMap::new();
    trailer.insert("x-sum", HeaderValue::from_static("7"));
    client.wait(stream.send_trailers(trailer)).unwrap();
    client.wait(stream.finish()).unwrap();
    let mut upstream = stage.accept();
    let message = upstream.message();
    assert_eq!(message.field("transfer-encoding"), Some("chunked"));
    assert_eq!(message.body, "question{x-sum: 7}");
    upstream.send(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: grpc-status\r\n\r\n\
         6\r\nanswer\r\n0\r\ngrpc-status: 0\r\n\r\n",
    );
    let answer = client.answer(stream);
    assert_eq!(answer.text(), "answer");
    assert_eq!(answer.trailer.unwrap().get("grpc-status").unwrap(), "0");
}

#[test]
fn early_hints_are_passed_on_before_the_answer() {
    let (world, stage) = staged();
    let mut client = world.client();
    let mut stream = client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n");
    let hints = client.wait(stream.recv_response()).unwrap();
    assert_eq!(hints.status(), 103);
    assert_eq!(hints.headers().get("link").unwrap(), "</a.css>");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(stream).text(), "ok");
}

#[test]
fn a_client_that_expects_100_continue_gets_the_upstreams() {
    let (world, stage) = staged();
    let mut client = world.client();
    let request = Request::post(format!("https://{NAME}/"))
        .header("expect", "100-continue")
        .header("content-length", 4);
    let mut stream = client.send(request.body(()).unwrap());
    let mut upstream = stage.accept();
    assert_eq!(upstream.head().field("Expect"), Some("100-continue"));
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n");
    let interim = client.wait(stream.recv_response()).unwrap();
    assert_eq!(interim.status(), 100);
    client.data(&mut stream, "body");
    client.wait(stream.finish()).unwrap();
    assert_eq!(upstream.bytes(4), b"body");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(stream).text(), "ok");
}

#[test]
fn an_upstream_that_reads_nothing_gets_its_client_no_credit() {
    const BYTES: usize = 30_000_000;
    let (world, stage) = staged();
    let mut client = world.client();
    let request = Request::post(format!("https://{NAME}/slow")).header("content-length", BYTES);
    let stream = client.send(request.body(()).unwrap());
    let mut upstream = stage.accept();
    upstream.head();
    let (mut send, receive) = stream.split();
    let data = Bytes::from(vec![b'x'; BYTES]);
    let mut sending = Box::pin(async { send.send_data(data).await });
    // The client says when it would send and may not.
    client.wait(async {
        let blocked = async {
            while client.connection.stats().frame_tx.stream_data_blocked == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            sent = &mut sending => panic!("all of it was taken: {sent:?}"),
            () = blocked => {}
        }
    });
    let taken = client.connection.stats().udp_tx.bytes;
    // What waits: the kernel's buffers of the upstream's connection, and a little of ours.
    assert!(taken < 20_000_000, "{taken} bytes");
    let reading = thread::spawn(move || {
        let got = upstream.bytes(BYTES);
        upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
        (got.len(), stage)
    });
    client.wait(sending).unwrap();
    client.wait(send.finish()).unwrap();
    let (mut receive, _send) = (receive, send);
    assert_eq!(client.wait(receive.recv_response()).unwrap().status(), 204);
    assert_eq!(reading.join().unwrap().0, BYTES);
}

#[test]
fn a_stream_that_is_taken_back_lets_go_of_its_upstream() {
    let (world, stage) = staged();
    let mut client = world.client();
    let mut stream = client.begin(Method::POST, "/part");
    client.data(&mut stream, "half");
    let mut upstream = stage.accept();
    upstream.head();
    assert_eq!(upstream.line(), "4");
    stream.stop_stream(Code::H3_REQUEST_CANCELLED);
    stream.stop_sending(Code::H3_REQUEST_CANCELLED);
    upstream.rest();
    world.world.until(|status| status.in_flight == 0);
    let next = client.get("/next");
    let mut upstream = stage.accept();
    assert_eq!(upstream.message().first_line, "GET /next HTTP/1.1");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(next).text(), "ok");
}

#[test]
fn a_client_that_stops_an_answer_lets_go_of_its_upstream() {
    let (world, stage) = staged();
    let mut client = world.client();
    let mut stream = client.get("/long");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome");
    assert_eq!(client.wait(stream.recv_response()).unwrap().status(), 200);
    stream.stop_sending(Code::H3_REQUEST_CANCELLED);
    assert!(upstream.is_closed());
    world.world.until(|status| status.in_flight == 0);
}

#[test]
fn an_answer_that_breaks_off_resets_its_stream_only() {
    let (world, stage) = staged();
    let mut client = world.client();
    let stream = client.get("/broken");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome");
    drop(upstream);
    let error = client.whole(stream).unwrap_err();
    assert_eq!(code(&error), Some(Code::H3_INTERNAL_ERROR), "{error}");
    let next = client.get("/next");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(next).text(), "ok");
}

#[test]
fn an_upstream_that_is_not_there_is_a_502_and_the_connection_stays() {
    let (nobody, origin) = (Nobody::new(), Origin::new("target"));
    let world = Plan::new(nobody.address(), origin.address()).start_http3();
    let mut client = world.client();
    let stream = client.get("/");
    let answer = client.answer(stream);
    assert_eq!(answer.status, 502);
    assert_eq!(
        answer.text(),
        "Bad Gateway: the upstream cannot be reached\n"
    );
    world.world.hold();
    world.world.move_to(Site::Target);
    let stream = client.get("/again");
    assert_eq!(client.answer(stream).text(), "target GET /again");
}

#[test]
fn held_streams_go_each_once_to_the_target_and_the_connection_lives_on() {
    let (world, source, target) = two_sites();
    let mut client = world.client();
    world.world.hold();
    let streams: Vec<Stream3> = (0..50)
        .map(|number| client.post(&format!("/{number}"), "held"))
        .collect();
    world.world.until_held(50);
    assert_eq!(source.seen().len() + target.seen().len(), 0);
    world.world.move_to(Site::Target);
    for (number, stream) in streams.into_iter().enumerate() {
        let text = format!("target POST /{number} held");
        assert_eq!(client.answer(stream).text(), text);
    }
    let mut seen = target.seen();
    seen.sort();
    seen.dedup();
    assert_eq!((seen.len(), target.seen().len()), (50, 50));
    assert_eq!(source.seen().len(), 0);
    let after = client.get("/after");
    assert_eq!(client.answer(after).text(), "target GET /after");
    balanced(&world.world);
}

#[test]
fn the_body_of_a_held_stream_is_not_read() {
    const BYTES: usize = 1_000_000;
    let (world, _source, target) = two_sites();
    let mut client = world.client();
    world.world.hold();
    let request = Request::post(format!("https://{NAME}/held")).header("content-length", BYTES);
    let stream = client.send(request.body(()).unwrap());
    world.world.until_held(1);
    let (mut send, mut receive) = stream.split();
    let data = Bytes::from(vec![b'x'; BYTES]);
    let mut sending = Box::pin(async {
        send.send_data(data).await.unwrap();
        send.finish().await.unwrap();
    });
    client.wait(async {
        let blocked = async {
            while client.connection.stats().frame_tx.stream_data_blocked == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = &mut sending => panic!("all of it was taken"),
            () = blocked => {}
        }
    });
    // One window of a stream, and what packets add to it.
    assert!(client.connection.stats().udp_tx.bytes < 200_000);
    assert_eq!(world.world.status().held_now, 1);
    world.world.move_to(Site::Target);
    client.wait(sending);
    assert_eq!(client.wait(receive.recv_response()).unwrap().status(), 200);
    assert_eq!(target.seen().len(), 1);
    assert_eq!(target.seen()[0].len(), "POST /held ".len() + BYTES);
}

#[test]
fn a_stream_taken_back_while_held_frees_its_place_and_reaches_nobody() {
    let (world, source, target) = two_sites();
    let mut client = world.client();
    world.world.hold();
    let mut leaves = client.begin(Method::POST, "/leaves");
    client.data(&mut leaves, "unread");
    let mut whole = client.post("/leaves-too", "whole");
    let stays = client.post("/stays", "once");
    world.world.until_held(3);
    leaves.stop_stream(Code::H3_REQUEST_CANCELLED);
    leaves.stop_sending(Code::H3_REQUEST_CANCELLED);
    world.world.until_held(2);
    // Its request has ended: only the answer can still be refused.
    whole.stop_sending(Code::H3_REQUEST_CANCELLED);
    world.world.until_held(1);
    world.world.move_to(Site::Target);
    assert_eq!(client.answer(stays).text(), "target POST /stays once");
    assert_eq!(source.seen().len(), 0);
    assert_eq!(target.seen(), ["POST /stays once"]);
    let status = world.world.status();
    assert_eq!((status.gave_up, status.released), (2, 1));
    balanced(&world.world);
}

#[test]
fn a_connection_that_dies_while_its_streams_are_held_frees_all_their_places() {
    let (world, source, target) = two_sites();
    let mut client = world.client();
    world.world.hold();
    let streams: Vec<Stream3> = (0..10).map(|_| client.get("/held")).collect();
    world.world.until_held(10);
    client.connection.close(0x100_u32.into(), b"");
    world.world.until_held(0);
    drop(streams);
    world.world.move_to(Site::Target);
    assert_eq!(source.seen().len() + target.seen().len(), 0);
    assert_eq!(world.world.status().gave_up, 10);
    balanced(&world.world);
}

#[test]
fn a_held_client_is_pinged_and_outlives_its_own_idle_timeout() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[quic]\nidle_ms_max = 4000\nkeep_alive_ms = 100")
        .start_http3();
    let mut transport = TransportConfig::default();
    // Shorter than what follows: without our pings this client would give up.
    transport.max_idle_timeout(Some(Duration::from_millis(1500).try_into().unwrap()));
    let mut client = world.client_with(transport);
    world.world.hold();
    let held = client.post("/held", "once");
    world.world.until_held(1);
    // Each ping comes after 100 ms of silence, so these are more than 1.5 s.
    client.until(|stats| stats.frame_rx.ping >= 20);
    assert_eq!(client.connection.close_reason(), None);
    world.world.move_to(Site::Target);
    assert_eq!(client.answer(held).text(), "target POST /held once");
}

#[test]
fn a_client_that_moves_to_another_port_is_still_known_to_the_worker_that_serves_it() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .start_http3();
    let mut client = world.client();
    let mut moves = 0;
    // The kernel hashes the new port: sooner or later the packets land on the other worker.
    while metric(&world, "hopgate_quic_datagrams_handed_total") == 0 {
        client.move_away();
        moves += 1;
        let stream = client.get(&format!("/{moves}"));
        let text = format!("source GET /{moves}");
        assert_eq!(client.answer(stream).text(), text);
        assert!(moves < 64, "never on the other worker");
    }
    assert_eq!(metric(&world, "hopgate_quic_connections"), 1);
}

fn metric(world: &World3, name: &str) -> u64 {
    let address = world.world.proxy().metrics_address().unwrap();
    let mut scraper = Peer::connect(address);
    scraper.send("GET /metrics HTTP/1.1\r\n\r\n");
    let text = scraper.rest();
    let line = text.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('{'))
    });
    let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn clients_prove_their_address_while_many_handshakes_are_under_way() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[quic]\nretry_from = 0\n[metrics]\nlisten = \"127.0.0.1:0\"")
        .start_http3();
    let mut client = world.client();
    let stream = client.get("/");
    assert_eq!(client.answer(stream).text(), "source GET /");
    assert_eq!(metric(&world, "hopgate_quic_retried_total"), 1);
    assert_eq!(metric(&world, "hopgate_quic_connections"), 1);
}

#[test]
fn a_head_that_is_too_long_is_answered_431_and_the_connection_stays() {
    let (world, source, _target) = two_sites();
    let mut client = world.client();
    let request = Request::get(format!("https://{NAME}/long")).header("x-long", "x".repeat(20_000));
    let mut stream = client.send(request.body(()).unwrap());
    client.wait(stream.finish()).unwrap();
    assert_eq!(client.answer(stream).status, 431);
    assert_eq!(source.seen().len(), 0);
    let stream = client.get("/");
    assert_eq!(client.answer(stream).text(), "source GET /");
}

#[test]
fn a_malformed_head_resets_its_stream_and_reaches_nobody() {
    let (world, source, _target) = two_sites();
    let mut client = world.client();
    let request = Request::get(format!("https://{NAME}/")).header("te", "gzip");
    let mut stream = client.send(request.body(()).unwrap());
    client.wait(stream.finish()).unwrap();
    let error = client.whole(stream).unwrap_err();
    assert_eq!(code(&error), Some(Code::H3_MESSAGE_ERROR), "{error}");
    let stream = client.get("/");
    assert_eq!(client.answer(stream).text(), "source GET /");
    assert_eq!(source.seen(), ["GET /"]);
}

#[test]
fn a_request_whose_end_does_not_come_is_cancelled_after_the_time_for_heads() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("client_head_ms_max = 100")
        .start_http3();
    let mut client = world.client();
    let stream = client.begin(Method::GET, "/unended");
    let error = client.whole(stream).unwrap_err();
    assert_eq!(code(&error), Some(Code::H3_REQUEST_CANCELLED), "{error}");
    assert_eq!(source.seen().len(), 0);
}

#[test]
fn a_stop_finishes_what_runs_refuses_who_comes_and_says_goodbye() {
    let (mut world, stage) = staged();
    let mut client = world.client();
    let stream = client.get("/runs");
    let mut upstream = stage.accept();
    upstream.message();
    let address = world.world.address();
    let proxy = world.world.proxy.take().unwrap();
    let stopping = thread::spawn(move || proxy.stop(Duration::from_secs(20)));
    let refused = loop {
        // Until the word of the stop has reached the worker, it still accepts.
        match Client3::connect(address, &world.certificate, TransportConfig::default()) {
            Ok(_) | Err(ConnectionError::ApplicationClosed(_)) => {}
            Err(error) => break error,
        }
    };
    assert!(
        matches!(refused, ConnectionError::ConnectionClosed(_)),
        "{refused:?}"
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast");
    assert_eq!(client.answer(stream).text(), "last");
    assert!(client.end().is_h3_no_error());
    stopping.join().unwrap();
}

#[test]
fn an_idle_connection_is_closed_without_an_error() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("client_idle_ms_max = 200")
        .start_http3();
    let mut client = world.client();
    let stream = client.get("/");
    assert_eq!(client.answer(stream).text(), "source GET /");
    assert!(client.end().is_h3_no_error());
}

#[test]
fn a_connection_of_a_held_service_is_not_idle() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let plan = || Plan::new(source.address(), target.address()).limits("client_idle_ms_max = 200");
    let (world, other) = (plan().start_http3(), plan().start_http3());
    let mut client = world.client();
    let stream = client.get("/");
    assert_eq!(client.answer(stream).text(), "source GET /");
    world.world.hold();
    let mut elsewhere = other.client();
    let stream = elsewhere.get("/");
    assert_eq!(elsewhere.answer(stream).text(), "source GET /");
    assert!(elsewhere.end().is_h3_no_error());
    let held = client.get("/held");
    world.world.until_held(1);
    world.world.move_to(Site::Target);
    assert_eq!(client.answer(held).text(), "target GET /held");
}

#[test]
fn a_hold_says_nothing_to_a_connection() {
    let (world, _source, target) = two_sites();
    let mut client = world.client();
    world.world.hold();
    let held = client.get("/held");
    world.world.until_held(1);
    assert_eq!(world.world.status().gate, Gate::Holding);
    // A GOAWAY would refuse this one.
    let more = client.get("/more");
    world.world.until_held(2);
    world.world.move_to(Site::Target);
    assert_eq!(client.answer(held).text(), "target GET /held");
    assert_eq!(client.answer(more).text(), "target GET /more");
    assert_eq!(target.seen().len(), 2);
}

#[test]
fn clients_over_tcp_are_told_of_http3_and_those_who_speak_it_are_not() {
    let (world, stage) = staged();
    let address = world.world.address();
    let certificate = world.certificate.clone();
    let over_tcp = thread::spawn(move || tls_get(address, &certificate));
    let answer =
        "HTTP/1.1 200 OK\r\nAlt-Svc: h3=\":1\"\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send(answer);
    let told = over_tcp.join().unwrap();
    let expected = format!("\r\nAlt-Svc: h3=\":{}\"; ma=86400\r\n", address.port());
    assert_eq!(told.matches("Alt-Svc").count(), 1, "{told}");
    assert!(told.contains(&expected), "{told}");
    let mut client = world.client();
    let stream = client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send(answer.replace("Alt-Svc: h3=\":1\"\r\n", ""));
    assert_eq!(client.answer(stream).fields.get("alt-svc"), None);
}
