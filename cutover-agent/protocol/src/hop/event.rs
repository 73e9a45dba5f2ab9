//! What the driver tells the machine; each is journalled before it is stepped.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action::ActionName;
use super::phase::Phase;
use super::rounds::{Link, Round};
use crate::id::{Epoch, Register};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The plan is frozen and the register was read.
    Begun {
        /// The register's epoch, the one the commit must find unchanged.
        epoch: Epoch,
    },
    /// The outstanding action succeeded.
    Done {
        /// Which one.
        action: ActionName,
    },
    /// The outstanding action failed, in whole or in part.
    Failed {
        /// Which one.
        action: ActionName,
        /// Why.
        failure: Failure,
    },
    /// The connections stand, and this is what they carry.
    Measured {
        /// The link as measured.
        link: Link,
    },
    /// One memory round has arrived at the target.
    PreCopied {
        /// What it moved.
        round: Round,
    },
    /// The commit was answered: the register, whoever won.
    Committed {
        /// The register after the compare-and-set.
        register: Register,
    },
    /// The abort was answered: the register, whoever won.
    Settled {
        /// The register after the compare-and-set.
        register: Register,
    },
    /// An operator wants the hop undone.
    AbortAsked,
    /// A new driver has folded the journal; the outcome of the outstanding action is unknown.
    Restarted,
}

impl Event {
    /// The event's name without its data.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Begun { .. } => "Begun",
            Self::Done { .. } => "Done",
            Self::Failed { .. } => "Failed",
            Self::Measured { .. } => "Measured",
            Self::PreCopied { .. } => "PreCopied",
            Self::Committed { .. } => "Committed",
            Self::Settled { .. } => "Settled",
            Self::AbortAsked => "AbortAsked",
            Self::Restarted => "Restarted",
        }
    }
}

/// Why a hop is undone, as a person reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Failure {
    /// One line: what failed, on what, why, what to do.
    pub message: String,
}

impl Failure {
    /// A failure with this message; line breaks become spaces, since a journal entry is a line.
    #[must_use]
    pub fn new(message: &str) -> Self {
        Self {
            message: message.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    }

    pub(super) fn aborted() -> Self {
        Self::new("an operator asked for the hop to be aborted")
    }

    pub(super) fn lost_register() -> Self {
        Self::new(
            "the register went to the source: the hold's lease expired, or somebody reopened the service",
        )
    }

    pub(super) fn restarted(phase: Phase) -> Self {
        Self::new(&format!("the agent was restarted in phase {phase}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}
