//! Moves trees from the source to the target, round by round, until both are equal.
//!
//! ```text
//! source                                                   target
//!   (first round only)  have? ───────────────────────────►  scans its tree
//!                       ◄───────────────────── manifest, digest of each block
//!   (first round only)  seeds? (sizes of new files) ──────►  looks in the layers of its images, and in sealed trees
//!                       ◄───────────────────── digests of files of these sizes
//!   (files written anew)  cuts? (which files) ────────────►  cuts them by their content
//!                       ◄───────────────────── length and mark of each piece
//!   walks, reads, hashes   begin(entries that changed) ──►  makes room
//!     changed blocks, packed, over K streams ────────────►  checks each digest, writes in place
//!                          seal(frames, root hash) ──────►  repeats, metadata, deletions, compares the root hash
//!                       ◄──────────────────────── done
//! ```
//! Nothing in a later round waits for an answer before the end, so a round costs one round trip and its bytes. The
//! root hash covers names, metadata and every block; the source remembers what it sealed, and asks again after any
//! failure, so that only missing blocks move again.
//!
//! Memory does not depend on sizes: about 30 frames of at most 1 MiB at each end, plus 32 bytes of digest per 16 KiB of tree,
//! at the source up to 36 MiB of hashes of parts of blocks of databases, and 16 to 24 MiB at each end of up to two rounds whose
//! frames are linked.

mod body;
mod collect;
mod fingerprints;
mod linked;
mod old;
mod pack;
mod plan;
mod receive;
mod repeats;
mod replaced;
mod round;
mod seeds;
mod send;
mod sharing;
mod weave;
mod wire;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cutover_protocol::pattern::NamePattern;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files::{FilesError, ManifestError};
use crate::peer::PeerError;

pub(crate) use pack::{Gauge, Look, Packer};
pub(crate) use receive::{Known, Receiver};
pub(crate) use round::unpack;
pub(crate) use send::Sender;
pub(crate) use wire::Codec;
pub use wire::{Fault, Space};

pub use cutover_protocol::plan::Compress;

/// Gives back the memory of a large list while the work goes on: of a million entries that takes long enough to be felt by
/// clients who wait.
fn discard(list: impl Send + 'static) {
    tokio::task::spawn_blocking(move || drop(list));
}

/// The name of a tree, the same at both sites: `CONTAINER/TREE`, as `db/volume`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TreeName(String);

/// A name that is none.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error(
    "{0:?} is no name for a tree: up to 128 letters, digits, '.', '_', '-', in parts separated by '/'"
)]
pub struct BadTreeName(String);

