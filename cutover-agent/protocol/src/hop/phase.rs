//! The phases of a hop, in the order a reader of a report sees them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a hop stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// The plan is frozen; nothing has been asked of anybody.
    Plan,
    /// Both sides are checked and their findings compared.
    Preflight,
    /// The encrypted connections are opened and measured.
    Tunnel,
    /// Files are copied while the source runs.
    PreSync,
    /// Memory is copied in rounds while the source runs.
    PreCopy,
    /// The gates hold; what is in flight drains.
    Hold,
    /// The source is fenced, frozen and dumped; CRIU is parked.
    Checkpoint,
    /// The last pages and the last file delta cross.
    Transfer,
    /// The target is built, not running; CRIU is parked.
    Restore,
    /// The target runs behind its fence and is probed.
    Verify,
    /// One compare-and-set decides.
    Commit,
    /// The outcome is in doubt, or the hop failed while holding: the register is asked, by aborting it.
    Settle,
    /// The target is released, the source retired.
    Redirect,
    /// What was done is undone, in reverse.
    Unwind,
    /// The target serves.
    Done,
    /// The source serves as if nothing had happened.
    Undone,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 16] = [
        Self::Plan,
        Self::Preflight,
        Self::Tunnel,
        Self::PreSync,
        Self::PreCopy,
        Self::Hold,
        Self::Checkpoint,
        Self::Transfer,
        Self::Restore,
        Self::Verify,
        Self::Commit,
        Self::Settle,
        Self::Redirect,
        Self::Unwind,
        Self::Done,
        Self::Undone,
    ];

    /// True while nothing irrevocable can have been asked: an abort is still a promise that can be kept.
    #[must_use]
    pub const fn is_before_commit(self) -> bool {
        matches!(
            self,
            Self::Plan
                | Self::Preflight
                | Self::Tunnel
                | Self::PreSync
                | Self::PreCopy
                | Self::Hold
                | Self::Checkpoint
                | Self::Transfer
                | Self::Restore
                | Self::Verify
        )
    }

    /// True when nothing more will happen.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Undone)
    }

    /// True once clients may be waiting: from the hold on, every second is somebody's stall.
    #[must_use]
    pub const fn is_holding(self) -> bool {
        matches!(
            self,
            Self::Hold
                | Self::Checkpoint
                | Self::Transfer
                | Self::Restore
                | Self::Verify
                | Self::Commit
                | Self::Settle
                | Self::Redirect
                | Self::Unwind
        )
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// A word that names no phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no phase {word:?}; the phases are {}", Phase::ALL.map(|phase| phase.to_string()).join(", "))]
pub struct UnknownPhase {
    /// The word as given.
    pub word: String,
}

impl FromStr for Phase {
    type Err = UnknownPhase;
    fn from_str(word: &str) -> Result<Self, UnknownPhase> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.to_string().eq_ignore_ascii_case(word))
            .ok_or_else(|| UnknownPhase {
                word: word.to_owned(),
            })
    }
}
