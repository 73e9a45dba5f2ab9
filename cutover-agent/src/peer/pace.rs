//! A limit on what all streams of a session send together. It never delays anything while there is no limit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How much a stream may write at once under a limit, in bytes: small beside what a slow limit gives in a second.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Hands out the moments at which pieces may be written.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Bytes a second; 0 for no limit.
    limit: AtomicU64,
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    /// Sets the limit for what is sent from now on.
    pub(super) fn set(&self, bytes_per_second: Option<u64>) {
        self.limit
            .store(bytes_per_second.unwrap_or(0), Ordering::Relaxed);
    }

    /// The limit, in bytes a second.
    pub(super) fn limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    /// Whether there is a limit at all.
    pub(super) fn is_set(&self) -> bool {
        self.limit.load(Ordering::Relaxed) > 0
    }

    /// Waits until so many bytes may be written.
    ///
    /// # Cancel safety
    /// Dropped while waiting, the bytes count as written.
    pub(super) async fn take(&self, bytes: usize) {
        if let Some(moment) = self.reserve(bytes, Instant::now()) {
            tokio::time::sleep_until(moment).await;
        }
    }

    /// A bucket of no depth: whoever comes later waits for all before.
    fn reserve(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == 0 {
            return None;
        }
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(begin + Duration::from_secs_f64(bytes as f64 / limit as f64));
        (begin > now).then_some(begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_all_streams_together_keep_to_the_limit() {
        let pace = Pace::default();
        let now = Instant::now();
        assert_eq!(pace.reserve(1 << 20, now), None, "no limit, no wait");
        pace.set(Some(1000));
        assert_eq!(pace.reserve(500, now), None, "the first one goes at once");
        let second = pace.reserve(500, now).unwrap();
        assert_eq!(second - now, Duration::from_millis(500));
        let third = pace.reserve(500, now + Duration::from_secs(9));
        assert_eq!(third, None, "a pause is not saved up");
    }
}
