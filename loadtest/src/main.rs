//! `lab`: moves a real application under load and prints a verdict. This file only reads the command line and
//! turns outcomes into exit codes.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Parser, Subcommand};

use loadtest::lab::app::App;
use loadtest::lab::folders::Folders;
use loadtest::lab::hop::{Again, Engine};
use loadtest::lab::interop::Times;
use loadtest::lab::kill::Victim;
use loadtest::lab::link::Link;
use loadtest::lab::place::{self, Place, Wish};
use loadtest::lab::tunnel::Tunnel;
use loadtest::progress::Progress;
use loadtest::report::Report;
use loadtest::{bench, counter, interrupt, lab};

/// Moves a real application between two sites under load, and proves that nothing was lost or doubled.
#[derive(Debug, Parser)]
#[command(name = "lab", bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What both the host and the guest are told about a hop.
#[derive(Debug, clap::Args)]
struct HopOptions {
    /// The application to move.
    #[arg(long, default_value = "wordpress")]
    app: App,
    /// How many clients post ids and read pages.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=5000))]
    clients: u16,
    /// Checkpoint and restore, or clean stop and start.
    #[arg(long, default_value = "criu")]
    engine: Engine,
    /// The link between the sites: rate, round trip and loss in each direction, or none.
    #[arg(long, default_value = "800mbit,20ms,0.1%")]
    link: Link,
    /// What carries the bytes between the sites: mutual TLS alone, or that inside a tunnel which the agents make.
    #[arg(long, default_value = "none")]
    tunnel: Tunnel,
    /// A phase to make fail, such as Checkpoint or Verify; the source must then serve as before.
    #[arg(long, value_name = "PHASE")]
    fault: Option<String>,
    /// A process to kill with -9 while the source is frozen.
    #[arg(long)]
    kill: Option<Victim>,
    /// After a hop that was made to fail, hop again in the same world.
    #[arg(long)]
    then_hop_again: bool,
}

