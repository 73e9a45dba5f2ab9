//! Limits of connections that carry streams, each provoked over HTTP/2 and HTTP/3: what the client is told, the
//! counter that says why, and that nobody else suffers.

use std::future::poll_fn;
use std::io::Read;
use std::task::Poll;

use bytes::Bytes;
use h3::error::Code;
use http::{Method, Request};
use quinn::{ConnectionError, TransportConfig, VarInt};

use crate::client2::Client2;
use crate::client3::{Client3, NAME, World3, begin_handshake, headers};
use crate::limits::refused;
use crate::world::{Origin, Peer, Plan, Stage, World};

/// GET / with the authority "h", by the static table of HPACK.
const GET: [u8; 6] = [0x82, 0x84, 0x86, 0x01, 1, b'h'];

fn plan(origin: &Origin, more: &str) -> Plan {
    Plan::new(origin.address(), origin.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"")
        .table(more)
}

/// A world whose refusals can be read.
fn counted(more: &str) -> (World, Origin) {
    let origin = Origin::new("source");
    (plan(&origin, more).start(), origin)
}

fn counted3(more: &str) -> (World3, Origin) {
    let origin = Origin::new("source");
    (plan(&origin, more).start_http3(), origin)
}

/// Counted once the proxy has seen or done it, which its client may notice first.
fn until_refused(world: &World, reason: &str, count: u64) {
    assert!(
        (0..10_000).any(|_| refused(world, reason) == count),
        "{reason}: {}",
        refused(world, reason)
    );
}

/// The access log of a proxy that has been stopped.
fn logged(mut world: World) -> String {
    world.proxy.take().unwrap().stop(crate::world::PATIENCE);
    std::fs::read_to_string(world.folder.path().join("access.log")).unwrap()
}

