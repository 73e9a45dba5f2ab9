//! The chunked transfer coding, read incrementally and in place.
//!
//! Sizes, extensions and line ends are taken out of the buffer so that the data of all chunks in it lie side by
//! side; extensions are dropped, trailers are collected. Anything that two readers could read in two ways is an
//! error: signs, blanks, bare line feeds, sizes past 2^63.

use super::head::{self, Scan, same_field};

/// Longest chunk-size line with its extensions, in bytes.
const SIZE_LINE_BYTES_MAX: usize = 1024;
/// Longest trailer section, in bytes.
const TRAILER_BYTES_MAX: usize = 8 * 1024;

/// Fields that no trailer may be.
pub(super) const NO_TRAILERS: [&str; 22] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-request-id",
];

/// What is wrong with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Not a hexadecimal number, or one too large.
    #[error("a chunk size that is not a number")]
    Size,
    /// A chunk-size line longer than we read.
    #[error("a chunk-size line that is too long")]
    LongLine,
    /// Something other than CR LF where CR LF has to be.
    #[error("a chunk that does not end in CR LF")]
    LineEnd,
    /// A trailer that no head could contain, or too many.
    #[error("a trailer that may not be one")]
    Trailer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the digits of a size; how many there were.
    Size {
        value: u64,
        digits: u8,
    },
    /// Between the digits and CR.
    Extension {
        value: u64,
        bytes: usize,
    },
    /// After the CR of a size line.
    SizeEnd {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    Trailer,
    Done,
}

/// Where one message's chunks have got to.
#[derive(Debug, Clone)]
pub(crate) struct Chunks {
    state: State,
    /// The trailer section, with a CR LF put in front so that it ends like any head.
    trailer: Vec<u8>,
}

/// What one pass over a buffer found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Data begins here…
    pub(crate) start: usize,
    /// …and ends here.
    pub(crate) end: usize,
    /// This much of the buffer belongs to the message so far.
    pub(crate) used: usize,
    /// The message ends with it.
    pub(crate) last: bool,
}

