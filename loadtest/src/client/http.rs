//! Just enough of an HTTP/1.1 client to know when an answer is complete: the load's verdict depends on that, so it
//! is written out here rather than left to a library that may retry on its own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Most header fields an answer may have.
const HEADERS_MAX: usize = 64;
/// Largest answer kept, in bytes: the list of ids of a long run.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Why an answer could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The bytes are no HTTP.
    #[error("not an HTTP answer: {0}")]
    Malformed(&'static str),
    /// The connection closed before the answer was complete.
    #[error("closed after {bytes} bytes of the answer")]
    Closed {
        /// How much had arrived.
        bytes: usize,
    },
    /// The answer is larger than the limit.
    #[error("the answer is larger than {ANSWER_BYTES_MAX} bytes")]
    TooLarge,
}

/// A complete answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, without chunk framing.
    pub body: Vec<u8>,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
    /// How many bytes of the connection the answer took.
    pub length: usize,
}

/// The bytes of a request. A body makes it a form POST.
#[must_use]
pub fn request(path: &str, host: &str, form: Option<&str>) -> Vec<u8> {
    match form {
        None => format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(),
        Some(form) => format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
            form.len()
        )
        .into_bytes(),
    }
}

/// Reads an answer from the start of `bytes`. Nothing when more bytes are needed; `closed` tells that none will come,
/// which completes an answer that is delimited by the end of its connection.
///
/// # Errors
/// When the bytes are no HTTP answer, or the connection closed inside one.
pub fn parse(bytes: &[u8], closed: bool) -> Result<Option<Answer>, HttpError> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    let parsed = head
        .parse(bytes)
        .map_err(|_| HttpError::Malformed("head"))?;
    let httparse::Status::Complete(start) = parsed else {
        return if closed {
            Err(HttpError::Closed { bytes: bytes.len() })
        } else {
            Ok(None)
        };
    };
    let status = head.code.unwrap_or(0);
    let field = |name: &str| {
        head.headers
            .iter()
            .find(|field| field.name.eq_ignore_ascii_case(name))
            .map(|field| field.value)
    };
    let says = |name: &str, word: &str| {
        field(name).is_some_and(|value| {
            value
                .to_ascii_lowercase()
                .windows(word.len())
                .any(|part| part == word.as_bytes())
        })
    };
    let keep_alive = head.version == Some(1) && !says("connection", "close");
    let rest = &bytes[start..];
    let body = if says("transfer-encoding", "chunked") {
        chunked(rest)?
    } else if let Some(value) = field("content-length") {
        let text =
            std::str::from_utf8(value).map_err(|_| HttpError::Malformed("content-length"))?;
        let length: usize = text
            .trim()
            .parse()
            .map_err(|_| HttpError::Malformed("content-length"))?;
        rest.get(..length).map(|body| (body.to_vec(), length))
    } else if matches!(status, 204 | 304) {
        Some((Vec::new(), 0))
    } else {
        closed.then(|| (rest.to_vec(), rest.len()))
    };
    match body {
        Some((body, length)) => Ok(Some(Answer {
            status,
            body,
            keep_alive: keep_alive && !closed,
            length: start + length,
        })),
        None if closed => Err(HttpError::Closed { bytes: bytes.len() }),
        None if bytes.len() > ANSWER_BYTES_MAX => Err(HttpError::TooLarge),
        None => Ok(None),
    }
}

fn chunked(mut rest: &[u8]) -> Result<Option<(Vec<u8>, usize)>, HttpError> {
    let (mut body, whole) = (Vec::new(), rest.len());
    loop {
        let parsed =
            httparse::parse_chunk_size(rest).map_err(|_| HttpError::Malformed("chunk size"))?;
        let httparse::Status::Complete((start, size)) = parsed else {
            return Ok(None);
        };
        let size = usize::try_from(size).map_err(|_| HttpError::TooLarge)?;
        let Some(end) = start.checked_add(size).and_then(|end| end.checked_add(2)) else {
            return Err(HttpError::TooLarge);
        };
        if rest.len() < end {
            return Ok(None);
        }
        body.extend_from_slice(&rest[start..start + size]);
        rest = &rest[end..];
        if size == 0 {
            return Ok(Some((body, whole - rest.len())));
        }
    }
}

/// One request on a connection of its own, from the network namespace of the calling thread.
///
/// # Errors
/// When no complete answer arrives within `limit` per read.
pub fn fetch(to: SocketAddr, bytes: &[u8], limit: Duration) -> Result<Answer, HttpError> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(bytes)?;
    let (mut received, mut buffer) = (Vec::new(), [0; 16384]);
    loop {
        let read = stream.read(&mut buffer)?;
        received.extend_from_slice(&buffer[..read]);
        if let Some(answer) = parse(&received, read == 0)? {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete_only_at_the_end(bytes: &[u8]) -> Answer {
        for cut in 0..bytes.len() {
            assert!(
                parse(&bytes[..cut], false).unwrap().is_none(),
                "complete after {cut} bytes"
            );
        }
        parse(bytes, false).unwrap().unwrap()
    }

    #[test]
    fn an_answer_is_complete_only_with_its_last_byte() {
        let bytes = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok";
        let answer = complete_only_at_the_end(bytes);
        assert_eq!(
            (answer.status, answer.body.as_slice(), answer.keep_alive),
            (201, &b"ok"[..], true)
        );
    }

    #[test]
    fn a_chunked_answer_is_complete_only_with_its_last_chunk() {
        let bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let answer = complete_only_at_the_end(bytes);
        assert_eq!(
            (answer.body.as_slice(), answer.length),
            (&b"abcde"[..], bytes.len())
        );
    }

    #[test]
    fn a_connection_that_closes_inside_an_answer_is_an_error() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc";
        assert!(matches!(parse(bytes, true), Err(HttpError::Closed { .. })));
    }
}
