//! Connections between the two agents: one for control, K for data, all over mutual TLS.
//!
//! ```text
//! initiator (drives the hop)                       acceptor
//!   connect ── control ──► calls, answered in order ──► Handler
//!            ── control ──► asks about trees         ──► Receiver
//!            ── data × K ─► frames from one queue    ──► Receiver
//! ```
//! Whoever drives a hop connects; after it, or when its time is over, the whole session ends at once. Only one session
//! is in charge at an acceptor at any moment: a second one is told so, unless the first is dead, or the second says that
//! it comes in its place. A round under way when connections break takes a session up again ([`Session::revive`]), asks
//! what has arrived, and goes on from there; a request under way fails, because nobody knows whether it was carried out.
//! A request that needs what is still on its way can be made at once ([`Session::call_after`]): the acceptor hands it to
//! its handler when everything is there, and the round trip that asking later would take is saved.
//!
//! ```no_run
//! # use std::{sync::Arc, time::Duration};
//! # use cutover_agent::{peer::{self, PeerTimeouts}, tls::ClientTls, transfer::{SyncOptions, TreeName}};
//! # async fn hop(tls: ClientTls) -> Result<(), Box<dyn std::error::Error>> {
//! let timeouts = PeerTimeouts {
//!     connect: Duration::from_secs(5),
//!     dead_after: Duration::from_secs(3),
//!     resume_within: Duration::from_secs(10),
//! };
//! let session = peer::connect("192.0.2.2:7443".parse()?, tls, timeouts, 4).await?;
//! let reply: String = session.call(&"are you well?", Duration::from_secs(1)).await?;
//! let tree = TreeName::new("db/volume")?;
//! let report = session.sync(&tree, "/srv/db".as_ref(), SyncOptions::live(Duration::from_secs(600))).await?;
//! println!("{reply}: {} bytes in {:?}", report.bytes_wire, report.took);
//! # Ok(()) }
//! ```

mod arrivals;
mod calls;
mod doors;
mod frame;
mod hello;
pub(crate) mod message;
mod pace;
mod priority;
mod queue;
mod serve;
mod session;
mod socket;

use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

pub use arrivals::Part;
pub use calls::Answering;
pub use doors::{Accept, Doors};
pub use frame::{FRAME_BYTES_MAX, FrameError};
pub use hello::{Refusal, STREAMS_MAX};
pub use message::MESSAGE_BYTES_MAX;
pub use priority::Priority;
pub use serve::{Folder, Handler, Trees, serve};
pub use session::{Session, connect};
pub use socket::slows_down_after_idle;

pub(crate) use arrivals::Arrivals;
pub(crate) use frame::{Channel, Frame, Parcel, encode, encode_on, parcel};
pub(crate) use queue::Queue;
pub(crate) use session::Link;

/// How long to wait for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerTimeouts {
    /// For a whole connect: TCP, TLS and the greeting of every stream; also for a session before us to be found dead.
    pub connect: Duration,
    /// How long a silent peer is believed to live. Signs of life are sent three times in it.
    pub dead_after: Duration,
    /// How long a session whose connections broke is tried to be taken up again before whoever uses it is told; zero
    /// for not at all. Matters only to the side that connects.
    pub resume_within: Duration,
}

/// Why there is no connection to the peer, or no answer on it.
#[derive(Debug, Error)]
pub enum PeerError {
    /// Nobody accepts there.
    #[error("cannot connect to {addr}: {source}; is the agent running there, and the port open?")]
    Connect {
        /// Where.
        addr: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The listener failed.
    #[error("cannot accept connections: {source}")]
    Accept {
        /// The system's reason.
        source: std::io::Error,
    },
    /// There is somebody, but not the one we trust.
    #[error("{addr}: {source}")]
    Tls {
        /// Where.
        addr: SocketAddr,
        /// What was wrong with the certificate or the handshake.
        source: crate::tls::TlsError,
    },
    /// It did not let us in.
    #[error("{addr} refused: {refusal}")]
    Refused {
        /// Where.
        addr: SocketAddr,
        /// Its reason.
        refusal: Refusal,
    },
    /// What it sent is no frame of ours, or the connection broke while greeting.
    #[error("{addr}: {source}")]
    Greeting {
        /// Where.
        addr: SocketAddr,
        /// What was wrong.
        source: FrameError,
    },
    /// Time ran out.
    #[error("no answer from the peer within {} ms ({what})", limit.as_millis())]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The session ended, and with it everything that was under way.
    #[error("the connection to the peer is lost: {reason}")]
    Lost {
        /// What was noticed first.
        reason: String,
    },
    /// Request or answer are not of the vocabulary of the other side.
    #[error(
        "the peer does not understand the request, or we not its answer: both agents must be of the same version"
    )]
    Vocabulary,
}

impl PeerError {
    /// Whether the same may work a moment later: the network or a restarting agent, not a decision of the other side.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Greeting { .. }
            | Self::Deadline { .. }
            | Self::Lost { .. }
            | Self::Accept { .. } => true,
            Self::Refused { refusal, .. } => {
                matches!(refusal, Refusal::Busy | Refusal::UnknownSession)
            }
            Self::Tls { .. } | Self::Vocabulary => false,
        }
    }
}
