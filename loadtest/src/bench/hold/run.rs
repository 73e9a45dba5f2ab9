//! One run of the hold's benchmark: case after case, each on a stage of its own. It leaves nothing running behind.

use std::path::PathBuf;
use std::time::Duration;

use crate::bench::certificate;
use crate::bench::cores::Ahead;
use crate::bench::hold::case::{self, Case, Play};
use crate::bench::hold::origin::{Options as OriginOptions, Spoil};
use crate::bench::hold::plan::{First, Group, Kind, Manner};
use crate::bench::hold::report::{CaseReport, Mark, Played, Report, Row};
use crate::bench::hold::scene::{Cast, Coming, Outcome, Scene, group};
use crate::bench::hold::stage::{Knobs, Place, Stage};
use crate::bench::hold::{crash, idle, leavers, published};
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::programs;
use crate::progress::Progress;

/// Requests of the mixed case's HTTP/2 connections at once.
const MIXED_STREAMS: usize = 10;
/// Clients that never pause, of each kind.
const STEADY: usize = 20;
/// How long an origin takes for a request, in microseconds, where only order and not capacity matters: longer than
/// what scheduling may put between two requests that were released one after the other.
const ORDER_WORK_US: u64 = 10_000;
/// The same where the time beyond the freeze matters: that of the proxy, not the origin's.
const QUICK_WORK_US: u64 = 1_000;
/// Workers of such an origin: more than any window.
const ORDER_WORKERS: usize = 4096;
/// The origin of known capacity: requests at once, and how long each takes.
const CAPACITY_WORKERS: usize = 80;
const CAPACITY_WORK_US: u64 = 20_000;
/// Requests at once on an HTTP/2 connection of that case.
const CAPACITY_STREAMS: usize = 100;
/// The last answer may come so much later than the capacity allows.
const CAPACITY_SLACK: f64 = 1.15;
/// What the proxy counts for the held may be so far from what it has grown by, as a share of that.
const COUNT_OFF_MAX: f64 = 0.25;
/// Client processes that share 100,000 streams.
const STREAMS_PROCESSES: usize = 4;
const STREAMS_MANY: usize = 50_000;

/// What to play.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cases.
    pub cases: Vec<Case>,
    /// Clients in place of the cases' own number.
    pub clients: Option<usize>,
    /// Time of standing still in place of the cases' own.
    pub freeze: Option<Duration>,
    /// A `hopgate-proxy` in place of the one of this checkout.
    pub hopgate: Option<PathBuf>,
}

/// Plays; `tell` hears of each case as soon as it is through.
///
/// # Errors
/// When the lab itself fails or is interrupted. A case that fails is part of the report.
pub fn run(
    options: &Options,
    folders: &Folders,
    progress: &Progress,
    mut tell: impl FnMut(&CaseReport),
) -> Result<Report> {
    let _alone = folders.lock("bench")?;
    let place = prepare(options.hopgate.as_ref(), folders, progress)?;
    let _ahead = Ahead::take();
    let mut report = Report::default();
    for case in &options.cases {
        let scene = Scene {
            case,
            clients: options.clients.unwrap_or(case.clients).max(1),
            freeze: options.freeze.unwrap_or(case.freeze),
            place: &place,
            progress,
        };
        let played = match play(&scene) {
            Ok(played) => Ok(played),
            Err(_) if interrupt::requested() => return Err(LabError::Interrupted),
            Err(error) => Err(error.to_string()),
        };
        let done = CaseReport {
            name: case.name,
            title: case.title,
            played,
        };
        tell(&done);
        report.cases.push(done);
    }
    Ok(report)
}

/// Everything between a checkout and the first case.
///
/// # Errors
/// When the build fails.
pub fn prepare(hopgate: Option<&PathBuf>, folders: &Folders, progress: &Progress) -> Result<Place> {
    let hopgate = match hopgate {
        Some(given) => given.canonicalize().on("find", given)?,
        None => programs::proxy(folders, progress)?,
    };
    let run = folders.lab.join("hold");
    if run.exists() {
        std::fs::remove_dir_all(&run).on("remove", &run)?;
    }
    std::fs::create_dir_all(&run).on("create", &run)?;
    certificate::write(&run)?;
    Ok(Place {
        folders: folders.clone(),
        run,
        hopgate,
    })
}

