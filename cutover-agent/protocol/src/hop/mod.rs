//! The hop machine: which action comes next, and what is undone when one fails.
//!
//! [`Hop::step`] is pure and deterministic. The driver appends every event to its journal before it steps, so
//! a restarted driver folds the journal and stands where the dead one stood. At most one action is outstanding.
//! An undo is pushed before its action is issued, and undos are popped in reverse.
//!
//! What the machine never does: commit twice, undo anything of a held service before the register has moved on to
//! the source, go back once it has moved on to the target, or call a hop undone while the source cannot serve.

mod action;
mod event;
mod phase;
mod rounds;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod table;

pub use action::{Action, ActionName, Undo};
pub use event::{Event, Failure};
pub use phase::Phase;
pub use rounds::{
    Bounds, Costs, Link, NextRound, Round, Stall, next_round, predict, predicted_stall,
    throttle_percent,
};

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, Register, Site};

/// What a step asks of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Issue this action; nothing else is outstanding.
    Act(Action),
    /// The event was a repetition, or it was noted for later: whatever is outstanding stays so.
    Nothing,
    /// The hop is over.
    Over(Ending),
}

/// How a hop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The target serves.
    Committed,
    /// The source serves as if nothing had happened.
    Undone,
}

/// An event that does not belong where it arrived. The state is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the event {event} does not belong in phase {phase}")]
pub struct StepError {
    /// Where the machine stood.
    pub phase: Phase,
    /// What arrived.
    pub event: String,
}

/// One hop, from plan to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Hop {
    phase: Phase,
    bounds: Bounds,
    link: Link,
    epoch: Option<Epoch>,
    register: Option<Register>,
    rounds: Vec<Round>,
    undos: Vec<Undo>,
    owed: Vec<Undo>,
    failure: Option<Failure>,
    abort_asked: bool,
    outstanding: Option<ActionName>,
    finished: Option<ActionName>,
}

