//! Reads `[[upstream]]` and `[resolver]`, one function a table.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use cutover_protocol::id::ServiceName;
use toml::Table;

use super::super::load::MS_MAX;
use super::super::table::{Problem, Section};
use super::super::tls::{UPSTREAM_TLS_KEYS, upstream_tls};
use super::{
    Balance, Check, EjectConfig, HashBy, HealthConfig, HttpCheck, ProxyVersion, ResolverConfig,
    ServerConfig, StickyConfig, UpstreamConfig, UpstreamProtocol, UpstreamRef,
};
use crate::upstream::Address;

/// Keys of `[resolver]`.
pub(in crate::config) const RESOLVER_KEYS: &[&str] =
    &["nameservers", "timeout_ms_max", "ttl_ms_min", "ttl_ms_max"];
const UPSTREAM_KEYS: &[&str] = &[
    "name",
    "protocol",
    "balance",
    "hash_by",
    "sticky_cookie",
    "sticky_secret",
    "slow_start_ms",
    "proxy_protocol",
    "servers",
    "health",
    "eject",
    "tls",
];
const SERVER_KEYS: &[&str] = &["address", "weight", "backup"];
const HEALTH_KEYS: &[&str] = &[
    "check",
    "method",
    "path",
    "host",
    "status",
    "body",
    "user",
    "interval_ms",
    "timeout_ms_max",
    "rise",
    "fall",
    "initial",
];
const EJECT_KEYS: &[&str] = &[
    "connect_errors",
    "server_errors",
    "error_percent",
    "window_ms",
    "window_requests_min",
    "ejected_ms_first",
    "ejected_ms_max",
    "share_percent_max",
];
/// Most that an operator may give one server; SRV records bring their own.
const WEIGHT_MAX: i64 = 256;
/// Longest user name of MariaDB, in bytes: 80 characters of UTF-8.
const USER_BYTES_MAX: usize = 320;

/// All groups; names are unique.
pub(in crate::config) fn upstreams(
    root: &Section<'_>,
    folder: &Path,
) -> Result<Vec<UpstreamConfig>, Problem> {
    let mut upstreams: Vec<UpstreamConfig> = Vec::new();
    for section in root.sections("upstream", UPSTREAM_KEYS)? {
        let next = upstream(&section, folder)?;
        if upstreams.iter().any(|other| other.name == next.name) {
            return Err(Problem::NameTwice {
                kind: "[[upstream]]",
                name: next.name,
            });
        }
        upstreams.push(next);
    }
    Ok(upstreams)
}

/// What a service or route names under `key`: an address, or a group that exists.
pub(in crate::config) fn reference(
    section: &Section<'_>,
    key: &'static str,
    upstreams: &[UpstreamConfig],
) -> Result<Option<UpstreamRef>, Problem> {
    let Some(text) = section.text(key)? else {
        return Ok(None);
    };
    // A name has no colon, and every address has one.
    if text.contains(':') {
        let address = Address::parse(text).ok_or_else(|| wrong_address(section, key, text))?;
        return Ok(Some(UpstreamRef::Plain(address)));
    }
    let mut names = upstreams.iter().map(|upstream| upstream.name.as_str());
    if names.clone().any(|name| name == text) {
        return Ok(Some(UpstreamRef::Group(text.to_owned())));
    }
    if names.next().is_none() {
        return Err(wrong_address(section, key, text));
    }
    let names = upstreams.iter().map(|upstream| upstream.name.as_str());
    Err(section.no_such(key, "upstream", text, names))
}

fn wrong_address(section: &Section<'_>, key: &'static str, text: &str) -> Problem {
    section.bad_text(key, text, Address::WANTED)
}

fn upstream(section: &Section<'_>, folder: &Path) -> Result<UpstreamConfig, Problem> {
    let name = section.required_text("name", "name = \"web-source\"")?;
    if name.parse::<ServiceName>().is_err() {
        let wanted = "1 to 64 letters, digits, '-', '_' or '.', starting with a letter or digit";
        return Err(section.bad_text("name", name, wanted));
    }
    let protocol = match section.text("protocol")? {
        None | Some("http1") => UpstreamProtocol::Http1,
        Some("http2") => UpstreamProtocol::Http2,
        Some(other) => return Err(section.bad_text("protocol", other, "\"http1\" or \"http2\"")),
    };
    let proxy_protocol = match section.text("proxy_protocol")? {
        None => None,
        Some("v1") => Some(ProxyVersion::V1),
        Some("v2") => Some(ProxyVersion::V2),
        Some(other) => return Err(section.bad_text("proxy_protocol", other, "\"v1\" or \"v2\"")),
    };
    let below = |key: &str| format!("[upstream.{key}] of \"{name}\"");
    let health = section.section_at("health", below("health"), HEALTH_KEYS)?;
    let eject = section.section_at("eject", below("eject"), EJECT_KEYS)?;
    let tls = section.section_at("tls", below("tls"), UPSTREAM_TLS_KEYS)?;
    let servers = servers(section)?;
    let tls = tls
        .map(|section| upstream_tls(&section, folder, &servers))
        .transpose()?;
    Ok(UpstreamConfig {
        name: name.to_owned(),
        protocol,
        balance: balance(section)?,
        sticky: sticky(section)?,
        slow_start: milliseconds(section, "slow_start_ms", 0, 0)?,
        proxy_protocol,
        servers,
        health: health.map(|section| health_of(&section)).transpose()?,
        eject: eject.map(|section| eject_of(&section)).transpose()?,
        tls,
    })
}

