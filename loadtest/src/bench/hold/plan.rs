//! What a client process is told and what clients and origins write down: JSON between processes, so that each has an
//! open-file limit of its own.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// HTTP/1.1 in clear.
    Clear,
    /// HTTP/1.1 over TLS.
    Tls,
    /// HTTP/2 over TLS.
    H2,
    /// HTTP/3.
    H3,
    /// The handshake of a WebSocket, in clear.
    Websocket,
    /// Raw TCP.
    Tcp,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Clear,
        Self::Tls,
        Self::H2,
        Self::H3,
        Self::Websocket,
        Self::Tcp,
    ];

    /// The name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Tls => "tls",
            Self::H2 => "h2",
            Self::H3 => "h3",
            Self::Websocket => "websocket",
            Self::Tcp => "tcp",
        }
    }
}

/// Which requests carry a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Posts {
    /// Every other one. A WebSocket's handshake never has one.
    Half,
    /// All of them.
    All,
}

/// Whether a connection asks something as soon as it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum First {
    /// It does, and waits for the answer.
    Ask,
    /// It stays silent until told.
    Wait,
}

/// What a client makes of an answer that sends it elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirects {
    /// It goes there, with a GET, as browsers do.
    Follow,
    /// It counts as a failure.
    Fail,
}

/// What a connection does once told to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Manner {
    /// One wave of requests at a time.
    Waves,
    /// One request after the other, without a pause, until told to stop.
    Steady,
}

/// Connections that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// What they speak.
    pub kind: Kind,
    /// With whom.
    pub address: SocketAddr,
    /// How many.
    pub connections: usize,
    /// Requests of each in the first wave; one, unless it can have several at once.
    pub streams: usize,
    /// Requests of each in the second wave.
    pub more: usize,
    /// Which of them carry a body.
    pub posts: Posts,
    /// Whether it asks at once.
    pub first: First,
    /// What it does with redirects.
    pub redirects: Redirects,
    /// In waves or without a pause.
    pub manner: Manner,
}

impl Group {
    /// Requests of all its connections in the wave of this number.
    #[must_use]
    pub const fn requests(&self, wave: Wave) -> usize {
        let each = match wave {
            _ if matches!(self.manner, Manner::Steady) => 0,
            Wave::First => match self.first {
                First::Ask => 1,
                First::Wait => 0,
            },
            Wave::Held => self.streams,
            Wave::More => self.more,
            Wave::Steady => 0,
        };
        self.connections * each
    }
}

/// What one client process does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Its number: the upper part of its ids.
    pub process: u32,
    /// Connections that are being opened at the same time.
    pub at_once: usize,
    /// Its connections.
    pub groups: Vec<Group>,
}

/// A request's method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Method {
    /// Without a body.
    #[serde(rename = "g")]
    Get,
    /// With one.
    #[serde(rename = "p")]
    Post,
}

/// When a request was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wave {
    /// As soon as its connection was there.
    #[serde(rename = "f")]
    First,
    /// When the clients were told to.
    #[serde(rename = "h")]
    Held,
    /// When they were told a second time.
    #[serde(rename = "m")]
    More,
    /// By a client that never pauses.
    #[serde(rename = "s")]
    Steady,
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nothing yet.
    #[serde(rename = "w")]
    Waiting,
    /// A complete answer with this status, and where the status is a good one with the request's own id in it.
    #[serde(rename = "a")]
    Answered(u16),
    /// No complete answer.
    #[serde(rename = "b")]
    Broken,
    /// The client left, as it was told.
    #[serde(rename = "l")]
    Left,
}

/// One request, as its client saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Sent once in a run, whatever comes of it.
    pub id: u64,
    /// What it was sent by.
    pub kind: Kind,
    /// How.
    pub method: Method,
    /// When, roughly.
    pub wave: Wave,
    /// By which connection of its process.
    pub connection: u32,
    /// When its first byte was about to be sent.
    pub sent_ns: u64,
    /// When its answer was complete, or given up; 0 before that.
    pub ended_ns: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What a client process has to say in the end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// All its requests.
    pub requests: Vec<Request>,
    /// Some of its failures, as it saw them.
    pub faults: Vec<String>,
}

/// One request, as an origin saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    /// The request's id.
    pub id: u64,
    /// How it came.
    pub method: Method,
    /// When its head was there.
    pub began_ns: u64,
    /// When it was done; 0 when it broke off.
    pub ended_ns: u64,
}

/// What an origin has to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// All requests, in the order in which they came.
    pub executions: Vec<Execution>,
    /// Most requests it had at once since it was last asked to count anew.
    pub peak: usize,
}

/// Size of a posted body, in bytes.
pub const BODY_BYTES: usize = 1024;

/// The path of a request.
#[must_use]
pub fn path(kind: Kind, id: u64) -> String {
    match kind {
        Kind::Websocket => format!("/ws/{id:016x}"),
        _ => format!("/do/{id:016x}"),
    }
}

/// The body of the answer to a request.
#[must_use]
pub fn answer(id: u64) -> String {
    format!("{id:016x}\n")
}
