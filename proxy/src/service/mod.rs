//! A service: one gate, one register, and the commands that change them.
//!
//! Every change is made durable before it takes effect, and every command is a compare-and-set from the epoch it
//! names. The rules of repetition: a command that already took effect answers with success, and one that lost
//! against another is told the register that beat it. Commands run on the control thread only; workers never wait
//! for the disk.

mod gate;
pub(crate) mod inflight;
mod keeper;
pub(crate) mod pool;
mod queue;
mod register;
mod shared;
mod ticket;
mod word;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::hold::{self, Refusal, ServiceStatus};
use cutover_protocol::id::{Epoch, Register, ServiceName, Site};

use crate::config::Config;

pub(crate) use gate::{Admission, Drain, Gate, GateLimits};
pub(crate) use keeper::keep;
pub(crate) use queue::{Eviction, HOLD_BUCKETS_MS, HeldCounts, HoldTimes, Parked};
pub(crate) use register::StateDir;
pub use register::StateError;
use register::{Decision, GateRecord, Record, StateFile};
pub(crate) use ticket::Ticket;
pub(crate) use word::{Mode, Word};

/// Pause between two attempts to make an expired lease's abort durable.
const ABORT_AGAIN: Duration = Duration::from_secs(1);

/// One service, shared by all threads.
#[derive(Debug)]
pub(crate) struct Service {
    name: ServiceName,
    pub(crate) gate: Arc<Gate>,
    ledger: Mutex<Ledger>,
}

/// The record as it is on disk, and the lease that runs.
#[derive(Debug)]
struct Ledger {
    file: StateFile,
    record: Record,
    lease_until: Option<Instant>,
}

/// A command that changed nothing, and why.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) reason: Refusal,
    pub(crate) message: String,
    pub(crate) register: Register,
}

impl Service {
    /// Reads the state back; a service that held when it was last seen holds again, with a fresh lease.
    pub(crate) fn open(
        name: &ServiceName,
        config: &Config,
        state: &StateDir,
    ) -> Result<Self, StateError> {
        let file = state.file(name);
        let record = file.load_or_create()?;
        let (mode, lease_until) = match record.gate {
            GateRecord::Open => (Mode::Open, None),
            GateRecord::Holding { lease_ms, .. } => (Mode::Holding, Some(lease_end(lease_ms))),
        };
        let limits = GateLimits::of(config);
        let gate = Arc::new(Gate::new(limits, config.workers, mode, record.register));
        Ok(Self {
            name: name.clone(),
            gate,
            ledger: Mutex::new(Ledger {
                file,
                record,
                lease_until,
            }),
        })
    }

    /// Its name.
    pub(crate) const fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Everything a commander may want to know.
    pub(crate) fn status(&self) -> ServiceStatus {
        let word = self.gate.word();
        let counts = self.gate.with_held(queue::Held::counts);
        let (in_flight, upstream_connections) = (self.gate.in_flight(), self.gate.connections());
        let gate = match word.mode {
            Mode::Open => hold::Gate::Open,
            Mode::Releasing => hold::Gate::Releasing,
            Mode::Holding if in_flight == 0 && upstream_connections == 0 => hold::Gate::Holding,
            Mode::Holding => hold::Gate::Draining,
        };
        let lease = self
            .lock()
            .lease_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        ServiceStatus {
            service: self.name().clone(),
            register: word.register,
            gate,
            lease_ms_left: lease.map(milliseconds),
            in_flight,
            upstream_connections,
            held_now: counts.held_now,
            held: counts.held,
            released: counts.released,
            gave_up: counts.gave_up,
            evicted: counts.evicted,
            servers: Vec::new(),
        }
    }

    /// Closes the gate. Returns the mark of this hold, for [`Gate::drained`].
    pub(crate) fn hold(&self, epoch: Epoch, lease_ms: u64) -> Result<u64, Refused> {
        let mut ledger = self.lock();
        let record = ledger.record;
        if record.register.epoch != epoch {
            return Err(ledger.wrong_epoch(epoch));
        }
        let gate = GateRecord::Holding { epoch, lease_ms };
        self.store(&mut ledger, Record { gate, ..record })?;
        ledger.lease_until = Some(lease_end(lease_ms));
        let holds_already =
            matches!(record.gate, GateRecord::Holding { epoch: since, .. } if since == epoch);
        if holds_already {
            self.gate.keeper.notify_one();
        } else {
            self.gate.close(record.register);
        }
        Ok(self.gate.with_held(queue::Held::hold_generation))
    }

    /// What a drain is told whose hold has ended, or made way for another.
    pub(crate) fn superseded(&self) -> Refused {
        let message =
            "another command ended this hold before the drain was complete; read the status"
                .to_owned();
        self.lock().refused(Refusal::NotHolding, message)
    }

    /// Gives the hold another lease, from now.
    pub(crate) fn renew(&self, epoch: Epoch, lease_ms: u64) -> Result<(), Refused> {
        let mut ledger = self.lock();
        let record = ledger.record;
        let GateRecord::Holding {
            epoch: since,
            lease_ms: before,
        } = record.gate
        else {
            return Err(ledger.not_holding(epoch));
        };
        if epoch != since && epoch != record.register.epoch {
            return Err(ledger.wrong_epoch(epoch));
        }
        if before != lease_ms {
            self.store(
                &mut ledger,
                Record {
                    gate: GateRecord::Holding {
                        epoch: since,
                        lease_ms,
                    },
                    ..record
                },
            )?;
        }
        ledger.lease_until = Some(lease_end(lease_ms));
        self.gate.keeper.notify_one();
        Ok(())
    }

