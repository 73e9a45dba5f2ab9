//! What the `h2` crate refuses by itself, read off the frames it sends: it tells nobody else. Streams beyond
//! `streams_max` (`REFUSED_STREAM`), header lists longer than `header_list_bytes_max` (431), malformed ones
//! (`PROTOCOL_ERROR`).
//!
//! Only frame headers are looked at, on their way to the socket; nothing is changed, delayed or decoded. An answer on
//! a stream that was never given to us can only be one that the crate has made.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use h2::Reason;

use super::Shared;
use crate::access_log::Line;
use crate::error::RequestError;
use crate::http::head::HeadError;

/// Length, type, flags and stream of a frame (RFC 9113, section 4.1).
const HEADER_BYTES: usize = 9;
/// The payload of RST_STREAM (section 6.4).
const CODE_BYTES: usize = 4;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;

/// A frame that may be a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Headers { stream: u32 },
    Reset { stream: u32, code: u32 },
}

/// What a connection sends, and for whom refusals are counted.
pub(super) struct Overheard {
    frames: Frames,
    shared: Rc<Shared>,
}

impl Overheard {
    pub(super) fn new(shared: &Rc<Shared>) -> Self {
        Self {
            frames: Frames::default(),
            shared: Rc::clone(shared),
        }
    }

    /// These bytes have gone out.
    pub(super) fn sent(&mut self, bytes: &[u8]) {
        let shared = &self.shared;
        self.frames.follow(bytes, |sent| shared.refused(sent));
    }
}

/// Follows outgoing bytes from frame to frame.
#[derive(Debug, Default)]
struct Frames {
    /// The beginning of a frame, as far as it has gone out.
    head: [u8; HEADER_BYTES + CODE_BYTES],
    filled: usize,
    /// What is left of a payload that is of no interest.
    skip: usize,
}

impl Frames {
    fn follow(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Sent)) {
        while !bytes.is_empty() {
            let wanted = if self.skip > 0 {
                self.skip
            } else {
                self.wanted() - self.filled
            };
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if self.skip > 0 {
                self.skip -= now.len();
                continue;
            }
            self.head[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            if self.filled == self.wanted() {
                self.filled = 0;
                self.end_of_head(&mut seen);
            }
        }
    }

    /// Bytes of the frame to look at.
    const fn wanted(&self) -> usize {
        if self.filled >= HEADER_BYTES && self.head[3] == RST_STREAM {
            HEADER_BYTES + CODE_BYTES
        } else {
            HEADER_BYTES
        }
    }

    fn end_of_head(&mut self, seen: &mut impl FnMut(Sent)) {
        let [l0, l1, l2, kind, _, s0, s1, s2, s3, code @ ..] = self.head;
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        self.skip = length;
        match kind {
            HEADERS => seen(Sent::Headers { stream }),
            RST_STREAM => {
                self.skip = length.saturating_sub(CODE_BYTES);
                let code = u32::from_be_bytes(code);
                seen(Sent::Reset { stream, code });
            }
            _ => {}
        }
    }
}

/// Which streams were given to us.
#[derive(Debug)]
pub(super) struct Given {
    /// The first that may still be.
    next: Cell<u32>,
    /// Those before it that never were, as long as nothing has been said on them.
    never: RefCell<VecDeque<u32>>,
    never_max: u32,
}

impl Given {
    /// The crate keeps no more than `streams_max` streams open, so it can owe answers on no more.
    pub(super) const fn new(streams_max: u32) -> Self {
        Self {
            next: Cell::new(1),
            never: RefCell::new(VecDeque::new()),
            never_max: streams_max,
        }
    }

    /// A stream is given to us. They come in the order of their numbers; a client uses each odd one once.
    pub(super) fn note(&self, stream: u32) {
        let first = self.next.replace(stream.saturating_add(2));
        if first >= stream {
            return;
        }
        let first = first.max(stream.saturating_sub(self.never_max.saturating_mul(2)) | 1);
        let mut never = self.never.borrow_mut();
        for stream in (first..stream).step_by(2) {
            if never.len() >= self.never_max as usize {
                never.pop_front();
            }
            never.push_back(stream);
        }
    }

    /// Whether the crate speaks for itself on this stream. It does so once.
    fn is_not_ours(&self, stream: u32) -> bool {
        if stream >= self.next.get() {
            return true;
        }
        let mut never = self.never.borrow_mut();
        let place = never.iter().position(|other| *other == stream);
        place.is_some_and(|place| never.remove(place).is_some())
    }
}

impl Shared {
    /// Counts and logs what the crate has refused.
    fn refused(&self, sent: Sent) {
        let error = match sent {
            Sent::Reset { code, .. } if code == u32::from(Reason::REFUSED_STREAM) => {
                RequestError::Streams
            }
            Sent::Reset { stream, code }
                if code == u32::from(Reason::PROTOCOL_ERROR) && self.given.is_not_ours(stream) =>
            {
                RequestError::Head(HeadError::Syntax)
            }
            Sent::Headers { stream } if self.given.is_not_ours(stream) => RequestError::HeadTooLong,
            Sent::Headers { .. } | Sent::Reset { .. } => return,
        };
        let Self { port, client, .. } = self;
        let status = match error {
            RequestError::HeadTooLong => error.status().unwrap_or(0),
            _ => 0,
        };
        port.count(status);
        port.count_refusal(&error);
        port.log(|| Line::refused(port, client.address, status, 0, &error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pieces: &[&[u8]]) -> Vec<Sent> {
        let mut frames = Frames::default();
        let mut all = Vec::new();
        for piece in pieces {
            frames.follow(piece, |sent| all.push(sent));
        }
        all
    }

    #[test]
    fn frames_are_followed_wherever_their_bytes_are_cut() {
        let mut bytes = vec![0, 0, 6, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6];
        bytes.extend([0, 0, 2, 1, 4, 0, 0, 0, 5, 0x88, 0x88]);
        bytes.extend([0, 0, 0, 0, 1, 0, 0, 0, 5]);
        bytes.extend([0, 0, 4, 3, 0, 0, 0, 1, 3, 0, 0, 0, 7]);
        bytes.extend([0, 0, 1, 1, 5, 0, 0, 0, 9, 0x88]);
        let all = [
            Sent::Headers { stream: 5 },
            Sent::Reset {
                stream: 259,
                code: 7,
            },
            Sent::Headers { stream: 9 },
        ];
        assert_eq!(seen(&[&bytes]), all);
        for cut in 0..bytes.len() {
            let (first, second) = bytes.split_at(cut);
            assert_eq!(seen(&[first, second]), all, "{cut}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(seen(&single), all);
    }

    #[test]
    fn what_was_never_given_to_us_is_known_once_and_in_bounded_memory() {
        let given = Given::new(2);
        assert!(given.is_not_ours(1));
        given.note(3);
        assert!(given.is_not_ours(1));
        assert!(!given.is_not_ours(1));
        assert!(!given.is_not_ours(3));
        given.note(2_000_000_001);
        assert_eq!(given.never.borrow().len(), 2);
        assert!(given.is_not_ours(1_999_999_999));
        assert!(!given.is_not_ours(2_000_000_001));
        assert!(given.is_not_ours(2_000_000_003));
    }
}
