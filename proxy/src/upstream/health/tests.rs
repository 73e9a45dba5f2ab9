//! Checks against real sockets, and what comes of their results. Time is an argument where it matters.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::hold::ServerState;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::{CheckError, check, jittered, settle, watch};
use crate::config::{
    Check, HealthConfig, HttpCheck, ProxyVersion, UpstreamConfig, UpstreamProtocol,
};
use crate::upstream::address::Address;
use crate::upstream::group::Group;
use crate::upstream::moment::Moment;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(20);

fn http(path: &str) -> HttpCheck {
    HttpCheck {
        method: "GET".to_owned(),
        path: path.to_owned(),
        host: None,
        status: vec![(200, 299), (404, 404)],
        body: None,
    }
}

fn config(address: &str, check: Check) -> UpstreamConfig {
    UpstreamConfig {
        health: Some(HealthConfig {
            check,
            interval: Duration::from_millis(10),
            timeout: PATIENCE,
            rise: 2,
            fall: 3,
            initially_up: true,
        }),
        ..UpstreamConfig::of_one(Address::parse(address).unwrap())
    }
}

fn group(config: UpstreamConfig) -> Group {
    Group::new(config, 1, 0, None).unwrap()
}

/// One check of the only server.
async fn found(config: UpstreamConfig) -> Result<String, String> {
    let group = group(config);
    let server = Arc::clone(&group.members().list[0].server);
    let (found, stream) = timeout(PATIENCE, check(&group, &server)).await.unwrap();
    drop(stream);
    found.map_err(|error| error.to_string())
}

/// A listener, and its address.
async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Answers one request with these bytes and closes; returns the request's head.
async fn answer(listener: TcpListener, bytes: &str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = head(&mut stream).await;
    stream.write_all(bytes.as_bytes()).await.unwrap();
    head
}

async fn http_found(check: HttpCheck, bytes: &str) -> (Result<String, String>, String) {
    let (listener, address) = listen().await;
    let config = config(&address, Check::Http(check));
    tokio::join!(found(config), answer(listener, bytes))
}

#[tokio::test]
async fn a_status_of_the_set_is_good_and_any_other_is_named() {
    for (status, verdict) in [
        (200, Ok("status 200".to_owned())),
        (404, Ok("status 404".to_owned())),
        (403, Err("status 403".to_owned())),
        (503, Err("status 503".to_owned())),
    ] {
        let bytes = format!("HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(http_found(http("/"), &bytes).await.0, verdict);
    }
}

#[tokio::test]
async fn a_check_asks_for_its_path_with_its_method_and_host() {
    let check = HttpCheck {
        method: "HEAD".to_owned(),
        host: Some("app.example.org".to_owned()),
        ..http("/health?deep=1")
    };
    let (_, asked) = http_found(check, "HTTP/1.1 200 OK\r\n\r\n").await;
    let lines: Vec<&str> = asked.lines().collect();
    assert_eq!(
        lines[..2],
        ["HEAD /health?deep=1 HTTP/1.1", "Host: app.example.org"]
    );
    assert!(lines.contains(&"Connection: close"));
}

#[tokio::test]
async fn the_body_is_searched_in_every_framing_and_after_early_answers() {
    let wanted = || HttpCheck {
        body: Some("all is well".to_owned()),
        ..http("/")
    };
    for bytes in [
        "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhere all is well now",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nall is\r\n5\r\n well\r\n0\r\n\r\n",
        "HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nall is well",
        "HTTP/1.0 200 OK\r\n\r\nall is well",
    ] {
        assert_eq!(
            http_found(wanted(), bytes).await.0,
            Ok("status 200".to_owned()),
            "{bytes}"
        );
    }
    for bytes in [
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnone",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nnone\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\r\nall is not well",
    ] {
        let lacks = "status 200, but the body lacks the expected text".to_owned();
        assert_eq!(http_found(wanted(), bytes).await.0, Err(lacks), "{bytes}");
    }
}

#[tokio::test]
async fn what_is_not_http_or_no_answer_is_said_so() {
    for (bytes, verdict) in [
        ("SSH-2.0-OpenSSH_9\r\n\r\n", "the answer is not HTTP"),
        ("", "the server closed the connection without an answer"),
    ] {
        assert_eq!(
            http_found(http("/"), bytes).await.0,
            Err(verdict.to_owned())
        );
    }
}

#[tokio::test]
async fn a_group_of_http2_is_asked_in_http2() {
    let (listener, address) = listen().await;
    let check = HttpCheck {
        body: Some("well".to_owned()),
        ..http("/health")
    };
    let config = UpstreamConfig {
        protocol: UpstreamProtocol::Http2,
        ..config(&address, Check::Http(check))
    };
    let origin = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(request.uri().path(), "/health");
        let response = http::Response::builder().status(200).body(()).unwrap();
        let mut body = respond.send_response(response, false).unwrap();
        body.send_data("all is well".into(), true).unwrap();
        while connection.accept().await.is_some() {}
    };
    let (found, ()) = tokio::join!(found(config), origin);
    assert_eq!(found, Ok("status 200".to_owned()));
}

