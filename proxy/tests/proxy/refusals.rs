//! What is not forwarded: anything that two readers could read in two ways, and anything past a limit. The origin
//! must not see a byte of it.

use cutover_protocol::id::Site;

use crate::world::{Origin, Plan};

/// Sends each request on a connection of its own, followed by one that must not be answered.
fn all_refused(cases: &[(&str, String, u16)]) {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address()).start();
    for (name, request, status) in cases {
        let mut client = world.client();
        client.send(request);
        let answer = client.message();
        assert_eq!(answer.status(), *status, "{name}");
        assert_eq!(answer.field("Connection"), Some("close"), "{name}");
        assert!(client.is_closed(), "{name}");
    }
    assert_eq!(origin.seen(), Vec::<String>::new());
}

fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: h\r\n{fields}\r\n{body}")
}

#[test]
fn a_body_with_two_lengths_is_refused() {
    let smuggled = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    all_refused(&[
        (
            "CL.TE",
            post(
                "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
                smuggled,
            ),
            400,
        ),
        (
            "TE.CL",
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
                smuggled,
            ),
            400,
        ),
        (
            "CL.CL different",
            post("Content-Length: 6\r\nContent-Length: 7\r\n", smuggled),
            400,
        ),
        (
            "CL.CL equal",
            post("Content-Length: 6\r\nContent-Length: 6\r\n", smuggled),
            400,
        ),
        ("CL list", post("Content-Length: 6, 6\r\n", smuggled), 400),
    ]);
}

#[test]
fn a_length_that_is_not_a_plain_number_is_refused() {
    let cases = [
        "+6",
        "-6",
        "0x6",
        "6 6",
        "",
        "6.0",
        "99999999999999999999",
        "٦",
    ];
    let cases = cases.map(|length| {
        (
            "length",
            post(&format!("Content-Length: {length}\r\n"), "abcdef"),
            400,
        )
    });
    all_refused(&cases);
}

#[test]
fn an_unclear_transfer_coding_is_refused() {
    let body = "0\r\n\r\n";
    let old = format!("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
    all_refused(&[
        (
            "gzip",
            post("Transfer-Encoding: gzip, chunked\r\n", body),
            501,
        ),
        (
            "identity",
            post("Transfer-Encoding: identity\r\n", body),
            501,
        ),
        (
            "twice",
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                body,
            ),
            501,
        ),
        (
            "quoted",
            post("Transfer-Encoding: \"chunked\"\r\n", body),
            501,
        ),
        (
            "prefixed",
            post("Transfer-Encoding: xchunked\r\n", body),
            501,
        ),
        (
            "vertical tab",
            post("Transfer-Encoding:\x0bchunked\r\n", body),
            400,
        ),
        (
            "blank before colon",
            post("Transfer-Encoding : chunked\r\n", body),
            400,
        ),
        ("TE on 1.0", old, 400),
    ]);
}

#[test]
fn folded_lines_bare_line_ends_and_control_bytes_are_refused() {
    all_refused(&[
        (
            "fold",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n".into(),
            400,
        ),
        (
            "fold first",
            "GET / HTTP/1.1\r\n Host: h\r\n\r\n".into(),
            400,
        ),
        ("bare LF", "GET / HTTP/1.1\nHost: h\n\n".into(), 400),
        (
            "bare LF in a field",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\nContent-Length: 3\r\n\r\n".into(),
            400,
        ),
        (
            "bare CR",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n".into(),
            400,
        ),
        (
            "NUL",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n".into(),
            400,
        ),
    ]);
}

#[test]
fn an_unclear_host_or_target_is_refused() {
    all_refused(&[
        ("none", "GET / HTTP/1.1\r\n\r\n".into(), 400),
        (
            "two",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".into(),
            400,
        ),
        ("user", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".into(), 400),
        ("path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into(), 400),
        (
            "absolute against",
            "GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n".into(),
            400,
        ),
        ("relative", "GET x HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        ("star", "GET * HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        (
            "CONNECT",
            "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n".into(),
            405,
        ),
    ]);
}

#[test]
fn what_is_not_http_1_is_refused() {
    all_refused(&[
        ("no preface", "PRI * HTTP/2.0\r\nX: a\r\n\r\n".into(), 505),
        ("old", "GET /\r\n\r\n".into(), 400),
        (
            "two blanks",
            "GET  / HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            400,
        ),
        ("TLS", "\x16\x03\x01\x02\x00\x01\r\n\r\n".into(), 400),
    ]);
}

#[test]
fn heads_past_their_limits_are_refused() {
    let many: String = (0..200)
        .map(|number| format!("X-{number}: 1\r\n"))
        .collect();
    all_refused(&[
        (
            "bytes",
            format!(
                "GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n",
                "a".repeat(17_000)
            ),
            431,
        ),
        (
            "fields",
            format!("GET / HTTP/1.1\r\nHost: h\r\n{many}\r\n"),
            431,
        ),
    ]);
}

#[test]
fn a_bad_chunk_ends_the_request_and_the_connection() {
    for body in [
        "+3\r\nabc\r\n0\r\n\r\n",
        "3\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "0\r\nContent-Length: 3\r\n\r\n",
    ] {
        let origin = Origin::new("source");
        let world = Plan::new(origin.address(), origin.address()).start();
        let mut client = world.client();
        client.send(post("Transfer-Encoding: chunked\r\n", body));
        assert_eq!(client.message().status(), 400, "{body}");
        assert!(client.is_closed(), "{body}");
    }
}

#[test]
fn a_head_that_does_not_come_is_a_408() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .limits("client_head_ms_max = 50")
        .start();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHo");
    assert_eq!(client.message().status(), 408);
    assert!(client.is_closed());
}

#[test]
fn an_idle_client_is_let_go() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .limits("client_idle_ms_max = 50")
        .start();
    let mut client = world.client();
    assert_eq!(client.get("/").message().status(), 200);
    assert!(client.is_closed());
}

#[test]
fn nobody_is_idle_while_the_service_is_held() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let plan = || Plan::new(source.address(), target.address()).limits("client_idle_ms_max = 1000");
    let (world, other) = (plan().start(), plan().start());
    let mut client = world.client();
    assert_eq!(client.get("/").message().status(), 200);
    world.hold();
    // Where nothing is held, who comes after our client has to go before it.
    let mut elsewhere = other.client();
    assert_eq!(elsewhere.get("/").message().status(), 200);
    assert!(elsewhere.is_closed());
    client.get("/held");
    world.until_held(1);
    world.move_to(Site::Target);
    assert_eq!(client.message().body, "target GET /held");
}
