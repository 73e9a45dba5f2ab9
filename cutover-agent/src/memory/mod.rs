//! Moves memory from the source to the target by content: a page that the target has is never sent again, whichever
//! process, container or round it was met in first.
//!
//! ```text
//! source                                                      target
//!   live: reads pages of running tasks ─┐
//!                                       ├─ digest, slot ─ frames of new pages ──► store: slot by slot, checked
//!   server: takes pages from CRIU ──────┘
//!   layout: which slot lies where ───────────── pieces ──────────────────────────► assembly: pages-N.img, pagemap-*.img
//!   seal: one hash over all ────────────────────────────────────────────────────► compares, answers
//! ```
//! Where CRIU has rounds of its own, each is laid out like the dump, and the target's images follow it while the container
//! runs: what is put together while clients wait is what the dump changed, whatever the size of memory.
//!
//! The source gives out the slots of the target's store, so the target keeps no index and the source refers to a page
//! by a number. Nothing is restored whose hash is not the one that the source dumped.
//!
//! Memory does not depend on sizes but for digests: 16 bytes a page at the target, about 40 at the source. Pages
//! themselves are in the target's page cache, below its `state_dir`, and in frames on their way.

mod assembly;
mod carrier;
mod digest;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
mod known;
mod lanes;
mod layout;
mod live;
mod maps;
mod pagemap;
mod parent;
mod runs;
pub mod server;
mod ship;
mod store;
#[cfg(test)]
mod tests;
mod wire;

use thiserror::Error;

use crate::peer::PeerError;

pub use digest::{DigestKey, PAGE_BYTES, PageDigest};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use fuzz::{FuzzedSink, fuzz_dump, fuzz_peer_words};
pub(crate) use lanes::{Lanes, Moved, OwnLane, Turns, spread_percent};
pub(crate) use layout::Layout;
pub(crate) use live::{Part, read_container, resident_bytes};
pub(crate) use parent::Parent;
pub(crate) use ship::{DumpServer, GiveUp, PageSource, Shipper, Tally};
pub use store::PageStore;
pub(crate) use wire::Draft;
pub use wire::{ImageId, PageFault, Region};

/// Why memory did not arrive. The source runs on, or is thawed.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The connection.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The target.
    #[error(transparent)]
    Target(#[from] PageFault),
    /// The loopback.
    #[error("cannot listen for CRIU on the loopback of this network namespace: {0}; is `lo` up?")]
    Listen(std::io::Error),
    /// CRIU broke off.
    #[error("CRIU broke off its dump: {0}")]
    Dump(std::io::Error),
    /// Nobody came.
    #[error("CRIU did not connect to the page server: its dump failed before that")]
    NoDump,
    /// CRIU said something unexpected.
    #[error(transparent)]
    Header(#[from] server::frames::BadHeader),
    /// Pages in a parent, which does not have them.
    #[error("CRIU left out pages as unchanged that no memory round has seen")]
    Parent,
    /// Too much.
    #[error(
        "the containers have more than 64 GiB of different pages of memory, the most that a hop moves"
    )]
    Full,
    /// The container cannot be looked at.
    #[error("cannot read the memory of {container}: {source}")]
    Read {
        /// Which.
        container: String,
        /// Why.
        source: std::io::Error,
    },
    /// A thread was lost.
    #[error("a helper thread failed: {0}")]
    Thread(#[from] tokio::task::JoinError),
}
