//! Prometheus metrics: written out by hand, once a scrape, from counters that exist anyway.
//!
//! The held counters of a service are read under one lock, so `held = released + gave_up + evicted + held_now` is
//! true in every scrape.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cutover_protocol::hold::{Tier, WritesStatus};
use cutover_protocol::id::Site;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::access_log::AccessLog;
use crate::life::facts::Facts;
use crate::limit::Reason;
use crate::listen::bound::Bound;
use crate::listen::quic::router::Counts;
use crate::service::budget::TIERS;
use crate::service::{HOLD_BUCKETS_MS, HeldCounts, HoldTimes, Mode, Service, Word};
use crate::snapshot::{Shared, Snapshot};
use crate::tls::count;
use crate::upstream::write_metrics;

/// Scrapes at once; one Prometheus needs one.
const SCRAPES_MAX: usize = 16;
/// How long one scrape may take.
const SCRAPE_MS_MAX: Duration = Duration::from_secs(5);
/// Longest request of a scraper, in bytes.
const REQUEST_BYTES_MAX: usize = 8192;

/// What can be scraped.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) shared: Shared,
    pub(crate) facts: Arc<Facts>,
}

/// One service at one instant.
struct Reading<'s> {
    name: &'s str,
    word: Word,
    counts: HeldCounts,
    times: HoldTimes,
    in_flight: u64,
    connections: u64,
    carried: u64,
    tier: Tier,
    /// How often each tier was entered.
    entered: [u64; TIERS.len()],
    answered: [u64; 6],
    refused: [u64; Reason::ALL.len()],
    front_checks: u64,
    waited: u64,
    writes: WritesStatus,
}

impl<'s> Reading<'s> {
    fn of(service: &'s Service) -> Self {
        let gate = &service.gate;
        let (counts, times) = gate.with_held(|held| (held.counts(), *held.times()));
        let mut answered = [0; 6];
        let mut refused = [0; Reason::ALL.len()];
        for shard in gate.shards() {
            for (sum, reason) in refused.iter_mut().zip(Reason::ALL) {
                *sum += shard.refusals.total(reason);
            }
            for (sum, counter) in answered.iter_mut().zip(&shard.answered) {
                *sum += counter.load(Ordering::Relaxed);
            }
        }
        Self {
            name: service.name().as_str(),
            word: gate.word(),
            counts,
            times,
            in_flight: gate.in_flight(),
            connections: gate.connections(),
            carried: gate.carried(),
            tier: gate.budget.tier(),
            entered: gate.budget.entered(),
            answered,
            refused,
            front_checks: gate.front_checks(),
            waited: gate.waited(),
            writes: gate.writes_status(),
        }
    }
}

/// Name, type, help and value of a metric with one sample a service.
type Single = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Reading<'_>) -> u64,
);

const SINGLES: [Single; 19] = [
    (
        "hopgate_held_total",
        "counter",
        "Requests held so far",
        |s| s.counts.held,
    ),
    (
        "hopgate_released_total",
        "counter",
        "Held requests let through",
        |s| s.counts.released,
    ),
    (
        "hopgate_gave_up_total",
        "counter",
        "Held requests whose client left",
        |s| s.counts.gave_up,
    ),
    (
        "hopgate_evicted_total",
        "counter",
        "Held requests refused by the proxy",
        |s| s.counts.evicted,
    ),
    (
        "hopgate_connections_waited_total",
        "counter",
        "Connections that waited because there were connections_max already",
        |s| s.waited,
    ),
    (
        "hopgate_front_checks_answered_total",
        "counter",
        "Health probes of balancers that were answered instead of being held",
        |s| s.front_checks,
    ),
    (
        "hopgate_writes_admitted_total",
        "counter",
        "HTTP requests with a method that is not safe, admitted so far",
        |s| s.writes.admitted,
    ),
    (
        "hopgate_writes_delayed_total",
        "counter",
        "Writes that were delayed because writes are limited",
        |s| s.writes.delayed,
    ),
    (
        "hopgate_writes_delayed_now",
        "gauge",
        "Writes delayed now: neither held nor in flight",
        |s| s.writes.delayed_now,
    ),
    (
        "hopgate_write_interval_us",
        "gauge",
        "From one write to the next while writes are limited, in microseconds; 0 while they are not",
        |s| {
            s.writes
                .limit
                .as_ref()
                .map_or(0, |limit| limit.interval_us.get())
        },
    ),
    ("hopgate_held_now", "gauge", "Requests held now", |s| {
        s.counts.held_now
    }),
    (
        "hopgate_held_bytes",
        "gauge",
        "Memory that the held keep, by our own count",
        |s| s.counts.bytes_now,
    ),
    (
        "hopgate_budget_tier",
        "gauge",
        "0 room for more, 1 reading no more of clients, 2 accepting no more of them, 3 full",
        |s| s.tier as u64,
    ),
    (
        "hopgate_in_flight",
        "gauge",
        "Requests and raw connections in flight",
        |s| s.in_flight,
    ),
    (
        "hopgate_upstream_connections",
        "gauge",
        "Open upstream connections, idle ones included",
        |s| s.connections,
    ),
    (
        "hopgate_carried",
        "gauge",
        "Requests and raw connections that no drain waits for",
        |s| s.carried,
    ),
    ("hopgate_epoch", "gauge", "Epoch of the register", |s| {
        s.word.register.epoch.0
    }),
    (
        "hopgate_owner_is_target",
        "gauge",
        "1 when the target owns the service, 0 when the source does",
        |s| u64::from(s.word.register.owner == Site::Target),
    ),
    (
        "hopgate_gate",
        "gauge",
        "0 open, 1 holding, 2 releasing",
        |s| match s.word.mode {
            Mode::Open => 0,
            Mode::Holding => 1,
            Mode::Releasing => 2,
        },
    ),
];

