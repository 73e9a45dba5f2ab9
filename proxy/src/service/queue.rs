//! The held: a queue by arrival, its counters, and the pace at which it empties.
//!
//! Everything here runs under the gate's lock and touches no clock, so the counters balance at every instant
//! anybody can see: `held = released + gave_up + evicted + held_now`. A request that comes back after a connect
//! error is held, and counted, a second time.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use cutover_protocol::hold::Tier;
use cutover_protocol::id::Register;
use tokio::sync::oneshot;

use super::budget::{BudgetLimits, Usage, WhenFull};
use super::gate::{Gate, GateLimits};
use super::outflow::Outflow;
use super::terms::{OfAddress, ReleaseClass, Terms, Weight};
use super::ticket::{Pass, Slot, Ticket};
use super::window::Verdict;
use crate::clock::nanoseconds;
use crate::limit::address::AddressKey;

/// Upper bounds of the hold-time histogram, in milliseconds.
pub(crate) const HOLD_BUCKETS_MS: [u64; 12] = [
    10, 50, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 60_000,
];

/// Place in the queue. Whoever has the least leaves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// How many releases had begun when it arrived: a newcomer overtakes no one who was held, of whatever class.
    releases: u64,
    class: ReleaseClass,
    /// In nanoseconds since the gate was made.
    arrival_ns: u64,
    /// Makes it unique.
    number: u64,
}

/// Why a held request was refused by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eviction {
    /// The budget is used.
    Full,
    /// As much of it as one address may use.
    FullOfAddress,
    /// It was held for as long as its service or its route lets it.
    TooOld,
    /// Its client has no use for an answer any more.
    OutOfTime,
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
    /// When it is refused, in nanoseconds since the gate was made, and why, if earlier than by the service's bound.
    own_end: Option<(u64, Eviction)>,
    pub(super) weight: Weight,
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
    /// Memory that those keep, by our own count.
    pub(crate) bytes_now: u64,
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

/// The queue, its counters, and the pace of its release.
#[derive(Debug)]
pub(crate) struct Held {
    waiting: BTreeMap<Key, Waiter>,
    /// Those of them with an end of their own, by that.
    own_ends: BTreeMap<(u64, u64), Key>,
    /// Of all that wait.
    bytes: u64,
    /// How many wait of each address, where that is limited.
    addresses: HashMap<AddressKey, u64>,
    unique: u64,
    counts: HeldCounts,
    times: HoldTimes,
    limits: GateLimits,
    hold_generation: u64,
    /// Releases that have begun, and when the last one did.
    releases: u64,
    released_ns: u64,
    outflow: Outflow,
    opened: Option<Instant>,
    /// The drain of this hold is complete.
    drained: bool,
    shut: bool,
}

impl Held {
    pub(super) fn new(limits: GateLimits) -> Self {
        Self {
            waiting: BTreeMap::new(),
            own_ends: BTreeMap::new(),
            bytes: 0,
            addresses: HashMap::new(),
            unique: 0,
            counts: HeldCounts::default(),
            times: HoldTimes::default(),
            limits,
            hold_generation: 0,
            releases: 0,
            released_ns: 0,
            outflow: Outflow::new(),
            opened: None,
            drained: false,
            shut: false,
        }
    }

    /// The bounds in force.
    pub(crate) const fn limits(&self) -> &GateLimits {
        &self.limits
    }

    /// The budget in force.
    pub(crate) const fn budget(&self) -> BudgetLimits {
        self.limits.budget
    }

    pub(super) fn set_limits(&mut self, limits: GateLimits) {
        self.outflow.bound(&limits.release);
        self.limits = limits;
        self.addresses.clear();
        if self.limits.budget.held_per_address_max > 0 {
            for waiter in self.waiting.values() {
                count_address(&mut self.addresses, waiter);
            }
        }
    }

