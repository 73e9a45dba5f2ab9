//! A service: one gate, one register, and the commands that change them.
//!
//! Every change is made durable before it takes effect, and every command is a compare-and-set from the epoch it
//! names; what it makes of the record is told by `rules`. Commands run on the control thread only; workers never wait
//! for the disk.

#[cfg(test)]
mod balance;
pub(crate) mod budget;
mod gate;
pub(crate) mod inflight;
mod keeper;
mod outflow;
pub(crate) mod pool;
mod queue;
mod register;
pub(crate) mod roll;
mod rules;
mod shared;
pub(crate) mod terms;
mod ticket;
pub(crate) mod traffic;
mod window;
mod word;
pub(crate) mod writes;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::hold::{self, BudgetStatus, Claim, Refusal, ServiceStatus};
use cutover_protocol::id::{Epoch, Register, ServiceName};

use crate::config::Config;
use crate::control::events::Events;
use crate::control::seen::Happening;

pub(crate) use gate::{Admission, Drain, Gate, GateLimits};
pub(crate) use keeper::keep;
pub(crate) use queue::{Called, Eviction, HOLD_BUCKETS_MS, Held, HeldCounts, HoldTimes, Parked};
pub(crate) use register::StateDir;
pub use register::StateError;
use register::{GateRecord, Record, StateFile};
use rules::judge;
pub(crate) use rules::{Change, Refused};
pub(crate) use ticket::Ticket;
pub(crate) use word::{Mode, Word};
use writes::WritePace;

/// Pause between two attempts to make an expired lease's abort durable.
const ABORT_AGAIN: Duration = Duration::from_secs(1);

/// One service, shared by all threads.
#[derive(Debug)]
pub(crate) struct Service {
    name: ServiceName,
    pub(crate) gate: Arc<Gate>,
    ledger: Mutex<Ledger>,
    events: Events,
}

/// The record as it is on disk, and the lease that runs.
#[derive(Debug)]
struct Ledger {
    file: StateFile,
    record: Record,
    lease_until: Option<Instant>,
    /// What whoever watches has been told of the gate.
    told: Word,
    leases: Leases,
}

/// Whether a lease may run out here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leases {
    Run,
    /// Another process has the register, or is about to.
    Pause {
        since: Instant,
    },
}

/// A hold, as whoever ordered it knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Changes with every hold and release; for [`Gate::drained`].
    pub(crate) mark: u64,
    pub(crate) began: Began,
}

/// Whether a command closed the gate itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Began {
    /// It did.
    Now,
    /// The gate held already.
    Before,
}

impl Service {
    /// Reads the state back; a service that held when it was last seen holds again, with a fresh lease.
    pub(crate) fn open(
        name: &ServiceName,
        config: &Config,
        state: &StateDir,
        events: Events,
    ) -> Result<Self, StateError> {
        let file = state.file(name);
        let record = file.load_or_create()?;
        let (mode, lease_until) = match &record.gate {
            GateRecord::Open => (Mode::Open, None),
            GateRecord::Holding { lease_ms, .. } => (Mode::Holding, Some(lease_end(*lease_ms))),
        };
        let limits = GateLimits::of(config, name);
        let gate = Arc::new(Gate::new(limits, config.workers, mode, record.register));
        let told = gate.word();
        Ok(Self {
            name: name.clone(),
            gate,
            ledger: Mutex::new(Ledger {
                file,
                record,
                lease_until,
                told,
                leases: Leases::Run,
            }),
            events,
        })
    }

    /// Its name.
    pub(crate) const fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Everything a commander may want to know.
    pub(crate) fn status(&self) -> ServiceStatus {
        let word = self.gate.word();
        let (counts, limits) = self
            .gate
            .with_held(|held| (held.counts(), held.limits().clone()));
        let (budget, hold_max, front_timeout) =
            (limits.budget, limits.hold_max, limits.front_timeout);
        let (in_flight, upstream_connections) = (self.gate.in_flight(), self.gate.connections());
        let gate = match word.mode {
            Mode::Open => hold::Gate::Open,
            Mode::Releasing => hold::Gate::Releasing,
            Mode::Holding if in_flight == 0 && upstream_connections == 0 => hold::Gate::Holding,
            Mode::Holding => hold::Gate::Draining,
        };
        let (lease, holder, held_since) = {
            let ledger = self.lock();
            let held_since = match ledger.record.gate {
                GateRecord::Holding { epoch, .. } => Some(epoch),
                GateRecord::Open => None,
            };
            let holder = ledger.record.holder().cloned();
            (ledger.lease_until, holder, held_since)
        };
        let lease = lease.map(|until| until.saturating_duration_since(Instant::now()));
        ServiceStatus {
            service: self.name().clone(),
            register: word.register,
            gate,
            lease_ms_left: lease.map(milliseconds),
            holder,
            held_since,
            hold_ms_max: Some(milliseconds(hold_max)),
            front_timeout_ms: front_timeout.map(milliseconds),
            in_flight,
            upstream_connections,
            carried: self.gate.carried(),
            held_now: counts.held_now,
            held: counts.held,
            released: counts.released,
            gave_up: counts.gave_up,
            evicted: counts.evicted,
            front_checks_answered: self.gate.front_checks(),
            writes: self.gate.writes_status(),
            budget: Some(BudgetStatus {
                tier: self.gate.budget.tier(),
                held_max: budget.held_max,
                held_bytes: counts.bytes_now,
                held_bytes_max: budget.held_bytes_max,
                held_per_address_max: budget.held_per_address_max,
            }),
            servers: Vec::new(),
        }
    }

