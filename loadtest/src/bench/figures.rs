//! From many measurements of one proxy in one case to its figures: medians, and nothing but medians.

use serde::Serialize;

use crate::bench::plan::Sample;

/// A proxy under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Proxy {
    /// Ours.
    Hopgate,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

impl Proxy {
    /// All of them, ours first.
    pub const ALL: [Self; 3] = [Self::Hopgate, Self::Haproxy, Self::Nginx];

    /// Its name in JSON and in file names.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hopgate => "hopgate",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }
}

/// One measurement with the memory of the proxy at its end.
#[derive(Debug, Clone, PartialEq)]
pub enum Measured {
    /// Under load.
    Load {
        /// What the client saw.
        sample: Sample,
        /// Resident memory of the proxy, in bytes.
        rss_bytes: u64,
    },
    /// With idle connections.
    Idle {
        /// Resident memory before them, in bytes.
        before_bytes: u64,
        /// Resident memory with them, in bytes.
        with_bytes: u64,
        /// How many there were.
        connections: u64,
        /// Exchanges that failed while they were opened.
        errors: u64,
        /// The first of those.
        first_error: Option<String>,
    },
}

/// What one proxy did in one case. Keys that do not apply to the case are left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Processor time of the proxy for a request, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_request: Option<f64>,
    /// Requests answered in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_s: Option<f64>,
    /// Half of the requests took at most this, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<f64>,
    /// 99 of 100 requests took at most this, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<f64>,
    /// Content moved in a second, in MiB, where that is what the case is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mib_per_s: Option<f64>,
    /// Failed exchanges of all measurements together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<u64>,
    /// Resident memory at the end, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Growth of resident memory for each idle connection, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_idle_connection: Option<f64>,
    /// Distance of the highest from the lowest processor time for a request, as a part of the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_spread: Option<f64>,
    /// How much of its core the proxy used; well below 1 it was not the bottleneck, and rates say little about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core_share: Option<f64>,
    /// Why there are no figures, or what the first failed exchange was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Those of each round, in its order; a round's own has none.
    #[serde(skip)]
    pub rounds: Vec<Self>,
}

impl Figures {
    /// Those of a proxy that could not be measured.
    #[must_use]
    pub fn failed(why: String) -> Self {
        Self {
            failure: Some(why),
            ..Self::default()
        }
    }

    /// The medians of `measured`; `bulk_bytes` is the content of one exchange where that matters.
    #[must_use]
    pub fn of(measured: &[Measured], bulk_bytes: Option<u64>) -> Self {
        let rounds = match measured {
            [] | [_] => Vec::new(),
            several => several
                .iter()
                .map(|one| Self::of(std::slice::from_ref(one), bulk_bytes))
                .collect(),
        };
        let mut figures = Self {
            errors: Some(measured.iter().map(Measured::errors).sum()),
            failure: measured.iter().find_map(Measured::first_error),
            rss_bytes: whole_median(measured.iter().map(Measured::rss_bytes)),
            bytes_per_idle_connection: median(measured.iter().filter_map(per_idle)),
            rounds,
            ..Self::default()
        };
        let samples = || measured.iter().filter_map(Measured::sample);
        let of = |value: fn(&Sample) -> Option<f64>| median(samples().filter_map(value));
        figures.cpu_us_per_request = of(cpu_us);
        figures.cpu_spread = spread(samples().filter_map(cpu_us));
        figures.core_share = of(core_share);
        figures.requests_per_s = of(rate);
        figures.p50_ms = of(|sample| latency_ms(sample, sample.p50_ns));
        figures.p99_ms = of(|sample| latency_ms(sample, sample.p99_ns));
        figures.mib_per_s = figures
            .requests_per_s
            .zip(bulk_bytes)
            .map(|(rate, bytes)| rate * bytes as f64 / f64::from(1 << 20));
        figures
    }
}

impl Measured {
    const fn sample(&self) -> Option<&Sample> {
        match self {
            Self::Load { sample, .. } => Some(sample),
            Self::Idle { .. } => None,
        }
    }

    /// Failed exchanges.
    #[must_use]
    pub const fn errors(&self) -> u64 {
        match self {
            Self::Load { sample, .. } => sample.errors,
            Self::Idle { errors, .. } => *errors,
        }
    }

    fn first_error(&self) -> Option<String> {
        match self {
            Self::Load { sample, .. } => sample.first_error.clone(),
            Self::Idle { first_error, .. } => first_error.clone(),
        }
    }

