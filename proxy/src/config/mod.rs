//! The checked configuration: every value in range, every path absolute, every default filled in.
//!
//! [`Config::load`] is the only way to get one. Reading and checking live in `load`, the typed view of a TOML
//! table in `table`; nothing else in the crate knows TOML.

mod front_check;
mod hold;
mod http2;
mod load;
mod machine;
mod quic;
mod raw;
mod release;
mod route;
mod table;
mod tls;
mod traces;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::hold::FRONT_TENTHS_MAX;
use cutover_protocol::id::{ServiceName, Site};
use serde::{Deserialize, Serialize};

use crate::forwarded::{LoopId, TrustedFrom};
use crate::http::front_check::FrontChecks;
use crate::limit::rate::RateLimit;
use crate::route::RouteTable;
pub use hold::{AtLimit, HoldConfig};
pub use http2::Http2;
pub use load::ConfigError;
pub use machine::Machine;
pub use quic::Quic;
pub use raw::UnknownName;
pub use release::Release;
pub use table::Problem;
pub use tls::{
    AcmeConfig, CertificateConfig, Challenge, ClientsConfig, Demand, TlsConfig, TlsVersion,
    UpstreamTlsConfig,
};
pub use traces::TracesConfig;
pub use upstream::{
    Balance, Check, EjectConfig, HashBy, HealthConfig, HttpCheck, ProxyVersion, ResolverConfig,
    ServerConfig, StickyConfig, UpstreamConfig, UpstreamProtocol, UpstreamRef,
};

/// Everything the proxy was told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file it was read from; a reload reads it again.
    pub file: PathBuf,
    /// Where registers and gate states survive a crash; one file a service.
    pub state_dir: PathBuf,
    /// The unix socket that commands arrive on.
    pub control: PathBuf,
    /// Worker threads, at least one.
    pub workers: usize,
    /// Where Prometheus may scrape, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Where access lines go, if anywhere.
    pub access_log: Option<LogConfig>,
    /// Where spans of requests go, if anywhere.
    pub traces: Option<TracesConfig>,
    /// Counts, bytes and times that bound everything.
    pub limits: Limits,
    /// Bounds and times of HTTP/3 listeners.
    pub quic: Quic,
    /// How the held are let through.
    pub release: Release,
    /// Who resolves the names of servers.
    pub resolver: ResolverConfig,
    /// In the order of the file; names are unique.
    pub tls: Vec<TlsConfig>,
    /// In the order of the file; names are unique.
    pub upstreams: Vec<UpstreamConfig>,
    /// In the order of the file; names and listening addresses are unique.
    pub services: Vec<ServiceConfig>,
}

impl Config {
    /// What is ordered from authorities.
    #[must_use]
    pub fn acme(&self) -> Vec<AcmeConfig> {
        let orders = self.tls.iter().filter_map(|profile| profile.acme.clone());
        orders.collect()
    }
}

/// How access lines are written, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// Where to.
    pub target: LogTarget,
    /// In which form.
    pub format: LogFormat,
}

/// The form of an access line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `name=value` pairs.
    Text,
    /// An object a line.
    Json,
    /// The common log format of the first web servers, for the tools that read it.
    Common,
}

/// Where access lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard output.
    Stdout,
    /// Appended to this file.
    File(PathBuf),
}

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 and 1.1, and whatever a client upgrades to.
    Http,
    /// Bytes, untouched.
    Tcp,
}

/// Where a listener is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListenAddress {
    /// An address and a port; port zero lets the kernel choose.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(formatter),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

/// One listener of a service.
#[derive(Debug, Clone)]
pub struct ListenConfig {
    /// Where.
    pub address: ListenAddress,
    /// Who has to say by the PROXY protocol for whom it connects.
    pub(crate) proxy_protocol_from: TrustedFrom,
    /// The TLS profile that clients meet, if they speak TLS.
    pub tls: Option<Box<str>>,
    /// Whether HTTP/3 is spoken as well, on the UDP port of the same number.
    pub http3: bool,
    /// What it does when the budget of the held is used.
    pub when_full: DoorWhenFull,
}

/// What a listener does when the budget of the held is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DoorWhenFull {
    /// It stops reading, then accepting.
    #[default]
    Stop,
    /// It goes on with both: for health probes that come by a listener of their own.
    GoOn,
}

