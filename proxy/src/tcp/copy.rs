//! Copies bytes both ways until both ends have finished, one has failed, or both were silent for too long.
//!
//! An end that finishes sending is passed on as such: half-closed connections stay half open.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::buffer::Buffers;
use crate::stream::{self, Stream};

/// Bytes copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) to_upstream: u64,
    pub(crate) to_client: u64,
}

/// Copies until it is over, however it ends; what was copied is the answer.
pub(crate) async fn tunnel(
    client: &Stream,
    upstream: &Stream,
    buffers: &Buffers,
    idle_max: Duration,
) -> Moved {
    let (to_upstream, to_client) = (Cell::new(0), Cell::new(0));
    let touched = Cell::new(Instant::now());
    let up = Direction {
        from: client,
        to: upstream,
        moved: &to_upstream,
        touched: &touched,
    };
    let down = Direction {
        from: upstream,
        to: client,
        moved: &to_client,
        touched: &touched,
    };
    let both = async { tokio::try_join!(up.copy(buffers, idle_max), down.copy(buffers, idle_max)) };
    tokio::select! {
        biased;
        // An error ends both directions; whose it was makes no difference to what has been copied.
        _ = both => {}
        () = idle(&touched, idle_max) => {}
    }
    Moved {
        to_upstream: to_upstream.get(),
        to_client: to_client.get(),
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
    /// Borrows a buffer only while bytes are under way.
    async fn copy(&self, buffers: &Buffers, idle_max: Duration) -> io::Result<()> {
        loop {
            self.from.readable().await?;
            let mut buffer = buffers.take();
            let outcome = match self.from.try_read(buffer.room()) {
                Ok(0) => {
                    self.to.finish();
                    return Ok(());
                }
                Ok(count) => {
                    buffer.advance(count);
                    let written =
                        stream::write_all(self.to, &mut [IoSlice::new(buffer.filled())], idle_max)
                            .await;
                    self.moved.set(self.moved.get() + count as u64);
                    self.touched.set(Instant::now());
                    written.map_err(|failed| failed.source)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                Err(error) => Err(error),
            };
            buffers.give(buffer);
            outcome?;
        }
    }
}