fn play(scene: &Scene<'_>) -> Result<Played> {
    match scene.case.play {
        Play::Mixed => mixed(scene),
        Play::One {
            kind,
            streams,
            bytes_max,
        } => one(scene, kind, streams, bytes_max),
        Play::Every { spoil } => every(scene, spoil),
        Play::Capacity => capacity(scene),
        Play::Leavers => leavers::play(scene),
        Play::Idle => idle::play(scene),
        Play::Crash { times } => crash::play(scene, times),
        Play::Published => published::play(scene),
    }
}

/// An origin that is quick.
#[must_use]
pub const fn quick() -> OriginOptions {
    OriginOptions {
        work_us: QUICK_WORK_US,
        ..in_order()
    }
}

/// An origin that shows in which order requests came.
#[must_use]
pub const fn in_order() -> OriginOptions {
    OriginOptions {
        workers: ORDER_WORKERS,
        work_us: ORDER_WORK_US,
        spoil: Spoil::Nothing,
    }
}

fn steady(stage: &Stage, kinds: &[Kind]) -> Vec<Group> {
    let of = |kind: &Kind| Group {
        manner: Manner::Steady,
        ..group(stage, *kind, STEADY)
    };
    kinds.iter().map(of).collect()
}

fn row(scene: &Scene<'_>, clients: usize, outcome: &Outcome) -> Row {
    Row {
        bytes_per_held: outcome.bytes_per_held,
        peak_concurrency: Some(outcome.peak),
        ..Row::of("hopgate", scene.case.name, clients, &outcome.tally)
    }
}

fn mixed(scene: &Scene<'_>) -> Result<Played> {
    let mut stage = Stage::start(scene.case.name, scene.place, in_order(), Knobs::default())?;
    let h2 = scene.clients / 30;
    let tls = scene.clients * 45 / 100;
    let clear = scene.clients - tls - h2;
    let asking = |kind, connections, streams| Group {
        streams,
        first: First::Ask,
        ..group(&stage, kind, connections)
    };
    let cast = Cast {
        waves: vec![
            asking(Kind::Clear, clear, 1),
            asking(Kind::Tls, tls, 1),
            asking(Kind::H2, h2, MIXED_STREAMS),
        ],
        processes_min: 1,
        steady: steady(&stage, &[Kind::Clear, Kind::Tls, Kind::H2]),
        coming: Coming::Before,
        window: Knobs::default().window_max,
    };
    let outcome = scene.waves(&mut stage, &cast)?;
    let row = row(scene, scene.clients, &outcome);
    Ok(Played {
        marks: vec![Mark::exact(&row)],
        rows: vec![row],
        faults: outcome.faults,
    })
}

/// A short run with an origin that does what `spoil` says.
///
/// # Errors
/// When something of the lab fails or is interrupted, or the proxy ends or refuses a command.
pub fn short(
    spoil: Spoil,
    hopgate: Option<&PathBuf>,
    folders: &Folders,
    progress: &Progress,
) -> Result<Played> {
    let _alone = folders.lock("bench")?;
    let place = prepare(hopgate, folders, progress)?;
    let case = case::short(spoil);
    play(&Scene {
        case: &case,
        clients: case.clients,
        freeze: case.freeze,
        place: &place,
        progress,
    })
}