/// A connection on which frames can be sent that no client would send.
fn greeted(world: &World) -> Peer {
    let mut peer = Peer::connect(world.address());
    peer.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .send([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    peer
}

/// The code of the GOAWAY that a connection ends with.
fn told_goodbye(peer: &Peer) -> u8 {
    let mut answer = Vec::new();
    // A reset of the socket behind the GOAWAY would end the read as well.
    drop(peer.socket().read_to_end(&mut answer));
    // GOAWAY, 8 bytes or more, with the code at the end of its fixed part.
    let goaway = answer
        .windows(17)
        .find(|window| window[3] == 7 && window[5..9] == [0; 4] && window[13..16] == [0; 3]);
    goaway.unwrap_or_else(|| panic!("{answer:?}"))[16]
}

/// The code of the next RST_STREAM, and its stream.
fn next_reset(peer: &mut Peer) -> (u8, u8) {
    loop {
        let head = peer.bytes(9);
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        let payload = peer.bytes(length);
        if head[3] == 3 {
            return (head[8], payload[3]);
        }
    }
}

#[test]
fn a_client_that_resets_stream_after_stream_is_cut_off() {
    let (world, source) = counted("");
    let mut peer = greeted(&world);
    // A request and RST_STREAM with CANCEL, over and over, all in one write.
    let mut flood = Vec::new();
    for stream in (1..2001_u32).step_by(2) {
        flood.extend_from_slice(&[0, 0, 6, 1, 5]);
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(&GET);
        flood.extend_from_slice(&[0, 0, 4, 3, 0]);
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(&8_u32.to_be_bytes());
    }
    peer.send(flood);
    // ENHANCE_YOUR_CALM.
    assert_eq!(told_goodbye(&peer), 11);
    world.until(|status| status.in_flight == 0);
    assert!(source.seen().len() < 500, "{}", source.seen().len());
    until_refused(&world, "flood", 1);
}

#[test]
fn a_client_that_continues_a_head_without_end_is_cut_off() {
    let (world, source) = counted("");
    let mut peer = greeted(&world);
    // HEADERS that end the stream and not the head, and parts of it with nothing in them.
    let mut flood = vec![0, 0, 6, 1, 1, 0, 0, 0, 1];
    flood.extend_from_slice(&GET);
    for _ in 0..1000 {
        flood.extend_from_slice(&[0, 0, 0, 9, 0, 0, 0, 0, 1]);
    }
    peer.send(flood);
    assert_eq!(told_goodbye(&peer), 11);
    until_refused(&world, "flood", 1);
    assert_eq!(source.seen(), [""; 0]);
}

#[test]
fn a_client_that_breaks_the_rules_of_frames_is_cut_off() {
    let (world, source) = counted("");
    let mut peer = greeted(&world);
    // DATA on no stream.
    peer.send([0, 0, 1, 0, 0, 0, 0, 0, 0, b'x']);
    // PROTOCOL_ERROR.
    assert_eq!(told_goodbye(&peer), 1);
    until_refused(&world, "protocol", 1);
    assert_eq!(source.seen(), [""; 0]);
}

#[test]
fn one_stream_more_than_allowed_is_refused_and_the_others_are_served() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .table("[http2]\nstreams_max = 2\n[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"")
        .start();
    let mut peer = greeted(&world);
    for stream in [1, 3, 5] {
        peer.send([0, 0, 6, 1, 5, 0, 0, 0, stream]).send(GET);
    }
    // REFUSED_STREAM: it may be asked again.
    assert_eq!(next_reset(&mut peer), (5, 7));
    let asked: Vec<Peer> = (0..2)
        .map(|_| {
            let mut upstream = stage.accept();
            upstream.message();
            upstream
        })
        .collect();
    assert!(stage.is_deserted());
    until_refused(&world, "streams", 1);
    drop(asked);
    drop(peer);
    let log = logged(world);
    assert!(
        log.contains("request=\"(more streams at once than this proxy allows)\" status=0 "),
        "{log}"
    );
}

#[test]
fn a_header_list_past_either_limit_is_a_431_and_the_connection_stays() {
    let (world, source) = counted("");
    let mut client = Client2::connect(world.address());
    // More than head_bytes_max, and more than header_list_bytes_max as well.
    for (count, bytes) in [(1, 20_000), (2, 40_000), (3, 40_000)] {
        let request = Request::get("http://h/").header("x-long", "x".repeat(bytes));
        let stream = client.send(request.body(()).unwrap(), true);
        assert_eq!(client.answer(stream).status, 431, "{bytes}");
        until_refused(&world, "head_bytes", count);
    }
    let next = client.get("/next");
    assert_eq!(client.answer(next).status, 200);
    assert_eq!(source.seen(), ["GET /next"]);
    drop(client);
    let log = logged(world);
    let refused = "request=\"(the request head is longer than this proxy reads)\" status=431 ";
    assert_eq!(log.matches(refused).count(), 3, "{log}");
}

#[test]
fn a_malformed_header_list_resets_its_stream_and_is_counted() {
    let (world, source) = counted("");
    let mut peer = greeted(&world);
    // Fields that belong to a connection.
    for (stream, name, count) in [
        (1, "connection", 1),
        (3, "upgrade", 2),
        (5, "keep-alive", 3),
    ] {
        let mut block = GET.to_vec();
        block.extend([0, u8::try_from(name.len()).unwrap()]);
        block.extend(name.as_bytes());
        block.extend([1, b'v']);
        peer.send([
            0,
            0,
            u8::try_from(block.len()).unwrap(),
            1,
            5,
            0,
            0,
            0,
            stream,
        ])
        .send(block);
        // PROTOCOL_ERROR.
        assert_eq!(next_reset(&mut peer), (stream, 1), "{name}");
        until_refused(&world, "head", count);
    }
    peer.send([0, 0, 6, 1, 5, 0, 0, 0, 7]).send(GET);
    while peer.bytes(1) != [0x88] {}
    assert_eq!(source.seen(), ["GET /"]);
}

#[test]
fn a_slow_body_of_a_stream_is_a_408_and_a_long_one_a_413() {
    let limits = "[limits]\nclient_body_bytes_per_s_min = 1000\nclient_body_window_ms = 50\nbody_bytes_max = 5";
    for (reason, bytes, status) in [("body_slow", 1, 408), ("body_bytes", 6, 413)] {
        let stage = Stage::new();
        let plan = || {
            Plan::new(stage.address(), stage.address())
                .table("[metrics]\nlisten = \"127.0.0.1:0\"")
                .table(limits)
        };
        let data = "x".repeat(bytes);
        let world = plan().start();
        let mut client = Client2::connect(world.address());
        let mut stream = client.begin(Method::POST, "/", false);
        let body = Bytes::copy_from_slice(data.as_bytes());
        stream.body.send_data(body, false).unwrap();
        let answer = client.wait(stream.answer).unwrap();
        assert_eq!(answer.status(), status, "{reason}");
        assert_eq!(refused(&world, reason), 1);
        let world = plan().start_http3();
        let mut client = world.client();
        let mut stream = client.begin(Method::POST, "/");
        client.data(&mut stream, &data);
        let answer = client.wait(stream.recv_response()).unwrap();
        assert_eq!(answer.status(), status, "{reason}");
        assert_eq!(refused(&world.world, reason), 1);
    }
}

/// HEADERS of a GET with one long field, which no client sends that heeds our settings.
fn long_head(bytes: usize) -> Vec<u8> {
    headers(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", NAME),
        (":path", "/"),
        ("x-long", &"x".repeat(bytes)),
    ])
}

#[test]
fn a_header_list_past_either_limit_is_a_431_over_http3_as_well() {
    let (world, source) = counted3("");
    let mut client = world.client();
    for (count, bytes) in [(1, 20_000), (2, 40_000)] {
        let mut stream = client.raw(&long_head(bytes));
        stream.send.finish().unwrap();
        let (kind, head) = client.frame(&mut stream).unwrap();
        // HEADERS, with "431" as it is or in Huffman's code.
        let says = |text: &[u8]| head.windows(3).any(|window| window == text);
        assert!(
            kind == 1 && (says(b"431") || says(&[0x69, 0x90, 0xff])),
            "{head:?}"
        );
        while client.frame(&mut stream).is_some() {}
        let end = client.wait(stream.receive.received_reset());
        assert_eq!(end, Ok(None), "a whole answer");
        until_refused(&world.world, "head_bytes", count);
    }
    let stream = client.get("/next");
    assert_eq!(client.answer(stream).text(), "source GET /next");
    assert_eq!(source.seen(), ["GET /next"]);
}

#[test]
fn a_head_of_http3_that_never_ends_is_cut_off_and_counted() {
    let (world, source) = counted3("");
    let mut client = world.client();
    let ended = client.wait(async {
        let (mut send, mut receive) = client.connection.open_bi().await.unwrap();
        let head = long_head(1_000_000);
        // It may be told to stop before it has sent all.
        drop(send.write_all(&head).await);
        receive.read_to_end(1000).await
    });
    let code = u32::try_from(Code::H3_EXCESSIVE_LOAD.value()).unwrap();
    let reset = quinn::ReadError::Reset(VarInt::from_u32(code));
    assert_eq!(ended, Err(quinn::ReadToEndError::Read(reset)));
    until_refused(&world.world, "head_bytes", 1);
    let stream = client.get("/next");
    assert_eq!(client.answer(stream).text(), "source GET /next");
    assert_eq!(source.seen(), ["GET /next"]);
}

#[test]
fn a_malformed_or_unfinished_head_of_http3_is_counted() {
    let (world, source) = counted3("[limits]\nclient_head_ms_max = 100");
    let mut client = world.client();
    let request = Request::get(format!("https://{NAME}/")).header("te", "gzip");
    let mut stream = client.send(request.body(()).unwrap());
    client.wait(stream.finish()).unwrap();
    client.whole(stream).unwrap_err();
    until_refused(&world.world, "head", 1);
    let (world, _) = counted3("[limits]\nclient_head_ms_max = 100");
    let mut client = world.client();
    let stream = client.begin(Method::GET, "/unended");
    client.whole(stream).unwrap_err();
    until_refused(&world.world, "head_slow", 1);
    assert_eq!(source.seen().len(), 0);
}

fn closed_with(client: &Client3) -> Option<u64> {
    match client.wait(client.connection.closed()) {
        ConnectionError::ApplicationClosed(close) => Some(close.error_code.into_inner()),
        _ => None,
    }
}

#[test]
fn a_client_of_http3_that_takes_request_after_request_back_is_cut_off() {
    let (world, source) = counted3("");
    let client = world.client();
    client.wait(async {
        for _ in 0..1000 {
            let Ok((mut send, receive)) = client.connection.open_bi().await else {
                return;
            };
            // Reset before a packet has left: the proxy sees the stream and its end at once.
            drop(send.write(&long_head(1)).await);
            drop(send.reset(VarInt::from_u32(0x10c)));
            drop(receive);
        }
    });
    assert_eq!(closed_with(&client), Some(Code::H3_EXCESSIVE_LOAD.value()));
    until_refused(&world.world, "flood", 1);
    assert_eq!(source.seen().len(), 0);
}

#[test]
fn a_client_of_http3_that_breaks_the_rules_of_streams_is_cut_off() {
    let (world, source) = counted3("");
    let client = world.client();
    client.wait(async {
        // A second control stream.
        let mut send = client.connection.open_uni().await.unwrap();
        send.write_all(&[0]).await.unwrap();
        send.finish().unwrap();
    });
    let code = Code::H3_STREAM_CREATION_ERROR.value();
    assert_eq!(closed_with(&client), Some(code));
    until_refused(&world.world, "protocol", 1);
    assert_eq!(source.seen().len(), 0);
}

#[test]
fn one_stream_more_than_allowed_waits_at_its_own_client_over_http3() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .table("[http2]\nstreams_max = 2")
        .start_http3();
    let mut client = world.client();
    let streams = [client.get("/1"), client.get("/2")];
    let mut upstreams = [stage.accept(), stage.accept()];
    for upstream in &mut upstreams {
        upstream.message();
    }
    let connection = client.connection.clone();
    let mut third = Box::pin(async move { connection.open_bi().await.map(drop) });
    let waits = poll_fn(|context| Poll::Ready(third.as_mut().poll(context).is_pending()));
    assert!(client.wait(waits));
    upstreams[0].send("HTTP/1.1 204 No Content\r\n\r\n");
    upstreams[1].send("HTTP/1.1 204 No Content\r\n\r\n");
    for stream in streams {
        assert_eq!(client.answer(stream).status, 204);
    }
    client.wait(third).unwrap();
    assert!(stage.is_deserted());
}

#[test]
fn a_handshake_beyond_those_allowed_is_refused_and_counted() {
    let origin = Origin::new("source");
    let plan = Plan {
        workers: 1,
        ..plan(&origin, "[quic]\nhandshakes_max = 1")
    };
    let world = plan.start_http3();
    let address = world.world.address();
    let under_way = begin_handshake(address, &world.certificate);
    let transport = TransportConfig::default();
    let refusal = Client3::connect(address, &world.certificate, transport).err();
    assert!(
        matches!(refusal, Some(ConnectionError::ConnectionClosed(_))),
        "{refusal:?}"
    );
    assert_eq!(refused(&world.world, "handshakes"), 1);
    drop(under_way);
}
