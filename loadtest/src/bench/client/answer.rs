//! Tells when an answer is complete and whether it is the right one. Pure: bytes in, a verdict out. It never takes a
//! short, long or foreign answer for a good one.

use crate::bench::plan::{Connection, Exchange};

/// What the origin answers to a stored body.
pub const STORED: &[u8] = b"stored\n";
/// The key of every upgrade, the example of RFC 6455, so that its answer is known without hashing.
pub const UPGRADE_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// The answer to [`UPGRADE_KEY`].
pub const UPGRADE_ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// A whole binary WebSocket frame.
pub const FRAME_BINARY: u8 = 0x82;

/// Most header fields an answer may have.
const FIELDS_MAX: usize = 32;
/// Longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Why an exchange does not count.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The proxy closed before the answer was complete.
    #[error("closed in the middle of an exchange")]
    Closed,
    /// Another status than the origin's.
    #[error("status {0}")]
    Status(u16),
    /// No HTTP.
    #[error("not an HTTP answer")]
    Malformed,
    /// The body's length is not what was asked for.
    #[error("an answer of the wrong length")]
    Length,
    /// The body's bytes are not what was sent.
    #[error("an answer with other bytes than were sent")]
    Content,
    /// It began and never ended.
    #[error("no answer in time")]
    Late,
}

/// What a good answer looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// An HTTP answer with this status and a body of this size.
    Http {
        /// The status.
        status: u16,
        /// Size of the body.
        bytes: u64,
    },
    /// Exactly these bytes.
    Exact(Vec<u8>),
    /// Any bytes, so many.
    Count(u64),
}

/// Whether more is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The answer is not complete.
    More,
    /// It is complete; the connection may be used again or not.
    Done(Connection),
}

/// Reads one answer.
#[derive(Debug, Default)]
pub struct Reader {
    head: Vec<u8>,
    left: Option<u64>,
    closes: bool,
}

impl Reader {
    /// Gets ready for the next answer.
    pub fn reset(&mut self) {
        self.head.clear();
        self.left = None;
        self.closes = false;
    }

    /// Bytes that may be thrown away unseen: the rest of a body of which only the length is checked.
    #[must_use]
    pub fn unseen(&self) -> u64 {
        self.left.unwrap_or(0)
    }

    /// Takes note of `count` bytes that were thrown away.
    ///
    /// # Errors
    /// When they were more than the body had left.
    pub fn skip(&mut self, count: u64) -> Result<Progress, Fault> {
        let left = self.unseen().checked_sub(count).ok_or(Fault::Length)?;
        self.left = Some(left);
        Ok(match left {
            0 if self.closes => Progress::Done(Connection::Fresh),
            0 => Progress::Done(Connection::Kept),
            _ => Progress::More,
        })
    }

    /// Takes the next bytes of the answer.
    ///
    /// # Errors
    /// When they are not what `expect` says.
    pub fn feed(&mut self, bytes: &[u8], expect: &Expect) -> Result<Progress, Fault> {
        match expect {
            Expect::Count(count) => {
                self.left.get_or_insert(*count);
                self.skip(bytes.len() as u64)
            }
            Expect::Exact(wanted) => {
                self.head.extend_from_slice(bytes);
                match wanted.strip_prefix(self.head.as_slice()) {
                    Some([]) => Ok(Progress::Done(Connection::Kept)),
                    Some(_) => Ok(Progress::More),
                    None => Err(Fault::Content),
                }
            }
            Expect::Http { .. } if self.left.is_some() => self.skip(bytes.len() as u64),
            Expect::Http {
                status,
                bytes: size,
            } => self.head(bytes, *status, *size),
        }
    }

    fn head(&mut self, bytes: &[u8], status: u16, size: u64) -> Result<Progress, Fault> {
        // Nearly every head arrives whole, and is then read where it lies.
        if self.head.is_empty() {
            return match head_of(bytes, status, size)? {
                Some(head) => self.begin_body(head, bytes.len()),
                None => {
                    self.head.extend_from_slice(bytes);
                    Ok(Progress::More)
                }
            };
        }
        self.head.extend_from_slice(bytes);
        match head_of(&self.head, status, size)? {
            Some(head) => self.begin_body(head, self.head.len()),
            None if self.head.len() > HEAD_BYTES_MAX => Err(Fault::Malformed),
            None => Ok(Progress::More),
        }
    }

