//! Names of servers: asks DNS what stands behind them, again whenever an answer has run out, and puts what it finds
//! in their groups.
//!
//! What cannot be resolved stays as it was: a failing resolver, a server that answers nonsense, or a name that is
//! suddenly gone never takes a working server away. Each such failure is logged when it begins and when it ends.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig as Nameservers,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver};
use tokio::time::sleep;

use super::address::{Address, Endpoint};
use super::group::{Group, Place};
use crate::config::ResolverConfig;

/// What the system resolves without DNS.
const HOSTS_FILE: &str = "/etc/hosts";
/// How long what stands there is used: reading it is cheap.
const HOSTS_TTL: Duration = Duration::from_secs(10);
/// Most targets of one SRV name.
const TARGETS_MAX: usize = 64;

/// Why a name could not be resolved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// Not a name that DNS knows.
    #[error("it is not a name for DNS: {0}")]
    Name(String),
    /// No answer that could be used.
    #[error("{0}")]
    Dns(#[source] NetError),
    /// An answer that says: nothing.
    #[error("nothing stands behind it")]
    Empty,
}

/// Asks for names.
#[derive(Debug)]
pub(crate) struct Resolver {
    dns: TokioResolver,
    hosts_file: PathBuf,
    ttl_min: Duration,
    ttl_max: Duration,
}

/// Which kinds of addresses are in use.
#[derive(Debug, Clone, Copy, Default)]
struct Kinds {
    v4: bool,
    v6: bool,
}

/// What stands behind a name, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found<T> {
    entries: Vec<T>,
    ttl: Duration,
}

