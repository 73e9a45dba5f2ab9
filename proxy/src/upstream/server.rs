//! One server: where it is, whether it may be used, what it is doing, and the right to use it once.
//!
//! What workers write lies apart by worker, so that they never wait for each other's cache lines; what decides
//! whether a server may be used is written rarely and only read by them. A server never decides for itself: checks
//! and ejections tell it.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use cutover_protocol::hold::ServerState;

use super::address::Endpoint;
use super::connect::{Sender, Way};
use super::eject::{Cause, Ejections, Outcome, Rows, Window};
use super::health::CheckRecord;
use super::moment::Moment;

/// Weights are counted in such parts of one, so that a server that starts slowly can have less than one.
pub(crate) const WEIGHT_PARTS: u64 = 1024;

/// Names a server for as long as this process lives; never used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(u64);

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A server, with a shard for each worker.
#[derive(Debug)]
pub(crate) struct Server {
    core: Arc<Core>,
    /// Each is referred to from here and from every [`Picked`] of its worker, and from nowhere else.
    shards: Box<[Arc<Shard>]>,
}

/// What all workers share of a server.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Core {
    id: ServerId,
    endpoint: Endpoint,
    /// A reload may bring another, with certificates that were renewed.
    way: ArcSwap<Way>,
    /// Where rendezvous hashing starts: the same in every process and on every machine.
    pub(super) hash_seed: u64,
    /// Value of the sticky cookie.
    cookie: Box<str>,
    /// What active checks say; true without any.
    up: AtomicBool,
    /// A [`Moment`]: came back, or was added while we ran. Never: there from the start.
    back_since: AtomicU64,
    /// A [`Moment`]: not to be used before.
    ejected_until: AtomicU64,
    pub(super) rows: Rows,
    ejections: Mutex<Ejections>,
    checks: Mutex<CheckRecord>,
    /// Connections that are open; written when one opens or ends, by any worker.
    connections: AtomicU64,
}

/// What one worker writes about a server. Only that worker's thread does, so its counters need no locked
/// instruction.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Shard {
    core: Arc<Core>,
    requests: AtomicU64,
    connect_errors: AtomicU64,
    server_errors: AtomicU64,
    broken: AtomicU64,
    pub(super) window: Window,
}

/// Sums over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Picked and not yet dropped.
    pub(crate) active: u64,
    /// Picked so far.
    pub(crate) requests: u64,
    /// No connection came about.
    pub(crate) connect_errors: u64,
    /// Answers with a status of 500 and above.
    pub(crate) server_errors: u64,
    /// Connections that ended, or answers that were not understood, before the answer was whole.
    pub(crate) broken: u64,
}

impl Server {
    /// A server that takes requests.
    pub(super) fn new(
        endpoint: Endpoint,
        way: Arc<Way>,
        cookie: Box<str>,
        hash_seed: u64,
        workers: usize,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let core = Arc::new(Core {
            id: ServerId(NEXT.fetch_add(1, Relaxed)),
            endpoint,
            way: ArcSwap::new(way),
            hash_seed,
            cookie,
            up: AtomicBool::new(true),
            back_since: AtomicU64::new(Moment::NEVER.0),
            ejected_until: AtomicU64::new(Moment::NEVER.0),
            rows: Rows::default(),
            ejections: Mutex::default(),
            checks: Mutex::default(),
            connections: AtomicU64::new(0),
        });
        let shards = (0..workers.max(1)).map(|_| Arc::new(Shard::new(&core)));
        Self {
            shards: shards.collect(),
            core,
        }
    }

    /// The right to use it once. Costs one increment, of a number that only this worker writes.
    pub(super) fn pick(&self, worker: usize) -> Picked {
        let shard = &self.shards[worker % self.shards.len()];
        bump(&shard.requests);
        Picked {
            shard: Arc::clone(shard),
            sticks: false,
            untested: false,
            sender: None,
        }
    }

    /// Requests that have picked it and are not over. Looks at every worker's shard.
    pub(crate) fn active(&self) -> u64 {
        let references = self.shards.iter().map(|shard| Arc::strong_count(shard) - 1);
        references.sum::<usize>() as u64
    }

    /// Sums over all workers.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts {
            active: self.active(),
            ..Counts::default()
        };
        for shard in &self.shards {
            counts.requests += shard.requests.load(Relaxed);
            counts.connect_errors += shard.connect_errors.load(Relaxed);
            counts.server_errors += shard.server_errors.load(Relaxed);
            counts.broken += shard.broken.load(Relaxed);
        }
        counts
    }

    /// Requests and errors of the window that `moment` lies in.
    pub(super) fn window_sum(&self, index: u64) -> (u64, u64) {
        let parts = self.shards.iter().map(|shard| shard.window.counts(index));
        parts.fold((0, 0), |(requests, errors), part| {
            (requests + part.0, errors + part.1)
        })
    }
}

impl Deref for Server {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.core
    }
}

impl Core {
    /// Its name within the process.
    pub(crate) const fn id(&self) -> ServerId {
        self.id
    }

    /// Where it accepts connections.
    pub(crate) const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How connections to it begin.
    pub(super) fn way(&self) -> Arc<Way> {
        self.way.load_full()
    }

    pub(super) fn set_way(&self, way: Arc<Way>) {
        self.way.store(way);
    }

    /// What the sticky cookie says of it.
    pub(crate) const fn cookie(&self) -> &str {
        &self.cookie
    }

