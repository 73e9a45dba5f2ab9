//! Rows of the freeze benchmark, and the bars each is held against. Pure.

use serde::{Deserialize, Serialize};

use super::case::{Case, Mode};
use crate::bench::figures::median;

/// Bytes beyond pages that a freeze may cost: CRIU's other images, heads and seals.
const FREEZE_SPARE_BYTES: f64 = 65_536.0;
/// What digests and heads may add to pages.
const FREEZE_FACTOR: f64 = 1.03;
/// What the wire may cost beyond its bytes.
const WIRE_FACTOR: f64 = 1.25;
/// What an agent may have in memory, whatever it moves.
const AGENT_BYTES_MAX: u64 = 256 << 20;
/// How far apart a gang may arrive, in percent.
const GANG_SPREAD_PERCENT: f64 = 3.0;

/// The agent's report, as far as this benchmark reads it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Freeze {
    /// Why it was not committed.
    pub cause: Option<String>,
    phases: Vec<Phase>,
    rounds: Vec<serde_json::Value>,
    memory: Memory,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Phase {
    name: String,
    seconds: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Memory {
    dumped_bytes: u64,
    dirty_bytes: u64,
    freeze_bytes: u64,
    dump_ms: u64,
    restore_ms: u64,
    round_ms: u64,
    round_spread_percent: Option<f64>,
    freeze_spread_percent: Option<f64>,
    link: Link,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Link {
    rtt_ms: f64,
    bytes_per_second: f64,
}

/// What the limit of the frozen time is made of, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes over the measured link, with the allowance.
    pub wire_ms: f64,
    /// Two round trips.
    pub round_trips_ms: f64,
    /// CRIU's own dump.
    pub dump_ms: f64,
    /// CRIU's own restore.
    pub restore_ms: f64,
}

impl Limit {
    /// All of it.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.wire_ms + self.round_trips_ms + self.dump_ms + self.restore_ms
    }
}

/// One case, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// How changes were found.
    pub mode: Mode,
    /// In which order containers used the link.
    pub schedule: String,
    /// Containers.
    pub containers: usize,
    /// Memory of all of them.
    pub memory_mb: u32,
    /// Their writes.
    pub write_mb_s: u32,
    /// Rounds before the freeze.
    pub rounds: usize,
    /// Bytes CRIU dumped while they were frozen.
    pub dumped_bytes: u64,
    /// Bytes that crossed for memory and images while they were frozen.
    pub freeze_bytes: u64,
    /// Bytes of pages that the target lacked at the freeze.
    pub dirty_bytes: u64,
    /// From the dump's beginning to the restored tasks' being ready to run.
    pub frozen_ms: f64,
    /// What that may be, by this run's own terms.
    pub limit_ms: f64,
    /// The terms.
    pub limit: Limit,
    /// Bytes a second of the link, as the agents measured it.
    pub link_bytes_per_s: f64,
    /// How far apart the containers' memory had arrived: in the first round, or in the dump where there is none.
    pub finish_spread_percent: f64,
    /// How long that took.
    pub transfer_ms: f64,
    /// All rounds, the dump and the last transfer: until the target had everything.
    pub total_ms: f64,
    /// The most memory the agents of source and target ever had.
    pub agent_peak_bytes: [u64; 2],
}

