//! One run of the lab: a world, its actors, load before, during and after a hop, and the verdict.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use cutover_protocol::hop::Phase;
use cutover_protocol::id::Site;

use crate::client::{Load, Profile};
use crate::interrupt::{self, pause, wait_until};
use crate::lab::actors::Actors;
use crate::lab::app::App;
use crate::lab::charon;
use crate::lab::cut::Cutter;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::evidence;
use crate::lab::folders::Folders;
use crate::lab::kill::{self, Victim};
use crate::lab::netns::SITES;
use crate::lab::traffic::Traffic;
use crate::lab::tunnel::{self, Tunnel};
use crate::lab::watch::{self, Seen, Watch};
use crate::lab::witness::Witness;
use crate::lab::world::{HOST, Parts, World};
use crate::lab::writes::{Slowing, Writes};
use crate::progress::Progress;
use crate::record::{ids_between, stall};
use crate::report::{HopReport, Kept, Report};
use crate::verdict::judge;

/// Load before the hop, in seconds: connections and caches are warm, and there is a rate to compare with.
const BEFORE_S: u64 = 3;
/// Load after the hop, in seconds.
const AFTER_S: u64 = 6;
/// Longest one hop may take, in seconds.
const HOP_S: u64 = 600;
/// Longest the gate may stay closed after a hop ended, in seconds: longer than its lease and the slowest undo.
const REOPEN_S: u64 = 60;

/// The place whose processor is emulated, about ten times slower.
const GUEST: &str = "guest";
/// Limits of the plans that such a processor cannot keep, and what replaces them.
const GUEST_LIMITS: &[(&str, &str)] = &[
    ("lease_ms = 10000", "lease_ms = 60000"),
    ("drain_ms_max = 5000", "drain_ms_max = 30000"),
    // Below the fixed cost of a switch: rounds go on for as long as they shrink.
    ("stall_ms_max = 2000", "stall_ms_max = 500"),
    ("timeout_ms = 10000", "timeout_ms = 60000"),
];

/// How containers are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Checkpoint and restore, with memory and connections.
    Criu,
    /// Clean stop, last files, start.
    Restart,
}

impl Engine {
    /// The word of plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Criu => "criu",
            Self::Restart => "restart",
        }
    }
}

/// Whether another hop follows one that was made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// One hop only.
    No,
    /// A second, undisturbed one, which must commit.
    Yes,
}

/// What one run does.
#[derive(Debug, Clone)]
pub struct Script {
    /// How many clients.
    pub clients: usize,
    /// What their writes do to memory.
    pub writes: Writes,
    /// The engine.
    pub engine: Engine,
    /// `host` or `guest`, for the report.
    pub place: &'static str,
    /// The tunnel between the sites.
    pub tunnel: Tunnel,
    /// Phase made to fail by the agent.
    pub fault: Option<String>,
    /// Process killed while the source is frozen.
    pub kill: Option<Victim>,
    /// Phases that the link is cut in.
    pub cut: Vec<Phase>,
    /// Whether a second hop follows.
    pub again: Again,
}

/// Builds everything, runs the script, and judges.
///
/// # Errors
/// When the lab itself could not do its part; a hop that fails is a report, not an error.
pub fn run(
    script: &Script,
    parts: &Parts,
    folders: &Folders,
    progress: &Progress,
) -> Result<Report> {
    let mut world = World::build(parts, folders, progress)?;
    progress.say(world.measured.to_string());
    adapt_plan(&world.run.path, script)?;
    let _charons = match script.tunnel {
        Tunnel::Ipsec => charon::start(&world)?,
        Tunnel::None | Tunnel::Wireguard => Vec::new(),
    };
    let mut actors = Actors::start(&world, folders)?;
    let outcome = with_load(script, &mut world, &mut actors, progress);
    if outcome.is_err() || outcome.as_ref().is_ok_and(|report| !report.is_green()) {
        keep_logs(&world.run.path, folders, progress);
    }
    outcome
}

/// The plan of `configs/`, with the engine that was asked for, what the clients' writes need, and the patience an emulated
/// processor needs.
fn adapt_plan(run: &Path, script: &Script) -> Result<()> {
    let path = run.join("plan.toml");
    let plan = fs::read_to_string(&path).on("read", &path)?;
    let mut plan = plan.replace(
        "engine = \"criu\"",
        &format!(
            "engine = \"{}\"\ntunnel = \"{}\"",
            script.engine.as_str(),
            script.tunnel.as_str()
        ),
    );
    plan = script.writes.adapt(plan);
    if script.place == GUEST {
        for (usual, slow) in GUEST_LIMITS {
            plan = plan.replace(usual, slow);
        }
    }
    fs::write(&path, plan).on("write", &path)
}

