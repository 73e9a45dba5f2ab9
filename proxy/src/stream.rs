//! Reads and writes on a shared `&TcpStream`, each with its limit of silence.
//!
//! Both directions of a connection are served by one task, so nothing here needs exclusive access. The first
//! attempt goes straight to the kernel; a timer is armed only when it has to wait.

use std::io::{self, IoSlice};
use std::time::Duration;

use rustix::net::{RecvFlags, Shutdown};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::buffer::Buffer;

/// A write that did not complete.
#[derive(Debug)]
pub(crate) struct WriteFailed {
    /// Bytes of this write that may have reached the peer. Zero proves that nothing did.
    pub(crate) written: usize,
    /// What the system said; `TimedOut` for a peer that took nothing for too long.
    pub(crate) source: io::Error,
}

/// Reads what is there into the buffer, waiting at most `silence` for the first byte. Zero means that the peer has
/// closed its end, or that the buffer is full.
pub(crate) async fn read(
    stream: &TcpStream,
    buffer: &mut Buffer,
    silence: Duration,
) -> io::Result<usize> {
    loop {
        match stream.try_read(buffer.room()) {
            Ok(count) => {
                buffer.advance(count);
                // The runtime cannot interrupt a task whose reads always succeed.
                tokio::task::consume_budget().await;
                return Ok(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                timeout(silence, stream.readable())
                    .await
                    .map_err(|_| io::ErrorKind::TimedOut)??;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Writes all slices in order, waiting at most `silence` each time the peer takes nothing.
pub(crate) async fn write_all(
    stream: &TcpStream,
    mut slices: &mut [IoSlice<'_>],
    silence: Duration,
) -> Result<(), WriteFailed> {
    let mut written = 0;
    // Skips empty slices in front, so that an all-empty write ends at once.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.try_write_vectored(slices) {
            Ok(0) => {
                return Err(WriteFailed {
                    written,
                    source: io::ErrorKind::WriteZero.into(),
                });
            }
            Ok(count) => {
                written += count;
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let writable = timeout(silence, stream.writable()).await;
                let writable = writable.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                writable.map_err(|source| WriteFailed { written, source })?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(WriteFailed { written, source }),
        }
    }
    tokio::task::consume_budget().await;
    Ok(())
}

/// Tells the peer that nothing more will come.
pub(crate) fn finish(stream: &TcpStream) {
    // A peer that is gone already needs no telling.
    rustix::net::shutdown(stream, Shutdown::Write).ok();
}

/// Finishes our side and reads what a refused peer still sends, so that our answer is not lost to a reset (RFC
/// 9112, section 9.6). Ends at the peer's close or after `limit`.
pub(crate) async fn linger(stream: &TcpStream, buffer: &mut Buffer, limit: Duration) {
    finish(stream);
    let until_closed = async {
        loop {
            buffer.consume(usize::MAX);
            if !matches!(read(stream, buffer, limit).await, Ok(1..)) {
                return;
            }
        }
    };
    drop(timeout(limit, until_closed).await);
}

/// Whether the peer has sent bytes that are still in the kernel. Does not look at a closed end.
pub(crate) fn has_unread(stream: &TcpStream) -> bool {
    let mut byte = [0; 1];
    matches!(
        rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT),
        Ok((1.., _))
    )
}
