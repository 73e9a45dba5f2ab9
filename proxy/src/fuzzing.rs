//! The ways in for the fuzz targets of `fuzz/`, and what must hold there for any input. Each function takes bytes and
//! panics when a rule is broken; none of them does input or output.
//!
//! Built for tests and with the feature `fuzzing` only; no part of the proxy may use it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use aws_lc_rs::aead::quic::{AES_128, HeaderProtectionKey};
use cutover_protocol::hold::Order;
use ipnet::IpNet;

use crate::config::{Config, ProxyVersion};
use crate::control::seen;
use crate::forwarded::TraceParent;
use crate::forwarded::{Arrived, LoopId, TrustedFrom};
use crate::http::chunked::{ChunkError, Chunks};
use crate::http::deadline;
use crate::http::head::{Framing, HeadError, Scan, Version, same_field, scan};
use crate::http::mux::head::{BodyFollows, HeadBuilder};
use crate::http::request::{Method, Parsed, Request, RequestId, Told, Upgrade, field_room, parse};
use crate::http::response;
use crate::listen::client::Client;
use crate::listen::quic::connection_id::{Addressee, ID_BYTES, PlaceCodec};
use crate::listen::{hello, proxy_protocol};
use crate::route::Path;
use crate::stream::Look;
use crate::upstream::health::database_says;

/// A request head: found alike however it is cut, and what we write of it is read the same way again.
pub fn request_head(bytes: &[u8]) {
    let Some(head) = find(bytes) else { return };
    let mut room = field_room();
    if let Ok(parsed) = parse(head, &mut room) {
        check_written(&parsed);
    }
}

/// A response head, for every kind of request it may answer.
pub fn response_head(bytes: &[u8]) {
    let Some(head) = find(bytes) else { return };
    for version in [Version::Http10, Version::Http11] {
        for method in [Method::Head, Method::Safe, Method::Other] {
            for upgrade in [Upgrade::None, Upgrade::Asked] {
                let request = Request {
                    version,
                    method,
                    line_bytes: 0,
                    framing: Framing::Empty,
                    persists: true,
                    upgrade,
                    expects_continue: false,
                    set_cookie: None,
                    alt_svc: None,
                };
                check_answer(head, &request);
            }
        }
    }
}

/// Chunks: the first bytes say where the rest is cut; a body is the same in one piece and in many.
pub fn chunks(bytes: &[u8]) {
    let Some((cuts, body)) = bytes.split_at_checked(4) else {
        return;
    };
    let whole = decode(body, &[]);
    let sizes: Vec<usize> = cuts.iter().map(|cut| usize::from(*cut % 16) + 1).collect();
    assert_eq!(whole, decode(body, &sizes), "cut into {sizes:?}");
    assert_eq!(whole, decode(body, &[1]), "byte by byte");
    if let Ok(Decoded { used, .. }) = whole {
        assert!(used <= body.len());
    }
}

/// A configuration file: refused with one line, or accepted.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Err(problem) = Config::parse(text, std::path::Path::new("/nowhere")) {
        let said = problem.to_string();
        assert!(!said.is_empty() && !said.contains('\n'), "{said:?}");
    }
}

/// A line of the control socket: what is understood is said again in the same words.
pub fn command(bytes: &[u8]) {
    if let Ok(order) = serde_json::from_slice::<Order>(bytes) {
        let said = serde_json::to_vec(&order).unwrap_or_default();
        let again = serde_json::from_slice::<Order>(&said);
        assert_eq!(again.ok(), Some(order));
    }
    if let Ok(look) = serde_json::from_slice::<seen::Look>(bytes) {
        let said = serde_json::to_vec(&look).unwrap_or_default();
        let again = serde_json::from_slice::<seen::Look>(&said);
        assert_eq!(again.ok(), Some(look));
    }
}

