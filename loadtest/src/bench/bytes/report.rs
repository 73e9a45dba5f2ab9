//! What a person and a program read of the bench, and its bars.

use std::fmt::Write;

use serde::Serialize;

/// Share of what iperf3 gets with eight streams that a first copy must reach.
const LINK_SHARE: f64 = 0.95;
/// How much faster 100,000 small files must be over a long round trip.
const SMALL_FILES_FACTOR: f64 = 2.0;
/// What a delta may move, as a multiple of the blocks that really changed.
const DELTA_FACTOR: f64 = 1.1;
/// What either end may have in memory, in bytes.
const MEMORY_BYTES_MAX: u64 = 256 << 20;

/// One figure of one system.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The data set; `stream` for iperf3.
    pub set: &'static str,
    /// The link as it was asked for.
    pub link: String,
    /// Who copied.
    pub system: &'static str,
    /// `first` or `delta`; `stream` for iperf3.
    pub copy: &'static str,
    /// How long it took.
    pub seconds: f64,
    /// Bytes that left the source over the link, headers and repetitions included.
    pub bytes_wire: u64,
    /// Bytes of the tree for a first copy, of blocks of 16 KiB that had changed for a delta; for iperf3 what arrived.
    pub bytes_data: u64,
    /// The most memory each end of ours ever had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes_max: Option<u64>,
}

/// All rows of one case, and what was wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseReport {
    /// `set@link`.
    pub name: String,
    /// What was measured.
    pub rows: Vec<Row>,
    /// Copies that were not equal, or failed.
    pub failures: Vec<String>,
}

/// One bar and how it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// In words, with figures.
    pub text: String,
    /// Whether it holds.
    pub is_met: bool,
}

impl CaseReport {
    fn row(&self, system: &str, copy: &str) -> Option<&Row> {
        let mut rows = self.rows.iter();
        rows.find(|row| row.system == system && row.copy == copy)
    }

    /// The bars of this case.
    #[must_use]
    pub fn bars(&self) -> Vec<Judgement> {
        let mut bars = Vec::new();
        for copy in ["first", "delta"] {
            let rivals = ["rsync -a", "rsync -az"].map(|system| self.row(system, copy));
            let best = rivals.into_iter().flatten().map(|row| row.seconds);
            let best = best.fold(f64::INFINITY, f64::min);
            if let Some(ours) = self.row("hopgate", copy).filter(|_| best.is_finite()) {
                let factor = if self.name == "small-files@100mbit" && copy == "first" {
                    SMALL_FILES_FACTOR
                } else {
                    1.0
                };
                let is_met = ours.seconds * factor <= best;
                let text = format!(
                    "{copy}: at least {factor:.0}x as fast as the better rsync ({:.2}x)",
                    best / ours.seconds
                );
                bars.push(Judgement { text, is_met });
            }
        }
        bars.extend(self.link_bar());
        if let Some(delta) = self
            .row("hopgate", "delta")
            .filter(|_| self.name.starts_with("mariadb"))
        {
            let factor = delta.bytes_wire as f64 / delta.bytes_data.max(1) as f64;
            bars.push(Judgement {
                text: format!(
                    "delta: at most {DELTA_FACTOR}x the changed blocks on the wire ({factor:.2}x)"
                ),
                is_met: factor <= DELTA_FACTOR,
            });
        }
        let memory = self
            .rows
            .iter()
            .filter_map(|row| row.memory_bytes_max)
            .max();
        bars.extend(memory.map(|memory| Judgement {
            text: format!(
                "memory of each end at most 256 MiB ({:.0} MiB)",
                memory as f64 / f64::from(1 << 20)
            ),
            is_met: memory <= MEMORY_BYTES_MAX,
        }));
        bars
    }

    /// Only where nothing can be compressed does a link's rate bound a copy.
    fn link_bar(&self) -> Option<Judgement> {
        if self.name != "noise@800mbit" {
            return None;
        }
        let (ours, eight) = (
            self.row("hopgate", "first")?,
            self.row("iperf3 -P 8", "stream")?,
        );
        let rate = |row: &Row| row.bytes_data as f64 / row.seconds;
        let share = rate(ours) / rate(eight);
        Some(Judgement {
            text: format!(
                "first: at least {:.0} % of what eight iperf3 streams get ({:.1} %)",
                LINK_SHARE * 100.0,
                share * 100.0
            ),
            is_met: share >= LINK_SHARE,
        })
    }

