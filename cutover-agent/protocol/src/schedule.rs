//! How several containers share one link, so that none waits for another longer than it must.
//!
//! Containers that need each other can only go on together. One that has arrived early gathers changes while it waits
//! for the rest; so the best order is the one in which all arrive at once. The formulas are those of gang migration:
//! with R_i bytes left, w_i bytes a second that are written meanwhile, and a link of b bytes a second, everybody
//! finishes at T = ΣR_i / (b − Σw_i) when container i is sent at R_i / T + w_i.
//!
//! On a real link rates are not set but kept to by turns: [`Schedule::may_send`] says whose turn it is, from how far
//! each has come. So a link that is slower than it was measured changes when all arrive, and not that they do so
//! together.

use serde::{Deserialize, Serialize};

/// Two of a gang are level when the parts they have done differ by no more: who has the next frame at hand sends it, and
/// does not wait for one that is still reading its own.
const LEVEL_PERMILLE: u128 = 10;

/// In which order containers use the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Each at a rate such that all finish at one time.
    #[default]
    Gang,
    /// The discrete form: the largest first, and the next as soon as no more is left of the largest than of it.
    Staircase,
    /// One after the other, in the plan's order.
    Sequential,
    /// Whoever is ready sends.
    Parallel,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Self; 4] = [
        Self::Gang,
        Self::Staircase,
        Self::Sequential,
        Self::Parallel,
    ];

    /// The word used in plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gang => "gang",
            Self::Staircase => "staircase",
            Self::Sequential => "sequential",
            Self::Parallel => "parallel",
        }
    }
}

/// What one container still asks of the link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Bytes left.
    pub left_bytes: f64,
    /// Bytes a second that are written while they are sent, and have to be sent again.
    pub dirty_bytes_per_second: f64,
}

/// When all containers are done, in seconds, if the link carries so many bytes a second. `None` when they write as
/// fast as the link carries: then there is no such time.
#[must_use]
pub fn finish_seconds(shares: &[Share], bytes_per_second: f64) -> Option<f64> {
    let left: f64 = shares.iter().map(|share| share.left_bytes).sum();
    let dirty: f64 = shares
        .iter()
        .map(|share| share.dirty_bytes_per_second)
        .sum();
    (bytes_per_second > dirty).then(|| left / (bytes_per_second - dirty))
}

/// The rate of each container, in bytes a second, with which all finish at [`finish_seconds`].
#[must_use]
pub fn gang_rates(shares: &[Share], bytes_per_second: f64) -> Option<Vec<f64>> {
    let finish = finish_seconds(shares, bytes_per_second)?;
    let rate = |share: &Share| {
        let base = if finish > 0.0 {
            share.left_bytes / finish
        } else {
            0.0
        };
        base + share.dirty_bytes_per_second
    };
    Some(shares.iter().map(rate).collect())
}

/// How far one container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lane {
    /// Bytes in all, as far as known.
    pub total_bytes: u64,
    /// Bytes done.
    pub done_bytes: u64,
    /// What it is about.
    pub standing: Standing,
}

/// What a container is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has something to send, or will have in a moment.
    Ready,
    /// It is kept from sending by something else than the link.
    Idle,
    /// It has nothing more to send.
    Over,
}

impl Lane {
    const fn left_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.done_bytes)
    }
}

impl Schedule {
    /// Whether `lane` may send its next frame, of at most `frame_bytes`. As long as any lane is ready, one may; nobody
    /// but under [`Self::Sequential`] waits for a lane that is idle.
    #[must_use]
    pub fn may_send(self, lanes: &[Lane], lane: usize, frame_bytes: u64) -> bool {
        let Some(own) = lanes.get(lane) else {
            return false;
        };
        let mut ready = lanes
            .iter()
            .enumerate()
            .filter(|(index, other)| *index != lane && other.standing == Standing::Ready);
        match self {
            Self::Parallel => true,
            Self::Sequential => lanes[..lane]
                .iter()
                .all(|before| before.standing == Standing::Over),
            Self::Gang => !ready.any(|(_, other)| is_behind(other, own)),
            // One frame less makes no difference between two that are level.
            Self::Staircase => {
                !ready.any(|(_, other)| other.left_bytes() > own.left_bytes() + frame_bytes)
            }
        }
    }
}

