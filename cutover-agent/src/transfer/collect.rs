//! Collects the blocks that changed into frames, packs them and hands them to the streams. One collector per thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::runtime::Handle;

use super::Progress;
use super::wire::{Blocks, Codec, DATA_BYTES_MAX, DataHead, Piece};
use crate::files::FilesError;
use crate::files::blocks::{BLOCK_BYTES, Digest};
use crate::files::content::Visit;
use crate::peer::{Link, encode};

/// Pieces in one frame at most, so that heads stay small whatever a tree looks like.
const PIECES_MAX: usize = 4096;
/// zstd's fastest level of the ordinary kind: about 0.5 GB/s, five times the link we are made for.
const LEVEL: i32 = 1;
/// After a frame that did not shrink, so many are sent as they are before packing is tried again.
const PLAIN_RUN: u32 = 8;

/// What all collectors of a round share.
pub(super) struct Outlet {
    pub(super) link: Arc<Link>,
    pub(super) runtime: Handle,
    pub(super) round: u64,
    /// What the target has, per entry.
    pub(super) base: Vec<Option<Arc<Vec<Digest>>>>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) progress: Arc<Progress>,
    pub(super) frames: AtomicU64,
    pub(super) bytes_data: AtomicU64,
    pub(super) bytes_wire: AtomicU64,
}

/// One thread's frame in the making.
pub(super) struct Collector<'a> {
    outlet: &'a Outlet,
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
    packer: Option<zstd::bulk::Compressor<'static>>,
    plain_left: u32,
}

impl<'a> Collector<'a> {
    pub(super) fn new(outlet: &'a Outlet) -> Self {
        // Without a packer (no memory for its tables) everything is sent as it is.
        let packer = zstd::bulk::Compressor::new(LEVEL).ok();
        Self {
            outlet,
            pieces: Vec::new(),
            bytes: Vec::with_capacity(DATA_BYTES_MAX),
            packer,
            plain_left: 0,
        }
    }

    fn flush(&mut self) -> Result<(), FilesError> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let packed = self.pack();
        let (codec, body) = match &packed {
            Some(packed) => (
                Codec::Zstd {
                    bytes: self.bytes.len() as u32,
                },
                packed.as_slice(),
            ),
            None => (Codec::Plain, self.bytes.as_slice()),
        };
        let head = DataHead {
            round: self.outlet.round,
            codec,
            pieces: std::mem::take(&mut self.pieces),
        };
        // Frames are far below the bound on frames; see DATA_BYTES_MAX and PIECES_MAX.
        let frame = encode(&head, body).map_err(|_| FilesError::Cancelled)?;
        let length = frame.len() as u64;
        self.outlet.frames.fetch_add(1, Ordering::Relaxed);
        self.outlet
            .bytes_data
            .fetch_add(self.bytes.len() as u64, Ordering::Relaxed);
        self.outlet.bytes_wire.fetch_add(length, Ordering::Relaxed);
        self.bytes.clear();
        let is_queued = !self.outlet.cancel.load(Ordering::Relaxed)
            && self
                .outlet
                .runtime
                .block_on(self.outlet.link.frames.push(frame));
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

    fn pack(&mut self) -> Option<Vec<u8>> {
        if self.plain_left > 0 {
            self.plain_left -= 1;
            return None;
        }
        let packed = self.packer.as_mut()?.compress(&self.bytes).ok()?;
        if packed.len() > self.bytes.len() - self.bytes.len() / 16 {
            self.plain_left = PLAIN_RUN;
            return None;
        }
        Some(packed)
    }

    fn add(&mut self, entry: u32, index: u32, digest: Digest, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if let Some(Piece {
            entry: last,
            first,
            blocks,
        }) = self.pieces.last_mut().filter(|last| last.entry == entry)
        {
            debug_assert_eq!(*last, entry);
            match blocks {
                Blocks::Data(digests)
                    if !bytes.is_empty() && *first + digests.len() as u32 == index =>
                {
                    digests.push(digest);
                    return;
                }
                Blocks::Zeros(count) if bytes.is_empty() && *first + *count == index => {
                    *count += 1;
                    return;
                }
                _ => {}
            }
        }
        let blocks = if bytes.is_empty() {
            Blocks::Zeros(1)
        } else {
            Blocks::Data(vec![digest])
        };
        self.pieces.push(Piece {
            entry,
            first: index,
            blocks,
        });
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
        let known = self.outlet.base[entry]
            .as_ref()
            .and_then(|known| known.get(index as usize));
        if known == Some(&digest) {
            return Ok(());
        }
        if self.bytes.len() + bytes.len() > DATA_BYTES_MAX || self.pieces.len() >= PIECES_MAX {
            self.flush()?;
        }
        // Both fit: a tree has at most TREE_BLOCKS_MAX blocks, and fewer than u32::MAX entries.
        self.add(entry as u32, index as u32, digest, bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), FilesError> {
        self.flush()
    }
}
