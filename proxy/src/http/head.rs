//! What requests and responses have in common on the wire: where a head ends, and what its lines may look like.
//!
//! The rules are stricter than RFC 9112 allows a recipient to be, because a proxy that is lenient where its
//! upstream is not (or the reverse) is how requests are smuggled.

use std::fmt;

/// Most header fields of one head.
pub(crate) const FIELDS_MAX: usize = 128;

/// What is wrong with a head. The words end up in the answer's body and in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// A line feed without carriage return, or the reverse.
    #[error("a bare CR or LF")]
    BareLineEnd,
    /// A header line that begins with a blank.
    #[error("a folded header line")]
    Folded,
    /// A NUL or another control byte.
    #[error("a control byte")]
    Control,
    /// Not HTTP.
    #[error("a line that is not HTTP")]
    Syntax,
    /// More header fields than we are willing to look at.
    #[error("too many header fields")]
    TooManyFields,
    /// A version other than 1.0 and 1.1.
    #[error("an HTTP version other than 1.0 and 1.1")]
    Version,
    /// Transfer-Encoding and Content-Length together.
    #[error("both Transfer-Encoding and Content-Length")]
    TwoLengths,
    /// Content-Length more than once.
    #[error("more than one Content-Length")]
    RepeatedLength,
    /// Content-Length that is not a plain decimal number.
    #[error("a Content-Length that is not a number")]
    BadLength,
    /// A transfer coding other than exactly `chunked`.
    #[error("a Transfer-Encoding other than chunked")]
    UnknownCoding,
    /// Transfer-Encoding in HTTP/1.0.
    #[error("Transfer-Encoding in HTTP/1.0")]
    CodingInOldVersion,
    /// No Host, or several, or an unusable one.
    #[error("no Host, several, or an unusable one")]
    Host,
    /// A target that is neither a path, nor an http URL of the same host, nor `*`.
    #[error("a request target that is not a path")]
    Target,
    /// HEAD or CONNECT in other letters: some take it for what it is not.
    #[error("a method in the wrong letters")]
    MethodLetters,
    /// A Connection header that names more fields than we keep in mind.
    #[error("a Connection header that names too many fields")]
    TooManyOptions,
    /// Interim answers without end.
    #[error("too many interim answers")]
    TooManyInterim,
    /// CONNECT to a place that no route of the service has in its list.
    #[error("the method CONNECT")]
    Connect,
    /// CONNECT with a body: what follows it belongs to the tunnel, or to the body, as each reader likes.
    #[error("a body and the method CONNECT")]
    ConnectBody,
    /// A stream's pseudo-header that is missing, unknown, repeated, empty or behind other fields.
    #[error("a pseudo-header that is missing, repeated or out of place")]
    Pseudo,
    /// A stream's field whose name is no token in lower case.
    #[error("a field name that is not one in lower case")]
    FieldName,
    /// A stream's field value that begins or ends with a blank.
    #[error("a field value with a blank at an end")]
    Blank,
    /// A stream's field that only an HTTP/1 connection may have.
    #[error("a field that concerns an HTTP/1 connection")]
    ConnectionField,
    /// An extended CONNECT for anything but a WebSocket.
    #[error("a CONNECT for a protocol other than websocket")]
    Protocol,
}

/// How far the search for the end of a head has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The head ends before this offset.
    Complete(usize),
    /// Not yet; a later scan of more bytes may begin here.
    Partial(usize),
}

/// Looks for the empty line and refuses what no head may contain. `from` is zero, or where an earlier scan of the
/// same bytes said it may be taken up, so that a head that arrives byte by byte is looked at once.
pub(crate) fn scan(bytes: &[u8], from: usize) -> Result<Scan, HeadError> {
    let mut at = from;
    while let Some(found) = find_control(&bytes[at..]) {
        at += found;
        match &bytes[at..] {
            [b'\t', ..] => at += 1,
            [b'\r', b'\n', b'\r', b'\n', ..] => return Ok(Scan::Complete(at + 4)),
            [b'\r', b'\n', b' ' | b'\t', ..] => return Err(HeadError::Folded),
            [b'\r'] | [b'\r', b'\n'] | [b'\r', b'\n', b'\r'] => return Ok(Scan::Partial(at)),
            [b'\r', b'\n', ..] => at += 2,
            [b'\r' | b'\n', ..] => return Err(HeadError::BareLineEnd),
            _ => return Err(HeadError::Control),
        }
    }
    Ok(Scan::Partial(bytes.len()))
}

/// The first control byte: below 0x20, or 0x7f. Eight bytes at a time, each in its own lane of a word.
fn find_control(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);
    let (words, rest) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        // A lane that borrows sets its high bit. It may wrongly borrow for the lanes above, never for those below, so
        // the lowest is right (Warren, "Hacker's Delight", 6-1).
        let below = word.wrapping_sub(ONES * 0x20) & !word;
        let delete = word ^ (ONES * 0x7f);
        let found = (below | (delete.wrapping_sub(ONES) & !delete)) & HIGHS;
        if found != 0 {
            return Some(index * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let is_control = |byte: &u8| *byte < 0x20 || *byte == 0x7f;
    let found = rest.iter().position(is_control);
    found.map(|index| words.len() * 8 + index)
}

/// How the end of a message body is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none.
    Empty,
    /// This many bytes, at least one.
    Length(u64),
    /// Chunks.
    Chunked,
    /// Everything until the connection ends; responses only.
    UntilClose,
}

/// Collects the fields that say how long a body is, and refuses what could be read in two ways.
#[derive(Debug, Default)]
pub(crate) struct Lengths {
    length: Option<u64>,
    chunked: bool,
}

