//! What a run hands back: a short table for a person and the same as JSON for a program.

use std::fmt::Write as _;

use cutover_agent::report::Slowed;
use serde::{Deserialize, Serialize};

use crate::lab::app::App;
use crate::lab::link::Measured;
use crate::lab::tunnel::{Fare, Tunnel};
use crate::lab::writes::Slowing;
use crate::verdict::Verdict;

/// One phase of a hop, as the agent reports it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name; undo steps begin with `Undo`.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
    /// Bytes it sent to the other site.
    #[serde(default)]
    pub bytes: u64,
}

/// One pre-copy round of one container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Which container.
    #[serde(default)]
    pub container: String,
    /// Pages of memory that were written to since the round before, as far as known.
    pub pages: u64,
    /// Bytes that crossed the link for them.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// What became of memory in one hop.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// How changed pages were found: `soft-dirty`, `content` or `none`.
    pub tracking: String,
    /// Bytes CRIU dumped into a page server while everything was frozen.
    pub dumped_bytes: u64,
    /// Of those, bytes of pages the target did not have.
    pub dirty_bytes: u64,
    /// Bytes that crossed the link for them, and for CRIU's other images, meanwhile.
    pub freeze_bytes: u64,
    /// Rounds that the source was slowed down in.
    pub slowed: Vec<Slowed>,
}

/// The agent's own report of one hop.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HopReport {
    /// The name of the hop.
    #[serde(default)]
    pub hop: String,
    /// `committed`, `undone` or `unfinished`.
    #[serde(default)]
    pub outcome: String,
    /// Why it was not committed.
    #[serde(default)]
    pub cause: Option<String>,
    /// Its phases in order.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Its pre-copy rounds.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// What became of memory.
    #[serde(default)]
    pub memory: Memory,
    /// The stall the agent predicted, in milliseconds.
    #[serde(default)]
    pub stall_ms_predicted: Option<f64>,
}

/// What happened to the database connections the web container keeps open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// Same connections, no insert missing, the open transaction committed.
    Survived,
    /// They were opened anew, or an insert is missing.
    Broken,
    /// The application has none, or the engine restarts it.
    NotApplicable,
}

/// A connection from outside that was open across the hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Which, for a person.
    pub what: String,
    /// Its fate.
    pub kept: Kept,
}

/// Everything about one run of the lab.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The comparison of what clients were told and what is stored.
    pub verdict: Verdict,
    /// The longest a client waited for an answer, in milliseconds.
    pub stall_ms_max: u64,
    /// How long the gate held, in milliseconds.
    pub hold_ms: u64,
    /// The phases of the last hop.
    pub phases: Vec<Phase>,
    /// Its pre-copy rounds.
    pub rounds: Vec<Round>,
    /// `criu` or `restart`.
    pub engine: String,
    /// `host` or `guest`.
    #[serde(rename = "where")]
    pub place: String,
    /// The application.
    pub app: App,
    /// How many clients.
    pub clients: usize,
    /// Whether the last hop was committed.
    pub committed: bool,
    /// Who serves, by the proxy's register and by what runs: `source`, `target`, `both` or `none`.
    pub serving: String,
    /// Why the hop was not committed.
    pub cause: Option<String>,
    /// The phase or the process that was made to fail.
    pub fault: Option<String>,
    /// Ids sent while the gate held, and acknowledged in the end.
    pub ids_while_holding: usize,
    /// What the proxy did with writes.
    pub writes: Slowing,
    /// Requests the proxy held.
    pub requests_held: u64,
    /// The fate of the web container's database connections.
    pub database_connection: Kept,
    /// The same for programs that want yes or no; nothing where it does not apply.
    pub database_connection_survived: Option<bool>,
    /// Whether every byte of the counter's memory is right; nothing for other applications.
    pub memory_intact: Option<bool>,
    /// What the link gave.
    pub link: Measured,
    /// The fate of connections from outside that were open across the hop.
    pub carried_connections: Vec<Carried>,
    /// Whether a client that still goes to the source's address is served; nothing without a tunnel.
    pub late_clients_served: Option<bool>,
    /// How the source's end of the tunnel fares after the last hop, if it has one.
    pub tunnel: Option<Fare>,
    /// Outcome of each hop of the run, in order.
    pub hops: Vec<HopReport>,
    /// What the run demanded and did not get; empty for a run that is green.
    pub demands_unmet: Vec<String>,
}

impl Report {
    /// Whether the source's end is of this kind, was greeted, and carried what the hop moved.
    #[must_use]
    pub fn went_through_tunnel(&self, kind: Tunnel) -> bool {
        let moved: u64 = self.phases.iter().map(|phase| phase.bytes).sum();
        self.tunnel.as_ref().is_some_and(|fare| {
            fare.kind == kind.as_str() && fare.handshake_age_s.is_some() && fare.bytes_sent >= moved
        })
    }

    /// Whether the run is green.
    #[must_use]
    pub fn is_green(&self) -> bool {
        self.demands_unmet.is_empty()
    }

