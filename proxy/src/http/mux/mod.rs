//! Requests that come as streams of a multiplexed connection: HTTP/2 and HTTP/3 alike.
//!
//! A stream's header list is turned into an HTTP/1.1 head ([`head::HeadBuilder`]) and then read by the very code
//! that reads an HTTP/1 request: there is one reading of a request, so no two can differ. The answer's head comes
//! back the same way ([`answer::AnswerHead`]). This module knows nothing of frames and never collects a body.
//!
//! A protocol brings three things to [`serve_stream`]: a [`RequestBody`] to read from, an [`AnswerSink`] to write
//! to, and a future that completes when the stream was reset or its connection died. All three live on one worker
//! and need not be `Send`. Everything else is done here: reading the head, routing, limits, holding, retries,
//! answers of our own, log line and counters.
//!
//! ```text
//! HEADERS ─► HeadBuilder ─► HTTP/1.1 head ─► serve_stream ─► gate ─► exchange ─► AnswerSink
//!                                                 ▲            │
//!                                       RequestBody            └─ held: nothing is read, no credit is given
//! ```

pub(crate) mod active;
pub(crate) mod answer;
mod exchange;
pub(crate) mod head;
pub(crate) mod held;
mod serve;
mod tunnel;
pub(crate) mod websocket;

use std::io;

use bytes::Bytes;

pub(crate) use answer::AnswerHead;
pub(crate) use exchange::{Unsent, count_down, fill_in_time, within};
pub(crate) use serve::{Asked, Reading, Waited, read_stream, serve_read, serve_stream};
pub(crate) use tunnel::Idle;

use super::chunked::ChunkError;
use super::head::HeadError;
use crate::error::RequestError;

/// One part of a request's body.
#[derive(Debug)]
pub(crate) enum Part {
    /// Some bytes of it, at least one.
    Data(Bytes),
    /// Its end. The trailer is what [`head::write_trailer`] made of the stream's, empty where there was none.
    End {
        /// HTTP/1 field lines, each with its CR LF.
        trailer: Vec<u8>,
    },
}

/// Why a body ends before its end.
#[derive(Debug)]
pub(crate) enum BodyFailed {
    /// The stream was reset, or its connection died.
    Left(io::Error),
    /// Its trailer is not acceptable.
    Trailer(HeadError),
    /// Its chunks are not acceptable; only of a body that comes in chunks.
    Chunk(ChunkError),
}

impl From<BodyFailed> for RequestError {
    fn from(error: BodyFailed) -> Self {
        match error {
            BodyFailed::Left(error) => Self::ClientLeft(error),
            BodyFailed::Trailer(error) => Self::Trailer(error),
            BodyFailed::Chunk(error) => Self::Chunk(error),
        }
    }
}

impl From<BodyFailed> for io::Error {
    fn from(error: BodyFailed) -> Self {
        match error {
            BodyFailed::Left(error) => error,
            BodyFailed::Trailer(_) | BodyFailed::Chunk(_) => io::ErrorKind::InvalidData.into(),
        }
    }
}

/// Where the body of a stream's request comes from.
pub(crate) trait RequestBody {
    /// The next part; not asked again after [`Part::End`]. For a tunnel (extended CONNECT) the end is the peer's
    /// half-close.
    ///
    /// # Cancel safety
    /// Required: dropping the future loses nothing.
    async fn next(&mut self) -> Result<Part, BodyFailed>;

    /// So many bytes that [`RequestBody::next`] brought have been written upstream. Only now may flow control give
    /// the peer credit for as many.
    fn written(&mut self, bytes: usize);
}

/// Why a stream is broken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reset {
    /// The request is malformed: `PROTOCOL_ERROR`, `H3_MESSAGE_ERROR`.
    Malformed,
    /// The answer cannot be completed: `INTERNAL_ERROR`, `H3_INTERNAL_ERROR`.
    Broken,
    /// The client took or sent nothing for too long, or left: `CANCEL`, `H3_REQUEST_CANCELLED`.
    Cancelled,
}

/// Whether more of an answer follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    /// Data or a trailer.
    Follows,
    /// Nothing: the stream ends here.
    Ends,
}

/// Where the answer goes. An error from any of these means that the stream or its connection is gone.
///
/// An answer is any number of [`AnswerSink::interim`], then [`AnswerSink::head`], then data and a trailer as `More`
/// announced it. After its end the rest of the request's body is of no interest; the protocol tells the peer so
/// (HTTP/2: `RST_STREAM` with `NO_ERROR`, HTTP/3: `STOP_SENDING` with `H3_NO_ERROR`).
pub(crate) trait AnswerSink {
    /// A head with a status of 1xx, but never 101.
    async fn interim(&mut self, head: AnswerHead<'_>) -> io::Result<()>;

    /// The final head.
    async fn head(&mut self, head: AnswerHead<'_>, more: More) -> io::Result<()>;

    /// Some of the body, possibly none of it together with [`More::Ends`]. Returns when flow control has let all of
    /// it through to a queue whose length is bounded: a slow client slows its upstream and fills no memory here.
    async fn data(&mut self, data: &[u8], more: More) -> io::Result<()>;

    /// The trailer, which ends the answer: HTTP/1 field lines, to be taken apart by [`answer::fields`].
    async fn trailer(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Breaks the stream off. Never fails: a stream that is gone already needs no reset.
    fn reset(&mut self, why: Reset);
}