impl Metrics {
    /// The text of one scrape.
    pub(crate) fn text(&self) -> String {
        let snapshot = self.shared.load();
        let services = snapshot.services.iter();
        let readings: Vec<Reading<'_>> = services
            .map(|serving| Reading::of(&serving.service))
            .collect();
        let mut out = String::new();
        // Writing to a string cannot fail.
        write(&mut out, &readings, snapshot.access_log.as_ref()).ok();
        write_metrics(&mut out, &snapshot.directory, Instant::now()).ok();
        write_quic(&mut out, &snapshot).ok();
        write_memory(&mut out, snapshot.guards.memory.is_pressed()).ok();
        write_ledger(&mut out, snapshot.guards.ledger.counts()).ok();
        let profiles = snapshot.profiles.iter();
        let handshakes = profiles.map(|profile| (profile.name(), &profile.handshakes));
        count::write_metrics(&mut out, handshakes).ok();
        self.facts.write_metrics(&mut out, snapshot.generation).ok();
        out
    }

    /// Answers scrapes for ever.
    ///
    /// # Cancel safety
    /// Dropping the future drops the scrapes under way.
    pub(crate) async fn serve(self: Arc<Self>, bound: &Bound) -> io::Result<()> {
        let socket = bound.part_of(0)?.pop();
        let socket = socket.ok_or(io::ErrorKind::NotFound)?;
        let listener = TcpListener::from_std(socket.into())?;
        let mut scrapes = JoinSet::new();
        loop {
            while scrapes.try_join_next().is_some() {}
            if scrapes.len() >= SCRAPES_MAX {
                scrapes.join_next().await;
            }
            let (stream, _) = listener.accept().await?;
            let metrics = Arc::clone(&self);
            scrapes.spawn_local(async move {
                // A scraper that goes away or dawdles will be back.
                drop(timeout(SCRAPE_MS_MAX, metrics.answer(stream)).await);
            });
        }
    }

