//! Points in time small enough for an atomic number.
//!
//! Whoever decides something gets its [`Instant`] from the caller; nothing here reads a clock but for the origin all
//! moments are counted from.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::clock::nanoseconds;

/// All moments are counted from here, less a day: an instant taken shortly before is still a moment.
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
/// One day, in nanoseconds. Also makes zero free to mean "never".
const DAY_NS: u64 = 24 * 3600 * 1_000_000_000;

/// Nanoseconds on this process's own clock; they last for five centuries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(pub(crate) u64);

impl Moment {
    /// Before every instant.
    pub(crate) const NEVER: Self = Self(0);

    /// The moment of an instant.
    pub(crate) fn of(instant: Instant) -> Self {
        let origin = *ORIGIN;
        let since = nanoseconds(instant.saturating_duration_since(origin));
        let before = nanoseconds(origin.saturating_duration_since(instant));
        Self(DAY_NS.saturating_add(since).saturating_sub(before).max(1))
    }

    /// Later by `duration`.
    pub(crate) fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanoseconds(duration)))
    }

    /// Time from `earlier` to here; zero if it is not earlier.
    pub(crate) const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_keeps_the_order_and_the_distance_of_instants() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let (early, late) = (Moment::of(now), Moment::of(now + second));
        assert!(Moment::NEVER < early && early < late);
        assert_eq!(late.since(early), second);
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(early.plus(second), late);
    }
}
