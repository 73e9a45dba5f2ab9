//! Collects the blocks that changed into frames, packs them and hands them to the streams. One collector per thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;

use super::fingerprints::{self, Fingerprints};
use super::linked::Linker;
use super::pack::Packer;
use super::plan::There;
use super::repeats::{self, REPEATS_MAX};
use super::weave::{Old, Weaver};
use super::wire::{
    Blocks, Codec, DATA_BYTES_MAX, DataHead, Packed, Piece, Repeat, WOVEN_BLOCKS_MAX,
};
use super::{Compress, Progress};
use crate::files::blocks::{BLOCK_BYTES, Digest};
use crate::files::content::Visit;
use crate::files::{FilesError, ManifestError};
use crate::peer::{Link, parcel};

/// Pieces in one frame at most, so that heads stay small whatever a tree looks like.
const PIECES_MAX: usize = 4096;
/// Pieces in a frame when one more is woven: the target then has a few MiB to put together.
const WOVEN_PIECES_MAX: usize = 64;
/// Bytes of each collector's first frames, so that every stream has some of a short round: one alone, which had to share
/// the link before, would begin with its share.
const FIRST_BYTES_MAX: usize = 32 << 10;
const FIRST_FRAMES: u32 = 4;
/// Bytes of a frame where links are fast.
const BRISK_BYTES_MAX: usize = 256 << 10;

/// What all collectors of a round share.
pub(super) struct Outlet {
    pub(super) link: Arc<Link>,
    pub(super) runtime: Handle,
    pub(super) round: u64,
    pub(super) compress: Compress,
    pub(super) there: There,
    pub(super) fingerprints: Arc<Fingerprints>,
    pub(super) linker: Linker,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) progress: Arc<Progress>,
    pub(super) tally: Arc<Tally>,
}

/// What a round has handed to the streams so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) frames: AtomicU64,
    pub(super) bytes_data: AtomicU64,
    pub(super) bytes_wire: AtomicU64,
    repeats: Mutex<Vec<Repeat>>,
}

impl Tally {
    /// Blocks that have to be made of others, packed.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn repeats(&self) -> Result<Packed, ManifestError> {
        let mut repeats = self.repeats.lock().unwrap_or_else(PoisonError::into_inner);
        let packed = Packed::of(&std::mem::take(&mut *repeats))?;
        self.bytes_wire
            .fetch_add(packed.length(), Ordering::Relaxed);
        Ok(packed)
    }
}

/// One thread's frame in the making.
pub(super) struct Collector<'a> {
    outlet: &'a Outlet,
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
    /// Blocks that are equal to others.
    repeats: Vec<Repeat>,
    /// Of the blocks in `bytes`.
    digests: Vec<Digest>,
    weaver: Weaver,
    packer: Packer,
    /// Whether the last frame became smaller by packing, and had nothing but itself for it.
    gains_by_size: bool,
    flushed: u32,
}

impl<'a> Collector<'a> {
    pub(super) fn new(outlet: &'a Outlet) -> Self {
        Self {
            outlet,
            pieces: Vec::new(),
            bytes: Vec::with_capacity(DATA_BYTES_MAX),
            repeats: Vec::new(),
            digests: Vec::new(),
            weaver: Weaver::default(),
            packer: Packer::new(outlet.compress),
            gains_by_size: true,
            flushed: 0,
        }
    }

    fn flush(&mut self) -> Result<(), FilesError> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.flushed = self.flushed.saturating_add(1);
        let link = &self.outlet.link;
        let wire = (&link.gauge, link.look());
        let linker = Some(&self.outlet.linker);
        let packed = self.packer.pack(&self.bytes, wire, linker);
        let plain_bytes = self.bytes.len() as u64;
        let (codec, body, turn) = match packed {
            Some(packed) => {
                self.bytes.clear();
                packed
            }
            None => {
                let next = Vec::with_capacity(self.bytes.len());
                (Codec::Plain, std::mem::replace(&mut self.bytes, next), None)
            }
        };
        self.gains_by_size = codec != Codec::Plain && turn.is_none();
        let head = DataHead {
            round: self.outlet.round,
            codec,
            digest: Digest::over(&self.digests),
            pieces: std::mem::take(&mut self.pieces),
        };
        self.digests.clear();
        // Frames are far below the bound on frames; see DATA_BYTES_MAX and PIECES_MAX.
        let frame = parcel(&head, body).map_err(|_| FilesError::Cancelled)?;
        let length = frame.len() as u64;
        let tally = &self.outlet.tally;
        tally.frames.fetch_add(1, Ordering::Relaxed);
        tally.bytes_data.fetch_add(plain_bytes, Ordering::Relaxed);
        tally.bytes_wire.fetch_add(length, Ordering::Relaxed);
        let is_queued = !self.outlet.cancel.load(Ordering::Relaxed)
            && self
                .outlet
                .runtime
                .block_on(self.outlet.link.frames.push(frame));
        drop(turn);
        self.outlet
            .progress
            .wire
            .fetch_add(length, Ordering::Relaxed);
        if is_queued {
            Ok(())
        } else {
            Err(FilesError::Cancelled)
        }
    }

    /// How large a frame may get: small ones lose less when a link is cut, large ones pack better.
    fn bytes_max(&self) -> usize {
        if self.flushed < FIRST_FRAMES {
            FIRST_BYTES_MAX
        } else if self.gains_by_size && self.outlet.link.gauge.is_strong() {
            DATA_BYTES_MAX
        } else {
            BRISK_BYTES_MAX
        }
    }

    /// Takes a block, of which only some sub-blocks are `changed` where that is known.
    fn add(
        &mut self,
        (entry, index): (u32, u32),
        digest: Digest,
        bytes: &[u8],
        changed: Option<u32>,
    ) {
        let block = match (self.outlet.there.moved.get(&digest), changed) {
            _ if bytes.is_empty() => Block::Zeros,
            (Some((from, at)), _) => Block::Moved(*from, *at),
            (None, Some(changed)) => Block::Patched(changed),
            (None, None) => Block::Data,
        };
        match block {
            Block::Data => {
                self.bytes.extend_from_slice(bytes);
                self.digests.push(digest);
            }
            Block::Patched(changed) => {
                let subblocks = fingerprints::subblocks(changed, bytes);
                subblocks.for_each(|bytes| self.bytes.extend_from_slice(bytes));
            }
            Block::Zeros | Block::Moved(..) => {}
        }
        let last = self.pieces.last_mut();
        let is_next = last.is_some_and(|last| last.extend(entry, index, digest, block));
        if !is_next {
            self.pieces.push(Piece::new(entry, index, digest, block));
        }
    }

    /// Takes a block of a file that is written anew. They come in their order, and all on one thread.
    fn weave(
        &mut self,
        old: &Old,
        (entry, index): (u32, u64),
        digest: Digest,
        bytes: &[u8],
    ) -> Result<(), FilesError> {
        let is_zero = bytes.is_empty();
        if !is_zero {
            self.weaver.push(old, digest, bytes);
        }
        let is_finished = is_zero || old.ends_with(index);
        if is_finished {
            self.weaver.finish(old);
        }
        let next = index + u64::from(!is_zero);
        while let Some((piece, bytes, digests)) = self.weaver.take(entry, next, old, is_finished) {
            let is_full = self.bytes.len() + bytes.len() > self.bytes_max();
            if is_full || self.pieces.len() >= WOVEN_PIECES_MAX {
                self.flush()?;
            }
            self.pieces.push(piece);
            self.bytes.extend(bytes);
            self.digests.extend(digests);
        }
        if is_zero {
            self.add((entry, index as u32), digest, bytes, None);
        }
        Ok(())
    }
}