    async fn answer(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut request = Vec::new();
        while !request.windows(4).any(|window| window == b"\r\n\r\n") {
            if request.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        let (status, body) = if request.starts_with(b"GET /metrics ") {
            ("200 OK", self.text())
        } else {
            (
                "404 Not Found",
                "only GET /metrics is served here\n".to_owned(),
            )
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        stream.shutdown().await
    }
}

fn write(
    out: &mut String,
    readings: &[Reading<'_>],
    access_log: Option<&AccessLog>,
) -> std::fmt::Result {
    for (name, kind, help, value) in SINGLES {
        writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}")?;
        for reading in readings {
            writeln!(
                out,
                "{name}{{service=\"{}\"}} {}",
                reading.name,
                value(reading)
            )?;
        }
    }
    let name = "hopgate_requests_total";
    writeln!(
        out,
        "# HELP {name} Requests by the class of their answer.\n# TYPE {name} counter"
    )?;
    for reading in readings {
        for (class, count) in ["none", "1xx", "2xx", "3xx", "4xx", "5xx"]
            .iter()
            .zip(reading.answered)
        {
            writeln!(
                out,
                "{name}{{service=\"{}\",status=\"{class}\"}} {count}",
                reading.name
            )?;
        }
    }
    write_tiers(out, readings)?;
    write_refused(out, readings)?;
    write_hold_times(out, readings)?;
    if let Some(log) = access_log {
        let name = "hopgate_access_lines_dropped_total";
        writeln!(
            out,
            "# HELP {name} Access log lines lost to a slow disk.\n# TYPE {name} counter"
        )?;
        writeln!(out, "{name} {}", log.dropped())?;
    }
    Ok(())
}

fn write_memory(out: &mut String, pressed: bool) -> std::fmt::Result {
    let name = "hopgate_memory_pressed";
    writeln!(
        out,
        "# HELP {name} 1 while there is too little memory for new work.\n# TYPE {name} gauge\n{name} {}",
        u64::from(pressed)
    )
}

fn write_ledger(out: &mut String, (entered, dropped): (u64, u64)) -> std::fmt::Result {
    for (name, help, count) in [
        (
            "hopgate_unknown_outcomes_total",
            "Requests of which nobody can know what became of them",
            entered,
        ),
        (
            "hopgate_ledger_lines_dropped_total",
            "Those among them that were not written down: the disk could not follow",
            dropped,
        ),
    ] {
        writeln!(
            out,
            "# HELP {name} {help}.\n# TYPE {name} counter\n{name} {count}"
        )?;
    }
    Ok(())
}

fn write_tiers(out: &mut String, readings: &[Reading<'_>]) -> std::fmt::Result {
    let name = "hopgate_budget_tier_entered_total";
    writeln!(
        out,
        "# HELP {name} How often the budget of the held was used so far that a tier began.\n# TYPE {name} counter"
    )?;
    for reading in readings {
        let labels = ["park", "stop_reading", "stop_accepting", "refuse"];
        for (tier, count) in labels.iter().zip(reading.entered).skip(1) {
            let service = reading.name;
            writeln!(
                out,
                "{name}{{service=\"{service}\",tier=\"{tier}\"}} {count}"
            )?;
        }
    }
    Ok(())
}

fn write_refused(out: &mut String, readings: &[Reading<'_>]) -> std::fmt::Result {
    let name = "hopgate_refused_total";
    writeln!(
        out,
        "# HELP {name} Requests and connections refused by the proxy, by reason.\n# TYPE {name} counter"
    )?;
    for reading in readings {
        for (reason, count) in Reason::ALL.into_iter().zip(reading.refused) {
            let (service, reason) = (reading.name, reason.label());
            writeln!(
                out,
                "{name}{{service=\"{service}\",reason=\"{reason}\"}} {count}"
            )?;
        }
    }
    Ok(())
}

fn write_hold_times(out: &mut String, readings: &[Reading<'_>]) -> std::fmt::Result {
    let name = "hopgate_hold_seconds";
    writeln!(
        out,
        "# HELP {name} How long requests were held.\n# TYPE {name} histogram"
    )?;
    for Reading {
        name: service,
        times,
        ..
    } in readings
    {
        let mut sum = 0;
        for (most, count) in HOLD_BUCKETS_MS.iter().zip(&times.buckets) {
            sum += count;
            #[allow(clippy::cast_precision_loss)] // bucket bounds are small
            let seconds = *most as f64 / 1000.0;
            writeln!(
                out,
                "{name}_bucket{{service=\"{service}\",le=\"{seconds}\"}} {sum}"
            )?;
        }
        sum += times.buckets[HOLD_BUCKETS_MS.len()];
        writeln!(
            out,
            "{name}_bucket{{service=\"{service}\",le=\"+Inf\"}} {sum}"
        )?;
        let (whole, part) = (times.sum_ns / 1_000_000_000, times.sum_ns % 1_000_000_000);
        writeln!(out, "{name}_sum{{service=\"{service}\"}} {whole}.{part:09}")?;
        writeln!(out, "{name}_count{{service=\"{service}\"}} {sum}")?;
    }
    Ok(())
}

/// Name, type, help and value of a metric with one sample an HTTP/3 listener.
type OfQuic = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Counts) -> &AtomicU64,
);

const OF_QUIC: [OfQuic; 7] = [
    (
        "hopgate_quic_connections",
        "gauge",
        "QUIC connections now",
        |counts| &counts.connections,
    ),
    (
        "hopgate_quic_handshakes_failed_total",
        "counter",
        "QUIC handshakes that did not end in a connection",
        |counts| &counts.handshakes_failed,
    ),
    (
        "hopgate_quic_retried_total",
        "counter",
        "QUIC clients asked to prove their address first",
        |counts| &counts.retried,
    ),
    (
        "hopgate_quic_refused_total",
        "counter",
        "QUIC connections refused",
        |counts| &counts.refused,
    ),
    (
        "hopgate_quic_datagrams_handed_total",
        "counter",
        "Datagrams handed to the worker they belong to",
        |counts| &counts.handed,
    ),
    (
        "hopgate_quic_datagrams_passed_total",
        "counter",
        "Datagrams passed on to the process before this one",
        |counts| &counts.passed,
    ),
    (
        "hopgate_quic_datagrams_lost_total",
        "counter",
        "Datagrams for nobody, or for somebody who could not follow",
        |counts| &counts.lost,
    ),
];

/// Listeners of one service are added up.
fn write_quic(out: &mut String, snapshot: &Snapshot) -> std::fmt::Result {
    let mut services: Vec<_> = snapshot.quic().map(|(service, _)| service).collect();
    services.dedup();
    for (name, kind, help, value) in OF_QUIC.iter().filter(|_| !services.is_empty()) {
        writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}")?;
        for service in &services {
            let own = snapshot.quic().filter(|(owner, _)| owner == service);
            let counts = own.map(|(_, quic)| value(&quic.router.counts).load(Ordering::Relaxed));
            let sum: u64 = counts.sum();
            writeln!(out, "{name}{{service=\"{service}\"}} {sum}")?;
        }
    }
    Ok(())
}
