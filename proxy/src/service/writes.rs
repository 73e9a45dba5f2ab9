//! Write admission: while a commander limits them, writes pass an open gate evenly, one an interval at most.
//!
//! A write (an HTTP request whose method is not safe) that comes too early is delayed until it is due, or for as long
//! as any may be; then it asks the gate like every other request. It is never refused, a read is never delayed, and
//! nobody who is delayed has a ticket: a hold does not wait for them. Without a limit this is one load a write.
//!
//! The pacer is the virtual scheduling form of the generic cell rate algorithm (ITU-T I.371, annex A) with one atomic:
//! the moment when the next write is due.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::hold::{WriteLimit, WritesStatus};
use cutover_protocol::id::Holder;
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::gate::Gate;
use super::milliseconds;

/// What a request asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Intent {
    /// Nothing that changes anything, or nobody can tell.
    #[default]
    Read,
    /// A change.
    Write,
}

/// How writes are admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WritePace {
    /// From one to the next, in microseconds.
    pub(crate) interval_us: NonZeroU64,
    /// The longest delay, in milliseconds.
    pub(crate) delay_ms_max: u64,
}

/// The limit in force.
#[derive(Debug)]
struct Limit {
    pace: WritePace,
    until: Instant,
    holder: Option<Holder>,
}

/// What limits the writes of a gate, and who is delayed.
#[derive(Debug)]
pub(crate) struct Writes {
    /// Zero while nothing limits them.
    interval_ns: AtomicU64,
    delay_ns_max: AtomicU64,
    /// When the next one is due, in nanoseconds since the gate was made.
    next_ns: AtomicU64,
    delayed: AtomicU64,
    delayed_now: AtomicU64,
    /// Says that the limit has ended.
    lifted: watch::Sender<()>,
    limit: Mutex<Option<Limit>>,
}

/// A write that is delayed; it counts as that until it is dropped.
#[derive(Debug)]
pub(crate) struct Delayed<'g> {
    gate: &'g Gate,
    due: Instant,
    lifted: watch::Receiver<()>,
}

impl Writes {
    pub(super) fn new() -> Self {
        Self {
            interval_ns: AtomicU64::new(0),
            delay_ns_max: AtomicU64::new(0),
            next_ns: AtomicU64::new(0),
            delayed: AtomicU64::new(0),
            delayed_now: AtomicU64::new(0),
            lifted: watch::Sender::new(()),
            limit: Mutex::new(None),
        }
    }

    /// Limits them from now on. Whoever is delayed already goes when he was to go.
    pub(super) fn limit(
        &self,
        pace: WritePace,
        until: Instant,
        holder: Option<Holder>,
        now_ns: u64,
    ) {
        let mut limit = self.lock();
        let interval_ns = pace.interval_us.get().saturating_mul(1000);
        let latest_ns = match *limit {
            Some(_) => now_ns.saturating_add(interval_ns),
            None => 0,
        };
        // A shorter interval counts at once; whoever asks meanwhile is early or late by an interval at most.
        self.next_ns.fetch_min(latest_ns, Relaxed);
        let delay_ns_max = pace.delay_ms_max.saturating_mul(1_000_000);
        self.delay_ns_max.store(delay_ns_max, Relaxed);
        self.interval_ns.store(interval_ns, Relaxed);
        *limit = Some(Limit {
            pace,
            until,
            holder,
        });
    }

    /// Ends the limit, and every delay with it.
    pub(super) fn lift(&self) {
        Self::lift_locked(self, &mut self.lock());
    }

    fn lift_locked(&self, limit: &mut Option<Limit>) {
        if limit.take().is_some() {
            self.interval_ns.store(0, Relaxed);
            self.lifted.send_replace(());
        }
    }

    /// Ends the limit if its lease has run out; otherwise, when it will.
    pub(super) fn lapse(&self, now: Instant) -> Lease {
        let mut limit = self.lock();
        match &*limit {
            None => Lease::None,
            Some(known) if now < known.until => Lease::Until(known.until),
            Some(_) => {
                self.lift_locked(&mut limit);
                Lease::RanOut
            }
        }
    }

    /// Whose the limit is, where there is one.
    pub(super) fn limited_by(&self) -> Option<Option<Holder>> {
        self.lock().as_ref().map(|limit| limit.holder.clone())
    }