impl Hop {
    /// A hop that has not begun. `bounds` say when memory rounds end.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            phase: Phase::Plan,
            bounds,
            link: Link::default(),
            epoch: None,
            register: None,
            rounds: Vec::new(),
            undos: Vec::new(),
            owed: Vec::new(),
            failure: None,
            abort_asked: false,
            outstanding: None,
            finished: None,
        }
    }

    /// Where the hop stands.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The epoch the hop started from, once it has begun.
    #[must_use]
    pub const fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// The register as last read, once it has been.
    #[must_use]
    pub const fn register(&self) -> Option<Register> {
        self.register
    }

    /// Why the hop is being undone, or was.
    #[must_use]
    pub const fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// The memory rounds so far.
    #[must_use]
    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    /// Undos that failed and are left for later; none of them keeps the source from serving.
    #[must_use]
    pub fn owed(&self) -> &[Undo] {
        &self.owed
    }

    /// The stall the next switch-over would cost, by its terms, as far as this hop has learned.
    #[must_use]
    pub fn predicted_stall(&self) -> Stall {
        predicted_stall(&self.rounds, &self.bounds, &self.link)
    }

    /// By how much the source is to be slowed down in the next round, in percent.
    #[must_use]
    pub fn throttle_percent(&self) -> u8 {
        throttle_percent(&self.rounds, &self.bounds, &self.link)
    }

    /// Takes one event and says what to do next.
    ///
    /// # Errors
    /// [`StepError`] when the event does not belong in this phase; the machine is then unchanged.
    pub fn step(&mut self, event: Event) -> Result<Step, StepError> {
        match event {
            Event::Begun { epoch } if self.phase == Phase::Plan => {
                self.epoch = Some(epoch);
                Ok(self.issue(Phase::Preflight, Action::Preflight))
            }
            Event::AbortAsked => self.note_abort(),
            Event::Restarted => self.resume(),
            Event::Failed { action, failure } if self.is_outstanding(action) => {
                Ok(self.fail(failure))
            }
            Event::Done { action } if self.is_outstanding(action) => self.advance(action),
            Event::Measured { link } if self.is_outstanding(ActionName::OpenTunnel) => {
                self.link = link;
                Ok(self.go_on(Phase::PreSync, Action::SyncFiles))
            }
            Event::PreCopied { round } if self.is_outstanding(ActionName::PreCopy) => {
                Ok(self.count_round(round))
            }
            Event::Settled { register } if self.is_outstanding(ActionName::Settle) => {
                Ok(self.settle(register))
            }
            Event::Committed { register } if self.is_outstanding(ActionName::Commit) => {
                Ok(self.settle(register))
            }
            Event::Done { action } | Event::Failed { action, .. }
                if self.finished == Some(action) =>
            {
                Ok(Step::Nothing)
            }
            other => Err(StepError {
                phase: self.phase,
                event: other.name().to_owned(),
            }),
        }
    }

    fn is_outstanding(&self, action: ActionName) -> bool {
        self.outstanding == Some(action)
    }

    /// The happy path for actions that report nothing but success.
    fn advance(&mut self, action: ActionName) -> Result<Step, StepError> {
        let epoch = self.epoch.unwrap_or(Epoch::FIRST);
        Ok(match action {
            ActionName::Preflight => self.go_on(Phase::Tunnel, Action::OpenTunnel),
            ActionName::SyncFiles => self.after_files(),
            ActionName::Hold => self.go_on(Phase::Checkpoint, Action::Checkpoint),
            ActionName::Checkpoint => self.go_on(Phase::Transfer, Action::Transfer),
            ActionName::Transfer => self.go_on(Phase::Restore, Action::Restore),
            ActionName::Restore => self.go_on(Phase::Verify, Action::Verify),
            ActionName::Verify => self.go_on(Phase::Commit, Action::Commit { epoch }),
            ActionName::Redirect => self.end(Phase::Done, Ending::Committed, action),
            ActionName::Undo => {
                self.undos.pop();
                self.unwind()
            }
            // These report what they found, by an event of their own.
            ActionName::OpenTunnel
            | ActionName::PreCopy
            | ActionName::Commit
            | ActionName::Settle => {
                return Err(StepError {
                    phase: self.phase,
                    event: format!("Done({action})"),
                });
            }
        })
    }

    fn after_files(&mut self) -> Step {
        match next_round(&self.rounds, &self.bounds, &self.link) {
            NextRound::Copy => {
                let round = self.next_round_number();
                self.go_on(Phase::PreCopy, Action::PreCopy { round })
            }
            NextRound::Switch => {
                let epoch = self.epoch.unwrap_or(Epoch::FIRST);
                self.go_on(Phase::Hold, Action::Hold { epoch })
            }
        }
    }

    fn count_round(&mut self, round: Round) -> Step {
        self.rounds.push(round);
        self.after_files()
    }

    fn next_round_number(&self) -> u32 {
        u32::try_from(self.rounds.len())
            .unwrap_or(u32::MAX)
            .saturating_add(1)
    }

    /// Issues the next forward action, unless an abort was asked meanwhile.
    fn go_on(&mut self, phase: Phase, action: Action) -> Step {
        if self.abort_asked && self.phase.is_before_commit() {
            return self.fail(Failure::aborted());
        }
        self.issue(phase, action)
    }

    fn issue(&mut self, phase: Phase, action: Action) -> Step {
        if let Some(undo) = action.undo()
            && !self.undos.contains(&undo)
        {
            self.undos.push(undo);
        }
        self.finished = self.outstanding.replace(action.name());
        self.phase = phase;
        Step::Act(action)
    }

    fn end(&mut self, phase: Phase, ending: Ending, finished: ActionName) -> Step {
        self.phase = phase;
        self.outstanding = None;
        self.finished = Some(finished);
        Step::Over(ending)
    }

    fn fail(&mut self, failure: Failure) -> Step {
        match self.phase {
            // Forward only: the register has spoken.
            Phase::Redirect => self.issue(Phase::Redirect, Action::Redirect),
            // Whoever cannot read the register stays as it is and asks again.
            Phase::Settle => self.ask_register(),
            Phase::Unwind => self.retry_or_owe(),
            _ => {
                self.failure.get_or_insert(failure);
                if self.undos.contains(&Undo::Reopen) {
                    self.ask_register()
                } else {
                    self.unwind()
                }
            }
        }
    }

    fn ask_register(&mut self) -> Step {
        let epoch = self.epoch.unwrap_or(Epoch::FIRST);
        self.issue(Phase::Settle, Action::Settle { epoch })
    }

    fn settle(&mut self, register: Register) -> Step {
        self.register = Some(register);
        // A refusal may name a register that nobody has moved: a commit on its way could still win it.
        if self.epoch.is_some_and(|begun| register.epoch <= begun) {
            return self.ask_register();
        }
        match register.owner {
            Site::Target => self.issue(Phase::Redirect, Action::Redirect),
            Site::Source => {
                self.failure.get_or_insert_with(Failure::lost_register);
                self.unwind()
            }
        }
    }

    fn unwind(&mut self) -> Step {
        match self.undos.last() {
            Some(&undo) => self.issue(Phase::Unwind, Action::Undo(undo)),
            None => self.end(Phase::Undone, Ending::Undone, ActionName::Undo),
        }
    }

    /// What the source needs in order to serve is tried until it succeeds: `Undone` is a promise.
    fn retry_or_owe(&mut self) -> Step {
        if let Some(undo) = self.undos.last()
            && !undo.is_worth_waiting_for()
        {
            self.owed.extend(self.undos.pop());
        }
        self.unwind()
    }

    fn note_abort(&mut self) -> Result<Step, StepError> {
        if !self.phase.is_before_commit() || self.phase == Phase::Plan {
            return Err(StepError {
                phase: self.phase,
                event: "AbortAsked".to_owned(),
            });
        }
        self.abort_asked = true;
        Ok(Step::Nothing)
    }

    /// The driver died with an action outstanding; its outcome is unknown.
    fn resume(&mut self) -> Result<Step, StepError> {
        match self.phase {
            Phase::Plan => Err(StepError {
                phase: self.phase,
                event: "Restarted".to_owned(),
            }),
            // It died between the last record and putting the journal away.
            Phase::Done => Ok(Step::Over(Ending::Committed)),
            Phase::Undone => Ok(Step::Over(Ending::Undone)),
            Phase::Redirect => Ok(self.issue(Phase::Redirect, Action::Redirect)),
            Phase::Unwind => Ok(self.unwind()),
            _ => Ok(self.fail(Failure::restarted(self.phase))),
        }
    }
}
