//! How many of the released may be at the owner at once: pure arithmetic, told of every answer and of the time that
//! passes. It never lets the window grow past `window_max`, whatever it is told.
//!
//! **The law.** One canary goes alone. Then answers are counted in rounds of four times as many as the window is wide,
//! at least 64; while the window doubles, as many as it is wide, at least 8. A round's `latency` is that of Little's law
//! (1961): the time that requests have waited for their answers' heads, all together, divided by the answers. (The mean
//! of what was answered would be that of the fast ones: the slow ones are still there when a round ends.) `floor` is
//! the least but one of the last sixteen rounds; the least may be luck.
//!
//! - *Doubling*: each answer adds one, so a round doubles the window, until latency is more than `bearable` or anything
//!   fails. Bearable is twice the floor, or five milliseconds above it where that is more. This is TCP's slow start
//!   (Jacobson 1988). What it has seen of latencies is forgotten then, and the first floor of the next stage is that of
//!   a round at a quarter of the window.
//! - *Steady*: at the end of a round, `window = window · g + √window` with `g = bearable / latency`, at least a half
//!   and at most one. Near the floor that is an additive step; above it the window shrinks in proportion to the queue
//!   that has built up at the owner. It is the gradient of TCP Vegas (Brakmo and Peterson 1995) in the form that
//!   Netflix' concurrency limits have (`Gradient2`, 2018), with the square root as the room for a queue: at a capacity
//!   of `k` requests at once the window settles near `2 k`.
//! - Every eighth round only a quarter of the window goes, to see how fast the owner is without the queue that we make
//!   there: otherwise the floor would creep up with it. BBR looks for its shortest round trip in the same way (Cardwell
//!   et al. 2016).
//! - As long as the window is as wide as it may be and latency stays bearable, nothing is looked for, and
//!   the floor stays what it was: an owner whose bound is known is not left idle to measure it.
//! - More than a tenth of a round failed: the window is halved. A connect error halves it at once (multiplicative
//!   decrease is what lets many proxies before one owner converge: Chiu and Jain 1989).
//!
//! Rounds, not single answers, are compared, because requests differ: the fastest one of a site says nothing about the
//! others.

use std::time::Duration;

/// Shortest round, in answers: a mean of fewer says little.
const ROUND_ANSWERS_MIN: u32 = 64;
/// A round is so many times as long as the window is wide: fast requests leave in bursts.
const ROUND_WIDTHS: u32 = 4;
/// The same while the window doubles: a floor is wanted soon.
const FIRST_ROUND_ANSWERS_MIN: u32 = 8;
/// Latency may be so many times the floor before the window shrinks: the mean of 64 requests of a real site is off by
/// a fifth, and the least of sixteen such means by a third.
const TOLERANCE: f64 = 2.0;
/// And so many nanoseconds above the floor in any case: a queue that lasts for less than five milliseconds hurts nobody
/// (the target of CoDel, Nichols and Jacobson 2012), and at an owner that answers within one, twice the floor is noise.
const QUEUE_NS: f64 = 5e6;
/// Most that one round shrinks the window by.
const GRADIENT_MIN: f64 = 0.5;
/// Rounds that the floor is taken from.
const FLOOR_ROUNDS: usize = 16;
/// The least of fewer rounds is taken for no luck: it may be the only one without a queue of ours.
const LUCK_ROUNDS_MIN: usize = 4;
/// One in so many is at a fraction of the window.
const ASIDE_ROUNDS: usize = 8;
/// That fraction's denominator: twice the tolerance, so that no queue of ours is left in such a round.
const ASIDE_SHARE: f64 = 4.0;
/// One failed answer in so many is no reason to shrink; it is one not to grow.
const FAILED_SHARE: u32 = 10;

/// How an answer went, as far as its owner's strength shows in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It served.
    Fine,
    /// It said that it could not.
    Failed,
}

