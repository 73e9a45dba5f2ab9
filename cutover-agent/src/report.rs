//! What a hop did, for people and programs.

use std::fmt;

use cutover_protocol::hop::{Link, Phase, Round, Stall};
use cutover_protocol::id::{HopId, ServiceName};
use cutover_protocol::plan::Tracking;
use cutover_protocol::schedule::Schedule;
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

/// How the source was slowed down as of one memory round, because it wrote faster than the link carried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slowed {
    /// The round, counted from 1.
    pub round: u32,
    /// By how much, in percent.
    pub percent: u8,
    /// Services whose writes the proxy delays.
    pub writes: Vec<SlowedWrites>,
    /// Whether the containers' processor time is limited.
    pub processors: bool,
}

/// A service whose writes are delayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowedWrites {
    /// The service.
    pub service: ServiceName,
    /// From one write to the next, in microseconds.
    pub interval_us: u64,
}

impl fmt::Display for Slowed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            round,
            percent,
            writes,
            processors,
        } = self;
        write!(out, "round {round}: slowed down by {percent} %:")?;
        for SlowedWrites {
            service,
            interval_us,
        } in writes
        {
            write!(out, " {service} takes a write every {interval_us} us,")?;
        }
        out.write_str(if *processors {
            " processors are limited"
        } else {
            " processors are not limited"
        })
    }
}

/// What became of memory, all containers together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// How changed pages were found.
    pub tracking: Tracking,
    /// Bytes of memory that CRIU dumped while everything was frozen.
    pub dumped_bytes: u64,
    /// Of those, bytes of pages that the target did not have.
    pub dirty_bytes: u64,
    /// Bytes that crossed the link for them, and for CRIU's other images, while everything was frozen.
    pub freeze_bytes: u64,
    /// CRIU's own time for the dump that took longest, without its waits for the link, in milliseconds.
    pub dump_ms: u64,
    /// CRIU's own time for the restore that took longest, in milliseconds.
    pub restore_ms: u64,
    /// From the beginning of the first round until all its pages had arrived, in milliseconds.
    pub round_ms: u64,
    /// Round trip and bytes a second of the link, as measured before anything was sent.
    pub link: Link,
    /// In which order containers used the link.
    pub schedule: Schedule,
    /// How the source was slowed down, a step a round.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slowed: Vec<Slowed>,
    /// How far apart containers were done in the first round, as a share of its time, in percent.
    pub round_spread_percent: Option<f64>,
    /// How far apart they were done in the dump, as a share of its time, in percent.
    pub freeze_spread_percent: Option<f64>,
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
    /// What became of memory.
    #[serde(default)]
    pub memory: MemoryReport,
    /// The predicted stall when the hold began, in milliseconds.
    pub stall_ms_predicted: u64,
    /// What it was made of.
    #[serde(default)]
    pub stall_predicted: Stall,
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
            memory: MemoryReport::default(),
            stall_ms_predicted: 0,
            stall_predicted: Stall::default(),
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

/// How far the memory of one container has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moving {
    /// The container.
    pub container: String,
    /// Bytes looked at and, where needed, sent.
    pub done_bytes: u64,
    /// Bytes in all, as far as known.
    pub total_bytes: u64,
    /// Until its end at the rate so far, in seconds; nothing when it is done or has not begun.
    pub eta_seconds: Option<f64>,
}

/// How long the rest takes at the rate so far; nothing when there is no rate or no rest.
#[must_use]
pub fn eta_seconds(done: u64, total: u64, elapsed_seconds: f64) -> Option<f64> {
    (done > 0 && done < total).then(|| (total - done) as f64 * elapsed_seconds / done as f64)
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
        /// Content a second since this began.
        #[serde(default)]
        bytes_per_second: u64,
        /// Until the end at this rate, in seconds.
        #[serde(default)]
        eta_seconds: Option<f64>,
        /// Each container by itself, while memory moves.
        #[serde(default)]
        containers: Vec<Moving>,
    },
    /// The source is slowed down, or more so than before.
    Slowed {
        /// How.
        slowed: Slowed,
    },
    /// What the switch-over is expected to cost, by its terms.
    Predicted {
        /// The stall.
        stall: Stall,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_the_source_was_slowed_down_reads_like_a_sentence() {
        let mut slowed = Slowed {
            round: 4,
            percent: 20,
            writes: vec![SlowedWrites {
                service: "web".parse().unwrap(),
                interval_us: 12_500,
            }],
            processors: false,
        };
        assert_eq!(
            slowed.to_string(),
            "round 4: slowed down by 20 %: web takes a write every 12500 us, processors are not limited"
        );
        slowed.writes.clear();
        slowed.processors = true;
        assert_eq!(
            slowed.to_string(),
            "round 4: slowed down by 20 %: processors are limited"
        );
    }

    #[test]
    fn the_rest_takes_as_long_as_what_is_done_did() {
        assert_eq!(eta_seconds(50, 150, 2.0), Some(4.0));
        assert_eq!(eta_seconds(0, 150, 2.0), None);
        assert_eq!(eta_seconds(150, 150, 2.0), None);
    }
}
