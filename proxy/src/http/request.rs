//! A client's request head: read strictly, and written anew for the upstream from what was understood.

use std::mem::MaybeUninit;
use std::rc::Rc;

use super::head::{
    ConnectionHeader, FIELDS_MAX, Framing, HeadError, Lengths, Version, same_field, syntax,
    write_field,
};
use crate::forwarded::{Arrived, LOOP_FIELD, LoopId, OurField, Said, Seen};
use crate::route::action::FieldEdits;
use crate::route::condition::Place;
use crate::route::template::Values;
use crate::service::writes::Intent;

/// What we need to know of a request after its head was written for the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) version: Version,
    pub(crate) method: Method,
    /// Bytes of `METHOD target` at the beginning of the written head.
    pub(crate) line_bytes: usize,
    pub(crate) framing: Framing,
    /// Whether the client keeps its connection after this request.
    pub(crate) persists: bool,
    pub(crate) upgrade: Upgrade,
    pub(crate) expects_continue: bool,
    /// A line that its answer gets: the client's way back to its server.
    pub(crate) set_cookie: Option<String>,
    /// What answers say of HTTP/3 at the same place, in place of what the upstream says of itself.
    pub(crate) alt_svc: Option<Rc<str>>,
}

/// What we need to know of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// Answers have no body.
    Head,
    /// GET and OPTIONS: asking twice is asking once (RFC 9110, section 9.2.1).
    Safe,
    /// CONNECT: what comes behind the head is no HTTP, so the head is for us alone.
    Connect,
    /// TRACE: safe as well, but never sent twice by us.
    Trace,
    /// Everything else.
    Other,
}

impl Method {
    /// Whether it asks for a change (RFC 9110, section 9.2.1). What is said in a tunnel is not known.
    pub(crate) const fn intent(self) -> Intent {
        match self {
            Self::Head | Self::Safe | Self::Trace | Self::Connect => Intent::Read,
            Self::Other => Intent::Write,
        }
    }
}

/// Whether a client asks to leave HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// It does not.
    None,
    /// It does, and the upstream is asked.
    Asked,
}

/// Identifies one request in logs and, as `X-Request-Id`, at the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// Differs between processes and workers.
    pub(crate) origin: u64,
    /// Counts the requests of one worker.
    pub(crate) number: u64,
}

impl RequestId {
    /// Appends what [`Display`](std::fmt::Display) shows, without the formatter's cost.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |number: u64, shift: u32| DIGITS[(number >> shift) as usize & 15];
        out.extend((0..16).rev().map(|place| digit(self.origin, place * 4)));
        out.push(b'-');
        let places = (64 - self.number.leading_zeros()).div_ceil(4).max(1);
        out.extend((0..places).rev().map(|place| digit(self.number, place * 4)));
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:016x}-{:x}", self.origin, self.number)
    }
}

/// Fields that concern one connection only, that we write ourselves, or that CGI would take for its own `HTTP_PROXY`.
fn is_ours(name: &str) -> bool {
    // The length tells most names apart before any is compared.
    let candidates: &[&str] = match name.len() {
        2 => &["te"],
        4 => &["host"],
        5 => &["proxy"],
        6 => &["expect"],
        7 => &["trailer", "upgrade"],
        10 => &["connection", "keep-alive"],
        14 => &["content-length", "http2-settings"],
        16 => &["proxy-connection"],
        17 => &["transfer-encoding"],
        _ => &[],
    };
    candidates.iter().any(|ours| same_field(name, ours)) || OurField::of(name).is_some()
}

/// Room for the fields of one head; on the stack of whoever parses.
pub(crate) type FieldRoom<'h> = [MaybeUninit<httparse::Header<'h>>; FIELDS_MAX];

/// A head that was read strictly, in slices of the bytes it came in.
#[derive(Debug)]
pub(crate) struct Parsed<'f, 'h> {
    pub(crate) method: &'h str,
    /// What is forwarded: a path with its query, or `*`. Of a CONNECT the place it asks for.
    pub(crate) path: &'h str,
    /// From the Host field or the absolute target; they agree.
    pub(crate) host: &'h [u8],
    pub(crate) version: Version,
    pub(crate) framing: Framing,
    pub(crate) fields: &'f [httparse::Header<'h>],
    connection: ConnectionHeader<'h>,
    upgrade: Option<&'h [u8]>,
    expects_continue: bool,
    /// Which of the fields that we write ourselves it came with.
    pub(crate) seen: Seen,
}

