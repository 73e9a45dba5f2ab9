//! Writes that are delayed because there is a limit on them, on their way to the gate: how one waits, and what ends that.
//! Nothing of it has left us, so one whose client leaves is never executed.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::port::{Passage, Port, Visitor};
use crate::error::RequestError;
use crate::http::deadline;
use crate::service::Eviction;
use crate::service::writes::{Delayed, Intent};

impl Port {
    /// Delayed: it keeps what a held request keeps, and the only things watched are whether its client leaves, or has no
    /// use for an answer any more.
    ///
    /// # Errors
    /// It does not go upstream.
    pub(super) async fn sit_out(
        &self,
        mut delayed: Delayed<'_>,
        visitor: &mut Visitor<'_>,
    ) -> Result<(), RequestError> {
        let since = Instant::now();
        self.limit(visitor.passage, visitor.head);
        if let Some(buffer) = &mut visitor.buffer {
            self.buffers.shrink(buffer);
        }
        let arrival = visitor.passage.terms.arrival;
        let deadline = deadline::of(visitor.head).and_then(|after| arrival.checked_add(after));
        let outcome = tokio::select! {
            biased;
            reason = visitor.presence.left(&self.hangup) => Err(RequestError::ClientLeft(reason)),
            () = reached(deadline) => Err(self.refusal(visitor.passage, visitor.head, Eviction::OutOfTime)),
            () = delayed.over() => Ok(()),
        };
        visitor.passage.delayed = since.elapsed();
        deadline::shorten(visitor.head, since.elapsed());
        if let Some(buffer) = &mut visitor.buffer {
            self.buffers.grow(buffer);
        }
        outcome
    }

    /// Counts a write that has its ticket.
    pub(crate) fn count_write(&self, passage: &Passage) {
        if passage.intent == Intent::Write {
            let shard = self.service.gate.shard(self.worker);
            shard.writes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Completes then; never, where there is no such moment.
async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