    /// The case's part of the table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "\n{}\n  {:<12}{:<8}{:>9}{:>10}{:>11}{:>11}\n",
            self.name, "system", "copy", "seconds", "MB/s", "wire MB", "data MB"
        );
        for row in &self.rows {
            // Writing into a string cannot fail.
            let _ = writeln!(
                text,
                "  {:<12}{:<8}{:>9.2}{:>10.1}{:>11.2}{:>11.2}",
                row.system,
                row.copy,
                row.seconds,
                row.bytes_data as f64 / 1e6 / row.seconds,
                row.bytes_wire as f64 / 1e6,
                row.bytes_data as f64 / 1e6,
            );
        }
        for bar in self.bars() {
            let word = if bar.is_met { "met   " } else { "MISSED" };
            let _ = writeln!(text, "  {word}  {}", bar.text);
        }
        for failure in &self.failures {
            let _ = writeln!(text, "  FAILED  {failure}");
        }
        text
    }
}

/// All rows for programs.
///
/// # Errors
/// Never in practice: rows hold plain numbers and texts.
pub fn json(cases: &[CaseReport]) -> serde_json::Result<String> {
    let rows: Vec<&Row> = cases.iter().flat_map(|case| &case.rows).collect();
    Ok(serde_json::to_string_pretty(&rows)? + "\n")
}

/// One line on all bars.
#[must_use]
pub fn summary(cases: &[CaseReport]) -> String {
    let (mut met, mut missed) = (0, Vec::new());
    for case in cases {
        for bar in case.bars() {
            if bar.is_met {
                met += 1;
            } else {
                missed.push(format!("{}: {}", case.name, bar.text));
            }
        }
    }
    let missed: String = missed
        .iter()
        .map(|bar| format!("\n  missed  {bar}"))
        .collect();
    format!("bars: {met} met{missed}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: &'static str, copy: &'static str, seconds: f64) -> Row {
        Row {
            set: "noise",
            link: "800mbit,20ms,0.1%".to_owned(),
            system,
            copy,
            seconds,
            bytes_wire: 1100,
            bytes_data: 1000,
            memory_bytes_max: None,
        }
    }

    fn case(name: &str, rows: Vec<Row>) -> CaseReport {
        CaseReport {
            name: name.to_owned(),
            rows,
            failures: Vec::new(),
        }
    }

    #[test]
    fn the_better_rsync_is_the_one_to_beat_and_twice_over_for_small_files_far_away() {
        let rows = vec![
            row("hopgate", "first", 1.0),
            row("rsync -a", "first", 3.0),
            row("rsync -az", "first", 1.5),
        ];
        assert!(case("text@100mbit", rows.clone()).bars()[0].is_met);
        let bars = case("small-files@100mbit", rows).bars();
        assert!(!bars[0].is_met);
        assert!(
            bars[0].text.contains("2x") && bars[0].text.contains("(1.50x)"),
            "{bars:?}"
        );
    }

    #[test]
    fn the_link_bar_compares_with_eight_streams() {
        let rows = vec![
            row("hopgate", "first", 1.0),
            row("iperf3 -P 8", "stream", 0.97),
        ];
        assert!(case("noise@800mbit", rows.clone()).bars()[0].is_met);
        assert_eq!(case("text@800mbit", rows).bars(), []);
    }

    #[test]
    fn json_is_a_list_of_rows() {
        let text = json(&[case("noise@800mbit", vec![row("rsync -a", "first", 2.0)])]).unwrap();
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            rows[0],
            serde_json::json!({
                "set": "noise", "link": "800mbit,20ms,0.1%", "system": "rsync -a", "copy": "first",
                "seconds": 2.0, "bytes_wire": 1100, "bytes_data": 1000
            })
        );
    }
}
