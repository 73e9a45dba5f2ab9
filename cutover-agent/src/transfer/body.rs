//! The tree a round writes: puts blocks in their places, from frames and from what the target has.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, Stat};

use super::fingerprints;
use super::old::OldFiles;
use super::seeds::Seeds;
use super::wire::{Blocks, DATA_BYTES_MAX, DataHead, Fault, Part, Piece, Repeat, WOVEN_BLOCKS_MAX};
use crate::files::blocks::{self, BLOCK_BYTES, Digest};
use crate::files::manifest::{Entry, Manifest, Pairing};
use crate::files::{FilesError, Kind, Root, apply};

/// What a round has at hand.
pub(super) struct Body {
    pub(super) root: Root,
    pub(super) base: Arc<Manifest>,
    pub(super) seeds: Arc<Seeds>,
    pub(super) old: OldFiles,
    pub(super) entries: Vec<Arc<Entry>>,
    pub(super) pairs: Pairing,
    pub(super) digests: Vec<Mutex<Arc<Vec<Digest>>>>,
    pub(super) touched: Vec<AtomicBool>,
    pub(super) completed: Vec<AtomicBool>,
}

impl Body {
    pub(super) fn open(&self, entry: u32) -> Result<(OwnedFd, Stat), Fault> {
        let index = entry as usize;
        let known = self
            .entries
            .get(index)
            .filter(|entry| matches!(entry.kind, Kind::File { .. }));
        let entry = known.ok_or(Fault::Garbled)?;
        self.touched[index].store(true, Ordering::Relaxed);
        Ok(apply::open_file(&self.root, &entry.path)?)
    }