    /// What is to be told, after so many were admitted.
    pub(super) fn status(&self, admitted: u64, now: Instant) -> WritesStatus {
        let limit = self.lock();
        WritesStatus {
            admitted,
            delayed: self.delayed.load(Relaxed),
            delayed_now: self.delayed_now.load(Relaxed),
            limit: limit.as_ref().map(|limit| WriteLimit {
                interval_us: limit.pace.interval_us,
                delay_ms_max: limit.pace.delay_ms_max,
                lease_ms_left: milliseconds(limit.until.saturating_duration_since(now)),
                holder: limit.holder.clone(),
            }),
        }
    }

    /// Whether a limit is in force.
    pub(super) fn is_limited(&self) -> bool {
        self.interval_ns.load(Relaxed) != 0
    }

    /// When a write that comes now is due, and how it learns that it need not wait any longer; `None` where it need not
    /// wait at all.
    pub(super) fn ask(&self, now_ns: u64) -> Option<(u64, watch::Receiver<()>)> {
        // Before the limit is read, so that its end cannot be missed.
        let lifted = self.lifted.subscribe();
        let interval_ns = NonZeroU64::new(self.interval_ns.load(Relaxed))?.get();
        let delay_ns_max = self.delay_ns_max.load(Relaxed);
        let mut next_ns = self.next_ns.load(Relaxed);
        loop {
            let place = place(next_ns, now_ns, interval_ns, delay_ns_max);
            let taken =
                self.next_ns
                    .compare_exchange_weak(next_ns, place.next_ns, Relaxed, Relaxed);
            match taken {
                Ok(_) => return (place.due_ns > now_ns).then_some((place.due_ns, lifted)),
                Err(moved) => next_ns = moved,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Limit>> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the lease of a limit has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lease {
    /// There is no limit.
    None,
    /// It runs.
    Until(Instant),
    /// It has just ended, and the limit with it.
    RanOut,
}

/// When a write goes, and when the one behind it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    due_ns: u64,
    next_ns: u64,
}

/// The place of a write that comes at `now_ns` when the next is due at `next_ns`. One that would be delayed for too long
/// takes no place: it goes at the end of its patience, and those behind it are no later for that.
fn place(next_ns: u64, now_ns: u64, interval_ns: u64, delay_ns_max: u64) -> Place {
    let due_ns = next_ns.max(now_ns);
    if due_ns - now_ns > delay_ns_max {
        return Place {
            due_ns: now_ns.saturating_add(delay_ns_max),
            next_ns,
        };
    }
    Place {
        due_ns,
        next_ns: due_ns.saturating_add(interval_ns),
    }
}

impl<'g> Delayed<'g> {
    pub(super) fn new(gate: &'g Gate, due: Instant, lifted: watch::Receiver<()>) -> Self {
        gate.writes.delayed.fetch_add(1, Relaxed);
        gate.writes.delayed_now.fetch_add(1, Relaxed);
        gate.counted.notify_waiters();
        Self { gate, due, lifted }
    }

    /// Completes when it is due, or the limit has ended.
    ///
    /// # Cancel safety
    /// Yes.
    pub(crate) async fn over(&mut self) {
        tokio::select! {
            biased;
            // The sender lives as long as the gate.
            _ = self.lifted.changed() => {}
            () = sleep_until(self.due.into()) => {}
        }
    }
}

impl Drop for Delayed<'_> {
    fn drop(&mut self) {
        self.gate.writes.delayed_now.fetch_sub(1, Relaxed);
        self.gate.counted.notify_waiters();
    }
}

/// A moment so far away that nobody sees it, where the clock cannot count that far.
pub(super) fn moment(started: Instant, ns: u64) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 366 * 86_400);
    let moment = started.checked_add(Duration::from_nanos(ns).min(CENTURY));
    moment.unwrap_or(started)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn pace(interval_us: u64, delay_ms_max: u64) -> WritePace {
        WritePace {
            interval_us: interval_us.try_into().unwrap(),
            delay_ms_max,
        }
    }

    fn limited(interval_us: u64, delay_ms_max: u64) -> Writes {
        let writes = Writes::new();
        writes.limit(pace(interval_us, delay_ms_max), Instant::now(), None, 0);
        writes
    }

    fn due(writes: &Writes, now_ns: u64) -> Option<u64> {
        writes.ask(now_ns).map(|(due_ns, _)| due_ns)
    }

