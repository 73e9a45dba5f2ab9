//! The budget of what is held: how full it is, and what is done before anybody is refused.
//!
//! Everything in the middle is a pure function of two numbers. A tier is entered at its share of the budget and left
//! only [`HYSTERESIS_PERCENT`] below it, so that whoever was stopped is not started and stopped with each request.
//! Nothing here refuses anybody: that is the queue's, when nothing is left of the budget.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use cutover_protocol::hold::Tier;
use tokio::sync::Notify;

/// Share of the budget, in hundredths, from which on no more is read of clients that are connected.
const READING_PERCENT: u64 = 80;
/// The same for new connections. The tenth between the two is for those who were being accepted when reading stopped.
const ACCEPTING_PERCENT: u64 = 90;
/// So many hundredths below its share a tier is left.
const HYSTERESIS_PERCENT: u64 = 10;

/// All tiers, in the order in which they are entered.
pub(crate) const TIERS: [Tier; 4] = [
    Tier::Park,
    Tier::StopReading,
    Tier::StopAccepting,
    Tier::Refuse,
];

/// What becomes of whoever does not fit any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum WhenFull {
    /// It waits unread, or in the kernel, and is refused only when all of the budget is used.
    #[default]
    Wait,
    /// It is refused.
    Refuse,
}

/// What may be held; zero for no limit of its own, except for the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BudgetLimits {
    pub(crate) held_max: u64,
    pub(crate) held_bytes_max: u64,
    /// Held of one client address.
    pub(crate) held_per_address_max: u64,
    /// Whether readers and listeners stop before anybody is refused.
    pub(crate) when_full: WhenFull,
}

/// What is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
}

impl BudgetLimits {
    /// Whether one more of so many bytes fits.
    pub(super) const fn has_room(&self, usage: Usage, bytes: u64) -> bool {
        let fits = self.held_bytes_max == 0 || usage.bytes + bytes <= self.held_bytes_max;
        usage.count < self.held_max && fits
    }

    /// The tier for this usage, after the one before.
    pub(crate) fn judge(&self, before: Tier, usage: Usage) -> Tier {
        let has_reached = |percent: u64| {
            let of = |used: u64, most: u64| {
                used > 0 && most > 0 && used >= (most * percent).div_ceil(100)
            };
            of(usage.count, self.held_max) || of(usage.bytes, self.held_bytes_max)
        };
        if self.when_full == WhenFull::Refuse || self.held_max == 0 {
            return Tier::Park;
        }
        let is_in = |tier: Tier, percent: u64| {
            let stays = before >= tier && has_reached(percent - HYSTERESIS_PERCENT);
            stays || has_reached(percent)
        };
        if has_reached(100) {
            Tier::Refuse
        } else if is_in(Tier::StopAccepting, ACCEPTING_PERCENT) {
            Tier::StopAccepting
        } else if is_in(Tier::StopReading, READING_PERCENT) {
            Tier::StopReading
        } else {
            Tier::Park
        }
    }
}

/// The tier of one service, for all threads.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    tier: AtomicU8,
    /// How often each was entered from one below.
    entered: [AtomicU64; TIERS.len()],
    lowered: Notify,
}

impl Budget {
    /// The tier in force; one relaxed load.
    pub(crate) fn tier(&self) -> Tier {
        TIERS[usize::from(self.tier.load(Ordering::Relaxed)) % TIERS.len()]
    }

    /// Whether heads of connected clients are read, and their streams taken up.
    pub(crate) fn reads(&self) -> bool {
        self.tier() < Tier::StopReading
    }

    /// Whether new clients are accepted.
    pub(crate) fn accepts(&self) -> bool {
        self.tier() < Tier::StopAccepting
    }

