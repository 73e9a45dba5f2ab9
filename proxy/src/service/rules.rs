//! The rules: what one command makes of a service's record, or why it changes nothing.
//!
//! Pure, so that every order of commands can be thought through: no clock, no file, no gate. A command that already
//! took effect leaves the record as it is; one that lost against another is told the register that beat it. It never
//! lets a hold be decided by somebody whose it is not, and never releases one that is undecided.

use cutover_protocol::hold::{Claim, Refusal};
use cutover_protocol::id::{Epoch, Holder, Register, Site};

use super::register::{Decision, GateRecord, Record};

/// What a commander wants changed. The fields are those of the protocol's commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Close the gate, or give a hold at this epoch another lease.
    Hold { epoch: Epoch, lease_ms: u64 },
    /// Give a hold another lease.
    Renew { epoch: Epoch, lease_ms: u64 },
    /// `(epoch, owner)` → `(epoch + 1, to)`; the gate goes on holding.
    Commit { epoch: Epoch, to: Site },
    /// `(epoch, owner)` → `(epoch + 1, owner)`; the gate stays as it is.
    Abort { epoch: Epoch },
    /// Open the gate towards the owner, which must be `to` at exactly this epoch.
    Release { epoch: Epoch, to: Site },
}

/// A command that changed nothing, and why.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) reason: Refusal,
    pub(crate) message: String,
    pub(crate) register: Register,
}

/// The record after a change.
///
/// # Errors
/// Why the change is refused.
pub(super) fn judge(record: &Record, change: Change, claim: &Claim) -> Result<Record, Refused> {
    match change {
        Change::Hold { epoch, lease_ms } => record.held(epoch, lease_ms, claim),
        Change::Renew { epoch, lease_ms } => record.renewed(epoch, lease_ms, claim),
        Change::Commit { epoch, to } => record.committed(epoch, to, claim),
        Change::Abort { epoch } => record.aborted(epoch, claim),
        Change::Release { epoch, to } => record.released(epoch, to, claim),
    }
}

impl Record {
    fn held(&self, epoch: Epoch, lease_ms: u64, claim: &Claim) -> Result<Self, Refused> {
        self.must_be_at(epoch)?;
        self.must_be_decided_by(claim)?;
        let holder = match claim {
            Claim::Holder(holder) => Some(holder.clone()),
            Claim::Nobody | Claim::Force => None,
        };
        Ok(self.with_gate(GateRecord::Holding {
            epoch,
            lease_ms,
            holder,
        }))
    }

    fn renewed(&self, epoch: Epoch, lease_ms: u64, claim: &Claim) -> Result<Self, Refused> {
        let GateRecord::Holding {
            epoch: since,
            holder,
            ..
        } = &self.gate
        else {
            return Err(self.not_holding(epoch));
        };
        if epoch != *since && epoch != self.register.epoch {
            return Err(self.wrong_epoch(epoch));
        }
        self.must_be_decided_by(claim)?;
        Ok(self.with_gate(GateRecord::Holding {
            epoch: *since,
            lease_ms,
            holder: holder.clone(),
        }))
    }

    fn committed(&self, epoch: Epoch, to: Site, claim: &Claim) -> Result<Self, Refused> {
        let after = Register {
            epoch: epoch.next(),
            owner: to,
        };
        if self.register == after && self.decided == Decision::Commit {
            return Ok(self.clone());
        }
        self.must_be_at(epoch)?;
        if self.gate == GateRecord::Open {
            return Err(self.not_holding(epoch));
        }
        self.must_be_decided_by(claim)?;
        if self.register.owner == to {
            let message =
                format!("{to} owns epoch {epoch} already; commit to the other site, or abort");
            return Err(self.refused(Refusal::WrongOwner, message));
        }
        Ok(self.decided(after, Decision::Commit))
    }

    fn aborted(&self, epoch: Epoch, claim: &Claim) -> Result<Self, Refused> {
        if self.register.epoch == epoch.next() && self.decided == Decision::Abort {
            return Ok(self.clone());
        }
        self.must_be_at(epoch)?;
        self.must_be_decided_by(claim)?;
        let after = Register {
            epoch: epoch.next(),
            owner: self.register.owner,
        };
        Ok(self.decided(after, Decision::Abort))
    }

    fn released(&self, epoch: Epoch, to: Site, claim: &Claim) -> Result<Self, Refused> {
        self.must_be_at(epoch)?;
        let owner = self.register.owner;
        if owner != to {
            let message = format!("{owner} owns epoch {epoch}, not {to}; release to {owner}");
            return Err(self.refused(Refusal::WrongOwner, message));
        }
        let GateRecord::Holding { epoch: since, .. } = self.gate else {
            return Ok(self.clone());
        };
        self.must_be_decided_by(claim)?;
        // A commit from this epoch could still arrive: somebody has to win first.
        if since == epoch {
            let message = format!(
                "the hold at epoch {epoch} is undecided; commit or abort first, then release at the epoch after"
            );
            return Err(self.refused(Refusal::WrongEpoch, message));
        }
        Ok(self.with_gate(GateRecord::Open))
    }

    /// Whether writes may be limited, or their limit be lifted, which is somebody's or nobody's.
    pub(super) fn may_limit_writes(
        &self,
        epoch: Epoch,
        holder: Option<&Holder>,
        claim: &Claim,
    ) -> Result<(), Refused> {
        self.must_be_at(epoch)?;
        self.must_be_decided_by(claim)?;
        if self.gate != GateRecord::Open {
            let message =
                "the gate holds, and writes with it: there is nothing to limit".to_owned();
            return Err(self.refused(Refusal::Holding, message));
        }
        match holder {
            Some(holder) if !claim.suffices_for(Some(holder)) => {
                let message = format!(
                    "{holder} limits writes, and decides about that; let its lease run out, or insist (--force) if it is gone for good"
                );
                Err(self.refused(Refusal::HeldByOther, message))
            }
            _ => Ok(()),
        }
    }

