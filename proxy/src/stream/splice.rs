//! Large bodies and raw streams between two plain sockets, moved inside the kernel by splice(2): no byte is copied
//! into the process.
//!
//! Every piece goes through a pipe of the worker's. A pipe is lent for as long as bytes are in it, not for the wait
//! for more; one that could not be emptied is closed, never lent again.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::time::timeout_at;

use super::{Hearsay, Socket};
use crate::clock;

/// Bytes a pipe is asked to hold. The kernel lets every user have 1 MiB pipes, but only 64 MiB of pipes in all
/// (pipe(7)); a pipe that stays smaller works as well.
const PIPE_BYTES: usize = 512 * 1024;
/// Most bytes that are moved at once, so that others have their turn. A pipe holds more than it was asked for: a place
/// for a page has room for a whole fragment of what the network brought, 32 KiB of it.
const LOAD_BYTES_MAX: usize = 4 * 1024 * 1024;
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

/// Bytes on their way through a pipe.
#[derive(Debug)]
pub(crate) struct Load {
    pipe: Pipe,
    left: usize,
    /// The sender failed after these bytes.
    failed: Option<io::Error>,
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

    /// Takes what the sender has now, at most `most` bytes, into a pipe. `None` when the sender has finished,
    /// `WouldBlock` when nothing is known to be there.
    pub(crate) fn load(&self, from: &Socket, most: usize) -> Result<Option<Load>, SpliceError> {
        let pipe = self.take()?;
        match fill(&pipe, from, most.min(LOAD_BYTES_MAX)) {
            Ok(0) => {
                self.give(pipe);
                Ok(None)
            }
            Ok(left) => Ok(Some(Load {
                pipe,
                left,
                failed: None,
            })),
            Err(error) => {
                self.give(pipe);
                Err(SpliceError::Read(error))
            }
        }
    }

    /// Keeps the pipe of a load that has been delivered for the next one, and closes any other.
    ///
    /// # Errors
    /// The sender's, if it failed meanwhile.
    pub(crate) fn unload(&self, load: Load) -> io::Result<()> {
        if load.left == 0 {
            self.give(load.pipe);
        }
        load.failed.map_or(Ok(()), Err)
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
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let mut load = loop {
            match self.load(from, most) {
                Ok(Some(load)) => break load,
                Ok(None) => return Ok(0),
                Err(SpliceError::Read(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            to.push();
            let began = silence.waited.map(|waited| (waited, Instant::now()));
            let readable = within(silence.read, |context| from.poll_readable(context)).await;
            if let Some((waited, began)) = began {
                waited.set(waited.get() + began.elapsed());
            }
            readable.map_err(SpliceError::Read)?;
        };
        let mut count = load.left;
        while load.left > 0 {
            match load.deliver(to) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    count += load.top_up(from, most - count);
                    let writable = within(silence.write, |context| to.poll_writable(context)).await;
                    writable.map_err(SpliceError::Write)?;
                }
                Err(error) => return Err(SpliceError::Write(error)),
            }
        }
        self.unload(load).map_err(SpliceError::Read)?;
        tokio::task::consume_budget().await;
        Ok(count as u64)
    }
}

impl Load {
    /// Bytes that are still in the pipe.
    pub(crate) const fn left(&self) -> usize {
        self.left
    }

    /// While the receiver takes nothing: adds what the sender has and the pipe has room for, at most `most` bytes, so
    /// that the sender need not stop as well, and stops listening to it. Says how many that were.
    pub(crate) fn top_up(&mut self, from: &Socket, most: usize) -> usize {
        let count = self.add(from, most);
        from.unwatch();
        count
    }

    fn add(&mut self, from: &Socket, most: usize) -> usize {
        if most == 0 || self.failed.is_some() || from.hearsay() == Hearsay::Silent {
            return 0;
        }
        match splice_now(from, &self.pipe.writer, most.min(LOAD_BYTES_MAX)) {
            Ok(count) => {
                self.left += count;
                return count;
            }
            // It may mean the pipe, so the reactor is told nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The socket says it once.
            Err(error) => self.failed = Some(error),
        }
        0
    }

    /// Hands over as much as the receiver takes without waiting; `WouldBlock` when that is nothing.
    pub(crate) fn deliver(&mut self, to: &Socket) -> io::Result<usize> {
        let count = to.try_splice(|socket| splice_now(&self.pipe.reader, socket, self.left))?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.left -= count.min(self.left);
        Ok(count)
    }
}

/// Waits for as long as `limit`.
async fn within(
    limit: Duration,
    poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<()>>,
) -> io::Result<()> {
    let waited = timeout_at(clock::end_of(limit).into(), poll_fn(poll)).await;
    waited.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The pipe is empty, so "would block" can only mean the socket.
fn fill(pipe: &Pipe, from: &Socket, most: usize) -> io::Result<usize> {
    from.try_with_readable(|socket| splice_now(socket, &pipe.writer, most))
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
