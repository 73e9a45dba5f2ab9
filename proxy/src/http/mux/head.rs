//! From a stream's header list to an HTTP/1.1 head, strictly.
//!
//! What RFC 9113 (section 8) and RFC 9114 (section 4) call malformed is refused here, field by field; whatever
//! passes is read once more by the reader of HTTP/1 heads. This file never lets a byte through that could end a
//! line, and never a field that frames or concerns a connection.

use super::websocket::Key;
use crate::http::chunked::NO_TRAILERS;
use crate::http::head::{HeadError, same_field, write_field};

/// Fields of one connection only: no list may have them (RFC 9113, section 8.2.2).
const CONNECTION_FIELDS: [&[u8]; 5] = [
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"transfer-encoding",
    b"upgrade",
];

/// Whether a body follows a header list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyFollows {
    /// The list ended the stream.
    No,
    /// The stream goes on.
    Yes,
}

/// Takes one header list, field by field, and writes one head. Its memory is used again for the next list.
#[derive(Debug, Default)]
pub(crate) struct HeadBuilder {
    method: Vec<u8>,
    scheme: Vec<u8>,
    authority: Vec<u8>,
    path: Vec<u8>,
    protocol: Vec<u8>,
    host: Option<Vec<u8>>,
    /// Cookie crumbs, joined (RFC 9113, section 8.2.3).
    cookie: Vec<u8>,
    /// Everything else, as lines.
    lines: Vec<u8>,
    regular_seen: bool,
    length: Option<LengthSeen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LengthSeen {
    Zero,
    Other,
}

impl HeadBuilder {
    /// Forgets a list, complete or not.
    pub(crate) fn clear(&mut self) {
        self.method.clear();
        self.scheme.clear();
        self.authority.clear();
        self.path.clear();
        self.protocol.clear();
        self.host = None;
        self.cookie.clear();
        self.lines.clear();
        self.regular_seen = false;
        self.length = None;
    }

    /// Takes the next field of the list, a pseudo-header or another.
    ///
    /// # Errors
    /// The list is malformed; the builder must be cleared before it is used again.
    pub(crate) fn field(&mut self, name: &[u8], value: &[u8]) -> Result<(), HeadError> {
        check_value(value)?;
        if let [b':', pseudo @ ..] = name {
            return self.pseudo(pseudo, value);
        }
        self.regular_seen = true;
        check_name(name)?;
        match name {
            b"cookie" => {
                if !self.cookie.is_empty() {
                    self.cookie.extend_from_slice(b"; ");
                }
                self.cookie.extend_from_slice(value);
                return Ok(());
            }
            b"host" => {
                return match self.host.replace(value.to_vec()) {
                    None => Ok(()),
                    Some(_) => Err(HeadError::Host),
                };
            }
            b"te" if value != b"trailers" => return Err(HeadError::ConnectionField),
            // More than one, or none that is a number, is for the reader of the head to refuse.
            b"content-length" => {
                self.length = Some(match value {
                    b"0" => LengthSeen::Zero,
                    _ => LengthSeen::Other,
                });
            }
            _ if CONNECTION_FIELDS.contains(&name) => return Err(HeadError::ConnectionField),
            _ => {}
        }
        write_line(&mut self.lines, name, value);
        Ok(())
    }

    fn pseudo(&mut self, name: &[u8], value: &[u8]) -> Result<(), HeadError> {
        let place = match name {
            b"method" => &mut self.method,
            b"scheme" => &mut self.scheme,
            b"authority" => &mut self.authority,
            b"path" => &mut self.path,
            b"protocol" => &mut self.protocol,
            _ => return Err(HeadError::Pseudo),
        };
        // An empty one is as bad as none; only a second one with an empty first would slip through, and the
        // empty first has been refused.
        if self.regular_seen || !place.is_empty() || value.is_empty() {
            return Err(HeadError::Pseudo);
        }
        place.extend_from_slice(value);
        Ok(())
    }

    /// Appends the head to `out` and clears the builder. The key is there when the head asks for a WebSocket.
    ///
    /// # Errors
    /// The list is malformed as a whole.
    pub(crate) fn finish(
        &mut self,
        body: BodyFollows,
        out: &mut Vec<u8>,
    ) -> Result<Option<Key>, HeadError> {
        let written = self.write(body, out);
        self.clear();
        written
    }

