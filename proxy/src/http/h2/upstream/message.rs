//! Heads between HTTP/1 text, which everything else here speaks, and HTTP/2 header lists to and from upstreams.

use h2::ext::Protocol;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

use crate::http::head::{HeadError, write_decimal};
use crate::http::mux::answer::fields;
use crate::http::mux::head::write_field_lines;

/// What an HTTP/1.0 request without a Host is sent to.
const NO_HOST: &str = "localhost";

/// What of a request's head a tunnel is asked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asks {
    /// Nothing: an ordinary request.
    Answer,
    /// A WebSocket, by extended CONNECT.
    WebSocket,
}

/// What is known of an answer's body beside its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// The fields say it, or there is none by the rules of HTTP.
    Told,
    /// It ended with its head.
    Zero,
    /// It comes, and nobody knows how much.
    Unknown,
}

/// Makes the request of a head that we wrote for the upstream.
pub(super) fn request(
    head: &[u8],
    scheme: &'static str,
    asks: Asks,
) -> Result<Request<()>, HeadError> {
    let (line, lines) =
        head.split_at(memchr::memchr(b'\n', head).map_or(head.len(), |end| end + 1));
    let mut words = line.split(|byte| *byte == b' ');
    let method = words.next().ok_or(HeadError::Syntax)?;
    let path = words.next().ok_or(HeadError::Target)?;
    let mut host: &[u8] = b"";
    let mut map = HeaderMap::with_capacity(16);
    for (name, value) in fields(lines) {
        if name.eq_ignore_ascii_case(b"host") {
            host = value;
        } else if !stays_here(name, asks) {
            let name = HeaderName::from_bytes(name).map_err(|_| HeadError::FieldName)?;
            let value = HeaderValue::from_bytes(value).map_err(|_| HeadError::Control)?;
            map.append(name, value);
        }
    }
    if asks == Asks::Answer {
        map.insert("te", HeaderValue::from_static("trailers"));
    }
    let host = if host.is_empty() {
        NO_HOST.as_bytes()
    } else {
        host
    };
    let uri = Uri::builder()
        .scheme(scheme)
        .authority(host)
        .path_and_query(path)
        .build()
        .map_err(|_| HeadError::Target)?;
    let mut request = Request::new(());
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    *request.headers_mut() = map;
    *request.method_mut() = match asks {
        Asks::Answer => Method::from_bytes(method).map_err(|_| HeadError::Syntax)?,
        Asks::WebSocket => {
            let websocket = Protocol::from_static("websocket");
            request.extensions_mut().insert(websocket);
            Method::CONNECT
        }
    };
    Ok(request)
}

/// Whether the head asks to leave HTTP for this protocol.
pub(super) fn asks_for(head: &[u8], protocol: &[u8]) -> bool {
    value(head, b"upgrade").is_some_and(|asked| asked.eq_ignore_ascii_case(protocol))
}

/// The first field of that name in a head.
pub(super) fn value<'h>(head: &'h [u8], name: &[u8]) -> Option<&'h [u8]> {
    let lines = &head[memchr::memchr(b'\n', head).map_or(head.len(), |end| end + 1)..];
    fields(lines)
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
}

/// Appends an answer as HTTP/1.1 text, to be read as strictly as any.
pub(super) fn write_answer(
    status: u16,
    map: &HeaderMap,
    size: Size,
    out: &mut Vec<u8>,
) -> Result<(), HeadError> {
    out.extend_from_slice(b"HTTP/1.1 ");
    write_decimal(out, u64::from(status));
    out.extend_from_slice(b" \r\n");
    let lines = map
        .iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    write_field_lines(lines, out)?;
    match size {
        Size::Told => {}
        Size::Zero => out.extend_from_slice(b"Content-Length: 0\r\n"),
        Size::Unknown => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

fn stays_here(name: &[u8], asks: Asks) -> bool {
    const CONNECTION: [&[u8]; 6] = [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    ];
    const HANDSHAKE: [&[u8]; 2] = [b"sec-websocket-key", b"content-length"];
    let is = |ours: &&[u8]| ours.eq_ignore_ascii_case(name);
    CONNECTION.iter().any(is) || (asks == Asks::WebSocket && HANDSHAKE.iter().any(is))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_becomes_a_header_list() {
        let head = b"POST /a?b HTTP/1.1\r\nHost: h:1\r\nX: y\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
        let request = request(head, "http", Asks::Answer).unwrap();
        assert_eq!(request.uri().to_string(), "http://h:1/a?b");
        assert_eq!(request.method(), Method::POST);
        let names: Vec<&str> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x", "te"]);
    }

    #[test]
    fn an_upgrade_becomes_an_extended_connect() {
        let head = b"GET /chat HTTP/1.1\r\nHost: h\r\nSec-WebSocket-Key: k\r\nSec-WebSocket-Version: 13\r\n\
            Connection: upgrade\r\nUpgrade: WebSocket\r\n\r\n";
        assert!(asks_for(head, b"websocket"));
        assert_eq!(value(head, b"sec-websocket-key"), Some(&b"k"[..]));
        let request = request(head, "https", Asks::WebSocket).unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().to_string(), "https://h/chat");
        let names: Vec<&str> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["sec-websocket-version"]);
    }
}
