//! The gate: the only part of the proxy that knows about holding.
//!
//! Open, it costs one increment and one load: no lock, no allocation, no await. Otherwise a request waits in
//! [`Held`](super::queue::Held) until it is let through, refused, or its client leaves. The gate never decides who
//! serves: the register does, and only [`Service`](super::Service) changes that.
//!
//! Why an increment *before* the load is enough: both are sequentially consistent, and so are the store of the
//! mode and the sum of the counters in a drain. Either the request sees the closed gate and steps back, or the
//! drain sees the request.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::hold::WritesStatus;
use cutover_protocol::id::{Holder, Register, ServiceName};
use tokio::sync::{Notify, watch};

use super::budget::{Budget, BudgetLimits};
use super::queue::{Eviction, Grant, Held, Key, Pace, Parked};
use super::terms::Terms;
use super::ticket::{Pass, Slot, Ticket};
use super::window::Verdict;
use super::word::{Mode, Word};
use super::writes::{Delayed, WritePace, Writes, moment};
use crate::clock::nanoseconds;
use crate::config::{Config, Release, ServiceConfig};
use crate::limit::Refusals;

/// Counters that belong to one worker, on cache lines of their own so that workers do not slow each other.
#[repr(align(128))]
#[derive(Debug, Default)]
pub(crate) struct Shard {
    in_flight: AtomicU64,
    connections: AtomicU64,
    /// What is carried through a hop is counted here in place of the two above.
    carried: AtomicU64,
    carried_connections: AtomicU64,
    /// Answered requests by the hundreds of their status; index 0 counts those that got no answer.
    pub(crate) answered: [AtomicU64; 6],
    /// What was refused, by reason.
    pub(crate) refusals: Refusals,
    /// Front checks that were answered because they would have had to wait.
    pub(crate) front_checks: AtomicU64,
    /// Connections that waited because there were as many as may be.
    pub(crate) waited: AtomicU64,
    /// Writes that were admitted.
    pub(crate) writes: AtomicU64,
}

/// Bounds of a gate.
#[derive(Debug, Clone)]
pub(crate) struct GateLimits {
    pub(crate) budget: BudgetLimits,
    /// No request of the service is held for longer.
    pub(crate) hold_max: Duration,
    /// The shortest timeout of what stands in front of us.
    pub(crate) front_timeout: Option<Duration>,
    pub(crate) release: Release,
}

impl GateLimits {
    /// As a configuration has them.
    pub(crate) fn of(config: &Config, service: &ServiceName) -> Self {
        let limits = &config.limits;
        let mut services = config.services.iter();
        let service = services.find(|known| known.name == *service);
        let bound = service.map_or(limits.hold_max, ServiceConfig::hold_bound);
        let when_full = service.map(|service| service.hold.when_full);
        Self {
            budget: BudgetLimits {
                held_max: limits.held_max as u64,
                held_bytes_max: limits.held_bytes_max,
                held_per_address_max: limits.held_per_address_max as u64,
                when_full: when_full.unwrap_or_default(),
            },
            hold_max: bound,
            front_timeout: service.and_then(|service| service.front_timeout),
            release: config.release.clone(),
        }
    }
}

/// What a request meets at the gate.
pub(crate) enum Admission<'g> {
    /// It may go upstream.
    Pass(Ticket<'g>),
    /// It has to wait.
    Wait,
}

/// How the wait for the last byte in flight ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Nothing in flight, no upstream connection.
    Quiet,
    /// Something is left.
    TimedOut,
    /// Another command has opened the gate, or begun another hold.
    Superseded,
}

/// One service's gate, shared by all workers and the control thread.
#[derive(Debug)]
pub(crate) struct Gate {
    word: AtomicU64,
    shards: Box<[Shard]>,
    held: Mutex<Held>,
    /// How full the queue is, for whoever may read or accept.
    pub(crate) budget: Budget,
    /// What limits the writes.
    pub(super) writes: Writes,
    started: Instant,
    changed: watch::Sender<Word>,
    /// Fires when a ticket or an upstream connection ends while the gate is closed.
    quieter: Notify,
    /// Wakes the keeper: a deadline has moved.
    pub(crate) keeper: Notify,
    /// Fires with each change of the held counters.
    pub(crate) counted: Notify,
}