    fn write(&self, body: BodyFollows, out: &mut Vec<u8>) -> Result<Option<Key>, HeadError> {
        let connect = self.method == b"CONNECT";
        if connect && self.protocol.is_empty() {
            return self.write_connect(out).map(|()| None);
        }
        if !connect && !self.protocol.is_empty() {
            return Err(HeadError::Pseudo);
        }
        if connect && !self.protocol.eq_ignore_ascii_case(b"websocket") {
            return Err(HeadError::Protocol);
        }
        let http =
            self.scheme.eq_ignore_ascii_case(b"http") || self.scheme.eq_ignore_ascii_case(b"https");
        if self.method.is_empty() || !http || self.path.is_empty() {
            return Err(HeadError::Pseudo);
        }
        if !self.method.iter().all(|byte| is_token(*byte)) {
            return Err(HeadError::Syntax);
        }
        let whole = self.path[0] == b'/' || (self.path == b"*" && self.method == b"OPTIONS");
        let visible = |byte: &u8| (0x21..0x7f).contains(byte) && *byte != b'#';
        if !whole || !self.path.iter().all(visible) {
            return Err(HeadError::Target);
        }
        out.extend_from_slice(if connect { b"GET" } else { &self.method });
        out.push(b' ');
        out.extend_from_slice(&self.path);
        out.extend_from_slice(b" HTTP/1.1\r\nHost: ");
        out.extend_from_slice(self.host()?);
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.lines);
        if !self.cookie.is_empty() {
            write_line(out, b"cookie", &self.cookie);
        }
        let key = connect.then(Key::random);
        match (&key, body) {
            (Some(key), _) if self.length.is_none() => {
                out.extend_from_slice(b"Connection: Upgrade\r\nUpgrade: websocket\r\n");
                write_field(out, "Sec-WebSocket-Key", key.as_bytes());
            }
            (Some(_), _) => return Err(HeadError::BadLength),
            (None, BodyFollows::No) if self.length == Some(LengthSeen::Other) => {
                return Err(HeadError::BadLength);
            }
            (None, BodyFollows::Yes) if self.length.is_none() => {
                out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
            }
            (None, _) => {}
        }
        out.extend_from_slice(b"\r\n");
        Ok(key)
    }

    /// A CONNECT that names only a place (RFC 9113, section 8.5): what follows is no body, whatever it says.
    fn write_connect(&self, out: &mut Vec<u8>) -> Result<(), HeadError> {
        if !self.scheme.is_empty() || !self.path.is_empty() || self.authority.is_empty() {
            return Err(HeadError::Pseudo);
        }
        if self.length.is_some() {
            return Err(HeadError::ConnectBody);
        }
        let visible = |byte: &u8| (0x21..0x7f).contains(byte);
        if !self.authority.iter().all(visible) {
            return Err(HeadError::Target);
        }
        out.extend_from_slice(b"CONNECT ");
        out.extend_from_slice(&self.authority);
        out.extend_from_slice(b" HTTP/1.1\r\nHost: ");
        out.extend_from_slice(self.host()?);
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.lines);
        if !self.cookie.is_empty() {
            write_line(out, b"cookie", &self.cookie);
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }

    /// The one host of the request: whoever checks one and routes by the other is being fooled.
    fn host(&self) -> Result<&[u8], HeadError> {
        match (&self.host, self.authority.is_empty()) {
            (None, true) => Err(HeadError::Host),
            (Some(host), true) => Ok(host),
            (None, false) => Ok(&self.authority),
            (Some(host), false) if host.eq_ignore_ascii_case(&self.authority) => Ok(host),
            (Some(_), false) => Err(HeadError::Host),
        }
    }
}

/// Writes the head of a request as the `http` crate has it. `protocol` is that of an extended CONNECT.
///
/// # Errors
/// The list is malformed.
pub(crate) fn write_head(
    builder: &mut HeadBuilder,
    parts: &http::request::Parts,
    protocol: Option<&str>,
    body: BodyFollows,
    out: &mut Vec<u8>,
) -> Result<Option<Key>, HeadError> {
    builder.clear();
    builder.field(b":method", parts.method.as_str().as_bytes())?;
    match parts.uri.scheme_str() {
        Some(scheme) => builder.field(b":scheme", scheme.as_bytes())?,
        // A URI of the `http` crate has no scheme without an authority; a list with Host instead of one does (RFC
        // 9113, section 8.3.1), and h2 has refused lists without any.
        None if parts.uri.path().starts_with('/') => builder.field(b":scheme", b"http")?,
        None => {}
    }
    if let Some(authority) = parts.uri.authority() {
        builder.field(b":authority", authority.as_str().as_bytes())?;
    }
    // A CONNECT without a path is read as one with "/" otherwise.
    if let Some(path) = parts.uri.path_and_query() {
        builder.field(b":path", path.as_str().as_bytes())?;
    }
    if let Some(protocol) = protocol {
        builder.field(b":protocol", protocol.as_bytes())?;
    }
    for (name, value) in &parts.headers {
        builder.field(name.as_str().as_bytes(), value.as_bytes())?;
    }
    builder.finish(body, out)
}

