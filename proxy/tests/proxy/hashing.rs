//! Balancing by a hash: one key, one server, in every process; and a server that goes away moves its own keys only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use cutover_protocol::hold::ServerState;
use cutover_protocol::id::Site;
use http::Request;
use socket2::{Domain, Socket, Type};

use crate::balancing::{addresses, group, until_servers};
use crate::client2::Client2;
use crate::world::{Origin, Peer, World};

const KEYS: u8 = 60;
const CHECKS: &str = "[upstream.health]\ncheck = \"tcp\"\ninterval_ms = 20\nfall = 1";

/// What a client says for its key, and from where.
type Ask = fn(&World, u8) -> String;

fn by_header(world: &World, key: u8) -> String {
    let request = format!("GET / HTTP/1.1\r\nHost: h\r\nX-Tenant: {key}\r\n\r\n");
    world.client().send(request).message().body
}

fn by_cookie(world: &World, key: u8) -> String {
    let request = format!("GET / HTTP/1.1\r\nHost: h\r\nCookie: a=b; user={key}; c=d\r\n\r\n");
    world.client().send(request).message().body
}

/// The whole of 127.0.0.0/8 is ours.
fn by_address(world: &World, key: u8) -> String {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from = SocketAddr::from((Ipv4Addr::new(127, 0, 1, key + 1), 0));
    socket.bind(&from.into()).unwrap();
    socket.connect(&world.address().into()).unwrap();
    Peer::of(TcpStream::from(socket)).get("/").message().body
}

/// Over streams the crumbs of a cookie may come apart.
fn by_cookie_of_a_stream(world: &World, key: u8) -> String {
    let mut client = Client2::connect(world.address());
    let request = Request::get("http://h/")
        .header("cookie", "a=b")
        .header("cookie", format!("user={key}"));
    let stream = client.send(request.body(()).unwrap(), true);
    client.answer(stream).body
}

/// Who serves each key.
fn served(world: &World, ask: Ask) -> BTreeMap<u8, String> {
    (0..KEYS)
        .map(|key| {
            let body = ask(world, key);
            (key, body.split(' ').next().unwrap().to_owned())
        })
        .collect()
}

fn moves_only_its_keys(hash_by: &str, protocol: &'static str, ask: Ask) {
    let origins = [Origin::new("one"), Origin::new("two"), Origin::new("three")];
    let servers = addresses(&origins.iter().collect::<Vec<_>>());
    let more = format!("balance = \"hash\"\nhash_by = \"{hash_by}\"\n{CHECKS}");
    let start = || {
        let mut plan = group(&servers, &more);
        plan.protocol = protocol;
        plan.start()
    };
    let world = start();
    let before = served(&world, ask);
    let used: BTreeSet<_> = before.values().collect();
    assert_eq!(used.len(), 3, "{before:?}");
    assert_eq!(served(&world, ask), before, "{hash_by}: the same each time");
    assert_eq!(served(&start(), ask), before, "{hash_by}: in every process");
    origins[1].closes();
    until_servers(&world, Site::Source, |servers| {
        servers[1].state == ServerState::Down
    });
    let after = served(&world, ask);
    let mut heirs = BTreeSet::new();
    for (key, name) in &before {
        if name == "two" {
            heirs.insert(&after[key]);
        } else {
            assert_eq!(&after[key], name, "{hash_by}: key {key} has moved");
        }
    }
    // Its keys are spread over those that are left.
    let left = BTreeSet::from([&"one".to_owned(), &"three".to_owned()].map(String::clone));
    assert_eq!(heirs.into_iter().cloned().collect::<BTreeSet<_>>(), left);
}

#[test]
fn a_header_leads_to_its_server_and_a_server_that_goes_moves_only_its_keys() {
    moves_only_its_keys("header:x-tenant", "http", by_header);
}

#[test]
fn a_cookie_leads_to_its_server_and_a_server_that_goes_moves_only_its_keys() {
    moves_only_its_keys("cookie:user", "http", by_cookie);
    moves_only_its_keys("cookie:user", "http", by_cookie_of_a_stream);
}

#[test]
fn an_address_leads_to_its_server_and_a_server_that_goes_moves_only_its_keys() {
    moves_only_its_keys("address", "http", by_address);
    moves_only_its_keys("address", "tcp", by_address);
}

#[test]
fn whoever_has_no_key_is_served_all_the_same() {
    let origins = [Origin::new("one"), Origin::new("two")];
    let servers = addresses(&origins.iter().collect::<Vec<_>>());
    let world = group(&servers, "balance = \"hash\"\nhash_by = \"cookie:user\"").start();
    for _ in 0..10 {
        assert_eq!(world.client().get("/").message().status(), 200);
    }
}
