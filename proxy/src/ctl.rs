//! `hopgate-proxy ctl`: a person's hand on the gates. It reads the epoch itself; agents name the one they believe in.

mod process;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use cutover_protocol::hold::{
    Answer, CheckStatus, Command, Gate, Refusal, ServerState, ServerStatus, ServiceStatus,
};
use cutover_protocol::id::{ServiceName, Site};
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::words::ProcessCommand;

/// Exit code of a hold that stands without being drained.
const NOT_DRAINED: u8 = 3;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The proxy's control socket.
    #[arg(long, default_value = "/run/hopgate/control.sock")]
    socket: PathBuf,
    /// Print the proxy's answer as one line of JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show every service, or one.
    Status {
        /// Only this one.
        service: Option<ServiceName>,
    },
    /// Read the configuration again and go by it, if it is valid; no connection is dropped.
    Reload,
    /// Start a new process in the place of this one, without losing a connection.
    Upgrade {
        /// The program; the running one's, as it is on disk now, if absent.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Hold new requests and wait until nothing is in flight.
    Hold {
        /// The service.
        service: ServiceName,
        /// The hold reopens by itself after this time, such as 60s.
        #[arg(long, default_value = "60s", value_parser = duration)]
        lease: Duration,
        /// How long requests in flight may take to finish.
        #[arg(long, default_value = "10s", value_parser = duration)]
        drain: Duration,
    },
    /// Let the held through to a site; to the other site than the owner this is the commit.
    Release {
        /// The service.
        service: ServiceName,
        /// The site that is to serve from now on.
        #[arg(long, value_parser = site)]
        to: Site,
    },
    /// Abort the hold and let the held through to the owner.
    Reopen {
        /// The service.
        service: ServiceName,
    },
}

/// Does what was asked and prints the answer.
pub(crate) fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut client = ControlClient::connect(&arguments.socket)?;
    let answer = match &arguments.verb {
        Verb::Status { service: None } => return process::status(&mut client, arguments.json),
        Verb::Reload => {
            return process::execute(&mut client, &ProcessCommand::Reload, arguments.json);
        }
        Verb::Upgrade { binary } => {
            let binary = binary.as_deref().map(std::path::absolute).transpose()?;
            let command = ProcessCommand::Upgrade { binary };
            return process::execute(&mut client, &command, arguments.json);
        }
        Verb::Status { service } => client.command(&Command::Status {
            service: service.clone(),
        })?,
        Verb::Hold {
            service,
            lease,
            drain,
        } => hold(&mut client, service, *lease, *drain)?,
        Verb::Release { service, to } => release(&mut client, service, *to)?,
        Verb::Reopen { service } => reopen(&mut client, service)?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else {
        print(&answer);
    }
    Ok(match answer {
        Answer::Status { .. } | Answer::Done { .. } => ExitCode::SUCCESS,
        Answer::NotDrained { .. } => ExitCode::from(NOT_DRAINED),
        Answer::Refused { .. } => ExitCode::FAILURE,
    })
}

/// The service's status, or the refusal to tell it.
fn status(
    client: &mut ControlClient,
    service: &ServiceName,
) -> anyhow::Result<Result<ServiceStatus, Answer>> {
    match client.command(&Command::Status {
        service: Some(service.clone()),
    })? {
        Answer::Status { mut services } if services.len() == 1 => Ok(Ok(services.remove(0))),
        refused @ Answer::Refused { .. } => Ok(Err(refused)),
        other => bail!(
            "the proxy answered a question about {service} with {other:?}; are both of the same version?"
        ),
    }
}

fn hold(
    client: &mut ControlClient,
    service: &ServiceName,
    lease: Duration,
    drain: Duration,
) -> anyhow::Result<Answer> {
    let status = match status(client, service)? {
        Ok(status) => status,
        Err(refused) => return Ok(refused),
    };
    Ok(client.command(&Command::Hold {
        service: service.clone(),
        epoch: status.register.epoch,
        lease_ms: milliseconds(lease),
        drain_ms_max: milliseconds(drain),
    })?)
}

