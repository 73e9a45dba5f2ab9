//! `hopgate-proxy ctl`: a person's hand on the gates. It reads the epoch itself; agents name the one they believe in.

mod gates;
mod look;
mod process;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use cutover_protocol::hold::{
    Answer, AtCut, BudgetStatus, CheckStatus, Command, Gate, InFlight, InFlightPhase, ServerState,
    ServerStatus, ServiceStatus, Tier, WritesStatus,
};
use cutover_protocol::id::{ServiceName, Site};
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::words::ProcessCommand;

use gates::Gates;

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
    /// Show requests of which nobody can know what became of them, the newest last.
    Ledger {
        /// How many.
        #[arg(long, default_value_t = 100)]
        count: usize,
    },
    /// Read the configuration again and go by it, if it is valid; no connection is dropped.
    Reload,
    /// Start a new process in the place of this one, without losing a connection.
    Upgrade {
        /// The program; the running one's, as it is on disk now, if absent.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Show who is held: the oldest, the newest, how many by route and by address.
    Held {
        /// Only for this service.
        service: Option<ServiceName>,
    },
    /// Show what happens from now on, a line of JSON each: commands, gates, leases, numbers.
    Watch,
    /// Hold new requests and wait until nothing is in flight. Several services are held in this order, each drained
    /// before the next, or none of them.
    Hold {
        /// The services, the one clients meet first in front.
        #[arg(required = true)]
        services: Vec<ServiceName>,
        /// The hold reopens by itself after this time, such as 60s.
        #[arg(long, default_value = "60s", value_parser = duration)]
        lease: Duration,
        /// How long requests in flight may take to finish.
        #[arg(long, default_value = "10s", value_parser = duration)]
        drain: Duration,
        /// How long you expect clients to wait, such as 3s: warns when somebody in front of the proxy may not.
        #[arg(long, value_parser = duration)]
        expect: Option<Duration>,
        /// Take over a hold that somebody else has begun.
        #[arg(long)]
        force: bool,
        /// Hold nothing: watch the traffic for so long, such as 10s, and say what a hold of that length would cost.
        #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with_all = ["lease", "drain", "force"])]
        dry_run: Option<Duration>,
    },
    /// Let the held through to a site; to the other site than the owner this is the commit. Of several services the
    /// last named is let through first.
    Release {
        /// The services, in the order they were held.
        #[arg(required = true)]
        services: Vec<ServiceName>,
        /// The site that is to serve from now on.
        #[arg(long, value_parser = site)]
        to: Site,
        /// Even if somebody else holds; never while that is a hop that may still commit.
        #[arg(long)]
        force: bool,
    },
    /// Abort the hold and let the held through to the owner.
    Reopen {
        /// The services, in the order they were held.
        #[arg(required = true)]
        services: Vec<ServiceName>,
        /// Even if somebody else holds.
        #[arg(long)]
        force: bool,
    },
}

/// Does what was asked and prints the answer.
pub(crate) fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut client = ControlClient::connect(&arguments.socket)?;
    let answer = match &arguments.verb {
        Verb::Status { service: None } => return process::status(&mut client, arguments.json),
        Verb::Ledger { count } => {
            let command = ProcessCommand::Ledger { count: *count };
            return process::execute(&mut client, &command, arguments.json);
        }
        Verb::Reload => {
            return process::execute(&mut client, &ProcessCommand::Reload, arguments.json);
        }
        Verb::Upgrade { binary } => {
            let binary = binary.as_deref().map(std::path::absolute).transpose()?;
            let command = ProcessCommand::Upgrade { binary };
            return process::execute(&mut client, &command, arguments.json);
        }
        Verb::Held { service } => {
            return look::held(&mut client, service.as_ref(), arguments.json);
        }
        Verb::Watch => return look::watch(&mut client),
        Verb::Hold {
            services,
            dry_run: Some(duration),
            ..
        } => return look::forecast(&mut client, services, *duration, arguments.json),
        Verb::Status { service } => client.command(&Command::Status {
            service: service.clone(),
        })?,
        Verb::Hold {
            services,
            lease,
            drain,
            expect,
            force,
            dry_run: None,
        } => Gates::of(&mut client, services, *force).hold(*lease, *drain, *expect)?,
        Verb::Release {
            services,
            to,
            force,
        } => Gates::of(&mut client, services, *force).release(*to)?,
        Verb::Reopen { services, force } => Gates::of(&mut client, services, *force).reopen()?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else {
        print(&answer);
    }
    Ok(match answer {
        Answer::Status { .. } | Answer::Done { .. } | Answer::DoneAll { .. } => ExitCode::SUCCESS,
        Answer::NotDrained { .. } => ExitCode::from(NOT_DRAINED),
        Answer::Refused { .. } | Answer::RefusedAll { .. } => ExitCode::FAILURE,
    })
}

