//! Streams that are held beside their connection: what came of them meanwhile, their order, and how they are seen.

use bytes::Bytes;
use cutover_protocol::id::Site;
use http::{HeaderMap, Method};

use crate::client2::{Client2, Stream2};
use crate::holding::balanced;
use crate::world::{Origin, Plan, Stage, World};

fn held_world(source: &Origin, stage: &Stage) -> World {
    let world = Plan::new(source.address(), stage.address()).start();
    world.hold();
    world
}

#[test]
fn a_held_body_arrives_whole_whenever_its_parts_came() {
    let (source, stage) = (Origin::new("source"), Stage::new());
    let world = held_world(&source, &stage);
    let mut client = Client2::connect(world.address());
    let mut stream = client.begin(Method::POST, "/parts", false);
    let mut say = |text: &str| {
        let data = Bytes::copy_from_slice(text.as_bytes());
        stream.body.send_data(data, false).unwrap();
    };
    say("at once ");
    world.until_held(1);
    say("while held ");
    // The answer to a PING comes when all that was sent before has been read.
    client.ping();
    world.move_to(Site::Target);
    let mut upstream = stage.accept();
    let head = upstream.head();
    assert_eq!(head.first_line, "POST /parts HTTP/1.1");
    let data = Bytes::from_static(b"afterwards");
    stream.body.send_data(data, false).unwrap();
    let mut trailer = HeaderMap::new();
    trailer.insert("x-sum", "3".parse().unwrap());
    stream.body.send_trailers(trailer).unwrap();
    let body = String::from_utf8(upstream.chunks()).unwrap();
    assert_eq!(body, "at once while held afterwards{x-sum: 3}");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer(stream).body, "ok");
    balanced(&world);
}

#[test]
fn a_body_longer_than_its_window_flows_on_after_the_release() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address()).start();
    world.hold();
    let mut client = Client2::connect(world.address());
    let body = "x".repeat(300_000);
    let stream = client.post("/long", &body);
    world.until_held(1);
    client.ping();
    world.move_to(Site::Target);
    assert_eq!(
        client.answer(stream).body,
        format!("target POST /long {body}")
    );
    balanced(&world);
}

#[test]
fn streams_of_one_connection_leave_in_the_order_of_their_arrival() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[release]\nwindow_first = 1\nwindow_max = 1")
        .start();
    world.hold();
    let mut client = Client2::connect(world.address());
    let streams: Vec<Stream2> = (0..40)
        .map(|number| client.get(&format!("/{number}")))
        .collect();
    world.until_held(40);
    world.move_to(Site::Target);
    for stream in streams {
        assert_eq!(client.answer(stream).status, 200);
    }
    let expected: Vec<String> = (0..40).map(|number| format!("GET /{number}")).collect();
    assert_eq!(target.seen(), expected);
    balanced(&world);
}
