//! How TLS connections end, towards clients and towards servers: a whole answer with a farewell, half of one without,
//! and none at all from a server that is not who it should be.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;

use hopgate_proxy::Proxy;
use hopgate_proxy::config::Config;
use rustls::{ServerConnection, StreamOwned};

use crate::tls::{Authority, Browser, folder, start};
use crate::world::{Origin, PATIENCE, Peer, Stage, World};

const ONE: &str = "certificates = [{ chain = \"a.pem\", key = \"a.key\" }]";

#[test]
fn an_answer_that_ends_with_the_connection_ends_with_a_farewell() {
    let authority = Authority::new();
    let stage = Stage::new();
    let world = start(folder(&authority, &["site.example"]), ONE, stage.address());
    let mut client = Browser::trusting(&authority).connect(world.address(), "site.example");
    client
        .write_all(b"GET / HTTP/1.0\r\nHost: h\r\n\r\n")
        .unwrap();
    let mut origin = stage.accept();
    origin.head();
    origin.send("HTTP/1.0 200 OK\r\n\r\nthe whole answer");
    drop(origin);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("the whole answer"), "{answer}");
}

#[test]
fn half_an_answer_ends_without_a_farewell() {
    let authority = Authority::new();
    let stage = Stage::new();
    let world = start(folder(&authority, &["site.example"]), ONE, stage.address());
    let mut client = Browser::trusting(&authority).connect(world.address(), "site.example");
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    let mut origin = stage.accept();
    origin.head();
    origin.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
    drop(origin);
    let error = client.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
        ),
        "{error}"
    );
}

/// An origin that speaks TLS, as `name`, and answers everything with "secure".
fn secure_origin(authority: &Authority, name: &str) -> SocketAddr {
    let config = authority.server(&[name]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let session = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = StreamOwned::new(session, socket.unwrap());
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while matches!(stream.read(&mut bytes), Ok(1..)) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecure";
                    if stream.write_all(answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A proxy in clear in front of servers that speak TLS.
fn start_towards(authority: &Authority, server: SocketAddr, name: &str) -> World {
    start_showing(authority, server, name, "")
}

/// The same with more keys of `[upstream.tls]`.
fn start_showing(authority: &Authority, server: SocketAddr, name: &str, more: &str) -> World {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
    let text = format!(
        "state_dir = \"state\"\ncontrol = \"control.sock\"\nworkers = 1\n[[upstream]]\nname = \"secure\"\n\
         servers = [{{ address = \"{server}\" }}]\n[upstream.tls]\nca = \"ca.pem\"\nname = \"{name}\"\n{more}\n\
         [[service]]\nname = \"web\"\nlisten = \"127.0.0.1:0\"\nsource = \"secure\"\ntarget = \"secure\"\n"
    );
    let path = folder.path().join("proxy.toml");
    std::fs::write(&path, text).unwrap();
    let proxy = Proxy::start(&Config::load(&path).unwrap()).unwrap();
    World {
        proxy: Some(proxy),
        folder,
    }
}

#[test]
fn a_verified_server_is_spoken_to_over_tls_and_kept_for_the_next_request() {
    let authority = Authority::new();
    let server = secure_origin(&authority, "app.internal");
    let world = start_towards(&authority, server, "app.internal");
    let mut client = world.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").message().body, "secure");
    }
}

#[test]
fn a_server_that_is_not_who_it_should_be_is_answered_for_with_502() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = secure_origin(&authority, "app.internal");
    for (trusted, name) in [(&authority, "other.internal"), (&other, "app.internal")] {
        let world = start_towards(trusted, server, name);
        let mut client: Peer = world.client();
        client.socket().set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.get("/").message().status(), 502);
    }
}

#[test]
fn a_server_that_asks_for_a_certificate_is_shown_the_groups() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let origin = Origin::new("inside");
    let inside = folder(&authority, &["app.internal"]);
    std::fs::write(inside.path().join("clients.pem"), clients.pem()).unwrap();
    let inner = start(
        inside,
        &format!("{ONE}\nclient_ca = \"clients.pem\""),
        origin.address(),
    );
    let own = tempfile::tempdir().unwrap();
    clients.writes(own.path(), "own", &["edge"]);
    let file = own.path().join("own").display().to_string();
    let shown = format!("certificate = \"{file}.pem\"\nkey = \"{file}.key\"");
    for (more, status) in [(&shown[..], 200), ("", 502)] {
        let world = start_showing(&authority, inner.address(), "app.internal", more);
        assert_eq!(world.client().get("/").message().status(), status, "{more}");
    }
    assert_eq!(origin.seen(), ["GET /"]);
}
