//! `[[upstream]]` and `[resolver]`: groups of servers, how they are balanced, checked and spared, and who resolves
//! their names. The values are here, their reading in `read`; neither resolves or connects.

mod read;

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::Duration;

use super::tls::UpstreamTlsConfig;
use crate::upstream::Address;

pub(super) use read::{RESOLVER_KEYS, reference, resolver, upstreams};

/// What a service or a route names as its upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpstreamRef {
    /// An `[[upstream]]`, which exists.
    Group(String),
    /// An address: a group of one.
    Plain(Address),
}

impl std::fmt::Display for UpstreamRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl UpstreamRef {
    /// The name of the group it stands for.
    #[must_use]
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Group(name) => Cow::Borrowed(name),
            Self::Plain(address) => Cow::Owned(address.to_string()),
        }
    }
}

/// A group of servers that do the same work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Unique among groups; of a group of one plain address, that address.
    pub name: String,
    /// What the servers speak.
    pub protocol: UpstreamProtocol,
    /// Which server takes a request.
    pub balance: Balance,
    /// The cookie by which a client stays with its server, if it does.
    pub sticky: Option<StickyConfig>,
    /// How long a server that came back takes to get its whole share again; zero for at once.
    pub slow_start: Duration,
    /// The PROXY protocol's version that connections begin with, if they do.
    pub proxy_protocol: Option<ProxyVersion>,
    /// At least one; addresses are unique.
    pub servers: Vec<ServerConfig>,
    /// Active checks, if there are any.
    pub health: Option<HealthConfig>,
    /// Passive ejection, if there is any.
    pub eject: Option<EjectConfig>,
    /// TLS towards the servers, if they speak it.
    pub tls: Option<UpstreamTlsConfig>,
}

/// What servers speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1, or raw bytes for a raw service.
    Http1,
    /// HTTP/2: by ALPN over TLS, with prior knowledge without.
    Http2,
}

/// Which server takes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn.
    RoundRobin,
    /// The one with the fewest active requests.
    LeastConnections,
    /// The less busy of two at random.
    TwoChoices,
    /// Always the same for the same key.
    Hash(HashBy),
}

/// What a consistent hash looks at. A request without that cookie or header is placed by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashBy {
    /// The client's address: all of an IPv4 address, the network half of an IPv6 address.
    Address,
    /// This cookie's value.
    Cookie(String),
    /// This header's value.
    Header(String),
}

/// How a client stays with its server.
#[derive(Clone, PartialEq, Eq)]
pub struct StickyConfig {
    /// The cookie's name.
    pub cookie: String,
    /// Mixed into the cookie's value, so that nobody can find the address behind it by trying all.
    pub secret: String,
}

/// Version of the PROXY protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// One entry of `servers`; a name may stand for several servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Where.
    pub address: Address,
    /// Its share; zero for none but what sticks to it.
    pub weight: u32,
    /// Used only when no other is usable.
    pub backup: bool,
}

/// Active checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthConfig {
    /// What is asked.
    pub check: Check,
    /// From one check to the next, a tenth more or less.
    pub interval: Duration,
    /// For the whole of one check.
    pub timeout: Duration,
    /// So many good checks in a row bring a server up.
    pub rise: u32,
    /// So many bad ones in a row bring it down.
    pub fall: u32,
    /// Whether it is up before its first check.
    pub initially_up: bool,
}

/// What an active check asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// One HTTP request.
    Http(HttpCheck),
    /// A connection, closed at once.
    Tcp,
    /// The greeting of MySQL or MariaDB.
    Mysql {
        /// Who logs in, without a password, and leaves; without a name the greeting is enough.
        user: Option<String>,
    },
}

/// One HTTP request and the answer that is good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCheck {
    /// `GET` or `HEAD`, or whatever the application takes.
    pub method: String,
    /// With its query.
    pub path: String,
    /// The Host header; the server's own address if there is none.
    pub host: Option<String>,
    /// Ranges, both ends included.
    pub status: Vec<(u16, u16)>,
    /// What the first 64 KiB of the body have to contain.
    pub body: Option<String>,
}

/// Passive ejection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EjectConfig {
    /// So many failed connections in a row; zero to ignore them.
    pub connect_errors: u32,
    /// So many answers of 500 and above, or broken ones, in a row; zero to ignore them.
    pub server_errors: u32,
    /// Failed requests in a window, in percent; zero to ignore the share.
    pub error_percent: u32,
    /// That window.
    pub window: Duration,
    /// The share counts only from so many requests in a window.
    pub window_requests_min: u64,
    /// The first ejection's length; each further one is twice as long.
    pub ejected_first: Duration,
    /// Longest ejection.
    pub ejected_max: Duration,
    /// At most this share of a group's servers is ejected at once.
    pub share_percent_max: u8,
}

/// Who resolves names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverConfig {
    /// Those of the system if empty.
    pub nameservers: Vec<SocketAddr>,
    /// For one question to one of them.
    pub timeout: Duration,
    /// An answer is used at least for so long, and a failed question asked again after it.
    pub ttl_min: Duration,
    /// An answer is used at most for so long.
    pub ttl_max: Duration,
}

impl std::fmt::Debug for StickyConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StickyConfig")
            .field("cookie", &self.cookie)
            .finish_non_exhaustive()
    }
}

impl UpstreamConfig {
    /// The group of one server that a service names by its address.
    #[must_use]
    pub fn of_one(address: Address) -> Self {
        Self {
            name: address.to_string(),
            protocol: UpstreamProtocol::Http1,
            balance: Balance::RoundRobin,
            sticky: None,
            slow_start: Duration::ZERO,
            proxy_protocol: None,
            servers: vec![ServerConfig {
                address,
                weight: 1,
                backup: false,
            }],
            health: None,
            eject: None,
            tls: None,
        }
    }

    /// Whether connections made for one may be used for the other, and servers be the same.
    #[must_use]
    pub fn connects_like(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.proxy_protocol == other.proxy_protocol
            && self.sticky == other.sticky
            && self.tls == other.tls
    }
}
