//! What `ctl` asks of the process as a whole, and how its answers are shown.

use std::process::ExitCode;

use anyhow::bail;
use cutover_protocol::hold::{Answer, Command};
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::words::{
    ProcessAnswer, ProcessCommand, ProcessRefusal, ProcessStatus, Reloaded,
};
use hopgate_proxy::ledger::{Entry, Why};

/// Exit code of a configuration that cannot be used.
const BAD_CONFIGURATION: u8 = 2;

/// Every service, and behind them the process that serves them.
pub(super) fn status(client: &mut ControlClient, json: bool) -> anyhow::Result<ExitCode> {
    let Answer::Status { services } = client.command(&Command::Status { service: None })? else {
        bail!("the proxy does not tell its status; are both of the same version?");
    };
    let ProcessAnswer::Process(process) = client.process(&ProcessCommand::Process)? else {
        bail!("the proxy does not tell what it is; are both of the same version?");
    };
    if json {
        let mut answer = serde_json::to_value(Answer::Status { services })?;
        answer["process"] = serde_json::to_value(process)?;
        println!("{answer}");
    } else {
        services.iter().for_each(super::print_service);
        print_process(&process);
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks, and shows what came of it.
pub(super) fn execute(
    client: &mut ControlClient,
    command: &ProcessCommand,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let answer = client.process(command)?;
    if json {
        println!("{}", serde_json::to_string(&answer)?);
    }
    match answer {
        ProcessAnswer::Process(status) if !json => print_process(&status),
        ProcessAnswer::Ledger { entries } if !json => entries.iter().for_each(print_entry),
        ProcessAnswer::Reloaded(done) if !json => print_reloaded(&done),
        ProcessAnswer::Upgraded { pid } if !json => println!("upgraded: process {pid} serves"),
        ProcessAnswer::Refused { reason, message } => {
            if !json {
                eprintln!("refused: {message}");
            }
            return Ok(match reason {
                ProcessRefusal::Configuration => ExitCode::from(BAD_CONFIGURATION),
                _ => ExitCode::FAILURE,
            });
        }
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn print_entry(entry: &Entry) {
    let why = match entry.why {
        Why::Cut => "cut at a hold",
        Why::TimedOut => "timed out",
        Why::ClientLeft => "client left",
        Why::NoAnswer => "no answer",
    };
    let server = entry.server.as_deref().unwrap_or("-");
    let route = entry.route.as_deref().unwrap_or("-");
    println!(
        "{}  {}  {}  {}  {why}, service {}, route {route}, {server} ({}, epoch {}), {} bytes sent, {} ms old",
        entry.time,
        entry.id,
        entry.client,
        entry.request,
        entry.service,
        entry.site,
        entry.epoch,
        entry.sent_bytes,
        entry.age_ms
    );
}

fn print_reloaded(done: &Reloaded) {
    println!("reloaded: configuration {} is in force", done.generation);
    for name in &done.services_added {
        println!("  new service {name}");
    }
    for name in &done.services_removed {
        println!("  service {name} is no longer served");
    }
    for address in &done.listeners_added {
        println!("  listening on {address}");
    }
    for address in &done.listeners_removed {
        println!("  no longer listening on {address}");
    }
}

fn print_process(process: &ProcessStatus) {
    println!(
        "hopgate-proxy {}, process {}, up {} s, {} workers",
        process.version,
        process.pid,
        process.uptime_ms / 1000,
        process.workers
    );
    println!(
        "  configuration {} of {}, reloads: {} done, {} refused",
        process.generation,
        process.config.display(),
        process.reloads_done,
        process.reloads_refused
    );
    if let Some(why) = &process.last_refusal {
        println!("  the last reload was refused: {why}");
    }
    if let Some(pid) = process.predecessor {
        println!("  process {pid} still finishes what it began before the last upgrade");
    }
    for listener in &process.listeners {
        let whose = match &listener.service {
            Some(service) => service.as_str(),
            None => "metrics",
        };
        match listener.bound {
            Some(bound) => println!("  listening on {bound} for {whose}"),
            None => println!("  listening on {} for {whose}", listener.address),
        }
    }
}
