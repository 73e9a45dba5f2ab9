//! The published arrangement, as its authors describe it, and Hopgate with the same clients: HAProxy before source,
//! target and a holding application (Flask, gunicorn, memcached) that asks the target how it is and then sends each
//! client there by 302. The clients follow as browsers do: what was a POST becomes a GET.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::hold::clock::now_ns;
use crate::bench::hold::crowd::Crowd;
use crate::bench::hold::judge::{Evidence, Released, judge};
use crate::bench::hold::plan::{First, Group, Kind, Manner, Posts, Redirects, Wave};
use crate::bench::hold::report::{Mark, Played, Row};
use crate::bench::hold::run::quick;
use crate::bench::hold::scene::{Cast, Coming, Scene, group};
use crate::bench::hold::site::Origin;
use crate::bench::hold::stage::{Knobs, Stage};
use crate::bench::{template, tools};
use crate::command::Shell;
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::packages::Need;
use crate::lab::process::Process;
use crate::lab::python;

/// What the arrangement consists of, as far as Debian has it.
const NEEDS: &[Need] = &[
    Need {
        program: "haproxy",
        package: "haproxy",
        why: "is the proxy of the published arrangement",
    },
    Need {
        program: "memcached",
        package: "memcached",
        why: "is what its holding application's workers share",
    },
    Need {
        program: "python3",
        package: "python3",
        why: "runs that application",
    },
];
/// The clients of its authors' larger experiments, where nothing else is wished.
const CLIENTS: [usize; 2] = [100, 400];
/// Half of our clients may wait no longer than this beyond the freeze, in milliseconds.
const STALL_MS_P50: f64 = 20.0;
/// Longest a program may take until it listens, in seconds.
const READY_S: u64 = 30;

/// Plays both with the same clients.
///
/// # Errors
/// When something of the lab fails or is interrupted, or the proxy ends or refuses a command.
pub fn play(scene: &Scene<'_>) -> Result<Played> {
    let folders = &scene.place.folders;
    let list = folders
        .workspace
        .join("loadtest/assets/published/requirements.txt");
    tools::install(NEEDS, folders, scene.progress)?;
    let python = python::environment("published", &list, folders, scene.progress)?;
    let numbers = if scene.clients == scene.case.clients {
        CLIENTS.to_vec()
    } else {
        vec![scene.clients]
    };
    let mut played = Played::default();
    for clients in numbers {
        let scene = Scene { clients, ..*scene };
        let ours = ours(&scene)?;
        let p50 = ours.stall_beyond_freeze_ms_p50;
        played.marks.push(Mark::exact(&ours));
        let what = format!("{clients} clients: p50 beyond the freeze");
        played
            .marks
            .push(Mark::at_most(&what, p50, STALL_MS_P50, "ms"));
        played.rows.push(ours);
        let (theirs, faults) = theirs(&scene, &python)?;
        played.rows.push(theirs);
        played.faults.extend(faults);
    }
    Ok(played)
}

/// Clients that post one id each before everything stands still, and one while it does.
const fn posting(address: SocketAddr, connections: usize) -> Group {
    Group {
        kind: Kind::Clear,
        address,
        connections,
        streams: 1,
        more: 0,
        posts: Posts::All,
        first: First::Ask,
        redirects: Redirects::Follow,
        manner: Manner::Waves,
    }
}

fn ours(scene: &Scene<'_>) -> Result<Row> {
    let name = format!("{}-{}", scene.case.name, scene.clients);
    let mut stage = Stage::start(&name, scene.place, quick(), Knobs::default())?;
    let waves = vec![posting(
        group(&stage, Kind::Clear, 1).address,
        scene.clients,
    )];
    let cast = Cast {
        waves,
        processes_min: 1,
        steady: Vec::new(),
        coming: Coming::Before,
        window: Knobs::default().window_max,
    };
    let outcome = scene.waves(&mut stage, &cast)?;
    Ok(Row::of("hopgate", &name, scene.clients, &outcome.tally))
}

/// The published arrangement, running.
struct Arrangement {
    source: Origin,
    target: Origin,
    haproxy: Process,
    _holding: Process,
    _memcached: Process,
    address: SocketAddr,
    commands: std::path::PathBuf,
}

