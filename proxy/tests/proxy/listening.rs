//! Where clients come in: several listeners a service, unix sockets, IPv6, and balancers that say by the PROXY
//! protocol for whom they connect.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;

use hopgate_proxy::Proxy;
use hopgate_proxy::config::Config;
use tempfile::TempDir;

use crate::world::{Origin, Peer, Stage};

/// A proxy whose one service has these listeners.
fn listening(address: SocketAddr, listeners: &str) -> (Proxy, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.toml");
    let text = format!(
        "state_dir = \"state\"\ncontrol = \"control.sock\"\nworkers = 2\n[[service]]\nname = \"web\"\n\
         source = \"{address}\"\ntarget = \"{address}\"\n{listeners}"
    );
    std::fs::write(&path, text).unwrap();
    let proxy = Proxy::start(&Config::load(&path).unwrap()).unwrap();
    (proxy, folder)
}

fn listener(address: &str, more: &str) -> String {
    format!("[[service.listen]]\naddress = \"{address}\"\n{more}\n")
}

fn only_address(proxy: &Proxy) -> SocketAddr {
    proxy.address("web").unwrap()
}

#[test]
fn one_service_is_reached_by_every_one_of_its_listeners() {
    let origin = Origin::new("source");
    let listeners = [
        listener("127.0.0.1:0", ""),
        listener("[::1]:0", ""),
        listener("unix:web.sock", ""),
    ];
    let (proxy, folder) = listening(origin.address(), &listeners.concat());
    let addresses = proxy.addresses("web");
    assert_eq!(addresses.len(), 3);
    for address in addresses.into_iter().flatten() {
        let mut client = Peer::connect(address);
        client.get("/");
        assert_eq!(client.message().status(), 200, "{address}");
    }
    let mut client = UnixStream::connect(folder.path().join("web.sock")).unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn a_unix_socket_left_by_a_killed_proxy_is_taken_over_and_one_in_use_is_not() {
    let origin = Origin::new("source");
    let listeners = listener("unix:web.sock", "");
    let (proxy, folder) = listening(origin.address(), &listeners);
    let config = Config::load(&folder.path().join("proxy.toml")).unwrap();
    let other = tempfile::tempdir().unwrap();
    let second = Config {
        state_dir: other.path().join("state"),
        control: other.path().join("control.sock"),
        ..config
    };
    let error = Proxy::start(&second).unwrap_err().to_string();
    assert!(error.contains("web.sock"), "{error}");
    drop(proxy);
    assert!(folder.path().join("web.sock").exists(), "nobody removed it");
    Proxy::start(&second).unwrap();
    UnixStream::connect(folder.path().join("web.sock")).unwrap_err();
}

#[test]
fn a_balancer_says_for_whom_it_connects() {
    let stage = Stage::new();
    let from = "proxy_protocol_from = [\"127.0.0.0/8\"]";
    let (proxy, _folder) = listening(stage.address(), &listener("127.0.0.1:0", from));
    let version_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x9c\x40\0\x50";
    for header in [
        &b"PROXY TCP4 192.0.2.7 10.0.0.1 40000 80\r\n"[..],
        version_2,
    ] {
        let mut client = Peer::connect(only_address(&proxy));
        // In pieces, and with the request right behind it.
        client.send(&header[..7]);
        client.send(&header[7..]);
        client.get("/who");
        let request = stage.accept().head();
        assert_eq!(request.field("x-forwarded-for"), Some("192.0.2.7"));
    }
}

#[test]
fn a_balancer_that_says_nothing_or_nonsense_is_not_served() {
    let origin = Origin::new("source");
    let from = "proxy_protocol_from = [\"127.0.0.0/8\"]";
    let metrics = "\n[metrics]\nlisten = \"127.0.0.1:0\"";
    let listeners = format!("{}{metrics}", listener("127.0.0.1:0", from));
    let (proxy, _folder) = listening(origin.address(), &listeners);
    for nonsense in [
        "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        "PROXY TCP4 1.2.3.4\r\n",
    ] {
        let mut client = Peer::connect(only_address(&proxy));
        client.send(nonsense);
        assert!(client.is_closed(), "{nonsense}");
    }
    let mut check = Peer::connect(only_address(&proxy));
    check.send("PROX");
    check.socket().shutdown(Shutdown::Write).unwrap();
    assert!(check.is_closed());
    let mut scraper = Peer::connect(proxy.metrics_address().unwrap());
    let lines = scraper.send("GET /metrics HTTP/1.1\r\n\r\n").message().body;
    // A check that only connects, or leaves in the middle, is no refusal.
    assert!(
        lines.contains("hopgate_refused_total{service=\"web\",reason=\"proxy_protocol\"} 2\n"),
        "{lines}"
    );
    assert!(origin.seen().is_empty());
}

#[test]
fn only_named_senders_are_asked_for_whom_they_connect() {
    let origin = Origin::new("source");
    let from = "proxy_protocol_from = [\"10.0.0.0/8\"]";
    let (proxy, _folder) = listening(origin.address(), &listener("127.0.0.1:0", from));
    let mut client = Peer::connect(only_address(&proxy));
    client.get("/");
    assert_eq!(client.message().status(), 200);
    let mut forger = Peer::connect(only_address(&proxy));
    forger.send("PROXY TCP4 192.0.2.7 10.0.0.1 40000 80\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n");
    // Read as a request, it is one of an unknown version.
    assert_eq!(forger.message().status(), 505);
}
