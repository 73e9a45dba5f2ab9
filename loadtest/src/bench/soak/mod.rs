//! `cargo lab bench soak`: minutes of mixed load at full speed through one Hopgate. No request may fail, and memory
//! must stay flat. It never slows the load down to make that easier.

pub mod memory;
pub mod tally;

use std::fmt::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::case::Setup;
use crate::bench::figures::Proxy;
use crate::bench::peer::{Peer, Place};
use crate::bench::run::{prepare, start_origin};
use crate::bench::soak::memory::Memory;
use crate::bench::soak::tally::Tally;
use crate::bench::tools;
use crate::command::Shell;
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::progress::Progress;

/// Length of one slice of load, in seconds: after each, its errors are known.
const SLICE_S: u64 = 20;
/// Most requests in one slice of ab, which keeps a record of each; a slice of kept connections may end early by it.
const AB_REQUESTS: &str = "200000";
/// What wrk calls a timeout: its own 2 s are soon reached by 84 clients on a core that others use too.
const WRK_TIMEOUT: &str = "15s";
/// Longest a slice may run over, in seconds.
const SLICE_EXTRA_S: u64 = 120;
/// How often memory is looked at, in seconds.
const SAMPLE_S: u64 = 1;
/// Size of a posted body, in bytes.
const POST_BYTES: usize = 2000;

/// siege's settings, so that those of the user do not matter.
const SIEGE_RC: &str = "verbose = false\nquiet = false\njson_output = true\nshow-logfile = false\nlogging = false\nprotocol = HTTP/1.1\nparser = false\nfailures = 1000000\nconnection = ";

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What each generator counted.
    pub tallies: Vec<(&'static str, Tally)>,
    /// Hopgate's memory.
    pub memory: Option<Memory>,
    /// How long it took.
    pub elapsed: Duration,
}

impl Outcome {
    /// Whether nothing failed, something was asked by each, and memory stayed flat.
    #[must_use]
    pub fn is_green(&self) -> bool {
        self.memory.is_some_and(|memory| memory.is_flat())
            && self
                .tallies
                .iter()
                .all(|(_, tally)| tally.errors == 0 && tally.requests > 0)
    }

    /// The outcome for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        for (name, tally) in &self.tallies {
            let _ = writeln!(
                text,
                "  {name:<6} {:>12} answered  {:>6} errors{}",
                tally.requests,
                tally.errors,
                tally
                    .first_error
                    .as_ref()
                    .map(|what| format!(" ({what})"))
                    .unwrap_or_default()
            );
        }
        let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
        match &self.memory {
            Some(memory) => {
                let _ = writeln!(
                    text,
                    "  memory {:.1} MiB at first, {:.1} at most, {:.1} at last; over the second half {:+.2} MiB ({:+.1} KiB a minute), flat up to {:+.2}",
                    mebibytes(memory.first as f64),
                    mebibytes(memory.highest as f64),
                    mebibytes(memory.last as f64),
                    mebibytes(memory.growth),
                    memory.slope * 60.0 / 1024.0,
                    mebibytes(memory.bound),
                );
            }
            None => text.push_str("  memory was not sampled often enough\n"),
        }
        let _ = write!(
            text,
            "  {:.0} s\n  verdict: {}",
            self.elapsed.as_secs_f64(),
            if self.is_green() { "ok" } else { "NOT ok" }
        );
        text
    }
}

/// Soaks Hopgate for `length`.
///
/// # Errors
/// When the lab itself fails, is interrupted, or Hopgate does not start or ends.
pub fn run(
    length: Duration,
    hopgate: Option<&PathBuf>,
    folders: &Folders,
    progress: &Progress,
) -> Result<Outcome> {
    let _alone = folders.lock("bench")?;
    let place = prepare(tools::SOAKERS, hopgate, folders, progress)?;
    let (_origin, addresses) = start_origin(&place)?;
    let mut peer = Peer::start(Proxy::Hopgate, Setup::Clear, addresses, &place)?;
    let generators = generators(&place, &format!("http://{}", peer.address))?;
    let began = Instant::now();
    let end = began + length;
    let mut samples = Vec::new();
    let (tallies, death) = thread::scope(|scope| {
        let threads: Vec<_> = generators
            .iter()
            .map(|generator| (generator.name, scope.spawn(move || generator.run(end))))
            .collect();
        let mut death = None;
        while Instant::now() < end && death.is_none() && !interrupt::requested() {
            samples.push(peer.resident_bytes());
            progress.now(format!(
                "soaking: {} of {} s, {:.1} MiB",
                began.elapsed().as_secs(),
                length.as_secs(),
                samples.last().copied().unwrap_or(0) as f64 / f64::from(1 << 20)
            ));
            death = peer.death();
            interrupt::pause(Duration::from_secs(SAMPLE_S));
        }
        let joined = threads.into_iter().map(|(name, thread)| {
            let broken = |_| Tally::broken("its thread ended".into());
            (name, thread.join().unwrap_or_else(broken))
        });
        (joined.collect::<Vec<_>>(), death)
    });
    if interrupt::requested() {
        return Err(LabError::Interrupted);
    }
    if let Some(what) = death {
        return Err(LabError::Differs { what });
    }
    Ok(Outcome {
        tallies,
        memory: Memory::of(&samples),
        elapsed: began.elapsed(),
    })
}