    /// What is held.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            count: self.waiting.len() as u64,
            bytes: self.bytes,
        }
    }

    /// The tier after this one.
    pub(super) fn tier(&self, before: Tier) -> Tier {
        self.limits.budget.judge(before, self.usage())
    }

    /// One who waits keeps more than it did.
    pub(super) fn grew(&mut self, key: Key, bytes: u32) {
        if let Some(waiter) = self.waiting.get_mut(&key) {
            waiter.weight.bytes = waiter.weight.bytes.saturating_add(bytes);
            self.bytes += u64::from(bytes);
        }
    }

    /// Why there is no room for one more, if there is none.
    fn is_full(&self, terms: &Terms) -> Option<Eviction> {
        let budget = &self.limits.budget;
        let (usage, weight) = (self.usage(), terms.weight);
        let yields = weight.when_full == WhenFull::Refuse
            && budget.judge(Tier::Park, usage) >= Tier::StopReading;
        if self.shut {
            Some(Eviction::Shutdown)
        } else if yields || !budget.has_room(usage, u64::from(weight.bytes)) {
            Some(Eviction::Full)
        } else if budget.held_per_address_max > 0 && weight.of_address == OfAddress::One {
            let key = AddressKey::of(terms.client.ip());
            let held = self.addresses.get(&key).copied().unwrap_or(0);
            (held >= budget.held_per_address_max).then_some(Eviction::FullOfAddress)
        } else {
            None
        }
    }

    fn insert(&mut self, key: Key, waiter: Waiter) {
        self.bytes += u64::from(waiter.weight.bytes);
        if self.limits.budget.held_per_address_max > 0 {
            count_address(&mut self.addresses, &waiter);
        }
        self.waiting.insert(key, waiter);
    }

    fn remove(&mut self, key: Key) -> Option<Waiter> {
        let waiter = self.waiting.remove(&key)?;
        if let Some((end_ns, _)) = waiter.own_end {
            self.own_ends.remove(&(end_ns, key.number));
        }
        self.bytes -= u64::from(waiter.weight.bytes);
        let address = AddressKey::of(waiter.client.ip());
        if waiter.weight.of_address == OfAddress::One
            && let Entry::Occupied(mut entry) = self.addresses.entry(address)
        {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        Some(waiter)
    }

    /// Counters at this instant.
    pub(crate) fn counts(&self) -> HeldCounts {
        HeldCounts {
            held_now: self.waiting.len() as u64,
            bytes_now: self.bytes,
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
        terms: Terms,
        own_end: Option<(u64, Eviction)>,
    ) -> Result<(Key, oneshot::Receiver<Result<Grant, Eviction>>), Eviction> {
        self.counts.held += 1;
        if let Some(why) = self.is_full(&terms) {
            self.counts.evicted += 1;
            self.record(0);
            return Err(why);
        }
        self.unique += 1;
        let is_newcomer = arrival_ns >= self.released_ns;
        let key = Key {
            releases: self.releases - u64::from(!is_newcomer),
            class: terms.class,
            arrival_ns,
            number: self.unique,
        };
        let (verdict, receiver) = oneshot::channel();
        let waiter = Waiter {
            worker,
            client: terms.client,
            own_end,
            weight: terms.weight,
            verdict,
        };
        if let Some((end_ns, _)) = own_end {
            self.own_ends.insert((end_ns, key.number), key);
        }
        self.insert(key, waiter);
        Ok((key, receiver))
    }

    /// Clients of the held that are at one of these addresses, in the order of their arrival.
    pub(crate) fn clients_at(&self, addresses: &[IpAddr], most: usize) -> Vec<SocketAddr> {
        let clients = self.waiting.values().map(|waiter| waiter.client);
        let there = clients.filter(|client| addresses.contains(&client.ip()));
        there.take(most).collect()
    }

    pub(super) fn gave_up(&mut self, key: Key, now_ns: u64) {
        if self.remove(key).is_some() {
            self.counts.gave_up += 1;
            self.record(now_ns.saturating_sub(key.arrival_ns));
        }
    }

    /// Refuses whoever has waited for as long as it may.
    pub(super) fn evict_expired(&mut self, now_ns: u64) {
        while let Some((end_ns, key, why)) = self.next_expiry()
            && end_ns <= now_ns
        {
            self.evict(key, now_ns, why);
        }
    }

    /// When the next one has.
    pub(super) fn next_expiry_ns(&self) -> Option<u64> {
        self.next_expiry().map(|(end_ns, ..)| end_ns)
    }

    /// Who is refused next if nothing else happens: when, and why.
    fn next_expiry(&self) -> Option<(u64, Key, Eviction)> {
        let own = self.own_ends.first_key_value();
        let own = own.and_then(|((end_ns, _), key)| {
            let (_, why) = self.waiting.get(key)?.own_end?;
            Some((*end_ns, *key, why))
        });
        let hold_max = nanoseconds(self.limits.hold_max);
        let by_bound = self.oldest_of_each_class().map(|key| {
            let end_ns = key.arrival_ns.saturating_add(hold_max);
            (end_ns, key, Eviction::TooOld)
        });
        let all = own.into_iter().chain(by_bound);
        all.min_by_key(|(end_ns, ..)| *end_ns)
    }

    /// Within a class, and between two releases, they are in the order of their arrival: few have to be looked at.
    fn oldest_of_each_class(&self) -> impl Iterator<Item = Key> {
        let first = self.waiting.first_key_value().map(|(key, _)| *key);
        std::iter::successors(first, |key| {
            let last = Key {
                arrival_ns: u64::MAX,
                number: u64::MAX,
                ..*key
            };
            let mut behind = self
                .waiting
                .range((Bound::Excluded(last), Bound::Unbounded));
            behind.next().map(|(key, _)| *key)
        })
    }

    pub(super) fn shut(&mut self, now_ns: u64) {
        self.shut = true;
        while let Some((key, _)) = self.waiting.first_key_value() {
            let key = *key;
            self.evict(key, now_ns, Eviction::Shutdown);
        }
    }

    fn evict(&mut self, key: Key, now_ns: u64, why: Eviction) {
        if let Some(waiter) = self.remove(key) {
            self.counts.evicted += 1;
            self.record(now_ns.saturating_sub(key.arrival_ns));
            // A client that left in this very moment gets no answer; it was evicted first.
            drop(waiter.verdict.send(Err(why)));
        }
    }

    pub(super) fn begin_hold(&mut self) {
        self.hold_generation += 1;
        self.outflow.stop();
        self.drained = false;
    }

    /// Whether a drain of this hold was declared complete: nothing may pass any more.
    pub(super) const fn is_drained(&self) -> bool {
        self.drained
    }

    pub(super) const fn note_drained(&mut self) {
        self.drained = true;
    }

    pub(super) fn begin_release(&mut self, now_ns: u64) {
        self.hold_generation += 1;
        self.releases += 1;
        self.released_ns = now_ns;
        let held = self.waiting.len();
        self.outflow.begin(held, now_ns, &self.limits.release);
    }

    pub(super) fn opened(&mut self, now: Instant) {
        self.opened = Some(now);
    }

    /// So recently that the owner may not accept yet.
    pub(super) fn opened_a_moment_ago(&self, now: Instant) -> bool {
        self.opened
            .is_some_and(|opened| now.saturating_duration_since(opened) < self.limits.release.grace)
    }

    /// Takes the next in line if the pace allows one now; it then counts as released.
    pub(super) fn next_to_release(&mut self, pace: Pace, now_ns: u64) -> Option<(Waiter, Pass)> {
        if pace == Pace::Window && !self.outflow.may_leave(now_ns) {
            return None;
        }
        let (key, _) = self.waiting.first_key_value()?;
        let key = *key;
        let waiter = self.remove(key)?;
        self.counts.released += 1;
        self.record(now_ns.saturating_sub(key.arrival_ns));
        let pass = match pace {
            Pace::AtOnce => Pass::Open,
            Pace::Window => self.outflow.leaves(now_ns),
        };
        Some((waiter, pass))
    }

    /// The one just taken had left without a word.
    pub(super) fn undeliverable(&mut self, pass: Pass, now_ns: u64) {
        self.counts.released -= 1;
        self.counts.gave_up += 1;
        if let Pass::Released(slot) = pass {
            self.outflow.ended(slot, now_ns);
        }
    }

    /// Nobody waits, and the owner has answered or nobody is left to ask it.
    pub(super) fn release_is_over(&self) -> bool {
        self.waiting.is_empty() && self.outflow.is_settled()
    }

    pub(super) fn answered(&mut self, slot: Slot, verdict: Verdict, now_ns: u64) {
        self.outflow.answered(slot, verdict, now_ns);
    }

    pub(super) fn ended(&mut self, slot: Slot, now_ns: u64) {
        self.outflow.ended(slot, now_ns);
    }

    pub(super) fn connect_failed(&mut self, pass: Pass, now_ns: u64) {
        let release = &self.limits.release;
        self.outflow.connect_failed(pass, now_ns, release);
    }

    /// Those released long ago do not keep others from following.
    pub(super) fn lose_patience(&mut self, now_ns: u64) {
        let patience = self.limits.release.patience;
        self.outflow.lose_patience(now_ns, patience);
    }

    /// When the pace may allow somebody to leave whom it does not allow now, if nothing happens before.
    pub(super) fn next_departure_ns(&self) -> Option<u64> {
        if self.waiting.is_empty() {
            return None;
        }
        self.outflow.next_ns(self.limits.release.patience)
    }

    fn record(&mut self, ns: u64) {
        let bucket = HOLD_BUCKETS_MS
            .iter()
            .position(|most| ns <= most * 1_000_000);
        self.times.buckets[bucket.unwrap_or(HOLD_BUCKETS_MS.len())] += 1;
        self.times.sum_ns += u128::from(ns);
    }
}

fn count_address(addresses: &mut HashMap<AddressKey, u64>, waiter: &Waiter) {
    if waiter.weight.of_address == OfAddress::One {
        let key = AddressKey::of(waiter.client.ip());
        *addresses.entry(key).or_default() += 1;
    }
}

/// A place in the queue. Dropped before its verdict, it counts as given up.
#[derive(Debug)]
pub(crate) struct Parked {
    gate: Arc<Gate>,
    key: Key,
    verdict: Option<oneshot::Receiver<Result<Grant, Eviction>>>,
}

/// One who is called: let through, or refused. Dropped, a ticket on its way goes back.
#[derive(Debug)]
pub(crate) struct Called {
    gate: Arc<Gate>,
    verdict: Option<Result<Grant, Eviction>>,
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
        let called = std::future::poll_fn(|context| self.poll_called(context)).await;
        called.ticket(gate)
    }

    /// So many bytes more are kept of it than it joined with.
    pub(crate) fn grew(&self, bytes: usize) {
        self.gate
            .grew(self.key, u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// The same for whoever watches over several places. Not to be polled again once it is ready.
    pub(crate) fn poll_called(&mut self, context: &mut Context<'_>) -> Poll<Called> {
        let verdict = match self.verdict.as_mut() {
            // The queue never drops a waiter unanswered while its gate lives, and we hold the gate.
            Some(receiver) => {
                ready!(Pin::new(receiver).poll(context)).unwrap_or(Err(Eviction::Shutdown))
            }
            None => Err(Eviction::Shutdown),
        };
        self.verdict = None;
        Poll::Ready(Called {
            gate: Arc::clone(&self.gate),
            verdict: Some(verdict),
        })
    }
}

impl Called {
    /// The ticket, which is good for the gate that called.
    pub(crate) fn ticket(mut self, gate: &Gate) -> Result<Ticket<'_>, Eviction> {
        let grant = self.verdict.take().unwrap_or(Err(Eviction::Shutdown))?;
        Ok(Ticket::new(gate, grant.worker, grant.register, grant.pass))
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        if let Some(Ok(grant)) = self.verdict.take() {
            drop(Ticket::new(
                &self.gate,
                grant.worker,
                grant.register,
                grant.pass,
            ));
        }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        let Some(mut receiver) = self.verdict.take() else {
            return;
        };
        self.gate.gave_up(self.key);
        if let Ok(verdict) = receiver.try_recv() {
            drop(Called {
                gate: Arc::clone(&self.gate),
                verdict: Some(verdict),
            });
        }
    }
}
