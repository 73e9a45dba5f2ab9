//! `lab`: moves a real application under load and prints a verdict. This file only does what the command line says
//! and turns outcomes into exit codes.

mod arguments;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;

use loadtest::lab::folders::Folders;
use loadtest::lab::interop::Times;
use loadtest::lab::place::{self, Place};
use loadtest::progress::Progress;
use loadtest::report::Report;
use loadtest::{bench, counter, interrupt, lab};

use arguments::{Arguments, Bench, BytesOptions, Command, HoldOptions, ProxyOptions};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let progress = if matches!(
        arguments.command,
        Command::Inside { .. } | Command::InsideFreeze { .. }
    ) {
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
        Command::InsideFreeze {
            line,
            mode,
            link,
            out,
        } => {
            interrupt::listen()?;
            let cases = bench::freeze::case::chosen(&[mode], &line);
            let case = cases.first().ok_or_else(|| anyhow!("no case {line}"))?;
            bench::freeze::inside(case, link, &out, progress)?;
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
            times,
            link,
            place,
            json,
        } => {
            let cases = bench::freeze::case::chosen(&modes, &filter);
            let options = bench::freeze::Options {
                cases,
                times,
                link,
                place,
            };
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
