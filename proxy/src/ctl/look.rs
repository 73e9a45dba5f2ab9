//! What `ctl` looks at, and how that is shown: the held, a forecast, events.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use cutover_protocol::hold::Tier;
use cutover_protocol::id::ServiceName;
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::seen::{Forecast, HeldEntry, HeldTable, Look, Seen, Share};

/// Exit code of a hold that would meet a limit, or not drain.
const WOULD_COST: u8 = 3;

/// Who is held.
pub(super) fn held(
    client: &mut ControlClient,
    service: Option<&ServiceName>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let seen = client.look(&Look::Held {
        service: service.cloned(),
    })?;
    show(&seen, json, || match &seen {
        Seen::Held { services } => {
            services.iter().for_each(print_held);
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("the proxy does not tell who is held; are both of the same version?"),
    })
}

/// What a hold of this length would cost, watched now.
pub(super) fn forecast(
    client: &mut ControlClient,
    services: &[ServiceName],
    duration: Duration,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let [service] = services else {
        bail!("name one service for a dry run; each can be watched at the same time");
    };
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let seen = client.look(&Look::Forecast {
        service: service.clone(),
        duration_ms,
    })?;
    show(&seen, json, || match &seen {
        Seen::Forecast(forecast) => {
            print_forecast(forecast);
            Ok(code_of(forecast))
        }
        _ => bail!("the proxy makes no forecast; are both of the same version?"),
    })
}

/// Every event, a line of JSON each, until either end goes away.
pub(super) fn watch(client: &mut ControlClient) -> anyhow::Result<ExitCode> {
    match client.look(&Look::Watch)? {
        Seen::Watching => {}
        Seen::Refused { message } => bail!("refused: {message}"),
        _ => bail!("the proxy tells no events; are both of the same version?"),
    }
    let mut out = io::stdout();
    while let Some(event) = client.next_event()? {
        let line = serde_json::to_string(&event)?;
        // Whoever reads has had enough.
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(
    seen: &Seen,
    json: bool,
    print: impl FnOnce() -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    if let Seen::Refused { message } = seen
        && !json
    {
        eprintln!("refused: {message}");
        return Ok(ExitCode::FAILURE);
    }
    if json {
        println!("{}", serde_json::to_string(seen)?);
        return Ok(match seen {
            Seen::Refused { .. } => ExitCode::FAILURE,
            Seen::Forecast(forecast) => code_of(forecast),
            _ => ExitCode::SUCCESS,
        });
    }
    print()
}

fn code_of(forecast: &Forecast) -> ExitCode {
    if forecast.limits.is_empty() && forecast.undrained.is_empty() && forecast.out_of_time == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(WOULD_COST)
    }
}

fn print_held(table: &HeldTable) {
    println!(
        "{}: {} held, from {} addresses",
        table.service, table.held_now, table.addresses
    );
    if table.held_now == 0 {
        return;
    }
    print_shares("by route", &table.by_route);
    print_shares("by address", &table.by_address);
    print_entries("oldest", &table.oldest);
    print_entries("newest", &table.newest);
}

fn print_entries(title: &str, entries: &[HeldEntry]) {
    println!("  {title}:");
    for entry in entries {
        let route = entry.route.as_deref().unwrap_or("-");
        let end = match (entry.left_ms, entry.ends_by) {
            (Some(left_ms), Some(by)) => format!(", {left_ms} ms to its {}", by.as_str()),
            _ => String::new(),
        };
        println!(
            "    {:>8} ms{end}  {}  {}  route {route}",
            entry.age_ms, entry.client, entry.what
        );
    }
}

fn print_shares(title: &str, shares: &[Share]) {
    println!("  {title}:");
    for Share { name, count } in shares {
        println!("    {count:>8}  {name}");
    }
}

fn print_forecast(forecast: &Forecast) {
    let seconds = Duration::from_millis(forecast.duration_ms).as_secs_f64();
    println!(
        "{}: a hold of {seconds} s, had it begun {seconds} s ago:",
        forecast.service
    );
    println!(
        "  {} arrived by {} connections; {} would be held, with {} bytes of heads",
        forecast.arrived, forecast.connections, forecast.held, forecast.head_bytes
    );
    let tier = match forecast.tier {
        Tier::Park => "there is room for them",
        Tier::StopReading => "no more would be read of clients",
        Tier::StopAccepting => "no more clients would be accepted",
        Tier::Refuse => "the last of them would be refused",
    };
    println!("  with all they keep {} bytes: {tier}", forecast.held_bytes);
    if !forecast.by_address.is_empty() {
        print_shares("most of them from", &forecast.by_address);
    }
    if forecast.out_of_time > 0 {
        println!(
            "  {} of them would run out of the time that they give themselves",
            forecast.out_of_time
        );
    }
    for met in &forecast.limits {
        let who = met
            .who
            .as_deref()
            .map_or_else(String::new, |who| format!(" for {who}"));
        println!(
            "  {} = {} would not suffice{who}: {} wanted",
            met.limit, met.most, met.wanted
        );
    }
    if forecast.undrained_count > 0 {
        println!(
            "  {} in flight would not have drained:",
            forecast.undrained_count
        );
        forecast.undrained.iter().for_each(super::print_in_flight);
    }
}
