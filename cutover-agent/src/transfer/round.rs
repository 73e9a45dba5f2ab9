//! One round at the target: what is expected, what has come, and how it ends.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{OFlags, Stat};
use rustix::io::Errno;
use tokio::sync::watch;

use super::TreeName;
use super::seeds::Seeds;
use super::wire::{Blocks, Codec, DATA_BYTES_MAX, DataHead, Fault, Packed, Piece};
use crate::files::blocks::{self, BLOCK_BYTES, Digest};
use crate::files::manifest::{self, Entry, Manifest, Pairing, Step};
use crate::files::{FilesError, Kind, Root, apply};

/// How far a round has come.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    pub(super) is_ready: bool,
    pub(super) frames: u64,
    pub(super) seal: Option<(u64, Digest)>,
    pub(super) fault: Option<Fault>,
}

impl Standing {
    /// Whether all frames that the seal speaks of are in, or nothing more is to be waited for.
    pub(super) fn is_over(&self) -> bool {
        self.fault.is_some()
            || (self.is_ready && self.seal.is_some_and(|(frames, _)| self.frames >= frames))
    }
}

/// A round under way; shared by the task that answers it and all streams.
pub(super) struct Round {
    pub(super) standing: watch::Sender<Standing>,
    /// Absent in a measurement, whose frames are only counted.
    body: OnceLock<Body>,
}

struct Body {
    root: Root,
    base: Arc<Manifest>,
    seeds: Arc<Seeds>,
    entries: Vec<Arc<Entry>>,
    pairs: Pairing,
    digests: Vec<Mutex<Arc<Vec<Digest>>>>,
    touched: Vec<AtomicBool>,
    completed: Vec<AtomicBool>,
}

impl Round {
    pub(super) fn new() -> Self {
        Self {
            standing: watch::Sender::new(Standing::default()),
            body: OnceLock::new(),
        }
    }

    /// Ends the round with a fault, unless it has one.
    pub(super) fn fail(&self, fault: Fault) {
        self.standing.send_modify(|standing| {
            standing.fault.get_or_insert(fault);
        });
    }

    /// Checks the list of entries and makes room in the tree.
    pub(super) fn prepare(
        &self,
        root: Root,
        (base, seeds): (Arc<Manifest>, Arc<Seeds>),
        steps: &Packed,
    ) -> Result<(), Fault> {
        let steps: Vec<Step> = steps.open()?;
        let entries = manifest::rebuild(&base.entries, steps)?;
        manifest::check(&entries)?;
        let pairs = Pairing::of(&base.entries, &entries);
        apply::prepare(&root, &base, &entries, &pairs)?;
        let inherited = |(index, entry): (usize, &Arc<Entry>)| {
            let old = pairs.old_of(index);
            inherited(old.and_then(|at| base.digests_of(at)), entry)
        };
        let all = entries.iter().enumerate();
        let digests = all.map(inherited).map(Mutex::new).collect();
        let marks = || entries.iter().map(|_| AtomicBool::new(false)).collect();
        let (touched, completed) = (marks(), marks());
        // Set once, by the one task that prepares.
        let _ = self.body.set(Body {
            root,
            base,
            seeds,
            entries,
            pairs,
            digests,
            touched,
            completed,
        });
        Ok(())
    }

    /// Puts the blocks of one frame in place. A measurement's frames are just thrown away.
    pub(super) fn apply(&self, head: &DataHead, body: &[u8]) -> Result<(), Fault> {
        let Some(tree) = self.body.get() else {
            return Ok(());
        };
        let unpacked;
        let mut bytes = match head.codec {
            Codec::Plain => body,
            Codec::Zstd { bytes } | Codec::Lz4 { bytes } => {
                unpacked = unpack(head.codec, body, bytes as usize)?;
                &unpacked
            }
        };
        let digests = tree.check(head, bytes)?;
        let mut known = digests.as_slice();
        let mut open: Option<(u32, (OwnedFd, Stat))> = None;
        for piece in &head.pieces {
            if open.as_ref().is_none_or(|(entry, _)| *entry != piece.entry) {
                open = Some((piece.entry, tree.open(piece.entry)?));
            }
            if let Some((_, (file, stat))) = &open {
                (bytes, known) = tree.place(piece, file, (bytes, known))?;
                tree.complete(piece, file, stat)?;
            }
        }
        Ok(())
    }

