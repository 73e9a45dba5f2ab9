//! Moves one message body from one connection to another, in whatever framing each side needs.
//!
//! A body is never collected: what one read brings is written before the next read, in one system call together
//! with the head or the chunk framing around it.

use std::cell::Cell;
use std::io::{self, IoSlice, Write};
use std::time::{Duration, Instant};

use super::chunked::{ChunkError, Chunks, Piece};
use super::head::Framing;
use super::response::Encoding;
use crate::buffer::{Buffer, Buffers};
use crate::limit::intake::Intake;
use crate::stream::splice::{Silence, SpliceError};
use crate::stream::{self, Hearsay, Socket, Stream, WriteFailed};

/// Below it, a few reads and writes are cheaper than the pipe.
const SPLICE_BYTES_MIN: u64 = 64 * 1024;

/// What is still to come of a body.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    /// This many bytes; none at all for an empty body.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
    /// Everything until the close.
    UntilClose,
}

impl Body {
    pub(crate) const fn new(framing: Framing) -> Self {
        match framing {
            Framing::Empty => Self::Length(0),
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunks::new()),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    /// What of these bytes is body.
    pub(super) fn take(&mut self, bytes: &mut [u8]) -> Result<Piece, ChunkError> {
        match self {
            Self::Length(left) => {
                let count = usize::try_from(*left)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                *left -= count as u64;
                Ok(Piece {
                    start: 0,
                    end: count,
                    used: count,
                    last: *left == 0,
                })
            }
            Self::Chunked(chunks) => chunks.decode(bytes),
            Self::UntilClose => Ok(Piece {
                start: 0,
                end: bytes.len(),
                used: bytes.len(),
                last: false,
            }),
        }
    }

    pub(super) fn trailer(&self) -> &[u8] {
        match self {
            Self::Chunked(chunks) => chunks.trailer(),
            Self::Length(_) | Self::UntilClose => &[],
        }
    }
}

/// From where to where, and how long each end may be silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route<'s> {
    pub(crate) from: &'s Stream,
    pub(crate) to: &'s Stream,
    pub(crate) buffers: &'s Buffers,
    pub(crate) read_silence: Duration,
    pub(crate) write_silence: Duration,
    /// How much is taken and how slowly, where that is limited.
    pub(crate) intake: Option<&'s Intake<'s>>,
}

/// Which end failed.
#[derive(Debug)]
pub(crate) enum RelayError {
    Read(io::Error),
    Chunk(ChunkError),
    Write(WriteFailed),
    /// More came than is taken.
    TooLong,
    /// It came more slowly than is borne with.
    TooSlow,
}

/// Writes `prefix` and then the body. `moved` counts bytes written, framing included.
///
/// The buffer is consumed only after a write has succeeded; a counted body whose first write fails with nothing
/// written is therefore still whole.
pub(crate) async fn relay(
    route: Route<'_>,
    buffer: &mut Buffer,
    body: &mut Body,
    encoding: Encoding,
    mut prefix: &[u8],
    moved: &Cell<u64>,
) -> Result<(), RelayError> {
    loop {
        let piece = body.take(buffer.filled_mut()).map_err(RelayError::Chunk)?;
        let data = &buffer.filled()[piece.start..piece.end];
        if let Some(intake) = route.intake {
            intake.take(data.len()).map_err(|_| RelayError::TooLong)?;
        }
        if !prefix.is_empty() || !data.is_empty() || piece.last {
            let end = if piece.last {
                End::Here(body.trailer())
            } else {
                End::Later
            };
            if encoding == Encoding::Plain && piece.used == buffer.filled().len() {
                announce_splice(route, body);
            }
            let count = write(route, prefix, data, encoding, end)
                .await
                .map_err(RelayError::Write)?;
            moved.set(moved.get() + count);
            prefix = &[];
        }
        buffer.consume(piece.used);
        if piece.last {
            return Ok(());
        }
        if buffer.is_empty()
            && encoding == Encoding::Plain
            && splice_rest(route, body, moved).await?
        {
            return Ok(());
        }
        let count = read(route, buffer).await?;
        if count == 0 {
            if !matches!(body, Body::UntilClose) {
                return Err(RelayError::Read(io::ErrorKind::UnexpectedEof.into()));
            }
            let count = write(route, &[], &[], encoding, End::Here(&[]))
                .await
                .map_err(RelayError::Write)?;
            moved.set(moved.get() + count);
            return Ok(());
        }
    }
}