fn with_load(
    script: &Script,
    world: &mut World,
    actors: &mut Actors,
    progress: &Progress,
) -> Result<Report> {
    let edge = world.run.names.path("edge");
    let profile = profile(script, world.app);
    warm_up(world, &profile)?;
    let load = Load::start(profile, Some(&edge)).on("start clients in", &edge)?;
    let watch = Watch::start(world.run.path.join("proxy.sock"), load.began);
    progress.say(format!(
        "{} clients post ids and read pages",
        script.clients
    ));
    pause(Duration::from_secs(BEFORE_S));
    // Without a tunnel nothing carries such a connection.
    let carries = script.tunnel != Tunnel::None && script.engine == Engine::Criu;
    let witnesses = if carries {
        Witness::all(world)?
    } else {
        Vec::new()
    };
    let mut hops = Vec::new();
    let first = one_hop(script, true, world, actors, &watch, progress);
    let done = first.and_then(|report| {
        hops.push(report);
        if script.again == Again::Yes {
            pause(Duration::from_secs(1));
            hops.push(one_hop(script, false, world, actors, &watch, progress)?);
        }
        Ok(())
    });
    progress.now("the load goes on");
    pause(Duration::from_secs(if done.is_ok() { AFTER_S } else { 0 }));
    let counts = std::sync::Arc::clone(&load.counts);
    let records = load.stop().on("run clients in", &edge)?;
    done?;
    progress.say(format!(
        "load ended: {} sent, {} failed",
        counts.sent.load(Ordering::Relaxed),
        counts.failed.load(Ordering::Relaxed)
    ));
    let seen = watch.seen();
    drop(watch);
    let mut report = judge_all(script, world, actors, hops, &records, &seen)?;
    if report.committed && script.tunnel != Tunnel::None {
        report.late_clients_served = Some(tunnel::serves_late_clients(world));
        report.carried_connections = witnesses.into_iter().map(Witness::end).collect();
    }
    report.demands_unmet = demands_unmet(script, &report);
    Ok(report)
}

fn profile(script: &Script, app: App) -> Profile {
    // WordPress needs about 20 ms of processor for an id: this keeps two cores about half busy at 20 clients.
    let think_ms = match app {
        App::Wordpress => 400,
        App::Counter | App::Counters => 200,
    };
    let slower = match (script.place == GUEST, app) {
        (false, _) => 1,
        (true, App::Wordpress) => 12,
        (true, App::Counter | App::Counters) => 4,
    };
    let think_ms = think_ms * slower;
    let tag = format!("{:x}", std::process::id());
    Profile {
        clients: script.clients,
        think: Duration::from_millis(think_ms),
        address: SocketAddr::from(([127, 0, 0, 1], 8080)),
        host: HOST.to_owned(),
        add_path: app.add_path(),
        page_path: app.page_path(),
        tag,
    }
}

/// One page through the proxy, so that the first client does not pay for cold caches.
fn warm_up(world: &World, profile: &Profile) -> Result<()> {
    let bytes = crate::client::http::request(profile.page_path, &profile.host, None);
    let edge = world.run.names.path("edge");
    let fetch =
        || crate::client::http::fetch(profile.address, &bytes, Duration::from_secs(REOPEN_S));
    let answer = crate::lab::netns::within(&edge, fetch)?;
    let failed = |why: String| LabError::Http {
        what: format!("{} through the proxy", profile.page_path),
        why,
    };
    let answer = answer.map_err(|error| failed(error.to_string()))?;
    if answer.status == 200 {
        Ok(())
    } else {
        Err(failed(format!("status {}", answer.status)))
    }
}

