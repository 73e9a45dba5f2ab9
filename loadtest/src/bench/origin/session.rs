//! One connection of the origin: reads requests, answers them. It does what a request asks and nothing else: what a
//! proxy changes on the way is the proxy's doing.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::bench::client::answer::{FRAME_BINARY, STORED, UPGRADE_ACCEPT};
use crate::bench::origin::content::Content;

/// Most header fields a request may have.
const FIELDS_MAX: usize = 64;
/// Bodies up to this size are sent in one write with their head, in bytes.
const INLINE_BYTES_MAX: u64 = 16 << 10;

/// Why a connection ends. Nobody reads it: the client sees the connection close, and counts that.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speech {
    /// HTTP/1.
    Http,
    /// WebSocket frames, after an upgrade.
    Frames,
    /// Eight bytes with a count, and then so many back.
    Raw,
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    stream: TcpStream,
    speech: Speech,
    /// Received and not yet understood.
    received: Vec<u8>,
    /// Bytes of a request's body that are still to come.
    body_left: u64,
    /// Bytes to send, and how many of them were.
    answer: Vec<u8>,
    sent: usize,
    /// Content to send after them.
    content_left: u64,
    closes: bool,
}

impl Session {
    /// A new connection.
    #[must_use]
    pub fn new(stream: TcpStream, speech: Speech) -> Self {
        Self {
            stream,
            speech,
            received: Vec::new(),
            body_left: 0,
            answer: Vec::new(),
            sent: 0,
            content_left: 0,
            closes: false,
        }
    }

