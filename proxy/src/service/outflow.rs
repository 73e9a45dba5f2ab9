//! The outflow: who of the held may leave now, and what is known of those who left in this release.
//!
//! A released request has a *slot* from the moment it leaves the queue. The owner's answer tells the [`Window`] how it
//! does; the slot is free when the ticket is dropped, with the last byte of the answer, so that long bodies count. Two
//! kinds free it earlier: tunnels at their answer, and whoever takes longer than `patience`: an application that makes
//! clients wait for news would otherwise let nobody else through. Runs under the gate's lock, and looks at no clock.

use std::collections::BTreeMap;
use std::time::Duration;

use super::ticket::{Pass, Slot};
use super::window::{Verdict, Window};
use crate::clock::nanoseconds;
use crate::config::Release;

/// The pace of one release after the other.
#[derive(Debug)]
pub(super) struct Outflow {
    /// Which release or hold it is; what belongs to an earlier one moves nothing.
    generation: u64,
    began_ns: u64,
    window: Window,
    /// Those under way, in the order in which they left.
    slots: BTreeMap<u64, UnderWay>,
    next_slot: u64,
    /// Those of them that have no answer yet.
    waiting: usize,
    pause: Option<Duration>,
    paused_until_ns: Option<u64>,
    spread: Option<Spread>,
}

#[derive(Debug)]
struct UnderWay {
    since_ns: u64,
    answer: AnswerHead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AnswerHead {
    Awaited,
    Here,
}

/// The held of one release leave evenly in a given time.
#[derive(Debug)]
struct Spread {
    every_ns: u64,
    left: u64,
    next_ns: u64,
}

impl Outflow {
    /// Of a gate that has never held.
    pub(super) fn new() -> Self {
        Self {
            generation: 0,
            began_ns: 0,
            window: Window::new(1, 1),
            slots: BTreeMap::new(),
            next_slot: 0,
            waiting: 0,
            pause: None,
            paused_until_ns: None,
            spread: None,
        }
    }

    /// A hold begins: nobody leaves, and whoever left belongs to the past.
    pub(super) fn stop(&mut self) {
        self.generation += 1;
        self.slots.clear();
        self.waiting = 0;
        self.paused_until_ns = None;
        self.spread = None;
    }

    /// A release begins, of so many.
    pub(super) fn begin(&mut self, held: usize, now_ns: u64, release: &Release) {
        self.stop();
        self.began_ns = now_ns;
        self.window = Window::new(release.window_first, release.window_max);
        self.pause = None;
        self.spread = spread(held, now_ns, release.spread);
    }

    /// Other bounds are in force.
    pub(super) fn bound(&mut self, release: &Release) {
        self.window.bound(release.window_max);
    }

    /// Whether one may leave now.
    pub(super) fn may_leave(&self, now_ns: u64) -> bool {
        let is_paused = self.paused_until_ns.is_some_and(|until| now_ns < until);
        let is_early = self
            .spread
            .as_ref()
            .is_some_and(|spread| now_ns < spread.next_ns);
        !is_paused && !is_early && self.slots.len() < self.window.size()
    }

    /// One leaves.
    pub(super) fn leaves(&mut self, now_ns: u64) -> Pass {
        self.elapse(now_ns);
        self.paused_until_ns = None;
        if let Some(spread) = &mut self.spread {
            spread.next_ns += spread.every_ns;
            spread.left -= 1;
            if spread.left == 0 {
                self.spread = None;
            }
        }
        let number = self.next_slot;
        self.next_slot += 1;
        self.waiting += 1;
        let under_way = UnderWay {
            since_ns: now_ns,
            answer: AnswerHead::Awaited,
        };
        self.slots.insert(number, under_way);
        Pass::Released(Slot {
            generation: self.generation,
            number,
        })
    }

    /// The owner has begun to answer it.
    pub(super) fn answered(&mut self, slot: Slot, verdict: Verdict, now_ns: u64) {
        if slot.generation != self.generation {
            return;
        }
        self.elapse(now_ns);
        if let Some(under_way) = self.slots.get_mut(&slot.number)
            && under_way.answer == AnswerHead::Awaited
        {
            under_way.answer = AnswerHead::Here;
            self.waiting -= 1;
        }
        self.pause = None;
        self.window.answered(verdict);
    }

    /// It is over, or counts no longer.
    pub(super) fn ended(&mut self, slot: Slot, now_ns: u64) {
        if slot.generation == self.generation {
            self.elapse(now_ns);
            self.free(slot.number);
        }
    }

    /// It could not be connected.
    pub(super) fn connect_failed(&mut self, pass: Pass, now_ns: u64, release: &Release) {
        self.elapse(now_ns);
        if let Pass::Released(slot) = pass {
            self.ended(slot, now_ns);
        }
        let pause = self.pause.map_or(release.backoff_first, |pause| {
            (pause * 2).min(release.backoff_max)
        });
        self.pause = Some(pause);
        self.paused_until_ns = Some(now_ns.saturating_add(nanoseconds(pause)));
        self.window.connect_failed();
    }

    /// Whoever has been under way for longer than this no longer counts.
    pub(super) fn lose_patience(&mut self, now_ns: u64, patience: Duration) {
        let patience_ns = nanoseconds(patience);
        while let Some((number, under_way)) = self.slots.first_key_value()
            && under_way.since_ns.saturating_add(patience_ns) <= now_ns
        {
            let number = *number;
            self.elapse(now_ns);
            self.free(number);
        }
    }

