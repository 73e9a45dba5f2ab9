//! One round at the target: what is expected, what has come, and how it ends.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::Stat;
use tokio::sync::watch;

use super::TreeName;
use super::body::Body;
use super::linked::Unlinker;
use super::old::OldFiles;
use super::seeds::Seeds;
use super::wire::{Codec, DATA_BYTES_MAX, DataHead, Fault, Packed, Repeat};
use crate::files::blocks::{self, Digest};
use crate::files::manifest::{self, Entry, Manifest, Pairing, Step};
use crate::files::{FilesError, Kind, Root, apply};

/// How far a round has come.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    pub(super) is_ready: bool,
    pub(super) frames: u64,
    /// Linked frames that are unpacked.
    pub(super) linked: u64,
    pub(super) seal: Option<(u64, Digest)>,
    pub(super) fault: Option<Fault>,
}

impl Standing {
    /// Whether a frame has nothing more to wait for.
    pub(super) fn takes(&self, codec: Codec) -> bool {
        let is_next = match codec {
            Codec::Linked { number, .. } => number <= self.linked,
            Codec::Plain | Codec::Zstd { .. } | Codec::Lz4 { .. } => true,
        };
        self.fault.is_some() || self.is_ready && is_next
    }

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
    unlinker: Unlinker,
    /// Told with the seal.
    repeats: OnceLock<Packed>,
}

impl Round {
    pub(super) fn new() -> Self {
        Self {
            standing: watch::Sender::new(Standing::default()),
            body: OnceLock::new(),
            unlinker: Unlinker::default(),
            repeats: OnceLock::new(),
        }
    }