impl Resolver {
    /// Asks the configured name servers, or those of the system.
    ///
    /// # Errors
    /// The system's configuration cannot be used.
    pub(crate) fn new(config: &ResolverConfig) -> Result<Self, NetError> {
        let provider = TokioRuntimeProvider::default();
        let mut builder = if config.nameservers.is_empty() {
            TokioResolver::builder(provider)?
        } else {
            let servers = config.nameservers.iter().map(nameserver).collect();
            let servers = Nameservers::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(servers, provider)
        };
        let options = builder.options_mut();
        options.timeout = config.timeout;
        options.try_tcp_on_error = true;
        // We remember answers ourselves, within our own bounds, and read the file of hosts each time.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        Ok(Self {
            dns: builder.build()?,
            hosts_file: PathBuf::from(HOSTS_FILE),
            ttl_min: config.ttl_min,
            ttl_max: config.ttl_max,
        })
    }

    /// Every endpoint behind an address, and how long the answer may be used.
    ///
    /// # Errors
    /// Nothing usable was found; what was known before should be kept.
    async fn resolve(
        &self,
        address: &Address,
        known: Kinds,
    ) -> Result<(Vec<Target>, Duration), ResolveError> {
        let found = match address {
            Address::Socket(_) | Address::Unix(_) => return Err(ResolveError::Empty),
            Address::Name { name, port } => {
                let found = self.addresses(name, known).await?;
                let targets = found.entries.into_iter().map(|ip| Target::new(ip, *port));
                Found {
                    entries: targets.collect(),
                    ttl: found.ttl,
                }
            }
            Address::Service(name) => self.services(name, known).await?,
        };
        if found.entries.is_empty() {
            return Err(ResolveError::Empty);
        }
        Ok((
            found.entries,
            found
                .ttl
                .clamp(self.ttl_min, self.ttl_max.max(self.ttl_min)),
        ))
    }

    /// Addresses of a name, of both kinds. Some name servers never answer questions for one of them: that is not
    /// fatal while there is the other, and no server of that kind to be lost.
    async fn addresses(&self, name: &str, known: Kinds) -> Result<Found<IpAddr>, ResolveError> {
        let name = parse(name)?;
        if let Some(found) = self.in_hosts_file(&name) {
            return Ok(found);
        }
        let of = |kind| self.lookup(name.clone(), kind, |data| data.ip_addr());
        let (v4, v6) = tokio::join!(of(RecordType::A), of(RecordType::AAAA));
        let (v4, v6) = match (v4, v6) {
            (Ok(v4), Ok(v6)) => (v4, v6),
            (Ok(v4), Err(_)) if !known.v6 && !v4.entries.is_empty() => (v4.clone(), v4.emptied()),
            (Err(_), Ok(v6)) if !known.v4 && !v6.entries.is_empty() => (v6.emptied(), v6),
            (_, Err(error)) | (Err(error), _) => return Err(error),
        };
        let ttl = match (v4.entries.is_empty(), v6.entries.is_empty()) {
            (false, true) => v4.ttl,
            (true, false) => v6.ttl,
            _ => v4.ttl.min(v6.ttl),
        };
        let mut entries = v4.entries;
        entries.extend(v6.entries);
        Ok(Found {
            entries: reachable(entries),
            ttl,
        })
    }

    /// Targets of an SRV name: the lowest priority serves, all others stand by (RFC 2782).
    async fn services(&self, name: &str, known: Kinds) -> Result<Found<Target>, ResolveError> {
        let service = |data: &RData| match data {
            RData::SRV(srv) => Some(srv.clone()),
            _ => None,
        };
        let found = self.lookup(parse(name)?, RecordType::SRV, service).await?;
        let first = found.entries.iter().map(|srv| srv.priority).min();
        let mut ttl = found.ttl;
        let mut targets = Vec::new();
        for srv in found.entries.iter().take(TARGETS_MAX) {
            // A target of "." says: no such service here.
            if srv.target.is_root() {
                continue;
            }
            let addresses = self.addresses(&srv.target.to_ascii(), known).await?;
            ttl = ttl.min(addresses.ttl);
            targets.extend(addresses.entries.into_iter().map(|ip| Target {
                // A weight of zero is "hardly any", not "none".
                weight: Some(u32::from(srv.weight).max(1)),
                stands_by: Some(srv.priority) != first,
                ..Target::new(ip, srv.port)
            }));
        }
        Ok(Found {
            entries: targets,
            ttl,
        })
    }

    /// One question. An answer without records is an answer.
    async fn lookup<T>(
        &self,
        name: Name,
        kind: RecordType,
        pick: impl Fn(&RData) -> Option<T>,
    ) -> Result<Found<T>, ResolveError> {
        let lookup = match self.dns.lookup(name, kind).await {
            Ok(lookup) => lookup,
            Err(error) if error.is_no_records_found() => {
                return Ok(Found {
                    entries: Vec::new(),
                    ttl: self.ttl_min,
                });
            }
            Err(error) => return Err(ResolveError::Dns(error)),
        };
        let answers = lookup.answers();
        let ttl = answers.iter().map(|record| record.ttl).min().unwrap_or(0);
        Ok(Found {
            entries: answers
                .iter()
                .filter_map(|record| pick(&record.data))
                .collect(),
            ttl: Duration::from_secs(u64::from(ttl)),
        })
    }

    /// What the file of hosts says; a name that stands there is not asked for in DNS.
    fn in_hosts_file(&self, name: &Name) -> Option<Found<IpAddr>> {
        let hosts = hosts(&self.hosts_file).ok()?;
        let kinds = [RecordType::A, RecordType::AAAA];
        let found = kinds.map(|kind| hosts.lookup_static_host(&Query::query(name.clone(), kind)));
        let answers = found.iter().flatten().flat_map(|lookup| lookup.answers());
        let entries: Vec<IpAddr> = answers.filter_map(|record| record.data.ip_addr()).collect();
        (!entries.is_empty()).then(|| Found {
            entries: reachable(entries),
            ttl: HOSTS_TTL,
        })
    }
}

impl<T> Found<T> {
    /// Nothing, for as long.
    const fn emptied(&self) -> Self {
        Self {
            entries: Vec::new(),
            ttl: self.ttl,
        }
    }
}

