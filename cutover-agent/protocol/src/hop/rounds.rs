//! When to stop copying memory while the source runs, and when to slow it down.
//!
//! The rule weighs what a switch-over would cost now against a budget, and gives up on rounds that no longer
//! shrink, or has the source slowed down where the plan allows it. Published rules it was measured against: p.haul
//! stops at 64 pages, 8 rounds or 10 % growth; QEMU when what is pending fits bandwidth x 300 ms, and throttles by
//! 20 % and then 10 % more each time.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One memory round, all containers together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that had to cross (4 KiB each).
    pub pages: u64,
    /// Bytes that crossed the link for them.
    pub bytes: u64,
    /// From the first dump to the last byte acknowledged, in seconds.
    pub seconds: f64,
    /// Bytes of memory there were: what a restore has to fill. 0 where nobody looked.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resident_bytes: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands it by reference"
)]
const fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What the link carries, as measured when the tunnel came up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Link {
    /// Round-trip time in milliseconds.
    pub rtt_ms: f64,
    /// Bytes a second, all streams together.
    pub bytes_per_second: f64,
}

/// What a switch-over costs beyond the link, as learned from earlier hops of these hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Costs {
    /// Starting the dump, freezing and fencing, in milliseconds.
    pub freeze_ms: u64,
    /// What CRIU dumps in a second, in bytes.
    pub dump_bytes_per_second: u64,
    /// Building processes without their memory, in milliseconds.
    pub restore_ms: u64,
    /// What CRIU restores in a second, in bytes.
    pub restore_bytes_per_second: u64,
    /// Probes, the commit and the release, in milliseconds.
    pub redirect_ms: u64,
}

impl Default for Costs {
    /// Before anything about the hosts is known: what a two-container application took on a two-core machine.
    fn default() -> Self {
        Self {
            freeze_ms: 250,
            dump_bytes_per_second: 400_000_000,
            restore_ms: 350,
            restore_bytes_per_second: 800_000_000,
            redirect_ms: 300,
        }
    }
}

impl Costs {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Half of what was known and half of what was just seen: one odd hop does not spoil the next prediction.
    #[must_use]
    pub const fn learn(self, seen: Self) -> Self {
        const fn half(known: u64, seen: u64) -> u64 {
            known / 2 + seen / 2
        }
        Self {
            freeze_ms: half(self.freeze_ms, seen.freeze_ms),
            dump_bytes_per_second: half(self.dump_bytes_per_second, seen.dump_bytes_per_second),
            restore_ms: half(self.restore_ms, seen.restore_ms),
            restore_bytes_per_second: half(
                self.restore_bytes_per_second,
                seen.restore_bytes_per_second,
            ),
            redirect_ms: half(self.redirect_ms, seen.redirect_ms),
        }
    }
}

/// When rounds must end, and whether there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// 0 where the kernel cannot track dirty pages: one full dump while frozen.
    pub rounds_max: u32,
    /// The stall we would like to stay within, in milliseconds.
    pub stall_ms_max: u64,
    /// How far the source may be slowed down when its writes outrun the link, in percent; 0 means never.
    #[serde(default, skip_serializing_if = "is_never")]
    pub throttle_percent_max: u8,
    /// What is known of the hosts.
    #[serde(default, skip_serializing_if = "Costs::is_default")]
    pub costs: Costs,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands it by reference"
)]
const fn is_never(percent: &u8) -> bool {
    *percent == 0
}

/// What follows a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextRound {
    /// Another round pays.
    Copy,
    /// Hold and switch over.
    Switch,
}

/// A round that leaves more than this share of the last one is not worth another: writes outrun the link.
const SHRINK_MAX: f64 = 0.9;

/// The first step of slowing down, and each further one, in percent.
const THROTTLE_FIRST_PERCENT: u32 = 20;
const THROTTLE_STEP_PERCENT: u32 = 10;

/// A predicted stall by its terms, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stall {
    /// Freezing and fencing.
    pub freeze_ms: u64,
    /// CRIU reads memory.
    pub dump_ms: u64,
    /// Changed pages cross the link.
    pub wire_ms: u64,
    /// Two round trips.
    pub round_trips_ms: u64,
    /// CRIU builds processes and fills their memory.
    pub restore_ms: u64,
    /// Probes, commit, release.
    pub redirect_ms: u64,
}

impl Stall {
    /// All terms together.
    #[must_use]
    pub const fn total_ms(&self) -> u64 {
        self.freeze_ms
            .saturating_add(self.dump_ms)
            .saturating_add(self.wire_ms)
            .saturating_add(self.round_trips_ms)
            .saturating_add(self.restore_ms)
            .saturating_add(self.redirect_ms)
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} ms = freeze {} + dump {} + wire {} + round trips {} + restore {} + redirect {}",
            self.total_ms(),
            self.freeze_ms,
            self.dump_ms,
            self.wire_ms,
            self.round_trips_ms,
            self.restore_ms,
            self.redirect_ms
        )
    }
}

