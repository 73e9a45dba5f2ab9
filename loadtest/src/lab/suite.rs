//! The one test command: every test of the workspace, then hops of real containers from end to end.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use cutover_protocol::hop::Phase;

use crate::bench::{self, case};
use crate::command::{Shell, kill_group};
use crate::interrupt;
use crate::lab::app::App;
use crate::lab::bad_input;
use crate::lab::error::{LabError, Result};
use crate::lab::folders::Folders;
use crate::lab::hold;
use crate::lab::hop::{Again, Engine};
use crate::lab::interop::{self, Times};
use crate::lab::kill::Victim;
use crate::lab::link::Link;
use crate::lab::place::{self, Place, Wish};
use crate::lab::setup;
use crate::lab::tunnel::Tunnel;
use crate::lab::writes::Writes;
use crate::progress::Progress;
use crate::report::{Memory, Report};
use crate::verdict::judge;

/// Longest the tests of the workspace may take, in seconds, their building included.
const WORKSPACE_S: u64 = 1800;

/// Last lines of the workspace's tests that are shown again when one of them failed.
const TAIL_LINES: usize = 80;

/// One end-to-end test: its name as a sentence, what is done, and what the report must show besides being green.
struct Case {
    name: &'static str,
    wish: Wish,
    shows: fn(&Report) -> std::result::Result<(), String>,
}

fn wish(app: App, clients: usize) -> Wish {
    let link = Link::shaped(800.0, 20, 0.1);
    Wish {
        app,
        clients,
        writes: Writes::Few,
        engine: Engine::Criu,
        place: Place::Auto,
        link,
        tunnel: Tunnel::None,
        fault: None,
        kill: None,
        cut: Vec::new(),
        again: Again::No,
    }
}

fn enough_ids(report: &Report) -> std::result::Result<(), String> {
    let ids = report.verdict.ids_acknowledged;
    match (ids >= 300, report.ids_while_holding > 0) {
        (false, _) => Err(format!("only {ids} ids were acknowledged")),
        (_, false) => Err("no id was sent while the gate held".into()),
        _ => Ok(()),
    }
}

fn carried(report: &Report, wanted: usize) -> std::result::Result<(), String> {
    // What is started anew has no connections to carry.
    let wanted = if report.engine == Engine::Criu.as_str() {
        wanted
    } else {
        0
    };
    match report.carried_connections.len() {
        count if count == wanted && report.all_carried() => Ok(()),
        count => Err(format!(
            "{count} connections from outside, {wanted} wanted, all of them whole"
        )),
    }
}

/// The kernel said which pages were written to, and little more than those the target lacked crossed while frozen.
fn tracked(report: &Report) -> std::result::Result<(), String> {
    let memory = report
        .hops
        .last()
        .map_or_else(Memory::default, |hop| hop.memory.clone());
    let most = memory.dirty_bytes * 103 / 100 + (64 << 10);
    match memory.tracking.as_str() {
        "soft-dirty" if memory.freeze_bytes <= most => Ok(()),
        "soft-dirty" => Err(format!(
            "{} bytes crossed while frozen, {most} at most were wanted",
            memory.freeze_bytes
        )),
        other => Err(format!("memory was tracked by {other}")),
    }
}

/// The clients of a guest send less, and an application that is started anew has no rounds.
fn slowed_down(report: &Report) -> std::result::Result<(), String> {
    if report.engine == Engine::Criu.as_str() && report.place == "host" {
        report.writes.came_and_went()
    } else {
        Ok(())
    }
}

fn nothing_more(_: &Report) -> std::result::Result<(), String> {
    Ok(())
}

/// `is_full` adds a hop in a virtual machine, which is slow where it has to be emulated.
fn cases(is_full: bool) -> Vec<Case> {
    let counter = wish(App::Counter, 50);
    let mut cases = vec![
        Case {
            name: "a counter hops with its memory under load",
            wish: counter.clone(),
            shows: enough_ids,
        },
        Case {
            name: "four counters hop, one of them with a file open that lost its name",
            wish: wish(App::Counters, 20),
            shows: nothing_more,
        },
        Case {
            name: "WordPress and its database hop under load",
            wish: wish(App::Wordpress, 20),
            shows: enough_ids,
        },
        Case {
            name: "WordPress hops through WireGuard, and database sessions from outside go on",
            wish: Wish {
                tunnel: Tunnel::Wireguard,
                ..wish(App::Wordpress, 20)
            },
            shows: |report| carried(report, 2),
        },
        Case {
            name: "a counter hops through WireGuard, and a WebSocket with a message a second goes on",
            wish: Wish {
                tunnel: Tunnel::Wireguard,
                ..counter.clone()
            },
            shows: |report| carried(report, 1),
        },
    ];
    cases.push(outrunning(&counter));
    cases.extend(disturbed(&counter));
    if is_full {
        // Not the last one: what is left out on this host is told by that.
        cases.insert(
            0,
            Case {
                name: "a counter hops in a guest whose kernel says which pages were written to",
                wish: Wish {
                    place: Place::Guest,
                    clients: 10,
                    ..counter.clone()
                },
                shows: tracked,
            },
        );
    }
    cases.push(Case {
        name: "a counter hops by clean stop and start",
        wish: Wish {
            engine: Engine::Restart,
            ..counter
        },
        shows: nothing_more,
    });
    cases
}

