//! From a TOML file to a [`Config`]: one function a table, each value checked where it is read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::id::{NAME_BYTES_MAX, ServiceName};
use toml::Table;

use super::front_check;
use super::hold;
use super::http2::{self, Http2};
use super::machine::Machine;
use super::quic;
use super::raw;
use super::release;
use super::route::{self, OfService};
use super::table::{Problem, Section};
use super::tls::{self, TlsConfig};
use super::traces;
use super::upstream::{RESOLVER_KEYS, reference, resolver, upstreams};
use super::{
    Config, DoorWhenFull, Limits, ListenAddress, ListenConfig, LogConfig, LogFormat, LogTarget,
    Protocol, ServiceConfig, UpstreamConfig,
};
use crate::forwarded::LoopId;
use crate::http::front_check::FrontChecks;

/// A configuration that cannot be used: which file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}", path = .path.display())]
pub struct ConfigError {
    /// The file as it was named.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: Problem,
}

const ROOT_KEYS: &[&str] = &[
    "state_dir",
    "control",
    "workers",
    "metrics",
    "access_log",
    "traces",
    "limits",
    "http2",
    "quic",
    "release",
    "resolver",
    "tls",
    "upstream",
    "service",
];
const METRICS_KEYS: &[&str] = &["listen"];
const ACCESS_LOG_KEYS: &[&str] = &["path", "format"];
const LIMITS_KEYS: &[&str] = &[
    "connections_max",
    "address_connections_max",
    "memory_bytes_max",
    "memory_percent_max",
    "held_max",
    "held_bytes_max",
    "held_per_address_max",
    "hold_ms_max",
    "retry_after_s",
    "head_bytes_max",
    "client_idle_ms_max",
    "client_head_ms_max",
    "client_silence_ms_max",
    "client_body_bytes_per_s_min",
    "client_body_window_ms",
    "body_bytes_max",
    "connect_ms_max",
    "response_ms_max",
    "between_bytes_ms_max",
    "request_ms_max",
    "tunnel_idle_ms_max",
    "upstream_idle_ms_max",
    "upstream_idle_count_max",
    "abandoned_ms_max",
    "upstream_close_ms_max",
    "linger_ms_max",
    "shutdown_ms_max",
    "upgrade_ms_max",
];
const SERVICE_KEYS: &[&str] = &[
    "name",
    "listen",
    "protocol",
    "source",
    "target",
    "trusted_from",
    "at_cut",
    "own_from",
    "release_class",
    "hold_ms_max",
    "at_limit",
    "front_timeout_ms",
    "when_full",
    "own_marker",
    "loop_id",
    "front_check",
    "rate",
    "unknown_name",
    "route",
];
const LISTEN_KEYS: &[&str] = &[
    "address",
    "tls",
    "http3",
    "proxy_protocol_from",
    "when_full",
];

/// Longest time a limit may name: a week, in milliseconds.
pub(super) const MS_MAX: i64 = 7 * 24 * 3600 * 1000;