#[tokio::test]
async fn a_tcp_check_is_good_when_somebody_listens() {
    let (listener, address) = listen().await;
    let config = || config(&address, Check::Tcp);
    assert_eq!(found(config()).await, Ok("connected".to_owned()));
    drop(listener);
    let refused = "cannot connect: Connection refused (os error 111)".to_owned();
    assert_eq!(found(config()).await, Err(refused));
}

#[tokio::test]
async fn a_unix_socket_is_checked_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let config = config(&format!("unix:{}", path.display()), Check::Http(http("/")));
    let origin = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 204 None\r\n\r\n")
            .await
            .unwrap();
        head
    };
    let (found, asked) = tokio::join!(found(config), origin);
    assert_eq!(found, Ok("status 204".to_owned()));
    assert!(asked.contains("Host: localhost\r\n"));
}

#[tokio::test]
async fn a_server_behind_the_proxy_protocol_is_told_that_nobody_stands_behind_a_check() {
    for (version, begins) in [
        (ProxyVersion::V1, &b"PROXY UNKNOWN\r\n"[..]),
        (ProxyVersion::V2, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
    ] {
        let (listener, address) = listen().await;
        let config = UpstreamConfig {
            proxy_protocol: Some(version),
            ..config(&address, Check::Http(http("/")))
        };
        let origin = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut begun = vec![0; begins.len()];
            stream.read_exact(&mut begun).await.unwrap();
            assert_eq!(begun, begins);
            assert!(head(&mut stream).await.starts_with("GET / "));
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        };
        let (found, ()) = tokio::join!(found(config), origin);
        assert_eq!(found, Ok("status 200".to_owned()));
    }
}

#[tokio::test]
async fn silence_is_a_bad_check() {
    let (_listener, address) = listen().await;
    let mut config = config(&address, Check::Http(http("/")));
    config.health.as_mut().unwrap().timeout = Duration::from_millis(1);
    assert_eq!(found(config).await, Err("no answer within 1 ms".to_owned()));
}

fn mysql(user: Option<&str>) -> Check {
    Check::Mysql {
        user: user.map(str::to_owned),
    }
}

async fn packet(stream: &mut TcpStream, sequence: u8, payload: &[u8]) {
    let length = u8::try_from(payload.len()).unwrap();
    stream.write_all(&[length, 0, 0, sequence]).await.unwrap();
    stream.write_all(payload).await.unwrap();
}

async fn packet_from(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.unwrap();
    let mut payload = vec![0; usize::from(head[0])];
    stream.read_exact(&mut payload).await.unwrap();
    (head[3], payload)
}

const GREETING: &[u8] = b"\x0a5.5.5-10.11.14-MariaDB\0and more";

/// A database that greets, and answers the login with this; returns who logged in and the packet after it.
async fn database(listener: TcpListener, answer: &[u8]) -> (String, Option<Vec<u8>>) {
    let (mut stream, _) = listener.accept().await.unwrap();
    packet(&mut stream, 0, GREETING).await;
    let (sequence, login) = packet_from(&mut stream).await;
    assert_eq!(sequence, 1);
    let user = login[32..].split(|byte| *byte == 0).next().unwrap();
    packet(&mut stream, 2, answer).await;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    let user = String::from_utf8(user.to_vec()).unwrap();
    (user, Some(rest).filter(|rest| !rest.is_empty()))
}

#[tokio::test]
async fn a_database_is_greeted_logged_in_to_and_told_goodbye() {
    let (listener, address) = listen().await;
    let config = config(&address, mysql(Some("hopgate")));
    let database = database(listener, b"\0\0\0\x02\0\0\0");
    let (found, (user, goodbye)) = tokio::join!(found(config), database);
    assert_eq!(found, Ok("10.11.14-MariaDB".to_owned()));
    assert_eq!(user, "hopgate");
    assert_eq!(goodbye, Some(vec![1, 0, 0, 0, 1]));
}