fn release(client: &mut ControlClient, service: &ServiceName, to: Site) -> anyhow::Result<Answer> {
    let status = match status(client, service)? {
        Ok(status) => status,
        Err(refused) => return Ok(refused),
    };
    let epoch = status.register.epoch;
    let after = if status.register.owner == to {
        // Decided already, or a hold that is given up: only the proxy knows which, so the milder word first.
        match client.command(&Command::Release {
            service: service.clone(),
            epoch,
            to,
        })? {
            Answer::Refused {
                reason: Refusal::WrongEpoch,
                register: Some(register),
                ..
            } if register.epoch == epoch => client.command(&Command::Abort {
                service: service.clone(),
                epoch,
            })?,
            other => return Ok(other),
        }
    } else {
        client.command(&Command::Commit {
            service: service.clone(),
            epoch,
            to,
        })?
    };
    release_after(client, service, after, to)
}

fn reopen(client: &mut ControlClient, service: &ServiceName) -> anyhow::Result<Answer> {
    let status = match status(client, service)? {
        Ok(status) => status,
        Err(refused) => return Ok(refused),
    };
    release(client, service, status.register.owner)
}

fn release_after(
    client: &mut ControlClient,
    service: &ServiceName,
    decided: Answer,
    to: Site,
) -> anyhow::Result<Answer> {
    let Answer::Done { service: status } = decided else {
        return Ok(decided);
    };
    Ok(client.command(&Command::Release {
        service: service.clone(),
        epoch: status.register.epoch,
        to,
    })?)
}

fn print(answer: &Answer) {
    match answer {
        Answer::Status { services } => services.iter().for_each(print_service),
        Answer::Done { service } => print_service(service),
        Answer::NotDrained { service, left } => {
            print_service(service);
            println!("  not drained; still in flight:");
            for entry in left {
                println!(
                    "    {:>8} ms  {}  {}",
                    entry.age_ms, entry.client, entry.what
                );
            }
        }
        Answer::Refused {
            message, register, ..
        } => {
            eprintln!("refused: {message}");
            if let Some(register) = register {
                eprintln!(
                    "  the register: epoch {}, owner {}",
                    register.epoch, register.owner
                );
            }
        }
    }
}

fn print_service(status: &ServiceStatus) {
    let gate = match status.gate {
        Gate::Open => "open",
        Gate::Draining => "draining",
        Gate::Holding => "holding",
        Gate::Releasing => "releasing",
    };
    let lease = status.lease_ms_left.map_or_else(String::new, |left| {
        format!(", lease {}.{:03} s", left / 1000, left % 1000)
    });
    println!(
        "{}: {gate}, epoch {}, owner {}{lease}",
        status.service, status.register.epoch, status.register.owner
    );
    println!(
        "  in flight {}, upstream connections {}",
        status.in_flight, status.upstream_connections
    );
    println!(
        "  held {} = released {} + gave up {} + evicted {} + held now {}",
        status.held, status.released, status.gave_up, status.evicted, status.held_now
    );
    status.servers.iter().for_each(print_server);
}

fn print_server(server: &ServerStatus) {
    let state = match server.state {
        ServerState::Up => "up",
        ServerState::SlowStart => "slow start",
        ServerState::Down => "down",
        ServerState::Ejected => "ejected",
    };
    let backup = if server.backup { ", backup" } else { "" };
    let errors = server.connect_errors + server.server_errors + server.broken;
    print!(
        "  {} {}: {state}{backup}, active {}, requests {}, errors {errors}",
        server.site, server.address, server.active, server.requests
    );
    match &server.check {
        None => println!(),
        Some(CheckStatus {
            good,
            reason,
            age_ms,
        }) => {
            let verdict = if *good { "good" } else { "bad" };
            println!(", check {verdict} {age_ms} ms ago: {reason}");
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn site(text: &str) -> Result<Site, String> {
    match text {
        "source" => Ok(Site::Source),
        "target" => Ok(Site::Target),
        _ => Err("say source or target".to_owned()),
    }
}

/// A whole number with its unit: 500ms, 60s or 2m.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len()
        - text
            .trim_start_matches(|character: char| character.is_ascii_digit())
            .len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| "say a number with a unit, such as 500ms, 60s or 2m".to_owned())?;
    let scale = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err("say the unit: ms, s or m".to_owned()),
    };
    number
        .checked_mul(scale)
        .map(Duration::from_millis)
        .ok_or_else(|| "that is too long".to_owned())
}
