//! The held: a queue by arrival, its counters, and the pace at which it empties.
//!
//! Everything here runs under the gate's lock and touches no clock, so the counters balance at every instant
//! anybody can see: `held = released + gave_up + evicted + held_now`. A request that comes back after a connect
//! error is held, and counted, a second time.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::id::Register;
use tokio::sync::oneshot;

use super::gate::{Gate, GateLimits};
use super::ticket::{Pass, Ticket};

/// Upper bounds of the hold-time histogram, in milliseconds.
pub(crate) const HOLD_BUCKETS_MS: [u64; 12] = [
    10, 50, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 60_000,
];

/// Place in the queue: arrival in nanoseconds since the gate was made, then a number that makes it unique.
pub(super) type Key = (u64, u64);

/// Why a held request was refused by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eviction {
    /// `held_max` were held already.
    Full,
    /// It was held for `hold_ms_max`.
    TooOld,
    /// The proxy is going away.
    Shutdown,
}

/// The right to go upstream, on its way to the task that waits for it.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) register: Register,
    pub(super) worker: usize,
    pub(super) pass: Pass,
}

/// One who waits.
pub(super) struct Waiter {
    pub(super) worker: usize,
    pub(super) client: SocketAddr,
    pub(super) verdict: oneshot::Sender<Result<Grant, Eviction>>,
}

impl std::fmt::Debug for Waiter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Waiter")
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

/// Counters of the held, seen together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HeldCounts {
    pub(crate) held: u64,
    pub(crate) released: u64,
    pub(crate) gave_up: u64,
    pub(crate) evicted: u64,
    pub(crate) held_now: u64,
}

/// How long the held were held: cumulative as Prometheus wants it only when written out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HoldTimes {
    pub(crate) buckets: [u64; HOLD_BUCKETS_MS.len() + 1],
    pub(crate) sum_ns: u128,
}

/// How fast the queue may empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// The gate is open: whoever is still here goes.
    AtOnce,
    /// As the window allows.
    Window,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// One request at a time until one is answered.
    Canary,
    /// The owner answers: as many at once as the window says.
    Window,
}

/// The queue and the pace of its release. The control law: one canary; each answer adds one to the window, each
/// connect error halves it and pauses for a time that doubles. Additive increase with multiplicative decrease is
/// what lets many proxies in front of one upstream converge (Chiu and Jain, 1989).
#[derive(Debug)]
pub(crate) struct Held {
    waiting: BTreeMap<Key, Waiter>,
    unique: u64,
    counts: HeldCounts,
    times: HoldTimes,
    limits: GateLimits,
    hold_generation: u64,
    release_generation: u64,
    stage: Stage,
    window: u32,
    outstanding: u32,
    pause: Option<Duration>,
    paused_until: Option<Instant>,
    opened: Option<Instant>,
    /// The drain of this hold is complete.
    drained: bool,
    shut: bool,
}

impl Held {
    pub(super) fn new(limits: GateLimits) -> Self {
        Self {
            waiting: BTreeMap::new(),
            unique: 0,
            counts: HeldCounts::default(),
            times: HoldTimes::default(),
            limits,
            hold_generation: 0,
            release_generation: 0,
            stage: Stage::Canary,
            window: 1,
            outstanding: 0,
            pause: None,
            paused_until: None,
            opened: None,
            drained: false,
            shut: false,
        }
    }

    /// The bounds in force.
    pub(super) const fn limits(&self) -> &GateLimits {
        &self.limits
    }

    pub(super) fn set_limits(&mut self, limits: GateLimits) {
        self.limits = limits;
    }

    /// Counters at this instant.
    pub(crate) fn counts(&self) -> HeldCounts {
        HeldCounts {
            held_now: self.waiting.len() as u64,
            ..self.counts
        }
    }

    /// Hold times so far of those who are no longer held.
    pub(crate) const fn times(&self) -> &HoldTimes {
        &self.times
    }

    /// Changes with every hold and every release, so that a drain knows whether it still speaks of the same hold.
    pub(crate) const fn hold_generation(&self) -> u64 {
        self.hold_generation
    }

