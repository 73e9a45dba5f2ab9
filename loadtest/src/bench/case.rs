//! The cases: what is measured, and which bars Hopgate must meet there. A table and nothing else.

use crate::bench::plan::{Connection, Exchange, Transport};

/// Which configuration of the proxies a case needs: `configs/lab/bench/PROXY-SETUP.*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// HTTP in clear text.
    Clear,
    /// HTTP over TLS, version 1.1 and 2.
    Tls,
    /// Raw TCP.
    Tcp,
}

impl Setup {
    /// The word in the names of configuration files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Tls => "tls",
            Self::Tcp => "tcp",
        }
    }
}

/// How a case loads a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Our own client: so many connections, each at one exchange after the other.
    Closed {
        /// How many.
        connections: usize,
        /// What each does.
        exchange: Exchange,
    },
    /// h2load: HTTP/2 over TLS, `streams` GETs at once on each of `connections`.
    Http2 {
        /// How many connections.
        connections: usize,
        /// How many requests at once on each.
        streams: usize,
        /// Size of the answer's body.
        bytes: u64,
    },
    /// Connections that made one GET each and stay open.
    Idle {
        /// How many.
        connections: usize,
    },
}

/// What a bar is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Figure {
    /// Processor time of the proxy for one request.
    CpuPerRequest,
    /// The latency 99 of 100 requests stay below.
    P99,
    /// Requests a second, which for bodies of one size is throughput.
    RequestsPerSecond,
    /// Growth of resident memory for one idle connection.
    BytesPerIdleConnection,
}

/// With whom Hopgate is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rival {
    /// The better of the two.
    Better,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

/// A demand on Hopgate: at most (for throughput: at least) `factor` times what the rival has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bar {
    /// What is compared.
    pub figure: Figure,
    /// With whom.
    pub rival: Rival,
    /// The factor.
    pub factor: f64,
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Case {
    /// Its name on the command line and in JSON.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// How the proxies are set up.
    pub setup: Setup,
    /// What is done to them.
    pub load: Load,
    /// What Hopgate must meet.
    pub bars: &'static [Bar],
}

const fn bar(figure: Figure, rival: Rival, factor: f64) -> Bar {
    Bar {
        figure,
        rival,
        factor,
    }
}

const CPU: Bar = bar(Figure::CpuPerRequest, Rival::Better, 1.0);
const CPU_NEAR: Bar = bar(Figure::CpuPerRequest, Rival::Better, 1.05);
const P99: Bar = bar(Figure::P99, Rival::Better, 1.0);
const THROUGHPUT: Bar = bar(Figure::RequestsPerSecond, Rival::Haproxy, 1.0);
const MEMORY: Bar = bar(Figure::BytesPerIdleConnection, Rival::Haproxy, 1.0);
const HTTP2: Bar = bar(Figure::CpuPerRequest, Rival::Haproxy, 1.2);
const HANDSHAKE: Bar = bar(Figure::CpuPerRequest, Rival::Nginx, 1.0);

/// Size of a small answer's body: a fragment of JSON.
const SMALL: u64 = 64;
const MIB: u64 = 1 << 20;
/// Below the open-file limit of the smallest machine we measure on, with room for connections to the origin.
const IDLE_CONNECTIONS: usize = 10_000;

const fn get(connections: usize, bytes: u64, connection: Connection) -> Load {
    let exchange = Exchange::Get { bytes, connection };
    Load::Closed {
        connections,
        exchange,
    }
}

const fn raw(connections: usize, bytes: u64, connection: Connection) -> Load {
    let exchange = Exchange::Raw { bytes, connection };
    Load::Closed {
        connections,
        exchange,
    }
}

const fn case(
    name: &'static str,
    title: &'static str,
    setup: Setup,
    load: Load,
    bars: &'static [Bar],
) -> Case {
    Case {
        name,
        title,
        setup,
        load,
        bars,
    }
}

