//! Copies bytes both ways until both ends have finished, one has failed, or both were silent for too long.
//!
//! An end that finishes sending is passed on as such: half-closed connections stay half open.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::buffer::Buffers;
use crate::service::inflight::Progress;
use crate::stream::splice::{Silence, SpliceError};
use crate::stream::{self, Socket, Stream};

/// Pieces of this many bytes are worth a pipe.
const LARGE_BYTES: u64 = 16 * 1024;

/// Copies until it is over, however it ends; what is copied is added to the progress.
pub(crate) async fn tunnel(
    client: &Stream,
    upstream: &Stream,
    buffers: &Buffers,
    idle_max: Duration,
    progress: &Progress,
) {
    let touched = Cell::new(Instant::now());
    let up = Direction {
        from: client,
        to: upstream,
        moved: &progress.sent,
        touched: &touched,
    };
    let down = Direction {
        from: upstream,
        to: client,
        moved: &progress.answered,
        touched: &touched,
    };
    let both = async { tokio::try_join!(up.copy(buffers, idle_max), down.copy(buffers, idle_max)) };
    tokio::select! {
        biased;
        // An error ends both directions; whose it was makes no difference to what has been copied.
        _ = both => {}
        () = idle(&touched, idle_max) => {}
    }
}

async fn idle(touched: &Cell<Instant>, idle_max: Duration) {
    loop {
        let deadline = touched.get() + idle_max;
        if deadline <= Instant::now() {
            return;
        }
        sleep_until(deadline).await;
    }
}

struct Direction<'d> {
    from: &'d Stream,
    to: &'d Stream,
    moved: &'d Cell<u64>,
    touched: &'d Cell<Instant>,
}

impl Direction<'_> {
    /// Borrows a buffer only while bytes are under way. Once a read fills it, the rest is left to the kernel for as
    /// long as the pieces stay large.
    async fn copy(&self, buffers: &Buffers, idle_max: Duration) -> io::Result<()> {
        let mut bulk = false;
        loop {
            self.from.readable().await?;
            let step = match (bulk, self.from.plain(), self.to.plain()) {
                (true, Some(from), Some(to)) => self.splice(from, to, buffers, idle_max).await,
                _ => self.read_and_write(buffers, idle_max).await,
            };
            let (count, large) = match step {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                done => done?,
            };
            if count == 0 {
                self.to.finish();
                return Ok(());
            }
            bulk = large;
            self.moved.set(self.moved.get() + count);
            self.touched.set(Instant::now());
        }
    }

    /// Bytes moved, zero at the end, and whether there seem to be many more.
    async fn read_and_write(
        &self,
        buffers: &Buffers,
        idle_max: Duration,
    ) -> io::Result<(u64, bool)> {
        let mut buffer = buffers.take();
        let room = buffer.room();
        let size = room.len();
        let count = match self.from.try_read(room) {
            Ok(count) => count,
            Err(error) => {
                buffers.give(buffer);
                return Err(error);
            }
        };
        buffer.advance(count);
        let written =
            stream::write_all(self.to, &mut [IoSlice::new(buffer.filled())], idle_max).await;
        buffers.give(buffer);
        written.map_err(|failed| failed.source)?;
        Ok((count as u64, count == size))
    }

    async fn splice(
        &self,
        from: &Socket,
        to: &Socket,
        buffers: &Buffers,
        idle_max: Duration,
    ) -> io::Result<(u64, bool)> {
        let silence = Silence {
            read: idle_max,
            write: idle_max,
            waited: None,
        };
        match buffers.pipes.move_some(from, to, u64::MAX, silence).await {
            Ok(count) => Ok((count, count >= LARGE_BYTES)),
            Err(SpliceError::NoPipe) => self.read_and_write(buffers, idle_max).await,
            Err(SpliceError::Read(error) | SpliceError::Write(error)) => Err(error),
        }
    }
}