impl Config {
    /// Reads and checks a configuration file. Relative paths in it are taken from the folder of the file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or holds something unknown, missing or out of range.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let at_path = |problem| ConfigError {
            path: path.to_owned(),
            problem,
        };
        let text = std::fs::read_to_string(path)
            .map_err(Problem::Unreadable)
            .map_err(at_path)?;
        let file = std::path::absolute(path)
            .map_err(Problem::Unreadable)
            .map_err(at_path)?;
        let folder = file.parent().unwrap_or(&file);
        let mut config = Self::parse(&text, folder).map_err(at_path)?;
        config.file = file;
        Ok(config)
    }

    /// The same from text, for whoever has no file; `folder` is where its relative paths begin.
    pub(crate) fn parse(text: &str, folder: &Path) -> Result<Self, Problem> {
        let table: Table = text.parse().map_err(|error| syntax(text, &error))?;
        let root = Section::open("the top of the file".to_owned(), &table, ROOT_KEYS)?;
        let state_dir =
            folder.join(root.required_text("state_dir", "state_dir = \"/var/lib/hopgate\"")?);
        let control =
            folder.join(root.required_text("control", "control = \"/run/hopgate/control.sock\"")?);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = root.whole("workers", 1..=1024)?.map_or(cores, to_usize);
        let metrics = match root.section("metrics", METRICS_KEYS)? {
            Some(section) => {
                Some(section.required_address("listen", "listen = \"127.0.0.1:9100\"")?)
            }
            None => None,
        };
        let access_log = match root.section("access_log", ACCESS_LOG_KEYS)? {
            Some(section) => Some(access_log(&section, folder)?),
            None => None,
        };
        let traces = match root.section("traces", traces::KEYS)? {
            Some(section) => Some(traces::traces(&section)?),
            None => None,
        };
        let limits = limits(
            root.section("limits", LIMITS_KEYS)?,
            http2::http2(root.section("http2", http2::KEYS)?)?,
            table
                .get("service")
                .and_then(|all| all.as_array())
                .map_or(1, Vec::len),
        )?;
        let quic = quic::quic(root.section("quic", quic::KEYS)?)?;
        let release = release::release(root.section("release", release::KEYS)?)?;
        let resolver = resolver(root.section("resolver", RESOLVER_KEYS)?)?;
        let tls = tls::profiles(&root, folder)?;
        let upstreams = upstreams(&root, folder)?;
        let around = Around {
            folder,
            limits: &limits,
            profiles: &tls,
            upstreams: &upstreams,
        };
        let services = services(&root, around)?;
        Ok(Self {
            file: PathBuf::new(),
            state_dir,
            control,
            workers,
            metrics,
            access_log,
            traces,
            limits,
            quic,
            release,
            resolver,
            tls,
            upstreams,
            services,
        })
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> Problem {
    let start = error.span().map_or(0, |span| span.start);
    let line = 1 + text
        .bytes()
        .take(start)
        .filter(|byte| *byte == b'\n')
        .count();
    Problem::Syntax {
        line,
        message: error.message().replace('\n', ", "),
    }
}

fn access_log(section: &Section<'_>, folder: &Path) -> Result<LogConfig, Problem> {
    let path = section.required_text("path", "path = \"access.log\" (or \"stdout\")")?;
    let target = match path {
        "stdout" => LogTarget::Stdout,
        path => LogTarget::File(folder.join(path)),
    };
    let format = section.choice(
        "format",
        &[
            ("text", LogFormat::Text),
            ("json", LogFormat::Json),
            ("common", LogFormat::Common),
        ],
        "\"text\", \"json\" or \"common\"",
    )?;
    Ok(LogConfig {
        target,
        format: format.unwrap_or(LogFormat::Text),
    })
}

/// What the tables of services refer to.
#[derive(Clone, Copy)]
struct Around<'a> {
    folder: &'a Path,
    limits: &'a Limits,
    profiles: &'a [TlsConfig],
    upstreams: &'a [UpstreamConfig],
}

fn services(root: &Section<'_>, around: Around<'_>) -> Result<Vec<ServiceConfig>, Problem> {
    let mut services: Vec<ServiceConfig> = Vec::new();
    for section in root.sections("service", SERVICE_KEYS)? {
        let next = service(&section, around)?;
        if services.iter().any(|other| other.name == next.name) {
            return Err(Problem::Twice {
                what: "name",
                value: next.name.to_string(),
            });
        }
        let earlier = services.iter().flat_map(|other| &other.listen);
        let mut taken: Vec<&ListenAddress> = earlier.map(|listen| &listen.address).collect();
        for ListenConfig { address, .. } in &next.listen {
            let any_port = matches!(address, ListenAddress::Tcp(address) if address.port() == 0);
            if !any_port && taken.contains(&address) {
                return Err(Problem::Twice {
                    what: "listen",
                    value: address.to_string(),
                });
            }
            taken.push(address);
        }
        services.push(next);
    }
    if services.is_empty() {
        return Err(root.missing(
            "service",
            "a [[service]] with name, listen, source and target",
        ));
    }
    Ok(services)
}

fn service(section: &Section<'_>, around: Around<'_>) -> Result<ServiceConfig, Problem> {
    let name = section.required_text("name", "name = \"web\"")?;
    let name = name.parse::<ServiceName>().map_err(|_| {
        const { assert!(NAME_BYTES_MAX == 64) };
        section.bad_text(
            "name",
            name,
            "1 to 64 letters, digits, '-', '_' or '.', starting with a letter or digit",
        )
    })?;
    let front_checks = front_check::front_checks(section, None)?;
    let listen = listeners(section, around.folder, around.profiles, &front_checks)?;
    let protocols = [("http", Protocol::Http), ("tcp", Protocol::Tcp)];
    let protocol = section
        .choice("protocol", &protocols, "\"http\" or \"tcp\"")?
        .unwrap_or(Protocol::Http);
    quic::fits(section, protocol, &listen)?;
    let source = reference(section, "source", around.upstreams)?
        .ok_or_else(|| section.missing("source", "source = \"10.0.0.1:80\""))?;
    let target = reference(section, "target", around.upstreams)?
        .ok_or_else(|| section.missing("target", "target = \"10.0.1.1:80\""))?;
    let hold = hold::hold(section, None)?;
    let (hold_max, front_timeout) = hold::bounds(section, around.limits.hold_max)?;
    let of_service = OfService {
        protocol,
        hold: &hold,
        hold_max,
        front_checks: &front_checks,
    };
    let routes = route::routes(section, of_service, around.limits, around.upstreams)?;
    if protocol == Protocol::Tcp {
        raw::loop_id_fits(section, [&source, &target], &routes, around.upstreams)?;
    }
    Ok(ServiceConfig {
        name,
        listen,
        protocol,
        source,
        target,
        trusted_from: route::networks(section, "trusted_from")?,
        rate: route::rate(section)?,
        unknown_name: raw::unknown_name(section, protocol, &routes)?,
        routes,
        own_marker: own_marker(section)?,
        loop_id: loop_id(section)?,
        front_checks,
        hold,
        hold_max,
        front_timeout,
    })
}