impl Arrangement {
    fn start(scene: &Scene<'_>, python: &Path, folder: &Path) -> Result<Self> {
        let lab = &scene.place.folders.program;
        let source = Origin::start("source", quick(), lab, folder)?;
        let target = Origin::start("target", quick(), lab, folder)?;
        source.become_ready()?;
        let [address, holding_address, cache_address] = free(folder)?;
        let cache = Shell::new("memcached")
            .args(["-l", "127.0.0.1", "-U", "0", "-u", "root", "-p"])
            .arg(cache_address.port().to_string());
        let memcached = listening("memcached", &cache, cache_address, folder)?;
        let application = Shell::new(python)
            .args(["-m", "gunicorn", "--workers", "2", "--threads", "4"])
            .args(["--timeout", "120", "--chdir"])
            .arg(
                scene
                    .place
                    .folders
                    .workspace
                    .join("loadtest/assets/published"),
            )
            .args(["--bind", &holding_address.to_string(), "holding:app"])
            .env("TARGET", format!("http://{}", target.addresses.http))
            .env("MEMCACHED", cache_address.to_string());
        let holding = listening("holding", &application, holding_address, folder)?;
        let config = folder.join("haproxy.cfg");
        let templates = scene.place.folders.workspace.join("configs/lab/bench");
        let values = [
            ("folder", folder.display().to_string()),
            ("listen", address.to_string()),
            ("source", source.addresses.http.to_string()),
            ("target", target.addresses.http.to_string()),
            ("holding", holding_address.to_string()),
        ];
        let values = values
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        template::write(&templates.join("hold-published.cfg"), &config, &values)?;
        let proxy = Shell::new("haproxy").args(["-db", "-f"]).arg(&config);
        let haproxy = listening("haproxy", &proxy, address, folder)?;
        Ok(Self {
            source,
            target,
            haproxy,
            _holding: holding,
            _memcached: memcached,
            address,
            commands: folder.join("haproxy.sock"),
        })
    }

    /// Gives HAProxy a command, and returns what it says.
    fn command(&self, line: &str) -> Result<String> {
        use std::io::{Read, Write};
        let asked = || {
            let mut stream = UnixStream::connect(&self.commands)?;
            stream.set_read_timeout(Some(Duration::from_secs(READY_S)))?;
            writeln!(stream, "{line}")?;
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            std::io::Result::Ok(said)
        };
        asked().on("command", &self.commands)
    }

    /// Whether HAProxy has found that the target does not serve yet.
    fn knows_that_target_is_down(&self) -> bool {
        let state = self.command("show servers state app").unwrap_or_default();
        let line = state
            .lines()
            .find(|line| line.split(' ').nth(3) == Some("target"));
        // The sixth column is the operational state; zero is down.
        line.is_some_and(|line| line.split(' ').nth(5) == Some("0"))
    }
}

fn theirs(scene: &Scene<'_>, python: &Path) -> Result<(Row, Vec<String>)> {
    let folder = scene
        .place
        .run
        .join(format!("arrangement-{}", scene.clients));
    fs::create_dir_all(&folder).on("create", &folder)?;
    let mut arrangement = Arrangement::start(scene, python, &folder)?;
    let is_settled = interrupt::wait_until(Duration::from_secs(READY_S), || {
        arrangement.knows_that_target_is_down()
    });
    if !is_settled {
        return Err(LabError::NotInTime {
            what: "HAProxy's finding that the target is down".into(),
            seconds: READY_S,
            hint: String::new(),
        });
    }
    let groups = [posting(arrangement.address, scene.clients)];
    let lab = &scene.place.folders.program;
    let mut crowd = Crowd::start(&groups, 1, 0, lab, &folder)?;
    crowd.run("connect", scene.patience())?;
    arrangement.command("set server app/holding state ready")?;
    arrangement.command("set server app/source state maint")?;
    let since = Instant::now();
    crowd.run("send", scene.patience())?;
    scene.now("the published arrangement stands still");
    scene.pause(scene.freeze.saturating_sub(since.elapsed()))?;
    let asked_ns = now_ns();
    arrangement.target.become_ready()?;
    crowd.run("settle", scene.patience())?;
    let told = crowd.report(scene.patience())?;
    if !arrangement.haproxy.lives() {
        return Err(LabError::Differs {
            what: format!("HAProxy ended: {}", arrangement.haproxy.said()),
        });
    }
    let mut executions = arrangement.source.seen()?.executions;
    executions.extend(arrangement.target.seen()?.executions);
    let tally = judge(&Evidence {
        requests: &told.requests,
        executions: &executions,
        released: Some(Released {
            asked_ns,
            done_ns: asked_ns,
        }),
        window: Knobs::default().window_max,
    });
    let held = told
        .requests
        .iter()
        .filter(|request| request.wave == Wave::Held);
    let faults = vec![format!(
        "published: of {} writes sent while it stood still {} were never executed",
        held.count(),
        tally.verdict.lost + tally.verdict.failed
    )];
    let case = format!("{}-{}", scene.case.name, scene.clients);
    Ok((Row::of("published", &case, scene.clients, &tally), faults))
}

/// Starts a program and waits until it accepts connections.
fn listening(name: &str, shell: &Shell, address: SocketAddr, folder: &Path) -> Result<Process> {
    let mut process = Process::start(name, shell, folder)?;
    process.wait_ready(Duration::from_secs(READY_S), || {
        TcpStream::connect(address).is_ok()
    })?;
    Ok(process)
}

/// Three addresses that were free a moment ago.
fn free(folder: &Path) -> Result<[SocketAddr; 3]> {
    let bind = || TcpListener::bind("127.0.0.1:0").on("choose a port for", folder);
    // All three at once, so that they differ.
    let listeners = [bind()?, bind()?, bind()?];
    let address = |index: usize| {
        let listener: &TcpListener = &listeners[index];
        listener.local_addr().on("choose a port for", folder)
    };
    Ok([address(0)?, address(1)?, address(2)?])
}