/// What the upstream is told that the client did not write.
#[derive(Clone, Copy)]
pub(crate) struct Told<'t> {
    pub(crate) arrived: &'t Arrived<'t>,
    pub(crate) id: RequestId,
    /// In place of path and query.
    pub(crate) target: Option<&'t [u8]>,
    /// A field that is taken off.
    pub(crate) strip: Option<&'t str>,
    /// Fields that are removed and set.
    pub(crate) edits: Option<(&'t FieldEdits, &'t Values<'t>)>,
    /// By what we know it again.
    pub(crate) loop_id: Option<&'t LoopId>,
}

struct Fields<'h> {
    host: Option<&'h [u8]>,
    lengths: Lengths,
    connection: ConnectionHeader<'h>,
    upgrade: Option<&'h [u8]>,
    expects_continue: bool,
    seen: Seen,
}

impl<'t> Told<'t> {
    /// Nothing is changed.
    pub(crate) const fn plain(arrived: &'t Arrived<'t>, id: RequestId) -> Self {
        Self {
            arrived,
            id,
            target: None,
            strip: None,
            edits: None,
            loop_id: None,
        }
    }
}

/// An empty room.
pub(crate) const fn field_room<'h>() -> FieldRoom<'h> {
    [MaybeUninit::uninit(); FIELDS_MAX]
}

/// Reads a complete head, as found by `scan`.
pub(crate) fn parse<'f, 'h>(
    head: &'h [u8],
    room: &'f mut FieldRoom<'h>,
) -> Result<Parsed<'f, 'h>, HeadError> {
    let mut parsed = httparse::Request::new(&mut []);
    let status = httparse::ParserConfig::default()
        .parse_request_with_uninit_headers(&mut parsed, head, room)
        .map_err(syntax)?;
    if status.is_partial() {
        return Err(HeadError::Syntax);
    }
    let version = Version::of(parsed.version)?;
    let method = parsed.method.ok_or(HeadError::Syntax)?;
    let read = Fields::read(parsed.headers)?;
    let path = parsed.path.ok_or(HeadError::Target)?;
    let (path, host) = target(method, path, version, read.host)?;
    let framing = read.lengths.framing(version)?.unwrap_or(Framing::Empty);
    let connects = class(method) == Method::Connect;
    if connects && framing != Framing::Empty {
        return Err(HeadError::ConnectBody);
    }
    // With a body under way the connection cannot change its language.
    let asks = version == Version::Http11
        && framing == Framing::Empty
        && read.connection.upgrade
        && !connects;
    Ok(Parsed {
        method,
        path,
        host,
        version,
        framing,
        fields: parsed.headers,
        upgrade: read.upgrade.filter(|protocol| asks && is_granted(protocol)),
        expects_continue: read.expects_continue
            && version == Version::Http11
            && framing != Framing::Empty,
        connection: read.connection,
        seen: read.seen,
    })
}

impl Parsed<'_, '_> {
    /// Appends the upstream's version of the head.
    pub(crate) fn write(&self, told: Told<'_>, out: &mut Vec<u8>) -> Request {
        out.extend_from_slice(self.method.as_bytes());
        out.push(b' ');
        out.extend_from_slice(told.target.unwrap_or(self.path.as_bytes()));
        let request = Request {
            version: self.version,
            method: class(self.method),
            line_bytes: out.len(),
            framing: self.framing,
            // Behind a CONNECT come the tunnel's bytes, granted or not.
            persists: self.connection.persists(self.version)
                && class(self.method) != Method::Connect,
            upgrade: self.upgrade.map_or(Upgrade::None, |_| Upgrade::Asked),
            expects_continue: self.expects_continue,
            set_cookie: None,
            alt_svc: None,
        };
        out.extend_from_slice(b" HTTP/1.1\r\n");
        let edits = told.edits.map(|(edits, _)| edits);
        if !edits.is_some_and(|edits| edits.sets("host")) {
            write_field(out, "Host", self.host);
        }
        for field in self.fields {
            let goes = is_ours(field.name)
                || (self.connection.names(field.name) && !same_field(field.name, LOOP_FIELD))
                || told.strip.is_some_and(|name| same_field(field.name, name))
                || edits.is_some_and(|edits| edits.drops(field.name));
            if !goes {
                write_field(out, field.name, field.value);
            }
        }
        if let Some((edits, values)) = told.edits {
            edits.write(values, out);
        }
        if let Some(id) = told.loop_id {
            id.write(out);
        }
        self.write_ours(out, &request);
        told.arrived.write(self.said(), told.id, out);
        out.extend_from_slice(b"\r\n");
        request
    }

