//! From an HTTP/1.1 head of an answer, as we wrote it, to a stream's header list.
//!
//! The text was made by this proxy from what it understood, so it is only taken apart here and not judged again.

use super::websocket::Key;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

/// An answer's head as HTTP/1.1 text of our own making.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerHead<'h> {
    /// The status.
    pub(crate) status: u16,
    /// All of it, as an HTTP/1 client gets it.
    pub(crate) text: &'h [u8],
    lines: &'h [u8],
}

impl<'h> AnswerHead<'h> {
    /// Takes apart a head that we have written: status line, fields, empty line. `status` overrides the line's.
    pub(crate) fn new(status: u16, text: &'h [u8]) -> Self {
        let first = memchr::memchr(b'\n', text).map_or(text.len(), |end| end + 1);
        let lines = &text[first..];
        Self {
            status,
            text,
            lines: lines.strip_suffix(b"\r\n").unwrap_or(lines),
        }
    }

    /// The same fields under another status.
    pub(crate) const fn with_status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    /// Names (in whatever case) and values, without those that concern an HTTP/1 connection.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (&'h [u8], &'h [u8])> {
        fields(self.lines).filter(|(name, _)| !is_of_connection(name))
    }

    /// Whether an HTTP/1 client gets its body in chunks.
    pub(crate) fn is_chunked(&self) -> bool {
        fields(self.lines).any(|(name, _)| name.eq_ignore_ascii_case(b"transfer-encoding"))
    }

    /// Whether it answers this WebSocket key.
    pub(super) fn accepts(&self, key: &Key) -> bool {
        let mut answers = fields(self.lines)
            .filter(|(name, _)| name.eq_ignore_ascii_case(b"sec-websocket-accept"));
        let first = answers.next();
        first.is_some_and(|(_, accept)| key.is_accepted_by(accept)) && answers.next().is_none()
    }

    /// The head as the `http` crate has it. What that crate cannot express is left out.
    pub(crate) fn to_response(self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        *response.headers_mut() = to_map(self.fields());
        response
    }
}

/// A trailer, as HTTP/1 lines, as the `http` crate has it.
pub(crate) fn to_trailer(lines: &[u8]) -> HeaderMap {
    to_map(fields(lines))
}

/// Takes HTTP/1 field lines of our own making apart.
pub(crate) fn fields(lines: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = lines;
    std::iter::from_fn(move || {
        let end = memchr::memchr(b'\n', rest)?;
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let colon = memchr::memchr(b':', line)?;
        Some((&line[..colon], line[colon + 1..].trim_ascii()))
    })
}

fn to_map<'f>(fields: impl Iterator<Item = (&'f [u8], &'f [u8])>) -> HeaderMap {
    // Room for eight without a second allocation; more would be too large for the allocator's fast path.
    let mut map = HeaderMap::with_capacity(6);
    for (name, value) in fields {
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            map.append(name, value);
        }
    }
    map
}

fn is_of_connection(name: &[u8]) -> bool {
    const OURS: [&[u8]; 6] = [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        // Answers a key that the stream never had.
        b"sec-websocket-accept",
        b"transfer-encoding",
        b"upgrade",
    ];
    OURS.iter()
        .any(|ours| ours.len() == name.len() && ours.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_taken_apart_without_what_concerns_the_connection() {
        let text = b"HTTP/1.1 200 OK\r\nServer: x\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a\r\nset-cookie: b\r\n\
            X-Empty: \r\nConnection: close\r\n\r\n";
        let head = AnswerHead::new(200, text);
        let fields: Vec<_> = head.fields().collect();
        let expected: [(&[u8], &[u8]); 4] = [
            (b"Server", b"x"),
            (b"Set-Cookie", b"a"),
            (b"set-cookie", b"b"),
            (b"X-Empty", b""),
        ];
        assert_eq!(fields, expected);
        let response = head.to_response();
        assert_eq!(response.headers().get_all("set-cookie").iter().count(), 2);
    }

    #[test]
    fn a_head_without_fields_has_none() {
        let head = AnswerHead::new(204, b"HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(head.fields().count(), 0);
    }
}
