//! Streams of bytes, whatever carries them, and reads and writes on them with a limit of silence.
//!
//! Both directions of a connection are served by one task, so nothing here needs exclusive access. The first
//! attempt goes straight to the kernel where that makes sense; a timer is armed only when there is a wait.

mod socket;
pub(crate) mod splice;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{timeout, timeout_at};

use crate::buffer::{Buffer, Buffers};
use crate::clock;
use crate::tls::stream::{Mark, TlsStream};

pub(crate) use socket::{Hearsay, Look, Socket};

/// Most that one [`AsyncRead`] brings: a record of TLS, or a large frame of HTTP/2.
const SCRATCH_BYTES: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A connection's bytes.
#[derive(Debug)]
pub(crate) enum Stream {
    /// As they are on the wire.
    Plain(Socket),
    /// Inside TLS. In a box, so that a plain connection does not pay for it.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Reads what is there; zero means the end. `WouldBlock` when nothing is known to be there.
    pub(crate) fn try_read(&self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_read(room),
            Self::Tls(stream) => stream.try_read(room),
        }
    }

    /// Hands over as much of the slices as goes without waiting. What was handed over may still need a flush.
    pub(crate) fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_write(slices),
            Self::Tls(stream) => stream.try_write(slices),
        }
    }

    /// Completes when a read may bring something: bytes, the end, or an error.
    pub(crate) fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_readable(context),
            Self::Tls(stream) => stream.poll_readable(context),
        }
    }

    /// Completes when a write that met `WouldBlock` is worth trying again.
    pub(crate) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_writable(context),
            Self::Tls(stream) => stream.poll_writable(context),
        }
    }

    /// Completes when all that was handed over has gone to the kernel.
    pub(crate) fn poll_flush(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => stream.poll_flush(context),
        }
    }

    /// Hands to the kernel what earlier writes left over; `WouldBlock` when it does not take all of it.
    pub(crate) fn try_flush(&self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.try_flush(),
        }
    }

    /// A place in what has been handed over, for [`Stream::left_since`].
    fn mark(&self) -> Option<Mark> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => Some(stream.mark()),
        }
    }

    /// How many of the `written` bytes handed over since the mark may have reached the peer: none, or all.
    fn left_since(&self, mark: Option<Mark>, written: usize) -> usize {
        match (self, mark) {
            (Self::Tls(stream), Some(mark)) if !stream.left_since(mark) => 0,
            _ => written,
        }
    }

    /// See [`Stream::poll_readable`].
    pub(crate) async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| self.poll_readable(context)).await
    }

    /// Tells a TLS peer that what it has is all, before the connection is dropped. In clear the end says so itself.
    /// Never after half an answer: the missing word is how the peer knows that it is half.
    pub(crate) fn farewell(&self) {
        if let Self::Tls(stream) = self {
            stream.say_farewell();
        }
    }

    /// Tells the peer that nothing more will come.
    pub(crate) fn finish(&self) {
        match self {
            // A peer that is gone already needs no telling.
            Self::Plain(socket) => drop(socket.finish()),
            Self::Tls(stream) => stream.finish(),
        }
    }

    /// The socket, where its bytes are the stream's bytes.
    pub(crate) const fn plain(&self) -> Option<&Socket> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Tls(_) => None,
        }
    }

    /// The socket below, whatever runs on it.
    pub(crate) const fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.socket(),
        }
    }

    /// Whether the peer has sent something that nobody has read.
    pub(crate) fn has_unread(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.has_unread(),
            Self::Tls(stream) => stream.has_unread(),
        }
    }

    /// Neither closed nor talking. Asks the kernel, not the reactor: the answer is as fresh as can be.
    pub(crate) fn is_silent(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.is_silent(),
            Self::Tls(stream) => stream.is_silent(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Whoever reads this way offers a large room that nobody has written to. To clear it for each read costs more
        // than to copy what has come.
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(SCRATCH_BYTES, 0);
            let most = buffer.remaining().min(SCRATCH_BYTES);
            loop {
                match self.try_read(&mut scratch[..most]) {
                    Ok(count) => {
                        buffer.put_slice(&scratch[..count]);
                        return Poll::Ready(Ok(()));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready!(self.poll_readable(context))?;
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
        })
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.poll_writable(context))?;
                }
                done => return Poll::Ready(done),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_flush(&self, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Self::poll_flush(&self, context))?;
        self.finish();
        Poll::Ready(Ok(()))
    }
}

