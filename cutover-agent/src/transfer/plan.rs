//! What a round of the source consists of: which files must be read, and what their reading gave.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::collect::{Collector, Outlet};
use super::wire::{Ask, Packed};
use super::{SyncReport, TransferError};
use crate::files::blocks::{self, Digest};
use crate::files::content::{self, Calm};
use crate::files::manifest::{self, Manifest};
use crate::files::walk::{self, Stamp, Walked};
use crate::files::{FilesError, Kind, Root};

/// Threads that read, hash and pack. Two keep a link of several Gbit/s busy, and leave the rest to the containers.
const READERS: usize = 2;

/// What is remembered of a tree between rounds.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What the target sealed; absent before the first round and after a failed one.
    pub(super) sealed: Option<Sealed>,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
}

#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) manifest: Manifest,
    pub(super) root: Digest,
    /// Whether the stamps are those of this manifest's files.
    pub(super) is_ours: bool,
}

/// A round as planned from the walk.
pub(super) struct Plan {
    root: Root,
    walked: Walked,
    wanted: Vec<usize>,
    /// Digests that need no reading, per entry.
    kept: Vec<Option<Arc<Vec<Digest>>>>,
    /// What the target has, per entry.
    pub(super) base: Vec<Option<Arc<Vec<Digest>>>>,
    /// The root hash of what the target has; absent when it begins with nothing.
    pub(super) origin: Option<Digest>,
    pub(super) steps: Packed,
}

impl Plan {
    /// Bytes that have to be read.
    pub(super) fn bytes(&self) -> u64 {
        let sizes = self.wanted.iter().map(|at| self.walked.entries[*at].size());
        sizes.sum()
    }
}

/// Opens and walks a tree.
///
/// # Errors
/// When something in it cannot be read.
pub(super) fn walk_tree(path: &Path, cancel: &AtomicBool) -> Result<(Root, Walked), TransferError> {
    let root = Root::open(path).map_err(|errno| FilesError::read(path.to_owned(), errno))?;
    let walked = walk::walk(&root, cancel)?;
    Ok((root, walked))
}

/// Decides what has to be read: everything but files of an earlier round of ours that have not changed since.
///
/// # Errors
/// When the list of entries exceeds its bounds.
pub(super) fn plan(
    root: Root,
    walked: Walked,
    memory: Memory,
    rehash: &HashSet<(u64, u64)>,
) -> Result<Plan, TransferError> {
    let origin = memory.sealed.as_ref().map(|sealed| sealed.root);
    let (has, is_ours) = memory
        .sealed
        .map_or_else(Default::default, |sealed| (sealed.manifest, sealed.is_ours));
    let steps = Packed::of(&manifest::difference(&has.entries, &walked.entries))?;
    let is_same = |index: usize, at: usize| {
        let stamp = &walked.stamps[index];
        let known = memory.stamps.get(at).copied().flatten();
        known.is_some_and(|known| known.is_same(stamp) && known.is_settled(memory.scanned_ns))
            && !rehash.contains(&(stamp.device, stamp.inode))
    };
    let (mut wanted, mut kept, mut base) = (Vec::new(), Vec::new(), Vec::new());
    for (index, entry) in walked.entries.iter().enumerate() {
        let is_file = matches!(entry.kind, Kind::File { .. });
        let at = if is_file { has.find(&entry.path) } else { None };
        let at = at.filter(|at| matches!(has.entries[*at].kind, Kind::File { .. }));
        let known = at.map(|at| Arc::clone(&has.digests[at]));
        let is_kept = at.is_some_and(|at| {
            is_ours
                && is_same(index, at)
                && has.digests[at].len() as u64 == blocks::count(entry.size())
        });
        if is_file && !is_kept {
            wanted.push(index);
        }
        kept.push(known.clone().filter(|_| is_kept));
        base.push(known);
    }
    Ok(Plan {
        root,
        walked,
        wanted,
        kept,
        base,
        origin,
        steps,
    })
}

/// A round whose frames are all handed to the streams.
pub(super) struct ReadRound {
    manifest: Manifest,
    hash: Digest,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
    frames: u64,
    bytes_data: u64,
    bytes_wire: u64,
}

/// Reads what is wanted, and hands what changed to the streams.
///
/// # Errors
/// When a file cannot be read, changed while frozen, or the round was given up.
pub(super) fn read(plan: Plan, calm: Calm, outlet: Outlet) -> Result<ReadRound, TransferError> {
    let Plan {
        root,
        walked,
        wanted,
        kept,
        ..
    } = plan;
    let collectors = (0..READERS).map(|_| Collector::new(&outlet)).collect();
    let contents = content::read(&root, &walked, &wanted, calm, collectors, &outlet.cancel)?;
    let mut digests: Vec<Arc<Vec<Digest>>> =
        kept.into_iter().map(Option::unwrap_or_default).collect();
    for (entry, found) in wanted.iter().zip(contents.digests) {
        digests[*entry] = Arc::new(found);
    }
    let mut stamps: Vec<_> = walked.stamps.into_iter().map(Some).collect();
    for entry in contents.unsteady {
        stamps[entry] = None;
    }
    let manifest = Manifest {
        entries: walked.entries,
        digests,
    };
    Ok(ReadRound {
        hash: manifest.root(),
        manifest,
        stamps,
        scanned_ns: walked.started_ns,
        frames: outlet.frames.into_inner(),
        bytes_data: outlet.bytes_data.into_inner(),
        bytes_wire: outlet.bytes_wire.into_inner(),
    })
}

impl ReadRound {
    /// The words that end it.
    pub(super) fn seal(&self, round: u64) -> Ask {
        Ask::Seal {
            round,
            frames: self.frames,
            root: self.hash,
        }
    }

    /// What to remember when the target has sealed it.
    pub(super) fn into_memory(self) -> Memory {
        let sealed = Sealed {
            manifest: self.manifest,
            root: self.hash,
            is_ours: true,
        };
        Memory {
            sealed: Some(sealed),
            stamps: self.stamps,
            scanned_ns: self.scanned_ns,
        }
    }

    /// What it cost; the time is the caller's to fill in.
    pub(super) fn report(&self, bytes_read: u64, list_bytes: u64) -> SyncReport {
        SyncReport {
            bytes_data: self.bytes_data,
            bytes_wire: self.bytes_wire + list_bytes,
            bytes_read,
            bytes_tree: self.manifest.bytes(),
            files: self.manifest.files(),
            took: Duration::ZERO,
        }
    }
}