    /// Its socket.
    #[must_use]
    pub const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Goes on as far as the socket allows.
    ///
    /// # Errors
    /// When the connection is over, in whatever way.
    pub fn advance(&mut self, content: &Content, buffer: &mut [u8]) -> Result<(), Over> {
        loop {
            let moved = if self.owes() {
                self.send(content)
            } else if self.closes {
                return Err(Over);
            } else if self.body_left > 0 {
                self.skip_body(buffer)
            } else {
                self.read(buffer)
            };
            match moved {
                Ok(true) => {}
                Ok(false) => return Err(Over),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Over),
            }
        }
    }

    fn owes(&self) -> bool {
        self.body_left == 0 && (self.sent < self.answer.len() || self.content_left > 0)
    }

    fn send(&mut self, content: &Content) -> std::io::Result<bool> {
        if self.sent < self.answer.len() {
            // A head waits for the first bytes of its content rather than travel alone.
            let more = match self.content_left {
                0 => SendFlags::empty(),
                _ => SendFlags::MORE,
            };
            self.sent += send(&self.stream, &self.answer[self.sent..], more)?;
        } else {
            self.content_left -= content.send(&self.stream, self.content_left)? as u64;
        }
        Ok(true)
    }

    fn skip_body(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        let length = usize::try_from(self.body_left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        // TCP counts truncated bytes as read and does not copy them (tcp(7)).
        let (_, count) = recv(&self.stream, &mut buffer[..length], RecvFlags::TRUNC)?;
        self.body_left -= count as u64;
        Ok(count > 0)
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        let count = self.stream.read(buffer)?;
        if count == 0 {
            return Ok(false);
        }
        // Nearly every request arrives whole, and is then read where it lies.
        if self.received.is_empty() {
            let used = self.understand(&buffer[..count]);
            if let Some(used) = used {
                self.received.extend_from_slice(&buffer[used..count]);
            }
            return Ok(used.is_some());
        }
        let mut received = std::mem::take(&mut self.received);
        received.extend_from_slice(&buffer[..count]);
        let used = self.understand(&received);
        received.drain(..used.unwrap_or(0));
        self.received = received;
        Ok(used.is_some())
    }

    /// Takes one request from the start of `bytes` and says how many it took; nothing when it makes no sense.
    fn understand(&mut self, bytes: &[u8]) -> Option<usize> {
        self.answer.clear();
        self.sent = 0;
        match self.speech {
            Speech::Http => self.request(bytes),
            Speech::Frames => self.frames(bytes),
            Speech::Raw => {
                let Some((count, _)) = bytes.split_first_chunk() else {
                    return Some(0);
                };
                let count = u64::from_be_bytes(*count);
                self.closes = count >> 63 == 1;
                self.content_left = count & (u64::MAX >> 1);
                Some(size_of::<u64>())
            }
        }
    }

    fn request(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut fields);
        let httparse::Status::Complete(length) = request.parse(bytes).ok()? else {
            return Some(0);
        };
        let mut body = 0;
        self.closes = request.version == Some(0);
        for field in request.headers.iter() {
            if field.name.eq_ignore_ascii_case("content-length") {
                body = std::str::from_utf8(field.value).ok()?.parse::<u64>().ok()?;
            } else if field.name.eq_ignore_ascii_case("connection") {
                self.closes = field.value.eq_ignore_ascii_case(b"close");
            }
        }
        let path = request.path?;
        let wanted = path.strip_prefix("/bytes/");
        if path == "/echo" {
            self.speech = Speech::Frames;
            self.closes = false;
            self.answer = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {UPGRADE_ACCEPT}\r\n\r\n").into_bytes();
        } else if let Some(count) = wanted.and_then(|count| count.parse::<u64>().ok()) {
            self.ok(count);
            if count <= INLINE_BYTES_MAX {
                let total = self.answer.len() + usize::try_from(count).ok()?;
                self.answer.resize(total, b'x');
            } else {
                self.content_left = count;
            }
        } else if path == "/store" {
            self.ok(STORED.len() as u64);
            self.answer.extend_from_slice(STORED);
        } else {
            self.answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec();
        }
        let here = body.min((bytes.len() - length) as u64);
        self.body_left = body - here;
        Some(length + usize::try_from(here).ok()?)
    }

    fn ok(&mut self, bytes: u64) {
        // The fields a common server sends.
        self.answer.extend_from_slice(b"HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Sat, 21 Nov 2026 09:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: ");
        // Writing into a vector cannot fail.
        let _ = write!(self.answer, "{bytes}\r\n\r\n");
    }

    /// Answers every whole message with the same bytes, without a mask.
    fn frames(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut rest = bytes;
        while let [FRAME_BINARY, length, ..] = *rest {
            let length = usize::from(length & 0x7f);
            let Some((frame, after)) = rest.split_at_checked(6 + length) else {
                break;
            };
            self.answer
                .extend_from_slice(&[FRAME_BINARY, frame[1] & 0x7f]);
            let mask = [frame[2], frame[3], frame[4], frame[5]];
            let unmasked = frame[6..].iter().zip(mask.iter().cycle());
            self.answer.extend(unmasked.map(|(byte, mask)| byte ^ mask));
            rest = after;
        }
        match rest.first() {
            None | Some(&FRAME_BINARY) => Some(bytes.len() - rest.len()),
            // A close, or something that is not ours.
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn session(speech: Speech) -> Session {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Session::new(
            TcpStream::connect(listener.local_addr().unwrap()).unwrap(),
            speech,
        )
    }

    fn text(session: &Session) -> String {
        String::from_utf8_lossy(&session.answer).into_owned()
    }

    #[test]
    fn a_get_is_answered_with_as_many_bytes_as_its_path_says() {
        let mut session = session(Speech::Http);
        let request = b"GET /bytes/4 HTTP/1.1\r\nHost: a\r\n\r\n";
        assert_eq!(session.understand(request), Some(request.len()));
        assert!(text(&session).ends_with("Content-Length: 4\r\n\r\nxxxx"));
        assert_eq!(
            session.understand(b"GET /bytes/9000000 HTTP/1.1\r\n\r\n"),
            Some(31)
        );
        assert_eq!(session.content_left, 9_000_000);
    }

    #[test]
    fn a_stored_body_is_answered_only_when_its_last_byte_is_there() {
        let mut session = session(Speech::Http);
        let request = b"POST /store HTTP/1.1\r\nContent-Length: 5\r\n\r\nab";
        assert_eq!(session.understand(request), Some(request.len()));
        assert_eq!((session.body_left, session.owes()), (3, false));
        session.body_left = 0;
        assert!(session.owes());
    }

    #[test]
    fn a_request_that_closes_is_the_last() {
        for (request, closes) in [
            (
                &b"GET /bytes/1 HTTP/1.1\r\nConnection: close\r\n\r\n"[..],
                true,
            ),
            (b"GET /bytes/1 HTTP/1.0\r\n\r\n", true),
            (
                b"GET /bytes/1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
                false,
            ),
        ] {
            let mut session = session(Speech::Http);
            session.understand(request);
            assert_eq!(session.closes, closes);
        }
    }

    #[test]
    fn a_message_comes_back_without_its_mask() {
        let mut session = session(Speech::Frames);
        let message = [FRAME_BINARY, 0x82, 1, 2, 3, 4, b'a' ^ 1, b'b' ^ 2];
        assert_eq!(session.understand(&message[..7]), Some(0));
        assert_eq!(session.understand(&message), Some(8));
        assert_eq!(session.answer, [FRAME_BINARY, 2, b'a', b'b']);
        assert_eq!(session.understand(&[0x88, 0x80, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_raw_count_asks_for_bytes_and_maybe_for_the_end() {
        let mut session = session(Speech::Raw);
        assert_eq!(
            session.understand(&(1_u64 << 63 | 7).to_be_bytes()),
            Some(8)
        );
        assert_eq!((session.content_left, session.closes), (7, true));
    }
}