impl HopOptions {
    fn wish(self, place: Place) -> Wish {
        let again = if self.then_hop_again {
            Again::Yes
        } else {
            Again::No
        };
        let clients = usize::from(self.clients);
        Wish {
            app: self.app,
            clients,
            engine: self.engine,
            place,
            link: self.link,
            tunnel: self.tunnel,
            fault: self.fault,
            kill: self.kill,
            again,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Moves an application under load and prints a verdict.
    Hop {
        #[command(flatten)]
        options: HopOptions,
        /// Where: on this host if CRIU can run here, otherwise in a guest.
        #[arg(long = "where", default_value = "auto")]
        place: Place,
        /// Also write the report to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Runs every test of the workspace, then the end-to-end tests of the lab.
    Test {
        /// Only the tests whose name contains this, such as "bad input"; all of them by default.
        #[arg(default_value = "")]
        filter: String,
        /// Change the proxy under load as often as it promises to bear: 60 reloads and 10 upgrades, not a few.
        #[arg(long)]
        full: bool,
        /// The program hopgate-proxy for other makers' clients and for the hold; by default one is built.
        #[arg(long, value_name = "FILE")]
        hopgate: Option<PathBuf>,
    },
    /// The part of a hop that runs inside the guest.
    #[command(hide = true)]
    Inside {
        #[command(flatten)]
        options: HopOptions,
        /// The folder shared with the host.
        #[arg(long)]
        out: PathBuf,
    },
    /// Sets up both sites with the application at the source, and keeps them until ENTER or a signal.
    #[command(hide = true)]
    World {
        /// The application.
        #[arg(long, default_value = "wordpress")]
        app: App,
        /// The link between the sites.
        #[arg(long, default_value = "800mbit,20ms,0.1%")]
        link: Link,
    },
    /// Compares Hopgate with HAProxy and nginx, or wears it out.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// The load of one measurement.
    #[command(hide = true)]
    BenchClient {
        /// What to do, as JSON.
        #[arg(long)]
        plan: String,
        /// Open the connections, so many at once, and keep them until we are killed.
        #[arg(long, value_name = "AT_ONCE")]
        hold: Option<usize>,
    },
    /// The target's end of Hopgate's own copies in a benchmark.
    #[command(hide = true)]
    BytesTarget {
        /// Where to listen.
        listen: SocketAddr,
        #[command(flatten)]
        end: EndOptions,
    },
    /// The source's end of them; reads what to do from standard input.
    #[command(hide = true)]
    BytesSource {
        /// The target's end.
        connect: SocketAddr,
        #[command(flatten)]
        end: EndOptions,
    },
    /// The server behind the proxies of a benchmark.
    #[command(hide = true)]
    BenchOrigin,
    /// Clients that are held.
    #[command(hide = true)]
    HoldClient {
        /// What they do, as JSON.
        #[arg(long)]
        plan: String,
    },
    /// One of the two sites of a hold: it writes down what it executes.
    #[command(hide = true)]
    HoldOrigin(bench::hold::origin::Options),
    /// The stateful program itself.
    #[command(hide = true)]
    Counter(counter::Options),
    /// Delays the packets of a netfilter queue.
    #[command(hide = true)]
    Delay {
        /// Number of the queue.
        #[arg(long)]
        queue: u16,
        /// By how much, in microseconds.
        #[arg(long)]
        delay_us: u64,
    },
}

/// What both ends of a copy are told.
#[derive(Debug, clap::Args)]
struct EndOptions {
    /// The folder of the certificates.
    #[arg(long)]
    tls: PathBuf,
    /// The tree.
    #[arg(long)]
    tree: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Copies data sets over emulated links, beside rsync and iperf3 on the same link in the same run.
    Bytes(BytesOptions),
    /// Runs HAProxy, nginx and Hopgate in turn, on one core, and prints medians and the bars of each case.
    Proxy(ProxyOptions),
    /// Holds thousands of requests of every protocol, and proves that each was executed exactly once.
    Hold(HoldOptions),
    /// Moves counters that write their memory, and prints what crossed while they were frozen, and for how long.
    Freeze {
        /// Only the cases whose line contains this, such as "content, gang".
        #[arg(long = "case", value_name = "FILTER", default_value = "")]
        filter: String,
        /// How changed memory is found; repeat for several. Soft-dirty needs a kernel that tracks it.
        #[arg(long = "mode", value_enum, default_values = ["content", "none"])]
        modes: Vec<bench::freeze::case::Mode>,
        /// The link between the sites.
        #[arg(long, default_value = "800mbit,20ms,0.1%")]
        link: Link,
        /// Also write all figures to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Sends siege, wrk and ab through Hopgate at full speed; its memory must stay flat and no request may fail.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 10.0, value_parser = minutes)]
        minutes: f64,
        /// Use this hopgate-proxy instead of the one of this checkout.
        #[arg(long, value_name = "FILE")]
        hopgate: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct BytesOptions {
    /// Only the cases whose name contains this, such as noise@800mbit; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    cases: Vec<String>,
    /// Only the data sets whose name contains this; may be given more than once.
    #[arg(long = "set", value_name = "FILTER")]
    sets: Vec<String>,
    /// Only the links whose name contains this; may be given more than once.
    #[arg(long = "link", value_name = "FILTER")]
    links: Vec<String>,
    /// An eighth of every data set: a quick look, no bar is about it.
    #[arg(long)]
    quick: bool,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Lists the cases and ends.
    #[arg(long)]
    list: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.5..=10_000.0).contains(&value) {
        Ok(value)
    } else {
        Err("must be from 0.5 to 10000".to_owned())
    }
}

#[derive(Debug, clap::Args)]
struct ProxyOptions {
    /// Only the cases whose name contains this; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    cases: Vec<String>,
    /// Length of each measurement in seconds.
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Measurements of each proxy in each case; fewer than five are good for a quick look only.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Measure this hopgate-proxy instead of the one of this checkout.
    #[arg(long, value_name = "FILE")]
    hopgate: Option<PathBuf>,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Lists the cases and ends.
    #[arg(long)]
    list: bool,
}

#[derive(Debug, clap::Args)]
struct HoldOptions {
    /// Only the cases whose name contains this; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    cases: Vec<String>,
    /// Clients, or requests where several share a connection, in place of the cases' own number.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=150_000))]
    clients: Option<u32>,
    /// How long everything stands still, in place of the cases' own time.
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Hold with this hopgate-proxy instead of the one of this checkout.
    #[arg(long, value_name = "FILE")]
    hopgate: Option<PathBuf>,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail also when a bar of time or memory is missed.
    #[arg(long)]
    strict: bool,
    /// Lists the cases and ends.
    #[arg(long)]
    list: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.05..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err("must be from 0.05 to 3600".to_owned())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let progress = if matches!(arguments.command, Command::Inside { .. }) {
        Progress::plain()
    } else {
        Progress::new()
    };
    let outcome = run(arguments, &progress);
    progress.done();
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: Arguments, progress: &Progress) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Counter(options) => counter::run(&options)?,
        Command::Delay { queue, delay_us } => {
            lab::delay::run(queue, Duration::from_micros(delay_us))?
        }
        Command::Bench { what } => return bench(what, progress),
        Command::HoldClient { plan } => {
            bench::hold::client::run(&serde_json::from_str(&plan)?)?;
        }
        Command::HoldOrigin(options) => bench::hold::origin::run(options)?,
        Command::BytesTarget { listen, end } => {
            let never = bench::bytes::agent::target(listen, &end.tls, end.tree)?;
            match never {}
        }
        Command::BytesSource { connect, end } => {
            bench::bytes::agent::source(connect, &end.tls, &end.tree)?;
        }
        Command::BenchClient { plan, hold } => bench_client(&plan, hold)?,
        Command::BenchOrigin => bench::origin::run()?,
        Command::World { app, link } => {
            interrupt::listen()?;
            lab::by_hand::world(app, link, progress)?;
        }
        Command::Inside { options, out } => {
            interrupt::listen()?;
            lab::guest::inside(&options.wish(Place::Host), &out, progress)?;
        }
        Command::Test {
            filter,
            full,
            hopgate,
        } => {
            interrupt::listen()?;
            let times = if full { Times::FULL } else { Times::FEW };
            let interop = lab::interop::Wish { times, hopgate };
            let green = lab::suite::run(&filter, &interop, &Folders::find()?, progress)?;
            return Ok(if green {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        Command::Hop {
            options,
            place,
            json,
        } => {
            interrupt::listen()?;
            let report = place::run(&options.wish(place), &Folders::find()?, progress)?;
            progress.done();
            return hand_back(&report, json.as_deref());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn bench(what: Bench, progress: &Progress) -> anyhow::Result<ExitCode> {
    match what {
        Bench::Freeze {
            filter,
            modes,
            link,
            json,
        } => {
            let cases = bench::freeze::case::chosen(&modes, &filter);
            let options = bench::freeze::Options { cases, link };
            bench_freeze(&options, json.as_deref(), progress)
        }
        Bench::Bytes(options) => bench_bytes(options, progress),
        Bench::Proxy(options) => bench_proxy(&options, progress),
        Bench::Hold(options) => bench_hold(&options, progress),
        Bench::Soak { minutes, hopgate } => {
            interrupt::listen()?;
            let length = Duration::from_secs_f64(minutes * 60.0);
            let outcome = bench::soak::run(length, hopgate.as_ref(), &Folders::find()?, progress)?;
            progress.done();
            println!("{}", outcome.table());
            Ok(if outcome.is_green() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

fn bench_proxy(options: &ProxyOptions, progress: &Progress) -> anyhow::Result<ExitCode> {
    let cases = bench::case::chosen(&options.cases)
        .map_err(|vain| anyhow!("--case {vain}: no case has that in its name; see --list"))?;
    if options.list {
        let lines = cases
            .iter()
            .map(|case| format!("{:<24}{}\n", case.name, case.title));
        // Whoever reads may have seen enough.
        let _ = std::io::stdout().write_all(lines.collect::<String>().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    interrupt::listen()?;
    let show = shower(options.json.as_deref());
    let wish = bench::run::Options {
        cases,
        length: Duration::from_secs_f64(options.seconds),
        rounds: usize::from(options.rounds),
        hopgate: options.hopgate.clone(),
    };
    let report = bench::run::run(&wish, &Folders::find()?, progress, |case| {
        progress.aside(|| show(case.table().trim_end()));
    })?;
    progress.done();
    show(&format!("\n{}", report.summary()));
    write_json(options.json.as_deref(), || report.json())?;
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn bench_bytes(options: BytesOptions, progress: &Progress) -> anyhow::Result<ExitCode> {
    use bench::bytes::{case, report, run};
    let filters = case::Filters {
        cases: options.cases,
        sets: options.sets,
        links: options.links,
    };
    let cases =
        case::chosen(&filters).map_err(|vain| anyhow!("no case fits {vain}; see --list"))?;
    if options.list {
        let lines = cases.iter().map(|case| {
            format!(
                "{:<24}{}, over {}\n",
                case.name(),
                case.set.title(),
                case.link.link
            )
        });
        // Whoever reads may have seen enough.
        let _ = std::io::stdout().write_all(lines.collect::<String>().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    interrupt::listen()?;
    let thoroughness = if options.quick {
        case::Thoroughness::Quick
    } else {
        case::Thoroughness::Full
    };
    let show = shower(options.json.as_deref());
    let reports = run::run(&cases, thoroughness, &Folders::find()?, progress, |case| {
        progress.aside(|| show(case.table().trim_end()));
    })?;
    progress.done();
    show(&format!("\n{}", report::summary(&reports)));
    write_json(options.json.as_deref(), || report::json(&reports))?;
    let clean = reports.iter().all(|report| report.failures.is_empty());
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn bench_hold(options: &HoldOptions, progress: &Progress) -> anyhow::Result<ExitCode> {
    let cases = bench::hold::case::chosen(&options.cases)
        .map_err(|vain| anyhow!("--case {vain}: no case has that in its name; see --list"))?;
    if options.list {
        let lines = cases
            .iter()
            .map(|case| format!("{:<24}{}\n", case.name, case.title));
        // Whoever reads may have seen enough.
        let _ = std::io::stdout().write_all(lines.collect::<String>().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    interrupt::listen()?;
    let show = shower(options.json.as_deref());
    let wish = bench::hold::run::Options {
        cases,
        clients: options.clients.and_then(|clients| clients.try_into().ok()),
        freeze: options.seconds.map(Duration::from_secs_f64),
        hopgate: options.hopgate.clone(),
    };
    let report = bench::hold::run::run(&wish, &Folders::find()?, progress, |case| {
        progress.aside(|| show(case.table().trim_end()));
    })?;
    progress.done();
    show(&format!("\n{}", report.summary()));
    write_json(options.json.as_deref(), || report.json())?;
    let is_green = report.is_clean() && (!options.strict || report.meets_all());
    Ok(if is_green {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn bench_freeze(
    options: &bench::freeze::Options,
    json: Option<&Path>,
    progress: &Progress,
) -> anyhow::Result<ExitCode> {
    interrupt::listen()?;
    let rows = bench::freeze::run(options, &Folders::find()?, progress, |row| {
        progress.aside(|| print!("{}", row.lines()));
    })?;
    progress.done();
    let totals = bench::freeze::report::totals(&rows);
    for (is_met, demand) in &totals {
        println!("{} {demand}", if *is_met { "met   " } else { "MISSED" });
    }
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&rows)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let bars = rows.iter().flat_map(bench::freeze::report::Row::bars);
    let all_met = bars.chain(totals).all(|(is_met, _)| is_met);
    Ok(if all_met {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Prints for a person: standard output belongs to the JSON where it is asked for there.
fn shower(json: Option<&Path>) -> impl Fn(&str) {
    let json_out = json == Some(Path::new("-"));
    move |text: &str| {
        if json_out {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }
}

fn write_json(
    json: Option<&Path>,
    text: impl Fn() -> serde_json::Result<String>,
) -> anyhow::Result<()> {
    match json {
        Some(path) if path == Path::new("-") => print!("{}", text()?),
        Some(path) => std::fs::write(path, text()?)
            .with_context(|| format!("cannot write {}", path.display()))?,
        None => {}
    }
    Ok(())
}

fn bench_client(plan: &str, hold: Option<usize>) -> anyhow::Result<()> {
    let plan = serde_json::from_str(plan)?;
    let Some(at_once) = hold else {
        let sample = bench::client::measure(&plan)?;
        println!("{}", serde_json::to_string(&sample)?);
        return Ok(());
    };
    let (_held, opened) = bench::client::hold(&plan, at_once)?;
    println!("{}", serde_json::to_string(&opened)?);
    loop {
        std::thread::park();
    }
}

fn hand_back(report: &Report, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    println!("{}", report.table());
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if report.is_green() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