/// A header list of HTTP/2 or HTTP/3: lines of `name`, a zero byte, `value`, parted by 0xff. What comes out is one
/// head and nothing behind it.
pub fn header_list(bytes: &[u8]) {
    let Some((flags, list)) = bytes.split_first() else {
        return;
    };
    let body = if flags & 1 == 0 {
        BodyFollows::No
    } else {
        BodyFollows::Yes
    };
    let mut builder = HeadBuilder::default();
    for field in list.split(|byte| *byte == 0xff) {
        let end = field.iter().position(|byte| *byte == 0);
        let (name, value) = field.split_at(end.unwrap_or(field.len()));
        let value = value.get(1..).unwrap_or_default();
        if builder.field(name, value).is_err() {
            return;
        }
    }
    let mut head = Vec::new();
    if builder.finish(body, &mut head).is_err() {
        return;
    }
    assert_eq!(
        scan(&head, 0),
        Ok(Scan::Complete(head.len())),
        "{}",
        head.escape_ascii()
    );
    let mut room = field_room();
    if let Ok(parsed) = parse(&head, &mut room) {
        let without_body = body == BodyFollows::No;
        assert!(
            !without_body || parsed.framing == Framing::Empty,
            "{parsed:?}"
        );
        check_written(&parsed);
    }
}

/// A request's path: each reading is what it is read as again, and a path of one reading hides nothing.
pub fn route_path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    // A head whose target is not a path has been refused before anybody reads its path.
    let Some(path) = text.starts_with('/').then(|| Path::read(text)) else {
        return;
    };
    let Ok(path) = path else { return };
    let again = Path::read(path.as_str());
    assert_eq!(
        again.as_ref().map(Path::as_str),
        Ok(path.as_str()),
        "{text:?}"
    );
    assert_eq!(
        again.as_ref().map(Path::loose),
        Ok(path.loose()),
        "{text:?}"
    );
    let clean = path.loose().unwrap_or(path.as_str());
    assert!(clean.starts_with('/'), "{text:?} is read as {clean:?}");
    let inner = clean[1..].trim_end_matches('/').split('/');
    let hidden = |segment: &str| matches!(segment, "" | "." | "..");
    assert!(
        clean == "/" || !inner.into_iter().any(hidden),
        "{text:?} is read as {clean:?}"
    );
}

/// A traceparent: an accepted one names a trace and a caller.
pub fn trace_parent(bytes: &[u8]) {
    if let Some(parent) = TraceParent::parse(bytes) {
        assert!(bytes.len() >= 55 && parent.trace_id != 0 && parent.span_id != 0);
    }
}

/// A client's own deadline: whatever its value is, shortened it is of the same form, no longer than before, and the rest
/// of the head stays as it was.
pub fn deadline(bytes: &[u8]) {
    // A head of ours has no line ends or blanks at the edges of its values.
    let value = bytes.trim_ascii();
    if value.iter().any(|byte| matches!(byte, b'\r' | b'\n')) {
        return;
    }
    for name in ["grpc-timeout", "connect-timeout-ms", "request-timeout"] {
        let begin = format!("GET / HTTP/1.1\r\nHost: h\r\n{name}: ");
        let end = b"\r\nX-After: all\r\n\r\n";
        let head = [begin.as_bytes(), value, end].concat();
        let before = deadline::of(&head);
        for passed in [Duration::ZERO, Duration::from_millis(1), Duration::MAX] {
            let mut after = head.clone();
            deadline::shorten(&mut after, passed);
            assert!(after.starts_with(begin.as_bytes()) && after.ends_with(end));
            match (before, deadline::of(&after)) {
                (None, _) => assert_eq!(after, head),
                (Some(before), Some(after)) => {
                    // Of what is less than its unit one is left.
                    assert!(after <= before.max(Duration::from_micros(1)));
                }
                (Some(_), None) => panic!("{} is lost", after.escape_ascii()),
            }
        }
    }
}