    #[test]
    fn the_first_passes_and_the_others_follow_evenly() {
        let writes = limited(10_000, 1000);
        let dues: Vec<_> = (0..4).map(|_| due(&writes, 5 * MS)).collect();
        assert_eq!(
            dues,
            [None, Some(15 * MS), Some(25 * MS), Some(35 * MS)],
            "one every 10 ms"
        );
        // A pause earns nobody a burst.
        assert_eq!(due(&writes, 500 * MS), None);
        assert_eq!(due(&writes, 500 * MS), Some(510 * MS));
    }

    #[test]
    fn whoever_would_be_delayed_for_too_long_goes_all_the_same_and_takes_nobodys_place() {
        let writes = limited(10_000, 25);
        let dues: Vec<_> = (0..5).map(|_| due(&writes, 0)).collect();
        let patience = Some(25 * MS);
        assert_eq!(
            dues,
            [None, Some(10 * MS), Some(20 * MS), patience, patience]
        );
        assert_eq!(due(&writes, 6 * MS), Some(30 * MS));
    }

    #[test]
    fn the_end_of_the_limit_is_the_end_of_every_delay() {
        let writes = limited(60_000_000, 1_000_000);
        assert_eq!(due(&writes, 0), None);
        let (_, mut lifted) = writes.ask(0).unwrap();
        assert!(!lifted.has_changed().unwrap());
        writes.lift();
        assert!(lifted.has_changed().unwrap());
        lifted.mark_unchanged();
        assert_eq!((due(&writes, 1), due(&writes, 1)), (None, None));
        // Lifted again, there is nothing to say; limited again, the first passes at once.
        writes.lift();
        assert!(!lifted.has_changed().unwrap());
        writes.limit(pace(1000, 1000), Instant::now(), None, 2);
        assert_eq!((due(&writes, 2), due(&writes, 2)), (None, Some(MS + 2)));
    }

    #[test]
    fn a_shorter_interval_counts_at_once_and_a_new_lease_alone_changes_nothing() {
        let writes = limited(60_000_000, 1_000_000);
        assert_eq!(due(&writes, 0), None);
        writes.limit(pace(60_000_000, 1_000_000), Instant::now(), None, MS);
        assert_eq!(due(&writes, MS), Some(60_000 * MS));
        writes.limit(pace(1000, 1_000_000), Instant::now(), None, 2 * MS);
        assert_eq!(due(&writes, 2 * MS), Some(3 * MS));
    }

    #[test]
    fn a_lease_runs_out_once() {
        let writes = limited(1000, 1000);
        let now = Instant::now();
        let until = now + Duration::from_secs(1);
        writes.limit(pace(1000, 1000), until, None, 0);
        assert_eq!(writes.lapse(now), Lease::Until(until));
        assert_eq!(writes.lapse(until), Lease::RanOut);
        assert_eq!(writes.lapse(until), Lease::None);
        assert!(!writes.is_limited());
    }

    #[test]
    fn threads_never_share_a_place() {
        let writes = limited(1, u64::MAX);
        let ask = || {
            let asked = (0..1000).map(|_| due(&writes, 0).unwrap_or(0));
            asked.collect::<Vec<_>>()
        };
        let mut dues: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            let joined = threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap());
            joined.collect()
        });
        dues.sort_unstable();
        assert_eq!(dues, (0..4000).map(|n| n * 1000).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn places_are_an_interval_apart_and_nobody_waits_for_longer_than_anybody_may(
            pauses in proptest::collection::vec(0_u64..3000, 1..200),
            interval in 1_u64..1000,
            delay_max in 0_u64..5000,
        ) {
            let (mut now, mut next, mut last) = (0, 0, None);
            for pause in pauses {
                now += pause;
                let taken = place(next, now, interval, delay_max);
                prop_assert!(taken.due_ns >= now && taken.due_ns - now <= delay_max);
                if taken.next_ns == next {
                    // Without a place: only where one would have been too late.
                    prop_assert!(next > now + delay_max);
                } else {
                    let earliest = last.map_or(0, |last: u64| last + interval);
                    prop_assert_eq!(taken.due_ns, earliest.max(now));
                    last = Some(taken.due_ns);
                }
                next = taken.next_ns;
            }
        }

        #[test]
        fn no_bounds_overflow(next: u64, now: u64, interval in 1_u64.., delay_max: u64) {
            let taken = place(next, now, interval, delay_max);
            prop_assert!(taken.due_ns >= now && taken.next_ns >= next);
        }
    }
}
