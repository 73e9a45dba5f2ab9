//! How much of an application's memory its clients' writes change, and what the proxy did with them in a hop.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::lab::app::{App, ContainerKind};
use crate::lab::watch::Seen;
use crate::report::HopReport;

/// What the writes of clients do to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Writes {
    /// What they do to any application: a few pages.
    Few,
    /// Each changes so much of a counter's memory that rounds over a slow link never end, and the plan lets them be slowed
    /// down.
    OutrunLink,
}

/// A counter whose memory is written by its clients alone. 50 of them send about 200 ids a second, which is 65 MB where
/// 200 Mbit/s carry 25. All of its memory is written to in a round, also when half of the ids are taken away or the machine
/// is busy: so every round is as long as the one before, and the proxy is told to slow down further. It is small, so that
/// none is long.
const OUTRUNNING: [&str; 6] = [
    "--memory-mb",
    "8",
    "--write-mb-s",
    "0",
    "--write-kb-id",
    "320",
];

const LINKED: [&str; 2] = ["--linked", "/data/linked"];

/// What the plans of `configs/` say, and what is said in its place. The stall is below the fixed cost of a switch: rounds
/// go on for as long as they shrink or something can be slowed down further.
const PLAN: [(&str, &str); 2] = [
    (
        "rounds_max = 4",
        "rounds_max = 5\nthrottle_percent_max = 80",
    ),
    ("stall_ms_max = 2000", "stall_ms_max = 500"),
];

impl Writes {
    /// What the containers of an application are told.
    #[must_use]
    pub fn arguments(self, app: App) -> Vec<(ContainerKind, Vec<String>)> {
        let counters = app.containers().iter().filter(|kind| kind.is_counter());
        match self {
            // Of several, one has a file open for which CRIU makes a name while it dumps.
            Self::Few => counters
                .skip(1)
                .take(1)
                .map(|kind| (*kind, LINKED.map(str::to_owned).to_vec()))
                .collect(),
            Self::OutrunLink => counters
                .map(|kind| (*kind, OUTRUNNING.map(str::to_owned).to_vec()))
                .collect(),
        }
    }

    /// The plan for them.
    #[must_use]
    pub fn adapt(self, plan: String) -> String {
        match self {
            Self::Few => plan,
            Self::OutrunLink => PLAN
                .iter()
                .fold(plan, |plan, (usual, other)| plan.replace(usual, other)),
        }
    }
}

/// What the proxy did with the writes of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slowing {
    /// Rounds that it delayed writes in.
    pub rounds: Vec<u32>,
    /// Writes that it delayed, until the last hold ended.
    pub delayed: u64,
    /// Writes that it delayed after that.
    pub delayed_after: u64,
    /// Writes that it admitted after that.
    pub admitted_after: u64,
    /// Whether something limits them still.
    pub is_limited: bool,
}

impl Slowing {
    /// By what the last hop reports, and what was seen of the gate.
    #[must_use]
    pub fn of(hop: &HopReport, seen: &Seen) -> Self {
        let slowed = hop.memory.slowed.iter();
        let rounds = slowed.filter(|slowed| !slowed.writes.is_empty());
        let last = seen.last.as_ref().map(|status| status.writes.clone());
        let (last, before) = (last.unwrap_or_default(), &seen.writes_until_open);
        Self {
            rounds: rounds.map(|slowed| slowed.round).collect(),
            delayed: before.delayed,
            delayed_after: last.delayed.saturating_sub(before.delayed),
            admitted_after: last.admitted.saturating_sub(before.admitted),
            is_limited: last.limit.is_some(),
        }
    }

    /// Whether writes were slowed down, and are free again.
    ///
    /// # Errors
    /// What is not so.
    pub fn came_and_went(&self) -> Result<(), String> {
        let said = match self {
            Self { rounds, .. } if rounds.is_empty() => "no round slowed writes down",
            Self { delayed: 0, .. } => "no write was delayed",
            Self {
                is_limited: true, ..
            } => "writes are limited still",
            Self {
                admitted_after: 0, ..
            } => "no write came after the hop",
            Self {
                delayed_after: 0, ..
            } => return Ok(()),
            _ => "writes were delayed after the hop",
        };
        Err(format!("{said}: {self:?}"))
    }
}
