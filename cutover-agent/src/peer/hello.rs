//! The greeting on each connection: who, which version, which session, what for.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::frame::{self, FrameError};

/// The version of everything said between agents; both must have the same.
pub(super) const VERSION: u32 = 12;
/// The most data streams of a session.
pub const STREAMS_MAX: u16 = 32;

/// Names a session; drawn at random by the one who connects.
pub(super) type SessionId = u128;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) version: u32,
    pub(super) session: SessionId,
    pub(super) purpose: Purpose,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Purpose {
    Control {
        streams: u16,
        dead_after_ms: u64,
        /// A session of ours that broke: it is over, whatever the other side still believes of it.
        instead_of: Option<SessionId>,
    },
    Data {
        index: u16,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Welcome {
    Accepted,
    Refused(Refusal),
}

/// Why an agent does not talk to another.
#[derive(Debug, Clone, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Different versions.
    #[error(
        "it speaks version {theirs} of the peer protocol, we speak another: install the same version on both sites"
    )]
    Version {
        /// The refusing side's version.
        theirs: u32,
    },
    /// Somebody else is in charge there, and alive.
    #[error("another hop is under way there: wait for it, or abort it")]
    Busy,
    /// The session of a data stream is not there (any more).
    #[error("the session of this data stream is not there")]
    UnknownSession,
    /// The certificate is not made out to the right role.
    #[error("{0}")]
    Role(String),
    /// Unreasonable numbers.
    #[error("{STREAMS_MAX} data streams are allowed, and 50 ms to 10 minutes until a peer is dead")]
    Bounds,
}

impl Purpose {
    pub(super) fn is_reasonable(&self) -> bool {
        match self {
            Self::Control {
                streams,
                dead_after_ms,
                ..
            } => (1..=STREAMS_MAX).contains(streams) && (50..=600_000).contains(dead_after_ms),
            Self::Data { index } => *index < STREAMS_MAX,
        }
    }
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Sends a greeting or its answer.
pub(super) async fn send<T: Serialize, W: AsyncWrite + Unpin>(
    stream: &mut W,
    value: &T,
) -> Result<(), FrameError> {
    stream.write_all(&frame::encode(value, &[])?).await?;
    Ok(stream.flush().await?)
}

/// Receives one; a close counts as broken.
pub(super) async fn receive<T: for<'a> Deserialize<'a>, R: AsyncRead + Unpin>(
    stream: &mut R,
) -> Result<T, FrameError> {
    let frame = frame::read(stream).await?;
    frame
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?
        .head()
}
