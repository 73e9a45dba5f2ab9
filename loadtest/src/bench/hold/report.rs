//! What a person and a program read of the hold's benchmark.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use crate::bench::hold::judge::Tally;

/// One system in one case. Keys that a case does not measure are null.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// `hopgate` or `published`.
    pub system: &'static str,
    /// The case, with a protocol behind it where it has several rows.
    pub case: String,
    /// Connections.
    pub clients: usize,
    /// Requests.
    pub sent: usize,
    /// Those with a complete answer, whatever its status.
    pub answered: usize,
    /// Acknowledged and never executed.
    pub lost: usize,
    /// Executed more than once.
    pub doubled: usize,
    /// Without a complete answer of a good status.
    pub failed: usize,
    /// Executed before an earlier one, see [`Tally::overtaken`].
    pub overtaken: usize,
    /// Growth of the proxy's resident memory while it holds, for each held request.
    pub bytes_per_held: Option<f64>,
    /// From the release to the last answer of a held request.
    pub release_seconds: Option<f64>,
    /// From the release to the answers of the held, the median.
    pub stall_beyond_freeze_ms_p50: Option<f64>,
    /// 99 of 100.
    pub stall_beyond_freeze_ms_p99: Option<f64>,
    /// Requests that were held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<usize>,
    /// Those of the overtaken that came after the release; the others are streams of an HTTP/2 connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overtaken_by_newcomers: Option<usize>,
    /// Most requests the target had at once, from the release on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_concurrency: Option<usize>,
    /// Longest from the clients' leaving until nothing was held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots_back_seconds: Option<f64>,
    /// Held requests whose connection died with the proxy's process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<usize>,
    /// Executed though their clients had left, or never sent.
    #[serde(skip_serializing_if = "is_zero")]
    pub unknown: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks like this")]
const fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Row {
    /// Of what was counted.
    #[must_use]
    pub fn of(system: &'static str, case: &str, clients: usize, tally: &Tally) -> Self {
        let verdict = &tally.verdict;
        Self {
            system,
            case: case.to_owned(),
            clients,
            sent: verdict.sent,
            answered: verdict.answered,
            lost: verdict.lost,
            doubled: verdict.doubled,
            failed: verdict.failed,
            overtaken: tally.overtaken,
            unknown: verdict.unknown,
            held: Some(tally.held),
            overtaken_by_newcomers: Some(tally.newcomers),
            release_seconds: tally.release.map(|time| time.as_secs_f64()),
            stall_beyond_freeze_ms_p50: tally.stall_p50.map(milliseconds),
            stall_beyond_freeze_ms_p99: tally.stall_p99.map(milliseconds),
            ..Self::default()
        }
    }

    /// Whether each of its requests was executed exactly once and answered.
    #[must_use]
    pub const fn is_exact(&self) -> bool {
        self.sent > 0 && self.lost + self.doubled + self.failed + self.unknown == 0
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A bar of a case, judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// What is demanded, with what was found.
    pub demand: String,
    /// Whether it is so.
    pub is_met: bool,
}

impl Mark {
    /// A demand and whether it is met.
    #[must_use]
    pub fn new(demand: impl Into<String>, is_met: bool) -> Self {
        Self {
            demand: demand.into(),
            is_met,
        }
    }

    /// Exactly once.
    #[must_use]
    pub fn exact(row: &Row) -> Self {
        Self::new("lost = doubled = failed = 0", row.is_exact())
    }

    /// In order: an origin that is not at its limit sees nobody before whoever came earlier.
    #[must_use]
    pub fn in_order(row: &Row) -> Self {
        Self::new("overtaken = 0", row.overtaken == 0)
    }

    /// A figure and the most it may be; a figure that is missing is too much.
    #[must_use]
    pub fn at_most(what: &str, found: Option<f64>, most: f64, unit: &str) -> Self {
        let is_met = found.is_some_and(|found| found <= most);
        let found = found.map_or_else(|| "nothing".into(), |found| format!("{found:.3}"));
        Self::new(format!("{what} <= {most:.3} {unit} ({found})"), is_met)
    }
}

/// What came of a case.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Played {
    /// A line for each system and kind.
    pub rows: Vec<Row>,
    /// Its bars.
    pub marks: Vec<Mark>,
    /// Some of what went wrong, as the clients and the lab saw it.
    pub faults: Vec<String>,
}

/// A case with what came of it, or why it could not be played.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseReport {
    /// The case.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// What came of it.
    pub played: Result<Played, String>,
}

/// All cases of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// In the order they ran.
    pub cases: Vec<CaseReport>,
}

const HEAD: &str = "  system     case              clients     sent answered   lost doubled failed overtaken  bytes/held  release s  p50 ms beyond  p99 ms beyond";

impl CaseReport {
    /// The case's part of the table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("\n{}: {}\n", self.name, self.title);
        // Writing into a string cannot fail.
        let played = match &self.played {
            Ok(played) => played,
            Err(why) => {
                let _ = writeln!(text, "  could not be played: {why}");
                return text;
            }
        };
        let _ = writeln!(text, "{HEAD}");
        for row in &played.rows {
            let _ = writeln!(text, "{}", line(row));
        }
        for mark in &played.marks {
            let word = if mark.is_met { "met   " } else { "MISSED" };
            let _ = writeln!(text, "  {word}  {}", mark.demand);
        }
        for fault in &played.faults {
            let _ = writeln!(text, "  seen: {fault}");
        }
        text
    }
}