/// What one block is sent as.
#[derive(Debug, Clone, Copy)]
enum Block {
    Data,
    Patched(u32),
    Zeros,
    Moved(u32, u32),
}

impl Piece {
    fn new(entry: u32, first: u32, digest: Digest, block: Block) -> Self {
        let blocks = match block {
            Block::Data => Blocks::Data(1),
            Block::Zeros => Blocks::Zeros(1),
            Block::Patched(changed) => Blocks::Patched {
                changed: vec![changed],
                digest: Digest::UNKNOWN.then(digest),
            },
            Block::Moved(from, at) => Blocks::Moved {
                from,
                at,
                digests: vec![digest],
            },
        };
        Self {
            entry,
            first,
            blocks,
        }
    }

    /// Takes a block in if it is the next one of the same kind.
    fn extend(&mut self, entry: u32, index: u32, digest: Digest, block: Block) -> bool {
        let count = self.blocks.count() as u32;
        if self.entry != entry || self.first + count != index {
            return false;
        }
        match (&mut self.blocks, block) {
            (Blocks::Data(blocks), Block::Data) => *blocks += 1,
            (Blocks::Zeros(zeros), Block::Zeros) => *zeros += 1,
            (
                Blocks::Patched {
                    changed: known,
                    digest: over,
                },
                Block::Patched(changed),
            ) if known.len() < WOVEN_BLOCKS_MAX => {
                known.push(changed);
                *over = over.then(digest);
            }
            (Blocks::Moved { from, at, digests }, Block::Moved(file, place))
                if *from == file && *at + count == place =>
            {
                digests.push(digest);
            }
            _ => return false,
        }
        true
    }
}

impl Visit for Collector<'_> {
    fn block(
        &mut self,
        entry: usize,
        index: u64,
        digest: Digest,
        bytes: &[u8],
    ) -> Result<(), FilesError> {
        let done = if bytes.is_empty() {
            BLOCK_BYTES
        } else {
            bytes.len()
        };
        self.outlet
            .progress
            .done
            .fetch_add(done as u64, Ordering::Relaxed);
        // Both fit: a tree has at most TREE_BLOCKS_MAX blocks, and fewer than u32::MAX entries.
        let (place, block) = (entry as u32, index as u32);
        let outlet = self.outlet;
        if let Some(old) = outlet.there.olds.get(&entry) {
            return self.weave(old, (place, index), digest, bytes);
        }
        let known = self.outlet.there.base[entry]
            .as_ref()
            .and_then(|known| known.get(index as usize));
        let is_in_place = outlet.there.in_place.contains(&entry);
        let changed = is_in_place
            .then(|| outlet.fingerprints.replace(known, &digest, bytes))
            .flatten();
        let equal = match &outlet.there.places {
            Some(places) if self.repeats.len() < REPEATS_MAX => {
                places.of(&digest, (place, block), bytes)
            }
            _ => None,
        };
        if known == Some(&digest) {
            return Ok(());
        }
        if let Some(equal) = equal {
            repeats::add(&mut self.repeats, (place, block), equal);
            return Ok(());
        }
        if self.bytes.len() + bytes.len() > self.bytes_max() || self.pieces.len() >= PIECES_MAX {
            self.flush()?;
        }
        self.add((place, block), digest, bytes, changed);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), FilesError> {
        let tally = &self.outlet.tally;
        let mut repeats = tally.repeats.lock().unwrap_or_else(PoisonError::into_inner);
        repeats.append(&mut self.repeats);
        drop(repeats);
        self.flush()
    }
}