/// The stall when `resident_bytes` are dumped and restored and `wire_bytes` cross the link while frozen.
#[must_use]
pub fn predict(wire_bytes: u64, resident_bytes: u64, costs: &Costs, link: &Link) -> Stall {
    let ms = |bytes: u64, per_second: f64| {
        if per_second > 0.0 {
            (bytes as f64 / per_second * 1e3) as u64
        } else {
            0
        }
    };
    Stall {
        freeze_ms: costs.freeze_ms,
        dump_ms: ms(resident_bytes, costs.dump_bytes_per_second as f64),
        wire_ms: ms(wire_bytes, link.bytes_per_second),
        round_trips_ms: (2.0 * link.rtt_ms) as u64,
        restore_ms: costs.restore_ms + ms(resident_bytes, costs.restore_bytes_per_second as f64),
        redirect_ms: costs.redirect_ms,
    }
}

/// The predicted stall after these rounds. The last round stands for what the next would find changed; with no round
/// there is nothing to predict from, and only fixed costs are counted.
#[must_use]
pub fn predicted_stall(rounds: &[Round], bounds: &Bounds, link: &Link) -> Stall {
    let (bytes, resident_bytes) = rounds
        .last()
        .map_or((0, 0), |round| (round.bytes, round.resident_bytes));
    predict(bytes, resident_bytes, &bounds.costs, link)
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
    let fits = predicted_stall(rounds, bounds, link).total_ms() <= bounds.stall_ms_max;
    let may_slow_down = throttle_percent(rounds, bounds, link)
        > throttle_percent(&rounds[..rounds.len() - 1], bounds, link);
    if fits || !(shrank(rounds) || may_slow_down) {
        NextRound::Switch
    } else {
        NextRound::Copy
    }
}

fn shrank(rounds: &[Round]) -> bool {
    match rounds {
        [.., before, last] => last.bytes as f64 <= before.bytes as f64 * SHRINK_MAX,
        _ => true,
    }
}

/// By how much the source is to be slowed down in the next round, in percent: one step for each round so far that did not
/// shrink and left more than the budget allows. That can be the second: then almost all there is was written to meanwhile.
#[must_use]
pub fn throttle_percent(rounds: &[Round], bounds: &Bounds, link: &Link) -> u8 {
    let outran = |count: &usize| {
        let seen = &rounds[..*count];
        !shrank(seen) && predicted_stall(seen, bounds, link).total_ms() > bounds.stall_ms_max
    };
    let steps = (2..=rounds.len()).filter(outran).count();
    let Some(further) = u32::try_from(steps).unwrap_or(u32::MAX).checked_sub(1) else {
        return 0;
    };
    let percent =
        THROTTLE_FIRST_PERCENT.saturating_add(further.saturating_mul(THROTTLE_STEP_PERCENT));
    u8::try_from(percent)
        .unwrap_or(u8::MAX)
        .min(bounds.throttle_percent_max)
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
            resident_bytes: 0,
        }
    }

    fn bounds(rounds_max: u32, stall_ms_max: u64) -> Bounds {
        Bounds {
            rounds_max,
            stall_ms_max,
            throttle_percent_max: 0,
            costs: Costs::default(),
        }
    }

    #[test]
    fn every_term_of_the_stall_is_counted_once() {
        let stall = predict(100_000_000, 400_000_000, &Costs::default(), &LINK);
        assert_eq!(
            stall.to_string(),
            "3440 ms = freeze 250 + dump 1000 + wire 1000 + round trips 40 + restore 850 + redirect 300"
        );
    }

    #[test]
    fn memory_that_must_be_dumped_and_restored_counts_although_it_does_not_cross() {
        let last = Round {
            resident_bytes: 4_000_000_000,
            ..round(1000)
        };
        let stall = predicted_stall(&[round(4_000_000_000), last], &bounds(4, 1000), &LINK);
        assert_eq!((stall.dump_ms, stall.wire_ms), (10_000, 0));
    }

    #[test]
    fn what_is_known_of_hosts_moves_half_way_to_what_is_seen() {
        let seen = Costs {
            freeze_ms: 50,
            ..Costs::default()
        };
        assert_eq!(Costs::default().learn(seen).freeze_ms, 150);
    }

    #[test]
    fn writes_that_outrun_the_link_slow_the_source_down_step_by_step() {
        let mut allowed = bounds(8, 1000);
        let mut rounds = vec![round(500_000_000), round(100_000_000), round(99_000_000)];
        assert_eq!(throttle_percent(&rounds, &allowed, &LINK), 0);
        assert_eq!(next_round(&rounds, &allowed, &LINK), NextRound::Switch);
        allowed.throttle_percent_max = 45;
        for expected in [20, 30, 40, 45] {
            assert_eq!(throttle_percent(&rounds, &allowed, &LINK), expected);
            assert_eq!(next_round(&rounds, &allowed, &LINK), NextRound::Copy);
            rounds.push(round(98_500_000));
        }
        // Slowed down as far as it may be, and it still does not shrink.
        allowed.rounds_max = 64;
        assert_eq!(next_round(&rounds, &allowed, &LINK), NextRound::Switch);
    }

    #[test]
    fn a_source_that_writes_to_everything_in_the_first_round_is_slowed_down_after_the_second() {
        let rounds = [round(500_000_000), round(490_000_000)];
        let mut allowed = bounds(8, 1000);
        assert_eq!(next_round(&rounds, &allowed, &LINK), NextRound::Switch);
        allowed.throttle_percent_max = 45;
        assert_eq!(throttle_percent(&rounds, &allowed, &LINK), 20);
        assert_eq!(next_round(&rounds, &allowed, &LINK), NextRound::Copy);
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