    /// `(epoch, owner)` → `(epoch + 1, to)`; the gate goes on holding.
    pub(crate) fn commit(&self, epoch: Epoch, to: Site) -> Result<(), Refused> {
        let mut ledger = self.lock();
        let record = ledger.record;
        let after = Register {
            epoch: epoch.next(),
            owner: to,
        };
        if record.register == after && record.decided == Decision::Commit {
            return Ok(());
        }
        if record.register.epoch != epoch {
            return Err(ledger.wrong_epoch(epoch));
        }
        if record.gate == GateRecord::Open {
            return Err(ledger.not_holding(epoch));
        }
        if record.register.owner == to {
            return Err(ledger.refused(
                Refusal::WrongOwner,
                format!("{to} owns epoch {epoch} already; commit to the other site, or abort"),
            ));
        }
        self.store(
            &mut ledger,
            Record {
                register: after,
                decided: Decision::Commit,
                ..record
            },
        )?;
        self.gate.advance(after);
        Ok(())
    }

    /// `(epoch, owner)` → `(epoch + 1, owner)`; the gate stays as it is.
    pub(crate) fn abort(&self, epoch: Epoch) -> Result<(), Refused> {
        let mut ledger = self.lock();
        let record = ledger.record;
        if record.register.epoch == epoch.next() && record.decided == Decision::Abort {
            return Ok(());
        }
        if record.register.epoch != epoch {
            return Err(ledger.wrong_epoch(epoch));
        }
        let after = Register {
            epoch: epoch.next(),
            owner: record.register.owner,
        };
        self.store(
            &mut ledger,
            Record {
                register: after,
                decided: Decision::Abort,
                ..record
            },
        )?;
        self.gate.advance(after);
        Ok(())
    }

    /// Opens the gate towards the owner, which must be `to` at exactly this epoch.
    pub(crate) fn release(&self, epoch: Epoch, to: Site) -> Result<(), Refused> {
        let mut ledger = self.lock();
        let record = ledger.record;
        if record.register.epoch != epoch {
            return Err(ledger.wrong_epoch(epoch));
        }
        if record.register.owner != to {
            let owner = record.register.owner;
            return Err(ledger.refused(
                Refusal::WrongOwner,
                format!("{owner} owns epoch {epoch}, not {to}; release to {owner}"),
            ));
        }
        match record.gate {
            GateRecord::Open => Ok(()),
            // A commit from this epoch could still arrive: somebody has to win first.
            GateRecord::Holding { epoch: since, .. } if since == epoch => Err(ledger.refused(
                Refusal::WrongEpoch,
                format!("the hold at epoch {epoch} is undecided; commit or abort first, then release at the epoch after"),
            )),
            GateRecord::Holding { .. } => self.open_gate(&mut ledger),
        }
    }

    /// Aborts a hold whose lease has run out, unless it was decided already, and releases to whoever owns. What
    /// cannot be made durable is tried again; until then the gate holds.
    pub(crate) fn expire_lease(&self, now: Instant) -> Option<Instant> {
        let mut ledger = self.lock();
        let until = ledger.lease_until?;
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
        let record = ledger.record;
        let GateRecord::Holding { epoch: since, .. } = record.gate else {
            ledger.lease_until = None;
            return Ok(());
        };
        if since == record.register.epoch {
            let after = Register {
                epoch: since.next(),
                owner: record.register.owner,
            };
            self.store(
                ledger,
                Record {
                    register: after,
                    decided: Decision::Abort,
                    ..record
                },
            )?;
            self.gate.advance(after);
        }
        self.open_gate(ledger)?;
        let Register { epoch, owner } = ledger.record.register;
        tracing::warn!(target: "audit", service = %self.name(), %epoch, %owner, "lease ran out: released to the owner");
        Ok(())
    }

    fn open_gate(&self, ledger: &mut Ledger) -> Result<(), Refused> {
        let record = Record {
            gate: GateRecord::Open,
            ..ledger.record
        };
        self.store(ledger, record)?;
        ledger.lease_until = None;
        self.gate.release(record.register);
        Ok(())
    }

    fn store(&self, ledger: &mut Ledger, record: Record) -> Result<(), Refused> {
        if record == ledger.record {
            return Ok(());
        }
        match ledger.file.store(&record) {
            Ok(()) => {
                ledger.record = record;
                Ok(())
            }
            Err(error) => {
                let cause = std::error::Error::source(&error)
                    .map(ToString::to_string)
                    .unwrap_or_default();
                tracing::error!(service = %self.name(), "{error}: {cause}");
                Err(ledger.refused(
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

impl Ledger {
    fn refused(&self, reason: Refusal, message: String) -> Refused {
        Refused {
            reason,
            message,
            register: self.record.register,
        }
    }

    fn wrong_epoch(&self, named: Epoch) -> Refused {
        let Register { epoch, owner } = self.record.register;
        let message = format!(
            "the register is at epoch {epoch} with owner {owner}, not at epoch {named}; read the status"
        );
        self.refused(Refusal::WrongEpoch, message)
    }

    /// After a lease ran out the epoch has moved: that is the better reason, where it is true.
    fn not_holding(&self, named: Epoch) -> Refused {
        if self.record.register.epoch == named {
            self.refused(
                Refusal::NotHolding,
                "the gate does not hold; hold it first".to_owned(),
            )
        } else {
            self.wrong_epoch(named)
        }
    }
}

/// A lease longer than a century would overflow the clock, and nobody would wait for it.
fn lease_end(lease_ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(lease_ms.min(u64::from(u32::MAX) * 1000))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
