//! What the client process is told, and what it tells: one JSON text each way, so that client and lab are separate
//! processes with an open-file limit of their own.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One measurement of one proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The proxy's listener.
    pub address: SocketAddr,
    /// Clear text or TLS 1.3.
    pub transport: Transport,
    /// What every connection does, again and again.
    pub exchange: Exchange,
    /// How many connections.
    pub connections: usize,
    /// Load before anything is counted, in milliseconds.
    pub warm_up_ms: u64,
    /// Load that is counted, in milliseconds.
    pub measured_ms: u64,
    /// The processes whose processor time is taken at the beginning and the end of the counted load.
    pub watched: Vec<u32>,
}

/// What carries an exchange to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// Plain TCP.
    Clear,
    /// TLS 1.3, one cipher suite and one group, no resumption.
    Tls,
}

/// Whether a connection carries one exchange or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Connection {
    /// All of them.
    Kept,
    /// Each exchange has its own.
    Fresh,
}

/// One question and its whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exchange {
    /// A GET whose answer has a body of `bytes`.
    Get {
        /// Size of the body.
        bytes: u64,
        /// Kept or fresh.
        connection: Connection,
    },
    /// A POST with a body of `bytes` and a short answer.
    Post {
        /// Size of the body.
        bytes: u64,
    },
    /// A masked WebSocket message of `bytes` that comes back, after one upgrade a connection.
    Echo {
        /// Size of the message, below 126 so that its length fits the first two bytes of the frame.
        bytes: u8,
    },
    /// Raw TCP: eight bytes that say how many are wanted, and then those.
    Raw {
        /// Bytes that come back.
        bytes: u64,
        /// Kept or fresh.
        connection: Connection,
    },
}

impl Exchange {
    /// Bytes of content one exchange moves in its larger direction.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Get { bytes, .. } | Self::Post { bytes } | Self::Raw { bytes, .. } => bytes,
            Self::Echo { bytes } => bytes as u64,
        }
    }

    /// Kept or fresh.
    #[must_use]
    pub const fn connection(self) -> Connection {
        match self {
            Self::Get { connection, .. } | Self::Raw { connection, .. } => connection,
            Self::Post { .. } | Self::Echo { .. } => Connection::Kept,
        }
    }
}

/// What came of one measurement.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Exchanges that ended well.
    pub requests: u64,
    /// Exchanges that did not, those of the warm-up included.
    pub errors: u64,
    /// What the first of them was.
    pub first_error: Option<String>,
    /// Time from the first counted exchange to the end of the last, in nanoseconds.
    pub elapsed_ns: u64,
    /// Processor time of the watched processes in between, in nanoseconds.
    pub processor_ns: u64,
    /// Half of the exchanges took at most this, in nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100 exchanges took at most this, in nanoseconds.
    pub p99_ns: u64,
}

/// What came of opening idle connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Connections that could not be opened or whose exchange failed.
    pub errors: u64,
    /// What the first of them was.
    pub first_error: Option<String>,
}