    /// A piece that is all of a file leaves nothing to do for it later: most files are small.
    pub(super) fn complete(&self, piece: &Piece, file: &OwnedFd, stat: &Stat) -> Result<(), Fault> {
        let index = piece.entry as usize;
        let entry = &self.entries[index];
        if piece.first == 0 && piece.blocks.count() == blocks::count(entry.size()) {
            apply::complete(&self.root, entry, file, stat)?;
            self.completed[index].store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where a piece belongs: the file's place in the list, and first byte and number of bytes there.
    fn span(&self, piece: &Piece) -> Result<(usize, u64, u64), Fault> {
        let index = piece.entry as usize;
        let size = self.entries.get(index).ok_or(Fault::Garbled)?.size();
        let (first, count) = (u64::from(piece.first), piece.blocks.count());
        if count == 0 || first + count > blocks::count(size) {
            return Err(Fault::Garbled);
        }
        let start = first * BLOCK_BYTES as u64;
        Ok((index, start, (size - start).min(count * BLOCK_BYTES as u64)))
    }

    /// The digests of the blocks in a frame, once they are known to be those that were sent.
    pub(super) fn check(&self, head: &DataHead, mut bytes: &[u8]) -> Result<Vec<Digest>, Fault> {
        let mut digests = Vec::new();
        let mut path: &[u8] = &[];
        for piece in &head.pieces {
            let (index, _, length) = self.span(piece)?;
            let length = match &piece.blocks {
                Blocks::Data(_) => length,
                Blocks::Woven { parts, .. } => new_bytes(parts),
                Blocks::Patched { changed, .. } => fingerprints::patch_bytes(changed) as u64,
                Blocks::Zeros(_) | Blocks::Moved { .. } => 0,
            };
            let data;
            (data, bytes) = bytes
                .split_at_checked(length as usize)
                .ok_or(Fault::Garbled)?;
            if let Blocks::Data(_) = piece.blocks {
                path = &self.entries[index].path;
                digests.extend(data.chunks(BLOCK_BYTES).map(Digest::of));
            }
        }
        if !bytes.is_empty() {
            return Err(Fault::Garbled);
        }
        if Digest::over(&digests) != head.digest {
            return Err(damaged(path));
        }
        Ok(digests)
    }

    /// Writes one piece, and gives the bytes that belong to the next, with their digests.
    pub(super) fn place<'a>(
        &self,
        piece: &Piece,
        file: &OwnedFd,
        (bytes, known): (&'a [u8], &'a [Digest]),
    ) -> Result<(&'a [u8], &'a [Digest]), Fault> {
        let (index, start, length) = self.span(piece)?;
        let (path, size) = (&self.entries[index].path, self.entries[index].size());
        let (first, count) = (u64::from(piece.first), piece.blocks.count());
        let (digests, rest) = match &piece.blocks {
            Blocks::Zeros(_) => {
                apply::write_zeros(&self.root, path, file, start, length)?;
                let zeros =
                    (first..first + count).map(|at| Digest::of_zeros(blocks::length(size, at)));
                (zeros.collect::<Vec<_>>(), (bytes, known))
            }
            Blocks::Moved { from, at, digests } => {
                let (other, at) = (self.open_other(*from)?, u64::from(*at) * BLOCK_BYTES as u64);
                self.copy((&other, at), digests, (path, file, start, length))?;
                (digests.clone(), (bytes, known))
            }
            Blocks::Woven {
                from,
                parts,
                digest,
                ..
            } => {
                let (digests, rest) =
                    self.weave((*from, parts, digest), bytes, (path, file, start, length))?;
                (digests, (rest, known))
            }
            Blocks::Patched { changed, digest } => {
                let (digests, rest) =
                    self.patch((changed, digest), bytes, (path, file, start, length))?;
                (digests, (rest, known))
            }
            Blocks::Data(_) => {
                let data = bytes.split_at_checked(length as usize);
                let digests = known.split_at_checked(count as usize);
                let ((data, bytes), (digests, known)) = data.zip(digests).ok_or(Fault::Garbled)?;
                apply::write(&self.root, path, file, data, start)?;
                (digests.to_vec(), (bytes, known))
            }
        };
        self.keep(index, piece.first, &digests);
        Ok(rest)
    }

    /// Takes note of blocks of a file that are in their place.
    fn keep(&self, index: usize, first: u32, digests: &[Digest]) {
        let mut kept = self.digests(index);
        Arc::make_mut(&mut kept)[first as usize..][..digests.len()].copy_from_slice(digests);
    }

    fn digests(&self, index: usize) -> MutexGuard<'_, Arc<Vec<Digest>>> {
        let digests = self.digests[index].lock();
        digests.unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a piece together from old bytes and new ones, and writes it if it is what was sent. Gives the digests of its
    /// blocks, and the new bytes that belong to the next piece.
    fn weave<'a>(
        &self,
        (from, parts, digest): (u32, &[Part], &Digest),
        new: &'a [u8],
        (path, file, start, length): (&[u8], &OwnedFd, u64, u64),
    ) -> Result<(Vec<Digest>, &'a [u8]), Fault> {
        if length > (WOVEN_BLOCKS_MAX * BLOCK_BYTES) as u64 {
            return Err(Fault::Garbled);
        }
        let mut woven = vec![0; length as usize];
        let rest = self.old.weave(from, parts, new, &mut woven)?;
        let digests: Vec<Digest> = woven.chunks(BLOCK_BYTES).map(Digest::of).collect();
        if Digest::over(&digests) != *digest {
            return Err(damaged(path));
        }
        apply::write(&self.root, path, file, &woven, start)?;
        Ok((digests, rest))
    }

