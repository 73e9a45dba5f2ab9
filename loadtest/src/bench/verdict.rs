//! Judges Hopgate's figures by the bars of a case. Pure.
//!
//! A machine that is not alone has slower and faster seconds. Within a round the proxies meet the same ones, so what is
//! judged is the median of the rounds' ratios, and not the ratio of medians that come from different rounds.

use crate::bench::case::{Bar, Figure, Rival};
use crate::bench::figures::{Figures, Proxy, median};

/// Whether a bar is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is.
    Met,
    /// It is not.
    Missed,
    /// Something to compare is missing, or exchanges of Hopgate failed.
    Unjudged,
}

/// One bar, judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// Met or not.
    pub outcome: Outcome,
    /// Hopgate's figure as a multiple of the rival's: the median of the rounds'.
    pub ratio: Option<f64>,
    /// The demand in words.
    pub demand: String,
}

impl Figure {
    /// Its value, if the case has it.
    #[must_use]
    pub const fn of(self, figures: &Figures) -> Option<f64> {
        match self {
            Self::CpuPerRequest => figures.cpu_us_per_request,
            Self::P99 => figures.p99_ms,
            Self::RequestsPerSecond => figures.requests_per_s,
            Self::BytesPerIdleConnection => figures.bytes_per_idle_connection,
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::CpuPerRequest => "CPU per request",
            Self::P99 => "p99",
            Self::RequestsPerSecond => "throughput",
            Self::BytesPerIdleConnection => "memory per idle connection",
        }
    }

    const fn more_is_better(self) -> bool {
        matches!(self, Self::RequestsPerSecond)
    }
}

impl Rival {
    const fn words(self) -> &'static str {
        match self {
            Self::Better => "the better peer's",
            Self::Haproxy => "HAProxy's",
            Self::Nginx => "nginx's",
        }
    }
}

/// The better of the peers' values of `figure`; a peer that failed is no peer.
#[must_use]
pub fn better(figure: Figure, all: &[(Proxy, Figures)]) -> Option<f64> {
    let peers = all.iter().filter(|(proxy, _)| *proxy != Proxy::Hopgate);
    let values = peers.filter_map(|(_, figures)| figure.of(figures));
    if figure.more_is_better() {
        values.max_by(f64::total_cmp)
    } else {
        values.min_by(f64::total_cmp)
    }
}

fn figures_of(wanted: Proxy, all: &[(Proxy, Figures)]) -> Option<&Figures> {
    let found = all.iter().find(|(proxy, _)| *proxy == wanted);
    found.map(|(_, figures)| figures)
}

/// `ours` as a multiple of `theirs`, round by round where there are as many of both.
fn ratio(figure: Figure, ours: &Figures, theirs: &Figures) -> Option<f64> {
    let of_two = |ours: &Figures, theirs: &Figures| {
        let theirs = figure.of(theirs).filter(|value| *value > 0.0)?;
        Some(figure.of(ours)? / theirs)
    };
    if ours.rounds.is_empty() || ours.rounds.len() != theirs.rounds.len() {
        return of_two(ours, theirs);
    }
    let rounds = ours.rounds.iter().zip(&theirs.rounds);
    median(rounds.filter_map(|(ours, theirs)| of_two(ours, theirs)))
}

/// The ratio to the rival; of several rivals to the one that does better by us.
fn ratio_to(bar: Bar, all: &[(Proxy, Figures)]) -> Option<f64> {
    let ours = figures_of(Proxy::Hopgate, all)?;
    let rivals: &[Proxy] = match bar.rival {
        Rival::Better => &[Proxy::Haproxy, Proxy::Nginx],
        Rival::Haproxy => &[Proxy::Haproxy],
        Rival::Nginx => &[Proxy::Nginx],
    };
    let ratios = rivals
        .iter()
        .filter_map(|rival| ratio(bar.figure, ours, figures_of(*rival, all)?));
    if bar.figure.more_is_better() {
        ratios.min_by(f64::total_cmp)
    } else {
        ratios.max_by(f64::total_cmp)
    }
}

