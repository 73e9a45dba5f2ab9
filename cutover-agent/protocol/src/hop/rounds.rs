//! When to stop copying memory while the source runs.
//!
//! The rule weighs what a switch-over would cost now against a budget, and gives up on rounds that no longer
//! shrink. Published rules it was measured against: p.haul stops at 64 pages, 8 rounds or 10 % growth; QEMU when
//! what is pending fits bandwidth x 300 ms.

use serde::{Deserialize, Serialize};

/// One memory round, all containers together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages written to the images of this round (4 KiB each).
    pub pages: u64,
    /// Bytes that crossed the link for it.
    pub bytes: u64,
    /// From the first dump to the last byte acknowledged, in seconds.
    pub seconds: f64,
}

/// What the link carries, as measured when the tunnel came up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Link {
    /// Round-trip time in milliseconds.
    pub rtt_ms: f64,
    /// Bytes a second, all streams together.
    pub bytes_per_second: f64,
}

/// When rounds must end, and whether there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// 0 where the kernel cannot track dirty pages: one full dump while frozen.
    pub rounds_max: u32,
    /// The stall we would like to stay within, in milliseconds.
    pub stall_ms_max: u64,
}

/// What follows a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextRound {
    /// Another round pays.
    Copy,
    /// Hold and switch over.
    Switch,
}

/// Freeze, restore, probe and redirect together, in milliseconds, before anything about this host is known:
/// what a two-container application took on a two-core machine.
const FIXED_COST_MS: f64 = 900.0;

/// A round that leaves more than this share of the last one is not worth another: writes outrun the link.
const SHRINK_MAX: f64 = 0.9;

/// The predicted stall in milliseconds: fixed costs, two round trips, and the dirty bytes over the link. The last
/// round stands for what the next would find dirty; with no round there is nothing to predict from, and only the
/// fixed costs are counted.
#[must_use]
pub fn predicted_stall_ms(rounds: &[Round], link: &Link) -> u64 {
    stall_ms(rounds.last().map_or(0, |round| round.bytes), link)
}

/// The stall in milliseconds when this many bytes must cross while frozen.
#[must_use]
pub fn stall_ms(dirty_bytes: u64, link: &Link) -> u64 {
    let dirty_bytes = dirty_bytes as f64;
    let wire_ms = if link.bytes_per_second > 0.0 {
        dirty_bytes / link.bytes_per_second * 1e3
    } else {
        0.0
    };
    (FIXED_COST_MS + 2.0 * link.rtt_ms + wire_ms) as u64
}

/// Whether another round pays.
#[must_use]
pub fn next_round(rounds: &[Round], bounds: &Bounds, link: &Link) -> NextRound {
    let done = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
    if done >= bounds.rounds_max {
        return NextRound::Switch;
    }
    // The first round carries everything, so it says nothing about dirtying: a second one always follows.
    if done < 2 {
        return NextRound::Copy;
    }
    let shrinks = match rounds {
        [.., before, last] => last.bytes as f64 <= before.bytes as f64 * SHRINK_MAX,
        _ => true,
    };
    let fits = predicted_stall_ms(rounds, link) <= bounds.stall_ms_max;
    if fits || !shrinks {
        NextRound::Switch
    } else {
        NextRound::Copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        rtt_ms: 20.0,
        bytes_per_second: 1e8,
    };

    fn round(bytes: u64) -> Round {
        Round {
            pages: bytes / 4096,
            bytes,
            seconds: 1.0,
        }
    }

    fn bounds(rounds_max: u32, stall_ms_max: u64) -> Bounds {
        Bounds {
            rounds_max,
            stall_ms_max,
        }
    }

    #[test]
    fn without_dirty_tracking_there_are_no_rounds() {
        assert_eq!(next_round(&[], &bounds(0, 2000), &LINK), NextRound::Switch);
    }

    #[test]
    fn a_second_round_always_follows_the_first() {
        assert_eq!(next_round(&[], &bounds(4, 2000), &LINK), NextRound::Copy);
        assert_eq!(
            next_round(&[round(1000)], &bounds(4, 2000), &LINK),
            NextRound::Copy
        );
    }

    #[test]
    fn rounds_end_when_the_stall_fits_the_budget() {
        assert_eq!(
            next_round(
                &[round(500_000_000), round(1_000_000)],
                &bounds(8, 1000),
                &LINK
            ),
            NextRound::Switch
        );
        assert_eq!(
            next_round(
                &[round(500_000_000), round(100_000_000)],
                &bounds(8, 1000),
                &LINK
            ),
            NextRound::Copy
        );
    }

    #[test]
    fn rounds_that_no_longer_shrink_are_given_up() {
        let rounds = [round(500_000_000), round(100_000_000), round(99_000_000)];
        assert_eq!(
            next_round(&rounds, &bounds(8, 1000), &LINK),
            NextRound::Switch
        );
    }

    #[test]
    fn the_bound_on_rounds_holds() {
        let rounds = [round(400_000_000), round(200_000_000), round(100_000_000)];
        assert_eq!(
            next_round(&rounds, &bounds(3, 1000), &LINK),
            NextRound::Switch
        );
    }
}
