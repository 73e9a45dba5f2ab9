//! CONNECT: refused by default, granted to the places that a route lists, over HTTP/1, HTTP/2 and HTTP/3; held like
//! requests.

use bytes::Bytes;
use cutover_protocol::id::Site;
use http::{Method, Request};

use crate::client2::{Client2, Stream2};
use crate::client3::{Client3, Raw3, World3, frame, headers};
use crate::holding::balanced;
use crate::world::{Message, Nobody, PATIENCE, Peer, Plan, Stage, World};

fn route(source: &Stage, target: &Stage) -> String {
    format!(
        "[[service.route]]\nname = \"db\"\nconnect = [\"db.example.org:5432\", \"*.example.org:443\"]\n\
         source = \"{}\"\ntarget = \"{}\"\n",
        source.address(),
        target.address()
    )
}

/// A service whose own servers must never hear of a tunnel, with a route for two places.
fn world(source: &Stage, target: &Stage) -> World {
    let web = Nobody::new();
    Plan::new(web.address(), web.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"")
        .service(&route(source, target))
        .start()
}

fn world3(source: &Stage, target: &Stage) -> World3 {
    let web = Nobody::new();
    Plan::new(web.address(), web.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"")
        .service(&route(source, target))
        .start_http3()
}

/// By hand: `h3`'s client gives each request a path.
fn connect3(client: &Client3, place: &str) -> Raw3 {
    client.raw(&headers(&[(":method", "CONNECT"), (":authority", place)]))
}

/// The only field of an answer that is 200.
const OK: [u8; 3] = [0, 0, 0xc0 | 25];

fn say3(client: &Client3, stream: &mut Raw3, data: &str) {
    let bytes = frame(0, data.as_bytes());
    client.wait(stream.send.write_all(&bytes)).unwrap();
}

fn cancel3(stream: &mut Raw3) {
    stream.send.reset(quinn::VarInt::from_u32(0x10c)).unwrap();
}

fn asked(client: &mut Peer, place: &str) -> Message {
    client.send(format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n"));
    client.head()
}

fn connect2(client: &mut Client2, place: &str) -> Stream2 {
    let request = Request::builder().method(Method::CONNECT).uri(place);
    client.send(request.body(()).unwrap(), false)
}

#[test]
fn a_tunnel_to_a_listed_place_carries_bytes_both_ways_and_each_half_close() {
    let (source, target) = (Stage::new(), Stage::new());
    let mut world = world(&source, &target);
    for place in [
        "db.example.org:5432",
        "DB.Example.org.:5432",
        "a.example.org:443",
    ] {
        let mut client = world.client();
        // What the client says right behind the head is the tunnel's.
        client.send(format!(
            "CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\nGET / HTTP/1.1\r\n"
        ));
        let mut upstream = source.accept();
        assert_eq!(upstream.line(), "GET / HTTP/1.1");
        let answer = client.head();
        assert_eq!(answer.first_line, "HTTP/1.1 200 Connection Established");
        assert_eq!(answer.fields, []);
        client.send("\0up\r\n\r\n");
        assert_eq!(upstream.bytes(7), b"\0up\r\n\r\n");
        client.socket().shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(upstream.rest(), "");
        upstream.send("and down");
        drop(upstream);
        assert_eq!(client.rest(), "and down");
    }
    assert!(target.is_deserted());
    world.proxy.take().unwrap().stop(PATIENCE);
    let log = std::fs::read_to_string(world.folder.path().join("access.log")).unwrap();
    assert!(
        log.contains("request=\"CONNECT db.example.org:5432\" status=200 bytes=47"),
        "{log}"
    );
}

#[test]
fn a_place_that_no_route_lists_is_refused_and_nothing_behind_it_is_read_as_a_request() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = world(&source, &target);
    for place in [
        "db.example.org:22",
        "example.org:443",
        "127.0.0.1:5432",
        "[::1]:443",
    ] {
        let mut client = world.client();
        client.send(format!(
            "CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
        ));
        let answer = client.message();
        assert_eq!(
            answer.first_line, "HTTP/1.1 405 Method Not Allowed",
            "{place}"
        );
        assert_eq!(
            answer.field("Allow"),
            Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
        );
        assert_eq!(answer.field("Connection"), Some("close"));
        assert_eq!(client.rest(), "", "{place}");
    }
    let lines = world.metrics();
    assert!(
        lines.contains("hopgate_refused_total{service=\"web\",reason=\"head\"} 4"),
        "{lines}"
    );
    assert!(source.is_deserted() && target.is_deserted());
}