/// One server behind a name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: SocketAddr,
    /// Where the records say one.
    weight: Option<u32>,
    stands_by: bool,
}

impl Target {
    const fn new(ip: IpAddr, port: u16) -> Self {
        Self {
            address: SocketAddr::new(ip, port),
            weight: None,
            stands_by: false,
        }
    }
}

fn nameserver(address: &SocketAddr) -> NameServerConfig {
    let at_port = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(at_port);
    NameServerConfig::new(address.ip(), true, connections.into())
}

fn parse(name: &str) -> Result<Name, ResolveError> {
    Name::from_ascii(name).map_err(|error| ResolveError::Name(error.to_string()))
}

fn hosts(path: &Path) -> io::Result<Hosts> {
    let mut hosts = Hosts::default();
    hosts.read_hosts_conf(std::fs::File::open(path)?)?;
    Ok(hosts)
}

/// Without those this machine has no way to, such as IPv6 where there is none. Connecting a datagram socket asks the
/// routing table and sends nothing. If there is a way to none, the fault is ours for the moment, and all stay.
fn reachable(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let has_way = |address: &&IpAddr| {
        let any: SocketAddr = match address {
            IpAddr::V4(_) => ([0_u8; 4], 0).into(),
            IpAddr::V6(_) => ([0_u16; 8], 0).into(),
        };
        let socket = UdpSocket::bind(any);
        // Any port will do: nothing is sent to it.
        socket
            .and_then(|socket| socket.connect((**address, 9)))
            .is_ok()
    };
    let with_way: Vec<IpAddr> = addresses.iter().filter(has_way).copied().collect();
    if with_way.is_empty() {
        addresses
    } else {
        with_way
    }
}

/// Resolves one entry of a group for ever, and puts what it finds in its place.
///
/// # Cancel safety
/// Dropping the future ends the questions; what was found stays.
pub(super) async fn keep(resolver: Arc<Resolver>, group: Arc<Group>, entry: usize) {
    let mut fails = false;
    let mut is_first = group.members().places_of(entry).is_empty();
    loop {
        let refreshed = refresh(&resolver, &group, entry).await;
        if std::mem::take(&mut is_first) {
            group.note_resolved();
        }
        let ttl = match refreshed {
            Ok(ttl) => {
                if fails {
                    let address = &group.config().servers[entry].address;
                    tracing::info!(group = group.name(), %address, "can be resolved again");
                }
                fails = false;
                ttl
            }
            Err(error) => {
                if !fails {
                    let address = &group.config().servers[entry].address;
                    tracing::warn!(group = group.name(), %address, "cannot be resolved, servers stay as they are: {error}");
                }
                fails = true;
                resolver.ttl_min
            }
        };
        sleep(ttl).await;
    }
}

/// Resolves one entry of a group once; says how long the answer may be used.
pub(super) async fn refresh(
    resolver: &Resolver,
    group: &Group,
    entry: usize,
) -> Result<Duration, ResolveError> {
    let Some(server) = group.config().servers.get(entry) else {
        return Err(ResolveError::Empty);
    };
    let mut known = Kinds::default();
    for place in group.members().places_of(entry) {
        if let Endpoint::Tcp(address) = place.endpoint {
            known.v4 |= address.is_ipv4();
            known.v6 |= address.is_ipv6();
        }
    }
    let (targets, ttl) = resolver.resolve(&server.address, known).await?;
    let mut places = HashMap::new();
    for target in targets {
        let place = Place {
            endpoint: Endpoint::Tcp(target.address),
            weight: target.weight.unwrap_or(server.weight),
            backup: server.backup || target.stands_by,
        };
        places.entry(target.address).or_insert(place);
    }
    // In an order that does not change with the order of the answer, or every answer would look like a change.
    let mut places: Vec<(SocketAddr, Place)> = places.into_iter().collect();
    places.sort_by_key(|(address, _)| *address);
    let places = places.into_iter().map(|(_, place)| place).collect();
    group.replace(entry, places, Instant::now());
    Ok(ttl)
}