    fn with_gate(&self, gate: GateRecord) -> Self {
        Self {
            gate,
            ..self.clone()
        }
    }

    fn decided(&self, register: Register, decided: Decision) -> Self {
        Self {
            register,
            decided,
            ..self.clone()
        }
    }

    fn must_be_at(&self, epoch: Epoch) -> Result<(), Refused> {
        if self.register.epoch == epoch {
            Ok(())
        } else {
            Err(self.wrong_epoch(epoch))
        }
    }

    fn must_be_decided_by(&self, claim: &Claim) -> Result<(), Refused> {
        match self.holder() {
            Some(holder) if !claim.suffices_for(Some(holder)) => {
                let message = format!(
                    "{holder} holds, and decides about this hold; let it end, or insist (--force) if it is gone for good"
                );
                Err(self.refused(Refusal::HeldByOther, message))
            }
            _ => Ok(()),
        }
    }

    /// In whose name the gate holds.
    pub(super) const fn holder(&self) -> Option<&Holder> {
        match &self.gate {
            GateRecord::Holding { holder, .. } => holder.as_ref(),
            GateRecord::Open => None,
        }
    }

    /// Whether the gate holds since exactly this epoch.
    pub(super) fn holds_since(&self, epoch: Epoch) -> bool {
        matches!(self.gate, GateRecord::Holding { epoch: since, .. } if since == epoch)
    }

    pub(super) const fn refused(&self, reason: Refusal, message: String) -> Refused {
        Refused {
            reason,
            message,
            register: self.register,
        }
    }

    fn wrong_epoch(&self, named: Epoch) -> Refused {
        let Register { epoch, owner } = self.register;
        let message = format!(
            "the register is at epoch {epoch} with owner {owner}, not at epoch {named}; read the status"
        );
        self.refused(Refusal::WrongEpoch, message)
    }

    /// After a lease ran out the epoch has moved: that is the better reason, where it is true.
    fn not_holding(&self, named: Epoch) -> Refused {
        if self.register.epoch == named {
            self.refused(
                Refusal::NotHolding,
                "the gate does not hold; hold it first".to_owned(),
            )
        } else {
            self.wrong_epoch(named)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> Claim {
        Claim::Holder("hop-1".parse().unwrap())
    }

    fn other() -> Claim {
        Claim::Holder("hop-2".parse().unwrap())
    }

    fn held_by(claim: &Claim) -> Record {
        let hold = Change::Hold {
            epoch: Epoch(1),
            lease_ms: 9,
        };
        judge(&Record::first(), hold, claim).unwrap()
    }

    /// Everything that could decide or prolong a hold at epoch 1.
    const CHANGES: [Change; 4] = [
        Change::Hold {
            epoch: Epoch(1),
            lease_ms: 5,
        },
        Change::Renew {
            epoch: Epoch(1),
            lease_ms: 5,
        },
        Change::Commit {
            epoch: Epoch(1),
            to: Site::Target,
        },
        Change::Abort { epoch: Epoch(1) },
    ];

    #[test]
    fn a_hold_in_somebodys_name_is_changed_by_nobody_else() {
        let held = held_by(&agent());
        for change in CHANGES {
            for claim in [Claim::Nobody, other()] {
                let refused = judge(&held, change, &claim).unwrap_err();
                assert_eq!(refused.reason, Refusal::HeldByOther, "{change:?}");
                assert!(
                    refused.message.starts_with("hop-1 holds"),
                    "{}",
                    refused.message
                );
            }
            judge(&held, change, &agent()).unwrap();
            judge(&held, change, &Claim::Force).unwrap();
        }
        let committed = judge(&held, CHANGES[2], &agent()).unwrap();
        let release = Change::Release {
            epoch: Epoch(2),
            to: Site::Target,
        };
        let refused = judge(&committed, release, &Claim::Nobody).unwrap_err();
        assert_eq!(refused.reason, Refusal::HeldByOther);
        let open = judge(&committed, release, &agent()).unwrap();
        assert_eq!(open.gate, GateRecord::Open);
    }

    #[test]
    fn a_hold_in_nobodys_name_is_anybodys() {
        let held = held_by(&Claim::Nobody);
        for change in CHANGES {
            for claim in [Claim::Nobody, agent(), Claim::Force] {
                judge(&held, change, &claim).unwrap();
            }
        }
    }

    #[test]
    fn a_hold_that_is_taken_by_force_has_no_holder_any_more() {
        let taken = judge(&held_by(&agent()), CHANGES[0], &Claim::Force).unwrap();
        assert_eq!(taken.holder(), None);
        let kept = judge(&held_by(&agent()), CHANGES[1], &Claim::Force).unwrap();
        assert_eq!(kept.holder().unwrap().as_str(), "hop-1");
    }

    #[test]
    fn an_old_epoch_is_the_better_reason_than_another_holder() {
        let moved = judge(&held_by(&agent()), CHANGES[3], &agent()).unwrap();
        for change in CHANGES {
            let refused = judge(&moved, change, &Claim::Nobody);
            // A repeated abort has taken effect; a renewal still names the hold's own epoch.
            let reason = match change {
                Change::Abort { .. } => {
                    refused.unwrap();
                    continue;
                }
                Change::Renew { .. } => Refusal::HeldByOther,
                _ => Refusal::WrongEpoch,
            };
            assert_eq!(refused.unwrap_err().reason, reason, "{change:?}");
        }
    }
}