#[test]
fn a_route_for_tunnels_takes_no_requests_and_other_routes_take_no_tunnels() {
    let (source, target) = (Stage::new(), Stage::new());
    let web = Stage::new();
    let every = "[[service.route]]\nname = \"every\"\nhost = \"*.example.org\"\n";
    let world = Plan::new(web.address(), web.address())
        .service(&format!("{}{every}", route(&source, &target)))
        .start();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHost: a.example.org:443\r\n\r\n");
    let mut upstream = web.accept();
    upstream.message();
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.message().status(), 204);
    assert_eq!(asked(&mut world.client(), "a.example.org:80").status(), 405);
    assert!(source.is_deserted());
}

#[test]
fn a_held_connect_reaches_only_the_target_of_its_route() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = world(&source, &target);
    world.hold();
    let mut client = world.client();
    client.send("CONNECT db.example.org:5432 HTTP/1.1\r\nHost: db.example.org:5432\r\n\r\nearly");
    world.until_held(1);
    let mut client2 = Client2::connect(world.address());
    let stream = connect2(&mut client2, "db.example.org:5432");
    let mut leaves = world.client();
    leaves.send("CONNECT db.example.org:5432 HTTP/1.1\r\nHost: db.example.org:5432\r\n\r\n");
    world.until_held(3);
    drop(leaves);
    world.until_held(2);
    world.move_to(Site::Target);
    let mut first = target.accept();
    let mut second = target.accept();
    // In the order of arrival.
    assert_eq!(first.bytes(5), b"early");
    assert_eq!(client.head().status(), 200);
    second.send("hello");
    drop(second);
    drop(stream.body);
    let answer = client2.wait(stream.answer).unwrap();
    assert_eq!(answer.status(), 200);
    assert!(source.is_deserted());
    balanced(&world);
}

#[test]
fn a_stream_of_http2_is_a_tunnel_as_well_and_its_connection_goes_on() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = world(&source, &target);
    let mut client = Client2::connect(world.address());
    let mut stream = connect2(&mut client, "db.example.org:5432");
    let mut upstream = source.accept();
    let answer = client.wait(stream.answer).unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.headers().is_empty(), "{answer:?}");
    stream
        .body
        .send_data(Bytes::from_static(b"up"), false)
        .unwrap();
    assert_eq!(upstream.bytes(2), b"up");
    upstream.send("down");
    stream.body.send_data(Bytes::new(), true).unwrap();
    assert_eq!(upstream.rest(), "");
    drop(upstream);
    assert_eq!(client.rest(answer.into_body()).unwrap().0, "down");
    for place in ["db.example.org:22", "other.example.net:443"] {
        let refused = connect2(&mut client, place);
        assert_eq!(client.answer(refused).status, 405, "{place}");
    }
    client.ping();
    // A stream that is reset closes its tunnel.
    let mut stream = connect2(&mut client, "db.example.org:5432");
    let mut upstream = source.accept();
    stream.body.send_reset(h2::Reason::CANCEL);
    assert!(upstream.is_closed());
}