    /// Completes the tree: everything known, root hash as sealed, metadata applied, deletions done.
    pub(super) fn finish(
        &self,
        name: &TreeName,
        sealed: Digest,
        is_durable: bool,
    ) -> Result<(Manifest, Digest), Fault> {
        let tree = self.body.get().ok_or(Fault::Garbled)?;
        let digests = tree
            .digests
            .iter()
            .map(|known| Arc::clone(&known.lock().unwrap_or_else(PoisonError::into_inner)));
        let manifest = Manifest {
            entries: tree.entries.clone(),
            digests: digests.collect(),
        };
        let root = manifest.root();
        if root != sealed
            || manifest
                .digests
                .iter()
                .any(|known| known.contains(&Digest::UNKNOWN))
        {
            return Err(Fault::NotSealed(name.clone()));
        }
        let marked = |marks: &[AtomicBool]| -> HashSet<usize> {
            let is_marked = |at: &usize| marks[*at].load(Ordering::Relaxed);
            (0..marks.len()).filter(is_marked).collect()
        };
        let (touched, completed) = (marked(&tree.touched), marked(&tree.completed));
        let (base, entries) = (&tree.base, &tree.entries);
        apply::finish(&tree.root, base, entries, &tree.pairs, &touched, &completed)?;
        if is_durable {
            apply::sync(&tree.root)?;
        }
        Ok((manifest, root))
    }
}

