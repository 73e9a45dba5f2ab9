//! The law under a virtual clock: owners of known strength, and releases of fifteen thousand.

#![allow(clippy::cast_precision_loss)] // counts and microseconds of a test

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// An owner that serves `capacity` at once and queues the rest; each request takes what `work` says, in microseconds.
struct Owner<W> {
    capacity: usize,
    work: W,
    /// When it begins, since the window was made.
    begins_us: u64,
}

/// What a simulated release came to.
struct Outcome {
    seconds: f64,
    at_once_max: usize,
}

impl<W: FnMut(u64) -> u64> Owner<W> {
    fn release(&mut self, held: u64, window: &mut Window) -> Outcome {
        // When each server is free, and when each request at the owner is answered.
        let mut free = vec![self.begins_us; self.capacity];
        let mut under_way: BTreeSet<(u64, u64)> = BTreeSet::new();
        let mut sent = 0;
        let (mut now, mut at_once_max) = (self.begins_us, 0);
        while sent < held || !under_way.is_empty() {
            while sent < held && under_way.len() < window.size() {
                let server = free.iter_mut().min().unwrap();
                *server = (*server).max(now) + (self.work)(sent);
                under_way.insert((*server, sent));
                sent += 1;
            }
            at_once_max = at_once_max.max(under_way.len());
            let waiting = under_way.len();
            (now, _) = under_way.pop_first().unwrap();
            window.elapse(Duration::from_micros(now), waiting);
            window.answered(Verdict::Fine);
        }
        Outcome {
            seconds: now as f64 / 1e6,
            at_once_max,
        }
    }
}

fn steady(capacity: usize, work_us: u64) -> Owner<impl FnMut(u64) -> u64> {
    Owner {
        capacity,
        work: move |_| work_us,
        begins_us: 0,
    }
}

fn ideal(held: u64, work_us: f64, capacity: usize) -> f64 {
    held as f64 * work_us / 1e6 / capacity as f64
}

#[test]
fn fifteen_thousand_leave_within_a_seventh_of_what_the_capacity_allows() {
    for capacity in [16, 64, 256, 1000] {
        for work_us in [2_000, 20_000, 50_000] {
            let mut window = Window::new(8, 1024);
            let outcome = steady(capacity, work_us).release(15_000, &mut window);
            let ideal = ideal(15_000, work_us as f64, capacity);
            // Before the window is wide enough: it doubles with each round.
            let ramp = work_us as f64 / 1e6 * 12.0;
            assert!(
                outcome.seconds <= 1.15 * ideal || outcome.seconds <= ideal + ramp,
                "{capacity} at once, {work_us} us: {} s, ideal {ideal} s",
                outcome.seconds
            );
            assert!(outcome.at_once_max <= 1024);
        }
    }
}

#[test]
fn an_owner_with_a_limit_of_its_own_is_kept_busy_and_never_asked_for_more() {
    let mut window = Window::new(8, 64);
    let outcome = steady(64, 10_000).release(15_000, &mut window);
    assert_eq!(outcome.at_once_max, 64);
    let ideal = ideal(15_000, 10_000.0, 64);
    assert!(
        outcome.seconds <= 1.05 * ideal,
        "{} s, ideal {ideal} s",
        outcome.seconds
    );
}

#[test]
fn the_queue_at_an_owner_of_any_capacity_stays_short() {
    for capacity in [4, 16, 64] {
        let mut window = Window::new(8, 100_000);
        steady(capacity, 10_000).release(15_000, &mut window);
        let most = 4 * capacity + 16;
        assert!(window.size() <= most, "{capacity}: {}", window.size());
    }
}

#[test]
fn an_owner_that_grows_slow_is_asked_for_less_though_it_bore_the_most() {
    let mut window = Window::new(8, 64);
    steady(64, 10_000).release(5_000, &mut window);
    assert_eq!(window.size(), 64);
    // From now on it works on four at once.
    let begins_us = u64::try_from(window.now.as_micros()).unwrap();
    let mut owner = Owner {
        begins_us,
        ..steady(4, 10_000)
    };
    owner.release(5_000, &mut window);
    assert!(window.size() <= 32, "{}", window.size());
}

#[test]
fn requests_that_differ_a_hundredfold_do_not_close_the_window() {
    let mut state = 1_u64;
    let mut random = move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let draw = (state >> 33) % 100;
        if draw < 70 { 1_000 } else { 1_000 * (1 + draw) }
    };
    let mean: f64 = {
        let mut copy = random;
        (0..15_000_u64).map(|n| copy(n) as f64).sum::<f64>() / 15_000.0
    };
    let mut window = Window::new(8, 1024);
    let mut owner = Owner {
        capacity: 64,
        work: &mut random,
        begins_us: 0,
    };
    let outcome = owner.release(15_000, &mut window);
    let ideal = ideal(15_000, mean, 64);
    assert!(
        outcome.seconds <= 1.15 * ideal,
        "{} s, ideal {ideal} s",
        outcome.seconds
    );
}

