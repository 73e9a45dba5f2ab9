//! What a person and a scraper are told of servers.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::hold::{CheckStatus, EjectedStatus, ServerState, ServerStatus};
use cutover_protocol::id::Site;

use super::directory::Directory;
use super::group::{Group, Member};
use super::moment::Moment;
use super::server::Counts;
use super::sites::Sites;

impl Sites {
    /// Every server of both sites.
    pub(crate) fn snapshot(&self, now: Instant) -> Vec<ServerStatus> {
        let both = [(Site::Source, &self.source), (Site::Target, &self.target)];
        let of_site = |(site, group): (Site, &Arc<Group>)| group.snapshot(site, now);
        both.into_iter().flat_map(of_site).collect()
    }
}

impl Group {
    /// Every server, as it is now.
    pub(crate) fn snapshot(&self, site: Site, now: Instant) -> Vec<ServerStatus> {
        let members = self.members();
        let status = |member: &Member| self.status_of(member, site, now);
        members.list.iter().map(status).collect()
    }

    fn status_of(&self, member: &Member, site: Site, now: Instant) -> ServerStatus {
        let Member {
            server,
            weight,
            backup,
            ..
        } = member;
        let check = server.checks().last.clone().map(|last| CheckStatus {
            good: last.good,
            reason: last.reason,
            age_ms: milliseconds(now.saturating_duration_since(last.at)),
        });
        let Counts {
            active,
            requests,
            connect_errors,
            server_errors,
            broken,
        } = server.counts();
        let (moment, slow_start) = (Moment::of(now), self.slow_start());
        let state = server.state(moment, slow_start);
        let ejected = server.spared(moment).map(|(until, cause)| EjectedStatus {
            reason: cause.to_string(),
            ms_left: milliseconds(until.since(moment)),
        });
        ServerStatus {
            site,
            group: self.name().to_owned(),
            address: server.endpoint().to_string(),
            weight_percent: (state == ServerState::SlowStart)
                .then(|| server.weight_percent(moment, slow_start)),
            state,
            weight: *weight,
            backup: *backup,
            ejected,
            active,
            connections: server.connections(),
            requests,
            connect_errors,
            server_errors,
            broken,
            // Without checks a result is of an earlier configuration.
            check: check.filter(|_| self.config().health.is_some()),
        }
    }
}

type Column = (
    &'static str,
    &'static str,
    &'static str,
    fn(&ServerStatus) -> u64,
);

const COLUMNS: [Column; 7] = [
    (
        "hopgate_server_up",
        "gauge",
        "1 when the server takes requests, 0 when it is down or ejected",
        |server| {
            u64::from(matches!(
                server.state,
                ServerState::Up | ServerState::SlowStart
            ))
        },
    ),
    (
        "hopgate_server_active",
        "gauge",
        "Requests and raw connections the server has now",
        |server| server.active,
    ),
    (
        "hopgate_server_connections",
        "gauge",
        "Open connections to the server, idle ones included",
        |server| server.connections,
    ),
    (
        "hopgate_server_requests_total",
        "counter",
        "Requests and raw connections the server was chosen for",
        |server| server.requests,
    ),
    (
        "hopgate_server_connect_errors_total",
        "counter",
        "Connections to the server that did not come about",
        |server| server.connect_errors,
    ),
    (
        "hopgate_server_5xx_total",
        "counter",
        "Answers of 500 and above",
        |server| server.server_errors,
    ),
    (
        "hopgate_server_broken_total",
        "counter",
        "Answers that were cut or not understood",
        |server| server.broken,
    ),
];

/// Every server of every group, for Prometheus.
///
/// # Errors
/// Those of the writer.
pub(crate) fn write_metrics(
    out: &mut impl Write,
    directory: &Directory,
    now: Instant,
) -> std::fmt::Result {
    // A group does not know its sites, and may be the one of several: the label is its name.
    let groups = directory.groups().iter();
    let servers: Vec<ServerStatus> = groups
        .flat_map(|group| group.snapshot(Site::Source, now))
        .collect();
    for (name, kind, help, value) in COLUMNS {
        writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}")?;
        for server in &servers {
            let group = &server.group;
            // A path may hold what ends a label.
            let address = server.address.replace('\\', "\\\\").replace('"', "\\\"");
            let value = value(server);
            writeln!(
                out,
                "{name}{{group=\"{group}\",server=\"{address}\"}} {value}"
            )?;
        }
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