    /// Whether every connection from outside that was open across the hop went on.
    #[must_use]
    pub fn all_carried(&self) -> bool {
        let mut carried = self.carried_connections.iter();
        carried.all(|carried| carried.kept == Kept::Survived)
    }

    /// The table for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_table(&mut text);
        text
    }

    fn write_table(&self, text: &mut String) -> std::fmt::Result {
        self.write_phases(text)?;
        self.write_verdict(text)?;
        self.write_tunnel(text)?;
        match self.database_connection {
            Kept::Survived => {
                writeln!(
                    text,
                    "  database connections moved with the web container; its open transaction committed"
                )?;
            }
            Kept::Broken => writeln!(
                text,
                "  database connections of the web container did not survive"
            )?,
            Kept::NotApplicable => {}
        }
        if let Some(hop) = self.hops.last().filter(|hop| hop.memory.dumped_bytes > 0) {
            let memory = &hop.memory;
            let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            writeln!(
                text,
                "  memory by {}: {:.1} MiB crossed while frozen, {:.1} % of the {:.1} MiB dumped",
                memory.tracking,
                mebibytes(memory.freeze_bytes),
                memory.freeze_bytes as f64 * 100.0 / memory.dumped_bytes as f64,
                mebibytes(memory.dumped_bytes)
            )?;
        }
        if !self.writes.rounds.is_empty() {
            let Slowing {
                rounds,
                delayed,
                delayed_after,
                ..
            } = &self.writes;
            writeln!(
                text,
                "  writes slowed down in rounds {rounds:?}: {delayed} delayed, {delayed_after} after the hop"
            )?;
        }
        if let Some(intact) = self.memory_intact {
            let found = if intact {
                "every byte is right"
            } else {
                "DAMAGED"
            };
            writeln!(text, "  memory pattern: {found}")?;
        }
        let outcome = if self.committed {
            "committed"
        } else {
            "not committed"
        };
        writeln!(text, "  {outcome} · serving: {}", self.serving)?;
        if let Some(cause) = &self.cause {
            writeln!(text, "  cause: {cause}")?;
        }
        for line in self.verdict.suspects.iter().chain(&self.verdict.failures) {
            writeln!(text, "  {line}")?;
        }
        match self.demands_unmet.as_slice() {
            [] => writeln!(text, "  verdict: ok"),
            unmet => writeln!(text, "  verdict: NOT OK: not so: {}", unmet.join("; ")),
        }
    }

    fn write_tunnel(&self, text: &mut String) -> std::fmt::Result {
        if let Some(fare) = &self.tunnel {
            writeln!(
                text,
                "  tunnel {} ({}): MTU {}, {} bytes sent, {} received",
                fare.kind,
                fare.carrier,
                fare.mtu,
                grouped(fare.bytes_sent),
                grouped(fare.bytes_received)
            )?;
        }
        for Carried { what, kept } in &self.carried_connections {
            let word = match kept {
                Kept::Survived => "went on",
                Kept::Broken | Kept::NotApplicable => "DID NOT SURVIVE",
            };
            writeln!(text, "  from outside: {what}: {word}")?;
        }
        if let Some(served) = self.late_clients_served {
            let word = if served { "served" } else { "NOT SERVED" };
            writeln!(text, "  late clients at the source's address: {word}")?;
        }
        Ok(())
    }

    fn write_phases(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n  phase          seconds         bytes")?;
        for phase in &self.phases {
            let bytes = grouped(phase.bytes);
            writeln!(
                text,
                "  {:<12} {:>9.3} {bytes:>13}",
                phase.name, phase.seconds
            )?;
        }
        for (index, round) in self.rounds.iter().enumerate() {
            let (number, pages, bytes) = (index + 1, grouped(round.pages), grouped(round.bytes));
            let (container, seconds) = (&round.container, round.seconds);
            writeln!(
                text,
                "  round {number} of {container}: {pages} pages, {bytes} bytes, {seconds:.3} s"
            )?;
        }
        Ok(())
    }

    fn write_verdict(&self, text: &mut String) -> std::fmt::Result {
        let Self {
            verdict,
            link,
            engine,
            place,
            clients,
            stall_ms_max,
            hold_ms,
            ids_while_holding,
            ..
        } = self;
        let Verdict {
            sent,
            answered,
            failed,
            lost,
            doubled,
            ids_acknowledged,
            ..
        } = verdict;
        let at = if place == "guest" { "in" } else { "on" };
        writeln!(text, "\n  {link}")?;
        writeln!(
            text,
            "  {} · engine {engine} · {at} the {place} · {clients} clients",
            self.app.as_str()
        )?;
        writeln!(
            text,
            "  longest stall {stall_ms_max} ms · gate held {hold_ms} ms · {ids_while_holding} ids sent meanwhile"
        )?;
        writeln!(
            text,
            "  sent {sent} · answered {answered} · failed {failed} · lost {lost} · doubled {doubled}"
        )?;
        writeln!(text, "  {ids_acknowledged} ids acknowledged")
    }
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn large_numbers_are_grouped_by_thousands() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1 000", "1 234 567"]
        );
    }
}