impl Verdict {
    /// Of an answer's status: an owner that is asked for too much says so with 500 and above.
    pub(crate) const fn of(status: u16) -> Self {
        if status >= 500 {
            Self::Failed
        } else {
            Self::Fine
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// One request at a time until one is answered.
    Canary,
    Doubling,
    Steady,
}

/// The window of one release.
#[derive(Debug)]
pub(super) struct Window {
    stage: Stage,
    size: f64,
    first: f64,
    most: f64,
    /// Latencies of the last rounds, in nanoseconds; infinite where there was none.
    latencies: [f64; FLOOR_ROUNDS],
    rounds: usize,
    /// The size to come back to after a round at a fraction of it.
    aside: Option<f64>,
    /// Until when time is counted, since the release began.
    now: Duration,
    round: Round,
}

#[derive(Debug, Default)]
struct Round {
    /// Answers to those that went before it began, and met another queue.
    before: u32,
    answers: u32,
    failed: u32,
    /// Ends it.
    answers_max: u32,
    /// Nanoseconds that requests have waited, all together.
    spent_ns: f64,
}

impl Window {
    /// For a release that has not begun.
    pub(super) fn new(first: u32, most: u32) -> Self {
        let most = f64::from(most.max(1));
        Self {
            stage: Stage::Canary,
            size: 1.0,
            first: f64::from(first).min(most),
            most,
            latencies: [f64::INFINITY; FLOOR_ROUNDS],
            rounds: 0,
            aside: None,
            now: Duration::ZERO,
            round: Round::default(),
        }
    }

    /// So many may be at the owner at once.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between one and window_max
    pub(super) const fn size(&self) -> usize {
        self.size as usize
    }

    /// Whether the owner has answered once.
    pub(super) const fn is_canary_over(&self) -> bool {
        !matches!(self.stage, Stage::Canary)
    }

    /// Another `window_max` is in force.
    pub(super) fn bound(&mut self, most: u32) {
        self.most = f64::from(most.max(1));
        self.first = self.first.min(self.most);
        self.aside = self.aside.map(|size| size.min(self.most));
        self.resize(self.size);
    }

    /// Since the last call, and until so long after the release began, so many have waited for their answers. To be
    /// called before that number changes.
    #[allow(clippy::cast_precision_loss)] // a release takes no years
    pub(super) fn elapse(&mut self, now: Duration, waiting: usize) {
        let passed = now.saturating_sub(self.now).as_nanos() as f64;
        self.now = self.now.max(now);
        if self.round.before == 0 {
            self.round.spent_ns += passed * waiting as f64;
        }
    }

    /// One was answered; the time until then has been told.
    pub(super) fn answered(&mut self, verdict: Verdict) {
        if self.stage == Stage::Canary {
            self.size = self.first;
            self.stage = Stage::Doubling;
            self.begin_round(0);
            return;
        }
        if self.round.before > 0 {
            self.round.before -= 1;
            return;
        }
        self.round.answers += 1;
        if verdict == Verdict::Failed {
            self.round.failed += 1;
            self.be_steady();
        }
        // The first answers of a round say little of it: others have waited as long, and are about to be answered.
        let is_half = self.round.answers * 2 >= self.round.answers_max;
        if self.stage == Stage::Doubling && !(is_half && self.has_left_floor()) {
            self.resize(self.size + 1.0);
        }
        if self.round.answers >= self.round.answers_max {
            self.end_round();
        }
    }

    /// No connection came about.
    pub(super) fn connect_failed(&mut self) {
        self.be_steady();
        self.halve();
    }

    fn be_steady(&mut self) {
        if self.stage == Stage::Doubling {
            self.stage = Stage::Steady;
            self.latencies = [f64::INFINITY; FLOOR_ROUNDS];
        }
    }

    fn latency(&self) -> f64 {
        self.round.spent_ns / f64::from(self.round.answers.max(1))
    }

    fn floor(&self) -> f64 {
        let (mut least, mut second) = (f64::INFINITY, f64::INFINITY);
        for latency in self.latencies {
            if latency < least {
                second = least;
                least = latency;
            } else if latency < second {
                second = latency;
            }
        }
        let known = self.latencies.iter().filter(|one| one.is_finite()).count();
        if known >= LUCK_ROUNDS_MIN {
            second
        } else {
            least
        }
    }

    /// The latency up to which the owner is taken to bear what it gets.
    fn bearable(&self) -> f64 {
        let floor = self.floor();
        (floor * TOLERANCE).max(floor + QUEUE_NS)
    }

    fn has_left_floor(&self) -> bool {
        self.latency() > self.bearable()
    }

    /// As wide as it may be, and the owner bears it as it did: there is nothing to find out.
    fn is_content(&self) -> bool {
        let floor = self.floor();
        let is_as_before = floor.is_finite() && self.latency() >= floor && !self.has_left_floor();
        self.aside.is_none() && self.size >= self.most && self.round.failed == 0 && is_as_before
    }

    fn end_round(&mut self) {
        if self.is_content() {
            return self.begin_round(0);
        }
        let latency = self.latency();
        self.latencies[self.rounds % FLOOR_ROUNDS] = latency;
        self.rounds += 1;
        let width = self.width();
        if let Some(size) = self.aside.take() {
            self.size = size;
            return self.begin_round(width);
        }
        let gradient = (self.bearable() / latency.max(1.0)).clamp(GRADIENT_MIN, 1.0);
        if gradient < 1.0 && self.stage == Stage::Doubling {
            self.be_steady();
            return self.look_aside(width);
        }
        let Round {
            failed, answers, ..
        } = self.round;
        if failed * FAILED_SHARE > answers {
            self.halve();
        } else if self.stage == Stage::Steady && failed == 0 {
            self.resize(self.size * gradient + self.size.sqrt());
        }
        if self.stage == Stage::Steady && self.rounds.is_multiple_of(ASIDE_ROUNDS) {
            return self.look_aside(width);
        }
        self.begin_round(0);
    }

    /// A round at a fraction of the window.
    fn look_aside(&mut self, width: u32) {
        self.aside = Some(self.size);
        self.resize((self.size / ASIDE_SHARE).floor());
        self.begin_round(width);
    }

    fn width(&self) -> u32 {
        u32::try_from(self.size()).unwrap_or(u32::MAX)
    }

    fn begin_round(&mut self, before: u32) {
        let answers_max = match self.stage {
            Stage::Canary | Stage::Doubling => self.width().max(FIRST_ROUND_ANSWERS_MIN),
            // Not for long: the owner has little to do meanwhile.
            Stage::Steady if self.aside.is_some() => self.width().max(ROUND_ANSWERS_MIN),
            Stage::Steady => (self.width().saturating_mul(ROUND_WIDTHS)).max(ROUND_ANSWERS_MIN),
        };
        self.round = Round {
            before,
            answers_max,
            ..Round::default()
        };
    }

    fn resize(&mut self, size: f64) {
        self.size = size.clamp(1.0, self.most);
    }

    fn halve(&mut self) {
        self.aside = self.aside.map(|size| (size / 2.0).floor().max(1.0));
        self.resize((self.size / 2.0).floor());
    }
}

#[cfg(test)]
mod tests;
