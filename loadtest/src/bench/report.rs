//! What a person and a program read of a benchmark.

use std::fmt::Write;

use serde::Serialize;

use crate::bench::case::{Case, Figure, Load};
use crate::bench::figures::{Figures, Proxy};
use crate::bench::verdict::{Outcome, better, judge};

/// A case with what every proxy did in it.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseReport {
    /// The case.
    pub case: Case,
    /// The proxies' figures, ours first.
    pub results: Vec<(Proxy, Figures)>,
}

/// All cases of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// In the order they ran.
    pub cases: Vec<CaseReport>,
}

#[derive(Serialize)]
struct Row<'a> {
    case: &'static str,
    proxy: Proxy,
    #[serde(flatten)]
    figures: &'a Figures,
}

impl Report {
    /// The list of rows for programs.
    ///
    /// # Errors
    /// Never in practice: the rows hold plain numbers and texts.
    pub fn json(&self) -> serde_json::Result<String> {
        let rows = self.cases.iter().flat_map(|report| {
            report.results.iter().map(|(proxy, figures)| Row {
                case: report.case.name,
                proxy: *proxy,
                figures,
            })
        });
        Ok(serde_json::to_string_pretty(&rows.collect::<Vec<_>>())? + "\n")
    }

    /// Whether every proxy was measured in every case without a failed exchange.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let mut all = self.cases.iter().flat_map(|report| &report.results);
        all.all(|(_, figures)| figures.errors == Some(0) && figures.failure.is_none())
    }

    /// One line on all bars.
    #[must_use]
    pub fn summary(&self) -> String {
        let (mut met, mut missed, mut unjudged) = (0, Vec::new(), Vec::new());
        for report in &self.cases {
            for bar in report.case.bars {
                match judge(*bar, &report.results).outcome {
                    Outcome::Met => met += 1,
                    Outcome::Missed => missed.push(report.case.name),
                    Outcome::Unjudged => unjudged.push(report.case.name),
                }
            }
        }
        let named = |what: &str, names: &[&str]| match names {
            [] => String::new(),
            _ => format!(" · {} {what}: {}", names.len(), names.join(", ")),
        };
        format!(
            "bars: {met} met{}{}",
            named("missed", &missed),
            named("not judged", &unjudged)
        )
    }
}

const HEAD: &str = "  proxy      CPU µs   ratio  spread    core      req/s    MiB/s    p50 ms    p99 ms  RSS MiB  errors";
const HEAD_IDLE: &str = "  proxy     bytes per connection   ratio  RSS MiB  errors";

impl CaseReport {
    /// The case's part of the table.
    #[must_use]
    pub fn table(&self) -> String {
        let idle = matches!(self.case.load, Load::Idle { .. });
        let head = if idle { HEAD_IDLE } else { HEAD };
        let mut text = format!("\n{}: {}\n{head}\n", self.case.name, self.case.title);
        let figure = if idle {
            Figure::BytesPerIdleConnection
        } else {
            Figure::CpuPerRequest
        };
        let best = better(figure, &self.results);
        for (proxy, figures) in &self.results {
            let ratio = figure.of(figures).zip(best).map(|(own, best)| own / best);
            let line = if idle {
                idle_line(figures, ratio)
            } else {
                load_line(figures, ratio)
            };
            // Writing into a string cannot fail.
            let _ = writeln!(text, "  {:<8}{line}", proxy.as_str());
            if let Some(failure) = &figures.failure {
                let _ = writeln!(text, "    failed: {failure}");
            }
        }
        for bar in self.case.bars {
            let judged = judge(*bar, &self.results);
            let word = match judged.outcome {
                Outcome::Met => "met   ",
                Outcome::Missed => "MISSED",
                Outcome::Unjudged => "not judged",
            };
            let ratio = judged
                .ratio
                .map_or_else(String::new, |ratio| format!(" ({ratio:.3}x)"));
            let _ = writeln!(text, "  {word}  {}{ratio}", judged.demand);
        }
        text
    }
}

fn load_line(figures: &Figures, ratio: Option<f64>) -> String {
    format!(
        "{:>9} {:>7} {:>7} {:>7} {:>10} {:>8} {:>9} {:>9} {:>8} {:>7}",
        number(figures.cpu_us_per_request, 2),
        times(ratio),
        percent(figures.cpu_spread),
        percent(figures.core_share),
        number(
            figures.requests_per_s,
            if figures.mib_per_s.is_some() { 1 } else { 0 }
        ),
        number(figures.mib_per_s, 0),
        number(figures.p50_ms, 3),
        number(figures.p99_ms, 3),
        number(mebibytes(figures), 1),
        errors(figures),
    )
}

fn idle_line(figures: &Figures, ratio: Option<f64>) -> String {
    format!(
        "{:>22} {:>7} {:>8} {:>7}",
        number(figures.bytes_per_idle_connection, 0),
        times(ratio),
        number(mebibytes(figures), 1),
        errors(figures),
    )
}

fn mebibytes(figures: &Figures) -> Option<f64> {
    figures
        .rss_bytes
        .map(|bytes| bytes as f64 / f64::from(1 << 20))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
}

fn percent(part: Option<f64>) -> String {
    part.map_or_else(|| "-".into(), |part| format!("{:.0} %", part * 100.0))
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}x"))
}

fn errors(figures: &Figures) -> String {
    figures
        .errors
        .map_or_else(|| "-".into(), |errors| errors.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::CASES;

    fn figures(cpu: f64) -> Figures {
        Figures {
            cpu_us_per_request: Some(cpu),
            requests_per_s: Some(1000.0),
            p50_ms: Some(1.0),
            p99_ms: Some(2.0),
            errors: Some(0),
            rss_bytes: Some(1 << 20),
            ..Figures::default()
        }
    }

    fn report() -> Report {
        let case = *CASES.iter().find(|case| case.name == "get-64").unwrap();
        let results = vec![
            (Proxy::Hopgate, figures(10.5)),
            (Proxy::Haproxy, figures(12.0)),
            (Proxy::Nginx, Figures::failed("no such option".into())),
        ];
        Report {
            cases: vec![CaseReport { case, results }],
        }
    }

    #[test]
    fn json_is_a_list_of_rows_without_the_keys_that_do_not_apply() {
        let rows: serde_json::Value = serde_json::from_str(&report().json().unwrap()).unwrap();
        assert_eq!(
            rows[0],
            serde_json::json!({
                "case": "get-64", "proxy": "hopgate", "cpu_us_per_request": 10.5, "requests_per_s": 1000.0,
                "p50_ms": 1.0, "p99_ms": 2.0, "errors": 0, "rss_bytes": 1_048_576
            })
        );
        assert_eq!(
            rows[2],
            serde_json::json!({"case": "get-64", "proxy": "nginx", "failure": "no such option"})
        );
    }

    #[test]
    fn the_table_marks_each_bar_and_tells_why_a_proxy_failed() {
        let text = report().cases[0].table();
        assert!(
            text.contains("  met     CPU per request <= 1.00x the better peer's (0.875x)"),
            "{text}"
        );
        assert!(text.contains("failed: no such option"), "{text}");
        assert!(!report().is_clean());
        assert_eq!(report().summary(), "bars: 2 met");
    }
}
