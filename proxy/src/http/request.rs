//! A client's request head: read strictly, and written anew for the upstream from what was understood.

use std::io::Write;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use super::head::{
    ConnectionHeader, FIELDS_MAX, Framing, HeadError, Lengths, Version, syntax, write_field,
};

/// What we need to know of a request after its head was written for the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
}

/// What we need to know of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// Answers have no body.
    Head,
    /// GET and OPTIONS: asking twice is asking once (RFC 9110, section 9.2.1).
    Safe,
    /// Everything else.
    Other,
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
pub(crate) struct RequestId {
    /// Differs between processes and workers.
    pub(crate) origin: u64,
    /// Counts the requests of one worker.
    pub(crate) number: u64,
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:016x}-{:x}", self.origin, self.number)
    }
}

/// Fields that concern one connection only, or that we write ourselves.
fn is_ours(name: &str) -> bool {
    const OURS: [&str; 13] = [
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-request-id",
    ];
    OURS.iter().any(|ours| ours.eq_ignore_ascii_case(name))
}

struct Fields<'h> {
    host: Option<&'h [u8]>,
    lengths: Lengths,
    connection: ConnectionHeader<'h>,
    upgrade: Option<&'h [u8]>,
    expects_continue: bool,
    request_id: bool,
}

/// Reads a complete head (as found by `scan`) and appends the upstream's version of it to `out`.
pub(crate) fn rewrite(
    head: &[u8],
    client: SocketAddr,
    id: RequestId,
    out: &mut Vec<u8>,
) -> Result<Request, HeadError> {
    let mut fields = [MaybeUninit::<httparse::Header<'_>>::uninit(); FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    let status = httparse::ParserConfig::default()
        .parse_request_with_uninit_headers(&mut parsed, head, &mut fields)
        .map_err(syntax)?;
    if status.is_partial() {
        return Err(HeadError::Syntax);
    }
    let version = Version::of(parsed.version)?;
    let method = parsed.method.ok_or(HeadError::Syntax)?;
    let read = Fields::read(parsed.headers)?;
    let (path, host) = target(
        method,
        parsed.path.ok_or(HeadError::Target)?,
        version,
        read.host,
    )?;
    let framing = read.lengths.framing(version)?.unwrap_or(Framing::Empty);
    let upgrade = match read.upgrade {
        Some(protocol)
            if version == Version::Http11 && read.connection.upgrade && is_granted(protocol) =>
        {
            Some(protocol)
        }
        _ => None,
    };

    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    out.extend_from_slice(path.as_bytes());
    let request = Request {
        version,
        method: class(method),
        line_bytes: out.len(),
        framing,
        persists: read.connection.persists(version),
        upgrade: upgrade.map_or(Upgrade::None, |_| Upgrade::Asked),
        expects_continue: read.expects_continue
            && version == Version::Http11
            && framing != Framing::Empty,
    };
    out.extend_from_slice(b" HTTP/1.1\r\n");
    write_field(out, "Host", host);
    for field in parsed.headers.iter() {
        if !is_ours(field.name) && !read.connection.names(field.name) {
            write_field(out, field.name, field.value);
        }
    }
    write_ours(out, parsed.headers, &read, &request, upgrade, client, id);
    Ok(request)
}

fn write_ours(
    out: &mut Vec<u8>,
    fields: &[httparse::Header<'_>],
    read: &Fields<'_>,
    request: &Request,
    upgrade: Option<&[u8]>,
    client: SocketAddr,
    id: RequestId,
) {
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
    if let Some(protocol) = upgrade {
        out.extend_from_slice(b"Connection: upgrade\r\n");
        write_field(out, "Upgrade", protocol);
    }
    out.extend_from_slice(b"X-Forwarded-For: ");
    for field in named(fields, "x-forwarded-for") {
        out.extend_from_slice(field);
        out.extend_from_slice(b", ");
    }
    let address = match client.ip() {
        IpAddr::V6(address) => address.to_canonical(),
        address => address,
    };
    // Writing to a vector cannot fail.
    drop(write!(out, "{address}\r\nX-Forwarded-Proto: http\r\n"));
    if read.request_id {
        named(fields, "x-request-id").for_each(|value| write_field(out, "X-Request-Id", value));
    } else {
        drop(write!(out, "X-Request-Id: {id}\r\n"));
    }
    out.extend_from_slice(b"\r\n");
}

fn named<'f>(fields: &'f [httparse::Header<'_>], name: &'f str) -> impl Iterator<Item = &'f [u8]> {
    fields
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .map(|field| field.value)
}

impl<'h> Fields<'h> {
    fn read(fields: &[httparse::Header<'h>]) -> Result<Self, HeadError> {
        let mut read = Self {
            host: None,
            lengths: Lengths::default(),
            connection: ConnectionHeader::default(),
            upgrade: None,
            expects_continue: false,
            request_id: false,
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
                    read.connection.read(field.value)
                }
                12 if field.name.eq_ignore_ascii_case("x-request-id") => read.request_id = true,
                14 if field.name.eq_ignore_ascii_case("content-length") => {
                    read.lengths.content_length(field.value)?;
                }
                17 if field.name.eq_ignore_ascii_case("transfer-encoding") => {
                    read.lengths.transfer_encoding(field.value)?;
                }
                _ => {}
            }
        }
        Ok(read)
    }
}

fn class(method: &str) -> Method {
    match method {
        "HEAD" => Method::Head,
        "GET" | "OPTIONS" => Method::Safe,
        _ => Method::Other,
    }
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
        return Err(HeadError::Connect);
    }
    if host.is_some_and(|host| !is_host(host)) || (host.is_none() && version == Version::Http11) {
        return Err(HeadError::Host);
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

/// Characters of a host and port, also of an IPv6 literal (RFC 3986, section 3.2.2); no user information.
fn is_host(host: &[u8]) -> bool {
    host.iter()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+,;=".contains(byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(head: &str) -> Result<(Request, String), HeadError> {
        let mut out = Vec::new();
        let id = RequestId {
            origin: 1,
            number: 2,
        };
        let request = rewrite(
            head.as_bytes(),
            "192.0.2.7:1234".parse().unwrap(),
            id,
            &mut out,
        )?;
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
            "GET /a?b HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nX-Forwarded-For: 10.0.0.1, 192.0.2.7\r\n\
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
        fn no_head_makes_the_reader_panic(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let id = RequestId { origin: 1, number: 2 };
            let _ = rewrite(&head, "192.0.2.7:1".parse().unwrap(), id, &mut Vec::new());
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
