//! How slowly a client may send a body: a number of bytes in every window of time that we spent waiting for it.
//!
//! Only waiting for the client counts. While we hold, or wait for the upstream to take what we have, the pace
//! stands still: a client must never be blamed for our slowness. The first window is the grace every body has.

use std::time::Duration;

/// What a window must bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PaceLimit {
    /// Bytes for each second of it; zero asks for nothing.
    pub(crate) bytes_per_s_min: u64,
    /// How long it is.
    pub(crate) window: Duration,
}

impl PaceLimit {
    fn window_bytes(self) -> u128 {
        u128::from(self.bytes_per_s_min) * self.window.as_millis() / 1000
    }
}

/// A body that comes more slowly than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooSlow;

/// The pace of one body.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    limit: PaceLimit,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    pub(crate) const fn new(limit: PaceLimit) -> Self {
        Self {
            limit,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// How long the next wait for the client may be before [`Pace::waited`] has to be asked; `None` for as long as
    /// other limits allow.
    pub(crate) fn wait_max(&self) -> Option<Duration> {
        (self.limit.bytes_per_s_min > 0).then(|| self.limit.window.saturating_sub(self.waited))
    }

    /// Bytes came.
    pub(crate) const fn received(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// We waited for the client for so long, whether or not anything came of it. Tell first what came.
    ///
    /// # Errors
    /// A window has passed and brought too little.
    pub(crate) fn waited(&mut self, time: Duration) -> Result<(), TooSlow> {
        self.waited = self.waited.saturating_add(time);
        if self.limit.bytes_per_s_min == 0 || self.waited < self.limit.window {
            return Ok(());
        }
        if u128::from(self.bytes) < self.limit.window_bytes() {
            return Err(TooSlow);
        }
        self.waited = Duration::ZERO;
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: PaceLimit = PaceLimit {
        bytes_per_s_min: 100,
        window: Duration::from_secs(10),
    };

    #[test]
    fn a_window_must_bring_its_bytes_and_not_one_less() {
        for (bytes, verdict) in [(1_000, Ok(())), (999, Err(TooSlow))] {
            let mut pace = Pace::new(LIMIT);
            assert_eq!(pace.wait_max(), Some(Duration::from_secs(10)));
            assert_eq!(pace.waited(Duration::from_secs(4)), Ok(()));
            pace.received(bytes);
            assert_eq!(pace.wait_max(), Some(Duration::from_secs(6)));
            assert_eq!(pace.waited(Duration::from_secs(6)), verdict);
        }
    }

    #[test]
    fn a_fast_start_does_not_pay_for_a_slow_end() {
        let mut pace = Pace::new(LIMIT);
        pace.received(1 << 30);
        assert_eq!(pace.waited(Duration::from_secs(10)), Ok(()));
        pace.received(999);
        assert_eq!(pace.waited(Duration::from_secs(10)), Err(TooSlow));
    }

    #[test]
    fn what_is_not_limited_may_take_for_ever() {
        let mut pace = Pace::new(PaceLimit {
            bytes_per_s_min: 0,
            ..LIMIT
        });
        assert_eq!(pace.wait_max(), None);
        assert_eq!(pace.waited(Duration::MAX), Ok(()));
        assert_eq!(pace.waited(Duration::MAX), Ok(()));
    }

    proptest! {
        #[test]
        fn a_client_at_the_least_pace_is_never_too_slow(steps in proptest::collection::vec(1_u64..5_000, 1..200)) {
            let mut pace = Pace::new(LIMIT);
            for ms in steps {
                // A tenth of a byte a millisecond, rounded up.
                pace.received((ms * LIMIT.bytes_per_s_min).div_ceil(1000));
                prop_assert_eq!(pace.waited(Duration::from_millis(ms)), Ok(()));
            }
        }
    }
}