    /// Connections that are open now.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Whether checks and ejections leave it usable.
    pub(crate) fn is_usable(&self, now: Moment) -> bool {
        self.is_up() && !self.is_ejected(now)
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Relaxed)
    }

    pub(super) fn is_ejected(&self, now: Moment) -> bool {
        self.ejected_until.load(Relaxed) > now.0
    }

    /// Whether and how it takes requests.
    pub(crate) fn state(&self, now: Moment, slow_start: Duration) -> ServerState {
        if !self.is_up() {
            ServerState::Down
        } else if self.is_ejected(now) {
            ServerState::Ejected
        } else if self.back_for(now) < slow_start {
            ServerState::SlowStart
        } else {
            ServerState::Up
        }
    }

    /// Checks have spoken.
    pub(super) fn set_up(&self, up: bool, now: Moment) {
        let was_up = self.up.swap(up, Relaxed);
        if up && !was_up {
            self.begin_slowly(now);
        }
    }

    /// Begins its slow start now.
    pub(super) fn begin_slowly(&self, now: Moment) {
        self.back_since.store(now.0, Relaxed);
    }

    /// Starts without a word from its checks, which will come.
    pub(super) fn assume(&self, up: bool) {
        self.up.store(up, Relaxed);
    }

    /// Not to be used before `until`; when it comes back, it comes slowly.
    pub(super) fn eject(&self, until: Moment) {
        self.ejected_until.store(until.0, Relaxed);
    }

    /// Weight in [`WEIGHT_PARTS`] at this moment.
    pub(super) fn weight(&self, weight: u32, now: Moment, slow_start: Duration) -> u64 {
        if slow_start.is_zero() {
            return u64::from(weight) * WEIGHT_PARTS;
        }
        ramp(weight, self.back_for(now), slow_start)
    }

    /// How much of its weight it has, in hundredths, and not less than one.
    pub(crate) fn weight_percent(&self, now: Moment, slow_start: Duration) -> u8 {
        const WHOLE: u32 = 100;
        let percent = ramp(WHOLE, self.back_for(now), slow_start) / WEIGHT_PARTS;
        u8::try_from(percent).unwrap_or(u8::MAX).max(1)
    }

    /// Until when it is spared requests, and why, if it is.
    pub(crate) fn spared(&self, now: Moment) -> Option<(Moment, Cause)> {
        self.ejections().last().filter(|_| self.is_ejected(now))
    }

    /// How long it has been back; for ever if it was never away.
    fn back_for(&self, now: Moment) -> Duration {
        let ejected_until = self.ejected_until.load(Relaxed);
        let back = self.back_since.load(Relaxed).max(ejected_until);
        if back == Moment::NEVER.0 {
            return Duration::MAX;
        }
        now.since(Moment(back))
    }

    pub(super) fn ejections(&self) -> MutexGuard<'_, Ejections> {
        self.ejections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What its checks found so far.
    pub(super) fn checks(&self) -> MutexGuard<'_, CheckRecord> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The weight of a server that has been back for some time: grows evenly from almost nothing to all of it.
pub(super) fn ramp(weight: u32, back_for: Duration, slow_start: Duration) -> u64 {
    let full = u64::from(weight) * WEIGHT_PARTS;
    if back_for >= slow_start {
        return full;
    }
    let part = u128::from(full) * back_for.as_nanos() / slow_start.as_nanos().max(1);
    u64::try_from(part)
        .unwrap_or(full)
        .max(u64::from(weight > 0))
}

impl Shard {
    fn new(core: &Arc<Core>) -> Self {
        Self {
            core: Arc::clone(core),
            requests: AtomicU64::new(0),
            connect_errors: AtomicU64::new(0),
            server_errors: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            window: Window::default(),
        }
    }
}

/// Counts one more; only for numbers with a single writer.
pub(super) fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

/// A server that was picked for one request (or raw connection). It counts as active until this is dropped.
#[derive(Debug)]
pub(crate) struct Picked {
    /// A reference is an active request: see [`Server::active`].
    shard: Arc<Shard>,
    /// The client's sticky cookie led here.
    pub(super) sticks: bool,
    /// It was not known to be usable.
    pub(super) untested: bool,
    /// Who is to be named to it, if it wants to know.
    sender: Option<Sender>,
}

impl Picked {
    pub(super) fn count(&self, outcome: Outcome) {
        match outcome {
            Outcome::Answered(status) if status < 500 => {}
            Outcome::Answered(_) => bump(&self.shard.server_errors),
            Outcome::Unreachable => bump(&self.shard.connect_errors),
            Outcome::Broken => bump(&self.shard.broken),
        }
    }

    /// Notes for whom it was picked; only where the server wants to know.
    pub(crate) fn name_sender(&mut self, sender: Sender) {
        self.sender = Some(sender);
    }

    /// Counts a connection to it, from now on.
    pub(crate) fn opens(&self) -> OpenConnection {
        let core = Arc::clone(&self.shard.core);
        core.connections.fetch_add(1, Relaxed);
        OpenConnection(core)
    }

    /// For whom a connection is made that is this one client's only.
    pub(crate) const fn sender(&self) -> Option<&Sender> {
        self.sender.as_ref()
    }

    pub(super) fn window(&self) -> &Window {
        &self.shard.window
    }
}

impl Deref for Picked {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.shard.core
    }
}

/// A connection to a server, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection(Arc<Core>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}
