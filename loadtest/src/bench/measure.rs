//! One measurement of one proxy: starts whoever makes the load, waits for it, and takes the proxy's memory. It judges
//! nothing.

use std::fs;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::bench::case::{Case, Load};
use crate::bench::cores::on_core;
use crate::bench::figures::Measured;
use crate::bench::http2;
use crate::bench::peer::{Peer, Place};
use crate::bench::plan::{Connection, Exchange, Opened, Plan, Sample};
use crate::command::Shell;
use crate::interrupt;
use crate::lab::error::{LabError, Result};
use crate::lab::process::Process;

/// The warm-up is this part of the measured time, and at most a second.
const WARM_UP_DIVISOR: f64 = 4.0;
/// Longest a client may run beyond its plan, in seconds: connecting, and waiting for the last answers.
const CLIENT_EXTRA_S: u64 = 60;
/// Longest the opening of idle connections may take, in seconds: ten thousand handshakes on a busy machine.
const OPEN_S: u64 = 90;
/// How long connections stay idle before memory is looked at, in seconds: time to give buffers back.
const SETTLE_S: u64 = 2;
/// Idle connections that are being opened at the same time.
const OPEN_AT_ONCE: usize = 64;
/// Size of the answer an idle connection had, in bytes.
const IDLE_ANSWER_BYTES: u64 = 64;

/// Measures `case` once on `peer` for about `length`.
///
/// # Errors
/// When the load cannot be made, or the proxy ends.
pub fn once(case: &Case, peer: &mut Peer, length: Duration, place: &Place) -> Result<Measured> {
    let measured = match case.load {
        Load::Closed {
            connections,
            exchange,
        } => {
            let plan = plan(case, peer, connections, exchange, length);
            under_load(closed(&plan, place)?, peer)
        }
        Load::Http2 {
            connections,
            streams,
            bytes,
        } => {
            let shape = http2::Shape {
                connections,
                streams,
                bytes,
            };
            under_load(http2::measure(peer, shape, length, place)?, peer)
        }
        Load::Idle { connections } => {
            let exchange = Exchange::Get {
                bytes: IDLE_ANSWER_BYTES,
                connection: Connection::Kept,
            };
            idle(
                &plan(case, peer, connections, exchange, length),
                peer,
                place,
            )?
        }
    };
    match peer.death() {
        Some(what) => Err(LabError::Differs { what }),
        None => Ok(measured),
    }
}

fn under_load(sample: Sample, peer: &Peer) -> Measured {
    Measured::Load {
        sample,
        rss_bytes: peer.resident_bytes(),
    }
}

fn plan(
    case: &Case,
    peer: &Peer,
    connections: usize,
    exchange: Exchange,
    length: Duration,
) -> Plan {
    let warm_up = length.div_f64(WARM_UP_DIVISOR).min(Duration::from_secs(1));
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Plan {
        address: peer.address,
        transport: case.transport(),
        exchange,
        connections,
        warm_up_ms: milliseconds(warm_up),
        measured_ms: milliseconds(length),
        watched: peer.processes(),
    }
}

fn client(plan: &Plan, place: &Place) -> Result<Shell> {
    let text = serde_json::to_string(plan).map_err(|error| LabError::Output {
        program: "the lab",
        what: error.to_string(),
    })?;
    let lab = place.lab.display().to_string();
    Ok(on_core(place.cores.rest, &lab).args(["bench-client", "--plan", &text]))
}

fn read<T: DeserializeOwned>(said: &str) -> Result<T> {
    serde_json::from_str(said).map_err(|error| LabError::Output {
        program: "the client",
        what: format!("{error} in {said}"),
    })
}

fn closed(plan: &Plan, place: &Place) -> Result<Sample> {
    let planned = Duration::from_millis(plan.warm_up_ms + plan.measured_ms);
    let limit = planned + Duration::from_secs(CLIENT_EXTRA_S);
    read(&client(plan, place)?.within(limit).run()?)
}

fn idle(plan: &Plan, peer: &Peer, place: &Place) -> Result<Measured> {
    let before_bytes = peer.resident_bytes();
    let log = place.run.join("idle.log");
    let _ = fs::remove_file(&log);
    let shell = client(plan, place)?.args(["--hold", &OPEN_AT_ONCE.to_string()]);
    let mut holder = Process::start("idle", &shell, &place.run)?;
    let mut said = String::new();
    holder.wait_ready(Duration::from_secs(OPEN_S), || {
        said = fs::read_to_string(&log).unwrap_or_default();
        said.ends_with('\n')
    })?;
    let opened: Opened = read(&said)?;
    interrupt::pause(Duration::from_secs(SETTLE_S));
    let with_bytes = peer.resident_bytes();
    Ok(Measured::Idle {
        before_bytes,
        with_bytes,
        connections: (plan.connections as u64).saturating_sub(opened.errors),
        errors: opened.errors,
        first_error: opened.first_error,
    })
}