impl TreeName {
    /// Checks a name: parts of letters, digits, `.`, `_` and `-`, separated by `/`, no part only of dots, 128 bytes
    /// in all.
    ///
    /// # Errors
    /// When a rule is broken.
    pub fn new(name: &str) -> Result<Self, BadTreeName> {
        let is_good = |part: &str| {
            part.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
                && part.bytes().any(|byte| byte != b'.')
        };
        if name.len() > 128 || !name.split('/').all(is_good) {
            return Err(BadTreeName(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for TreeName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl TryFrom<String> for TreeName {
    type Error = BadTreeName;

    fn try_from(name: String) -> Result<Self, BadTreeName> {
        Self::new(&name)
    }
}

impl From<TreeName> for String {
    fn from(name: TreeName) -> Self {
        name.0
    }
}

/// What the source knows about its own tree during a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writers {
    /// Processes write: files may change under the reader, and the round is a fuzzy copy.
    Running,
    /// Nobody writes: the round is one instant, and a file that changes is an error.
    Frozen,
}

/// What the target's tree may hold before the first round of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Whatever an earlier hop left: the target is asked, and only differences move.
    Ask,
    /// Nothing worth keeping (new images): what is there is removed without a question, saving a round trip.
    Nothing,
}

/// What the target does before it answers that a round is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Nothing more: the tree is complete in memory and checked. For images and for rounds that others follow.
    Cached,
    /// `syncfs`: the tree survives a power cut.
    Synced,
}

/// How one round is to be done.
#[derive(Debug, Clone)]
pub struct SyncOptions {
    /// Whether the source's processes write.
    pub writers: Writers,
    /// What the target starts with; matters only in the first round of a session.
    pub origin: Origin,
    /// What the target guarantees at the end.
    pub durability: Durability,
    /// Whether and how frames are packed.
    pub compress: Compress,
    /// Files (device, inode) that are read whatever their times say: those open for writing.
    pub always_rehash: HashSet<(u64, u64)>,
    /// Files (device, inode) whose times are looked at although nobody told of a change: those that are mapped.
    pub always_look: HashSet<(u64, u64)>,
    /// Files whose bytes keep their places when they change; pieces of others are looked for in their old content.
    pub in_place: Arc<[NamePattern]>,
    /// When to give up.
    pub limit: Duration,
    /// Where to count; share it with whoever shows progress.
    pub progress: Arc<Progress>,
}

impl SyncOptions {
    /// A round beside running writers.
    #[must_use]
    pub fn live(limit: Duration) -> Self {
        Self {
            writers: Writers::Running,
            origin: Origin::Ask,
            durability: Durability::Cached,
            compress: Compress::Auto,
            always_rehash: HashSet::new(),
            always_look: HashSet::new(),
            in_place: NamePattern::databases().into(),
            limit,
            progress: Arc::default(),
        }
    }

    /// The last round, everything frozen; `always_rehash` are the files (device, inode) open for writing.
    #[must_use]
    pub fn frozen(limit: Duration, always_rehash: HashSet<(u64, u64)>) -> Self {
        Self {
            writers: Writers::Frozen,
            always_rehash,
            ..Self::live(limit)
        }
    }

    /// A tree the target cannot have yet, and that nobody writes: checkpoint images.
    #[must_use]
    pub fn images(limit: Duration) -> Self {
        Self {
            writers: Writers::Frozen,
            origin: Origin::Nothing,
            ..Self::live(limit)
        }
    }
}

/// How far a round is; counters only grow during a round.
#[derive(Debug, Default)]
pub struct Progress {
    pub(crate) done: AtomicU64,
    pub(crate) total: AtomicU64,
    pub(crate) wire: AtomicU64,
}

impl Progress {
    /// Bytes of files that were read and, where needed, handed to the streams.
    pub fn bytes_done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes of files that have to be read in this round; 0 until the tree was walked.
    pub fn bytes_total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes handed to the streams, packed.
    pub fn bytes_wire(&self) -> u64 {
        self.wire.load(Ordering::Relaxed)
    }
}

/// What a round moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncReport {
    /// Bytes of file blocks that had to be moved, before packing; zero blocks are not counted.
    pub bytes_data: u64,
    /// Bytes of frames and lists that crossed the wire, without TLS and TCP.
    pub bytes_wire: u64,
    /// Bytes of files that were read and hashed.
    pub bytes_read: u64,
    /// Bytes of all files of the tree.
    pub bytes_tree: u64,
    /// Files in the tree.
    pub files: u64,
    /// Entries of the tree whose state was looked at; the others were known not to have changed.
    pub looked: u64,
    /// From the call to the seal.
    pub took: Duration,
}

/// What the streams achieve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// The best round trip seen.
    pub round_trip: Duration,
    /// Payload of all streams together.
    pub bytes_per_second: f64,
}

/// Why a tree did not arrive. The target's tree is then in an unknown state, and the next round asks for it.
#[derive(Debug, Error)]
pub enum TransferError {
    /// The connection.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A file at the source.
    #[error("at the source: {0}")]
    Files(#[from] FilesError),
    /// The target.
    #[error(transparent)]
    Target(#[from] Fault),
    /// A list of files that exceeds its bounds or does not make sense.
    #[error(transparent)]
    List(#[from] ManifestError),
    /// Time ran out.
    #[error("tree {tree} did not arrive within {} ms", limit.as_millis())]
    Deadline {
        /// Which tree.
        tree: TreeName,
        /// How long it was given.
        limit: Duration,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_name_can_not_be_a_path_out_of_anywhere() {
        for bad in [
            "", "/", "db/", "../db", "db/..", "db/.", "a b", "db\0", "db//x",
        ] {
            assert!(TreeName::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(TreeName::new("db/upper").unwrap().as_str(), "db/upper");
        assert!(postcard::from_bytes::<TreeName>(&postcard::to_stdvec("../x").unwrap()).is_err());
    }
}