impl Gate {
    pub(crate) fn new(limits: GateLimits, workers: usize, mode: Mode, register: Register) -> Self {
        let word = Word { mode, register };
        Self {
            word: AtomicU64::new(word.pack()),
            shards: (0..workers.max(1)).map(|_| Shard::default()).collect(),
            held: Mutex::new(Held::new(limits)),
            budget: Budget::default(),
            writes: Writes::new(),
            started: Instant::now(),
            changed: watch::Sender::new(word),
            quieter: Notify::new(),
            keeper: Notify::new(),
            counted: Notify::new(),
        }
    }

    /// Mode and register at this instant.
    pub(crate) fn word(&self) -> Word {
        Word::unpack(self.word.load(SeqCst))
    }

    /// Sees every later change of mode or register.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Word> {
        self.changed.subscribe()
    }

    pub(crate) fn shard(&self, worker: usize) -> &Shard {
        &self.shards[worker % self.shards.len()]
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Asks for a ticket. Open: one increment, one load.
    pub(crate) fn admit(&self, worker: usize) -> Admission<'_> {
        self.enter(worker);
        let word = self.word();
        if word.mode == Mode::Open {
            return Admission::Pass(Ticket::new(self, worker, word.register, Pass::Open));
        }
        self.leave(worker);
        Admission::Wait
    }

    /// Asks again on behalf of the application itself, after [`Gate::admit`] has said to wait: it passes as long as
    /// anything is in flight, which may be what waits for it, and waits like any other once the drain is complete.
    pub(crate) fn admit_own(&self, worker: usize) -> Admission<'_> {
        // Under the lock, so that no drain is declared complete in the same moment.
        let held = self.lock();
        let word = self.word();
        let is_over = word.mode == Mode::Holding && held.is_drained();
        if is_over || self.in_flight() == 0 {
            return Admission::Wait;
        }
        self.enter(worker);
        Admission::Pass(Ticket::new(self, worker, word.register, Pass::Own))
    }

    /// What a write has to wait for before it asks for a ticket; `None` in nearly all cases. A gate that is not open has
    /// means of its own.
    pub(crate) fn delay(&self) -> Option<Delayed<'_>> {
        if !self.writes.is_limited() || self.word().mode != Mode::Open {
            return None;
        }
        let (due_ns, lifted) = self.writes.ask(self.since_start(Instant::now()))?;
        Some(Delayed::new(self, moment(self.started, due_ns), lifted))
    }

    /// Limits writes from now on.
    pub(super) fn limit_writes(&self, pace: WritePace, until: Instant, holder: Option<Holder>) {
        let now_ns = self.since_start(Instant::now());
        self.writes.limit(pace, until, holder, now_ns);
        self.keeper.notify_one();
        self.counted.notify_waiters();
    }

    /// How writes fare.
    pub(crate) fn writes_status(&self) -> WritesStatus {
        self.writes.status(self.writes_admitted(), Instant::now())
    }

    /// Joins the queue, in order of arrival.
    ///
    /// # Errors
    /// The queue is full, or the proxy is shutting down; either way the request counts as evicted.
    pub(crate) fn park(self: &Arc<Self>, worker: usize, terms: Terms) -> Result<Parked, Eviction> {
        let key_time = self.since_start(terms.arrival);
        let own_end = terms.end.map(|end| (self.since_start(end.at), end.why()));
        let mut held = self.lock();
        let (key, receiver) = held.push(key_time, worker, terms, own_end)?;
        self.pump(&mut held);
        drop(held);
        self.keeper.notify_one();
        self.counted.notify_waiters();
        Ok(Parked::new(Arc::clone(self), key, receiver))
    }

    /// Whether a request that could not connect may wait again: the gate has closed since, or was opened so
    /// recently that the owner may not be accepting yet.
    pub(super) fn may_wait_again(self: &Arc<Self>, pass: Pass) -> bool {
        let mut held = self.lock();
        let now = Instant::now();
        let now_ns = self.since_start(now);
        match self.word().mode {
            Mode::Holding => {}
            Mode::Releasing => held.connect_failed(pass, now_ns),
            Mode::Open if held.opened_a_moment_ago(now) => {
                held.begin_release(now_ns);
                held.connect_failed(pass, now_ns);
                self.set(Word {
                    mode: Mode::Releasing,
                    ..self.word()
                });
            }
            Mode::Open => return false,
        }
        drop(held);
        self.keeper.notify_one();
        true
    }

    /// Whether the owner has begun to serve so recently that nobody can know how it does.
    pub(crate) fn has_opened_just_now(&self) -> bool {
        let held = self.lock();
        match self.word().mode {
            Mode::Holding => false,
            Mode::Releasing => true,
            Mode::Open => held.opened_a_moment_ago(Instant::now()),
        }
    }

    /// The owner has begun to answer a released request: the window moves, and others may go through.
    pub(super) fn answered(&self, slot: Slot, verdict: Verdict) {
        let mut held = self.lock();
        held.answered(slot, verdict, self.since_start(Instant::now()));
        self.after_release_step(held);
    }

    /// A released request is over, or counts no longer.
    pub(super) fn ended(&self, slot: Slot) {
        let mut held = self.lock();
        held.ended(slot, self.since_start(Instant::now()));
        self.after_release_step(held);
    }

    /// The keeper need not know: it wakes early enough for whoever left first.
    fn after_release_step(&self, mut held: MutexGuard<'_, Held>) {
        self.pump(&mut held);
        drop(held);
        self.counted.notify_waiters();
    }

    /// A client left while held. Nothing happens if it has just been let through or refused.
    pub(super) fn gave_up(&self, key: Key) {
        let mut held = self.lock();
        held.gave_up(key, self.since_start(Instant::now()));
        self.pump(&mut held);
        drop(held);
        self.counted.notify_waiters();
    }

    /// One who waits keeps so much more.
    pub(super) fn grew(&self, key: Key, bytes: u32) {
        let mut held = self.lock();
        held.grew(key, bytes);
        self.weigh(&held);
    }

    /// Lets go of whoever may go, and sees how full the queue is then.
    fn pump(&self, held: &mut Held) {
        self.let_through(held);
        self.weigh(held);
    }

    fn weigh(&self, held: &Held) {
        self.budget.set(held.tier(self.budget.tier()));
    }

    /// Lets through as many as the window allows, and opens the gate behind the last. Runs under the lock, which
    /// is what makes the change of mode and the queue one step. Somebody may have found the gate closed and join
    /// the queue just after it opened: an open gate lets them through at once.
    fn let_through(&self, held: &mut Held) {
        let word = self.word();
        if word.mode == Mode::Holding {
            return;
        }
        let now = Instant::now();
        let now_ns = self.since_start(now);
        // Before anybody leaves: whose time is over is not executed any more.
        held.evict_expired(now_ns);
        let pace = if word.mode == Mode::Open {
            Pace::AtOnce
        } else {
            Pace::Window
        };
        while let Some((waiter, pass)) = held.next_to_release(pace, now_ns) {
            self.enter(waiter.worker);
            let grant = Grant {
                register: word.register,
                worker: waiter.worker,
                pass,
            };
            if waiter.verdict.send(Ok(grant)).is_err() {
                self.leave(waiter.worker);
                held.undeliverable(pass, now_ns);
            }
        }
        if word.mode == Mode::Releasing && held.release_is_over() {
            held.opened(now);
            self.set(Word {
                mode: Mode::Open,
                ..word
            });
        }
    }

    /// Closes the gate, at this register.
    pub(super) fn close(&self, register: Register) {
        let mut held = self.lock();
        held.begin_hold();
        self.set(Word {
            mode: Mode::Holding,
            register,
        });
        drop(held);
        // Only now, so that whoever was delayed is held.
        self.writes.lift();
        self.keeper.notify_one();
        self.counted.notify_waiters();
    }

    /// Lets the held through to this register's owner, in turn.
    pub(super) fn release(&self, register: Register) {
        let mut held = self.lock();
        held.begin_release(self.since_start(Instant::now()));
        self.set(Word {
            mode: Mode::Releasing,
            register,
        });
        self.after_release_step(held);
        self.keeper.notify_one();
    }

    /// Puts a new register in place without opening or closing anything.
    pub(super) fn advance(&self, register: Register) {
        let held = self.lock();
        self.set(Word {
            register,
            ..self.word()
        });
        drop(held);
        // It was given for the epoch before.
        self.writes.lift();
        self.counted.notify_waiters();
    }

    /// Refuses whoever has waited too long, and lets go whoever may now; returns when to look again.
    pub(crate) fn tend(&self, now: Instant) -> Option<Instant> {
        let mut held = self.lock();
        let now_ns = self.since_start(now);
        held.evict_expired(now_ns);
        held.lose_patience(now_ns);
        self.pump(&mut held);
        let expiry = held.next_expiry_ns();
        let departure = held
            .next_departure_ns()
            .filter(|_| self.word().mode == Mode::Releasing);
        drop(held);
        self.counted.notify_waiters();
        let next_ns = [expiry, departure].into_iter().flatten().min();
        next_ns.and_then(|ns| self.started.checked_add(Duration::from_nanos(ns)))
    }

    /// Sets other bounds, also for those who are held already.
    pub(crate) fn limit(&self, limits: GateLimits) {
        let mut held = self.lock();
        held.set_limits(limits);
        self.weigh(&held);
        drop(held);
        self.keeper.notify_one();
    }

    /// Refuses everybody who is held, and whoever comes later.
    pub(crate) fn shut(&self) {
        let mut held = self.lock();
        held.shut(self.since_start(Instant::now()));
        self.weigh(&held);
        drop(held);
        self.writes.lift();
        self.counted.notify_waiters();
    }

    /// Looks at the held under their lock, so that the counters seen together belong together.
    pub(crate) fn with_held<T>(&self, look: impl FnOnce(&Held) -> T) -> T {
        look(&self.lock())
    }

    /// Waits until nothing is in flight and no upstream connection is left.
    pub(crate) async fn drained(&self, hold: u64, deadline: tokio::time::Instant) -> Drain {
        loop {
            let quieter = self.quieter.notified();
            tokio::pin!(quieter);
            quieter.as_mut().enable();
            {
                let mut held = self.lock();
                if self.word().mode != Mode::Holding || held.hold_generation() != hold {
                    return Drain::Superseded;
                }
                if self.in_flight() == 0 && self.connections() == 0 {
                    held.note_drained();
                    return Drain::Quiet;
                }
            }
            if tokio::time::timeout_at(deadline, quieter).await.is_err() {
                return Drain::TimedOut;
            }
        }
    }

    /// Requests and raw connections between their admission and their last byte.
    pub(crate) fn in_flight(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| shard.in_flight.load(SeqCst))
            .sum()
    }

    /// Connections so far that waited because there were as many as may be.
    pub(crate) fn waited(&self) -> u64 {
        let shards = self.shards.iter();
        shards.map(|shard| shard.waited.load(SeqCst)).sum()
    }

    /// Writes that were admitted so far.
    pub(crate) fn writes_admitted(&self) -> u64 {
        let shards = self.shards.iter();
        shards.map(|shard| shard.writes.load(SeqCst)).sum()
    }

    /// Front checks that were answered so far.
    pub(crate) fn front_checks(&self) -> u64 {
        let shards = self.shards.iter();
        shards.map(|shard| shard.front_checks.load(SeqCst)).sum()
    }

    /// Open upstream connections, idle ones included.
    pub(crate) fn connections(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| shard.connections.load(SeqCst))
            .sum()
    }

    /// Those that are carried through a hop: not in flight, and not to be waited for.
    pub(crate) fn carried(&self) -> u64 {
        let shards = self.shards.iter();
        shards.map(|shard| shard.carried.load(SeqCst)).sum()
    }

    pub(super) fn enter(&self, worker: usize) {
        self.shard(worker).in_flight.fetch_add(1, SeqCst);
    }

    pub(super) fn leave(&self, worker: usize) {
        self.shard(worker).in_flight.fetch_sub(1, SeqCst);
        self.grew_quieter();
    }

    pub(super) fn connection_opens(&self, worker: usize) {
        self.shard(worker).connections.fetch_add(1, SeqCst);
    }

    pub(super) fn connection_closed(&self, worker: usize) {
        self.shard(worker).connections.fetch_sub(1, SeqCst);
        self.grew_quieter();
    }

    /// One that was in flight is carried from now on.
    pub(super) fn carries(&self, worker: usize) {
        self.shard(worker).carried.fetch_add(1, SeqCst);
        self.leave(worker);
    }

    pub(super) fn carried_ends(&self, worker: usize) {
        self.shard(worker).carried.fetch_sub(1, SeqCst);
    }

    /// The same for a connection.
    pub(super) fn carries_connection(&self, worker: usize) {
        let shard = self.shard(worker);
        shard.carried_connections.fetch_add(1, SeqCst);
        self.connection_closed(worker);
    }

    pub(super) fn carried_connection_closed(&self, worker: usize) {
        let shard = self.shard(worker);
        shard.carried_connections.fetch_sub(1, SeqCst);
    }

    fn grew_quieter(&self) {
        if self.word().mode == Mode::Holding {
            self.quieter.notify_waiters();
        }
    }

    /// Only under the lock of `held`.
    fn set(&self, word: Word) {
        self.word.store(word.pack(), SeqCst);
        self.changed.send_replace(word);
        self.quieter.notify_waiters();
    }

    fn since_start(&self, instant: Instant) -> u64 {
        nanoseconds(instant.saturating_duration_since(self.started))
    }

    /// A panic while holding the lock leaves counters at worst one off; refusing every later request would be
    /// worse.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