#[tokio::test]
async fn a_denied_login_is_bad_for_a_user_and_good_enough_for_nobody() {
    let denied = b"\xff\x15\x04#28000Access denied";
    for (user, verdict) in [
        (Some("hopgate"), Err("error 1045: Access denied".to_owned())),
        (None, Ok("10.11.14-MariaDB".to_owned())),
    ] {
        let (listener, address) = listen().await;
        let config = config(&address, mysql(user));
        let (found, (_, goodbye)) = tokio::join!(found(config), database(listener, denied));
        assert_eq!(found, verdict);
        assert_eq!(goodbye, None);
    }
}

#[tokio::test]
async fn a_database_that_asks_for_another_kind_of_password_gets_an_empty_one() {
    let (listener, address) = listen().await;
    let config = config(&address, mysql(Some("hopgate")));
    let database = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        packet(&mut stream, 0, GREETING).await;
        packet_from(&mut stream).await;
        packet(&mut stream, 2, b"\xfecaching_sha2_password\0salt").await;
        assert_eq!(packet_from(&mut stream).await, (3, Vec::new()));
        packet(&mut stream, 4, b"\0\0\0\x02\0\0\0").await;
        packet_from(&mut stream).await
    };
    let (found, goodbye) = tokio::join!(found(config), database);
    assert_eq!(found, Ok("10.11.14-MariaDB".to_owned()));
    assert_eq!(goodbye, (0, vec![1]));
}

#[tokio::test]
async fn a_database_that_greets_with_an_error_is_bad_with_its_own_words() {
    let (listener, address) = listen().await;
    let config = config(&address, mysql(None));
    let database = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        packet(&mut stream, 0, b"\xff\x10\x04Too many connections").await;
    };
    let (found, ()) = tokio::join!(found(config), database);
    assert_eq!(found, Err("error 1040: Too many connections".to_owned()));
}

#[tokio::test]
async fn what_does_not_greet_like_a_database_is_none() {
    for bytes in [
        &b"HTTP/1.1 400 Bad\r\n\r\n"[..],
        b"\x05\0\0\0\x42abcd",
        b"\0\0\0\0",
    ] {
        let (listener, address) = listen().await;
        let config = config(&address, mysql(None));
        let origin = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(bytes).await.unwrap();
        };
        let (found, ()) = tokio::join!(found(config), origin);
        let verdict = "the greeting is not that of MySQL or MariaDB".to_owned();
        assert_eq!(found, Err(verdict));
    }
}

#[test]
fn three_bad_checks_in_a_row_bring_a_server_down_and_two_good_ones_up() {
    let group = group(config("10.0.0.1:80", Check::Tcp));
    let server = Arc::clone(&group.members().list[0].server);
    let now = Instant::now();
    let mut note = |good: bool| {
        let found = if good {
            Ok(String::new())
        } else {
            Err(CheckError::Closed)
        };
        settle(&group, &server, found, now);
        server.is_up()
    };
    let seen = [false, false, true, false, false, false].map(&mut note);
    assert_eq!(seen, [true, true, true, true, true, false]);
    let seen = [true, false, true, true, false].map(&mut note);
    assert_eq!(seen, [false, false, false, true, true]);
    assert_eq!(
        server.state(Moment::of(now), Duration::from_secs(1)),
        ServerState::SlowStart
    );
}

#[test]
fn an_interval_varies_by_a_tenth() {
    let second = Duration::from_secs(1);
    assert_eq!(jittered(second, 0), Duration::from_millis(900));
    let most = jittered(second, u64::MAX);
    assert!(most > Duration::from_millis(1099) && most <= Duration::from_millis(1100));
}

#[tokio::test]
async fn a_watched_server_goes_down_with_its_listener_and_comes_back_with_it() {
    let (listener, address) = listen().await;
    let group = Arc::new(group(config(&address, Check::Tcp)));
    let server = Arc::clone(&group.members().list[0].server);
    let local = LocalSet::new();
    let until = |up: bool| {
        let server = Arc::clone(&server);
        async move {
            while server.is_up() != up {
                tokio::task::yield_now().await;
            }
        }
    };
    let test = local.run_until(async {
        let task = tokio::task::spawn_local(watch(Arc::clone(&group), Vec::new()));
        drop(listener);
        until(false).await;
        let reason = server.checks().last.clone().unwrap().reason;
        assert_eq!(reason, "cannot connect: Connection refused (os error 111)");
        let _listener = TcpListener::bind(&address).await.unwrap();
        until(true).await;
        task.abort();
    });
    timeout(PATIENCE, test).await.unwrap();
}