    pub(super) fn push(
        &mut self,
        arrival_ns: u64,
        worker: usize,
        client: SocketAddr,
    ) -> Result<(Key, oneshot::Receiver<Result<Grant, Eviction>>), Eviction> {
        self.counts.held += 1;
        if self.shut || self.waiting.len() >= self.limits.held_max {
            self.counts.evicted += 1;
            self.record(0);
            return Err(if self.shut {
                Eviction::Shutdown
            } else {
                Eviction::Full
            });
        }
        self.unique += 1;
        let key = (arrival_ns, self.unique);
        let (verdict, receiver) = oneshot::channel();
        let waiter = Waiter {
            worker,
            client,
            verdict,
        };
        self.waiting.insert(key, waiter);
        Ok((key, receiver))
    }

    /// Clients of the held that are at one of these addresses, in the order of their arrival.
    pub(crate) fn clients_at(&self, addresses: &[IpAddr], most: usize) -> Vec<SocketAddr> {
        let clients = self.waiting.values().map(|waiter| waiter.client);
        let there = clients.filter(|client| addresses.contains(&client.ip()));
        there.take(most).collect()
    }

    pub(super) fn gave_up(&mut self, key: Key, now_ns: u64) {
        if self.waiting.remove(&key).is_some() {
            self.counts.gave_up += 1;
            self.record(now_ns.saturating_sub(key.0));
        }
    }

    pub(super) fn evict_older_than(&mut self, arrival_ns: u64, now_ns: u64) {
        while self
            .waiting
            .first_key_value()
            .is_some_and(|(key, _)| key.0 <= arrival_ns)
        {
            self.evict_first(now_ns, Eviction::TooOld);
        }
    }

    pub(super) fn shut(&mut self, now_ns: u64) {
        self.shut = true;
        while !self.waiting.is_empty() {
            self.evict_first(now_ns, Eviction::Shutdown);
        }
    }

    fn evict_first(&mut self, now_ns: u64, why: Eviction) {
        if let Some((key, waiter)) = self.waiting.pop_first() {
            self.counts.evicted += 1;
            self.record(now_ns.saturating_sub(key.0));
            // A client that left in this very moment gets no answer; it was evicted first.
            drop(waiter.verdict.send(Err(why)));
        }
    }

    pub(super) fn begin_hold(&mut self) {
        self.hold_generation += 1;
        self.release_generation += 1;
        self.outstanding = 0;
        self.paused_until = None;
        self.drained = false;
    }

    /// Whether a drain of this hold was declared complete: nothing may pass any more.
    pub(super) const fn is_drained(&self) -> bool {
        self.drained
    }

    pub(super) const fn note_drained(&mut self) {
        self.drained = true;
    }

    pub(super) fn begin_release(&mut self) {
        self.hold_generation += 1;
        self.release_generation += 1;
        self.stage = Stage::Canary;
        self.window = 1;
        self.outstanding = 0;
        self.pause = None;
        self.paused_until = None;
    }

    pub(super) fn opened(&mut self, now: Instant) {
        self.opened = Some(now);
        self.paused_until = None;
    }

    /// So recently that the owner may not accept yet.
    pub(super) fn opened_a_moment_ago(&self, now: Instant) -> bool {
        self.opened
            .is_some_and(|opened| now.saturating_duration_since(opened) < self.limits.release.grace)
    }

    /// Takes the next in line if the pace allows one now; it then counts as released.
    pub(super) fn next_to_release(
        &mut self,
        pace: Pace,
        now: Instant,
        now_ns: u64,
    ) -> Option<(Waiter, Pass)> {
        if pace == Pace::Window {
            if self.paused_until.is_some_and(|until| now < until) || self.outstanding >= self.window
            {
                return None;
            }
            self.paused_until = None;
        }
        let (key, waiter) = self.waiting.pop_first()?;
        self.counts.released += 1;
        self.record(now_ns.saturating_sub(key.0));
        match pace {
            Pace::AtOnce => Some((waiter, Pass::Open)),
            Pace::Window => {
                self.outstanding += 1;
                Some((waiter, self.pass()))
            }
        }
    }