fn every(scene: &Scene<'_>, spoil: Spoil) -> Result<Played> {
    let origin = OriginOptions {
        spoil,
        ..in_order()
    };
    let mut stage = Stage::start(scene.case.name, scene.place, origin, Knobs::default())?;
    let each = (scene.clients / Kind::ALL.len()).max(1);
    let waves = Kind::ALL.map(|kind| match kind {
        // Many at once on fewer connections.
        Kind::H2 | Kind::H3 => Group {
            streams: MIXED_STREAMS,
            ..group(&stage, kind, each.div_ceil(MIXED_STREAMS))
        },
        _ => Group {
            first: First::Ask,
            ..group(&stage, kind, each)
        },
    });
    let cast = Cast {
        waves: waves.to_vec(),
        processes_min: 1,
        steady: steady(&stage, &Kind::ALL),
        coming: Coming::Before,
        window: Knobs::default().window_max,
    };
    let outcome = scene.waves(&mut stage, &cast)?;
    let row = row(scene, scene.clients, &outcome);
    Ok(Played {
        marks: vec![Mark::exact(&row)],
        rows: vec![row],
        faults: outcome.faults,
    })
}

fn one(scene: &Scene<'_>, kind: Kind, streams: usize, bytes_max: u32) -> Result<Played> {
    let mut stage = Stage::start(scene.case.name, scene.place, in_order(), Knobs::default())?;
    let connections = (scene.clients / streams).max(1);
    let cast = Cast {
        waves: vec![Group {
            more: streams - 1,
            ..group(&stage, kind, connections)
        }],
        processes_min: if scene.clients >= STREAMS_MANY {
            STREAMS_PROCESSES
        } else {
            1
        },
        steady: Vec::new(),
        coming: Coming::Held,
        window: Knobs::default().window_max,
    };
    let outcome = scene.waves(&mut stage, &cast)?;
    let row = row(scene, connections, &outcome);
    let mut marks = vec![Mark::exact(&row)];
    if bytes_max > 0 {
        let most = f64::from(bytes_max);
        let what = "memory of a held request";
        marks.push(Mark::at_most(what, row.bytes_per_held, most, "bytes"));
    }
    let share = outcome.counted_per_held.zip(row.bytes_per_held);
    let off = share.map(|(counted, grown)| (counted / grown - 1.0).abs());
    let what = "the proxy's own count, off by";
    marks.push(Mark::at_most(what, off, COUNT_OFF_MAX, "of it"));
    Ok(Played {
        marks,
        rows: vec![row],
        faults: outcome.faults,
    })
}

fn capacity(scene: &Scene<'_>) -> Result<Played> {
    let origin = OriginOptions {
        workers: CAPACITY_WORKERS,
        work_us: CAPACITY_WORK_US,
        spoil: Spoil::Nothing,
    };
    let knobs = Knobs {
        window_max: CAPACITY_WORKERS,
        ..Knobs::default()
    };
    let mut stage = Stage::start(scene.case.name, scene.place, origin, knobs)?;
    // A fifth of the requests are streams, whose order is known to their connection.
    let streams = scene.clients / 5;
    let cast = Cast {
        waves: vec![
            group(&stage, Kind::Clear, scene.clients - streams),
            Group {
                streams: CAPACITY_STREAMS.min(streams),
                ..group(&stage, Kind::H2, streams.div_ceil(CAPACITY_STREAMS))
            },
        ],
        processes_min: 1,
        steady: steady(&stage, &[Kind::Clear, Kind::Tls, Kind::H2]),
        coming: Coming::Held,
        window: CAPACITY_WORKERS,
    };
    let outcome = scene.waves(&mut stage, &cast)?;
    let connections = scene.clients - streams + streams.div_ceil(CAPACITY_STREAMS);
    let row = row(scene, connections, &outcome);
    let per_second = CAPACITY_WORKERS as f64 * 1e6 / CAPACITY_WORK_US as f64;
    let most = CAPACITY_SLACK * outcome.tally.held as f64 / per_second;
    let p99 = row.stall_beyond_freeze_ms_p99.map(|ms| ms / 1000.0);
    let peak = row.peak_concurrency.map(|peak| peak as f64);
    let marks = vec![
        Mark::exact(&row),
        Mark::in_order(&row),
        Mark::at_most("last answer", row.release_seconds, most, "s"),
        Mark::at_most("p99 beyond the freeze", p99, most, "s"),
        Mark::at_most(
            "at once at the target",
            peak,
            CAPACITY_WORKERS as f64,
            "requests",
        ),
    ];
    Ok(Played {
        marks,
        rows: vec![row],
        faults: outcome.faults,
    })
}
