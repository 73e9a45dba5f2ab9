//! The command line of the agent. `serve` is the agent; everything else asks a serving agent over its socket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cutover_agent::config::{Config, load_plan};
use cutover_agent::control::{self, Checked, Command, Line, Status};
use cutover_agent::criu::shim::ParkAt;
use cutover_agent::names::OldDoor;
use cutover_agent::report::{Outcome, Progress, Report};
use cutover_agent::{criu, pki, serve};
use cutover_protocol::door::Closing;
use cutover_protocol::hop::Phase;
use cutover_protocol::tunnel::{Carrier, Fare};
use cutover_protocol::wire::Severity;

/// The agent answers, but what was asked did not work.
const EXIT_FAILED: u8 = 1;
/// The hop was undone: the source serves.
const EXIT_UNDONE: u8 = 3;
/// The hop is unfinished: `recover` goes on.
const EXIT_UNFINISHED: u8 = 4;

/// Moves running containers to another site while the proxy holds their clients.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Exit codes: 0 done or committed, 1 refused or failed, 2 usage, 3 undone (the source serves), 4 unfinished (run recover)."
)]
struct Arguments {
    /// The serving agent's control socket.
    #[arg(long, global = true, default_value = "/run/cutover-agent/control.sock")]
    control: PathBuf,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Be the agent of this site until SIGTERM.
    Serve {
        /// The agent's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Read a configuration, say what is wrong with it, change nothing.
    Check {
        /// The agent's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Check both sides for a plan: sizes, predicted stall, refusals. Changes nothing.
    Preflight {
        /// The plan.
        plan: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Hop.
    Hop {
        /// The plan.
        plan: PathBuf,
        /// Only check, like `preflight`.
        #[arg(long)]
        dry_run: bool,
        /// Write the report here as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Rehearse the rollback: let this phase do its work, then fail it on purpose.
        #[arg(long, value_name = "PHASE")]
        fail_at: Option<Phase>,
    },
    /// What the agent does and knows.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Undo the hop that is under way; the source serves on.
    Abort,
    /// Take up what a dead agent left: finish what was committed, undo what was not.
    Recover,
    /// After a hop: stop leading late clients from the source to the target, and take the tunnel down.
    Retire {
        /// Also when somebody still comes, or may.
        #[arg(long)]
        anyway: bool,
    },
    /// Make a certificate authority and one certificate and key a site.
    Pki {
        /// Where to put them; existing files are kept.
        #[arg(long)]
        dir: PathBuf,
    },
    /// What stands between the runtime of a dump or a restore and its CRIU: runs the runtime.
    #[command(hide = true)]
    Shim {
        #[arg(long)]
        folder: PathBuf,
        #[arg(long)]
        at: ParkAt,
        #[arg(long)]
        network_namespace: PathBuf,
        #[arg(last = true)]
        runtime: Vec<OsString>,
    },
    /// What that runtime finds in CRIU's place.
    #[command(hide = true)]
    StandIn {
        #[arg(long)]
        folder: PathBuf,
        #[arg(long)]
        criu: PathBuf,
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
}

/// What packs frames takes up to 30 MiB for each thread that does, and goes again: left to itself, glibc learns to keep
/// such blocks, in an arena of every thread, and a hop took up to 300 MiB where it needs 160.
fn keep_memory_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers; what the allocator refuses stays as it is.
    unsafe {
        /// More than a frame's bytes.
        const MAPPED_BYTES_MIN: i32 = 2 << 20;
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        libc::mallopt(libc::M_ARENA_MAX, 4);
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Nobody reads what these log.
    match &arguments.command {
        Verb::Shim {
            folder,
            at,
            network_namespace,
            runtime,
        } => return criu::shim::run(folder, *at, network_namespace, runtime),
        Verb::StandIn {
            folder,
            criu,
            arguments,
        } => return criu::stand_in::run(folder, criu, arguments),
        _ => {}
    }
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    keep_memory_small();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            // Every error of ours is a whole sentence and names its own cause.
            eprintln!("cutover-agent: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let control = arguments.control;
    match arguments.command {
        Verb::Serve { config } => {
            let config = Config::load(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?;
            runtime.block_on(serve::serve(config))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Check { config } => {
            let checked = Config::load(&config)?;
            println!(
                "{} is a good configuration of the {} site",
                config.display(),
                checked.site
            );
            Ok(ExitCode::SUCCESS)
        }
        Verb::Preflight { plan, json } => preflight(&control, &plan, json),
        Verb::Hop {
            plan,
            dry_run: true,
            ..
        } => preflight(&control, &plan, false),
        Verb::Hop {
            plan,
            json,
            fail_at,
            ..
        } => hop(&control, &plan, json.as_deref(), fail_at),
        Verb::Status { json } => status(&control, json),
        Verb::Abort => simple(&control, &Command::Abort),
        Verb::Recover => simple(&control, &Command::Recover),
        Verb::Retire { anyway } => simple(&control, &Command::Retire { anyway }),
        Verb::Pki { dir } => {
            pki::create(&dir)?;
            println!(
                "wrote ca.pem, source.pem, source.key, target.pem and target.key to {}",
                dir.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Verb::Shim { .. } | Verb::StandIn { .. } => Ok(ExitCode::FAILURE),
    }
}

fn ask(control: &Path, command: &Command, on_line: impl FnMut(&Line)) -> anyhow::Result<Line> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match runtime.block_on(control::ask(control, command, on_line))? {
        Line::Error { message } => anyhow::bail!(message),
        other => Ok(other),
    }
}

fn preflight(control: &Path, plan: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let plan = load_plan(plan)?.settings().clone();
    let Line::Preflight(checked) = ask(control, &Command::Preflight { plan }, |_| {})? else {
        anyhow::bail!("the agent answered something else than a preflight");
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&checked)?);
    } else {
        print_checked(&checked);
    }
    let refused = checked
        .findings
        .iter()
        .any(|finding| finding.severity == Severity::Refusal);
    Ok(if refused {
        ExitCode::from(EXIT_FAILED)
    } else {
        ExitCode::SUCCESS
    })
}

fn print_checked(checked: &Checked) {
    for tree in &checked.trees {
        println!(
            "{:<24} {:>9.1} MiB",
            tree.name,
            tree.bytes as f64 / f64::from(1 << 20)
        );
    }
    println!("memory rounds at most: {}", checked.rounds_max);
    println!("predicted stall: {}", checked.stall);
    for finding in &checked.findings {
        let word = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Refusal => "refused",
        };
        println!("{word}: {}", finding.message);
    }
    if checked.findings.is_empty() {
        println!("nothing speaks against this hop");
    }
}

fn hop(
    control: &Path,
    plan: &Path,
    json: Option<&Path>,
    fail_at: Option<Phase>,
) -> anyhow::Result<ExitCode> {
    let plan = load_plan(plan)?.settings().clone();
    let Line::Report(report) = ask(control, &Command::Hop { plan, fail_at }, print_progress)?
    else {
        anyhow::bail!("the agent answered something else than a report");
    };
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?).map_err(|error| {
            anyhow::anyhow!("cannot write the report to {}: {error}", path.display())
        })?;
    }
    Ok(conclude(&report))
}

fn conclude(report: &Report) -> ExitCode {
    let cause = report.cause.as_deref().unwrap_or("no cause was recorded");
    for owed in &report.owed {
        println!("owed: {owed} (done as soon as the target answers)");
    }
    match report.outcome {
        Outcome::Committed => {
            println!("{} committed: the target serves", report.hop);
            ExitCode::SUCCESS
        }
        Outcome::Undone => {
            println!("{} undone: the source serves; {cause}", report.hop);
            ExitCode::from(EXIT_UNDONE)
        }
        Outcome::Unfinished => {
            println!(
                "{} unfinished: run `cutover-agent recover`; {cause}",
                report.hop
            );
            ExitCode::from(EXIT_UNFINISHED)
        }
    }
}

fn print_progress(line: &Line) {
    let Line::Progress(progress) = line else {
        return;
    };
    match progress {
        Progress::Began { name, .. } => println!("{name} ..."),
        Progress::Moving {
            name,
            done,
            total,
            bytes_per_second,
            eta_seconds,
            containers,
        } if *total > 0 => {
            let rate = mebibytes(*bytes_per_second);
            println!(
                "{name} {}, {rate:.1} MiB/s",
                part(*done, *total, *eta_seconds)
            );
            for one in containers.iter().filter(|_| containers.len() > 1) {
                let part = part(one.done_bytes, one.total_bytes, one.eta_seconds);
                println!("  {} {part}", one.container);
            }
        }
        Progress::Moving { .. } => {}
        Progress::Slowed { slowed } => println!("{slowed}"),
        Progress::Predicted { stall } => println!("predicted stall: {stall}"),
        Progress::Ended {
            name,
            seconds,
            bytes,
            failure: None,
        } => println!("{name} {seconds:.3} s {bytes} bytes"),
        Progress::Ended {
            name,
            seconds,
            failure: Some(message),
            ..
        } => {
            println!("{name} failed after {seconds:.3} s: {message}");
        }
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// "12.0 of 64.0 MiB, 3.1 s left".
fn part(done: u64, total: u64, eta_seconds: Option<f64>) -> String {
    let left = eta_seconds.map_or_else(String::new, |left| format!(", {left:.1} s left"));
    format!(
        "{:.1} of {:.1} MiB{left}",
        mebibytes(done),
        mebibytes(total)
    )
}

fn status(control: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let Line::Status(status) = ask(control, &Command::Status, |_| {})? else {
        anyhow::bail!("the agent answered something else than a status");
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print_status(&status);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_status(status: &Status) {
    println!("site: {}", status.site);
    match (&status.hop, status.phase) {
        (Some(hop), Some(phase)) => println!("driving: {hop}, {phase}"),
        _ => println!("driving: nothing"),
    }
    if let Some(moving) = &status.moving {
        print_progress(&Line::Progress(moving.clone()));
    }
    if let Some(standing) = &status.standing {
        println!("target of: {}, {:?}", standing.hop, standing.stage);
    }
    if status.unfinished {
        println!("unfinished: a hop waits for `cutover-agent recover`");
    }
    if let Some(tunnel) = &status.tunnel {
        print_tunnel(tunnel);
    }
    if let Some(door) = &status.old_door {
        print_old_door(door);
    }
    for owed in &status.owed {
        println!("owed to the target: {owed}");
    }
}

fn print_tunnel(tunnel: &Fare) {
    let carrier = match tunnel.carrier {
        Carrier::Kernel => "in the kernel",
        Carrier::User => "in user space",
    };
    let age = tunnel.handshake_age_s.map_or_else(
        || "none yet".to_owned(),
        |seconds| format!("{seconds} s ago"),
    );
    println!(
        "tunnel of {}: {} {carrier}, {} to {} on {}, MTU {}, {} bytes sent, {} received, last handshake {age}",
        tunnel.hop,
        tunnel.kind.as_str(),
        tunnel.address,
        tunnel.peer,
        tunnel.device,
        tunnel.mtu,
        tunnel.bytes_sent,
        tunnel.bytes_received
    );
    for address in &tunnel.forwarded {
        println!("led through the tunnel: {address}");
    }
}

fn print_old_door(door: &OldDoor) {
    let when = match door.closing {
        Closing::Now => "it is safe to close it: cutover-agent retire".to_owned(),
        Closing::Busy => "somebody is there".to_owned(),
        Closing::In { seconds } => format!("safe to close in {seconds} s if nobody comes"),
    };
    println!(
        "old door of {}: {} requests since the commit, {} under way, the last {} s ago; {when}",
        door.hop, door.requests, door.now, door.quiet_s
    );
    for (name, pointing) in &door.names {
        println!("name {name}: {pointing:?}");
    }
}

fn simple(control: &Path, command: &Command) -> anyhow::Result<ExitCode> {
    match ask(control, command, print_progress)? {
        Line::Report(report) => Ok(match report.outcome {
            // Recovery did its work, whichever side serves now.
            Outcome::Undone if matches!(command, Command::Recover) => {
                let _ = conclude(&report);
                ExitCode::SUCCESS
            }
            _ => conclude(&report),
        }),
        Line::Done { message } => {
            println!("{message}");
            Ok(ExitCode::SUCCESS)
        }
        other => anyhow::bail!("the agent answered something unexpected: {other:?}"),
    }
}