    /// The one just taken had left without a word.
    pub(super) fn undeliverable(&mut self, pass: Pass) {
        self.counts.released -= 1;
        self.counts.gave_up += 1;
        if pass == self.pass() {
            self.outstanding -= 1;
        }
    }

    /// The mark of a request released now.
    const fn pass(&self) -> Pass {
        Pass::Released {
            generation: self.release_generation,
        }
    }

    /// Nobody waits, and the owner has answered or nobody is left to ask it.
    pub(super) fn release_is_over(&self) -> bool {
        let settled =
            self.stage == Stage::Window || (self.outstanding == 0 && self.paused_until.is_none());
        self.waiting.is_empty() && settled
    }

    pub(super) fn answered(&mut self, generation: u64) {
        if generation != self.release_generation {
            return;
        }
        self.outstanding = self.outstanding.saturating_sub(1);
        self.pause = None;
        self.window = match self.stage {
            Stage::Canary => self.limits.release.window_first,
            Stage::Window => self.window + 1,
        };
        self.window = self.window.min(self.limits.release.window_max);
        self.stage = Stage::Window;
    }

    pub(super) fn forgotten(&mut self, generation: u64) {
        if generation == self.release_generation {
            self.outstanding = self.outstanding.saturating_sub(1);
        }
    }

    pub(super) fn connect_failed(&mut self, pass: Pass, now: Instant) {
        if pass == self.pass() {
            self.outstanding = self.outstanding.saturating_sub(1);
        }
        let pause = self
            .pause
            .map_or(self.limits.release.backoff_first, |pause| {
                (pause * 2).min(self.limits.release.backoff_max)
            });
        self.pause = Some(pause);
        self.paused_until = Some(now + pause);
        self.window = (self.window / 2).max(1);
    }

    /// Arrival of the one who waits longest.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.waiting.first_key_value().map(|(key, _)| key.0)
    }

    /// End of the pause after a connect error.
    pub(super) const fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    fn record(&mut self, ns: u64) {
        let bucket = HOLD_BUCKETS_MS
            .iter()
            .position(|most| ns <= most * 1_000_000);
        self.times.buckets[bucket.unwrap_or(HOLD_BUCKETS_MS.len())] += 1;
        self.times.sum_ns += u128::from(ns);
    }
}

/// A place in the queue. Dropped before its verdict, it counts as given up.
#[derive(Debug)]
pub(crate) struct Parked {
    gate: Arc<Gate>,
    key: Key,
    verdict: Option<oneshot::Receiver<Result<Grant, Eviction>>>,
}

impl Parked {
    pub(super) fn new(
        gate: Arc<Gate>,
        key: Key,
        verdict: oneshot::Receiver<Result<Grant, Eviction>>,
    ) -> Self {
        Self {
            gate,
            key,
            verdict: Some(verdict),
        }
    }

    /// Waits to be let through or refused.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing; dropping the place gives it up, and hands a ticket that was already on
    /// its way back.
    pub(crate) async fn verdict<'g>(&mut self, gate: &'g Gate) -> Result<Ticket<'g>, Eviction> {
        let Some(receiver) = self.verdict.as_mut() else {
            return Err(Eviction::Shutdown);
        };
        let verdict = receiver.await;
        self.verdict = None;
        match verdict {
            Ok(Ok(grant)) => Ok(Ticket::new(gate, grant.worker, grant.register, grant.pass)),
            Ok(Err(eviction)) => Err(eviction),
            // The queue never drops a waiter unanswered while its gate lives, and we hold the gate.
            Err(_) => Err(Eviction::Shutdown),
        }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        let Some(mut receiver) = self.verdict.take() else {
            return;
        };
        self.gate.gave_up(self.key);
        if let Ok(Ok(grant)) = receiver.try_recv() {
            drop(Ticket::new(
                &self.gate,
                grant.worker,
                grant.register,
                grant.pass,
            ));
        }
    }
}
