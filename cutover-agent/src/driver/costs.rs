//! What hops of these hosts cost beyond their bytes: remembered from one hop to the next, so that the stop rule knows.
//! Losing it costs a worse prediction, and nothing else.

use std::path::Path;

use cutover_protocol::hop::Costs;

use crate::durable;
use crate::report::Report;

/// The file below an agent's state folder.
const FILE: &str = "costs.json";

/// Shorter times say more about the clock than about a rate, in milliseconds.
const TELLING_MS: u64 = 20;

/// What is known.
pub(super) fn read(state_dir: &Path) -> Costs {
    durable::read_json(&state_dir.join(FILE)).unwrap_or_default()
}

/// Takes in what a committed hop cost.
pub(super) fn learn(state_dir: &Path, known: Costs, report: &Report) {
    let learned = known.learn(seen(known, report));
    let path = state_dir.join(FILE);
    if let Err(error) = durable::write_json(&path, &learned) {
        tracing::warn!("cannot keep {}: {error}", path.display());
    }
}

/// What one hop cost; where it says nothing, what was known.
fn seen(known: Costs, report: &Report) -> Costs {
    let memory = &report.memory;
    let phase_ms = |name: &str| {
        let found = report.phases.iter().find(|phase| phase.name == name);
        found.map_or(0, |phase| (phase.seconds * 1e3) as u64)
    };
    let rate = |milliseconds: u64, otherwise: u64| {
        if memory.dumped_bytes == 0 || milliseconds < TELLING_MS {
            otherwise
        } else {
            memory.dumped_bytes.saturating_mul(1000) / milliseconds
        }
    };
    if memory.dumped_bytes == 0 {
        return known;
    }
    let wire_ms = (memory.freeze_bytes as f64 / memory.link.bytes_per_second.max(1.0) * 1e3) as u64;
    Costs {
        freeze_ms: phase_ms("Checkpoint")
            .saturating_sub(memory.dump_ms)
            .saturating_sub(wire_ms),
        dump_bytes_per_second: rate(memory.dump_ms, known.dump_bytes_per_second),
        restore_ms: phase_ms("Restore").saturating_sub(memory.restore_ms),
        restore_bytes_per_second: rate(memory.restore_ms, known.restore_bytes_per_second),
        redirect_ms: phase_ms("Verify") + phase_ms("Commit") + phase_ms("Redirect"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_what_was_dumped_and_how_long_it_took() {
        let mut report = Report::new("hop-1".parse().unwrap(), "criu");
        report.memory.dumped_bytes = 100_000_000;
        report.memory.dump_ms = 200;
        report.memory.restore_ms = 10;
        report.add("Checkpoint", 0.3, 0);
        let seen = seen(Costs::default(), &report);
        assert_eq!(seen.dump_bytes_per_second, 500_000_000);
        assert_eq!(seen.freeze_ms, 100);
        let known = Costs::default().restore_bytes_per_second;
        assert_eq!(seen.restore_bytes_per_second, known);
    }

    #[test]
    fn what_was_learned_is_there_for_the_next_hop() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), Costs::default());
        let mut report = Report::new("hop-1".parse().unwrap(), "criu");
        report.memory.dumped_bytes = 1;
        report.add("Redirect", 1.0, 0);
        learn(folder.path(), Costs::default(), &report);
        assert_eq!(read(folder.path()).redirect_ms, 300 / 2 + 1000 / 2);
    }
}