impl Route<'_> {
    /// How long to wait for the sender before its pace is looked at, or its silence is the end.
    fn patience(&self) -> Duration {
        let silence = self.read_silence;
        self.intake
            .map_or(silence, |intake| intake.wait_max(silence))
    }

    fn waited(&self, time: Duration, bytes: u64) -> Result<(), RelayError> {
        self.intake.map_or(Ok(()), |intake| {
            let in_time = intake.waited(time, bytes);
            in_time.map_err(|_| RelayError::TooSlow)
        })
    }

    /// Whether a wait ended only so that the pace could be looked at.
    fn may_go_on(&self, error: &io::Error, patience: Duration) -> bool {
        error.kind() == io::ErrorKind::TimedOut && patience < self.read_silence
    }
}

/// Reads some more of a body.
async fn read(route: Route<'_>, buffer: &mut Buffer) -> Result<usize, RelayError> {
    if route.intake.is_none() {
        let read = stream::read(route.from, route.buffers, buffer, route.read_silence);
        return read.await.map_err(RelayError::Read);
    }
    loop {
        let patience = route.patience();
        let began = Instant::now();
        let read = stream::read(route.from, route.buffers, buffer, patience).await;
        route.waited(began.elapsed(), *read.as_ref().unwrap_or(&0) as u64)?;
        match read {
            Err(error) if route.may_go_on(&error, patience) => {}
            read => return read.map_err(RelayError::Read),
        }
    }
}

/// The two ends, where the kernel may move the rest of a body between them.
fn spliceable<'s>(route: Route<'s>, body: &Body) -> Option<(&'s Socket, &'s Socket)> {
    match body {
        Body::Length(left) if *left >= SPLICE_BYTES_MIN => {
            Some((route.from.plain()?, route.to.plain()?))
        }
        _ => None,
    }
}

/// Lets what is written next go in one packet with what the kernel will move behind it, if any of that has come.
fn announce_splice(route: Route<'_>, body: &Body) {
    if let Some((from, to)) = spliceable(route, body)
        && from.hearsay() == Hearsay::Readable
    {
        to.announce_more();
    }
}

/// Leaves the rest of a large counted body to the kernel, where both ends are plain sockets. False when it is not
/// to be had.
async fn splice_rest(
    route: Route<'_>,
    body: &mut Body,
    moved: &Cell<u64>,
) -> Result<bool, RelayError> {
    let (Some((from, to)), Body::Length(left)) = (spliceable(route, body), body) else {
        return Ok(false);
    };
    while *left > 0 {
        let waited = Cell::new(Duration::ZERO);
        let patience = route.patience();
        let silence = Silence {
            read: patience,
            write: route.write_silence,
            waited: route.intake.map(|_| &waited),
        };
        let moving = route.buffers.pipes.move_some(from, to, *left, silence);
        let outcome = moving.await;
        route.waited(waited.get(), *outcome.as_ref().unwrap_or(&0))?;
        match outcome {
            Ok(0) => return Err(RelayError::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                *left -= count;
                moved.set(moved.get() + count);
            }
            Err(SpliceError::NoPipe) => {
                to.push();
                return Ok(false);
            }
            Err(SpliceError::Read(error)) if route.may_go_on(&error, patience) => {}
            Err(SpliceError::Read(error)) => return Err(RelayError::Read(error)),
            Err(SpliceError::Write(source)) => {
                // Some of the piece may have gone.
                return Err(RelayError::Write(WriteFailed { written: 1, source }));
            }
        }
    }
    Ok(true)
}

/// Whether a body ends with this write, and with which trailer lines.
pub(super) enum End<'t> {
    Later,
    Here(&'t [u8]),
}

pub(super) async fn write(
    route: Route<'_>,
    prefix: &[u8],
    data: &[u8],
    encoding: Encoding,
    end: End<'_>,
) -> Result<u64, WriteFailed> {
    // Sixteen hexadecimal digits, CR and LF.
    let mut size = [0; 18];
    let mut size_bytes: &[u8] = &[];
    let mut after: &[u8] = &[];
    let (mut last, mut trailer, mut done): (&[u8], &[u8], &[u8]) = (&[], &[], &[]);
    if encoding == Encoding::Chunked {
        if !data.is_empty() {
            let mut rest = &mut size[..];
            // The array has room for the longest size there is.
            drop(write!(rest, "{:x}\r\n", data.len()));
            let unused = rest.len();
            size_bytes = &size[..size.len() - unused];
            after = b"\r\n";
        }
        if let End::Here(lines) = end {
            (last, trailer, done) = (b"0\r\n", lines, b"\r\n");
        }
    }
    let parts = [prefix, size_bytes, data, after, last, trailer, done];
    let count = parts.iter().map(|part| part.len() as u64).sum();
    let mut slices = parts.map(IoSlice::new);
    stream::write_all(route.to, &mut slices, route.write_silence).await?;
    Ok(count)
}