fn balance(section: &Section<'_>) -> Result<Balance, Problem> {
    let balance = match section.text("balance")? {
        None | Some("round_robin") => Balance::RoundRobin,
        Some("least_connections") => Balance::LeastConnections,
        Some("two_choices") => Balance::TwoChoices,
        Some("hash") => return hash_by(section).map(Balance::Hash),
        Some(other) => {
            let wanted = "\"round_robin\", \"least_connections\", \"two_choices\" or \"hash\"";
            return Err(section.bad_text("balance", other, wanted));
        }
    };
    section.refuse_useless(&["hash_by"], "balance = \"hash\"")?;
    Ok(balance)
}

fn hash_by(section: &Section<'_>) -> Result<HashBy, Problem> {
    let text = section.text("hash_by")?.unwrap_or("address");
    let by = match text.split_once(':') {
        None if text == "address" => Some(HashBy::Address),
        Some(("cookie", name)) if is_token(name) => Some(HashBy::Cookie(name.to_owned())),
        Some(("header", name)) if is_token(name) => Some(HashBy::Header(name.to_ascii_lowercase())),
        _ => None,
    };
    by.ok_or_else(|| {
        let wanted = "\"address\", \"cookie:NAME\" or \"header:NAME\"";
        section.bad_text("hash_by", text, wanted)
    })
}

fn sticky(section: &Section<'_>) -> Result<Option<StickyConfig>, Problem> {
    let Some(cookie) = section.text("sticky_cookie")? else {
        section.refuse_useless(&["sticky_secret"], "sticky_cookie")?;
        return Ok(None);
    };
    if !is_token(cookie) {
        return Err(section.bad_text("sticky_cookie", cookie, "a cookie's name such as hopgate"));
    }
    Ok(Some(StickyConfig {
        cookie: cookie.to_owned(),
        secret: section
            .text("sticky_secret")?
            .unwrap_or_default()
            .to_owned(),
    }))
}

fn servers(section: &Section<'_>) -> Result<Vec<ServerConfig>, Problem> {
    const EXAMPLE: &str = "servers = [{ address = \"10.0.0.1:80\" }]";
    let place = |index: usize, _: &Table| format!("server {} of {}", index + 1, section.place());
    let mut servers: Vec<ServerConfig> = Vec::new();
    for entry in section.sections_at("servers", place, SERVER_KEYS)? {
        let text = entry.required_text("address", "address = \"10.0.0.1:80\"")?;
        let address = Address::parse(text).ok_or_else(|| wrong_address(&entry, "address", text))?;
        if servers.iter().any(|other| other.address == address) {
            return Err(Problem::EntryTwice {
                place: section.place().to_owned(),
                value: format!("the server {address}"),
            });
        }
        let weight = entry.whole("weight", 0..=WEIGHT_MAX)?;
        servers.push(ServerConfig {
            address,
            weight: weight.map_or(1, to_u32),
            backup: entry.flag("backup")?.unwrap_or(false),
        });
    }
    if servers.is_empty() {
        return Err(section.missing("servers", EXAMPLE));
    }
    Ok(servers)
}

fn health_of(section: &Section<'_>) -> Result<HealthConfig, Problem> {
    const OF_HTTP: &[&str] = &["method", "path", "host", "status", "body"];
    let check = match section.required_text("check", "check = \"http\"")? {
        "http" => Check::Http(http_check(section)?),
        "tcp" => Check::Tcp,
        "mysql" => Check::Mysql {
            user: mysql_user(section)?,
        },
        other => {
            return Err(section.bad_text("check", other, "\"http\", \"tcp\" or \"mysql\""));
        }
    };
    if !matches!(check, Check::Http(_)) {
        section.refuse_useless(OF_HTTP, "check = \"http\"")?;
    }
    if !matches!(check, Check::Mysql { .. }) {
        section.refuse_useless(&["user"], "check = \"mysql\"")?;
    }
    let initially_up = match section.text("initial")? {
        None | Some("up") => true,
        Some("down") => false,
        Some(other) => return Err(section.bad_text("initial", other, "\"up\" or \"down\"")),
    };
    Ok(HealthConfig {
        check,
        interval: milliseconds(section, "interval_ms", 10, 2_000)?,
        timeout: milliseconds(section, "timeout_ms_max", 1, 1_000)?,
        rise: section.whole("rise", 1..=100)?.map_or(2, to_u32),
        fall: section.whole("fall", 1..=100)?.map_or(3, to_u32),
        initially_up,
    })
}

