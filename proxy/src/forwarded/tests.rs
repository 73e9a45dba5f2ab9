//! What an upstream is told, by who asks and what they claim.

use proptest::prelude::*;

use super::*;

const ID: RequestId = RequestId {
    origin: 1,
    number: 2,
};
const OURS: &str = "X-Request-Id: 0000000000000001-2\r\n";

struct Case<'c> {
    peer: &'c str,
    trusted: &'c str,
    fields: &'c [(&'c str, &'c str)],
    tracing: Tracing,
}

impl Case<'_> {
    fn run<R>(&self, look: impl FnOnce(&Arrived<'_>, Said<'_>, &TrustedFrom) -> R) -> R {
        let fields: Vec<httparse::Header<'_>> = self
            .fields
            .iter()
            .map(|(name, value)| httparse::Header {
                name,
                value: value.as_bytes(),
            })
            .collect();
        let fields = &fields[..];
        let mut seen = Seen::default();
        fields
            .iter()
            .filter_map(|field| OurField::of(field.name))
            .for_each(|field| seen.insert(field));
        let networks = self.trusted.split(' ').filter(|text| !text.is_empty());
        let trust = TrustedFrom::new(networks.map(|text| text.parse().unwrap()).collect());
        let peer = self.peer.parse().unwrap();
        let text = AddressText::of(peer);
        let arrived = Arrived {
            peer,
            peer_text: text.as_bytes(),
            scheme: b"http",
            trusted: trust.believes(peer),
            tracing: self.tracing,
        };
        let said = Said {
            fields: &fields,
            seen,
            host: b"example.org:8080",
        };
        look(&arrived, said, &trust)
    }

    fn written(&self) -> String {
        self.run(|arrived, said, _| {
            let mut out = Vec::new();
            arrived.write(said, ID, &mut out);
            String::from_utf8(out).unwrap()
        })
    }

    fn client(&self) -> String {
        self.run(|arrived, said, trust| arrived.client(said, trust).to_string())
    }
}

fn from<'c>(peer: &'c str, fields: &'c [(&'c str, &'c str)]) -> Case<'c> {
    Case {
        peer,
        trusted: "10.0.0.0/8 fd00::/8",
        fields,
        tracing: Tracing::Off,
    }
}

#[test]
fn a_plain_request_gets_three_lines() {
    let lines = format!("X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n{OURS}");
    assert_eq!(from("192.0.2.7", &[]).written(), lines);
    assert_eq!(from("10.0.0.1", &[]).client(), "10.0.0.1");
}

#[test]
fn what_a_stranger_claims_is_replaced() {
    let claims = [
        ("X-Forwarded-For", "10.9.9.9"),
        ("x_forwarded_for", "10.9.9.9"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "admin.internal"),
        ("X-Forwarded-Port", "443"),
        ("Forwarded", "for=10.9.9.9"),
        ("X-Request-Id", "forged"),
    ];
    let stranger = from("2001:db8::7", &claims);
    assert_eq!(
        stranger.written(),
        format!(
            "X-Forwarded-For: 2001:db8::7\r\nX-Forwarded-Proto: http\r\n{OURS}X-Forwarded-Host: example.org:8080\r\n\
             X-Forwarded-Port: 8080\r\nForwarded: for=\"[2001:db8::7]\";proto=http;host=\"example.org:8080\"\r\n"
        )
    );
    assert_eq!(stranger.client(), "2001:db8::7");
}

#[test]
fn what_a_trusted_peer_says_is_passed_on_and_added_to() {
    let said = [
        ("X-Forwarded-For", "192.0.2.1, 10.0.0.2"),
        ("X-Forwarded-For", "10.0.0.3"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "www.example.org"),
        ("X-Forwarded-Port", "443"),
        ("Forwarded", "for=192.0.2.1"),
        ("X-Request-Id", "b5f0a7d2-1"),
    ];
    let trusted = from("10.0.0.1", &said);
    assert_eq!(
        trusted.written(),
        "X-Forwarded-For: 192.0.2.1, 10.0.0.2, 10.0.0.3, 10.0.0.1\r\nX-Forwarded-Proto: https\r\n\
         X-Request-Id: b5f0a7d2-1\r\nX-Forwarded-Host: www.example.org\r\nX-Forwarded-Port: 443\r\n\
         Forwarded: for=192.0.2.1, for=10.0.0.1;proto=http;host=\"example.org:8080\"\r\n"
    );
    assert_eq!(trusted.client(), "192.0.2.1");
}

