//! The loop guard of raw connections: one that comes back to a proxy ends there, and every other goes on with the names of
//! those it has passed.

use std::net::SocketAddr;

use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand};

use crate::world::{Peer, Plan, Stage, World};

/// A listener that is told for whom its clients connect, as one behind another proxy is.
const BEHIND: &str = "address = \"127.0.0.1:0\"\nproxy_protocol_from = [\"127.0.0.0/8\"]";

/// A raw service that has a name, or none, and leads to this address.
fn leads_to(address: SocketAddr, name: Option<&str>) -> World {
    let mut plan = Plan::new(address, address)
        .tcp()
        .named("behind", "behind")
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .table(&upstream(address));
    plan.listener = Some(BEHIND);
    if let Some(name) = name {
        plan = plan.service(&format!("loop_id = \"{name}\""));
    }
    plan.start()
}

fn upstream(address: SocketAddr) -> String {
    format!(
        "[[upstream]]\nname = \"behind\"\nproxy_protocol = \"v2\"\nservers = [{{ address = \"{address}\" }}]"
    )
}

/// A header of version 2 for 192.0.2.7:40000, with one TLV of ours.
fn header(value: &str) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    let count = u16::try_from(value.len()).unwrap();
    bytes.extend((15 + count).to_be_bytes());
    bytes.extend([192, 0, 2, 7, 10, 0, 0, 1, 0x9c, 0x40, 0, 80, 0xe7]);
    bytes.extend(count.to_be_bytes());
    bytes.extend(value.as_bytes());
    bytes
}

/// The value of the only TLV in the header that an upstream gets, if there is one.
fn told(upstream: &mut Peer) -> Option<String> {
    let head = upstream.bytes(16);
    let count = usize::from(u16::from_be_bytes([head[14], head[15]]));
    let rest = upstream.bytes(count);
    assert_eq!(rest[..4], [192, 0, 2, 7]);
    let tlv = &rest[12..];
    if tlv.is_empty() {
        return None;
    }
    assert_eq!((tlv[0], usize::from(tlv[2])), (0xe7, tlv.len() - 3));
    Some(String::from_utf8(tlv[3..].to_vec()).unwrap())
}

fn refused(world: &World, reason: &str) -> u64 {
    let metrics = world.metrics();
    let line = format!("hopgate_refused_total{{service=\"web\",reason=\"{reason}\"}} ");
    let count = metrics.lines().find_map(|known| known.strip_prefix(&line));
    count.unwrap().parse().unwrap()
}

/// How many connections it has led to the address behind it, which both sites share.
fn led_on(world: &World) -> u64 {
    let servers = world.control().status().servers;
    servers.iter().map(|server| server.requests).max().unwrap()
}

#[test]
fn a_connection_goes_on_with_the_names_of_the_proxies_it_has_passed() {
    let stage = Stage::new();
    let (named, nameless) = (
        leads_to(stage.address(), Some("edge-b")),
        leads_to(stage.address(), None),
    );
    for (world, came, goes) in [
        (&named, "cdn-loop:edge-a", Some("cdn-loop:edge-a,edge-b")),
        (&named, "another's", Some("cdn-loop:edge-b")),
        (&nameless, "cdn-loop:edge-a", Some("cdn-loop:edge-a")),
        (&nameless, "another's", None),
    ] {
        let mut client = world.client();
        client.send(header(came)).send("hello");
        let mut upstream = stage.accept();
        assert_eq!(told(&mut upstream).as_deref(), goes, "{came}");
        assert_eq!(upstream.bytes(5), b"hello");
    }
}

#[test]
fn a_connection_that_goes_in_a_circle_ends_after_one_round() {
    let stage = Stage::new();
    let source = leads_to(stage.address(), Some("source"));
    let target = leads_to(source.address(), Some("target"));
    // By mistake the source takes the target for the way to its application.
    let path = source.folder.path().join("proxy.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (right, wrong) = (stage.address().to_string(), target.address().to_string());
    std::fs::write(&path, text.replace(&right, &wrong)).unwrap();
    let reloaded = source.control().process(&ProcessCommand::Reload);
    assert!(
        matches!(reloaded, ProcessAnswer::Reloaded(_)),
        "{reloaded:?}"
    );

    let mut client = source.client();
    client.send("PROXY TCP4 192.0.2.7 10.0.0.1 40000 80\r\nhello");
    assert!(client.is_closed());
    assert_eq!((refused(&source, "loop"), refused(&target, "loop")), (1, 0));
    assert_eq!((led_on(&source), led_on(&target)), (1, 1));
    assert!(stage.is_deserted());
    // Whoever comes by the target goes round once as well, and ends there.
    let mut client = target.client();
    client.send("PROXY TCP4 192.0.2.7 10.0.0.1 40000 80\r\nhello");
    assert!(client.is_closed());
    assert_eq!((refused(&source, "loop"), refused(&target, "loop")), (1, 1));
    assert_eq!((led_on(&source), led_on(&target)), (2, 2));
}

#[test]
fn a_broken_list_of_proxies_is_refused_and_a_full_one_is_a_circle() {
    let stage = Stage::new();
    let world = leads_to(stage.address(), Some("edge-a"));
    let full: Vec<String> = (0..16).map(|number| format!("p{number}")).collect();
    let full = format!("cdn-loop:{}", full.join(","));
    let more = format!("{full},p16");
    let long = format!("cdn-loop:{}", vec!["p".repeat(64); 7].join(","));
    for (value, reason) in [
        ("cdn-loop:", "proxy_protocol"),
        ("cdn-loop:a b", "proxy_protocol"),
        (&more, "proxy_protocol"),
        (&long, "proxy_protocol"),
        (&full, "loop"),
        ("cdn-loop:x,EDGE-A", "loop"),
    ] {
        let before = refused(&world, reason);
        let mut client = world.client();
        client.send(header(value));
        assert!(client.is_closed(), "{value}");
        assert_eq!(refused(&world, reason), before + 1, "{value}");
    }
    assert!(stage.is_deserted());
}

#[test]
fn a_request_carries_on_what_was_said_of_its_connection() {
    let stage = Stage::new();
    let mut plan = Plan::new(stage.address(), stage.address())
        .named("behind", "behind")
        .table(&upstream(stage.address()));
    plan.listener = Some(BEHIND);
    let world = plan.start();
    let mut client = world.client();
    client.send(header("cdn-loop:edge-a")).get("/");
    let mut upstream = stage.accept();
    assert_eq!(told(&mut upstream).as_deref(), Some("cdn-loop:edge-a"));
    assert_eq!(upstream.message().first_line, "GET / HTTP/1.1");
}
