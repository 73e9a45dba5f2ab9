//! The wide-area link between the two sites: what was asked for, how it is emulated, and what it really gives.

use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::command::Shell;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::netns::{Names, within};
use crate::lab::process::Process;

/// The netfilter queue of the delay program; queues are numbered per namespace.
const QUEUE: &str = "7";
/// Longest a delay program may take to begin, in seconds.
const DELAY_READY_S: u64 = 20;
/// Up to this rate, in Mbit/s, packets cross one by one as they do on a wire. Otherwise the kernel hands the link bundles of
/// them with one header each, as large as a stream's own rate allows: many slow streams would pay for more headers than one
/// fast one. Faster links would cost the machine more than they are worth.
const BUNDLED_ABOVE_MBIT: f64 = 10.0;
/// The target's end of the link.
const TARGET: &str = "192.0.2.2:0";
/// How long throughput is measured, in milliseconds, after as long a start.
const MEASURE_MS: u64 = 700;
/// Round trips of which the shortest counts.
const ROUND_TRIPS: usize = 5;

/// A link as asked for on the command line: `800mbit,20ms,0.1%` or `none`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Link {
    /// The plain virtual link, as fast as memory.
    None,
    /// An emulated one.
    Shaped {
        /// Rate in each direction, in Mbit/s.
        rate_mbit: f64,
        /// Round trip, half of it in each direction.
        round_trip: Duration,
        /// Packets lost in each direction, 0 to 100.
        loss_percent: f64,
    },
}

impl Link {
    /// An emulated one; rate in Mbit/s, round trip in milliseconds, loss in percent.
    #[must_use]
    pub const fn shaped(rate_mbit: f64, round_trip_ms: u64, loss_percent: f64) -> Self {
        Self::Shaped {
            rate_mbit,
            round_trip: Duration::from_millis(round_trip_ms),
            loss_percent,
        }
    }
}

impl FromStr for Link {
    type Err = LabError;

    fn from_str(given: &str) -> Result<Self> {
        let refuse = |what| LabError::Link {
            given: given.to_owned(),
            what,
        };
        if given == "none" {
            return Ok(Self::None);
        }
        let (mut rate_mbit, mut round_trip, mut loss_percent) = (None, Duration::ZERO, 0.0);
        for part in given.split(',').map(str::trim) {
            let number = |text: &str| {
                let number = text
                    .parse::<f64>()
                    .map_err(|_| refuse("a number is missing before a unit"))?;
                if number.is_finite() && number >= 0.0 {
                    Ok(number)
                } else {
                    Err(refuse("a number is out of range"))
                }
            };
            if let Some(text) = part.strip_suffix("mbit") {
                rate_mbit = Some(number(text)?);
            } else if let Some(text) = part.strip_suffix("ms") {
                round_trip = Duration::from_secs_f64(number(text)?.min(60_000.0) / 1e3);
            } else if let Some(text) = part.strip_suffix('%') {
                loss_percent = number(text)?;
            } else {
                return Err(refuse("a part has no unit of mbit, ms or %"));
            }
        }
        let rate_mbit = rate_mbit
            .filter(|rate| *rate >= 0.1)
            .ok_or_else(|| refuse("the rate is missing or below 0.1mbit"))?;
        if loss_percent >= 100.0 {
            return Err(refuse("nothing would ever arrive"));
        }
        Ok(Self::Shaped {
            rate_mbit,
            round_trip,
            loss_percent,
        })
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => formatter.write_str("none"),
            Self::Shaped {
                rate_mbit,
                round_trip,
                loss_percent,
            } => {
                write!(
                    formatter,
                    "{rate_mbit}mbit,{}ms,{loss_percent}%",
                    round_trip.as_secs_f64() * 1e3
                )
            }
        }
    }
}

/// What the link really gives, measured with TCP before the hop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// As asked for.
    pub asked: String,
    /// How it is emulated.
    pub emulation: String,
    /// Shortest round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// One TCP stream from source to target, in Mbit/s.
    pub one_stream_mbit: f64,
    /// Four TCP streams together, in Mbit/s.
    pub four_streams_mbit: f64,
}

impl fmt::Display for Measured {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "link {} ({}): measured {:.1} ms round trip, {:.0} Mbit/s with one stream, {:.0} with four",
            self.asked,
            self.emulation,
            self.round_trip_ms,
            self.one_stream_mbit,
            self.four_streams_mbit
        )
    }
}

/// Shapes the link at both of its ends, so that each direction is delayed and thinned once. Gives the name of the
/// emulation and the delay programs to be run, one per site.
///
/// # Errors
/// When the kernel has neither netem nor the parts to build a like of it.
pub fn shape(
    link: Link,
    names: Names,
    program: &Path,
) -> Result<(&'static str, Vec<(&'static str, Shell)>)> {
    let Link::Shaped {
        rate_mbit,
        round_trip,
        loss_percent,
    } = link
    else {
        return Ok(("none", Vec::new()));
    };
    let rate = format!("{rate_mbit}mbit");
    let one_way_us = (round_trip / 2).as_micros().to_string();
    let mut delays = Vec::new();
    let mut emulation = "netem";
    for site in ["source", "target"] {
        let namespace = names.path(site);
        let tc = |words: &[&str]| {
            Shell::new("tc")
                .args(["qdisc", "add", "dev", "wan", "root"])
                .args(words)
                .inside(&namespace)
        };
        if rate_mbit <= BUNDLED_ABOVE_MBIT {
            Shell::new("ip")
                .args(["link", "set", "dev", "wan", "gso_max_segs", "1"])
                .inside(&namespace)
                .run()?;
        }
        let delay = format!("{one_way_us}us");
        let loss = format!("{loss_percent}%");
        // A limit of the bandwidth-delay product and more: the queue itself must not lose packets.
        if tc(&[
            "netem", "delay", &delay, "rate", &rate, "loss", &loss, "limit", "20000",
        ])
        .succeeds()
        {
            continue;
        }
        emulation = "tbf, iptables statistic and a delaying queue";
        tc(&["tbf", "rate", &rate, "burst", "256k", "latency", "50ms"]).run()?;
        let iptables = |words: &[&str]| rule_on_arrival(&namespace, "-A", words);
        if loss_percent > 0.0 {
            let probability = format!("{:.6}", loss_percent / 100.0);
            iptables(&[
                "-m",
                "statistic",
                "--mode",
                "random",
                "--probability",
                &probability,
                "-j",
                "DROP",
            ])?;
        }
        if !round_trip.is_zero() {
            // Bypass: packets pass undelayed until the delay program is there.
            iptables(&["-j", "NFQUEUE", "--queue-num", QUEUE, "--queue-bypass"])?;
            let program =
                Shell::new(program).args(["delay", "--queue", QUEUE, "--delay-us", &one_way_us]);
            delays.push((site, program.inside(&namespace)));
        }
    }
    Ok((emulation, delays))
}