    /// Makes a change durable, then lets it take effect; one that already did is done again in vain.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub(crate) fn change(&self, change: Change, claim: &Claim) -> Result<(), Refused> {
        let mut ledger = self.lock();
        self.perform(&mut ledger, change, claim)
    }

    /// Closes the gate, or holds on where it is closed already.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub(crate) fn hold(&self, epoch: Epoch, lease_ms: u64, claim: &Claim) -> Result<Hold, Refused> {
        let mut ledger = self.lock();
        let was_open = !ledger.record.holds_since(epoch);
        self.perform(&mut ledger, Change::Hold { epoch, lease_ms }, claim)?;
        Ok(Hold {
            mark: self.gate.with_held(Held::hold_generation),
            began: if was_open { Began::Now } else { Began::Before },
        })
    }

    /// Limits writes while the gate is open, or gives the limit in force another lease and other bounds.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub(crate) fn admit_writes(
        &self,
        epoch: Epoch,
        pace: WritePace,
        lease_ms: u64,
        claim: &Claim,
    ) -> Result<(), Refused> {
        // Kept to the end: no hold begins in between.
        let ledger = self.lock();
        let limited_by = self.gate.writes.limited_by();
        ledger
            .record
            .may_limit_writes(epoch, limited_by.flatten().as_ref(), claim)?;
        let holder = match claim {
            Claim::Holder(holder) => Some(holder.clone()),
            Claim::Nobody | Claim::Force => None,
        };
        self.gate.limit_writes(pace, lease_end(lease_ms), holder);
        Ok(())
    }

    /// Lifts the limit on writes. One that is gone already, for whatever reason, is no error.
    ///
    /// # Errors
    /// Why it goes on.
    pub(crate) fn admit_writes_freely(&self, epoch: Epoch, claim: &Claim) -> Result<(), Refused> {
        let ledger = self.lock();
        let Some(holder) = self.gate.writes.limited_by() else {
            return Ok(());
        };
        ledger
            .record
            .may_limit_writes(epoch, holder.as_ref(), claim)?;
        self.gate.writes.lift();
        Ok(())
    }

    /// Ends the limit on writes if its lease has run out; when it will, otherwise.
    pub(crate) fn expire_write_limit(&self, now: Instant) -> Option<Instant> {
        match self.gate.writes.lapse(now) {
            writes::Lease::None => None,
            writes::Lease::Until(until) => Some(until),
            writes::Lease::RanOut => {
                tracing::warn!(target: "audit", service = %self.name(), "the lease of the write limit ran out: writes are admitted freely");
                None
            }
        }
    }

    /// Lets the lease that runs end later by so much, this once.
    pub(crate) fn prolong_lease(&self, by: Duration) {
        let mut ledger = self.lock();
        ledger.lease_until = ledger.lease_until.and_then(|until| until.checked_add(by));
        self.gate.keeper.notify_one();
    }

    /// From now on no lease runs out here: another process is about to have the register.
    pub(crate) fn pause_lease(&self) {
        let since = Instant::now();
        self.lock().leases = Leases::Pause { since };
    }

    /// The register stays here. Nobody could renew meanwhile, so that time does not count.
    pub(crate) fn resume_lease(&self) {
        let mut ledger = self.lock();
        if let Leases::Pause { since } = ledger.leases {
            ledger.leases = Leases::Run;
            let later = |until: Instant| until.checked_add(since.elapsed());
            ledger.lease_until = ledger.lease_until.and_then(later);
        }
        drop(ledger);
        self.gate.keeper.notify_one();
    }

    /// Whether it can go on in another process: nothing is on its way out, or only begins to be.
    pub(crate) fn stands_still(&self) -> bool {
        match self.gate.word().mode {
            Mode::Open => true,
            Mode::Holding => self.gate.in_flight() == 0 && self.gate.connections() == 0,
            Mode::Releasing => false,
        }
    }

    /// Does what the gate of another process does that has the register now. Nothing is written.
    pub(crate) fn follow(&self, gate: hold::Gate, register: Register) {
        let word = self.gate.word();
        match (word.mode, gate) {
            (Mode::Holding, hold::Gate::Open | hold::Gate::Releasing) => {
                self.gate.release(register);
            }
            (Mode::Open | Mode::Releasing, hold::Gate::Holding | hold::Gate::Draining) => {
                self.gate.close(register);
            }
            _ if word.register != register => self.gate.advance(register),
            _ => {}
        }
    }

    /// Whether a change would be made, were it asked for now.
    ///
    /// # Errors
    /// Why it would not.
    pub(crate) fn may(&self, change: Change, claim: &Claim) -> Result<(), Refused> {
        judge(&self.lock().record, change, claim).map(drop)
    }

    /// Whether the gate still holds as it did when this hold began.
    pub(crate) fn stands(&self, hold: &Hold) -> bool {
        self.gate.word().mode == Mode::Holding
            && self.gate.with_held(Held::hold_generation) == hold.mark
    }

    /// What a drain is told whose hold has ended, or made way for another.
    pub(crate) fn superseded(&self) -> Refused {
        let message =
            "another command ended this hold before the drain was complete; read the status"
                .to_owned();
        self.lock().record.refused(Refusal::NotHolding, message)
    }

    /// A refusal with the register as it is now.
    pub(crate) fn refused(&self, reason: Refusal, message: String) -> Refused {
        self.lock().record.refused(reason, message)
    }

    fn perform(&self, ledger: &mut Ledger, change: Change, claim: &Claim) -> Result<(), Refused> {
        let after = judge(&ledger.record, change, claim)?;
        let before = self.store(ledger, after)?;
        let register = ledger.record.register;
        match change {
            Change::Hold { epoch, lease_ms } => {
                ledger.lease_until = Some(lease_end(lease_ms));
                if before.holds_since(epoch) {
                    self.gate.keeper.notify_one();
                } else {
                    self.gate.close(register);
                }
            }
            Change::Renew { lease_ms, .. } => {
                ledger.lease_until = Some(lease_end(lease_ms));
                self.gate.keeper.notify_one();
            }
            Change::Commit { .. } | Change::Abort { .. } if before.register != register => {
                self.gate.advance(register);
            }
            Change::Release { .. } if before.gate != GateRecord::Open => {
                ledger.lease_until = None;
                self.gate.release(register);
            }
            Change::Commit { .. } | Change::Abort { .. } | Change::Release { .. } => {}
        }
        self.tell_gate_of(ledger);
        Ok(())
    }

    /// Tells whoever watches what the gate does, if that is new to them.
    pub(crate) fn tell_gate(&self) {
        self.tell_gate_of(&mut self.lock());
    }

    fn tell_gate_of(&self, ledger: &mut Ledger) {
        let word = self.gate.word();
        if ledger.told == word {
            return;
        }
        ledger.told = word;
        self.events.tell(|| Happening::Gate {
            service: self.name.clone(),
            gate: word.mode.into(),
            register: word.register,
        });
    }

    /// Aborts a hold whose lease has run out, unless it was decided already, and releases to whoever owns. What
    /// cannot be made durable is tried again; until then the gate holds.
    pub(crate) fn expire_lease(&self, now: Instant) -> Option<Instant> {
        let mut ledger = self.lock();
        let until = ledger
            .lease_until
            .filter(|_| ledger.leases == Leases::Run)?;
        if now < until {
            return Some(until);
        }
        match self.abort_expired(&mut ledger) {
            Ok(()) => None,
            Err(refused) => {
                tracing::error!(service = %self.name(), "the lease ran out, but {}; holding on", refused.message);
                ledger.lease_until = Some(now + ABORT_AGAIN);
                ledger.lease_until
            }
        }
    }

    fn abort_expired(&self, ledger: &mut Ledger) -> Result<(), Refused> {
        let GateRecord::Holding { epoch: since, .. } = ledger.record.gate else {
            ledger.lease_until = None;
            return Ok(());
        };
        self.events.tell(|| Happening::LeaseRanOut {
            service: self.name.clone(),
            register: ledger.record.register,
        });
        // Whoever held had the time of the lease to say more.
        if since == ledger.record.register.epoch {
            self.perform(ledger, Change::Abort { epoch: since }, &Claim::Force)?;
        }
        let Register { epoch, owner } = ledger.record.register;
        self.perform(ledger, Change::Release { epoch, to: owner }, &Claim::Force)?;
        tracing::warn!(target: "audit", service = %self.name(), %epoch, %owner, "lease ran out: released to the owner");
        Ok(())
    }

    /// Returns the record as it was before.
    fn store(&self, ledger: &mut Ledger, record: Record) -> Result<Record, Refused> {
        if record == ledger.record {
            return Ok(record);
        }
        match ledger.file.store(&record) {
            Ok(()) => Ok(std::mem::replace(&mut ledger.record, record)),
            Err(error) => {
                let cause = std::error::Error::source(&error)
                    .map(ToString::to_string)
                    .unwrap_or_default();
                tracing::error!(service = %self.name(), "{error}: {cause}");
                Err(ledger.record.refused(
                    Refusal::NotDurable,
                    format!(
                        "{error}: {cause}; nothing was changed, make room and repeat the command"
                    ),
                ))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lease longer than a century would overflow the clock, and nobody would wait for it.
fn lease_end(lease_ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(lease_ms.min(u64::from(u32::MAX) * 1000))
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