    fn begin_body(&mut self, head: Head, received: usize) -> Result<Progress, Fault> {
        self.closes = head.closes;
        self.left = Some(head.body);
        self.skip((received - head.length) as u64)
    }
}

struct Head {
    length: usize,
    body: u64,
    closes: bool,
}

/// The head at the start of `bytes`, if it is complete.
fn head_of(bytes: &[u8], wanted: u16, size: u64) -> Result<Option<Head>, Fault> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    let parsed = answer.parse(bytes).map_err(|_| Fault::Malformed)?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let status = answer.code.unwrap_or(0);
    if status != wanted {
        return Err(Fault::Status(status));
    }
    let field = |name: &str| {
        let found = answer
            .headers
            .iter()
            .find(|field| field.name.eq_ignore_ascii_case(name));
        found.map(|field| field.value)
    };
    let closes = field("connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
    if status == 101 {
        return match field("sec-websocket-accept") {
            Some(accept) if accept == UPGRADE_ACCEPT.as_bytes() => Ok(Some(Head {
                length,
                body: 0,
                closes,
            })),
            _ => Err(Fault::Content),
        };
    }
    let declared = field("content-length")
        .and_then(|value| std::str::from_utf8(value).ok())
        .and_then(|value| value.parse::<u64>().ok());
    if declared != Some(size) {
        return Err(Fault::Length);
    }
    Ok(Some(Head {
        length,
        body: size,
        closes,
    }))
}

/// What a connection sends and what must come back.
#[derive(Debug, Clone)]
pub struct Script {
    /// Sent once on a new connection, before the first exchange, with what must come back.
    pub opening: Option<(Vec<u8>, Expect)>,
    /// Sent in every exchange.
    pub request: Vec<u8>,
    /// Bytes of body that follow the request.
    pub upload: u64,
    /// What must come back.
    pub expect: Expect,
    /// Kept or fresh.
    pub connection: Connection,
}

/// Bodies up to this size travel in one write with their head, in bytes.
const INLINE_BYTES_MAX: u64 = 16 << 10;

impl Script {
    /// The script of an exchange.
    #[must_use]
    pub fn of(exchange: Exchange) -> Self {
        let connection = exchange.connection();
        let empty = Self {
            opening: None,
            request: Vec::new(),
            upload: 0,
            expect: Expect::Count(0),
            connection,
        };
        match exchange {
            Exchange::Get { bytes, .. } => {
                let close = match connection {
                    Connection::Kept => "",
                    Connection::Fresh => "Connection: close\r\n",
                };
                Self {
                    request: head(&format!("GET /bytes/{bytes}"), close),
                    expect: Expect::Http { status: 200, bytes },
                    ..empty
                }
            }
            Exchange::Post { bytes } => {
                let length = format!("Content-Length: {bytes}\r\n");
                let mut request = head("POST /store", &length);
                let inline = if bytes <= INLINE_BYTES_MAX { bytes } else { 0 };
                request.resize(request.len() + usize::try_from(inline).unwrap_or(0), b'x');
                let expect = Expect::Http {
                    status: 200,
                    bytes: STORED.len() as u64,
                };
                Self {
                    request,
                    upload: bytes - inline,
                    expect,
                    ..empty
                }
            }
            Exchange::Echo { bytes } => echo(bytes, empty),
            Exchange::Raw { bytes, .. } => {
                // The highest bit asks the origin to close when it is done.
                let close = u64::from(connection == Connection::Fresh) << 63;
                Self {
                    request: (bytes | close).to_be_bytes().to_vec(),
                    expect: Expect::Count(bytes),
                    ..empty
                }
            }
        }
    }
}