    /// How often each tier was entered, in their order.
    pub(crate) fn entered(&self) -> [u64; TIERS.len()] {
        self.entered
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed))
    }

    /// Puts a tier in force; wakes whoever may go on. Only under the lock of the queue.
    pub(super) fn set(&self, tier: Tier) {
        let before = self.tier();
        if before == tier {
            return;
        }
        self.tier.store(tier as u8, Ordering::Relaxed);
        for passed in TIERS
            .into_iter()
            .filter(|passed| *passed > before && *passed <= tier)
        {
            self.entered[passed as usize].fetch_add(1, Ordering::Relaxed);
        }
        if tier < before {
            self.lowered.notify_waiters();
        }
    }

    /// Completes when heads are read.
    pub(crate) async fn reads_again(&self) {
        self.until(Self::reads).await;
    }

    /// Completes when clients are accepted.
    pub(crate) async fn accepts_again(&self) {
        self.until(Self::accepts).await;
    }

    async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        loop {
            let lowered = self.lowered.notified();
            if is_so(self) {
                return;
            }
            lowered.await;
        }
    }
}

/// What one held request keeps of our memory besides its head, by what it came by. Measured with `lab bench hold`,
/// which compares the sum of these with the growth of the process; the kernel's own buffers are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// A connection of HTTP/1 in clear: its task, the future of its request, its place in the queue and on the roll.
    Clear,
    /// The same over TLS: keys, and rustls' buffers.
    Tls,
    /// A stream of HTTP/2 beside others: its record and what the `h2` crate keeps of it.
    Stream2,
    /// A stream of HTTP/3, with quinn's share.
    Stream3,
    /// A raw connection.
    Raw,
}

impl Keep {
    /// In bytes.
    pub(crate) const fn bytes(self) -> u32 {
        match self {
            Self::Clear => 4_600,
            Self::Tls => 7_700,
            Self::Stream2 => 1_400,
            Self::Stream3 => 6_500,
            Self::Raw => 3_900,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn limits(held_max: u64, held_bytes_max: u64) -> BudgetLimits {
        BudgetLimits {
            held_max,
            held_bytes_max,
            held_per_address_max: 0,
            when_full: WhenFull::Wait,
        }
    }

    fn walk(limits: &BudgetLimits, counts: &[u64]) -> Vec<Tier> {
        let mut tier = Tier::Park;
        let mut step = |count: &u64| {
            let usage = Usage {
                count: *count,
                bytes: 0,
            };
            tier = limits.judge(tier, usage);
            tier
        };
        counts.iter().map(&mut step).collect()
    }

    #[test]
    fn tiers_are_entered_at_their_share_and_left_below_it() {
        let tiers = walk(
            &limits(100, 0),
            &[79, 80, 89, 90, 99, 100, 99, 80, 79, 70, 69],
        );
        use Tier::{Park, Refuse, StopAccepting, StopReading};
        assert_eq!(
            tiers,
            [
                Park,
                StopReading,
                StopReading,
                StopAccepting,
                StopAccepting,
                Refuse,
                StopAccepting,
                StopAccepting,
                StopReading,
                StopReading,
                Park
            ]
        );
    }

    #[test]
    fn bytes_count_as_heads_do_and_the_fuller_of_both_decides() {
        let limits = limits(100, 1000);
        let usage = Usage {
            count: 1,
            bytes: 900,
        };
        assert_eq!(limits.judge(Tier::Park, usage), Tier::StopAccepting);
        assert!(limits.has_room(usage, 100));
        assert!(!limits.has_room(usage, 101));
    }

    #[test]
    fn the_smallest_budget_stops_with_its_first_and_goes_on_with_none() {
        let tiers = walk(&limits(1, 0), &[0, 1, 0]);
        assert_eq!(tiers, [Tier::Park, Tier::Refuse, Tier::Park]);
    }

    #[test]
    fn whoever_is_refused_when_full_stops_nobody() {
        let limits = BudgetLimits {
            when_full: WhenFull::Refuse,
            ..limits(10, 0)
        };
        assert_eq!(walk(&limits, &[8, 9, 10]), [Tier::Park; 3]);
    }
}