/// The PROXY protocol: what is said of a connection does not depend on how its first bytes arrive.
pub fn proxy_protocol(bytes: &[u8]) {
    let said = |bytes: &[u8]| match proxy_protocol::parse(bytes) {
        Look::Further => None,
        Look::Seen(told) => Some(told.map_err(|error| error.kind())),
    };
    let whole = said(bytes);
    let first = (0..=bytes.len()).find_map(|seen| Some((seen, said(&bytes[..seen])?)));
    assert_eq!(first.as_ref().map(|(_, told)| told), whole.as_ref());
    if let Some((seen, Ok(header))) = first {
        assert_eq!(
            seen, header.bytes,
            "the header is taken off whole, and nothing behind it"
        );
        carries_on(&header);
    }
}

/// Whatever a connection has passed, the next one is told all of it and our own name, once, in a header it can read.
fn carries_on(header: &proxy_protocol::Header) {
    let ours = LoopId::new("fuzz");
    let Ok(passed) = header.passed.and(ours.as_ref()) else {
        return;
    };
    assert!(passed.and(ours.as_ref()).is_err());
    let client = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let written = proxy_protocol::header(ProxyVersion::V2, client, None, &passed);
    match proxy_protocol::parse(&written) {
        Look::Seen(Ok(next)) => assert_eq!((next.passed, next.bytes), (passed, written.len())),
        Look::Seen(Err(error)) => panic!("{error}"),
        Look::Further => panic!("we cut off our own header"),
    }
}

/// A ClientHello: whatever it is, there is a name in it or none.
pub fn client_hello(bytes: &[u8]) {
    if let Look::Seen(hello::Greeting::Named(name)) = hello::parse(bytes) {
        assert!(!name.is_empty() && name == name.to_ascii_lowercase());
    }
}

/// The greeting of a database and what follows it, as a check reads them: understood or refused, and never waited for
/// once there is nothing more to come.
pub fn database(bytes: &[u8]) {
    for user in [None, Some("hopgate")] {
        let found = database_says(bytes, user);
        let said = match found.as_ref().map(Result::as_ref) {
            Some(Ok(version)) => version.clone(),
            Some(Err(error)) => error.to_string(),
            None => panic!("a check waits behind the end of {}", bytes.escape_ascii()),
        };
        assert!(said.len() <= 2 * bytes.len() + 200, "{said:?}");
    }
}

/// The first packet of a datagram: only an id of ours leads it to a worker.
pub fn packet(bytes: &[u8]) {
    let Ok(key) = HeaderProtectionKey::new(&AES_128, &[7; 16]) else {
        return;
    };
    let codec = PlaceCodec::new(key);
    if matches!(codec.addressee(bytes), Addressee::Place(_)) {
        assert!(bytes.len() > ID_BYTES, "{}", bytes.escape_ascii());
    }
}

