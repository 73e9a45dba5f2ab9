//! One run of the benchmark: for each case all proxies at once, loaded one after the other in every round, so that
//! whatever else the machine does hits all of them alike. It leaves nothing running behind.

use std::path::PathBuf;
use std::time::Duration;

use crate::bench::case::{Case, Load};
use crate::bench::certificate;
use crate::bench::cores::{Ahead, Cores, on_core};
use crate::bench::figures::{Figures, Measured, Proxy};
use crate::bench::measure;
use crate::bench::origin::Addresses;
use crate::bench::peer::{Peer, Place};
use crate::bench::report::{CaseReport, Report};
use crate::bench::tools;
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::packages::Need;
use crate::lab::process::Process;
use crate::lab::programs;
use crate::progress::Progress;

/// Longest the origin may take to listen, in seconds.
const ORIGIN_S: u64 = 10;

/// What to measure, and for how long.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cases.
    pub cases: Vec<Case>,
    /// Length of each measurement.
    pub length: Duration,
    /// Measurements of each proxy in each case.
    pub rounds: usize,
    /// A `hopgate-proxy` to measure instead of the one of this checkout.
    pub hopgate: Option<PathBuf>,
}

/// Measures; `tell` hears of each case as soon as it is through.
///
/// # Errors
/// When the lab itself fails or is interrupted. A proxy that fails is part of the report.
pub fn run(
    options: &Options,
    folders: &Folders,
    progress: &Progress,
    mut tell: impl FnMut(&CaseReport),
) -> Result<Report> {
    let _alone = folders.lock("bench")?;
    let place = prepare(tools::PEERS, options.hopgate.as_ref(), folders, progress)?;
    let _ahead = Ahead::take();
    let (origin, addresses) = start_origin(&place)?;
    let mut report = Report::default();
    for (number, case) in options.cases.iter().enumerate() {
        let label = format!("{} ({} of {})", case.name, number + 1, options.cases.len());
        let series = Series {
            case: *case,
            options,
            place: &place,
            origin: addresses,
            progress,
            label,
        };
        let results = series.measure()?;
        let done = CaseReport {
            case: *case,
            results,
        };
        tell(&done);
        report.cases.push(done);
    }
    drop(origin);
    Ok(report)
}

/// Everything between a bare machine and the first measurement.
///
/// # Errors
/// When packages or the build fail, or there is only one core.
pub fn prepare(
    needs: &[Need],
    hopgate: Option<&PathBuf>,
    folders: &Folders,
    progress: &Progress,
) -> Result<Place> {
    tools::install(needs, folders, progress)?;
    let hopgate = match hopgate {
        Some(given) => given.canonicalize().on("find", given)?,
        None => programs::proxy(folders, progress)?,
    };
    let run = folders.lab.join("bench");
    if run.exists() {
        std::fs::remove_dir_all(&run).on("remove", &run)?;
    }
    std::fs::create_dir_all(&run).on("create", &run)?;
    certificate::write(&run)?;
    let cores = Cores::find()?;
    cores.leave_to_proxy()?;
    Ok(Place {
        templates: folders.workspace.join("configs/lab/bench"),
        run,
        hopgate,
        lab: folders.program.clone(),
        cores,
    })
}

/// Starts the origin beside the client.
///
/// # Errors
/// When it does not come up.
pub fn start_origin(place: &Place) -> Result<(Process, Addresses)> {
    let shell = on_core(place.cores.rest, &place.lab.display().to_string()).arg("bench-origin");
    let mut process = Process::start("origin", &shell, &place.run)?;
    let log = place.run.join("origin.log");
    let mut found = None;
    process.wait_ready(Duration::from_secs(ORIGIN_S), || {
        found = std::fs::read_to_string(&log)
            .ok()
            .and_then(|text| Addresses::read(&text));
        found.is_some()
    })?;
    let addresses = found.ok_or_else(|| LabError::Output {
        program: "the origin",
        what: "no addresses".into(),
    })?;
    Ok((process, addresses))
}

/// All measurements of one case.
struct Series<'a> {
    case: Case,
    options: &'a Options,
    place: &'a Place,
    origin: Addresses,
    progress: &'a Progress,
    label: String,
}

impl Series<'_> {
    fn measure(&self) -> Result<Vec<(Proxy, Figures)>> {
        let mut peers = Vec::new();
        for proxy in Proxy::ALL {
            peers.push(Contestant {
                proxy,
                peer: tolerate(self.start(proxy))?,
                measured: Vec::new(),
            });
        }
        let count = peers.len();
        for round in 0..self.options.rounds {
            for turn in 0..count {
                // Another one begins each round, so that nobody always follows the same neighbour.
                let contestant = &mut peers[(round + turn) % count];
                if contestant.peer.is_err() {
                    continue;
                }
                self.renew(contestant)?;
                let Ok(peer) = &mut contestant.peer else {
                    continue;
                };
                self.progress.now(format!(
                    "{}: round {} of {}, {}",
                    self.label,
                    round + 1,
                    self.options.rounds,
                    contestant.proxy.as_str()
                ));
                let once = measure::once(&self.case, peer, self.options.length, self.place);
                match tolerate(once)? {
                    Ok(measured) => contestant.measured.push(measured),
                    Err(why) => contestant.peer = Err(why),
                }
            }
        }
        let bulk = self.case.bulk_bytes();
        let figures = |contestant: Contestant| {
            let figures = match contestant.peer {
                Ok(_) => Figures::of(&contestant.measured, bulk),
                Err(why) => Figures::failed(why),
            };
            (contestant.proxy, figures)
        };
        Ok(peers.into_iter().map(figures).collect())
    }

    /// A proxy with idle connections is a new one each time: memory it once had would hide what the next ones take.
    fn renew(&self, contestant: &mut Contestant) -> Result<()> {
        if matches!(self.case.load, Load::Idle { .. }) && !contestant.measured.is_empty() {
            contestant.peer = Err("ended for a new one".into());
            contestant.peer = tolerate(self.start(contestant.proxy))?;
        }
        Ok(())
    }

    fn start(&self, proxy: Proxy) -> Result<Peer> {
        Peer::start(proxy, self.case.setup, self.origin, self.place)
    }
}

struct Contestant {
    proxy: Proxy,
    peer: std::result::Result<Peer, String>,
    measured: Vec<Measured>,
}

/// A failing proxy is a result; being interrupted is not.
fn tolerate<T>(outcome: Result<T>) -> Result<std::result::Result<T, String>> {
    match outcome {
        Ok(value) => Ok(Ok(value)),
        Err(_) if interrupt::requested() => Err(LabError::Interrupted),
        Err(error) => Ok(Err(error.to_string())),
    }
}