fn one_hop(
    script: &Script,
    disturbed: bool,
    world: &mut World,
    actors: &mut Actors,
    watch: &Watch,
    progress: &Progress,
) -> Result<HopReport> {
    let number = if disturbed { 1 } else { 2 };
    let file = world.run.path.join(format!("hop-{number}.json"));
    let fault = script.fault.as_deref().filter(|_| disturbed);
    let victim = script.kill.filter(|_| disturbed);
    progress.say(match (fault, victim) {
        (Some(phase), _) => format!("hop {number}, with {phase} made to fail"),
        (_, Some(victim)) => {
            format!("hop {number}, with kill -9 of the {victim} while the source is frozen")
        }
        _ => format!("hop {number} from source to target"),
    });
    let command = actors.hop(&file, fault)?;
    let traffic = Traffic::watch(actors.agents[0].pid(), world, progress);
    let parked = Cell::new(false);
    let mut killed = None;
    let cut: &[_] = if disturbed { &script.cut } else { &[] };
    let cutter = Cutter::new(world.run.names, cut);
    let mut cutting = Ok(());
    let code = command.wait(
        Duration::from_secs(HOP_S),
        |line| {
            // The phase after the checkpoint begins: CRIU is parked with its tasks frozen.
            parked.set(parked.get() || line.starts_with("Transfer"));
            cutter.hear(line);
            progress.say(format!("  {line}"));
        },
        || {
            traffic.show(progress);
            cutting = cutter.tend(progress);
            if let (Some(victim), None, true) = (victim, killed, parked.get()) {
                kill::strike(victim, world, actors, progress);
                killed = Some(Instant::now());
            }
            // The command of a killed agent may not notice: the recovery below does not need it.
            cutting.is_ok() && killed.is_none_or(|at| at.elapsed() < Duration::from_secs(REOPEN_S))
        },
    )?;
    traffic.remember();
    cutting.and_then(|()| cutter.end(code == Some(0)))?;
    if let Some(victim) = victim.filter(|_| killed.is_some()) {
        kill::recover(victim, world, actors, progress)?;
    }
    if !wait_until(Duration::from_secs(REOPEN_S), || watch.is_open()) && !interrupt::requested() {
        progress.say("the gate did not open again");
    }
    let read = fs::read_to_string(&file)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok());
    let outcome = match code {
        Some(0) => "committed",
        Some(3) => "undone",
        _ => "unfinished",
    };
    Ok(read.unwrap_or_else(|| HopReport {
        outcome: outcome.to_owned(),
        ..HopReport::default()
    }))
}

/// When a hold ended; one that nobody saw end goes on for ever.
fn hold_end(hold: &(Duration, Option<Duration>)) -> Duration {
    hold.1.unwrap_or(Duration::MAX)
}

fn longest_hold(seen: &Seen) -> Duration {
    let bounded = |hold| hold_end(hold).min(Duration::from_secs(HOP_S));
    let lengths = seen
        .holds
        .iter()
        .map(|hold| bounded(hold).saturating_sub(hold.0));
    lengths.max().unwrap_or_default()
}

fn judge_all(
    script: &Script,
    world: &World,
    actors: &Actors,
    hops: Vec<HopReport>,
    records: &[crate::record::Record],
    seen: &Seen,
) -> Result<Report> {
    let (owner, serving) = serving(world);
    // What is stored is read wherever the register says it must be, also when something else went wrong.
    let site = SITES
        .iter()
        .position(|site| owner.is_some_and(|owner| owner.as_str() == *site))
        .unwrap_or(0);
    let stored = evidence::ids(world, site).map_err(|error| {
        let agents = [actors.agents[0].said(), actors.agents[1].said()];
        LabError::Http {
            what: format!("reading ids at the {}", SITES[site]),
            why: format!("{error}; agents said: {agents:?}"),
        }
    })?;
    let kept = match script.engine {
        Engine::Criu => evidence::connection(world, site)?,
        Engine::Restart => Kept::NotApplicable,
    };
    let last = hops.last().cloned().unwrap_or_default();
    Ok(Report {
        verdict: judge(records, &stored),
        stall_ms_max: u64::try_from(stall(records).as_millis()).unwrap_or(u64::MAX),
        hold_ms: u64::try_from(longest_hold(seen).as_millis()).unwrap_or(u64::MAX),
        phases: last.phases.clone(),
        rounds: last.rounds.clone(),
        engine: script.engine.as_str().to_owned(),
        place: script.place.to_owned(),
        app: world.app,
        clients: script.clients,
        committed: owner == Some(Site::Target),
        serving: serving.to_owned(),
        cause: last.cause.clone(),
        fault: script
            .fault
            .clone()
            .or_else(|| script.kill.map(|victim| format!("kill {victim}"))),
        ids_while_holding: seen
            .holds
            .iter()
            .map(|hold| ids_between(records, hold.0, hold_end(hold)))
            .sum(),
        writes: Slowing::of(&last, seen),
        requests_held: seen.last.as_ref().map_or(0, |status| status.held),
        database_connection: kept,
        database_connection_survived: match kept {
            Kept::NotApplicable => None,
            Kept::Survived => Some(true),
            Kept::Broken => Some(false),
        },
        memory_intact: evidence::memory_intact(world, site)?,
        link: world.measured.clone(),
        tunnel: tunnel::fare(actors, 0)?,
        hops,
        carried_connections: Vec::new(),
        late_clients_served: None,
        demands_unmet: Vec::new(),
    })
}