/// A field that is taken off whatever does not come from a trusted peer.
fn own_marker(section: &Section<'_>) -> Result<Option<Box<str>>, Problem> {
    let Some(text) = section.text("own_marker")? else {
        return Ok(None);
    };
    section.refuse_without("own_marker", "trusted_from")?;
    route::editable(section, "own_marker", text).map(|name| Some(name.into()))
}

/// What the proxy calls itself to those behind it.
fn loop_id(section: &Section<'_>) -> Result<Option<LoopId>, Problem> {
    const WANTED: &str = "1 to 64 letters, digits, \"-\", \"_\" and \".\"";
    let Some(text) = section.text("loop_id")? else {
        return Ok(None);
    };
    let id = LoopId::new(text).ok_or_else(|| section.bad_text("loop_id", text, WANTED))?;
    Ok(Some(id))
}

/// `listen` is one address, or a list of tables with an address each.
fn listeners(
    section: &Section<'_>,
    folder: &Path,
    profiles: &[TlsConfig],
    checks: &FrontChecks,
) -> Result<Vec<ListenConfig>, Problem> {
    const EXAMPLE: &str = "listen = \"0.0.0.0:8080\"";
    if section.holds_text("listen") {
        let text = section.required_text("listen", EXAMPLE)?;
        let address = listen_address(section, "listen", text, folder)?;
        return Ok(vec![ListenConfig {
            address,
            tls: None,
            proxy_protocol_from: crate::forwarded::TrustedFrom::default(),
            http3: false,
            when_full: door_when_full(checks, false),
        }]);
    }
    let mut listeners = Vec::new();
    let mut said = Vec::new();
    let place = |index: usize, _: &Table| format!("listener {} of {}", index + 1, section.place());
    for listener in section.sections_at("listen", place, LISTEN_KEYS)? {
        let text = listener.required_text("address", "address = \"0.0.0.0:8080\"")?;
        let address = listen_address(&listener, "address", text, folder)?;
        let tls = listener.text("tls")?;
        if let Some(name) = tls
            && !profiles.iter().any(|profile| *profile.name == *name)
        {
            let known = profiles.iter().map(|profile| &*profile.name);
            return Err(listener.no_such("tls", "profile", name, known));
        }
        let http3 = quic::http3(&listener, &address, tls)?;
        let tls = tls.map(Box::from);
        listeners.push(ListenConfig {
            address,
            tls,
            proxy_protocol_from: route::networks(&listener, "proxy_protocol_from")?,
            http3,
            when_full: DoorWhenFull::Stop,
        });
        said.push(listener_when_full(&listener)?);
    }
    let otherwise = door_when_full(checks, said.contains(&Some(DoorWhenFull::GoOn)));
    for (listener, said) in listeners.iter_mut().zip(said) {
        listener.when_full = said.unwrap_or(otherwise);
    }
    if listeners.is_empty() {
        return Err(section.missing("listen", EXAMPLE));
    }
    Ok(listeners)
}

/// Of a listener that does not say it itself. A balancer that finds no door any more takes all clients away, so doors
/// stay open for its probes, unless they have one of their own.
fn door_when_full(checks: &FrontChecks, have_their_own: bool) -> DoorWhenFull {
    if checks.is_empty() || have_their_own {
        DoorWhenFull::Stop
    } else {
        DoorWhenFull::GoOn
    }
}

fn listener_when_full(listener: &Section<'_>) -> Result<Option<DoorWhenFull>, Problem> {
    let choices = [("stop", DoorWhenFull::Stop), ("go_on", DoorWhenFull::GoOn)];
    listener.choice("when_full", &choices, "\"stop\" or \"go_on\"")
}

