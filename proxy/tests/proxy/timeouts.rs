//! Times that nothing else tries: a client inside its body or its answer, a server that takes no connection, silence
//! in a tunnel, and connections nobody uses.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};

use socket2::{Domain, Socket, Type};

use crate::limits::refused;
use crate::world::{Plan, Stage};

fn plan(address: SocketAddr, limits: &str) -> Plan {
    Plan::new(address, address)
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .limits(limits)
}

#[test]
fn a_client_that_falls_silent_inside_its_body_gets_408() {
    let stage = Stage::new();
    let limits = "client_silence_ms_max = 50\nclient_body_bytes_per_s_min = 0";
    let world = plan(stage.address(), limits).start();
    let mut client = world.client();
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf");
    let mut upstream = stage.accept();
    upstream.head();
    let answer = client.message();
    assert_eq!(answer.first_line, "HTTP/1.1 408 Request Timeout");
    assert_eq!(answer.field("Connection"), Some("close"));
    assert!(client.is_closed());
    assert_eq!(refused(&world, "body_slow"), 1);
    // Its server is told that nothing more comes.
    assert_eq!(upstream.rest(), "half");
}

#[test]
fn a_client_that_takes_nothing_of_its_answer_is_let_go() {
    let stage = Stage::new();
    let world = plan(stage.address(), "client_silence_ms_max = 50").start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
    // More than the kernel keeps for a client that reads nothing.
    let piece = vec![b'x'; 1 << 20];
    let written = (0..1000).all(|_| upstream.socket().write_all(&piece).is_ok());
    assert!(!written);
    world.until(|status| status.in_flight == 0);
}

/// A server that listens, and whose queue is full.
fn too_busy() -> (TcpListener, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let waiting: Vec<Socket> = (0..8)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            // Under way, or waiting in vain.
            drop(socket.connect(&address));
            socket
        })
        .collect();
    (listener.into(), waiting)
}

#[test]
fn a_server_that_takes_no_connection_in_time_is_a_502() {
    let (server, _waiting) = too_busy();
    let world = plan(server.local_addr().unwrap(), "connect_ms_max = 50").start();
    let mut client = world.client();
    let answer = client.get("/").message();
    assert_eq!(answer.first_line, "HTTP/1.1 502 Bad Gateway");
    assert_eq!(answer.body, "Bad Gateway: the upstream cannot be reached\n");
    assert_eq!(answer.field("Connection"), None);
}

#[test]
fn a_raw_connection_that_is_silent_both_ways_is_ended() {
    let stage = Stage::new();
    let world = plan(stage.address(), "tunnel_idle_ms_max = 50")
        .tcp()
        .start();
    let mut client = world.client();
    let mut upstream = stage.accept();
    assert!(client.is_closed());
    assert!(upstream.is_closed());
    world.until(|status| status.in_flight == 0 && status.upstream_connections == 0);
}

#[test]
fn an_upgraded_connection_that_is_silent_both_ways_is_ended() {
    let stage = Stage::new();
    let world = plan(stage.address(), "tunnel_idle_ms_max = 50").start();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
    let mut upstream = stage.accept();
    upstream.head();
    upstream.send(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    assert_eq!(client.head().status(), 101);
    assert!(client.is_closed());
    assert!(upstream.is_closed());
}

#[test]
fn a_connection_to_a_server_that_nobody_uses_is_closed() {
    let stage = Stage::new();
    let world = plan(stage.address(), "upstream_idle_ms_max = 50").start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.message().status(), 204);
    assert!(upstream.is_closed());
}

#[test]
fn a_client_of_a_tls_port_that_says_nothing_is_left_and_counted() {
    let authority = crate::tls::Authority::new();
    let folder = crate::tls::folder(&authority, &["site.example"]);
    let stage = Stage::new();
    let profile = format!("[[tls]]\nname = \"public\"\n{}", crate::tls::ONE);
    let mut plan = plan(stage.address(), "client_head_ms_max = 50");
    plan = plan.table(&profile);
    plan.listener = Some("address = \"127.0.0.1:0\"\ntls = \"public\"");
    let world = plan.start_in(folder);
    let silent = TcpStream::connect(world.address()).unwrap();
    assert!(crate::world::Peer::of(silent).is_closed());
    let counted = "hopgate_tls_handshakes_total{profile=\"public\",end=\"slow\"} 1";
    assert!(
        (0..10_000).any(|_| world.metrics().contains(counted)),
        "{}",
        world.metrics()
    );
}