    /// When somebody may leave who may not now, or patience ends, if nothing else happens.
    pub(super) fn next_ns(&self, patience: Duration) -> Option<u64> {
        let spread = self.spread.as_ref().map(|spread| spread.next_ns);
        let first = self.slots.first_key_value();
        let patience = first.map(|(_, slot)| slot.since_ns.saturating_add(nanoseconds(patience)));
        // The last two count only when the first has passed.
        match (self.paused_until_ns, spread) {
            (Some(paused), Some(spread)) => Some(paused.max(spread)),
            (Some(until), None) | (None, Some(until)) => Some(until),
            (None, None) => patience,
        }
    }

    /// The owner has answered, or nobody is left to ask it.
    pub(super) fn is_settled(&self) -> bool {
        let is_idle = self.slots.is_empty() && self.paused_until_ns.is_none();
        self.window.is_canary_over() || is_idle
    }

    fn elapse(&mut self, now_ns: u64) {
        let since = Duration::from_nanos(now_ns.saturating_sub(self.began_ns));
        self.window.elapse(since, self.waiting);
    }

    fn free(&mut self, number: u64) {
        let ended = self.slots.remove(&number);
        if ended.is_some_and(|ended| ended.answer == AnswerHead::Awaited) {
            self.waiting -= 1;
        }
    }
}

fn spread(held: usize, now_ns: u64, time: Duration) -> Option<Spread> {
    let left = held as u64;
    let every_ns = nanoseconds(time).checked_div(left)?;
    (every_ns > 0).then_some(Spread {
        every_ns,
        left,
        next_ns: now_ns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        Release {
            window_first: 2,
            window_max: 4,
            backoff_first: Duration::from_nanos(10),
            backoff_max: Duration::from_nanos(40),
            grace: Duration::ZERO,
            spread: Duration::ZERO,
            patience: Duration::from_nanos(1_000),
        }
    }

    fn slot(pass: Pass) -> Slot {
        let Pass::Released(slot) = pass else {
            panic!("{pass:?}")
        };
        slot
    }

    /// As many as may leave now.
    fn leave(outflow: &mut Outflow, now_ns: u64) -> Vec<Slot> {
        let mut gone = Vec::new();
        while outflow.may_leave(now_ns) {
            gone.push(slot(outflow.leaves(now_ns)));
        }
        gone
    }

    #[test]
    fn a_slot_is_taken_until_the_last_byte_and_not_until_the_answer_begins() {
        let mut outflow = Outflow::new();
        outflow.begin(9, 0, &release());
        let canary = leave(&mut outflow, 0);
        assert_eq!(canary.len(), 1);
        outflow.answered(canary[0], Verdict::Fine, 10);
        assert_eq!(leave(&mut outflow, 10).len(), 1, "one of two is taken");
        outflow.ended(canary[0], 20);
        assert_eq!(leave(&mut outflow, 20).len(), 1);
    }

    #[test]
    fn whoever_takes_longer_than_patience_gives_way() {
        let mut outflow = Outflow::new();
        let release = release();
        outflow.begin(9, 0, &release);
        let canary = leave(&mut outflow, 0);
        assert_eq!(outflow.next_ns(release.patience), Some(1_000));
        outflow.lose_patience(999, release.patience);
        assert!(leave(&mut outflow, 999).is_empty());
        outflow.lose_patience(1_000, release.patience);
        let second = leave(&mut outflow, 1_000);
        assert_eq!(second.len(), 1, "still one by one: nobody has answered");
        outflow.answered(canary[0], Verdict::Fine, 1_100);
        outflow.ended(canary[0], 1_100);
        assert_eq!(leave(&mut outflow, 1_100).len(), 1);
    }

    #[test]
    fn a_spread_release_lets_one_leave_after_the_other_in_even_steps() {
        let mut outflow = Outflow::new();
        let release = Release {
            spread: Duration::from_nanos(100),
            ..release()
        };
        outflow.begin(4, 1_000, &release);
        let canary = leave(&mut outflow, 1_000);
        outflow.answered(canary[0], Verdict::Fine, 1_001);
        outflow.ended(canary[0], 1_001);
        let mut left = Vec::new();
        for now_ns in 1_001..=1_075 {
            if outflow.may_leave(now_ns) {
                let slot = slot(outflow.leaves(now_ns));
                outflow.answered(slot, Verdict::Fine, now_ns);
                outflow.ended(slot, now_ns);
                left.push(now_ns);
            }
        }
        assert_eq!(left, [1_025, 1_050, 1_075]);
        assert!(outflow.may_leave(1_075), "newcomers are not spread");
    }

    #[test]
    fn a_pause_after_a_connect_error_doubles_until_somebody_is_answered() {
        let mut outflow = Outflow::new();
        let release = release();
        outflow.begin(9, 0, &release);
        let mut now_ns = 0;
        for pause in [10, 20, 40, 40] {
            let pass = outflow.leaves(now_ns);
            outflow.connect_failed(pass, now_ns, &release);
            assert_eq!(outflow.next_ns(release.patience), Some(now_ns + pause));
            assert!(!outflow.may_leave(now_ns + pause - 1));
            now_ns += pause;
            assert!(outflow.may_leave(now_ns));
        }
    }

    #[test]
    fn what_left_in_an_earlier_release_moves_nothing() {
        let mut outflow = Outflow::new();
        outflow.begin(9, 0, &release());
        let early = leave(&mut outflow, 0);
        outflow.stop();
        outflow.begin(9, 10, &release());
        outflow.answered(early[0], Verdict::Fine, 20);
        outflow.ended(early[0], 20);
        assert_eq!(leave(&mut outflow, 20).len(), 1, "the canary of this one");
        assert!(leave(&mut outflow, 30).is_empty());
    }
}