impl Row {
    /// The row of a case from the agent's report.
    #[must_use]
    pub fn of(case: &Case, report: &Freeze) -> Self {
        let memory = &report.memory;
        let of = |name: &str| {
            let found = report.phases.iter().find(|phase| phase.name == name);
            found.map_or(0.0, |phase| phase.seconds * 1e3)
        };
        let rate = memory.link.bytes_per_second.max(1.0);
        let limit = Limit {
            wire_ms: WIRE_FACTOR * memory.freeze_bytes as f64 / rate * 1e3,
            round_trips_ms: 2.0 * memory.link.rtt_ms,
            dump_ms: memory.dump_ms as f64,
            restore_ms: memory.restore_ms as f64,
        };
        let in_rounds = memory.round_spread_percent;
        Self {
            mode: case.mode,
            schedule: case.schedule.to_owned(),
            containers: case.counters.len(),
            memory_mb: case.memory_mb(),
            write_mb_s: case.write_mb_s(),
            rounds: report.rounds.len(),
            dumped_bytes: memory.dumped_bytes,
            freeze_bytes: memory.freeze_bytes,
            dirty_bytes: memory.dirty_bytes,
            frozen_ms: of("Checkpoint") + of("Transfer") + of("Restore"),
            limit_ms: limit.total_ms(),
            limit,
            link_bytes_per_s: memory.link.bytes_per_second,
            finish_spread_percent: in_rounds.or(memory.freeze_spread_percent).unwrap_or(0.0),
            transfer_ms: match in_rounds {
                Some(_) => memory.round_ms as f64,
                None => of("Checkpoint") + of("Transfer"),
            },
            total_ms: of("PreCopy") + of("Checkpoint") + of("Transfer"),
            agent_peak_bytes: [0; 2],
        }
    }

    /// The bars of this row by itself: whether each is met, and what it demands.
    #[must_use]
    pub fn bars(&self) -> Vec<(bool, String)> {
        let allowed = self.dirty_bytes as f64 * FREEZE_FACTOR + FREEZE_SPARE_BYTES;
        let mut bars = vec![
            (
                self.freeze_bytes as f64 <= allowed,
                format!(
                    "freeze bytes {} <= {allowed:.0} (dirty {} x {FREEZE_FACTOR} + 64 KiB)",
                    self.freeze_bytes, self.dirty_bytes
                ),
            ),
            (
                self.frozen_ms <= self.limit_ms,
                format!(
                    "frozen {:.0} ms <= {:.0} ms = wire {:.0} + round trips {:.0} + dump {:.0} + restore {:.0}",
                    self.frozen_ms,
                    self.limit_ms,
                    self.limit.wire_ms,
                    self.limit.round_trips_ms,
                    self.limit.dump_ms,
                    self.limit.restore_ms
                ),
            ),
        ];
        let peak = self.agent_peak_bytes.iter().max().copied().unwrap_or(0);
        bars.push((
            peak <= AGENT_BYTES_MAX,
            format!(
                "agents' memory {} <= {} MiB",
                peak >> 20,
                AGENT_BYTES_MAX >> 20
            ),
        ));
        if self.containers > 1 && self.schedule == "gang" {
            bars.push((
                self.finish_spread_percent <= GANG_SPREAD_PERCENT,
                format!(
                    "gang within {:.1} % <= {GANG_SPREAD_PERCENT} % of one finish",
                    self.finish_spread_percent
                ),
            ));
        }
        bars
    }

    /// The row and its bars as lines for a person.
    #[must_use]
    pub fn lines(&self) -> String {
        let mut lines = format!(
            "{:<10} {:<10} {:>4} MiB {:>3} MiB/s {} rounds  {:>10} B frozen of {:>10} dumped  {:>6.0} ms frozen  spread {:>5.1} % in {:.0} ms  {:.0} ms in all\n",
            self.mode.to_string(),
            self.schedule,
            self.memory_mb,
            self.write_mb_s,
            self.rounds,
            self.freeze_bytes,
            self.dumped_bytes,
            self.frozen_ms,
            self.finish_spread_percent,
            self.transfer_ms,
            self.total_ms,
        );
        for (is_met, demand) in self.bars() {
            let word = if is_met { "met   " } else { "MISSED" };
            lines.push_str(&format!("  {word} {demand}\n"));
        }
        lines
    }
}

