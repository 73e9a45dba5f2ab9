//! The one clock of clients, origins and the lab: it runs alike in all processes of a machine, so that their notes can
//! be compared.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the machine started.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}
