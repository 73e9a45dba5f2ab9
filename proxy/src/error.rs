//! What can go wrong with one request: whose fault it is, whether the request may be sent again, and what the
//! client is told. This is the only place that maps an error to an HTTP status.

use std::io;

use crate::http::chunked::ChunkError;
use crate::http::front_check::Green;
use crate::http::head::HeadError;
use crate::http::request::RequestId;
use crate::limit::Reason;
use crate::limit::rate::TooMany;
use crate::route::PathError;
use crate::service::Eviction;
use crate::upstream::Outcome;

/// Who caused an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The client.
    Client,
    /// The upstream.
    Upstream,
    /// The proxy, by its limits or its state.
    Us,
}

/// Whether a request can have reached an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// No byte of it left us: sending it again cannot double it.
    Safe,
    /// It may have been executed.
    Unsafe,
}

/// In what words a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// Plain text.
    Text,
    /// A page that loads itself again.
    Page,
    /// gRPC's own.
    Grpc,
}

/// Why a request was not forwarded, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The request's head is not acceptable.
    #[error("the request has {0}")]
    Head(HeadError),
    /// The request's path is not acceptable where routes look at paths.
    #[error("the request has {0}")]
    Path(PathError),
    /// A raw connection asks for a server name of no route, where only those are served.
    #[error("nobody of that name is served here")]
    ServerName,
    /// More requests than `rate` allows.
    #[error("too many requests; come back in {after} s", after = .0.retry_after_s())]
    Rate(TooMany),
    /// The request has passed this proxy before.
    #[error("this request has been here before: two proxies send it to each other")]
    Loop,
    /// The proxy uses as much memory as it may.
    #[error("this proxy has no memory to spare")]
    Memory,
    /// The request's body is longer than `body_bytes_max`.
    #[error("the request body is longer than allowed")]
    BodyTooLong,
    /// The request's body comes more slowly than `client_body_bytes_per_s_min`.
    #[error("the request body comes too slowly")]
    BodyTooSlow,
    /// The client has as many streams open as `streams_max` allows.
    #[error("more streams at once than this proxy allows")]
    Streams,
    /// The request's head is longer than `head_bytes_max`.
    #[error("the request head is longer than this proxy reads")]
    HeadTooLong,
    /// The request's head did not arrive within `client_head_ms_max`.
    #[error("the request head took too long")]
    HeadTimeout,
    /// The request's body is not acceptable.
    #[error("the request body has {0}")]
    Chunk(ChunkError),
    /// The body of a stream's request is not as long as its head says.
    #[error("the request body has not the length its head says")]
    BodyLength,
    /// The trailer of a stream's request is not acceptable.
    #[error("the request's trailer has {0}")]
    Trailer(HeadError),
    /// The upstream says, by its protocol, that it did not process the request.
    #[error("the upstream refused the request unprocessed")]
    NotProcessed,
    /// A client asked for a tunnel, and the upstream's HTTP/2 has none of the kind.
    #[error("the upstream's HTTP/2 offers no such tunnel")]
    NoTunnel,
    /// The upstream switched to WebSocket without the right key.
    #[error("the upstream's WebSocket handshake is not an answer to ours")]
    AnswerKey,
    /// The client left, or stopped in the middle of its body.
    #[error("the client left")]
    ClientLeft(#[source] io::Error),
    /// The client sent or took nothing for `client_silence_ms_max`.
    #[error("the client was silent for too long")]
    ClientSilent,
    /// The service holds as many requests as it may.
    #[error("too many requests are waiting for this service")]
    HeldFull,
    /// As many requests of the client's address are held as may be.
    #[error("too many requests of your address are waiting for this service")]
    HeldOfAddress,
    /// The request was held for as long as it may be.
    #[error("the service did not come back in time")]
    HeldTooLong(Words),
    /// The time that its client had given it passed while it was held.
    #[error(
        "the time that was given for an answer passed before the service came back; nothing was carried out"
    )]
    OutOfTime(Words),
    /// The request did not end before its service had to stand still.
    #[error(
        "the service is being moved and this request took too long; whether it was carried out is not known. Its number is {0}"
    )]
    Cut(RequestId),
    /// A health probe of a balancer in front of us that would have to wait; the only answer of ours that says that all
    /// is well.
    #[error("the service is held; a front check is answered meanwhile")]
    FrontCheck(Green),
    /// The proxy stops while the request is held.
    #[error("this proxy is shutting down")]
    Shutdown,
    /// No server of the upstream's group is usable.
    #[error("no server of the upstream is up")]
    NoServer,
    /// No connection to the upstream.
    #[error("the upstream cannot be reached")]
    Connect(#[source] io::Error),
    /// The connection ended before any byte of the request left us.
    #[error("the upstream closed the connection before the request was sent")]
    NotSent,
    /// The upstream closed without an answer.
    #[error("the upstream closed the connection without an answer")]
    NoAnswer(#[source] io::Error),
    /// The upstream's answer is not HTTP as we accept it.
    #[error("the upstream's answer has {0}")]
    AnswerHead(HeadError),
    /// The upstream's head is longer than `head_bytes_max`.
    #[error("the upstream's answer has a head longer than this proxy reads")]
    AnswerHeadTooLong,
    /// The upstream's chunks are not acceptable.
    #[error("the upstream's answer has {0}")]
    AnswerChunk(ChunkError),
    /// The upstream closed in the middle of its answer.
    #[error("the upstream's answer ended early")]
    AnswerCut(#[source] io::Error),
    /// The answer was not complete within `request_ms_max`.
    #[error("the request took too long")]
    TookTooLong,
    /// The upstream sent nothing for `response_ms_max`, or `between_bytes_ms_max`.
    #[error("the upstream did not answer in time")]
    UpstreamSilent,
}

impl RequestError {
    /// Who caused it.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Head(_)
            | Self::Path(_)
            | Self::ServerName
            | Self::Rate(_)
            | Self::BodyTooLong
            | Self::BodyTooSlow
            | Self::Streams
            | Self::HeadTooLong
            | Self::HeadTimeout
            | Self::Chunk(_)
            | Self::BodyLength
            | Self::Trailer(_)
            | Self::ClientLeft(_)
            | Self::ClientSilent => Fault::Client,
            Self::HeldFull
            | Self::HeldOfAddress
            | Self::FrontCheck(_)
            | Self::HeldTooLong(_)
            | Self::OutOfTime(_)
            | Self::Cut(_)
            | Self::Shutdown
            | Self::Loop
            | Self::Memory => Fault::Us,
            Self::NoServer
            | Self::Connect(_)
            | Self::NotSent
            | Self::NoAnswer(_)
            | Self::AnswerHead(_)
            | Self::AnswerHeadTooLong
            | Self::AnswerKey
            | Self::NotProcessed
            | Self::NoTunnel
            | Self::AnswerChunk(_)
            | Self::AnswerCut(_)
            | Self::UpstreamSilent
            | Self::TookTooLong => Fault::Upstream,
        }
    }

    /// What it says of the server that had the request; `None` where nothing. A server that cannot be reached was
    /// reported when it could not be.
    #[must_use]
    pub(crate) const fn outcome(&self) -> Option<Outcome> {
        match (self.fault(), self) {
            (_, Self::NoServer | Self::Connect(_) | Self::NotSent) => None,
            (Fault::Upstream, _) => Some(Outcome::Broken),
            (Fault::Client | Fault::Us, _) => None,
        }
    }

    /// Whether the request can have reached an application.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Head(_)
            | Self::Path(_)
            | Self::ServerName
            | Self::Rate(_)
            | Self::Loop
            | Self::Memory
            | Self::Streams
            | Self::HeadTooLong
            | Self::HeadTimeout
            | Self::HeldFull
            | Self::HeldOfAddress
            | Self::FrontCheck(_)
            | Self::HeldTooLong(_)
            | Self::OutOfTime(_)
            | Self::Shutdown
            | Self::NoServer
            | Self::Connect(_)
            | Self::NotProcessed
            | Self::NoTunnel
            | Self::NotSent => Retry::Safe,
            Self::Chunk(_)
            | Self::Cut(_)
            | Self::BodyTooLong
            | Self::BodyTooSlow
            | Self::BodyLength
            | Self::Trailer(_)
            | Self::AnswerKey
            | Self::ClientLeft(_)
            | Self::ClientSilent
            | Self::NoAnswer(_)
            | Self::AnswerHead(_)
            | Self::AnswerHeadTooLong
            | Self::AnswerChunk(_)
            | Self::AnswerCut(_)
            | Self::UpstreamSilent
            | Self::TookTooLong => Retry::Unsafe,
        }
    }

    /// What the client is told, or `None` when nobody is there to be told.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Head(HeadError::UnknownCoding | HeadError::Protocol) => Some(501),
            Self::Head(HeadError::Connect) => Some(405),
            Self::Head(HeadError::Version) => Some(505),
            Self::Head(HeadError::TooManyFields) | Self::HeadTooLong => Some(431),
            Self::Head(_)
            | Self::Path(_)
            | Self::Chunk(_)
            | Self::BodyLength
            | Self::Trailer(_) => Some(400),
            Self::HeadTimeout | Self::ClientSilent | Self::BodyTooSlow => Some(408),
            Self::BodyTooLong => Some(413),
            Self::Rate(_) => Some(429),
            Self::Loop => Some(508),
            Self::FrontCheck(green) => Some(green.status),
            // Told in the words of TLS and of HTTP/2.
            Self::ClientLeft(_) | Self::ServerName | Self::Streams => None,
            // The status of gRPC is another field.
            Self::HeldTooLong(Words::Grpc) | Self::OutOfTime(Words::Grpc) => Some(200),
            Self::HeldFull
            | Self::HeldOfAddress
            | Self::HeldTooLong(_)
            | Self::Shutdown
            | Self::Memory
            | Self::NoServer => Some(503),
            Self::Connect(_)
            | Self::NotSent
            | Self::NoAnswer(_)
            | Self::AnswerHead(_)
            | Self::AnswerHeadTooLong
            | Self::AnswerKey
            | Self::NotProcessed
            | Self::NoTunnel
            | Self::AnswerChunk(_)
            | Self::AnswerCut(_) => Some(502),
            Self::UpstreamSilent | Self::TookTooLong | Self::Cut(_) | Self::OutOfTime(_) => {
                Some(504)
            }
        }
    }

    /// As what a refusal is counted; `None` for what the upstream is to blame for, and where nobody is left to be
    /// refused.
    pub(crate) const fn reason(&self) -> Option<Reason> {
        Some(match self {
            Self::Head(HeadError::TooManyFields) => Reason::HeadFields,
            Self::Head(_) => Reason::Head,
            Self::Streams => Reason::Streams,
            Self::HeadTooLong => Reason::HeadBytes,
            Self::HeadTimeout => Reason::HeadSlow,
            Self::Path(_) => Reason::Path,
            Self::ServerName => Reason::ServerName,
            Self::Rate(_) => Reason::Rate,
            Self::Loop => Reason::Loop,
            Self::Memory => Reason::Memory,
            Self::BodyTooLong => Reason::BodyBytes,
            Self::BodyTooSlow | Self::ClientSilent => Reason::BodySlow,
            Self::Chunk(_) | Self::BodyLength | Self::Trailer(_) => Reason::Body,
            Self::HeldFull => Reason::HeldFull,
            Self::HeldTooLong(_) => Reason::HeldTooLong,
            Self::OutOfTime(_) => Reason::OutOfTime,
            Self::HeldOfAddress => Reason::HeldOfAddress,
            Self::Cut(_) => Reason::Cut,
            Self::Shutdown => Reason::Shutdown,
            Self::ClientLeft(_)
            | Self::FrontCheck(_)
            | Self::NoServer
            | Self::Connect(_)
            | Self::NotSent
            | Self::NotProcessed
            | Self::NoTunnel
            | Self::TookTooLong
            | Self::NoAnswer(_)
            | Self::AnswerHead(_)
            | Self::AnswerHeadTooLong
            | Self::AnswerKey
            | Self::AnswerChunk(_)
            | Self::AnswerCut(_)
            | Self::UpstreamSilent => return None,
        })
    }

    /// In what words the client is told.
    #[must_use]
    pub const fn words(&self) -> Words {
        match self {
            Self::HeldTooLong(words) | Self::OutOfTime(words) => *words,
            _ => Words::Text,
        }
    }

    /// What a client of gRPC is told: UNAVAILABLE, which it may try again, or DEADLINE_EXCEEDED.
    #[must_use]
    pub const fn grpc_status(&self) -> Option<u8> {
        match self {
            Self::HeldTooLong(Words::Grpc) => Some(14),
            Self::OutOfTime(Words::Grpc) => Some(4),
            _ => None,
        }
    }

    /// What `Retry-After` says, where the answer has one; `by_default` is `retry_after_s`.
    #[must_use]
    pub const fn retry_after_s(&self, by_default: u64) -> Option<u64> {
        match self {
            Self::Rate(too_many) => Some(too_many.retry_after_s()),
            _ if matches!(self.status(), Some(503)) => Some(by_default),
            _ => None,
        }
    }
}

impl From<Eviction> for RequestError {
    fn from(eviction: Eviction) -> Self {
        match eviction {
            Eviction::Full => Self::HeldFull,
            Eviction::TooOld => Self::HeldTooLong(Words::Text),
            Eviction::OutOfTime => Self::OutOfTime(Words::Text),
            Eviction::FullOfAddress => Self::HeldOfAddress,
            Eviction::Shutdown => Self::Shutdown,
        }
    }
}