impl Chunks {
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Size {
                value: 0,
                digits: 0,
            },
            trailer: Vec::new(),
        }
    }

    /// The trailer lines, each with its CR LF, without the empty line.
    pub(crate) fn trailer(&self) -> &[u8] {
        let end = self.trailer.len().saturating_sub(2);
        self.trailer.get(2..end).unwrap_or_default()
    }

    /// Goes over all of `bytes`, moving the data of later chunks up to the first one's.
    pub(crate) fn decode(&mut self, bytes: &mut [u8]) -> Result<Piece, ChunkError> {
        let (mut at, mut start, mut end) = (0, 0, 0);
        while at < bytes.len() && self.state != State::Done {
            if let State::Data { left } = self.state {
                let count = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len() - at);
                if start == end {
                    (start, end) = (at, at + count);
                } else {
                    bytes.copy_within(at..at + count, end);
                    end += count;
                }
                at += count;
                let left = left - count as u64;
                self.state = if left == 0 {
                    State::DataCr
                } else {
                    State::Data { left }
                };
            } else {
                self.state = self.step(bytes[at])?;
                at += 1;
            }
        }
        Ok(Piece {
            start,
            end,
            used: at,
            last: self.state == State::Done,
        })
    }

    fn step(&mut self, byte: u8) -> Result<State, ChunkError> {
        match (self.state, byte) {
            (State::Size { value, digits }, _) if byte.is_ascii_hexdigit() => {
                // Sixteen digits with the first at most 7 fit; more are nobody's honest chunk.
                if digits == 16 || value >> 59 != 0 {
                    return Err(ChunkError::Size);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Ok(State::Size {
                    value: value << 4 | u64::from(digit),
                    digits: digits + 1,
                })
            }
            (State::Size { digits: 0, .. }, _) => Err(ChunkError::Size),
            (State::Size { value, .. } | State::Extension { value, .. }, b'\r') => {
                Ok(State::SizeEnd { value })
            }
            (State::Size { value, .. }, b';') => Ok(State::Extension { value, bytes: 0 }),
            (State::Size { .. }, _) => Err(ChunkError::Size),
            (State::Extension { bytes, .. }, _) if bytes >= SIZE_LINE_BYTES_MAX => {
                Err(ChunkError::LongLine)
            }
            (State::Extension { value, bytes }, b'\t' | 0x20..=0x7e | 0x80..) => {
                Ok(State::Extension {
                    value,
                    bytes: bytes + 1,
                })
            }
            (State::Extension { .. }, _) => Err(ChunkError::LineEnd),
            (State::SizeEnd { value: 0 }, b'\n') => {
                self.trailer.extend_from_slice(b"\r\n");
                Ok(State::Trailer)
            }
            (State::SizeEnd { value }, b'\n') => Ok(State::Data { left: value }),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size {
                value: 0,
                digits: 0,
            }),
            (State::SizeEnd { .. } | State::DataCr | State::DataLf, _) => Err(ChunkError::LineEnd),
            (State::Trailer, _) => self.trailer_byte(byte),
            (State::Data { .. } | State::Done, _) => Ok(self.state),
        }
    }

    fn trailer_byte(&mut self, byte: u8) -> Result<State, ChunkError> {
        if self.trailer.len() >= TRAILER_BYTES_MAX {
            return Err(ChunkError::Trailer);
        }
        self.trailer.push(byte);
        let from = self.trailer.len().saturating_sub(4);
        let from = if self.trailer[from] == b'\n' {
            from + 1
        } else {
            from
        };
        match head::scan(&self.trailer, from) {
            Ok(Scan::Partial(_)) => Ok(State::Trailer),
            Ok(Scan::Complete(_)) => self.check_trailer(),
            Err(_) => Err(ChunkError::Trailer),
        }
    }

    /// Trailers are fields like others, except that none may frame, route, or say who somebody is (RFC 9110,
    /// section 6.5.1): a reader that takes them for header fields would believe it.
    fn check_trailer(&self) -> Result<State, ChunkError> {
        if self.trailer().is_empty() {
            return Ok(State::Done);
        }
        let mut fields = [httparse::EMPTY_HEADER; 32];
        let (_, fields) = match httparse::parse_headers(&self.trailer[2..], &mut fields) {
            Ok(httparse::Status::Complete(parsed)) => parsed,
            _ => return Err(ChunkError::Trailer),
        };
        let bad = |field: &httparse::Header<'_>| {
            NO_TRAILERS.iter().any(|name| same_field(field.name, name))
        };
        if fields.iter().any(bad) {
            Err(ChunkError::Trailer)
        } else {
            Ok(State::Done)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes with the input cut at the given places.
    fn decode(input: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, usize, Chunks), ChunkError> {
        let mut chunks = Chunks::new();
        let mut data = Vec::new();
        let mut at = 0;
        let ends = cuts
            .iter()
            .map(|cut| cut % (input.len() + 1))
            .chain([input.len()]);
        for end in ends {
            if end <= at {
                continue;
            }
            let mut part = input[at..end].to_vec();
            let piece = chunks.decode(&mut part)?;
            data.extend_from_slice(&part[piece.start..piece.end]);
            if piece.last {
                return Ok((data, at + piece.used, chunks));
            }
            at = end;
        }
        panic!("no end in {input:?}");
    }

    #[test]
    fn sizes_that_two_readers_read_differently_are_refused() {
        let cases: [(&[u8], ChunkError); 10] = [
            (b"+5\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"-5\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b" 5\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"5 \r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"0x5\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"5\nhello\r\n0\r\n\r\n", ChunkError::Size),
            (b"5\r\nhello0\r\n\r\n", ChunkError::LineEnd),
            (b"5;a\nb\r\nhello\r\n0\r\n\r\n", ChunkError::LineEnd),
            (b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n", ChunkError::Size),
        ];
        for (input, expected) in cases {
            assert_eq!(decode(input, &[]).unwrap_err(), expected, "{input:?}");
        }
    }

    #[test]
    fn trailers_are_collected_and_those_that_frame_are_refused() {
        let (_, _, chunks) = decode(b"0\r\nX-Sum: 1\r\nY: 2\r\n\r\n", &[]).unwrap();
        assert_eq!(chunks.trailer(), b"X-Sum: 1\r\nY: 2\r\n");
        assert_eq!(
            decode(b"0\r\nContent-Length: 1\r\n\r\n", &[]).unwrap_err(),
            ChunkError::Trailer
        );
        assert_eq!(
            decode(b"0\r\nX: 1\n\r\n\r\n", &[]).unwrap_err(),
            ChunkError::Trailer
        );
        assert_eq!(
            decode(b"0\r\nX: 1\r\n folded\r\n\r\n", &[]).unwrap_err(),
            ChunkError::Trailer
        );
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_body(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            mut cuts in proptest::collection::vec(any::<usize>(), 0..8),
            extension in "(;[a-z]{1,5}(=[a-z]{1,5})?)?",
            trailer in "(X: [a-z]{0,9}\r\n){0,3}",
        ) {
            let mut input = Vec::new();
            for part in &parts {
                input.extend_from_slice(format!("{:x}{extension}\r\n", part.len()).as_bytes());
                input.extend_from_slice(part);
                input.extend_from_slice(b"\r\n");
            }
            input.extend_from_slice(format!("0\r\n{trailer}\r\n").as_bytes());
            let end = input.len();
            input.extend_from_slice(b"GET /next HTTP/1.1\r\n");
            cuts.iter_mut().for_each(|cut| *cut %= input.len());
            cuts.sort_unstable();
            let (data, used, chunks) = decode(&input, &cuts).unwrap();
            prop_assert_eq!(data, parts.concat());
            prop_assert_eq!(used, end);
            prop_assert_eq!(chunks.trailer(), trailer.as_bytes());
        }

        #[test]
        fn no_input_makes_the_decoder_panic(mut input in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Chunks::new().decode(&mut input);
        }
    }
}
