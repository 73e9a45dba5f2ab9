//! The time, for those to whom a hundredth of a second makes no difference: limits of waiting, and how long something
//! has been idle. Never for what is measured or told.
//!
//! Where the kernel's clock source can be read by a program, the precise clock costs some thirty nanoseconds, and
//! where it cannot (hpet, acpi_pm and the like), a system call (vdso(7)). The time of the kernel's last tick is a read
//! of memory everywhere. So the precise clock is read once a tick at most.

use std::cell::Cell;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Longest time between two ticks: kernels make 100 to 1,000 of them a second.
const TICK_MAX: Duration = Duration::from_millis(10);
/// As good as never.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

thread_local! {
    /// A tick, by the kernel's seconds and nanoseconds, and when this thread first saw it.
    static SEEN: Cell<Option<(i64, i64, Instant)>> = const { Cell::new(None) };
}

/// Some time within the last tick; never later than now, never earlier than what this thread was told before.
pub(crate) fn recently() -> Instant {
    let tick = clock_gettime(ClockId::MonotonicCoarse);
    let (seconds, nanoseconds) = (tick.tv_sec, tick.tv_nsec);
    SEEN.with(|seen| match seen.get() {
        Some((s, ns, instant)) if (s, ns) == (seconds, nanoseconds) => instant,
        _ => {
            let now = Instant::now();
            seen.set(Some((seconds, nanoseconds, now)));
            now
        }
    })
}

/// When a time of this length that begins now is over: not earlier, and a tick or two later at most.
pub(crate) fn end_of(length: Duration) -> Instant {
    let now = recently() + TICK_MAX;
    now.checked_add(length).unwrap_or(now + FAR)
}

/// As many as fit: 584 years.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recently_is_not_in_the_future_and_does_not_go_back() {
        let mut before = recently();
        for _ in 0..10_000 {
            let (seen, now) = (recently(), Instant::now());
            assert!(before <= seen && seen <= now);
            before = seen;
        }
    }

    #[test]
    fn a_time_is_over_no_earlier_than_it_should_be_and_the_longest_never() {
        let length = Duration::from_millis(3);
        for _ in 0..1_000 {
            let began = Instant::now();
            assert!(end_of(length) >= began + length);
        }
        assert!(end_of(Duration::MAX) > Instant::now() + FAR / 2);
    }
}