#[test]
fn a_stream_of_http3_is_a_tunnel_as_well_and_its_connection_goes_on() {
    let (source, target) = (Stage::new(), Stage::new());
    let mut world = world3(&source, &target);
    let client = world.client();
    let mut stream = connect3(&client, "db.example.org:5432");
    assert_eq!(client.frame(&mut stream), Some((1, OK.to_vec())));
    let mut upstream = source.accept();
    say3(&client, &mut stream, "GET / HTTP/1.1\r\n\r\n");
    assert_eq!(upstream.bytes(18), b"GET / HTTP/1.1\r\n\r\n");
    upstream.send("down");
    assert_eq!(client.frame(&mut stream), Some((0, b"down".to_vec())));
    // Each half closes by itself.
    stream.send.finish().unwrap();
    assert_eq!(upstream.rest(), "");
    upstream.send("and on");
    drop(upstream);
    assert_eq!(client.frame(&mut stream), Some((0, b"and on".to_vec())));
    assert_eq!(client.frame(&mut stream), None);
    let end = client.wait(stream.receive.received_reset());
    assert_eq!(end, Ok(None), "a clean end");
    for place in ["db.example.org:22", "other.example.net:443"] {
        let mut refused = connect3(&client, place);
        let (kind, head) = client.frame(&mut refused).unwrap();
        // "405" as it is or in Huffman's code.
        let says = |text: &[u8]| head.windows(3).any(|window| window == text);
        assert!(
            kind == 1 && (says(b"405") || says(&[0x68, 0x0d, 0xff])),
            "{place}: {head:?}"
        );
    }
    // A stream that is taken back closes its tunnel.
    let mut stream = connect3(&client, "db.example.org:5432");
    assert_eq!(client.frame(&mut stream), Some((1, OK.to_vec())));
    let mut upstream = source.accept();
    cancel3(&mut stream);
    assert!(upstream.is_closed());
    // And so does the end of its connection.
    let mut stream = connect3(&client, "db.example.org:5432");
    assert_eq!(client.frame(&mut stream), Some((1, OK.to_vec())));
    let mut upstream = source.accept();
    client.leave();
    assert!(upstream.is_closed());
    let lines = world.world.metrics();
    assert!(
        lines.contains("hopgate_refused_total{service=\"web\",reason=\"head\"} 2"),
        "{lines}"
    );
    assert!(target.is_deserted());
    world.world.proxy.take().unwrap().stop(PATIENCE);
    let log = std::fs::read_to_string(world.world.folder.path().join("access.log")).unwrap();
    assert!(
        log.contains("request=\"CONNECT db.example.org:5432\" status=200 bytes=10"),
        "{log}"
    );
}

#[test]
fn a_held_connect_of_http3_reaches_only_the_target_of_its_route() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = world3(&source, &target);
    world.world.hold();
    let client = world.client();
    let mut stream = connect3(&client, "db.example.org:5432");
    say3(&client, &mut stream, "early");
    let mut leaves = connect3(&client, "db.example.org:5432");
    world.world.until_held(2);
    cancel3(&mut leaves);
    world.world.until_held(1);
    world.world.move_to(Site::Target);
    assert_eq!(client.frame(&mut stream), Some((1, OK.to_vec())));
    let mut upstream = target.accept();
    assert_eq!(upstream.bytes(5), b"early");
    upstream.send("late");
    assert_eq!(client.frame(&mut stream), Some((0, b"late".to_vec())));
    drop(upstream);
    assert_eq!(client.frame(&mut stream), None);
    assert!(source.is_deserted() && target.is_deserted());
    balanced(&world.world);
}

#[test]
fn a_place_that_nobody_serves_now_is_a_502_and_its_connection_ends() {
    let nobody = Nobody::new();
    let route = format!(
        "[[service.route]]\nname = \"db\"\nconnect = \"db.example.org:5432\"\nsource = \"{0}\"\ntarget = \"{0}\"\n",
        nobody.address()
    );
    let world = Plan::new(nobody.address(), nobody.address())
        .service(&route)
        .start();
    let mut client = world.client();
    let answer = asked(&mut client, "db.example.org:5432");
    assert_eq!(
        (answer.status(), answer.field("Connection")),
        (502, Some("close"))
    );
    let mut client = Client2::connect(world.address());
    let stream = connect2(&mut client, "db.example.org:5432");
    assert_eq!(client.answer(stream).status, 502);
}

#[test]
fn a_connect_that_could_be_read_in_two_ways_is_refused() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = world(&source, &target);
    for head in [
        "CONNECT db.example.org:5432 HTTP/1.1\r\nHost: other.example.org:5432\r\n\r\n",
        "CONNECT db.example.org:5432 HTTP/1.1\r\n\r\n",
        "CONNECT db.example.org HTTP/1.1\r\nHost: db.example.org\r\n\r\n",
        "CONNECT /db HTTP/1.1\r\nHost: h\r\n\r\n",
        "CONNECT http://db.example.org:5432 HTTP/1.1\r\nHost: db.example.org:5432\r\n\r\n",
        "CONNECT user@db.example.org:5432 HTTP/1.1\r\nHost: user@db.example.org:5432\r\n\r\n",
        "CONNECT db.example.org:5432 HTTP/1.1\r\nHost: db.example.org:5432\r\nContent-Length: 3\r\n\r\nabc",
        "CONNECT db.example.org:5432 HTTP/1.1\r\nHost: db.example.org:5432\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let mut client = world.client();
        let answer = client.send(head).message();
        assert_eq!(answer.status(), 400, "{head}");
        assert!(client.is_closed(), "{head}");
    }
    assert!(source.is_deserted() && target.is_deserted());
}