fn http_check(section: &Section<'_>) -> Result<HttpCheck, Problem> {
    let method = section.text("method")?.unwrap_or("GET");
    if !is_token(method) {
        return Err(section.bad_text("method", method, "a method such as GET or HEAD"));
    }
    let path = section.text("path")?.unwrap_or("/");
    if !path.starts_with('/') || !is_visible(path) {
        return Err(section.bad_text("path", path, "a path such as /health"));
    }
    let host = section.text("host")?;
    if let Some(host) = host.filter(|host| host.is_empty() || !is_visible(host)) {
        return Err(section.bad_text("host", host, "a host such as app.example.org"));
    }
    let status = section.text("status")?.unwrap_or("200-399");
    let ranges = status.split(',').map(|range| status_range(range.trim()));
    let ranges = ranges.collect::<Option<Vec<_>>>().ok_or_else(|| {
        let wanted = "statuses from 100 to 599 such as 200-399 or 200,204";
        section.bad_text("status", status, wanted)
    })?;
    let body = section.text("body")?;
    if body == Some("") {
        return Err(section.bad_text("body", "", "a text that the body has to contain"));
    }
    Ok(HttpCheck {
        method: method.to_owned(),
        path: path.to_owned(),
        host: host.map(str::to_owned),
        status: ranges,
        body: body.map(str::to_owned),
    })
}

fn status_range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let status = |text: &str| {
        let status = text.parse::<u16>().ok();
        status.filter(|status| (100..=599).contains(status))
    };
    let (first, last) = (status(first)?, status(last)?);
    (first <= last).then_some((first, last))
}

fn mysql_user(section: &Section<'_>) -> Result<Option<String>, Problem> {
    let user = section.text("user")?;
    let unusable =
        |user: &&str| user.is_empty() || user.contains('\0') || user.len() > USER_BYTES_MAX;
    match user {
        Some(user) if unusable(&user) => {
            Err(section.bad_text("user", user, "the name of a user of the database"))
        }
        user => Ok(user.map(str::to_owned)),
    }
}

fn eject_of(section: &Section<'_>) -> Result<EjectConfig, Problem> {
    let count = |key, range, default| -> Result<u32, Problem> {
        Ok(section.whole(key, range)?.map_or(default, to_u32))
    };
    let share = count("share_percent_max", 1..=100, 50)?;
    Ok(EjectConfig {
        connect_errors: count("connect_errors", 0..=1_000_000, 3)?,
        server_errors: count("server_errors", 0..=1_000_000, 5)?,
        error_percent: count("error_percent", 0..=100, 0)?,
        window: milliseconds(section, "window_ms", 100, 10_000)?,
        window_requests_min: u64::from(count("window_requests_min", 1..=1_000_000, 20)?),
        ejected_first: milliseconds(section, "ejected_ms_first", 1, 10_000)?,
        ejected_max: milliseconds(section, "ejected_ms_max", 1, 300_000)?,
        share_percent_max: u8::try_from(share).unwrap_or(100),
    })
}

/// `[resolver]`, or its defaults.
pub(in crate::config) fn resolver(section: Option<Section<'_>>) -> Result<ResolverConfig, Problem> {
    let empty = Table::new();
    let section = match section {
        Some(section) => section,
        None => Section::open("[resolver]".to_owned(), &empty, RESOLVER_KEYS)?,
    };
    let nameservers = section.texts("nameservers")?.into_iter().map(|text| {
        let address = text.parse::<SocketAddr>();
        let wanted = "addresses and ports such as 10.0.0.53:53";
        address.map_err(|_| section.bad_text("nameservers", text, wanted))
    });
    Ok(ResolverConfig {
        nameservers: nameservers.collect::<Result<_, _>>()?,
        timeout: milliseconds(&section, "timeout_ms_max", 1, 2_000)?,
        ttl_min: milliseconds(&section, "ttl_ms_min", 100, 1_000)?,
        ttl_max: milliseconds(&section, "ttl_ms_max", 100, 300_000)?,
    })
}

fn milliseconds(
    section: &Section<'_>,
    key: &'static str,
    least: i64,
    default: u64,
) -> Result<Duration, Problem> {
    let number = section.whole(key, least..=MS_MAX)?;
    let number = number.map_or(default, i64::unsigned_abs);
    Ok(Duration::from_millis(number))
}

fn to_u32(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// A token of HTTP (RFC 9110, section 5.6.2): names of methods, headers and cookies.
fn is_token(text: &str) -> bool {
    let byte = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(byte)
}

fn is_visible(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}
