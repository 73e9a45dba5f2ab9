//! What a hop did, for people and programs.

use cutover_protocol::hop::{Phase, Round};
use cutover_protocol::id::HopId;
use serde::{Deserialize, Serialize};

/// How a hop ended for whoever asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The target serves.
    Committed,
    /// The source serves as if nothing had happened.
    Undone,
    /// The register could not be read, or the target not be released: `recover` goes on.
    Unfinished,
}

/// One phase of the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// The phase; undos are named `UndoThaw` and so on.
    pub name: String,
    /// How long it took in all, in seconds.
    pub seconds: f64,
    /// Bytes that crossed the link in it.
    pub bytes: u64,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The hop.
    pub hop: HopId,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was undone or is unfinished.
    pub cause: Option<String>,
    /// The engine's word.
    pub engine: String,
    /// In the order they first began.
    pub phases: Vec<PhaseReport>,
    /// Memory rounds.
    pub rounds: Vec<Round>,
    /// The predicted stall when the hold began, in milliseconds.
    pub stall_ms_predicted: u64,
    /// Undos left to be done when the target can be reached again.
    pub owed: Vec<String>,
    /// What the probes saw.
    pub probes: Vec<String>,
    /// What preflight found worth saying.
    pub findings: Vec<String>,
}

impl Report {
    /// An empty report.
    #[must_use]
    pub fn new(hop: HopId, engine: &str) -> Self {
        Self {
            hop,
            outcome: Outcome::Unfinished,
            cause: None,
            engine: engine.to_owned(),
            phases: Vec::new(),
            rounds: Vec::new(),
            stall_ms_predicted: 0,
            owed: Vec::new(),
            probes: Vec::new(),
            findings: Vec::new(),
        }
    }

    /// Adds to a phase, which appears where it first began.
    pub fn add(&mut self, name: &str, seconds: f64, bytes: u64) {
        match self.phases.iter_mut().find(|phase| phase.name == name) {
            Some(phase) => {
                phase.seconds += seconds;
                phase.bytes += bytes;
            }
            None => self.phases.push(PhaseReport {
                name: name.to_owned(),
                seconds,
                bytes,
            }),
        }
    }
}

/// One line of progress, as it happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "progress", rename_all = "snake_case")]
pub enum Progress {
    /// A phase began.
    Began {
        /// The phase, or the undo.
        name: String,
        /// Where the hop stands.
        phase: Phase,
    },
    /// Bytes are crossing.
    Moving {
        /// The phase.
        name: String,
        /// Bytes of content done.
        done: u64,
        /// Bytes of content in all, as far as known.
        total: u64,
    },
    /// A phase ended.
    Ended {
        /// The phase, or the undo.
        name: String,
        /// How long it took.
        seconds: f64,
        /// Bytes that crossed the link.
        bytes: u64,
        /// Why it failed, if it did.
        failure: Option<String>,
    },
}
