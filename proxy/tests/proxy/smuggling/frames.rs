//! HTTP/2 by hand: frames as bytes, so that nothing between the row and the wire can tidy up what a row wants wrong.

use std::io::{Read as _, Write};
use std::net::TcpStream;

use crate::world::PATIENCE;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// How a stream ended, as the rows write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With an answer of this status, whole.
    Status(u16),
    /// With RST_STREAM of this code, and no answer.
    Reset(u32),
    /// The whole connection ended, with this code if one was given.
    Connection(Option<u32>),
}

/// One connection in clear, prior knowledge.
pub(crate) struct Frames {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Frames {
    pub(crate) fn connect(address: std::net::SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frames = Self {
            stream,
            bytes: Vec::new(),
        };
        frames.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        frames.frame(SETTINGS, 0, 0, &[]);
        frames
    }

    /// A header list, each field as it is given, in literals that no table remembers (RFC 7541, section 6.2.2).
    pub(crate) fn headers(&mut self, stream: u32, fields: &[(Vec<u8>, Vec<u8>)], ends: bool) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0);
            string(&mut block, name);
            string(&mut block, value);
        }
        let flags = END_HEADERS | if ends { END_STREAM } else { 0 };
        self.frame(HEADERS, flags, stream, &block);
    }

    pub(crate) fn data(&mut self, stream: u32, bytes: &[u8], ends: bool) {
        self.frame(DATA, if ends { END_STREAM } else { 0 }, stream, bytes);
    }

    /// Reads until the stream is over.
    pub(crate) fn ending(&mut self, wanted: u32) -> Ending {
        let mut status = None;
        loop {
            let Some((kind, flags, stream, payload)) = self.next() else {
                return Ending::Connection(None);
            };
            let code = |at: usize| payload.get(at..at + 4).map_or(0, number);
            match kind {
                SETTINGS if flags & ACK == 0 => self.frame(SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => self.frame(PING, ACK, 0, &payload),
                GOAWAY if code(4) != 0 => return Ending::Connection(Some(code(4))),
                RST_STREAM if stream == wanted && status.is_none() => {
                    return Ending::Reset(code(0));
                }
                HEADERS if stream == wanted && status.is_none() => {
                    status = Some(status_of(&payload))
                }
                _ => {}
            }
            let ended = matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0;
            if let (true, Some(status)) = (ended && stream == wanted, status) {
                return Ending::Status(status);
            }
        }
    }

    fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            if let Some((head, rest)) = self.bytes.split_at_checked(9) {
                let length = usize::try_from(number(&[&[0], &head[..3]].concat())).unwrap();
                if let Some(payload) = rest.get(..length) {
                    let frame = (
                        head[3],
                        head[4],
                        number(&head[5..9]) & 0x7fff_ffff,
                        payload.to_vec(),
                    );
                    self.bytes.drain(..9 + length);
                    return Some(frame);
                }
            }
            let mut block = [0; 4096];
            match self.stream.read(&mut block) {
                Ok(count @ 1..) => self.bytes.extend_from_slice(&block[..count]),
                Ok(0) => return None,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                other => panic!("waiting for a frame: {other:?}"),
            }
        }
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [length[1], length[2], length[3], kind, flags];
        self.write(&[&head[..], &stream.to_be_bytes(), payload].concat());
    }

    fn write(&mut self, bytes: &[u8]) {
        // A proxy that has ended the connection tells by what it has sent.
        let _ = self.stream.write_all(bytes);
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// RFC 7541, section 5.2, without Huffman coding.
fn string(block: &mut Vec<u8>, text: &[u8]) {
    if text.len() < 127 {
        block.push(u8::try_from(text.len()).unwrap());
    } else {
        block.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            block.push(u8::try_from(rest % 128).unwrap() | 128);
            rest /= 128;
        }
        block.push(u8::try_from(rest).unwrap());
    }
    block.extend_from_slice(text);
}

/// The status an encoder writes first: from the static table, or as a literal with the name from there.
fn status_of(block: &[u8]) -> u16 {
    let mut rest = block;
    // A change of the table's size may come first.
    while rest[0] & 0xe0 == 0x20 {
        rest = &rest[1..];
    }
    match rest {
        [known @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(known - 0x88)],
        [0x48 | 0x08 | 0x18, 3, digits @ ..] => {
            let digits = std::str::from_utf8(&digits[..3]).unwrap();
            digits.parse().unwrap()
        }
        [0x48 | 0x08 | 0x18, length, coded @ ..] => huffman(&coded[..usize::from(length & 0x7f)])
            .parse()
            .unwrap(),
        other => panic!("a status in {other:02x?}"),
    }
}

/// Digits only (RFC 7541, appendix B): 0 to 2 have five bits, 3 to 9 six.
fn huffman(coded: &[u8]) -> String {
    let bits: String = coded.iter().map(|byte| format!("{byte:08b}")).collect();
    let (mut text, mut rest) = (String::new(), &bits[..]);
    while text.len() < 3 {
        let five = u32::from_str_radix(&rest[..5], 2).unwrap();
        let (digit, length) = match five {
            0..=2 => (five, 5),
            _ => (u32::from_str_radix(&rest[..6], 2).unwrap() - 0x19 + 3, 6),
        };
        text.push(char::from_digit(digit, 10).unwrap());
        rest = &rest[length..];
    }
    text
}
