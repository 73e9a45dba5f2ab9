//! What of a service and its routes is for raw connections or tunnels only, and what is for requests only: in the
//! wrong place each is refused, never ignored.

use super::table::{Problem, Section};
use super::{Protocol, ProxyVersion, UpstreamConfig, UpstreamRef};
use crate::route::RouteTable;

/// What becomes of a raw connection that asks for a name of no route, or for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownName {
    /// The service's own servers get it.
    Forward,
    /// A TLS client is told `unrecognized_name`; anybody else is closed.
    Refuse,
}

/// Keys of a route that say something of requests that an upstream reads.
const OF_REQUESTS: &[&str] = &[
    "host",
    "path_prefix",
    "path_regex",
    "method",
    "header",
    "redirect",
    "rewrite",
    "request_headers",
    "response_headers",
    "retry_methods",
    "front_check",
    "body_bytes_max",
    "response_ms_max",
    "between_bytes_ms_max",
    "request_ms_max",
    "client_silence_ms_max",
    "client_body_bytes_per_s_min",
];

/// Refuses a route whose conditions can never be met, or whose rules never apply, by what its service speaks.
pub(super) fn route_fits(section: &Section<'_>, protocol: Protocol) -> Result<(), Problem> {
    match protocol {
        Protocol::Http => {
            section.refuse_useless(&["sni"], "protocol = \"tcp\"")?;
            if section.has("connect") {
                tunnel_fits(section)
            } else {
                Ok(())
            }
        }
        Protocol::Tcp => {
            const NEEDS: &str = "protocol = \"http\"";
            section.refuse_useless(OF_REQUESTS, NEEDS)?;
            section.refuse_useless(&["rate", "connect"], NEEDS)?;
            if section.has("sni") {
                Ok(())
            } else {
                Err(section.missing("sni", "sni = [\"db.example.org\"]"))
            }
        }
    }
}

/// A tunnel leads where the operator says and nowhere else, and nobody reads what is in it.
fn tunnel_fits(section: &Section<'_>) -> Result<(), Problem> {
    section.refuse_useless(
        OF_REQUESTS,
        "requests; one with \"connect\" has tunnels only",
    )?;
    if section.has("source") || section.has("target") {
        return Ok(());
    }
    Err(section.together(
        "has \"connect\" without \"source\" and \"target\"; name the servers that its tunnels lead to",
    ))
}

/// Refuses a name that no server of a raw service is ever told.
pub(super) fn loop_id_fits(
    section: &Section<'_>,
    sites: [&UpstreamRef; 2],
    routes: &RouteTable,
    upstreams: &[UpstreamConfig],
) -> Result<(), Problem> {
    let of_routes = routes
        .with_servers()
        .flat_map(|(_, servers)| [&servers.source, &servers.target]);
    let mut all = sites.into_iter().chain(of_routes);
    let is_told = |site: &UpstreamRef| {
        let is_it = |group: &&UpstreamConfig| group.name == site.name();
        let group = upstreams.iter().find(is_it);
        group.is_some_and(|group| group.proxy_protocol == Some(ProxyVersion::V2))
    };
    if all.any(is_told) {
        return Ok(());
    }
    section.refuse_useless(
        &["loop_id"],
        "protocol = \"http\", or an upstream with proxy_protocol = \"v2\"",
    )
}

/// Reads `unknown_name`, and refuses what raw services cannot do.
pub(super) fn unknown_name(
    service: &Section<'_>,
    protocol: Protocol,
    routes: &RouteTable,
) -> Result<UnknownName, Problem> {
    match protocol {
        Protocol::Http => service.refuse_useless(&["unknown_name"], "protocol = \"tcp\"")?,
        Protocol::Tcp => {
            service.refuse_useless(&["rate", "front_check"], "protocol = \"http\"")?;
        }
    }
    if routes.is_empty() {
        service.refuse_useless(&["unknown_name"], "a route with \"sni\"")?;
    }
    let choices = [
        ("forward", UnknownName::Forward),
        ("refuse", UnknownName::Refuse),
    ];
    let chosen = service.choice("unknown_name", &choices, "\"forward\" or \"refuse\"")?;
    Ok(chosen.unwrap_or(UnknownName::Forward))
}