fn listen_address(
    section: &Section<'_>,
    key: &'static str,
    text: &str,
    folder: &Path,
) -> Result<ListenAddress, Problem> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(ListenAddress::Unix(folder.join(path)));
    }
    let address = text.parse().map(ListenAddress::Tcp);
    address.map_err(|_| {
        section.bad_text(
            key,
            text,
            "an address and a port such as 10.0.0.1:80, or unix: and a path",
        )
    })
}

/// Of a configuration with so many services.
fn limits(section: Option<Section<'_>>, http2: Http2, services: usize) -> Result<Limits, Problem> {
    let empty = Table::new();
    let section = match section {
        Some(section) => section,
        None => Section::open("[limits]".to_owned(), &empty, LIMITS_KEYS)?,
    };
    let ms =
        |key, default: u64| -> Result<Duration, Problem> { milliseconds(&section, key, default) };
    let count = |key, least, most, default| {
        section
            .whole(key, least..=most)
            .map(|n| n.map_or(default, to_usize))
    };
    let bytes = |key, default| {
        section
            .whole(key, 0..=i64::MAX)
            .map(|n| n.map_or(default, to_u64))
    };
    let machine = Machine::look();
    let connections_max = count("connections_max", 1, 10_000_000, machine.connections_max())?;
    if section.has("connections_max") && connections_max as u64 > machine.connections_limit() {
        return Err(section.more_than_files(
            "connections_max",
            connections_max,
            machine.open_files,
        ));
    }
    let held_bytes_max = bytes("held_bytes_max", machine.held_bytes_max(services))?;
    let held_default = Machine::held_max(match held_bytes_max {
        0 => machine.held_bytes_max(services),
        most => most,
    });
    Ok(Limits {
        connections_max,
        address_connections_max: count("address_connections_max", 0, 10_000_000, 0)?,
        memory_bytes_max: bytes("memory_bytes_max", 0)?,
        memory_percent_max: section
            .whole("memory_percent_max", 0..=100)?
            .map_or(90, to_u64),
        held_max: count("held_max", 0, 10_000_000, held_default)?,
        held_bytes_max,
        held_per_address_max: count("held_per_address_max", 0, 10_000_000, 0)?,
        hold_max: ms("hold_ms_max", 60_000)?,
        retry_after_s: section
            .whole("retry_after_s", 0..=86_400)?
            .map_or(5, i64::unsigned_abs),
        head_bytes_max: count("head_bytes_max", 1024, 1 << 20, 16 * 1024)?,
        client_idle_max: ms("client_idle_ms_max", 60_000)?,
        client_head_max: ms("client_head_ms_max", 10_000)?,
        client_silence_max: ms("client_silence_ms_max", 30_000)?,
        client_body_bytes_per_s_min: bytes("client_body_bytes_per_s_min", 500)?,
        client_body_window: ms("client_body_window_ms", 10_000)?,
        body_bytes_max: bytes("body_bytes_max", 0)?,
        connect_max: ms("connect_ms_max", 2_000)?,
        response_max: ms("response_ms_max", 60_000)?,
        between_bytes_max: ms("between_bytes_ms_max", 60_000)?,
        request_max: optional_ms(&section, "request_ms_max")?,
        tunnel_idle_max: ms("tunnel_idle_ms_max", 3_600_000)?,
        upstream_idle_max: ms("upstream_idle_ms_max", 4_000)?,
        upstream_idle_count_max: count("upstream_idle_count_max", 0, 100_000, 256)?,
        abandoned_max: ms("abandoned_ms_max", 300_000)?,
        upstream_close_max: ms("upstream_close_ms_max", 1_000)?,
        linger_max: ms("linger_ms_max", 1_000)?,
        shutdown_max: ms("shutdown_ms_max", 30_000)?,
        upgrade_max: ms("upgrade_ms_max", 30_000)?,
        http2,
    })
}

pub(super) fn milliseconds(
    section: &Section<'_>,
    key: &'static str,
    default: u64,
) -> Result<Duration, Problem> {
    milliseconds_or(section, key, Duration::from_millis(default))
}

/// A time, or what holds without it.
pub(super) fn milliseconds_or(
    section: &Section<'_>,
    key: &'static str,
    default: Duration,
) -> Result<Duration, Problem> {
    let number = section.whole(key, 1..=MS_MAX)?;
    Ok(number.map_or(default, |number| Duration::from_millis(to_u64(number))))
}

/// Zero and absent mean no limit.
pub(super) fn optional_ms(
    section: &Section<'_>,
    key: &'static str,
) -> Result<Option<Duration>, Problem> {
    let number = section.whole(key, 0..=MS_MAX)?.map(i64::unsigned_abs);
    Ok(number.filter(|ms| *ms > 0).map(Duration::from_millis))
}

/// Numbers below zero are refused where they are read.
pub(super) fn to_u64(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) fn to_usize(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}