impl Body {
    fn open(&self, entry: u32) -> Result<(OwnedFd, Stat), Fault> {
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
    fn complete(&self, piece: &Piece, file: &OwnedFd, stat: &Stat) -> Result<(), Fault> {
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
    fn check(&self, head: &DataHead, mut bytes: &[u8]) -> Result<Vec<Digest>, Fault> {
        let mut digests = Vec::new();
        let mut path: &[u8] = &[];
        for piece in &head.pieces {
            if let Blocks::Data(_) = piece.blocks {
                let (index, _, length) = self.span(piece)?;
                let data;
                (data, bytes) = bytes
                    .split_at_checked(length as usize)
                    .ok_or(Fault::Garbled)?;
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
    fn place<'a>(
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
                self.copy(*from, *at, digests, (path, file, start, length))?;
                (digests.clone(), (bytes, known))
            }
            Blocks::Data(_) => {
                let data = bytes.split_at_checked(length as usize);
                let digests = known.split_at_checked(count as usize);
                let ((data, bytes), (digests, known)) = data.zip(digests).ok_or(Fault::Garbled)?;
                apply::write(&self.root, path, file, data, start)?;
                (digests.to_vec(), (bytes, known))
            }
        };
        let mut kept = self.digests[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut kept)[first as usize..][..digests.len()].copy_from_slice(&digests);
        Ok(rest)
    }
}

impl Body {
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

    /// Copies blocks of another file.
    fn copy(
        &self,
        from: u32,
        at: u32,
        digests: &[Digest],
        (path, file, start, length): (&[u8], &OwnedFd, u64, u64),
    ) -> Result<(), Fault> {
        let opened = self.open_other(from)?;
        let failed = |errno| Fault::from(FilesError::read(self.root.shown(path), errno));
        let mut data = vec![0; (length as usize).min(DATA_BYTES_MAX)];
        let mut done = 0;
        for digests in digests.chunks(DATA_BYTES_MAX / BLOCK_BYTES) {
            let bytes = ((length - done) as usize).min(data.len());
            let place = u64::from(at) * BLOCK_BYTES as u64 + done;
            let mut filled = 0;
            while filled < bytes {
                match rustix::io::pread(&opened, &mut data[filled..bytes], place + filled as u64) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            check(path, &data[..bytes], digests)?;
            apply::write(&self.root, path, file, &data[..bytes], start + done)?;
            done += bytes as u64;
        }
        Ok(())
    }
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

/// Unpacks a frame's bytes, trusting no length.
pub(crate) fn unpack(codec: Codec, body: &[u8], bytes: usize) -> Result<Vec<u8>, Fault> {
    if bytes > DATA_BYTES_MAX {
        return Err(Fault::Garbled);
    }
    let unpacked = match codec {
        Codec::Lz4 { .. } => lz4_flex::block::decompress(body, bytes).ok(),
        Codec::Zstd { .. } | Codec::Plain => zstd::bulk::decompress(body, bytes).ok(),
    };
    unpacked.ok_or(Fault::Garbled)
}

/// The digests with which a file starts: the base's where the same file was there, unknown elsewhere.
fn inherited(known: Option<&Arc<Vec<Digest>>>, entry: &Entry) -> Arc<Vec<Digest>> {
    let Kind::File { size } = entry.kind else {
        return Arc::default();
    };
    let wanted = blocks::count(size) as usize;
    match known {
        Some(known) if known.len() == wanted => Arc::clone(known),
        known => {
            let mut digests = known
                .map(|known| known.as_ref().clone())
                .unwrap_or_default();
            digests.resize(wanted, Digest::UNKNOWN);
            Arc::new(digests)
        }
    }
}

/// Opens the target's tree, making its folder when it is not there yet.
pub(super) fn open_tree(path: &std::path::Path) -> Result<Root, FilesError> {
    let failed = |source| FilesError::Write {
        path: path.to_owned(),
        source,
    };
    std::fs::create_dir_all(path).map_err(failed)?;
    Root::open(path).map_err(|errno| FilesError::read(path.to_owned(), errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::manifest::difference;

    fn round(folder: &std::path::Path, size: u64) -> Round {
        round_with(Seeds::default(), folder, size)
    }

    fn round_with(seeds: Seeds, folder: &std::path::Path, size: u64) -> Round {
        let entry = |path: &[u8], kind| Entry {
            path: path.to_vec(),
            kind,
            mode: 0o755,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mtime_ns: 5,
            attributes: Vec::new(),
        };
        let entries = vec![
            entry(b"", Kind::Directory),
            entry(b"file", Kind::File { size }),
        ];
        let round = Round::new();
        let entries: Vec<_> = entries.into_iter().map(Arc::new).collect();
        let pairs = Pairing::of(&[], &entries);
        let steps = Packed::of(&difference(&[], &entries, &pairs)).unwrap();
        round
            .prepare(
                open_tree(folder).unwrap(),
                (Arc::default(), Arc::new(seeds)),
                &steps,
            )
            .unwrap();
        round
    }

    fn head(first: u32, digests: Vec<Digest>) -> DataHead {
        DataHead {
            round: 1,
            codec: Codec::Plain,
            digest: Digest::over(&digests),
            pieces: vec![Piece {
                entry: 1,
                first,
                blocks: Blocks::Data(digests.len() as u32),
            }],
        }
    }

    #[test]
    fn a_damaged_block_is_found_before_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let round = round(folder.path(), 5);
        let sent = head(0, vec![Digest::of(b"whole")]);
        assert_eq!(
            round.apply(&sent, b"wholf"),
            Err(Fault::Damaged {
                path: "file".into()
            })
        );
        assert!(!folder.path().join("file").exists());
        assert_eq!(round.apply(&sent, b"whole"), Ok(()));
        assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), b"whole");
    }

    #[test]
    fn a_seed_is_compared_once_more_when_it_is_used() {
        let (folder, layer) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (copy, seed) = (folder.path().join("file"), layer.path().join("app.php"));
        std::fs::write(&seed, [7; 5000]).unwrap();
        let (folders, sizes) = ([layer.path().to_owned()], HashSet::from([5000]));
        let found = Seeds::find(&folders, &sizes, &AtomicBool::new(false));
        let (seeds, told) = found.unwrap();
        let round = round_with(seeds, folder.path(), 5000);
        let place = |from| {
            let blocks = Blocks::Moved {
                from,
                at: 0,
                digests: told[0].to_vec(),
            };
            let mut head = head(0, Vec::new());
            head.pieces[0].blocks = blocks;
            round.apply(&head, b"")
        };
        let is_damaged = |outcome| matches!(outcome, Err(Fault::Damaged { .. }));
        std::fs::write(&seed, [8; 5000]).unwrap();
        assert!(is_damaged(place(0)));
        std::fs::remove_file(&seed).unwrap();
        assert!(is_damaged(place(0)));
        assert_eq!(std::fs::read(&copy).unwrap(), b"");
        assert_eq!(place(1), Err(Fault::Garbled), "there is only one");
        std::fs::write(&seed, [7; 5000]).unwrap();
        assert_eq!(place(0), Ok(()));
        assert_eq!(std::fs::read(&copy).unwrap(), [7; 5000]);
    }

    #[test]
    fn a_tree_with_a_missing_block_or_another_root_is_never_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let round = round(folder.path(), 16384 + 5);
        let name = TreeName::new("db/volume").unwrap();
        round
            .apply(&head(1, vec![Digest::of(b"whole")]), b"whole")
            .unwrap();
        let digests = vec![
            Arc::default(),
            Arc::new(vec![Digest::UNKNOWN, Digest::of(b"whole")]),
        ];
        let body = round.body.get().unwrap();
        let half = Manifest {
            entries: body.entries.clone(),
            digests,
        }
        .root();
        assert_eq!(
            round.finish(&name, half, false).err(),
            Some(Fault::NotSealed(name.clone()))
        );
        assert_eq!(
            round.finish(&name, Digest::of(b"other"), false).err(),
            Some(Fault::NotSealed(name))
        );
    }

    #[test]
    fn pieces_beyond_the_file_or_of_no_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let round = round(folder.path(), 5);
        let digest = Digest::of(b"whole");
        for first in [1, u32::MAX] {
            assert_eq!(
                round.apply(&head(first, vec![digest]), b"whole"),
                Err(Fault::Garbled)
            );
        }
        assert_eq!(
            round.apply(&head(0, vec![digest]), b"whole and more"),
            Err(Fault::Garbled)
        );
        assert_eq!(
            round.apply(&head(0, vec![digest; 2]), b"whole"),
            Err(Fault::Garbled)
        );
        for entry in [0, 2] {
            let piece = Piece {
                entry,
                first: 0,
                blocks: Blocks::Zeros(1),
            };
            let sent = DataHead {
                round: 1,
                codec: Codec::Plain,
                digest: Digest::over(&[]),
                pieces: vec![piece],
            };
            assert_eq!(round.apply(&sent, b""), Err(Fault::Garbled));
        }
        let bomb = DataHead {
            round: 1,
            codec: Codec::Zstd { bytes: u32::MAX },
            digest: Digest::over(&[]),
            pieces: Vec::new(),
        };
        assert_eq!(round.apply(&bomb, b""), Err(Fault::Garbled));
    }

    #[test]
    fn a_symlink_planted_in_the_tree_is_not_followed() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "whole").unwrap();
        let round = round(folder.path(), 5);
        std::os::unix::fs::symlink(&victim, folder.path().join("file")).unwrap();
        let refused = round.apply(&head(0, vec![Digest::of(b"other")]), b"other");
        assert!(matches!(refused, Err(Fault::Files { .. })), "{refused:?}");
        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
    }
}