/// Appends trailer fields as HTTP/1 lines; the same are forbidden as behind chunks.
///
/// # Errors
/// A field that no trailer may have.
pub(crate) fn write_trailer<'f>(
    fields: impl Iterator<Item = (&'f [u8], &'f [u8])>,
    out: &mut Vec<u8>,
) -> Result<(), HeadError> {
    for (name, value) in fields {
        if name.first() == Some(&b':') {
            return Err(HeadError::Pseudo);
        }
        check_name(name)?;
        check_value(value)?;
        let text = std::str::from_utf8(name).map_err(|_| HeadError::FieldName)?;
        if NO_TRAILERS
            .iter()
            .any(|forbidden| same_field(text, forbidden))
        {
            return Err(HeadError::ConnectionField);
        }
        write_line(out, name, value);
    }
    Ok(())
}

/// Appends fields as HTTP/1 lines.
///
/// # Errors
/// A field that no head may have, or that only an HTTP/1 connection may.
pub(crate) fn write_field_lines<'f>(
    fields: impl Iterator<Item = (&'f [u8], &'f [u8])>,
    out: &mut Vec<u8>,
) -> Result<(), HeadError> {
    for (name, value) in fields {
        check_name(name)?;
        check_characters(value)?;
        if CONNECTION_FIELDS.contains(&name) {
            return Err(HeadError::ConnectionField);
        }
        write_line(out, name, value);
    }
    Ok(())
}

fn check_name(name: &[u8]) -> Result<(), HeadError> {
    let good = |byte: &u8| is_token(*byte) && !byte.is_ascii_uppercase();
    if !name.is_empty() && name.iter().all(good) {
        Ok(())
    } else {
        Err(HeadError::FieldName)
    }
}

fn check_characters(value: &[u8]) -> Result<(), HeadError> {
    let control = |byte: &u8| (*byte < 0x20 && *byte != b'\t') || *byte == 0x7f;
    if value.iter().any(control) {
        return Err(HeadError::Control);
    }
    Ok(())
}

fn check_value(value: &[u8]) -> Result<(), HeadError> {
    check_characters(value)?;
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    if blank(value.first()) || blank(value.last()) {
        return Err(HeadError::Blank);
    }
    Ok(())
}

/// Characters of a token (RFC 9110, section 5.6.2).
const fn is_token(byte: u8) -> bool {
    const MARKS: &[u8] = b"!#$%&'*+-.^_`|~";
    if byte.is_ascii_alphanumeric() {
        return true;
    }
    let mut at = 0;
    while at < MARKS.len() {
        if MARKS[at] == byte {
            return true;
        }
        at += 1;
    }
    false
}