fn echo(bytes: u8, empty: Script) -> Script {
    let fields = format!(
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {UPGRADE_KEY}\r\n"
    );
    let upgraded = Expect::Http {
        status: 101,
        bytes: 0,
    };
    let message = vec![b'm'; usize::from(bytes)];
    // A mask of zeroes is a mask, and spares both ends the arithmetic.
    let mut request = vec![FRAME_BINARY, 0x80 | bytes, 0, 0, 0, 0];
    request.extend_from_slice(&message);
    let mut wanted = vec![FRAME_BINARY, bytes];
    wanted.extend_from_slice(&message);
    Script {
        opening: Some((head("GET /echo", &fields), upgraded)),
        request,
        expect: Expect::Exact(wanted),
        ..empty
    }
}

fn head(line: &str, fields: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: lab\r\nAccept: */*\r\n{fields}\r\n")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &Expect = &Expect::Http {
        status: 200,
        bytes: 5,
    };

    fn read(pieces: &[&[u8]], expect: &Expect) -> Result<Progress, Fault> {
        let mut reader = Reader::default();
        let mut last = Progress::More;
        for piece in pieces {
            assert_eq!(last, Progress::More);
            last = reader.feed(piece, expect)?;
        }
        Ok(last)
    }

    #[test]
    fn an_answer_is_complete_with_its_last_byte_however_it_is_cut() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        for cut in 0..answer.len() {
            let (first, second) = answer.split_at(cut);
            let kept = Progress::Done(Connection::Kept);
            assert_eq!(read(&[first, second], GOOD).unwrap(), kept, "cut at {cut}");
        }
        assert_eq!(read(&[&answer[..42]], GOOD).unwrap(), Progress::More);
    }

    #[test]
    fn a_wrong_status_or_length_is_an_error() {
        let message = |bytes: &[u8]| read(&[bytes], GOOD).unwrap_err().to_string();
        let unavailable = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nhello";
        assert_eq!(message(unavailable), "status 503");
        let short = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhell";
        assert_eq!(message(short), "an answer of the wrong length");
        let long = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello!";
        assert_eq!(message(long), "an answer of the wrong length");
        assert_eq!(message(b"SSH-2.0-x\r\n"), "not an HTTP answer");
    }

    #[test]
    fn an_answer_that_closes_says_so() {
        let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello";
        assert_eq!(
            read(&[answer], GOOD).unwrap(),
            Progress::Done(Connection::Fresh)
        );
    }

    #[test]
    fn an_echo_must_bring_back_the_very_bytes() {
        let script = Script::of(Exchange::Echo { bytes: 3 });
        assert_eq!(script.request, b"\x82\x83\0\0\0\0mmm");
        assert_eq!(
            read(&[b"\x82\x03m", b"mm"], &script.expect).unwrap(),
            Progress::Done(Connection::Kept)
        );
        let error = read(&[b"\x82\x03mmn"], &script.expect).unwrap_err();
        assert_eq!(
            error.to_string(),
            "an answer with other bytes than were sent"
        );
    }

    #[test]
    fn an_upgrade_needs_the_right_accept() {
        let (_, expect) = Script::of(Exchange::Echo { bytes: 3 }).opening.unwrap();
        let good = format!("HTTP/1.1 101 S\r\nSec-WebSocket-Accept: {UPGRADE_ACCEPT}\r\n\r\n");
        assert_eq!(
            read(&[good.as_bytes()], &expect).unwrap(),
            Progress::Done(Connection::Kept)
        );
        let error = read(&[b"HTTP/1.1 101 S\r\n\r\n"], &expect).unwrap_err();
        assert!(matches!(error, Fault::Content), "{error}");
    }

    #[test]
    fn a_small_body_travels_with_its_head_and_a_large_one_after_it() {
        let small = Script::of(Exchange::Post { bytes: 1024 });
        assert_eq!((small.request.ends_with(b"xxx"), small.upload), (true, 0));
        let large = Script::of(Exchange::Post { bytes: 10 << 20 });
        assert!(large.request.ends_with(b"\r\n\r\n"));
        assert_eq!(large.upload, 10 << 20);
    }
}