/// The proxy's register, and who serves by it and by what really runs.
fn serving(world: &World) -> (Option<Site>, &'static str) {
    let status = watch::status(&world.run.path.join("proxy.sock"));
    let owner = status.map(|status| status.register.owner);
    let serving = match (evidence::running_at(world).as_slice(), owner) {
        ([one], Some(owner)) if SITES[*one] == owner.as_str() => SITES[*one],
        ([_, _], _) => "both",
        _ => "none",
    };
    (owner, serving)
}

/// What the script asks of a report and the report does not give.
fn demands_unmet(script: &Script, report: &Report) -> Vec<String> {
    let (verdict, mut unmet) = (&report.verdict, Vec::new());
    let mut demand = |holds: bool, what: &str| {
        if !holds {
            unmet.push(what.to_owned());
        }
    };
    demand(
        verdict.lost + verdict.doubled + verdict.unknown == 0,
        "every acknowledged id is stored exactly once",
    );
    demand(
        matches!(report.serving.as_str(), "source" | "target"),
        "exactly one side serves",
    );
    demand(
        report.memory_intact != Some(false),
        "the counter's memory is whole",
    );
    // A killed process may cost requests their answer; it must never cost an answer its effect.
    if script.kill.is_none() {
        demand(verdict.ok, "every request is answered");
        demand(
            report.database_connection != Kept::Broken,
            "the database connections survive",
        );
    }
    match (script.kill, &script.fault, script.again) {
        (None, None, _) | (None, Some(_), Again::Yes) => demand(
            report.committed && report.serving == "target",
            "the hop is committed",
        ),
        (None, Some(_), Again::No) => demand(
            !report.committed && report.serving == "source",
            "the source serves again",
        ),
        (Some(_), _, Again::No) => {}
        (Some(_), _, Again::Yes) => demand(report.committed, "the hop after the kill is committed"),
    }
    let first = report.hops.first().map(|hop| hop.outcome.as_str());
    if script.fault.is_some() {
        demand(first == Some("undone"), "the faulted hop is undone");
    }
    if script.tunnel != Tunnel::None && report.committed {
        // A source agent that was killed counts anew, and its new tunnel may have carried little.
        let counted = script.kill.is_some() || report.went_through_tunnel(script.tunnel);
        demand(counted, "the bytes went through the tunnel");
        demand(
            report.late_clients_served != Some(false),
            "late clients are served through the source",
        );
        demand(report.all_carried(), "the connections from outside go on");
    }
    unmet
}

/// Where they are kept, below the cache folder.
pub const LOGS: &str = "last-logs";

/// Logs outlive a run that was not green, for looking into it.
fn keep_logs(run: &Path, folders: &Folders, progress: &Progress) {
    let kept = folders.lab.join(LOGS);
    let _ = fs::remove_dir_all(&kept);
    let logs: BTreeSet<PathBuf> = logs_below(run, 5).into_iter().collect();
    for log in logs {
        let to = kept.join(log.strip_prefix(run).unwrap_or(&log));
        if let Some(folder) = to.parent() {
            let _ = fs::create_dir_all(folder);
        }
        let _ = fs::copy(&log, &to);
    }
    progress.say(format!("logs are kept in {}", kept.display()));
}

fn logs_below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let (path, kind) = (entry.path(), entry.file_type());
        // Of the containers nothing but their configuration; of the agents' states everything, CRIU's logs most of all.
        let of_container = ["rootfs", "upper", "work", "volumes", "images"]
            .iter()
            .any(|name| path.ends_with(name));
        let skipped = of_container && !folder.ends_with("state");
        if kind.as_ref().is_ok_and(fs::FileType::is_dir) && depth > 0 && !skipped {
            found.extend(logs_below(&path, depth - 1));
        }
        if kind.is_ok_and(|kind| kind.is_file())
            && path
                .extension()
                .is_some_and(|end| end == "log" || end == "json" || end == "toml")
        {
            found.push(path);
        }
    }
    found
}