/// One service: its listeners, a gate and two upstreams.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// Its name in commands, metrics and the state file.
    pub name: ServiceName,
    /// Where clients connect, at least one place.
    pub listen: Vec<ListenConfig>,
    /// What they speak.
    pub protocol: Protocol,
    /// Who serves at site `source`.
    pub source: UpstreamRef,
    /// Who serves at site `target`.
    pub target: UpstreamRef,
    /// Peers whose word about their clients is believed.
    pub(crate) trusted_from: TrustedFrom,
    /// What a hold means for its requests, where their route says nothing else.
    pub hold: HoldConfig,
    /// How long a request may be held.
    pub hold_max: Duration,
    /// The shortest timeout of what stands in front of the proxy, if anything does.
    pub front_timeout: Option<Duration>,
    /// The field, in lower case, by which a trusted peer marks what comes from the application itself.
    pub own_marker: Option<Box<str>>,
    /// What the proxy calls itself in CDN-Loop, where it guards against loops.
    pub(crate) loop_id: Option<LoopId>,
    /// Health probes of balancers in front of us, where no route says otherwise.
    pub(crate) front_checks: FrontChecks,
    /// How many requests it takes, before any route is looked at.
    pub(crate) rate: Option<Arc<RateLimit>>,
    /// What part of the requests needs other treatment.
    pub(crate) routes: RouteTable,
    /// What becomes of raw connections that no route is for.
    pub unknown_name: UnknownName,
}

/// Part of the time in front of us that is left for an answer of ours to be read: a twentieth.
const FRONT_SPARE_PARTS: u32 = 20;
/// The most that is left.
const FRONT_SPARE_MAX: Duration = Duration::from_secs(1);

impl ServiceConfig {
    /// No request is held for longer: its bound, or just so long that somebody still reads the answer.
    #[must_use]
    pub fn hold_bound(&self) -> Duration {
        let front = self.front_timeout.map(|front| {
            let spare = (front / FRONT_SPARE_PARTS).min(FRONT_SPARE_MAX);
            front.saturating_sub(spare)
        });
        front.map_or(self.hold_max, |front| front.min(self.hold_max))
    }

    /// A hold longer than this comes close to what clients see as an error of somebody in front of us.
    #[must_use]
    pub fn front_warning(&self) -> Option<Duration> {
        let front = self.front_timeout?;
        Some(front / 10 * u32::from(FRONT_TENTHS_MAX))
    }

    /// Who serves at a site.
    #[must_use]
    pub const fn upstream(&self, site: Site) -> &UpstreamRef {
        match site {
            Site::Source => &self.source,
            Site::Target => &self.target,
        }
    }
}

/// Bounds. Each has its TOML key's name, with the unit last.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Client connections in all; the listener leaves the rest in the kernel's backlog.
    pub connections_max: usize,
    /// Client connections of one address (IPv4) or /64 network (IPv6); zero for no limit of its own.
    pub address_connections_max: usize,
    /// Resident memory of the process above which new work is refused; zero for no limit of its own.
    pub memory_bytes_max: u64,
    /// The same, in hundredths of the control group's limit, for the whole group; zero for no such limit.
    pub memory_percent_max: u64,
    /// Requests held at once, per service.
    pub held_max: usize,
    /// Memory of the held, per service, in bytes by our own count; zero for no limit of its own.
    pub held_bytes_max: u64,
    /// Held of one client address (IPv4) or /64 network (IPv6), per service; zero for no limit.
    pub held_per_address_max: usize,
    /// How long a request may be held before it is refused with 503.
    pub hold_max: Duration,
    /// What `Retry-After` says in every 503, in seconds.
    pub retry_after_s: u64,
    /// Longest request or response head, in bytes.
    pub head_bytes_max: usize,
    /// Silence of a client between two requests.
    pub client_idle_max: Duration,
    /// From the first byte of a head to its last.
    pub client_head_max: Duration,
    /// Silence of a client inside a body, in either direction.
    pub client_silence_max: Duration,
    /// What every window of waiting for a client's body must bring, for each of its seconds; zero for nothing.
    pub client_body_bytes_per_s_min: u64,
    /// The length of such a window; the first one is the grace.
    pub client_body_window: Duration,
    /// Longest request body; zero for no limit.
    pub body_bytes_max: u64,
    /// From the decision to connect upstream to the connection.
    pub connect_max: Duration,
    /// From the last byte of a request to the first of its response.
    pub response_max: Duration,
    /// From one piece of a response to the next.
    pub between_bytes_max: Duration,
    /// From the first byte that goes upstream to the last byte of the answer; no limit if absent.
    pub request_max: Option<Duration>,
    /// Silence of an upgraded or raw connection, both directions together.
    pub tunnel_idle_max: Duration,
    /// How long an unused upstream connection is kept.
    pub upstream_idle_max: Duration,
    /// Unused upstream connections kept per worker and service.
    pub upstream_idle_count_max: usize,
    /// How long an answer that nobody waits for any more may take before its connection is closed.
    pub abandoned_max: Duration,
    /// How long an upstream may take to close its end of a connection that we have closed.
    pub upstream_close_max: Duration,
    /// How long a refused client may go on sending before its connection is dropped.
    pub linger_max: Duration,
    /// How long requests in flight may take to finish at shutdown.
    pub shutdown_max: Duration,
    /// How long a new process may take to take over.
    pub upgrade_max: Duration,
    /// Of HTTP/2 connections.
    pub http2: Http2,
}
