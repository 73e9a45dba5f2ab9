//! The strict reader of this corpus: HTTP/1 as RFC 9112 writes it and not one byte more lenient. What it accepts,
//! every reader reads alike; what it does not accept must never come out of the proxy.
//!
//! It shares nothing with the proxy's own readers: a mistake made twice would prove itself right.

use std::fmt::Write as _;

/// Which kind of message is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    /// An answer to HEAD has no body, whatever its fields say.
    Answer {
        to_head: bool,
    },
}

/// One message, or its beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) line: String,
    pub(crate) fields: Vec<(String, String)>,
    body: Vec<u8>,
    trailers: Vec<String>,
    /// The head was there to its end.
    pub(crate) has_head: bool,
    /// The body was, too.
    pub(crate) is_whole: bool,
    /// Bytes it took.
    pub(crate) used: usize,
}

/// Fields the proxy adds to every request; the rows do not repeat them.
const ADDED: [&str; 5] = [
    "forwarded",
    "traceparent",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-request-id",
];

impl Read {
    pub(crate) fn status(&self) -> u16 {
        self.line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0)
    }

    pub(crate) fn is_final(&self) -> bool {
        self.status() >= 200
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let mut values = self
            .fields
            .iter()
            .filter(|(known, _)| known.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value.as_str())
    }

    /// As the rows write it: the head's lines without the fields every request gets, then the body.
    pub(crate) fn text(&self) -> String {
        let mut text = self.line.clone();
        for (name, value) in &self.fields {
            if !ADDED.iter().any(|added| added.eq_ignore_ascii_case(name)) {
                write!(text, "\n{}", format!("{name}: {value}").trim_end()).unwrap();
            }
        }
        if !self.body.is_empty() {
            write!(text, "\n\n{}", self.body.escape_ascii()).unwrap();
        }
        for trailer in &self.trailers {
            write!(text, "\ntrailer {trailer}").unwrap();
        }
        text
    }
}

/// Reads the first message in `bytes`; `ended` says that no more will come. What is wrong with it is the error.
pub(crate) fn read(bytes: &[u8], kind: Kind, ended: bool) -> Result<Read, String> {
    let mut read = Read::default();
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        check_bytes(bytes)?;
        read.line = bytes.escape_ascii().to_string();
        return Ok(read);
    };
    let head = &bytes[..end];
    check_bytes(head)?;
    let head = String::from_utf8(head.to_vec()).map_err(|_| "a head that is not text")?;
    let mut lines = head.split("\r\n");
    read.line = lines.next().unwrap_or_default().to_owned();
    check_line(&read.line, kind)?;
    for line in lines {
        read.fields.push(field(line)?);
    }
    read.has_head = true;
    read.used = end + 4;
    let framing = framing(&read, kind)?;
    body(&mut read, &bytes[end + 4..], framing, ended)?;
    Ok(read)
}

/// No control byte but tab, and no line end but CR LF.
fn check_bytes(head: &[u8]) -> Result<(), String> {
    for (at, byte) in head.iter().enumerate() {
        let fine = match byte {
            b'\n' => at > 0 && head[at - 1] == b'\r',
            b'\r' => head.get(at + 1).is_none_or(|next| *next == b'\n'),
            b'\t' => true,
            byte => !byte.is_ascii_control(),
        };
        if !fine {
            return Err(format!("byte {byte:#04x} in a head"));
        }
    }
    Ok(())
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

fn check_line(line: &str, kind: Kind) -> Result<(), String> {
    let mut words = line.splitn(3, ' ');
    let mut word = || words.next().unwrap_or_default();
    let fine = match kind {
        Kind::Request => {
            let (method, target, version) = (word(), word(), word());
            let visible = target.bytes().all(|byte| byte > b' ' && byte != b'#');
            is_token(method)
                && visible
                && (target.starts_with('/') || target == "*")
                && version == "HTTP/1.1"
        }
        Kind::Answer { .. } => {
            let (version, status) = (word(), word());
            version == "HTTP/1.1"
                && status.len() == 3
                && status.bytes().all(|byte| byte.is_ascii_digit())
        }
    };
    if fine {
        Ok(())
    } else {
        Err(format!("the line {line:?}"))
    }
}

fn field(line: &str) -> Result<(String, String), String> {
    let (name, value) = line
        .split_once(':')
        .ok_or(format!("no colon in {line:?}"))?;
    if !is_token(name) {
        return Err(format!("the field name {name:?}"));
    }
    Ok((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()))
}

enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

fn framing(read: &Read, kind: Kind) -> Result<Framing, String> {
    let all = |name: &str| {
        let named = read
            .fields
            .iter()
            .filter(|(known, _)| known.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect::<Vec<_>>()
    };
    let (lengths, codings) = (all("content-length"), all("transfer-encoding"));
    if kind == Kind::Request && all("host").len() != 1 {
        return Err("not one Host".to_owned());
    }
    let declared = match (&lengths[..], &codings[..]) {
        ([], []) => None,
        ([], ["chunked"]) => Some(Framing::Chunked),
        ([length], [])
            if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            Some(Framing::Length(
                length.parse().map_err(|_| format!("the length {length}"))?,
            ))
        }
        other => return Err(format!("lengths and codings {other:?}")),
    };
    let status = read.status();
    Ok(match kind {
        Kind::Request => declared.unwrap_or(Framing::Length(0)),
        Kind::Answer { to_head } if to_head || status < 200 || status == 204 || status == 304 => {
            Framing::Length(0)
        }
        Kind::Answer { .. } => declared.unwrap_or(Framing::UntilClose),
    })
}

fn body(read: &mut Read, rest: &[u8], framing: Framing, ended: bool) -> Result<(), String> {
    match framing {
        Framing::Length(length) => {
            read.is_whole = rest.len() >= length;
            read.body = rest[..length.min(rest.len())].to_vec();
            read.used += read.body.len();
        }
        Framing::UntilClose => {
            read.is_whole = ended;
            read.body = rest.to_vec();
            read.used += rest.len();
        }
        Framing::Chunked => chunks(read, rest)?,
    }
    Ok(())
}

fn chunks(read: &mut Read, rest: &[u8]) -> Result<(), String> {
    let mut at = 0;
    loop {
        let Some(end) = line_end(&rest[at..]) else {
            return Ok(());
        };
        let digits = &rest[at..at + end];
        let plain =
            !digits.is_empty() && digits.len() < 16 && digits.iter().all(u8::is_ascii_hexdigit);
        let size = std::str::from_utf8(digits)
            .ok()
            .filter(|_| plain)
            .and_then(|digits| usize::from_str_radix(digits, 16).ok());
        let size = size.ok_or(format!("the chunk size {}", digits.escape_ascii()))?;
        at += end + 2;
        if size == 0 {
            break;
        }
        let there = size.min(rest.len() - at);
        read.body.extend_from_slice(&rest[at..at + there]);
        at += there;
        match &rest[at..] {
            [b'\r', b'\n', ..] if there == size => at += 2,
            [] | [b'\r'] => return Ok(()),
            _ => return Err("a chunk without its line end".to_owned()),
        }
    }
    while let Some(end) = line_end(&rest[at..]) {
        let line = &rest[at..at + end];
        at += end + 2;
        if line.is_empty() {
            read.is_whole = true;
            read.used += at;
            return Ok(());
        }
        check_bytes(line)?;
        let line = String::from_utf8_lossy(line).into_owned();
        field(&line)?;
        read.trailers.push(line);
    }
    Ok(())
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(2).position(|window| window == b"\r\n")
}
