//! The HTTP/2 case: h2load of nghttp2 makes the load, and what it prints and logs becomes a sample like that of our
//! own client.

use std::fs;
use std::time::Duration;

use crate::bench::cores::on_core;
use crate::bench::peer::{Peer, Place};
use crate::bench::plan::Sample;
use crate::bench::usage::processor_time;
use crate::lab::error::{LabError, OnFile, Result};

/// Requests of the first, uncounted load, from which the number for the wanted length is worked out.
const WARM_UP_REQUESTS: u64 = 5000;
/// Longest h2load may run beyond the wanted length, in seconds.
const EXTRA_S: u64 = 60;

/// The shape of the load.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// How many connections.
    pub connections: usize,
    /// Requests at once on each.
    pub streams: usize,
    /// Size of each answer's body.
    pub bytes: u64,
}

/// Loads `peer` for about `length`.
///
/// # Errors
/// When h2load does not run or prints something unexpected.
pub fn measure(peer: &Peer, shape: Shape, length: Duration, place: &Place) -> Result<Sample> {
    let warm_up = load(peer, shape, WARM_UP_REQUESTS, length, place)?;
    let share = length.as_secs_f64() * 1e9 / warm_up.elapsed_ns.max(1) as f64;
    let wanted = (WARM_UP_REQUESTS as f64 * share) as u64;
    let mut sample = load(peer, shape, wanted.max(WARM_UP_REQUESTS), length, place)?;
    sample.errors += warm_up.errors;
    Ok(sample)
}

fn load(
    peer: &Peer,
    shape: Shape,
    requests: u64,
    length: Duration,
    place: &Place,
) -> Result<Sample> {
    let log = place.run.join("h2load.tsv");
    let _ = fs::remove_file(&log);
    let watched = peer.processes();
    let before = processor_time(&watched);
    let said = on_core(place.cores.rest, "h2load")
        .args(["-t", "1", "-c", &shape.connections.to_string()])
        .args(["-m", &shape.streams.to_string()])
        .args(["-n", &requests.to_string()])
        .args(["--tls13-ciphers=TLS_AES_128_GCM_SHA256", "--groups=X25519"])
        .arg(format!("--log-file={}", log.display()))
        .arg(format!("https://{}/bytes/{}", peer.address, shape.bytes))
        .within(length + Duration::from_secs(EXTRA_S))
        .run()?;
    let used = processor_time(&watched).saturating_sub(before);
    let rows = fs::read_to_string(&log).on("read", &log)?;
    let mut sample =
        read(&said, &rows, requests, shape.bytes).map_err(|what| LabError::Output {
            program: "h2load",
            what,
        })?;
    sample.processor_ns = u64::try_from(used.as_nanos()).unwrap_or(u64::MAX);
    Ok(sample)
}

/// What h2load printed, and its log of requests, as a sample without processor time.
///
/// # Errors
/// The line that is missing or cannot be read.
pub fn read(
    said: &str,
    rows: &str,
    requests: u64,
    bytes: u64,
) -> std::result::Result<Sample, String> {
    let line = |start: &str| {
        let found = said.lines().find_map(|line| line.strip_prefix(start));
        found.ok_or_else(|| format!("no line «{}»", start.trim()))
    };
    let elapsed = line("finished in ")?;
    let elapsed = elapsed.split(',').next().and_then(duration_ns);
    let good = number_before(line("status codes: ")?, " 2xx");
    let data = line("traffic: ")?.rsplit('(').next().and_then(|end| {
        let digits = end.split(')').next()?;
        digits.parse::<u64>().ok()
    });
    let (Some(elapsed_ns), Some(good), Some(data)) = (elapsed, good, data) else {
        return Err("its totals in another form".into());
    };
    let mut durations: Vec<u64> = rows
        .lines()
        .filter_map(|row| {
            let mut columns = row.split('\t').skip(1);
            let status = columns.next()?;
            let microseconds: u64 = columns.next()?.parse().ok()?;
            status.starts_with('2').then_some(microseconds * 1000)
        })
        .collect();
    durations.sort_unstable();
    let short = if data == good * bytes { 0 } else { 1 };
    let errors = requests.saturating_sub(good) + short;
    Ok(Sample {
        requests: good,
        errors,
        first_error: (errors > 0).then(|| {
            let summary = line("requests: ").unwrap_or_default();
            format!("{summary}; {data} bytes of content")
        }),
        elapsed_ns,
        processor_ns: 0,
        p50_ns: quantile(&durations, 50),
        p99_ns: quantile(&durations, 99),
    })
}

fn number_before(line: &str, word: &str) -> Option<u64> {
    let before = line.split(word).next()?;
    before.rsplit([' ', ',']).next()?.parse().ok()
}

/// A time as h2load writes it: `1.23s`, `850.12ms`, `90us`.
fn duration_ns(text: &str) -> Option<u64> {
    let unit_at = text.find(|letter: char| letter.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "s" => 1e9,
        "ms" => 1e6,
        "us" => 1e3,
        _ => return None,
    };
    Some((number.parse::<f64>().ok()? * scale) as u64)
}

fn quantile(sorted: &[u64], percent: usize) -> u64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "starting benchmark...
finished in 1.50s, 2.00 req/s, 850B/s
requests: 4 total, 4 started, 4 done, 3 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 3 2xx, 0 3xx, 0 4xx, 1 5xx
traffic: 1.24KB (1275) total, 105B (105) headers (space savings 75.00%), 192B (192) data
                     min         max         mean         sd        +/- sd
";
    const ROWS: &str = "1\t200\t300\n2\t200\t100\n3\t503\t9\n4\t200\t200\n";

    #[test]
    fn what_h2load_prints_becomes_a_sample() {
        let sample = read(SAID, ROWS, 4, 64).unwrap();
        assert_eq!((sample.requests, sample.errors), (3, 1));
        assert_eq!(sample.elapsed_ns, 1_500_000_000);
        assert_eq!((sample.p50_ns, sample.p99_ns), (200_000, 300_000));
        assert!(sample.first_error.unwrap().contains("1 failed"));
    }

    #[test]
    fn content_that_is_missing_is_an_error() {
        let said = SAID.replace("4 total", "3 total").replace("(192)", "(191)");
        assert_eq!(read(&said, ROWS, 3, 64).unwrap().errors, 1);
    }

    #[test]
    fn another_form_of_output_is_refused_by_name() {
        let error = read("nothing", ROWS, 4, 64).unwrap_err();
        assert_eq!(error, "no line «finished in»");
    }
}