fn print(answer: &Answer) {
    match answer {
        Answer::Status { services } | Answer::DoneAll { services } => {
            services.iter().for_each(print_service);
        }
        Answer::Done { service } => print_service(service),
        Answer::NotDrained { service, left } => {
            print_service(service);
            println!("  not drained; still in flight:");
            left.iter().for_each(print_in_flight);
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
        Answer::RefusedAll {
            service,
            message,
            left,
            services,
            ..
        } => {
            eprintln!("refused because of {service}: {message}");
            left.iter().for_each(print_in_flight);
            services.iter().for_each(print_service);
        }
    }
}

fn print_in_flight(entry: &InFlight) {
    let InFlight { client, what, .. } = entry;
    let phase = match entry.phase {
        InFlightPhase::Sending => "sending",
        InFlightPhase::Waiting => "waiting",
        InFlightPhase::Answering => "answering",
        InFlightPhase::Tunnel => "tunnel",
        InFlightPhase::Abandoned => "abandoned",
    };
    let at_cut = match entry.at_cut {
        AtCut::Wait => "",
        AtCut::Cut => ", to be cut",
        AtCut::Carry => ", carried",
    };
    let (age, sent, answered) = (entry.age_ms, entry.sent_bytes, entry.answered_bytes);
    let route = entry.route.as_deref().unwrap_or("-");
    let server = entry.server.as_deref().unwrap_or("-");
    println!(
        "    {age:>8} ms  {client}  {what}  route {route}, at {server}, {phase}{at_cut}, {sent} bytes sent, {answered} answered"
    );
    for held in &entry.waits_for {
        println!(
            "                 may be waiting for {held}, which is held: its own server; see own_from"
        );
    }
}

fn print_service(status: &ServiceStatus) {
    let gate = match status.gate {
        Gate::Open => "open",
        Gate::Draining => "draining",
        Gate::Holding => "holding",
        Gate::Releasing => "releasing",
    };
    let holder = status
        .holder
        .as_ref()
        .map_or_else(String::new, |holder| format!(" for {holder}"));
    let decided = match status.held_since {
        Some(since) if !status.is_undecided() => format!(", decided since epoch {since}"),
        _ => String::new(),
    };
    let lease = status.lease_ms_left.map_or_else(String::new, |left| {
        format!(", lease {}.{:03} s", left / 1000, left % 1000)
    });
    println!(
        "{}: {gate}{holder}, epoch {}, owner {}{decided}{lease}",
        status.service, status.register.epoch, status.register.owner
    );
    println!(
        "  in flight {}, carried {}, upstream connections {}",
        status.in_flight, status.carried, status.upstream_connections
    );
    println!(
        "  held {} = released {} + gave up {} + evicted {} + held now {}",
        status.held, status.released, status.gave_up, status.evicted, status.held_now
    );
    if status.front_checks_answered > 0 {
        println!("  front checks answered {}", status.front_checks_answered);
    }
    if !status.writes.is_quiet() {
        print_writes(&status.writes);
    }
    if let Some(budget) = &status.budget {
        print_budget(status.held_now, budget);
    }
    status.servers.iter().for_each(print_server);
}

fn print_writes(writes: &WritesStatus) {
    let WritesStatus {
        admitted,
        delayed,
        delayed_now,
        limit,
    } = writes;
    println!("  writes admitted {admitted}, delayed {delayed}, delayed now {delayed_now}");
    if let Some(limit) = limit {
        let holder = limit.holder.as_ref();
        let holder = holder.map_or_else(String::new, |holder| format!(" for {holder}"));
        let left = limit.lease_ms_left;
        println!(
            "    limited{holder} to one every {} us, delayed for {} ms at most, lease {}.{:03} s",
            limit.interval_us,
            limit.delay_ms_max,
            left / 1000,
            left % 1000
        );
    }
}

fn print_budget(held_now: u64, budget: &BudgetStatus) {
    let of = |most: u64| match most {
        0 => String::new(),
        most => format!(" of {most}"),
    };
    let tier = match budget.tier {
        Tier::Park => "room for more",
        Tier::StopReading => "reading no more of clients",
        Tier::StopAccepting => "accepting no more clients",
        Tier::Refuse => "full",
    };
    println!(
        "  budget: {held_now} of {} requests, {}{} bytes: {tier}",
        budget.held_max,
        budget.held_bytes,
        of(budget.held_bytes_max)
    );
}

fn print_server(server: &ServerStatus) {
    let state = match (server.state, &server.ejected) {
        (ServerState::Up, _) => "up".to_owned(),
        (ServerState::SlowStart, _) => match server.weight_percent {
            Some(percent) => format!("slow start, at {percent} %"),
            None => "slow start".to_owned(),
        },
        (ServerState::Down, _) => "down".to_owned(),
        (ServerState::Ejected, None) => "ejected".to_owned(),
        (ServerState::Ejected, Some(ejected)) => {
            let (left, reason) = (ejected.ms_left, &ejected.reason);
            format!("ejected for {left} ms more ({reason})")
        }
    };
    let backup = if server.backup { ", backup" } else { "" };
    println!(
        "  {} {} of {}: {state}, weight {}{backup}",
        server.site, server.address, server.group, server.weight
    );
    println!(
        "    connections {}, in flight {}, requests {}, errors: {} connecting, {} answered 5xx, {} broken",
        server.connections,
        server.active,
        server.requests,
        server.connect_errors,
        server.server_errors,
        server.broken
    );
    if let Some(CheckStatus {
        good,
        reason,
        age_ms,
    }) = &server.check
    {
        let verdict = if *good { "good" } else { "bad" };
        println!("    last check {verdict}, {age_ms} ms ago: {reason}");
    }
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