fn line(row: &Row) -> String {
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let mut line = format!(
        "  {:<10} {:<17} {:>7} {:>8} {:>8} {:>6} {:>7} {:>6} {:>9} {:>11} {:>10} {:>14} {:>14}",
        row.system,
        row.case,
        row.clients,
        row.sent,
        row.answered,
        row.lost,
        row.doubled,
        row.failed,
        row.overtaken,
        number(row.bytes_per_held, 0),
        number(row.release_seconds, 3),
        number(row.stall_beyond_freeze_ms_p50, 1),
        number(row.stall_beyond_freeze_ms_p99, 1),
    );
    // Writing into a string cannot fail.
    if let Some(newcomers) = row.overtaken_by_newcomers.filter(|_| row.overtaken > 0) {
        let _ = write!(line, "  overtaken by newcomers {newcomers}");
    }
    if let Some(peak) = row.peak_concurrency {
        let _ = write!(line, "  at once {peak}");
    }
    if let Some(seconds) = row.slots_back_seconds {
        let _ = write!(line, "  slots back in {seconds:.3} s");
    }
    if let Some(cut) = row.cut {
        let _ = write!(line, "  cut {cut}");
    }
    if row.unknown > 0 {
        let _ = write!(line, "  executed though left {}", row.unknown);
    }
    line
}

impl Report {
    /// The list of rows for programs.
    ///
    /// # Errors
    /// Never in practice: the rows hold plain numbers and texts.
    pub fn json(&self) -> serde_json::Result<String> {
        let played = self
            .cases
            .iter()
            .filter_map(|case| case.played.as_ref().ok());
        let rows: Vec<&Row> = played.flat_map(|played| &played.rows).collect();
        Ok(serde_json::to_string_pretty(&rows)? + "\n")
    }

    /// Whether every case was played and Hopgate lost, doubled and failed nothing.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.cases.iter().all(|case| {
            case.played.as_ref().is_ok_and(|played| {
                let mut own = played.rows.iter().filter(|row| row.system == "hopgate");
                own.all(Row::is_exact)
            })
        })
    }

    /// Whether every bar is met.
    #[must_use]
    pub fn meets_all(&self) -> bool {
        self.missed().is_empty() && self.cases.iter().all(|case| case.played.is_ok())
    }

    fn marks(&self) -> impl Iterator<Item = (&'static str, &Mark)> {
        self.cases.iter().flat_map(|case| {
            let marks = case.played.iter().flat_map(|played| &played.marks);
            marks.map(|mark| (case.name, mark))
        })
    }

    fn missed(&self) -> Vec<&'static str> {
        let missed = self.marks().filter(|(_, mark)| !mark.is_met);
        missed.map(|(name, _)| name).collect()
    }

    /// One line on all bars.
    #[must_use]
    pub fn summary(&self) -> String {
        let (all, missed) = (self.marks().count(), self.missed());
        let unplayed = self.cases.iter().filter(|case| case.played.is_err());
        let unplayed: Vec<&str> = unplayed.map(|case| case.name).collect();
        let named = |what: &str, names: &[&str]| match names {
            [] => String::new(),
            _ => format!(" · {} {what}: {}", names.len(), names.join(", ")),
        };
        format!(
            "bars: {} met{}{}",
            all - missed.len(),
            named("missed", &missed),
            named("not played", &unplayed)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lost: usize) -> Report {
        let row = Row {
            system: "hopgate",
            case: "clear".into(),
            clients: 10,
            sent: 10,
            answered: 10,
            lost,
            bytes_per_held: Some(5000.4),
            ..Row::default()
        };
        let marks = vec![
            Mark::exact(&row),
            Mark::at_most("memory", row.bytes_per_held, 6144.0, "bytes"),
        ];
        let played = Played {
            rows: vec![row],
            marks,
            faults: Vec::new(),
        };
        Report {
            cases: vec![CaseReport {
                name: "clear",
                title: "a title",
                played: Ok(played),
            }],
        }
    }

    #[test]
    fn json_is_a_list_of_rows_with_null_where_nothing_was_measured() {
        let rows: serde_json::Value = serde_json::from_str(&report(0).json().unwrap()).unwrap();
        assert_eq!(
            rows,
            serde_json::json!([{
                "system": "hopgate", "case": "clear", "clients": 10, "sent": 10, "answered": 10, "lost": 0,
                "doubled": 0, "failed": 0, "overtaken": 0, "bytes_per_held": 5000.4, "release_seconds": null,
                "stall_beyond_freeze_ms_p50": null, "stall_beyond_freeze_ms_p99": null
            }])
        );
    }

    #[test]
    fn one_lost_request_is_marked_and_makes_the_run_red() {
        let (good, bad) = (report(0), report(1));
        assert!(good.is_clean() && good.meets_all());
        assert_eq!(good.summary(), "bars: 2 met");
        assert!(!bad.is_clean() && !bad.meets_all());
        assert_eq!(bad.summary(), "bars: 1 met · 1 missed: clear");
        let text = bad.cases[0].table();
        assert!(text.contains("MISSED  lost = doubled"), "{text}");
        assert!(
            text.contains("met     memory <= 6144.000 bytes (5000.400)"),
            "{text}"
        );
    }

    #[test]
    fn a_case_that_could_not_be_played_is_no_success() {
        let report = Report {
            cases: vec![CaseReport {
                name: "clear",
                title: "a title",
                played: Err("no proxy".into()),
            }],
        };
        assert!(!report.is_clean() && !report.meets_all());
        assert_eq!(report.summary(), "bars: 0 met · 1 not played: clear");
    }
}
