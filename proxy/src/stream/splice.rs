//! Large bodies and raw streams between two plain sockets, moved inside the kernel by splice(2): no byte is copied
//! into the process.
//!
//! Every piece goes through a pipe of the worker's. A pipe is lent for as long as bytes are in it, not for the wait
//! for more; one that could not be emptied is closed, never lent again.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::time::timeout;

use super::Socket;

/// Bytes a pipe is asked to hold. The kernel lets every user have 1 MiB pipes, but only 64 MiB of pipes in all
/// (pipe(7)); a pipe that stays smaller works as well.
const PIPE_BYTES: usize = 512 * 1024;
/// Pipes a worker keeps for later.
const SPARE_MAX: usize = 32;

/// A worker's pipes.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    spare: RefCell<Vec<Pipe>>,
}

#[derive(Debug)]
struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// Which end of a splice failed, and how.
#[derive(Debug)]
pub(crate) enum SpliceError {
    /// There are no more pipes to be had; nothing was moved.
    NoPipe,
    /// The sender failed, or was silent for too long.
    Read(io::Error),
    /// The receiver failed, or took nothing for too long.
    Write(io::Error),
}

/// Limits of silence at each end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Silence<'w> {
    pub(crate) read: Duration,
    pub(crate) write: Duration,
    /// Grows by the time spent waiting for the sender, where anybody wants to know.
    pub(crate) waited: Option<&'w Cell<Duration>>,
}

impl Pipes {
    fn take(&self) -> Result<Pipe, SpliceError> {
        if let Some(pipe) = self.spare.borrow_mut().pop() {
            return Ok(pipe);
        }
        let flags = PipeFlags::NONBLOCK | PipeFlags::CLOEXEC;
        let (reader, writer) = pipe_with(flags).map_err(|_| SpliceError::NoPipe)?;
        // Past the user's share of pipe memory the pipe keeps its first size.
        fcntl_setpipe_size(&writer, PIPE_BYTES).ok();
        Ok(Pipe { reader, writer })
    }

    fn give(&self, pipe: Pipe) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_MAX {
            spare.push(pipe);
        }
    }

    /// Moves what the sender has, at most `most` bytes, waiting for it and for the receiver. Zero means that the
    /// sender has finished.
    ///
    /// # Cancel safety
    /// None: after a drop both connections must be closed.
    pub(crate) async fn move_some(
        &self,
        from: &Socket,
        to: &Socket,
        most: u64,
        silence: Silence<'_>,
    ) -> Result<u64, SpliceError> {
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(PIPE_BYTES);
        let (pipe, count) = loop {
            let pipe = self.take()?;
            match fill(&pipe, from, most) {
                Ok(0) => {
                    self.give(pipe);
                    return Ok(0);
                }
                Ok(count) => break (pipe, count),
                Err(error) => {
                    self.give(pipe);
                    if error.kind() != io::ErrorKind::WouldBlock {
                        return Err(SpliceError::Read(error));
                    }
                }
            }
            let began = silence.waited.map(|waited| (waited, Instant::now()));
            let readable = timeout(silence.read, poll_fn(|context| from.poll_readable(context)));
            let readable = timed(readable.await);
            if let Some((waited, began)) = began {
                waited.set(waited.get() + began.elapsed());
            }
            readable.map_err(SpliceError::Read)?;
        };
        let mut left = count;
        while left > 0 {
            match empty(&pipe, to, left) {
                Ok(written) => left -= written.min(left),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let writable =
                        timeout(silence.write, poll_fn(|context| to.poll_writable(context)));
                    timed(writable.await).map_err(SpliceError::Write)?;
                }
                Err(error) => return Err(SpliceError::Write(error)),
            }
        }
        self.give(pipe);
        tokio::task::consume_budget().await;
        Ok(count as u64)
    }
}

fn timed(waited: Result<io::Result<()>, tokio::time::error::Elapsed>) -> io::Result<()> {
    waited.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The pipe is empty, so "would block" can only mean the socket.
fn fill(pipe: &Pipe, from: &Socket, most: usize) -> io::Result<usize> {
    from.try_with_readable(|socket| splice_now(socket, &pipe.writer, most))
}

fn empty(pipe: &Pipe, to: &Socket, left: usize) -> io::Result<usize> {
    match splice_now(&pipe.reader, to, left)? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        count => Ok(count),
    }
}

fn splice_now(
    from: &impl std::os::fd::AsFd,
    to: &impl std::os::fd::AsFd,
    most: usize,
) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    let moved = rustix::io::retry_on_intr(|| splice(from, None, to, None, most, flags));
    Ok(moved?)
}
