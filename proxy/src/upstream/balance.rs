//! Which of several servers takes a request: pure choices among candidates, one function a policy.
//!
//! A candidate is an index with a weight in parts; weight zero means that it must not be chosen. Nothing here knows
//! servers, clocks or connections.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// One worker's memory between two choices: only its thread writes it.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Seat {
    /// How far each candidate is behind its share.
    behind: Box<[AtomicI64]>,
    random: AtomicU64,
}

impl Seat {
    /// For `count` candidates. Different seeds make different random choices.
    pub(super) fn new(count: usize, seed: u64) -> Self {
        Self {
            behind: (0..count).map(|_| AtomicI64::new(0)).collect(),
            random: AtomicU64::new(seed),
        }
    }

    /// A random number below `bound`, which must not be zero. The bias of the multiplication is below one in
    /// 2^64 / bound.
    fn below(&self, bound: u64) -> u64 {
        let state = self.random.load(Relaxed).wrapping_add(GOLDEN);
        self.random.store(state, Relaxed);
        let scaled = u128::from(mix(state)) * u128::from(bound);
        u64::try_from(scaled >> 64).unwrap_or(0)
    }
}

/// 2^64 divided by the golden ratio: the step of splitmix64 (Steele, Lea, Flood 2014).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64: every bit of the input changes half the bits of the output.
pub(super) const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A hash that is the same in every process and release: FNV-1a with the finaliser above.
pub(super) fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(fnv)
}

/// Each in turn, as often as its weight says and as evenly as can be: nginx's smooth weighted round robin. Every
/// candidate gains its weight, the one furthest behind is chosen and pays what all have gained.
pub(super) fn round_robin(seat: &Seat, weight: impl Fn(usize) -> u64) -> Option<usize> {
    let mut total = 0;
    let mut best: Option<(usize, i64)> = None;
    for (index, behind) in seat.behind.iter().enumerate() {
        let gain = i64::try_from(weight(index)).unwrap_or(i64::MAX >> 32);
        if gain == 0 {
            continue;
        }
        total += gain;
        let now = behind.load(Relaxed) + gain;
        behind.store(now, Relaxed);
        if best.is_none_or(|(_, most)| now > most) {
            best = Some((index, now));
        }
    }
    let (index, most) = best?;
    seat.behind[index].store(most - total, Relaxed);
    Some(index)
}

/// The one with the fewest active requests for its weight; equals take turns.
pub(super) fn least_connections(
    seat: &Seat,
    weight: impl Fn(usize) -> u64,
    active: impl Fn(usize) -> u64,
) -> Option<usize> {
    let mut least: Option<Load> = None;
    for index in 0..seat.behind.len() {
        let load = Load::of(active(index), weight(index));
        if load.weight != 0 && least.is_none_or(|least| load.is_less_than(least)) {
            least = Some(load);
        }
    }
    let least = least?;
    // Another worker may have changed what is active since: then nobody equals the least, and all are asked.
    let equal = |index| {
        let weight = weight(index);
        let more = least.is_less_than(Load::of(active(index), weight));
        if more { 0 } else { weight }
    };
    round_robin(seat, equal).or_else(|| round_robin(seat, &weight))
}

/// Two at random, by weight, and the less busy of them (Mitzenmacher 2001). Equals leave it to the first draw, so
/// that weights hold also when nothing is busy.
pub(super) fn two_choices(
    seat: &Seat,
    weight: impl Fn(usize) -> u64,
    active: impl Fn(usize) -> u64,
) -> Option<usize> {
    let first = draw(seat, &weight)?;
    let others = |index| if index == first { 0 } else { weight(index) };
    let Some(second) = draw(seat, others) else {
        return Some(first);
    };
    let load = |index| Load::of(active(index), weight(index));
    let second_is_freer = load(second).is_less_than(load(first));
    Some(if second_is_freer { second } else { first })
}

fn draw(seat: &Seat, weight: impl Fn(usize) -> u64) -> Option<usize> {
    let count = seat.behind.len();
    let total: u64 = (0..count).map(&weight).sum();
    if total == 0 {
        return None;
    }
    let mut left = seat.below(total);
    (0..count).find(|index| {
        let weight = weight(*index);
        let here = left < weight;
        left = left.saturating_sub(weight);
        here
    })
}

/// Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights after Schindelhauer and Schomaker 2005): every
/// candidate draws a number from the key and its own seed, the highest wins. When a candidate leaves, only its own
/// keys move, and they spread over all others; nothing has to be built beforehand.
pub(super) fn rendezvous(
    count: usize,
    key: u64,
    weight: impl Fn(usize) -> u64,
    seed: impl Fn(usize) -> u64,
) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for index in 0..count {
        let weight = weight(index);
        if weight == 0 {
            continue;
        }
        let score = score(mix(key ^ seed(index)), weight);
        if best.is_none_or(|(_, most)| score > most) {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}

/// `-weight / ln(draw)` with the draw between zero and one, both excluded.
#[allow(clippy::cast_precision_loss)] // 53 bits of the draw, and weights far below 2^53
fn score(bits: u64, weight: u64) -> f64 {
    let draw = ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -(weight as f64) / draw.ln()
}

/// How busy a candidate is for its weight.
#[derive(Debug, Clone, Copy)]
struct Load {
    active: u64,
    weight: u64,
}

impl Load {
    const fn of(active: u64, weight: u64) -> Self {
        Self { active, weight }
    }

    /// Compares active requests for a unit of weight, without division: all idle ones are equal.
    fn is_less_than(self, other: Self) -> bool {
        u128::from(self.active) * u128::from(other.weight)
            < u128::from(other.active) * u128::from(self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(picks: usize, count: usize, mut pick: impl FnMut() -> Option<usize>) -> Vec<usize> {
        let mut counts = vec![0; count];
        for _ in 0..picks {
            counts[pick().unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn round_robin_spreads_by_weight_and_never_in_bursts() {
        let seat = Seat::new(3, 0);
        let weight = |index: usize| [5, 1, 1][index];
        let order: Vec<usize> = (0..7).filter_map(|_| round_robin(&seat, weight)).collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(
            counts(7000, 3, || round_robin(&seat, weight)),
            [5000, 1000, 1000]
        );
    }

    #[test]
    fn round_robin_passes_over_those_without_weight() {
        let seat = Seat::new(3, 0);
        let weight = |index: usize| u64::from(index != 1);
        assert_eq!(counts(10, 3, || round_robin(&seat, weight)), [5, 0, 5]);
        assert_eq!(round_robin(&seat, |_| 0), None);
    }

    #[test]
    fn least_connections_fills_up_the_least_busy_by_weight() {
        let seat = Seat::new(3, 0);
        let mut active = [0_u64; 3];
        for _ in 0..400 {
            let index =
                least_connections(&seat, |index| [1, 1, 2][index], |index| active[index]).unwrap();
            active[index] += 1;
        }
        assert_eq!(active, [100, 100, 200]);
        let idle = counts(300, 3, || least_connections(&seat, |_| 1, |_| 0));
        assert_eq!(idle, [100, 100, 100]);
    }

    #[test]
    fn two_choices_never_takes_the_busier_of_a_pair_and_holds_weights_when_idle() {
        let seat = Seat::new(2, 42);
        let busy = |index: usize| [7, 8][index];
        assert_eq!(
            counts(1000, 2, || two_choices(&seat, |_| 1, busy)),
            [1000, 0]
        );
        let idle = counts(40_000, 2, || {
            two_choices(&seat, |index| [3, 1][index], |_| 0)
        });
        assert!((29_500..30_500).contains(&idle[0]), "{idle:?}");
        assert_eq!(two_choices(&seat, |index| index as u64, busy), Some(1));
    }

    #[test]
    fn two_choices_keeps_the_busiest_of_many_close_to_the_mean() {
        let seat = Seat::new(100, 7);
        let mut active = vec![0_u64; 100];
        for _ in 0..100_000 {
            let index = two_choices(&seat, |_| 1, |index| active[index]).unwrap();
            active[index] += 1;
        }
        // One random choice would leave about 80 between them: 1000 ± 2.5 standard deviations of 31.6.
        let spread = active.iter().max().unwrap() - active.iter().min().unwrap();
        assert!(spread < 12, "{spread}");
    }

    #[test]
    fn rendezvous_spreads_keys_by_weight() {
        let keys = (0..40_000_u64).map(|key| stable_hash(&key.to_be_bytes()));
        let mut counts = [0; 3];
        for key in keys {
            let weight = |index: usize| [1, 1, 2][index];
            counts[rendezvous(3, key, weight, |index| mix(index as u64)).unwrap()] += 1;
        }
        for (count, wanted) in counts.iter().zip([10_000_i32, 10_000, 20_000]) {
            assert!((count - wanted).abs() < 500, "{counts:?}");
        }
    }

    #[test]
    fn only_the_keys_of_a_candidate_that_leaves_move_and_they_spread_over_all_others() {
        let seed = |index| mix(index as u64 + 100);
        let mut arrived = [0; 10];
        for key in 0..10_000_u64 {
            let key = stable_hash(&key.to_be_bytes());
            let before = rendezvous(10, key, |_| 1, seed).unwrap();
            let after = rendezvous(10, key, |index| u64::from(index != 3), seed).unwrap();
            if before == 3 {
                arrived[after] += 1;
            } else {
                assert_eq!(after, before);
            }
        }
        let moved: usize = arrived.iter().sum();
        assert!((900..1100).contains(&moved), "{moved}");
        assert_eq!(arrived[3], 0);
        let spread = arrived.iter().enumerate().filter(|(index, _)| *index != 3);
        assert!(
            spread
                .map(|(_, count)| *count)
                .all(|count| (70..160).contains(&count))
        );
    }

    #[test]
    fn the_stable_hash_is_what_it_was_in_every_release() {
        assert_eq!(stable_hash(b""), mix(0xcbf2_9ce4_8422_2325));
        assert_eq!(stable_hash(b"10.0.0.1:80"), 15_833_689_265_622_162_035);
    }
}