/// What a trusted peer says of its clients: X-Forwarded-For, Forwarded, or both; the first byte says which. Whatever it
/// is, one client comes of it, and what we write is read as one head again.
pub fn forwarded(bytes: &[u8]) {
    let Some((which, said)) = bytes.split_first() else {
        return;
    };
    let mut head = b"GET / HTTP/1.1\r\nHost: h\r\n".to_vec();
    for (bit, name) in [
        (1, "X-Forwarded-For"),
        (2, "Forwarded"),
        (4, "X-Forwarded-Proto"),
    ] {
        if which & bit != 0 {
            head.extend_from_slice(name.as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(said);
            head.extend_from_slice(b"\r\n");
        }
    }
    head.extend_from_slice(b"\r\n");
    let Some(head) = find(&head) else { return };
    let mut room = field_room();
    let Ok(parsed) = parse(head, &mut room) else {
        return;
    };
    let trust = TrustedFrom::new(vec![IpNet::from(std::net::IpAddr::from([127, 0, 0, 1]))]);
    let client = Client::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
    let arrived = Arrived::by(&client, &trust);
    let believed = arrived.client(parsed.said(), &trust);
    assert_eq!(believed, arrived.client(parsed.said(), &trust));
    assert!(matches!(arrived.scheme(parsed.said()), b"http" | b"https"));
    let id = RequestId {
        origin: 1,
        number: 2,
    };
    let mut out = Vec::new();
    parsed.write(Told::plain(&arrived, id), &mut out);
    let written = out.escape_ascii();
    assert_eq!(scan(&out, 0), Ok(Scan::Complete(out.len())), "{written}");
    let mut room = field_room();
    match parse(&out, &mut room) {
        Ok(_) | Err(HeadError::TooManyFields) => {}
        Err(error) => panic!("{error} in {written}"),
    }
}

/// The head at the beginning of `bytes`, if there is one that may be read.
fn find(bytes: &[u8]) -> Option<&[u8]> {
    let whole = scan(bytes, 0);
    let mut from = 0;
    let mut stepwise = Ok(Scan::Partial(0));
    for seen in 0..=bytes.len() {
        stepwise = scan(&bytes[..seen], from);
        match stepwise {
            Ok(Scan::Partial(next)) => from = next,
            Ok(Scan::Complete(_)) | Err(_) => break,
        }
    }
    assert_eq!(kind(whole), kind(stepwise), "{}", bytes.escape_ascii());
    match whole {
        Ok(Scan::Complete(end)) => Some(&bytes[..end]),
        Ok(Scan::Partial(_)) | Err(_) => None,
    }
}

/// Where to go on may differ between two ways of looking; what was found may not.
fn kind(scan: Result<Scan, HeadError>) -> Result<Option<usize>, HeadError> {
    scan.map(|scan| match scan {
        Scan::Complete(end) => Some(end),
        Scan::Partial(_) => None,
    })
}

fn check_written(parsed: &Parsed<'_, '_>) {
    let client = Client::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
    let id = RequestId {
        origin: 1,
        number: 2,
    };
    let arrived = Arrived::by(&client, &TrustedFrom::default());
    let mut out = Vec::new();
    let request = parsed.write(Told::plain(&arrived, id), &mut out);
    let said = out.escape_ascii();
    assert_eq!(scan(&out, 0), Ok(Scan::Complete(out.len())), "{said}");
    let mut room = field_room();
    let again = match parse(&out, &mut room) {
        Ok(again) => again,
        // An old client need not name a host, and three lines of ours may be too many.
        Err(HeadError::TooManyFields) => return,
        Err(error) => panic!("{error} in {said}"),
    };
    assert_eq!(
        (
            again.method,
            again.path,
            again.host,
            again.version,
            again.framing
        ),
        (
            parsed.method,
            parsed.path,
            parsed.host,
            Version::Http11,
            parsed.framing
        ),
        "{said}"
    );
    assert_eq!(request.framing, parsed.framing);
    for framing in ["content-length", "transfer-encoding", "host"] {
        let named = again
            .fields
            .iter()
            .filter(|field| same_field(field.name, framing));
        assert!(named.count() <= 1, "{framing} twice in {said}");
    }
}

fn check_answer(head: &[u8], request: &Request) {
    let mut out = Vec::new();
    let Ok(response) = response::rewrite(head, request, true, None, &mut out) else {
        return;
    };
    let said = out.escape_ascii();
    assert_eq!(scan(&out, 0), Ok(Scan::Complete(out.len())), "{said}");
    let mut twice = Vec::new();
    match response::rewrite(&out, request, true, None, &mut twice) {
        Ok(again) => assert_eq!(
            (again.status, again.client_persists),
            (response.status, response.client_persists),
            "{said}"
        ),
        Err(HeadError::TooManyFields) => {}
        Err(error) => panic!("{error} in {said}"),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Decoded {
    data: Vec<u8>,
    used: usize,
    trailer: Vec<u8>,
    last: bool,
}

/// Decodes in pieces of these sizes, again and again; in one piece without any.
fn decode(body: &[u8], sizes: &[usize]) -> Result<Decoded, ChunkError> {
    let mut chunks = Chunks::new();
    let mut decoded = Decoded {
        data: Vec::new(),
        used: 0,
        trailer: Vec::new(),
        last: false,
    };
    let mut sizes = sizes.iter().cycle();
    while decoded.used < body.len() && !decoded.last {
        let rest = &body[decoded.used..];
        let size = sizes
            .next()
            .map_or(rest.len(), |size| rest.len().min(*size));
        let mut part = rest[..size].to_vec();
        let piece = chunks.decode(&mut part)?;
        decoded
            .data
            .extend_from_slice(&part[piece.start..piece.end]);
        decoded.used += piece.used;
        decoded.last = piece.last;
    }
    decoded.trailer = chunks.trailer().to_vec();
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 14] = [
        ("request_head", request_head),
        ("response_head", response_head),
        ("chunks", chunks),
        ("config", config),
        ("command", command),
        ("header_list", header_list),
        ("route_path", route_path),
        ("trace_parent", trace_parent),
        ("deadline", deadline),
        ("proxy_protocol", proxy_protocol),
        ("client_hello", client_hello),
        ("database", database),
        ("packet", packet),
        ("forwarded", forwarded),
    ];

    /// Where no seeds have been written: something that each target understands.
    const SEEDS: [&[u8]; 13] = [
        b"GET /a?b HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close, x\r\n\r\nabc",
        b"POST http://h:80/ HTTP/1.1\r\nHost: h:80\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"abcd5;x=\"y\"\r\nhello\r\n0\r\nTrailer: v\r\n\r\n",
        b"\x01:method\0GET\xff:scheme\0http\xff:authority\0h\xff:path\0/\xffcookie\0a=b\xffx\0y",
        b"/a/%2e%2e/b;c//d\\e/./",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        b"PROXY TCP4 192.0.2.7 10.0.0.1 40000 80\r\nGET / HTTP/1.1\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x9c\x40\0\x50",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x1f\xc0\0\x02\x07\x0a\0\0\x01\x9c\x40\0\x50\xe7\0\x10cdn-loop:edge-a1",
        b"\x0b\0\0\0\x0a5.5.5-10.6\0\x07\0\0\x02\0\0\0\x02\0\0\0",
        b"\x07for=\"[2001:db8::1]:80\";by=_a, for=192.0.2.1",
        b"{\"command\":\"hold\",\"service\":\"web\",\"epoch\":1,\"lease_ms\":1,\"drain_ms_max\":1}",
    ];

    /// What readers look for.
    const WORDS: [&[u8]; 16] = [
        b"\r\n",
        b"\n",
        b"\0",
        b"\xff",
        b":",
        b" ",
        b"\t",
        b"%2e",
        b"..",
        b"0\r\n\r\n",
        b"chunked",
        b"Content-Length: ",
        b"Transfer-Encoding: ",
        b"HTTP/1.1",
        b"\"",
        b"99999999999999999999",
    ];

    /// Splitmix64: the same mutations for the same seed.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = self.0;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            usize::try_from((bits ^ (bits >> 31)) % bound.max(1) as u64).unwrap()
        }

        fn byte(&mut self) -> u8 {
            u8::try_from(self.below(256)).unwrap()
        }

        /// A few changes to one seed, some of them taken from another.
        fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
            let mut bytes = seeds[self.below(seeds.len())].clone();
            for _ in 0..=self.below(6) {
                let at = self.below(bytes.len() + 1);
                let upto = (at + 1 + self.below(8)).min(bytes.len());
                match self.below(7) {
                    0 if at < bytes.len() => bytes[at] = self.byte(),
                    1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                    2 => bytes.insert(at, self.byte()),
                    3 => drop(bytes.drain(at.min(upto)..upto)),
                    4 => {
                        let again = bytes[at.min(upto)..upto].to_vec();
                        bytes.splice(at..at, again);
                    }
                    5 => {
                        let word = WORDS[self.below(WORDS.len())];
                        bytes.splice(at..at, word.iter().copied());
                    }
                    _ => {
                        let other = &seeds[self.below(seeds.len())];
                        let from = self.below(other.len() + 1);
                        bytes.truncate(at);
                        bytes.extend_from_slice(&other[from..]);
                    }
                }
                bytes.truncate(4096);
            }
            bytes
        }
    }

    /// Those of `fuzz/corpus`, where they have been written, and ours.
    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        let files = std::fs::read_dir(corpus.join(target)).into_iter().flatten();
        let written = files.filter_map(|file| std::fs::read(file.unwrap().path()).ok());
        written.chain(SEEDS.map(<[u8]>::to_vec)).collect()
    }

    /// So many mutations for each target.
    fn try_mutations(count: usize, seed: u64) {
        for (name, target) in TARGETS {
            let seeds = seeds(name);
            let mut random = Random(seed);
            for _ in 0..count {
                target(&random.mutate(&seeds));
            }
        }
    }

    #[test]
    fn no_target_breaks_its_rules_over_mutations_of_what_it_understands() {
        try_mutations(300, 1);
    }

    /// `HOPGATE_MUTATIONS=10000000 cargo test --release -p hopgate-proxy --lib -- --ignored mutations`
    #[test]
    #[ignore = "as long as one likes"]
    fn no_target_breaks_its_rules_over_any_number_of_mutations() {
        let number = |name, otherwise| {
            let text = std::env::var(name).ok();
            text.map_or(otherwise, |text| text.parse().unwrap())
        };
        let count = number("HOPGATE_MUTATIONS", 100_000);
        try_mutations(usize::try_from(count).unwrap(), number("HOPGATE_SEED", 2));
    }

    proptest! {
        #[test]
        fn no_target_breaks_its_rules_over_arbitrary_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            TARGETS.iter().for_each(|(_, target)| target(&bytes));
        }

        #[test]
        fn no_target_breaks_its_rules_over_what_looks_like_its_food(
            text in "(GET|HEAD|POST) (/|\\*|http://h/)[a-z#?]{0,3} HTTP/1\\.[01]\r\n\
                     ((Host|Connection|Upgrade|Content.Length|Transfer.Encoding|X): {0,2}[0-9a-z,:\\[\\]_+-]{0,8}\r\n){0,5}\r\n",
            answer in "HTTP/1\\.[01] [0-9]{3} ?[a-z]{0,3}\r\n\
                     ((Connection|Upgrade|Content.Length|Transfer.Encoding): [0-9a-z,+-]{0,9}\r\n){0,4}\r\n",
            clients in "[\\x01-\\x07]((for|FOR|by|proto)=\"?(\\[[0-9a-f:]{1,8}\\]|[0-9.]{1,9}|_a|unknown)(:[0-9_]{1,3})?\"?[;, ]{0,2}){0,4}",
            path in "/[a-c/.%;?\\\\2-7ef]{0,12}",
            body in "[0-9a-z]{4}([0-9a-f]{1,2}(;[a-z=]{0,3})?\r\n[a-z]{0,12}\r\n){0,4}(0\r\n([A-Z]: [a-z]?\r\n){0,2}\r\n)?",
        ) {
            request_head(text.as_bytes());
            response_head(answer.as_bytes());
            chunks(body.as_bytes());
            route_path(path.as_bytes());
            forwarded(clients.as_bytes());
        }

        #[test]
        fn whatever_greets_like_a_database_is_understood_or_refused(
            version in proptest::collection::vec(any::<u8>(), 0..20),
            answers in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..20)), 0..6),
        ) {
            let mut bytes = Vec::new();
            for (sequence, (first, rest)) in std::iter::once((10, version)).chain(answers).enumerate() {
                bytes.push(u8::try_from(rest.len() + 1).unwrap());
                bytes.extend([0, 0, u8::try_from(sequence).unwrap(), first]);
                bytes.extend(rest);
            }
            database(&bytes);
        }
    }
}