    const fn rss_bytes(&self) -> u64 {
        match self {
            Self::Load { rss_bytes, .. } => *rss_bytes,
            Self::Idle { with_bytes, .. } => *with_bytes,
        }
    }
}

fn per_idle(measured: &Measured) -> Option<f64> {
    match measured {
        Measured::Idle {
            before_bytes,
            with_bytes,
            connections,
            ..
        } if *connections > 0 => {
            Some(with_bytes.saturating_sub(*before_bytes) as f64 / *connections as f64)
        }
        _ => None,
    }
}

// A measurement without a single answer has no figures: an average over nothing would look like a very good one.
fn cpu_us(sample: &Sample) -> Option<f64> {
    (sample.requests > 0).then(|| sample.processor_ns as f64 / 1e3 / sample.requests as f64)
}

fn rate(sample: &Sample) -> Option<f64> {
    (sample.elapsed_ns > 0).then(|| sample.requests as f64 * 1e9 / sample.elapsed_ns as f64)
}

fn core_share(sample: &Sample) -> Option<f64> {
    (sample.elapsed_ns > 0).then(|| sample.processor_ns as f64 / sample.elapsed_ns as f64)
}

fn latency_ms(sample: &Sample, nanoseconds: u64) -> Option<f64> {
    (sample.requests > 0).then(|| nanoseconds as f64 / 1e6)
}

/// The middle of `values`, or the mean of the two in the middle; nothing of nothing.
#[must_use]
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

fn whole_median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn spread(values: impl Iterator<Item = f64> + Clone) -> Option<f64> {
    let middle = median(values.clone())?;
    let highest = values.clone().max_by(f64::total_cmp)?;
    let lowest = values.min_by(f64::total_cmp)?;
    (middle > 0.0).then(|| (highest - lowest) / middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(requests: u64, processor_ns: u64) -> Measured {
        let sample = Sample {
            requests,
            processor_ns,
            elapsed_ns: 1_000_000_000,
            p50_ns: 1_000_000,
            p99_ns: 2_000_000,
            ..Sample::default()
        };
        Measured::Load {
            sample,
            rss_bytes: 4096,
        }
    }

    #[test]
    fn the_median_is_the_middle_and_one_outlier_does_not_move_it() {
        assert_eq!(median([3.0, 1.0, 900.0, 2.0, 2.5].into_iter()), Some(2.5));
        assert_eq!(median([1.0, 2.0].into_iter()), Some(1.5));
        assert_eq!(median([].into_iter()), None);
    }

    #[test]
    fn figures_are_medians_in_the_units_of_their_names() {
        let measured = [
            load(100, 1_000_000),
            load(100, 3_000_000),
            load(100, 1_100_000),
        ];
        let figures = Figures::of(&measured, Some(1 << 21));
        assert_eq!(figures.cpu_us_per_request, Some(11.0));
        assert_eq!(figures.requests_per_s, Some(100.0));
        assert_eq!(figures.core_share, Some(0.0011));
        assert_eq!((figures.p50_ms, figures.p99_ms), (Some(1.0), Some(2.0)));
        assert_eq!(figures.mib_per_s, Some(200.0));
        assert_eq!((figures.errors, figures.rss_bytes), (Some(0), Some(4096)));
        assert_eq!(figures.bytes_per_idle_connection, None);
        assert!((figures.cpu_spread.unwrap() - 20.0 / 11.0).abs() < 1e-9);
    }

    #[test]
    fn a_proxy_that_answers_nothing_has_errors_and_no_processor_time() {
        let sample = Sample {
            errors: 7,
            first_error: Some("status 503".into()),
            elapsed_ns: 5,
            ..Sample::default()
        };
        let nothing = Measured::Load {
            sample,
            rss_bytes: 1,
        };
        let figures = Figures::of(&[nothing], None);
        assert_eq!((figures.cpu_us_per_request, figures.p99_ms), (None, None));
        assert_eq!(figures.errors, Some(7));
        assert_eq!(figures.failure.as_deref(), Some("status 503"));
    }

    #[test]
    fn an_idle_connection_costs_what_memory_grew_by() {
        let idle = Measured::Idle {
            before_bytes: 1_000_000,
            with_bytes: 3_000_000,
            connections: 1000,
            errors: 0,
            first_error: None,
        };
        let figures = Figures::of(&[idle], None);
        assert_eq!(figures.bytes_per_idle_connection, Some(2000.0));
        assert_eq!(figures.cpu_us_per_request, None);
    }
}