    fn write_ours(&self, out: &mut Vec<u8>, request: &Request) {
        match request.framing {
            Framing::Length(length) => {
                out.extend_from_slice(b"Content-Length: ");
                super::head::write_decimal(out, length);
                out.extend_from_slice(b"\r\n");
            }
            Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
            // A POST with nothing in it still has to say so.
            Framing::Empty if request.method == Method::Other => {
                out.extend_from_slice(b"Content-Length: 0\r\n")
            }
            Framing::Empty | Framing::UntilClose => {}
        }
        if request.expects_continue {
            out.extend_from_slice(b"Expect: 100-continue\r\n");
        }
        if let Some(protocol) = self.upgrade {
            out.extend_from_slice(b"Connection: upgrade\r\n");
            write_field(out, "Upgrade", protocol);
        }
    }

    /// What the request says of itself, for whoever decides by it.
    pub(crate) fn said(&self) -> Said<'_> {
        Said {
            fields: &self.fields,
            seen: self.seen,
            host: self.host,
        }
    }
}

impl<'h> Fields<'h> {
    fn read(fields: &[httparse::Header<'h>]) -> Result<Self, HeadError> {
        let mut read = Self {
            host: None,
            lengths: Lengths::default(),
            connection: ConnectionHeader::default(),
            upgrade: None,
            expects_continue: false,
            seen: Seen::default(),
        };
        for field in fields {
            // The length tells most names apart before any is compared.
            match field.name.len() {
                4 if field.name.eq_ignore_ascii_case("host") => {
                    let earlier = read.host.replace(field.value);
                    earlier.map_or(Ok(()), |_| Err(HeadError::Host))?;
                }
                6 if field.name.eq_ignore_ascii_case("expect") => {
                    read.expects_continue = field.value.eq_ignore_ascii_case(b"100-continue");
                }
                7 if field.name.eq_ignore_ascii_case("upgrade") => read.upgrade = Some(field.value),
                10 if field.name.eq_ignore_ascii_case("connection") => {
                    read.connection.read(field.value)?;
                }
                14 if field.name.eq_ignore_ascii_case("content-length") => {
                    read.lengths.content_length(field.value)?;
                }
                17 if field.name.eq_ignore_ascii_case("transfer-encoding") => {
                    read.lengths.transfer_encoding(field.value)?;
                }
                _ => {
                    if let Some(field) = OurField::of(field.name) {
                        read.seen.insert(field);
                    }
                }
            }
        }
        Ok(read)
    }
}

/// What we need to know of a method.
pub(crate) fn class(method: &str) -> Method {
    match method {
        "HEAD" => Method::Head,
        "GET" | "OPTIONS" => Method::Safe,
        "CONNECT" => Method::Connect,
        "TRACE" => Method::Trace,
        _ => Method::Other,
    }
}

/// Whoever takes `head` for HEAD answers without the body that its length announces.
fn is_misspelt(method: &str) -> bool {
    ["HEAD", "CONNECT"]
        .iter()
        .any(|known| method != *known && method.eq_ignore_ascii_case(known))
}

/// HTTP/2 in clear by upgrade would hide every later request from the gate.
fn is_granted(protocol: &[u8]) -> bool {
    !protocol.is_empty()
        && !protocol
            .to_ascii_lowercase()
            .windows(3)
            .any(|window| window == b"h2c")
}

/// The path to forward and the host it belongs to.
fn target<'h>(
    method: &str,
    target: &'h str,
    version: Version,
    host: Option<&'h [u8]>,
) -> Result<(&'h str, &'h [u8]), HeadError> {
    if method == "CONNECT" {
        return place(target, version, host);
    }
    if is_misspelt(method) {
        return Err(HeadError::MethodLetters);
    }
    if host.is_some_and(|host| !is_host(host)) || (host.is_none() && version == Version::Http11) {
        return Err(HeadError::Host);
    }
    // A fragment never travels; whoever cuts it off asks for something else than whoever does not.
    if target.contains('#') {
        return Err(HeadError::Target);
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((target, host.unwrap_or_default()));
    }
    let scheme = target
        .get(..7)
        .filter(|scheme| scheme.eq_ignore_ascii_case("http://"));
    let rest = scheme
        .and_then(|_| target.get(7..))
        .ok_or(HeadError::Target)?;
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    // The two must agree: whoever checks one and routes by the other is being fooled.
    let agrees = host.is_none_or(|host| host.eq_ignore_ascii_case(authority.as_bytes()));
    if authority.is_empty() || !is_host(authority.as_bytes()) || !agrees {
        return Err(HeadError::Host);
    }
    match path {
        "" => Ok(("/", authority.as_bytes())),
        path if path.starts_with('/') => Ok((path, authority.as_bytes())),
        _ => Err(HeadError::Target),
    }
}

