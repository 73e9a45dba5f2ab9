//! `cargo lab bench freeze`: what crosses the link while clients wait, and for how long, over sizes, rates of writes,
//! ways of tracking and schedules.
//!
//! Each case is a hop of counters in a world of its own, on one link. It judges nothing that it did not see in that
//! very run: the limit is made of the run's own bytes, link and CRIU.

pub mod case;
pub mod report;

use std::path::Path;
use std::time::Duration;

use case::{Case, Mode};
use report::{Freeze, Row};

use crate::interrupt::pause;
use crate::lab::actors::Actors;
use crate::lab::app::ContainerKind;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::guest::{self, Job};
use crate::lab::link::Link;
use crate::lab::place::Place;
use crate::lab::programs;
use crate::lab::setup::{self, Checkpoints};
use crate::lab::world::{Parts, World};
use crate::lab::{evidence, netns};
use crate::progress::Progress;

/// Longest one hop may take.
const HOP_MAX: Duration = Duration::from_secs(600);
/// How long counters write before the hop, so that their hot pages are warm.
const WRITES: Duration = Duration::from_secs(2);

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cases.
    pub cases: Vec<Case>,
    /// How often all of them run, one after the other.
    pub times: u32,
    /// The link between the sites, in place of each case's own.
    pub link: Option<Link>,
    /// Where they run; wherever a guest is not asked for it is this machine.
    pub place: Place,
}

/// Runs every case in turn, handing each row to `each`.
///
/// # Errors
/// When the lab itself could not do its part, or a hop was not committed.
pub fn run(
    options: &Options,
    folders: &Folders,
    progress: &Progress,
    mut each: impl FnMut(&Row),
) -> Result<Vec<Row>> {
    setup::root()?;
    programs::build(folders, progress)?;
    let mut rows = Vec::new();
    for case in (0..options.times).flat_map(|_| &options.cases) {
        let link = options.link.unwrap_or_else(|| case.link());
        progress.say(format!("{case} over {link}"));
        let row = match options.place {
            Place::Guest => in_guest(case, link, folders, progress)?,
            Place::Host | Place::Auto => one(case, link, folders, progress)?,
        };
        each(&row);
        rows.push(row);
    }
    Ok(rows)
}

/// Each case has a guest of its own.
fn in_guest(case: &Case, link: Link, folders: &Folders, progress: &Progress) -> Result<Row> {
    let line = guest::quoted(&case.to_string());
    let job = Job {
        app: case.app(),
        link,
        words: format!(
            "inside-freeze --case {line} --mode {} --link {link}",
            case.mode
        ),
    };
    guest::result(&job, folders, progress)
}

/// The part of a case that runs inside the guest: its row is left on the shared folder.
///
/// # Errors
/// As for [`run`]; it is printed on the guest's console as well.
pub fn inside(case: &Case, link: Link, out: &Path, progress: &Progress) -> Result<()> {
    let row = Folders::find().and_then(|folders| one(case, link, &folders, progress));
    guest::told(row.and_then(|row| guest::leave(&row, out)))
}

fn one(case: &Case, link: Link, folders: &Folders, progress: &Progress) -> Result<Row> {
    let mut parts: Parts = setup::parts(case.app(), link, Checkpoints::Wanted, folders, progress)?;
    parts.arguments = case
        .counters
        .iter()
        .zip(ContainerKind::COUNTERS)
        .enumerate()
        .map(|(seed, (counter, kind))| (kind, counter.arguments(seed)))
        .collect();
    let world = World::build(&parts, folders, progress)?;
    adapt_plan(&world.run.path, case)?;
    let actors = Actors::start(&world, folders)?;
    pause(WRITES);
    let file = world.run.path.join("hop-1.json");
    let command = actors.hop(&file, None)?;
    let code = command.wait(HOP_MAX, |line| progress.now(line), || true)?;
    let freeze = read_report(&file)?;
    if code != Some(0) {
        let said = [actors.agents[0].said(), actors.agents[1].said()];
        return Err(LabError::Differs {
            what: format!(
                "{case}: the hop was not committed: {:?}; {said:?}",
                freeze.cause
            ),
        });
    }
    let intact = evidence::memory_intact(&world, 1)?;
    if intact != Some(true) {
        return Err(LabError::Differs {
            what: format!(
                "{case}: a counter's memory is damaged at the {}",
                netns::SITES[1]
            ),
        });
    }
    let mut row = Row::of(case, &freeze);
    row.agent_peak_bytes = [0, 1].map(|site| peak_bytes(actors.agents[site].pid()));
    Ok(row)
}

/// The most memory a process ever had resident, by the kernel's own count.
fn peak_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}

fn adapt_plan(run: &Path, case: &Case) -> Result<()> {
    let path = run.join("plan.toml");
    let plan = std::fs::read_to_string(&path).on("read", &path)?;
    let engine = "engine = \"criu\"";
    let chosen = format!(
        "{engine}\nmemory = \"{}\"\nschedule = \"{}\"",
        case.mode, case.schedule
    );
    let mut plan = plan.replace(engine, &chosen);
    if case.mode == Mode::None {
        plan = plan.replace("rounds_max = 4", "rounds_max = 0");
    }
    // Reading half a gigabyte back byte by byte takes its time, after everything that is measured.
    plan = plan
        .replace("timeout_ms = 10000", "timeout_ms = 60000")
        .replace("lease_ms = 10000", "lease_ms = 120000");
    std::fs::write(&path, plan).on("write", &path)
}

fn read_report(file: &Path) -> Result<Freeze> {
    let text = std::fs::read_to_string(file).on("read", file)?;
    serde_json::from_str(&text).map_err(|error| LabError::Output {
        program: "cutover-agent hop",
        what: error.to_string(),
    })
}