/// A hop whose clients write more than its link carries.
fn outrunning(counter: &Wish) -> Case {
    let link = Link::shaped(200.0, 20, 0.0);
    Case {
        name: "writes that outrun the link are slowed down, and free again after the hop",
        wish: Wish {
            link,
            writes: Writes::OutrunLink,
            ..counter.clone()
        },
        shows: slowed_down,
    }
}

/// Hops that something goes wrong in.
fn disturbed(counter: &Wish) -> [Case; 5] {
    [
        Case {
            name: "a hop that fails before its commit leaves the source serving, and the next one succeeds",
            wish: Wish {
                fault: Some("Verify".into()),
                again: Again::Yes,
                ..counter.clone()
            },
            shows: nothing_more,
        },
        Case {
            name: "a target agent killed before the commit leaves exactly one side serving",
            wish: Wish {
                kill: Some(Victim::TargetAgent),
                ..counter.clone()
            },
            shows: nothing_more,
        },
        Case {
            name: "what keeps the source's CRIU parked is killed, and exactly one side serves",
            wish: Wish {
                kill: Some(Victim::Shim),
                ..counter.clone()
            },
            shows: nothing_more,
        },
        Case {
            name: "a hop goes on over a link that is cut in its memory rounds and while the source is frozen",
            wish: Wish {
                cut: vec![Phase::PreCopy, Phase::Transfer],
                ..counter.clone()
            },
            shows: nothing_more,
        },
        Case {
            name: "WordPress hops over a link that is cut while all of it may have arrived",
            wish: Wish {
                cut: vec![Phase::Transfer],
                ..wish(App::Wordpress, 20)
            },
            shows: nothing_more,
        },
    ]
}

/// The tests that are no hop under load.
const WORKSPACE: &str = "the workspace's own tests";
const BAD_INPUT: &str = "bad input gets one clear line and an exit code, and changes nothing";
const CAN_FAIL: &str = "the harness can fail: a lost and a doubled id turn a verdict red";

const BENCHMARK: &str = "the benchmark measures all three proxies without an error";

/// Runs the tests whose name contains `filter` and prints, at the very end, one line of sums and again what failed.
/// True when all of them passed, and there was one.
///
/// # Errors
/// When the lab was interrupted, or is not root.
pub fn run(
    filter: &str,
    interop: &interop::Wish,
    folders: &Folders,
    progress: &Progress,
) -> Result<bool> {
    let wanted = |name: &str| name.contains(filter);
    setup::root()?;
    let (mut passed, mut failures) = (0, Vec::new());
    let mut count = |name: &str, outcome: std::result::Result<(), String>| match outcome {
        Ok(()) => {
            passed += 1;
            progress.say(format!("passed: {name}"));
        }
        Err(why) => {
            let failure = format!("FAILED: {name}: {why}");
            progress.say(&failure);
            failures.push(failure);
        }
    };
    if wanted(WORKSPACE) {
        count(WORKSPACE, workspace(folders, progress));
    }
    interop::run(interop, wanted, folders, progress, &mut count)?;
    let mut faithful = None;
    let is_full = interop.times == Times::FULL;
    for case in cases(is_full).into_iter().filter(|case| wanted(case.name)) {
        if interrupt::requested() {
            return Err(LabError::Interrupted);
        }
        progress.say(format!("end to end: {}", case.name));
        let outcome = hop(&case, folders, progress).map(|report| {
            if case.wish.engine == Engine::Criu {
                faithful = Some(report);
            }
        });
        count(case.name, outcome);
    }
    if wanted(BAD_INPUT) {
        progress.say(format!("end to end: {BAD_INPUT}"));
        match bad_input::run(folders, progress) {
            Err(LabError::NoCriu { why }) => progress.say(format!(
                "left out: {BAD_INPUT}, for CRIU cannot checkpoint on this host ({why})"
            )),
            outcome => count(BAD_INPUT, outcome.map_err(|error| error.to_string())),
        }
    }
    if wanted(BENCHMARK) {
        progress.say(format!("end to end: {BENCHMARK}"));
        count(BENCHMARK, benchmark(folders, progress));
    }
    hold::run(
        interop.hopgate.as_ref(),
        wanted,
        folders,
        progress,
        &mut count,
    );
    if wanted(CAN_FAIL) {
        count(CAN_FAIL, harness_can_fail());
    }
    progress.done();
    say_left_out(faithful, progress);
    println!("{passed} passed, {} failed", failures.len());
    for failure in &failures {
        println!("{failure}");
    }
    Ok(failures.is_empty() && passed > 0)
}