    /// Takes the source's last word: how many frames there are, the root hash, and blocks that are to be made of others.
    pub(super) fn seal(&self, seal: (u64, Digest), repeats: Packed) {
        // Said once.
        let _ = self.repeats.set(repeats);
        self.standing
            .send_modify(|standing| standing.seal = Some(seal));
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
        (steps, replaced): (Packed, Vec<u32>),
    ) -> Result<(), Fault> {
        let steps: Vec<Step> = steps.open()?;
        let entries = manifest::rebuild(&base.entries, steps)?;
        manifest::check(&entries)?;
        let pairs = Pairing::of(&base.entries, &entries);
        let old = OldFiles::set_aside(&root, &base, &replaced)?;
        apply::prepare(&root, &base, &entries, &pairs)?;
        let inherited = |(index, entry): (usize, &Arc<Entry>)| {
            let old = pairs.old_of(index).filter(|at| !old.contains(*at));
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
            old,
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
            Codec::Linked { bytes, number } => {
                unpacked = self.unlinker.unpack(number, body, bytes as usize)?;
                self.standing.send_modify(|standing| standing.linked += 1);
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
        if let Some(repeats) = self.repeats.get() {
            let repeats: Vec<Repeat> = repeats.open()?;
            repeats.iter().try_for_each(|repeat| tree.repeat(repeat))?;
        }
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
        let is_anew = |at: usize| tree.old.contains(at);
        let done = apply::Done {
            touched: &touched,
            completed: &completed,
            is_anew: &is_anew,
        };
        apply::finish(&tree.root, base, entries, &tree.pairs, &done)?;
        if is_durable {
            apply::sync(&tree.root)?;
        }
        Ok((manifest, root))
    }
}

/// Unpacks the bytes of a frame that is not linked, trusting no length.
pub(crate) fn unpack(codec: Codec, body: &[u8], bytes: usize) -> Result<Vec<u8>, Fault> {
    if bytes > DATA_BYTES_MAX {
        return Err(Fault::Garbled);
    }
    let unpacked = match codec {
        Codec::Lz4 { .. } => lz4_flex::block::decompress(body, bytes).ok(),
        Codec::Zstd { .. } => zstd::bulk::decompress(body, bytes).ok(),
        Codec::Plain | Codec::Linked { .. } => None,
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
    use tokio::sync::Semaphore;

    use super::*;
    use crate::files::blocks::BLOCK_BYTES;
    use crate::files::content;
    use crate::files::manifest::difference;
    use crate::transfer::fingerprints::SUBBLOCK_BYTES;
    use crate::transfer::linked::Linker;
    use crate::transfer::wire::{Blocks, Part, Piece, WOVEN_BLOCKS_MAX};

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
                (steps, Vec::new()),
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
    fn a_linked_frame_waits_for_the_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let round = round(folder.path(), 2 * BLOCK_BYTES as u64);
        round
            .standing
            .send_modify(|standing| standing.is_ready = true);
        let (linker, places) = (Linker::default(), Arc::new(Semaphore::new(1)));
        let block = [7; BLOCK_BYTES];
        let frames = [0, 1].map(|first| {
            let (codec, packed) = linker.turn(&places).unwrap().pack(&block).unwrap();
            let mut head = head(first, vec![Digest::of(&block)]);
            head.codec = codec;
            (head, packed)
        });
        let takes = |at: usize| round.standing.borrow().takes(frames[at].0.codec);
        let apply = |at: usize| round.apply(&frames[at].0, &frames[at].1);
        assert!(takes(0) && !takes(1));
        assert_eq!(apply(0), Ok(()));
        assert!(takes(1));
        assert_eq!(apply(1), Ok(()));
        assert_eq!(
            std::fs::read(folder.path().join("file")).unwrap(),
            block.repeat(2)
        );
        // Nobody waits for one that will not come.
        let codec = Codec::Linked {
            bytes: 1,
            number: 7,
        };
        assert!(!round.standing.borrow().takes(codec));
        round.fail(Fault::Abandoned);
        assert!(round.standing.borrow().takes(codec));
    }

    #[test]
    fn a_seed_is_compared_once_more_when_it_is_used() {
        let (folder, layer) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (copy, seed) = (folder.path().join("file"), layer.path().join("app.php"));
        std::fs::write(&seed, [7; 5000]).unwrap();
        let (folders, sizes) = ([layer.path().to_owned()], HashSet::from([5000]));
        let found = Seeds::find((&[], &folders), &sizes, &AtomicBool::new(false));
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
        std::fs::create_dir(&seed).unwrap();
        assert!(is_damaged(place(0)));
        std::fs::remove_dir(&seed).unwrap();
        assert_eq!(std::fs::read(&copy).unwrap(), b"");
        assert_eq!(place(1), Err(Fault::Garbled), "there is only one");
        std::fs::write(&seed, [7; 5000]).unwrap();
        assert_eq!(place(0), Ok(()));
        assert_eq!(std::fs::read(&copy).unwrap(), [7; 5000]);
    }

    #[test]
    fn a_woven_piece_that_is_not_what_was_sent_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "old content").unwrap();
        let cancel = AtomicBool::new(false);
        let base = content::scan(&open_tree(folder.path()).unwrap(), &cancel).unwrap();
        let mut entries = base.entries.clone();
        Arc::make_mut(&mut entries[1]).kind = Kind::File { size: 9 };
        let pairs = Pairing::of(&base.entries, &entries);
        let steps = Packed::of(&difference(&base.entries, &entries, &pairs)).unwrap();
        let round = Round::new();
        let known = (Arc::new(base), Arc::default());
        let root = open_tree(folder.path()).unwrap();
        round.prepare(root, known, (steps, vec![1])).unwrap();
        let send = |parts: Vec<Part>, body: &[u8]| {
            let mut head = head(0, Vec::new());
            head.pieces[0].blocks = Blocks::Woven {
                from: 1,
                blocks: 1,
                parts,
                digest: Digest::over(&[Digest::of(b"content 2")]),
            };
            round.apply(&head, body)
        };
        let old = |at, length| Part::Old { at, length };
        let path = "file".to_owned();
        let refused = send(vec![old(3, 7), Part::New(2)], b" 2");
        assert_eq!(refused, Err(Fault::Damaged { path }));
        // Too short, too long, more or fewer bytes than it speaks of.
        for (parts, body) in [
            (vec![old(4, 7)], &b""[..]),
            (vec![old(0, 9), Part::New(1)], b"2"),
            (vec![old(4, 7), Part::New(2)], b" "),
            (vec![old(4, 7), Part::New(2)], b" 2 "),
            (vec![Part::New(u32::MAX); 3], b" 2"),
        ] {
            assert_eq!(send(parts, body), Err(Fault::Garbled));
        }
        assert_eq!(std::fs::read(&file).unwrap(), [0; 9]);
        assert_eq!(send(vec![old(4, 7), Part::New(2)], b" 2"), Ok(()));
        assert_eq!(std::fs::read(&file).unwrap(), b"content 2");
    }

