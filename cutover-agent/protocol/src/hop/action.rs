//! What the machine asks of the driver, and what undoes each of them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::Epoch;

/// One thing to do. Every action may be issued again after a crash, so each must be idempotent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Check both sides and compare.
    Preflight,
    /// Open the encrypted connections and measure them; answers [`super::Event::Measured`].
    OpenTunnel,
    /// Copy the files while the source runs.
    SyncFiles,
    /// Copy one round of memory while the source runs; answers [`super::Event::PreCopied`].
    PreCopy {
        /// Counted from 1.
        round: u32,
    },
    /// Hold the gates and drain.
    Hold {
        /// The epoch the hop started from.
        epoch: Epoch,
    },
    /// Freeze, fence and dump every container; leave CRIU parked.
    Checkpoint,
    /// Send the last pages and the last file delta.
    Transfer,
    /// Build every container at the target; leave CRIU parked.
    Restore,
    /// Run the target behind its fence and probe it.
    Verify,
    /// Compare-and-set the register to the target; answers [`super::Event::Committed`].
    Commit {
        /// The epoch to commit from.
        epoch: Epoch,
    },
    /// Compare-and-set the register to an abort and report who won; answers [`super::Event::Settled`].
    Settle {
        /// The epoch to abort from.
        epoch: Epoch,
    },
    /// Lift the target's fence, release the gates, retire the source.
    Redirect,
    /// Undo one thing.
    Undo(Undo),
}

/// An [`Action`] without its arguments, as events name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ActionName {
    /// See [`Action::Preflight`].
    Preflight,
    /// See [`Action::OpenTunnel`].
    OpenTunnel,
    /// See [`Action::SyncFiles`].
    SyncFiles,
    /// See [`Action::PreCopy`].
    PreCopy,
    /// See [`Action::Hold`].
    Hold,
    /// See [`Action::Checkpoint`].
    Checkpoint,
    /// See [`Action::Transfer`].
    Transfer,
    /// See [`Action::Restore`].
    Restore,
    /// See [`Action::Verify`].
    Verify,
    /// See [`Action::Commit`].
    Commit,
    /// See [`Action::Settle`].
    Settle,
    /// See [`Action::Redirect`].
    Redirect,
    /// See [`Action::Undo`].
    Undo,
}

impl ActionName {
    /// Every name, in the order of a hop.
    pub const ALL: [Self; 13] = [
        Self::Preflight,
        Self::OpenTunnel,
        Self::SyncFiles,
        Self::PreCopy,
        Self::Hold,
        Self::Checkpoint,
        Self::Transfer,
        Self::Restore,
        Self::Verify,
        Self::Commit,
        Self::Settle,
        Self::Redirect,
        Self::Undo,
    ];
}

impl fmt::Display for ActionName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// What takes back one action. Every undo is idempotent and also right when its action never began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Undo {
    /// Close the connections to the target.
    CloseTunnel,
    /// Delete what was copied to the target, files and memory images, and the images at the source.
    DropStaging,
    /// Open the gates towards the source.
    Reopen,
    /// Let the source run again and lift its fence.
    Thaw,
    /// Kill whatever was built at the target.
    KillTarget,
}

impl Undo {
    /// Every undo.
    pub const ALL: [Self; 5] = [
        Self::CloseTunnel,
        Self::DropStaging,
        Self::Reopen,
        Self::Thaw,
        Self::KillTarget,
    ];

    /// False for what only the target can do: it is fenced and can never win the register any more, so clients
    /// do not wait for a target that does not answer.
    #[must_use]
    pub const fn is_worth_waiting_for(self) -> bool {
        matches!(self, Self::Reopen | Self::Thaw)
    }
}

impl fmt::Display for Undo {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

impl Action {
    /// The action's name.
    #[must_use]
    pub const fn name(self) -> ActionName {
        match self {
            Self::Preflight => ActionName::Preflight,
            Self::OpenTunnel => ActionName::OpenTunnel,
            Self::SyncFiles => ActionName::SyncFiles,
            Self::PreCopy { .. } => ActionName::PreCopy,
            Self::Hold { .. } => ActionName::Hold,
            Self::Checkpoint => ActionName::Checkpoint,
            Self::Transfer => ActionName::Transfer,
            Self::Restore => ActionName::Restore,
            Self::Verify => ActionName::Verify,
            Self::Commit { .. } => ActionName::Commit,
            Self::Settle { .. } => ActionName::Settle,
            Self::Redirect => ActionName::Redirect,
            Self::Undo(_) => ActionName::Undo,
        }
    }

    /// What takes this action back, pushed before the action is issued.
    #[must_use]
    pub const fn undo(self) -> Option<Undo> {
        match self {
            Self::OpenTunnel => Some(Undo::CloseTunnel),
            Self::SyncFiles => Some(Undo::DropStaging),
            Self::Hold { .. } => Some(Undo::Reopen),
            Self::Checkpoint => Some(Undo::Thaw),
            Self::Restore => Some(Undo::KillTarget),
            Self::Preflight
            | Self::PreCopy { .. }
            | Self::Transfer
            | Self::Verify
            | Self::Commit { .. }
            | Self::Settle { .. }
            | Self::Redirect
            | Self::Undo(_) => None,
        }
    }
}