/// One case, and why it is not what it should be.
fn hop(case: &Case, folders: &Folders, progress: &Progress) -> std::result::Result<Report, String> {
    let report = place::run(&case.wish, folders, progress).map_err(|error| error.to_string())?;
    println!("{}", report.table());
    if !report.is_green() {
        return Err(report.demands_unmet.join("; "));
    }
    (case.shows)(&report)?;
    Ok(report)
}

fn say_left_out(faithful: Option<Report>, progress: &Progress) {
    if let Some(report) =
        faithful.filter(|report| report.engine != Engine::Criu.as_str() || report.place != "host")
    {
        progress.say(format!(
            "left out: checkpoints on this host; the last hop ran in the {} with {}",
            report.place, report.engine
        ));
    }
}

/// One case, a fraction of a second for each proxy: enough to see that figures come out, too little to judge them.
fn benchmark(folders: &Folders, progress: &Progress) -> std::result::Result<(), String> {
    let cases = case::chosen(&["get-64".to_owned()]).map_err(str::to_owned)?;
    let options = bench::run::Options {
        cases,
        length: Duration::from_millis(200),
        rounds: 1,
        hopgate: None,
    };
    // A thread of its own, for the benchmark keeps to one core and the tests after it should not.
    let report = thread::scope(|scope| {
        let run = scope.spawn(|| {
            bench::run::run(&options, folders, progress, |case| {
                progress.aside(|| println!("{}", case.table()));
            })
        });
        run.join()
    });
    let report = report
        .map_err(|_| "the benchmark's thread ended".to_owned())?
        .map_err(|error| error.to_string())?;
    let rows: Vec<serde_json::Value> = report
        .json()
        .and_then(|text| serde_json::from_str(&text))
        .map_err(|error| error.to_string())?;
    let positive =
        |row: &serde_json::Value, key: &str| row[key].as_f64().is_some_and(|value| value > 0.0);
    let whole = rows.iter().all(|row| {
        [
            "cpu_us_per_request",
            "requests_per_s",
            "p50_ms",
            "p99_ms",
            "rss_bytes",
        ]
        .iter()
        .all(|key| positive(row, key))
    });
    if rows.len() == 3 && whole && report.is_clean() {
        Ok(())
    } else {
        Err(format!("{rows:?}"))
    }
}

/// Spoils a faithful run on purpose: a harness that stays green then proves nothing.
fn harness_can_fail() -> std::result::Result<(), String> {
    use crate::record::{Asked, Outcome, Record};
    let record = |id: &str| Record {
        client: 0,
        asked: Asked::Add(id.to_owned()),
        sent_at: Duration::ZERO,
        ended_at: Duration::ZERO,
        outcome: Outcome::Answered(201),
    };
    let records = ["a", "b"].map(record);
    let stored = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    let verdicts = [
        judge(&records, &stored(&["a", "b"])),
        judge(&records, &stored(&["a"])),
        judge(&records, &stored(&["a", "b", "b"])),
    ];
    match verdicts.map(|verdict| (verdict.ok, verdict.lost, verdict.doubled)) {
        [(true, 0, 0), (false, 1, 0), (false, 0, 1)] => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// Passes the lines on as they come and returns the last of them: nextest says there what failed, and how.
fn pass_on(lines: impl Read) -> String {
    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    for line in BufReader::new(lines)
        .split(b'\n')
        .map_while(|line| line.ok())
    {
        let line = String::from_utf8_lossy(&line).into_owned();
        eprintln!("{line}");
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    Vec::from(tail).join("\n")
}

/// Every test of the workspace, with nextest where it is installed; its output is passed on as it comes.
fn workspace(folders: &Folders, progress: &Progress) -> std::result::Result<(), String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let manifest = folders.workspace.join("Cargo.toml");
    let shell = |words: &[&str]| {
        Shell::new(&cargo)
            .path(&path)
            .args(words)
            .arg("--manifest-path")
            .arg(&manifest)
    };
    let nextest = Shell::new(&cargo)
        .path(&path)
        .args(["nextest", "--version"])
        .succeeds();
    let runs = if nextest {
        vec![
            shell(&[
                "nextest",
                "run",
                "--workspace",
                "--no-fail-fast",
                "--failure-output",
                "immediate-final",
            ]),
            shell(&["test", "--workspace", "--doc", "--quiet"]),
        ]
    } else {
        vec![shell(&["test", "--workspace", "--no-fail-fast"])]
    };
    for run in runs {
        progress.say(format!("running {}", run.line()));
        let mut command = run.prepare();
        command.stdout(Stdio::inherit()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        let errors = child.stderr.take();
        let tail = thread::spawn(move || errors.map(pass_on).unwrap_or_default());
        let mut status = None;
        interrupt::wait_until(Duration::from_secs(WORKSPACE_S), || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        match status {
            Some(status) if status.success() => {}
            Some(status) => {
                let tail = tail.join().unwrap_or_default();
                return Err(format!("the tests ended with {status}\n{tail}"));
            }
            None => {
                kill_group(&mut child);
                return Err(format!("the tests did not end within {WORKSPACE_S} s"));
            }
        }
    }
    Ok(())
}