/// One program that makes load, slice after slice.
struct Generator {
    name: &'static str,
    /// Its command lines, taken in turn; the first word is the program.
    slices: Vec<Vec<String>>,
    read: fn(&str) -> Option<Tally>,
}

impl Generator {
    fn run(&self, end: Instant) -> Tally {
        let mut sum = Tally::default();
        for line in self.slices.iter().cycle() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || interrupt::requested() {
                break;
            }
            let seconds = left.as_secs().clamp(1, SLICE_S).to_string();
            let words = line.iter().map(|word| word.replace("SECONDS", &seconds));
            let mut words = words.collect::<Vec<_>>().into_iter();
            let shell = Shell::new(words.next().unwrap_or_default())
                .args(words)
                .within(Duration::from_secs(SLICE_S + SLICE_EXTRA_S));
            sum.add(match shell.end() {
                Ok(ended) => (self.read)(&ended.out).unwrap_or_else(|| {
                    let said = format!("{} {}", ended.err, ended.out);
                    Tally::broken(said.split_whitespace().collect::<Vec<_>>().join(" "))
                }),
                Err(error) => Tally::broken(error.to_string()),
            });
        }
        sum
    }
}

/// The mix: small and larger answers, posted bodies, kept connections and new ones, HTTP/1.1 and, by ab, 1.0.
fn generators(place: &Place, base: &str) -> Result<Vec<Generator>> {
    let write = |name: &str, text: &str| {
        let path = place.run.join(name);
        std::fs::write(&path, text).on("write", &path)?;
        Ok::<_, LabError>(path.display().to_string())
    };
    let (small, page, large) = (
        format!("{base}/bytes/64"),
        format!("{base}/bytes/20000"),
        format!("{base}/bytes/1000000"),
    );
    let store = format!("{base}/store");
    let siege_new = write("siege-new.rc", &format!("{SIEGE_RC}close\n"))?;
    let siege_kept = write("siege-kept.rc", &format!("{SIEGE_RC}keep-alive\n"))?;
    let urls = write(
        "siege.urls",
        &format!("{small}\n{page}\n{store} POST field=value\n{large}\n{small}\n"),
    )?;
    let body = write("body", &"b".repeat(POST_BYTES))?;
    let line = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    // siege leaves a folder in the home of whoever runs it.
    let home = format!("HOME={}", place.run.display());
    let siege = |settings: &str| {
        line(&[
            "env", &home, "siege", "-R", settings, "-b", "-c", "20", "-t", "SECONDSS", "-f", &urls,
        ])
    };
    let wrk = |url: &str| {
        line(&[
            "wrk",
            "-t1",
            "-c48",
            "--timeout",
            WRK_TIMEOUT,
            "-d",
            "SECONDSs",
            url,
        ])
    };
    // The number stands after the time, which would set one of its own.
    let ab = |rest: &[&str]| {
        let first = ["ab", "-q", "-c", "16", "-t", "SECONDS", "-n", AB_REQUESTS];
        line(&[&first, rest].concat())
    };
    Ok(vec![
        Generator {
            name: "siege",
            slices: vec![siege(&siege_new), siege(&siege_kept)],
            read: tally::siege,
        },
        Generator {
            name: "wrk",
            slices: vec![wrk(&small), wrk(&page)],
            read: tally::wrk,
        },
        Generator {
            name: "ab",
            slices: vec![
                ab(&["-k", &small]),
                ab(&[&page]),
                ab(&["-k", "-p", &body, &store]),
            ],
            read: tally::ab,
        },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(errors: u64, last: u64) -> Outcome {
        let mut samples = vec![10 << 20; 100];
        samples.extend(vec![last; 100]);
        let tally = Tally {
            requests: 5,
            errors,
            first_error: None,
        };
        Outcome {
            tallies: vec![("wrk", tally)],
            memory: Memory::of(&samples),
            elapsed: Duration::from_secs(200),
        }
    }

    #[test]
    fn one_error_is_enough_to_fail() {
        assert!(outcome(0, 11 << 20).is_green());
        assert!(!outcome(1, 11 << 20).is_green());
        assert!(outcome(1, 11 << 20).table().ends_with("verdict: NOT ok"));
    }

    #[test]
    fn a_generator_that_asked_nothing_proves_nothing() {
        let mut silent = outcome(0, 11 << 20);
        silent.tallies[0].1.requests = 0;
        assert!(!silent.is_green());
    }
}