    /// Puts sub-blocks in their places in the blocks that are there, and writes these if they are what was meant. Gives their
    /// digests, and the new bytes that belong to the next piece.
    fn patch<'a>(
        &self,
        (changed, digest): (&[u32], &Digest),
        mut new: &'a [u8],
        (path, file, start, length): (&[u8], &OwnedFd, u64, u64),
    ) -> Result<(Vec<Digest>, &'a [u8]), Fault> {
        if changed.len() > WOVEN_BLOCKS_MAX || length != (changed.len() * BLOCK_BYTES) as u64 {
            return Err(Fault::Garbled);
        }
        let failed = |errno| Fault::from(FilesError::read(self.root.shown(path), errno));
        let mut patched = vec![0; length as usize];
        blocks::read_at(file, &mut patched, start).map_err(failed)?;
        let mut digests = Vec::with_capacity(changed.len());
        for (block, changed) in patched.chunks_mut(BLOCK_BYTES).zip(changed) {
            new = fingerprints::patch(block, *changed, new).ok_or(Fault::Garbled)?;
            digests.push(Digest::of(block));
        }
        let over = digests.iter().copied().fold(Digest::UNKNOWN, Digest::then);
        if over != *digest {
            return Err(damaged(path));
        }
        apply::write(&self.root, path, file, &patched, start)?;
        Ok((digests, new))
    }

    /// Makes blocks of others of the tree, which are in their places: all frames have come.
    pub(super) fn repeat(&self, repeat: &Repeat) -> Result<(), Fault> {
        let piece = |entry, first| Piece {
            entry,
            first,
            blocks: Blocks::Zeros(repeat.count),
        };
        let (from, source, bytes) = self.span(&piece(repeat.from, repeat.at))?;
        let (index, start, length) = self.span(&piece(repeat.entry, repeat.first))?;
        let whole = u64::from(repeat.count) * BLOCK_BYTES as u64;
        if bytes != whole || length != whole {
            return Err(Fault::Garbled);
        }
        let known = Arc::clone(&self.digests(from));
        let digests = &known[repeat.at as usize..][..repeat.count as usize];
        let path = &self.entries[index].path;
        let (file, _) = self.open(repeat.entry)?;
        let other = self.open_new(from)?;
        self.copy((&other, source), digests, (path, &file, start, length))?;
        self.keep(index, repeat.first, digests);
        Ok(())
    }

    /// Opens a file of the new tree to read what was written there.
    fn open_new(&self, entry: usize) -> Result<OwnedFd, Fault> {
        let path = &self.entries[entry].path;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let opened = self.root.open_beneath(path, flags, 0);
        // It may have its owner and its mode already, which say who may read.
        opened.map_err(|_| damaged(path))
    }

    /// Opens a file of the base that is not part of the new tree, so nobody else writes there; or a seed.
    fn open_other(&self, from: u32) -> Result<OwnedFd, Fault> {
        let from = from as usize;
        let Some(entry) = self.base.entries.get(from) else {
            return self.seeds.open(from - self.base.entries.len());
        };
        if !matches!(entry.kind, Kind::File { .. }) {
            return Err(Fault::Garbled);
        }
        let failed = |errno| FilesError::read(self.root.shown(&entry.path), errno);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let opened = self.root.open_beneath(&entry.path, flags, 0);
        Ok(opened.map_err(failed)?)
    }

    /// Copies blocks from a place in another file.
    fn copy(
        &self,
        (from, at): (&OwnedFd, u64),
        digests: &[Digest],
        (path, file, start, length): (&[u8], &OwnedFd, u64, u64),
    ) -> Result<(), Fault> {
        let failed = |errno| Fault::from(FilesError::read(self.root.shown(path), errno));
        let mut data = vec![0; (length as usize).min(DATA_BYTES_MAX)];
        let mut done = 0;
        for digests in digests.chunks(DATA_BYTES_MAX / BLOCK_BYTES) {
            let bytes = ((length - done) as usize).min(data.len());
            blocks::read_at(from, &mut data[..bytes], at + done).map_err(failed)?;
            check(path, &data[..bytes], digests)?;
            apply::write(&self.root, path, file, &data[..bytes], start + done)?;
            done += bytes as u64;
        }
        Ok(())
    }
}

/// How many bytes of a woven piece come with it.
fn new_bytes(parts: &[Part]) -> u64 {
    let new = parts.iter().map(|part| match part {
        Part::New(length) => u64::from(*length),
        Part::Old { .. } => 0,
    });
    new.sum()
}

/// Compares blocks with the digests they came with.
fn check(path: &[u8], data: &[u8], digests: &[Digest]) -> Result<(), Fault> {
    let is_intact = data
        .chunks(BLOCK_BYTES)
        .zip(digests)
        .all(|(block, digest)| Digest::of(block) == *digest);
    if is_intact {
        return Ok(());
    }
    Err(damaged(path))
}

fn damaged(path: &[u8]) -> Fault {
    Fault::Damaged {
        path: String::from_utf8_lossy(path).into_owned(),
    }
}