/// Whether the gang took no longer in all than the unscheduled runs of the same containers, by the medians of each, for
/// each mode that has both.
#[must_use]
pub fn totals(rows: &[Row]) -> Vec<(bool, String)> {
    let total_ms = |mode: Mode, schedule: &str| {
        let alike = rows
            .iter()
            .filter(|row| row.containers > 1 && row.mode == mode && row.schedule == schedule);
        median(alike.map(|row| row.total_ms))
    };
    [Mode::SoftDirty, Mode::Content, Mode::None]
        .into_iter()
        .filter_map(|mode| {
            let (gang, parallel) = (total_ms(mode, "gang")?, total_ms(mode, "parallel")?);
            Some((
                gang <= parallel,
                format!("{mode}: gang in {gang:.0} ms in all <= parallel in {parallel:.0} ms"),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::case::Counter;
    use super::*;

    fn row(freeze_bytes: u64, checkpoint_s: f64) -> Row {
        let case = Case {
            mode: Mode::Content,
            schedule: "gang",
            counters: vec![
                Counter {
                    memory_mb: 64,
                    write_mb_s: 1
                };
                2
            ],
        };
        let report = serde_json::json!({
            "phases": [{"name": "Checkpoint", "seconds": checkpoint_s, "bytes": 1}],
            "rounds": [{}],
            "memory": {
                "dirty_bytes": 1_000_000, "freeze_bytes": freeze_bytes, "dump_ms": 100, "restore_ms": 50,
                "round_spread_percent": 2.5, "round_ms": 900,
                "link": {"rtt_ms": 20.0, "bytes_per_second": 1e8},
            },
        });
        Row::of(&case, &serde_json::from_value(report).unwrap())
    }

    #[test]
    fn the_limit_is_made_of_the_runs_own_terms() {
        let row = row(1_000_000, 0.2);
        assert!((row.limit_ms - (12.5 + 40.0 + 100.0 + 50.0)).abs() < 1e-6);
        assert!(
            row.bars().iter().all(|(is_met, _)| *is_met),
            "{:?}",
            row.bars()
        );
    }

    #[test]
    fn all_of_it_is_rounds_dump_and_transfer() {
        let report = serde_json::json!({"phases": [
            {"name": "Tunnel", "seconds": 1.0}, {"name": "PreCopy", "seconds": 9.0}, {"name": "Hold", "seconds": 1.0},
            {"name": "Checkpoint", "seconds": 0.5}, {"name": "Transfer", "seconds": 0.25}, {"name": "Restore", "seconds": 1.0},
        ]});
        let case = &super::super::case::all(&[Mode::Content])[0];
        let row = Row::of(case, &serde_json::from_value(report).unwrap());
        assert!((row.total_ms - 9750.0).abs() < 1e-6);
    }

    #[test]
    fn a_gang_that_is_later_than_parallel_by_the_medians_is_missed() {
        let took = |schedule: &str, total_ms| Row {
            containers: 4,
            schedule: schedule.to_owned(),
            total_ms,
            ..row(0, 0.0)
        };
        let is_met = |gangs: &[f64]| {
            let gangs = gangs.iter().map(|total_ms| took("gang", *total_ms));
            totals(&gangs.chain([took("parallel", 8000.0)]).collect::<Vec<_>>())[0].0
        };
        assert!(is_met(&[7000.0]) && is_met(&[8000.0]) && !is_met(&[8001.0]));
        assert!(is_met(&[7000.0, 9000.0, 8000.0]) && !is_met(&[7000.0, 8001.0, 8001.0]));
        assert_eq!(totals(&[took("gang", 1.0), took("staircase", 1.0)]), []);
    }

    #[test]
    fn too_many_bytes_or_too_long_a_freeze_is_missed() {
        let missed = |row: &Row| row.bars().iter().filter(|(is_met, _)| !is_met).count();
        assert_eq!(missed(&row(1_095_537, 0.2)), 1);
        assert_eq!(missed(&row(1_000_000, 0.3)), 1);
    }
}