/// Runs a future to its end, or to the end of its time: `None`. Without a limit there is no timer.
///
/// # Cancel safety
/// That of the future.
pub(crate) async fn within<T>(
    limit: Option<Duration>,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = pin!(future);
    let mut timer = limit.map(|limit| Box::pin(tokio::time::sleep(limit)));
    poll_fn(|context| {
        if let Poll::Ready(done) = future.as_mut().poll(context) {
            return Poll::Ready(Some(done));
        }
        match &mut timer {
            Some(timer) => timer.as_mut().poll(context).map(|()| None),
            None => Poll::Pending,
        }
    })
    .await
}

/// A write that did not complete.
#[derive(Debug)]
pub(crate) struct WriteFailed {
    /// Bytes of this write that may have reached the peer. Zero proves that nothing did.
    pub(crate) written: usize,
    /// What the system said; `TimedOut` for a peer that took nothing for too long.
    pub(crate) source: io::Error,
}

/// Reads what is there into the buffer, waiting at most `silence` for the first byte. Zero means that the peer has
/// closed its end, or that the buffer is full. An empty buffer is lent for the read only, not for the wait.
pub(crate) async fn read(
    stream: &Stream,
    buffers: &Buffers,
    buffer: &mut Buffer,
    silence: Duration,
) -> io::Result<usize> {
    loop {
        buffers.grow(buffer);
        match stream.try_read(buffer.room()) {
            Ok(count) => {
                buffer.advance(count);
                // The runtime cannot interrupt a task whose reads always succeed.
                tokio::task::consume_budget().await;
                return Ok(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                buffers.give_empty(buffer);
                timeout_at(clock::end_of(silence).into(), stream.readable())
                    .await
                    .map_err(|_| io::ErrorKind::TimedOut)??;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Writes all slices in order, waiting at most `silence` each time the peer takes nothing.
pub(crate) async fn write_all(
    stream: &Stream,
    mut slices: &mut [IoSlice<'_>],
    silence: Duration,
) -> Result<(), WriteFailed> {
    let mark = stream.mark();
    let mut written = 0;
    let failed = |written, source| WriteFailed {
        written: stream.left_since(mark, written),
        source,
    };
    // One slice is sent by a cheaper call than one among empty ones.
    let used = slices.iter().rposition(|slice| !slice.is_empty());
    slices = &mut slices[..used.map_or(0, |last| last + 1)];
    // Skips empty slices in front, so that an all-empty write ends at once.
    IoSlice::advance_slices(&mut slices, 0);
    loop {
        let attempt = if slices.is_empty() {
            stream.try_flush().map(|()| None)
        } else {
            stream.try_write(slices).map(Some)
        };
        match attempt {
            Ok(None) => break,
            Ok(Some(0)) => return Err(failed(written, io::ErrorKind::WriteZero.into())),
            Ok(Some(count)) => {
                written += count;
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let writable = poll_fn(|context| stream.poll_writable(context));
                let writable = timeout_at(clock::end_of(silence).into(), writable)
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                writable.map_err(|source| failed(written, source))?;
            }
            Err(source) => return Err(failed(written, source)),
        }
    }
    tokio::task::consume_budget().await;
    Ok(())
}

/// Finishes our side and reads what a refused peer still sends, so that our answer is not lost to a reset (RFC
/// 9112, section 9.6). Ends at the peer's close or after `limit`.
pub(crate) async fn linger(
    stream: &Stream,
    buffers: &Buffers,
    buffer: &mut Buffer,
    limit: Duration,
) {
    stream.finish();
    let until_closed = async {
        loop {
            buffer.consume(usize::MAX);
            if !matches!(read(stream, buffers, buffer, limit).await, Ok(1..)) {
                return;
            }
        }
    };
    drop(timeout(limit, until_closed).await);
}