/// All cases, in the order they run.
pub const CASES: &[Case] = &[
    case(
        "get-1",
        "GET, 1 kept connection",
        Setup::Clear,
        get(1, SMALL, Connection::Kept),
        &[CPU_NEAR],
    ),
    case(
        "get-64",
        "GET, 64 kept connections",
        Setup::Clear,
        get(64, SMALL, Connection::Kept),
        &[CPU, P99],
    ),
    case(
        "get-1000",
        "GET, 1,000 kept connections",
        Setup::Clear,
        get(1000, SMALL, Connection::Kept),
        &[CPU_NEAR],
    ),
    case(
        "post-1k",
        "POST of 1 KiB, 64 kept connections",
        Setup::Clear,
        Load::Closed {
            connections: 64,
            exchange: Exchange::Post { bytes: 1024 },
        },
        &[CPU],
    ),
    case(
        "connection-per-request",
        "GET, a connection for each, 64 at once",
        Setup::Clear,
        get(64, SMALL, Connection::Fresh),
        &[CPU],
    ),
    case(
        "get-1m",
        "answers of 1 MiB, 16 kept connections",
        Setup::Clear,
        get(16, MIB, Connection::Kept),
        &[CPU],
    ),
    case(
        "get-100m",
        "answers of 100 MiB, 4 kept connections",
        Setup::Clear,
        get(4, 100 * MIB, Connection::Kept),
        &[CPU_NEAR],
    ),
    case(
        "upload-10m",
        "POST of 10 MiB, 4 kept connections",
        Setup::Clear,
        Load::Closed {
            connections: 4,
            exchange: Exchange::Post { bytes: 10 * MIB },
        },
        &[CPU_NEAR],
    ),
    case(
        "websocket-echo",
        "WebSocket messages of 64 bytes, 64 connections",
        Setup::Clear,
        Load::Closed {
            connections: 64,
            exchange: Exchange::Echo { bytes: 64 },
        },
        &[CPU_NEAR],
    ),
    case(
        "tls-get-64",
        "GET over TLS 1.3, 64 kept connections",
        Setup::Tls,
        get_tls(64, Connection::Kept),
        &[CPU_NEAR],
    ),
    case(
        "tls-handshake",
        "GET over TLS 1.3, a full handshake for each, 64 at once",
        Setup::Tls,
        get_tls(64, Connection::Fresh),
        &[HANDSHAKE],
    ),
    case(
        "h2-tls",
        "HTTP/2 GET over TLS, 8 connections x 16 streams",
        Setup::Tls,
        Load::Http2 {
            connections: 8,
            streams: 16,
            bytes: SMALL,
        },
        &[HTTP2],
    ),
    case(
        "tcp-stream",
        "raw TCP, 100 MiB at a time, 4 connections",
        Setup::Tcp,
        raw(4, 100 * MIB, Connection::Kept),
        &[THROUGHPUT],
    ),
    case(
        "tcp-short",
        "raw TCP, 64 bytes and a connection for each, 64 at once",
        Setup::Tcp,
        raw(64, SMALL, Connection::Fresh),
        &[],
    ),
    case(
        "idle-clear",
        "10,000 idle kept connections",
        Setup::Clear,
        Load::Idle {
            connections: IDLE_CONNECTIONS,
        },
        &[MEMORY],
    ),
    case(
        "idle-tls",
        "10,000 idle kept connections over TLS 1.3",
        Setup::Tls,
        Load::Idle {
            connections: IDLE_CONNECTIONS,
        },
        &[MEMORY],
    ),
];

const fn get_tls(connections: usize, connection: Connection) -> Load {
    get(connections, SMALL, connection)
}

impl Case {
    /// What carries its exchanges.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        match self.setup {
            Setup::Tls => Transport::Tls,
            Setup::Clear | Setup::Tcp => Transport::Clear,
        }
    }

    /// Bytes an exchange moves, where that is what the case is about.
    #[must_use]
    pub const fn bulk_bytes(&self) -> Option<u64> {
        match self.load {
            Load::Closed { exchange, .. } if exchange.bytes() >= MIB => Some(exchange.bytes()),
            _ => None,
        }
    }
}

/// The cases that `filters` name or, where a filter is no whole name, whose name contains it; all without filters.
///
/// # Errors
/// The first filter that fits no case.
pub fn chosen(filters: &[String]) -> Result<Vec<Case>, &str> {
    select(CASES, |case| case.name, filters)
}

/// Of `cases`, those that `filters` name or, where a filter is no whole name, whose name contains it; all without
/// filters.
///
/// # Errors
/// The first filter that fits no case.
pub fn select<'f, C: Copy>(
    cases: &[C],
    name: impl Fn(&C) -> &'static str,
    filters: &'f [String],
) -> Result<Vec<C>, &'f str> {
    let fits = |case: &C, filter: &String| {
        let whole = cases.iter().any(|case| name(case) == filter);
        name(case) == filter || (!whole && name(case).contains(filter.as_str()))
    };
    let vain = |filter: &&String| !cases.iter().any(|case| fits(case, filter));
    if let Some(vain) = filters.iter().find(vain) {
        return Err(vain);
    }
    let wanted = |case: &&C| filters.is_empty() || filters.iter().any(|filter| fits(case, filter));
    Ok(cases.iter().filter(wanted).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(filters: &[&str]) -> Vec<&'static str> {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let cases = chosen(&filters).unwrap();
        cases.iter().map(|case| case.name).collect()
    }

    #[test]
    fn a_filter_takes_every_case_that_contains_it_and_each_once() {
        assert_eq!(names(&["idle", "tls"]).len(), 5);
        assert_eq!(names(&["get-64"]), ["get-64"]);
        assert_eq!(names(&[]).len(), CASES.len());
    }

    #[test]
    fn a_filter_that_fits_nothing_is_named() {
        let filters = ["get".to_owned(), "quic".to_owned()];
        assert_eq!(chosen(&filters).unwrap_err(), "quic");
    }

    #[test]
    fn names_are_unique() {
        let mut all = names(&[]);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), CASES.len());
    }
}