    #[test]
    fn a_patched_block_that_is_not_what_was_sent_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let old = [[1; BLOCK_BYTES], [2; BLOCK_BYTES]].concat();
        std::fs::write(&path, &old).unwrap();
        let round = round(folder.path(), old.len() as u64 + 5);
        let mut new = old.clone();
        new[SUBBLOCK_BYTES..][..SUBBLOCK_BYTES].fill(3);
        new[2 * BLOCK_BYTES - SUBBLOCK_BYTES..].fill(4);
        let body = [[3; SUBBLOCK_BYTES], [4; SUBBLOCK_BYTES]].concat();
        let digest = |blocks: &[u8]| {
            let blocks = blocks.chunks(BLOCK_BYTES).map(Digest::of);
            blocks.fold(Digest::UNKNOWN, Digest::then)
        };
        let send = |first, changed: Vec<u32>, digest, body: &[u8]| {
            let mut head = head(first, Vec::new());
            head.pieces[0].blocks = Blocks::Patched { changed, digest };
            round.apply(&head, body)
        };
        let patch = vec![0b10, 1 << 31];
        let path_of = "file".to_owned();
        let damaged = Err(Fault::Damaged { path: path_of });
        assert_eq!(send(0, patch.clone(), digest(&old), &body), damaged);
        // The last block is no whole one; more or fewer bytes than it speaks of; no block at all.
        let few = &body[1..];
        let many = [&body[..], b"x"].concat();
        for (first, changed, body) in [
            (1, patch.clone(), &body[..]),
            (0, patch.clone(), few),
            (0, patch.clone(), &many),
            (0, Vec::new(), b""),
        ] {
            let refused = send(first, changed, digest(&new), body);
            assert_eq!(refused, Err(Fault::Garbled));
        }
        assert!(std::fs::read(&path).unwrap() == old);
        assert_eq!(send(0, patch, digest(&new), &body), Ok(()));
        assert!(std::fs::read(&path).unwrap() == new);
    }

    #[test]
    fn repeats_are_whole_blocks_of_files_and_compared_once_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let block = [7; BLOCK_BYTES];
        let sealed = |repeat: Repeat, before: &dyn Fn()| {
            let round = round(folder.path(), 2 * BLOCK_BYTES as u64 + 5);
            round
                .apply(&head(0, vec![Digest::of(&block)]), &block)
                .unwrap();
            round
                .apply(&head(2, vec![Digest::of(b"whole")]), b"whole")
                .unwrap();
            before();
            round.seal((2, Digest::UNKNOWN), Packed::of(&vec![repeat]).unwrap());
            let name = TreeName::new("db/volume").unwrap();
            let sealed = round.finish(&name, Digest::UNKNOWN, false);
            sealed.err().unwrap()
        };
        let repeat = Repeat {
            entry: 1,
            first: 1,
            from: 1,
            at: 0,
            count: 1,
        };
        let nothing = || ();
        for other in [
            Repeat { entry: 0, ..repeat },
            Repeat { from: 2, ..repeat },
            Repeat { first: 2, ..repeat },
            Repeat { at: 2, ..repeat },
            Repeat { count: 0, ..repeat },
            Repeat { count: 2, ..repeat },
            Repeat {
                count: u32::MAX,
                ..repeat
            },
        ] {
            assert_eq!(sealed(other, &nothing), Fault::Garbled, "{other:?}");
        }
        let is_damaged = |fault| matches!(fault, Fault::Damaged { .. });
        assert!(
            is_damaged(sealed(Repeat { at: 1, ..repeat }, &nothing)),
            "unknown"
        );
        let change = || {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", 5).unwrap();
        };
        assert!(is_damaged(sealed(repeat, &change)));
        assert!(is_damaged(
            sealed(repeat, &|| std::fs::remove_file(&path).unwrap())
        ));
        // All there, but it is not what was sealed.
        assert!(matches!(sealed(repeat, &nothing), Fault::NotSealed(_)));
        let written = std::fs::read(&path).unwrap();
        assert!(written == [&block[..], &block, b"whole"].concat());
    }

    #[test]
    fn a_patched_piece_is_put_together_in_bounded_memory() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = WOVEN_BLOCKS_MAX + 1;
        let round = round(folder.path(), (blocks * BLOCK_BYTES) as u64);
        let mut head = head(0, Vec::new());
        head.pieces[0].blocks = Blocks::Patched {
            changed: vec![0; blocks],
            digest: Digest::UNKNOWN,
        };
        assert_eq!(round.apply(&head, b""), Err(Fault::Garbled));
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