impl Lengths {
    pub(crate) fn content_length(&mut self, value: &[u8]) -> Result<(), HeadError> {
        if self.length.is_some() {
            return Err(HeadError::RepeatedLength);
        }
        self.length = Some(decimal(value).ok_or(HeadError::BadLength)?);
        Ok(())
    }

    pub(crate) fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), HeadError> {
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(HeadError::UnknownCoding);
        }
        self.chunked = true;
        Ok(())
    }

    /// The framing, or `None` when neither field was there.
    pub(crate) fn framing(&self, version: Version) -> Result<Option<Framing>, HeadError> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(HeadError::TwoLengths),
            (true, None) if version == Version::Http10 => Err(HeadError::CodingInOldVersion),
            (true, None) => Ok(Some(Framing::Chunked)),
            (false, Some(0)) => Ok(Some(Framing::Empty)),
            (false, Some(length)) => Ok(Some(Framing::Length(length))),
            (false, None) => Ok(None),
        }
    }
}

/// Digits only: no sign, no blank, no list, and no overflow, not even for a reader that counts with a sign.
fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 {
        return None;
    }
    let number = value.iter().try_fold(0_u64, |number, byte| match byte {
        b'0'..=b'9' => Some(number * 10 + u64::from(byte - b'0')),
        _ => None,
    });
    number.filter(|number| *number <= i64::MAX as u64)
}

/// The two versions we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
}

impl Version {
    pub(crate) const fn of(minor: Option<u8>) -> Result<Self, HeadError> {
        match minor {
            Some(0) => Ok(Self::Http10),
            Some(1) => Ok(Self::Http11),
            _ => Err(HeadError::Version),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
        })
    }
}

/// What the Connection header of a message says. The fields it names are not forwarded.
#[derive(Debug, Default)]
pub(crate) struct ConnectionHeader<'h> {
    pub(crate) close: bool,
    pub(crate) keep_alive: bool,
    pub(crate) upgrade: bool,
    named: [&'h [u8]; 8],
    named_count: usize,
}

impl<'h> ConnectionHeader<'h> {
    /// Reads one Connection line; several add up.
    pub(crate) fn read(&mut self, value: &'h [u8]) -> Result<(), HeadError> {
        for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if token.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if token.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if token.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade = true;
            } else if !token.is_empty() {
                let place = self.named.get_mut(self.named_count);
                *place.ok_or(HeadError::TooManyOptions)? = token;
                self.named_count += 1;
            }
        }
        Ok(())
    }

    /// Whether a field was named, and is therefore for this connection only.
    pub(crate) fn names(&self, field: &str) -> bool {
        self.named[..self.named_count]
            .iter()
            .any(|named| named.eq_ignore_ascii_case(field.as_bytes()))
    }

    /// Whether the sender keeps the connection.
    pub(crate) const fn persists(&self, version: Version) -> bool {
        match version {
            Version::Http11 => !self.close,
            Version::Http10 => self.keep_alive && !self.close,
        }
    }
}

/// Whether a name is `ours`, also to a reader that takes underscores for dashes, as CGI does (RFC 3875, section
/// 4.1.18).
pub(crate) fn same_field(name: &str, ours: &str) -> bool {
    let same =
        |(name, ours): (u8, u8)| name.eq_ignore_ascii_case(&ours) || (name, ours) == (b'_', b'-');
    name.len() == ours.len() && name.bytes().zip(ours.bytes()).all(same)
}

/// Turns what httparse says into our words.
pub(crate) const fn syntax(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::TooManyHeaders => HeadError::TooManyFields,
        httparse::Error::Version => HeadError::Version,
        _ => HeadError::Syntax,
    }
}

/// Appends one header line.
pub(crate) fn write_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends a decimal number.
pub(crate) fn write_decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_is_found_however_it_is_cut() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nX: \t b\r\n\r\nbody";
        let end = head.len() - 4;
        let mut from = 0;
        for seen in 0..end {
            match scan(&head[..seen], from).unwrap() {
                Scan::Partial(next) => from = next,
                Scan::Complete(at) => panic!("complete at {at} of {seen}"),
            }
        }
        assert_eq!(scan(head, from), Ok(Scan::Complete(end)));
        assert_eq!(scan(head, 0), Ok(Scan::Complete(end)));
    }

    proptest! {
        #[test]
        fn the_first_control_byte_is_found_wherever_it_is(
            bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0x1e..0x22_u8, 0x7d..0x82_u8], 0..40),
        ) {
            let is_control = |byte: &u8| *byte < 0x20 || *byte == 0x7f;
            prop_assert_eq!(find_control(&bytes), bytes.iter().position(is_control));
        }
    }

    #[test]
    fn what_no_head_may_contain_is_refused_however_it_is_cut() {
        let cases: [(&[u8], HeadError); 6] = [
            (b"GET / HTTP/1.1\nHost: a\r\n\r\n", HeadError::BareLineEnd),
            (
                b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
                HeadError::BareLineEnd,
            ),
            (
                b"GET / HTTP/1.1\r\nHost: a\r\n\rX\r\n\r\n",
                HeadError::BareLineEnd,
            ),
            (
                b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
                HeadError::Folded,
            ),
            (
                b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
                HeadError::Folded,
            ),
            (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", HeadError::Control),
        ];
        for (head, expected) in cases {
            assert_eq!(scan(head, 0), Err(expected), "{head:?}");
            let mut from = 0;
            let found = (1..=head.len()).find_map(|seen| match scan(&head[..seen], from) {
                Ok(Scan::Partial(next)) => {
                    from = next;
                    None
                }
                Ok(Scan::Complete(_)) => panic!("{head:?} passed"),
                Err(error) => Some(error),
            });
            assert_eq!(found, Some(expected), "{head:?}");
        }
    }
}