#[test]
fn the_client_is_the_last_address_that_is_not_trusted() {
    for (chain, client) in [
        ("192.0.2.1", "192.0.2.1"),
        ("198.51.100.9, 192.0.2.1", "192.0.2.1"),
        ("198.51.100.9, 192.0.2.1, 10.0.0.2", "192.0.2.1"),
        ("10.0.0.4, 10.0.0.3", "10.0.0.4"),
        ("192.0.2.1, unknown, 10.0.0.3", "10.0.0.3"),
        ("192.0.2.1, unknown", "10.0.0.1"),
        ("[2001:db8::1]:77, fd00::1", "2001:db8::1"),
        ("", "10.0.0.1"),
    ] {
        assert_eq!(
            from("10.0.0.1", &[("x-forwarded-for", chain)]).client(),
            client,
            "{chain}"
        );
    }
    let standard = [("Forwarded", "for=192.0.2.4;proto=https, for=\"[fd00::9]\"")];
    assert_eq!(from("10.0.0.1", &standard).client(), "192.0.2.4");
}

#[test]
fn an_id_that_is_none_or_comes_twice_is_replaced() {
    let long = "a".repeat(129);
    for fields in [
        &[("X-Request-Id", "a b")][..],
        &[("X-Request-Id", "")],
        &[("X-Request-Id", long.as_str())],
        &[("X-Request-Id", "a"), ("X-Request-Id", "b")],
        &[("X_Request_Id", "a")],
    ] {
        assert!(
            from("10.0.0.1", fields).written().contains(OURS),
            "{fields:?}"
        );
    }
    let longest = "a".repeat(128);
    let taken = from("10.0.0.1", &[("X-Request-Id", longest.as_str())]).written();
    assert!(
        taken.contains(&format!("X-Request-Id: {longest}\r\n")),
        "{taken}"
    );
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn traced(fields: &[(&str, &str)], tracing: Tracing) -> Vec<String> {
    let case = Case {
        tracing,
        ..from("192.0.2.7", fields)
    };
    let written = case.written();
    let lines = written.lines().filter(|line| line.starts_with("trace"));
    lines.map(str::to_owned).collect()
}

#[test]
fn a_trace_passes_through_a_proxy_that_does_not_trace() {
    let fields = [
        ("traceparent", PARENT),
        ("tracestate", "a=1"),
        ("tracestate", "b=2, c=3"),
    ];
    let lines = traced(&fields, Tracing::Off);
    let parent = format!("traceparent: {PARENT}");
    assert_eq!(
        lines,
        [parent.as_str(), "tracestate: a=1", "tracestate: b=2, c=3"]
    );
    assert_eq!(traced(&[], Tracing::Off), Vec::<String>::new());
}

#[test]
fn a_trace_goes_on_with_a_span_of_ours() {
    let lines = traced(
        &[("traceparent", PARENT), ("tracestate", "a=1")],
        Tracing::On,
    );
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with("traceparent: 00-0af7651916cd43dd8448eb211c80319c-"),
        "{lines:?}"
    );
    assert!(
        lines[0].ends_with("-01") && !lines[0].contains("b7ad6b7169203331"),
        "{lines:?}"
    );
    let begun = traced(&[], Tracing::On);
    let parsed = TraceParent::parse(begun[0].strip_prefix("traceparent: ").unwrap().as_bytes());
    assert_eq!(parsed, Some(TraceParent::begin(ID)));
}

#[test]
fn a_malformed_trace_is_dropped_with_its_state() {
    let many = vec!["a=1"; 33].join(",");
    let long = format!("a={}", "x".repeat(256));
    let long = [long.as_str(), long.as_str()].join(",");
    for (fields, lines) in [
        (
            &[("traceparent", "00-1-2-01"), ("tracestate", "a=1")][..],
            0,
        ),
        (&[("traceparent", PARENT), ("traceparent", PARENT)], 0),
        (&[("tracestate", "a=1")], 0),
        (&[("traceparent", PARENT), ("tracestate", "no member")], 1),
        (&[("traceparent", PARENT), ("tracestate", many.as_str())], 1),
        (&[("traceparent", PARENT), ("tracestate", long.as_str())], 1),
    ] {
        assert_eq!(traced(fields, Tracing::Off).len(), lines, "{fields:?}");
    }
}

proptest! {
    #[test]
    fn no_claim_of_a_stranger_reaches_the_upstream(
        name in prop::sample::select(vec!["x-forwarded-for", "X_Forwarded-Host", "forwarded", "x-request-id", "x-forwarded-proto"]),
        value in "[a-z0-9.:\\[\\]=;,]{6,30}",
    ) {
        let written = from("192.0.2.7", &[(name, value.as_str())]).written();
        prop_assert!(!written.contains(&value) || "example.org:8080".contains(&value), "{}", written);
    }
}