/// A window that has grown, and the clock of its owner: each answer takes a millisecond, however many there are.
struct Told {
    window: Window,
    now: Duration,
}

impl Told {
    fn grown() -> Self {
        let mut told = Self {
            window: Window::new(8, 1024),
            now: Duration::ZERO,
        };
        (0..200).for_each(|_| told.answer(Verdict::Fine));
        told
    }

    fn answer(&mut self, verdict: Verdict) {
        let waiting = self.window.size();
        self.now += Duration::from_millis(1) / u32::try_from(waiting).unwrap();
        self.window.elapse(self.now, waiting);
        self.window.answered(verdict);
    }
}

#[test]
fn failures_halve_it_and_a_few_only_stop_its_growth() {
    let mut told = Told::grown();
    let before = told.window.size();
    assert!(before > 100, "{before}");
    (0..1000).for_each(|_| told.answer(Verdict::Failed));
    assert!(told.window.size() < before / 4, "{}", told.window.size());
    let mut told = Told::grown();
    for number in 0..1000 {
        told.answer(if number % 20 == 0 {
            Verdict::Failed
        } else {
            Verdict::Fine
        });
    }
    assert!(told.window.size() >= before, "{}", told.window.size());
    let before = told.window.size();
    told.window.connect_failed();
    assert_eq!(told.window.size(), before / 2);
}

#[test]
fn the_canary_goes_alone() {
    let mut window = Window::new(8, 1024);
    assert_eq!((window.size(), window.is_canary_over()), (1, false));
    window.connect_failed();
    assert_eq!((window.size(), window.is_canary_over()), (1, false));
    window.elapse(Duration::from_secs(9), 1);
    window.answered(Verdict::Fine);
    assert_eq!((window.size(), window.is_canary_over()), (8, true));
}

#[test]
fn another_bound_is_kept_at_once() {
    let mut told = Told::grown();
    told.window.bound(10);
    assert_eq!(told.window.size(), 10);
    (0..1000).for_each(|_| told.answer(Verdict::Fine));
    assert_eq!(told.window.size(), 10);
}

/// An owner's requests take so long, in microseconds, at random.
fn work(seed: u64, least_us: u64, spread_us: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        least_us + (state >> 33) % spread_us
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Of whatever strength the owner is: it is busy nearly all the time, and its queue is bounded.
    #[test]
    fn any_owner_is_kept_busy_without_a_herd(
        capacity in 2_usize..400,
        least_us in 500_u64..30_000,
        uneven in 1_u64..4,
        most in 8_u32..2_000,
        seed in any::<u64>(),
    ) {
        const HELD: u64 = 15_000;
        let spread_us = least_us * uneven;
        let mut window = Window::new(8, most);
        let work = work(seed, least_us, spread_us);
        let mut owner = Owner { capacity, work, begins_us: 0 };
        let outcome = owner.release(HELD, &mut window);
        prop_assert!(outcome.at_once_max <= most as usize);
        let mean_us = least_us as f64 + spread_us as f64 / 2.0;
        let at_once = capacity.min(most as usize);
        let ideal = ideal(HELD, mean_us, at_once);
        // While it doubles, and the slowest ones at the end.
        let ramp = (least_us + spread_us) as f64 / 1e6 * 14.0;
        prop_assert!(
            outcome.seconds <= 1.25 * ideal + ramp,
            "{} s, ideal {ideal} s, ramp {ramp} s, window {}", outcome.seconds, window.size(),
        );
    }

    /// Whatever it is told in whatever order, it stays between one and the bound.
    #[test]
    fn it_never_leaves_its_bounds(
        first in 1_u32..50,
        most in 1_u32..200,
        steps in proptest::collection::vec((0_u8..12, 0_u64..50_000, 0_usize..300), 1..2_000),
    ) {
        let mut window = Window::new(first, most);
        let mut now = Duration::ZERO;
        for (what, micros, waiting) in steps {
            now += Duration::from_micros(micros);
            window.elapse(now, waiting);
            match what {
                0 => window.connect_failed(),
                1 | 2 => window.answered(Verdict::Failed),
                _ => window.answered(Verdict::Fine),
            }
            prop_assert!((1..=most as usize).contains(&window.size()), "{}", window.size());
        }
    }
}