/// Changes the rules for what arrives over the link: `-A` and `-I` add one, `-D` takes it away.
///
/// # Errors
/// When the packet filter refuses.
pub(super) fn rule_on_arrival(namespace: &Path, verb: &str, words: &[&str]) -> Result<()> {
    Shell::new("iptables-legacy")
        .args(["-t", "raw", verb, "PREROUTING", "-i", "wan"])
        .args(words)
        .inside(namespace)
        .run()?;
    Ok(())
}

/// Waits until the kernel hands the link's packets to a delay program.
///
/// # Errors
/// When the program ends, or does not take its queue in time.
pub fn wait_for_delay(delay: &mut Process) -> Result<()> {
    let queues = format!("/proc/{}/net/netfilter/nfnetlink_queue", delay.pid());
    delay.wait_ready(Duration::from_secs(DELAY_READY_S), || {
        let table = std::fs::read_to_string(&queues).unwrap_or_default();
        table
            .lines()
            .any(|line| line.split_whitespace().next() == Some(QUEUE))
    })
}

/// Measures the link from source to target with connections of our own.
///
/// # Errors
/// When the sites cannot reach each other.
pub fn measure(link: Link, emulation: &str, names: Names) -> Result<Measured> {
    let (source, target) = (names.path("source"), names.path("target"));
    let listener = within(&target, || TcpListener::bind(TARGET))?.on("listen in", &target)?;
    let address = listener.local_addr().on("listen in", &target)?;
    let received = AtomicU64::new(0);
    // One connection for round trips, then one and four streams: six in all.
    let outcome = thread::scope(|scope| {
        let (listener, received) = (&listener, &received);
        scope.spawn(move || {
            for (index, stream) in listener.incoming().take(6).enumerate() {
                let Ok(stream) = stream else { continue };
                scope.spawn(move || {
                    if index == 0 {
                        echo(stream)
                    } else {
                        drain(stream, received)
                    }
                });
            }
        });
        within(&source, || {
            let round_trip = round_trip(address)?;
            let one = throughput(address, 1, received)?;
            let four = throughput(address, 4, received)?;
            Ok::<_, std::io::Error>((round_trip, one, four))
        })
    });
    let (round_trip, one_stream_mbit, four_streams_mbit) =
        outcome?.on("measure the link of", &source)?;
    let round_trip_ms = round_trip.as_secs_f64() * 1e3;
    Ok(Measured {
        asked: link.to_string(),
        emulation: emulation.to_owned(),
        round_trip_ms,
        one_stream_mbit,
        four_streams_mbit,
    })
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    Ok(stream)
}

fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
}

fn drain(mut stream: TcpStream, received: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        received.fetch_add(read as u64, Ordering::Relaxed);
    }
}

fn round_trip(address: SocketAddr) -> std::io::Result<Duration> {
    let mut stream = connect(address)?;
    let mut shortest = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        shortest = shortest.min(start.elapsed());
    }
    Ok(shortest)
}

fn throughput(address: SocketAddr, streams: usize, received: &AtomicU64) -> std::io::Result<f64> {
    let namespace_streams = (0..streams)
        .map(|_| connect(address))
        .collect::<std::io::Result<Vec<_>>>()?;
    let end = Instant::now() + Duration::from_millis(2 * MEASURE_MS);
    thread::scope(|scope| {
        for mut stream in namespace_streams {
            scope.spawn(move || {
                let block = vec![0; 256 << 10];
                while Instant::now() < end && stream.write_all(&block).is_ok() {}
            });
        }
        // The first half lets the windows open and is not counted.
        thread::sleep(Duration::from_millis(MEASURE_MS));
        let (before, start) = (received.load(Ordering::Relaxed), Instant::now());
        thread::sleep(Duration::from_millis(MEASURE_MS));
        let bytes = received.load(Ordering::Relaxed) - before;
        Ok(bytes as f64 * 8.0 / 1e6 / start.elapsed().as_secs_f64())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_reads_back_as_it_was_written() {
        for text in ["none", "800mbit,20ms,0.1%", "10mbit,0ms,0%"] {
            assert_eq!(text.parse::<Link>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_link_without_units_is_refused_with_an_example() {
        let error = "800,20,0.1".parse::<Link>().unwrap_err().to_string();
        assert_eq!(
            error,
            "--link 800,20,0.1: a part has no unit of mbit, ms or %; write for example 800mbit,20ms,0.1% or none"
        );
    }
}