/// Whether the first has a smaller part of its bytes done, by more than [`LEVEL_PERMILLE`].
fn is_behind(first: &Lane, second: &Lane) -> bool {
    // done/total compared without division; an empty lane counts as complete.
    let scaled = |one: &Lane, other: &Lane| {
        let done = one.done_bytes.max(u64::from(one.total_bytes == 0));
        1000 * u128::from(done) * u128::from(other.total_bytes.max(1))
    };
    let level = u128::from(first.total_bytes.max(1)) * u128::from(second.total_bytes.max(1));
    scaled(first, second) + LEVEL_PERMILLE * level < scaled(second, first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: u64 = 1;

    fn share(left_bytes: f64, dirty_bytes_per_second: f64) -> Share {
        Share {
            left_bytes,
            dirty_bytes_per_second,
        }
    }

    /// Sends everything over a link that carries one frame at a time; gives when each lane was done, in frames. Turns
    /// are taken in a circle by those who may.
    fn send(schedule: Schedule, totals: &[u64]) -> Vec<u64> {
        let mut lanes: Vec<Lane> = totals
            .iter()
            .map(|total| Lane {
                total_bytes: *total,
                done_bytes: 0,
                standing: Standing::Ready,
            })
            .collect();
        let mut finished = vec![0; lanes.len()];
        let (mut now, mut next) = (0, 0);
        while lanes.iter().any(|lane| lane.standing != Standing::Over) {
            let turn = (0..lanes.len())
                .map(|step| (next + step) % lanes.len())
                .find(|lane| {
                    lanes[*lane].standing == Standing::Ready
                        && schedule.may_send(&lanes, *lane, FRAME)
                })
                .expect("somebody may always send");
            lanes[turn].done_bytes += FRAME;
            now += 1;
            next = turn + 1;
            if lanes[turn].done_bytes >= lanes[turn].total_bytes {
                lanes[turn].standing = Standing::Over;
                finished[turn] = now;
            }
        }
        finished
    }

    #[test]
    fn all_finish_at_the_time_of_the_formula() {
        let shares = [share(400.0, 0.0), share(200.0, 10.0), share(100.0, 5.0)];
        let finish = finish_seconds(&shares, 115.0).unwrap();
        assert!((finish - 7.0).abs() < 1e-9);
        let rates = gang_rates(&shares, 115.0).unwrap();
        assert!((rates.iter().sum::<f64>() - 115.0).abs() < 1e-9);
        for (share, rate) in shares.iter().zip(rates) {
            let sent = share.left_bytes + share.dirty_bytes_per_second * finish;
            assert!((rate * finish - sent).abs() < 1e-6);
        }
    }

    #[test]
    fn writes_as_fast_as_the_link_never_end() {
        assert_eq!(finish_seconds(&[share(1.0, 100.0)], 100.0), None);
        assert_eq!(gang_rates(&[share(1.0, 100.0)], 100.0), None);
    }

    #[test]
    fn a_gang_and_a_staircase_arrive_together_and_a_sequence_does_not() {
        let totals = [400, 200, 100, 50];
        for schedule in [Schedule::Gang, Schedule::Staircase] {
            let finished = send(schedule, &totals);
            assert!(
                finished.iter().all(|at| *at >= 750 - 16),
                "{schedule:?} {finished:?}"
            );
        }
        assert_eq!(send(Schedule::Sequential, &totals), [400, 600, 700, 750]);
        let finished = send(Schedule::Parallel, &totals);
        assert!(finished[3] < 210 && finished[0] == 750, "{finished:?}");
    }

    #[test]
    fn the_largest_begins_a_staircase_alone() {
        let lane = |total_bytes, done_bytes| Lane {
            total_bytes,
            done_bytes,
            standing: Standing::Ready,
        };
        let mut lanes = [lane(400, 0), lane(200, 0)];
        assert!(!Schedule::Staircase.may_send(&lanes, 1, 1));
        lanes[0].done_bytes = 200;
        assert!(Schedule::Staircase.may_send(&lanes, 1, 1));
    }

    #[test]
    fn nobody_waits_for_a_container_that_is_kept_busy_elsewhere() {
        let idle = Lane {
            total_bytes: 400,
            done_bytes: 0,
            standing: Standing::Idle,
        };
        let ahead = Lane {
            total_bytes: 100,
            done_bytes: 90,
            standing: Standing::Ready,
        };
        assert!(Schedule::Gang.may_send(&[idle, ahead], 1, 1));
        assert!(Schedule::Staircase.may_send(&[idle, ahead], 1, 1));
        assert!(!Schedule::Sequential.may_send(&[idle, ahead], 1, 1));
    }

    proptest! {
        #[test]
        fn every_schedule_sends_everything_and_wastes_no_turn(
            totals in proptest::collection::vec(1_u64..300, 1..7),
            which in 0..4_usize,
        ) {
            let finished = send(Schedule::ALL[which], &totals);
            prop_assert_eq!(finished.iter().max(), Some(&totals.iter().sum()));
        }

        #[test]
        fn gangs_arrive_within_a_frame_of_each_lane_and_what_is_level(totals in proptest::collection::vec(1_u64..300, 1..7)) {
            let finished = send(Schedule::Gang, &totals);
            let last = finished.iter().max().copied().unwrap_or(0);
            // The last frame of each lane is sent in the last turns.
            let all = totals.iter().sum::<u64>();
            let level = all * LEVEL_PERMILLE as u64 / 1000;
            let slack = all / totals.iter().min().copied().unwrap_or(1) + totals.len() as u64 + level;
            prop_assert!(finished.iter().all(|at| at + slack >= last), "{:?} {:?}", totals, finished);
        }

        #[test]
        fn rates_fill_the_link_and_no_more(
            shares in proptest::collection::vec((0.0..1e9_f64, 0.0..1e6_f64), 1..6),
            link in 1e7..1e9_f64,
        ) {
            let shares: Vec<Share> = shares.into_iter().map(|(left, dirty)| share(left, dirty)).collect();
            let total: f64 = gang_rates(&shares, link).unwrap().iter().sum();
            let left: f64 = shares.iter().map(|share| share.left_bytes).sum();
            prop_assert!(left == 0.0 || (total - link).abs() < link * 1e-9);
        }
    }
}