/// The place a CONNECT asks for, twice: a host and a port (RFC 9110, section 9.3.6).
fn place<'h>(
    target: &'h str,
    version: Version,
    host: Option<&'h [u8]>,
) -> Result<(&'h str, &'h [u8]), HeadError> {
    let place = target.as_bytes();
    if !is_host(place) || Place::parse(target).is_none() {
        return Err(HeadError::Target);
    }
    match host {
        None if version == Version::Http11 => Err(HeadError::Host),
        // As for any other target, the two must agree.
        Some(host) if !host.eq_ignore_ascii_case(place) => Err(HeadError::Host),
        _ => Ok((target, place)),
    }
}

/// A name or an IP literal in brackets, and perhaps a port (RFC 3986, section 3.2.2); no user information.
fn is_host(host: &[u8]) -> bool {
    let name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    let literal = |byte: &u8| name(byte) || *byte == b':';
    let port = |rest: &[u8]| match rest {
        [] => true,
        [b':', digits @ ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    match host {
        [b'[', rest @ ..] => match rest.iter().position(|byte| *byte == b']') {
            Some(end) => rest[..end].iter().all(literal) && port(&rest[end + 1..]),
            None => false,
        },
        _ => {
            let end = host.iter().position(|byte| *byte == b':');
            let (host, rest) = host.split_at(end.unwrap_or(host.len()));
            host.iter().all(name) && port(rest)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::forwarded::Tracing;

    fn read(head: &str) -> Result<(Request, String), HeadError> {
        let mut out = Vec::new();
        let arrived = Arrived {
            peer: "192.0.2.7".parse().unwrap(),
            peer_text: b"192.0.2.7",
            scheme: b"http",
            trusted: false,
            tracing: Tracing::Off,
        };
        let id = RequestId {
            origin: 1,
            number: 2,
        };
        let told = Told::plain(&arrived, id);
        let request = parse(head.as_bytes(), &mut field_room())?.write(told, &mut out);
        Ok((request, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn a_request_is_written_anew_without_what_concerns_the_connection() {
        let (request, head) = read(
            "GET /a?b HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, X-Gone\r\nX-Gone: 1\r\nKeep-Alive: 3\r\n\
             Accept: */*\r\nX-Forwarded-For: 10.0.0.1\r\nTE: trailers\r\n\r\n",
        )
        .unwrap();
        assert_eq!(
            head,
            "GET /a?b HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nX-Forwarded-For: 192.0.2.7\r\n\
             X-Forwarded-Proto: http\r\nX-Request-Id: 0000000000000001-2\r\n\r\n"
        );
        assert_eq!(&head[..request.line_bytes], "GET /a?b");
        assert!(request.persists);
    }

    #[test]
    fn a_connection_header_cannot_remove_what_frames_or_routes() {
        let (_, head) =
            read("POST / HTTP/1.1\r\nHost: h\r\nConnection: host, content-length\r\nContent-Length: 3\r\n\r\n").unwrap();
        assert!(
            head.contains("Host: h\r\n") && head.contains("Content-Length: 3\r\n"),
            "{head}"
        );
    }

    #[test]
    fn an_absolute_target_must_agree_with_the_host() {
        let (_, head) = read("GET http://h/x HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        assert!(head.starts_with("GET /x HTTP/1.1\r\nHost: h\r\n"), "{head}");
        assert_eq!(
            read("GET http://other/x HTTP/1.1\r\nHost: h\r\n\r\n"),
            Err(HeadError::Host)
        );
        assert_eq!(
            read("GET http://h@x/x HTTP/1.1\r\nHost: h@x\r\n\r\n"),
            Err(HeadError::Host)
        );
    }

    #[test]
    fn an_upgrade_to_clear_http2_is_not_passed_on() {
        let (request, head) =
            read("GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
                .unwrap();
        assert_eq!(request.upgrade, Upgrade::None);
        assert!(!head.to_ascii_lowercase().contains("upgrade"), "{head}");
    }

    proptest! {
        #[test]
        fn an_id_is_written_as_it_is_shown(origin: u64, number: u64, small in 0_u64..300) {
            for number in [number, small] {
                let id = RequestId { origin, number };
                let mut out = Vec::new();
                id.write(&mut out);
                prop_assert_eq!(String::from_utf8(out).unwrap(), id.to_string());
            }
        }

        #[test]
        fn no_head_makes_the_reader_panic(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&head, &mut field_room());
        }

        #[test]
        fn what_passes_is_read_the_same_way_again(
            name in "[A-Za-z-]{1,12}", value in "[ -~]{0,20}", length in 0_u64..9, path in "/[!-~]{0,10}"
        ) {
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: h\r\n{name}: {value}\r\nContent-Length: {length}\r\n\r\n");
            if let Ok((first, once)) = read(&head) {
                let (second, _) = read(&once).unwrap();
                prop_assert_eq!(first.framing, second.framing);
                prop_assert_eq!(first.line_bytes, second.line_bytes);
            }
        }
    }
}