/// Judges `bar` by what all proxies did.
#[must_use]
pub fn judge(bar: Bar, all: &[(Proxy, Figures)]) -> Judgement {
    let ratio = ratio_to(bar, all);
    let clean = all
        .iter()
        .any(|(proxy, figures)| *proxy == Proxy::Hopgate && figures.errors == Some(0));
    let outcome = match ratio {
        Some(ratio) if clean => {
            let met = if bar.figure.more_is_better() {
                ratio >= bar.factor
            } else {
                ratio <= bar.factor
            };
            if met { Outcome::Met } else { Outcome::Missed }
        }
        _ => Outcome::Unjudged,
    };
    let sign = if bar.figure.more_is_better() {
        ">="
    } else {
        "<="
    };
    let demand = format!(
        "{} {sign} {:.2}x {}",
        bar.figure.words(),
        bar.factor,
        bar.rival.words()
    );
    Judgement {
        outcome,
        ratio,
        demand,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(hopgate: f64, haproxy: f64, nginx: f64) -> Vec<(Proxy, Figures)> {
        let figures = |value| Figures {
            cpu_us_per_request: Some(value),
            requests_per_s: Some(value),
            errors: Some(0),
            ..Figures::default()
        };
        vec![
            (Proxy::Hopgate, figures(hopgate)),
            (Proxy::Haproxy, figures(haproxy)),
            (Proxy::Nginx, figures(nginx)),
        ]
    }

    const fn cpu(rival: Rival, factor: f64) -> Bar {
        Bar {
            figure: Figure::CpuPerRequest,
            rival,
            factor,
        }
    }

    #[test]
    fn the_better_peer_is_the_one_with_less_processor_time() {
        let judged = judge(cpu(Rival::Better, 1.05), &all(10.5, 12.0, 10.0));
        assert_eq!(judged.outcome, Outcome::Met);
        assert_eq!(judged.ratio, Some(1.05));
        assert_eq!(judged.demand, "CPU per request <= 1.05x the better peer's");
        assert_eq!(
            judge(cpu(Rival::Better, 1.0), &all(10.5, 12.0, 10.0)).outcome,
            Outcome::Missed
        );
        assert_eq!(
            judge(cpu(Rival::Haproxy, 1.0), &all(10.5, 12.0, 10.0)).outcome,
            Outcome::Met
        );
    }

    #[test]
    fn rounds_are_compared_with_each_other() {
        // Twice as slow a machine in half of the rounds, and not in the same half of the middle.
        let rounds = |values: [f64; 3]| {
            let one = |value| Figures {
                cpu_us_per_request: Some(value),
                errors: Some(0),
                ..Figures::default()
            };
            Figures {
                rounds: values.map(one).into(),
                ..one(median(values.into_iter()).unwrap())
            }
        };
        let all = vec![
            (Proxy::Hopgate, rounds([9.0, 18.0, 19.0])),
            (Proxy::Haproxy, rounds([10.0, 20.0, 10.0])),
            (Proxy::Nginx, rounds([12.0, 19.0, 18.0])),
        ];
        let judged = judge(cpu(Rival::Better, 1.0), &all);
        assert_eq!(
            (judged.outcome, judged.ratio),
            (Outcome::Met, Some(18.0 / 19.0))
        );
    }

    #[test]
    fn of_throughput_more_is_better() {
        let bar = Bar {
            figure: Figure::RequestsPerSecond,
            rival: Rival::Better,
            factor: 1.0,
        };
        assert_eq!(judge(bar, &all(9.0, 8.0, 10.0)).outcome, Outcome::Missed);
        assert_eq!(judge(bar, &all(10.0, 8.0, 10.0)).outcome, Outcome::Met);
    }

    #[test]
    fn nothing_is_met_with_errors_or_without_a_rival() {
        let mut with_errors = all(1.0, 10.0, 10.0);
        with_errors[0].1.errors = Some(1);
        assert_eq!(
            judge(cpu(Rival::Better, 1.0), &with_errors).outcome,
            Outcome::Unjudged
        );
        let mut alone = all(1.0, 10.0, 10.0);
        alone[2].1 = Figures::failed("would not start".into());
        assert_eq!(
            judge(cpu(Rival::Nginx, 1.0), &alone).outcome,
            Outcome::Unjudged
        );
        assert_eq!(judge(cpu(Rival::Better, 1.0), &alone).outcome, Outcome::Met);
    }
}