fn write_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Field = (&'static str, &'static str);

    const GET: [Field; 4] = [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", "h"),
        (":path", "/a?b"),
    ];

    fn build(fields: &[Field], body: BodyFollows) -> Result<String, HeadError> {
        let mut builder = HeadBuilder::default();
        let mut out = Vec::new();
        for (name, value) in fields {
            builder.field(name.as_bytes(), value.as_bytes())?;
        }
        builder.finish(body, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn with(more: &[Field]) -> Vec<Field> {
        GET.iter().chain(more).copied().collect()
    }

    #[test]
    fn a_header_list_becomes_a_head() {
        let fields = with(&[
            ("cookie", "a=1"),
            ("accept", "*/*"),
            ("cookie", "b=2"),
            ("te", "trailers"),
        ]);
        assert_eq!(
            build(&fields, BodyFollows::No).unwrap(),
            "GET /a?b HTTP/1.1\r\nHost: h\r\naccept: */*\r\nte: trailers\r\ncookie: a=1; b=2\r\n\r\n"
        );
    }

    #[test]
    fn a_body_without_a_length_comes_in_chunks() {
        let head = build(&GET, BodyFollows::Yes).unwrap();
        assert!(
            head.ends_with("Transfer-Encoding: chunked\r\n\r\n"),
            "{head}"
        );
        let head = build(&with(&[("content-length", "3")]), BodyFollows::Yes).unwrap();
        assert!(head.ends_with("content-length: 3\r\n\r\n"), "{head}");
    }

    #[test]
    fn a_websocket_becomes_an_upgrade_with_a_key() {
        let mut fields = with(&[("sec-websocket-version", "13")]);
        fields[0] = (":method", "CONNECT");
        fields.insert(1, (":protocol", "websocket"));
        let head = build(&fields, BodyFollows::Yes).unwrap();
        assert!(
            head.starts_with("GET /a?b HTTP/1.1\r\nHost: h\r\nsec-websocket-version: 13\r\n"),
            "{head}"
        );
        assert!(
            head.contains("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: "),
            "{head}"
        );
        assert!(!head.contains("chunked"), "{head}");
    }

    #[test]
    fn what_is_malformed_is_refused_by_its_reason() {
        let cases: [(&[Field], HeadError); 19] = [
            (&[("X-Upper", "1")], HeadError::FieldName),
            (&[("", "1")], HeadError::FieldName),
            (&[("a b", "1")], HeadError::FieldName),
            (&[("a:b", "1")], HeadError::FieldName),
            (&[("a", "1\r\nx: 2")], HeadError::Control),
            (&[("a", "1\n2")], HeadError::Control),
            (&[("a", "1\0")], HeadError::Control),
            (&[("a", " 1")], HeadError::Blank),
            (&[("a", "1\t")], HeadError::Blank),
            (&[("connection", "close")], HeadError::ConnectionField),
            (
                &[("transfer-encoding", "chunked")],
                HeadError::ConnectionField,
            ),
            (&[("upgrade", "h2c")], HeadError::ConnectionField),
            (&[("te", "gzip")], HeadError::ConnectionField),
            (&[("a", "1"), (":path", "/")], HeadError::Pseudo),
            (&[(":path", "/")], HeadError::Pseudo),
            (&[(":status", "200")], HeadError::Pseudo),
            (&[(":protocol", "websocket")], HeadError::Pseudo),
            (&[("host", "other")], HeadError::Host),
            (&[("content-length", "5")], HeadError::BadLength),
        ];
        for (more, expected) in cases {
            assert_eq!(
                build(&with(more), BodyFollows::No),
                Err(expected),
                "{more:?}"
            );
        }
    }

    #[test]
    fn each_pseudo_header_must_be_there_and_make_sense() {
        for missing in [0, 1, 3] {
            let mut fields = GET.to_vec();
            fields.remove(missing);
            assert_eq!(
                build(&fields, BodyFollows::No),
                Err(HeadError::Pseudo),
                "{missing}"
            );
        }
        let cases: [(usize, &str, HeadError); 8] = [
            (0, "GE T", HeadError::Syntax),
            (0, "CONNECT", HeadError::Pseudo),
            (1, "ftp", HeadError::Pseudo),
            (2, "", HeadError::Pseudo),
            (3, "", HeadError::Pseudo),
            (3, "*", HeadError::Target),
            (3, "http://h/", HeadError::Target),
            (3, "/a b HTTP/1.1", HeadError::Target),
        ];
        for (place, value, expected) in cases {
            let mut fields = GET.to_vec();
            fields[place].1 = value;
            assert_eq!(build(&fields, BodyFollows::No), Err(expected), "{value}");
        }
    }

    proptest! {
        #[test]
        fn no_list_can_smuggle_a_line(
            name in "[ -~\\r\\n\\x00]{0,12}", value in "[ -~\\r\\n\\x00]{0,20}", path in "[ -~\\r\\n\\x00]{0,12}"
        ) {
            let mut builder = HeadBuilder::default();
            let mut out = Vec::new();
            let fields = [(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", path.as_str()),
                (name.as_str(), value.as_str())];
            let good = fields.iter().all(|(name, value)| builder.field(name.as_bytes(), value.as_bytes()).is_ok());
            if good && builder.finish(BodyFollows::No, &mut out).is_ok() {
                let text = String::from_utf8(out).unwrap();
                // The request line, Host, the one field, and the empty line; a Host is not written twice.
                let lines = if name == "host" { 3 } else { 4 };
                prop_assert_eq!(text.matches("\r\n").count(), lines, "{}", text);
                prop_assert_eq!(text.matches(['\r', '\n']).count(), 2 * lines, "{}", text);
            }
        }
    }
}
