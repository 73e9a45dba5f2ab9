//! Files that a target has anyway: in the layers of its images, and in trees that the source has sent before. A tree that
//! is new there often consists of them: a container that changes the owner of a folder at its first start has a copy of it
//! in its upper layer, one that unpacks an application into a volume has that twice, and another container of the same
//! application has it once more. Their blocks need not cross.
//!
//! A seed is a hint. Its digests are told to the source, which may then name its blocks in place of sending them; each
//! is compared with its digest once more when it is used.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, OFlags};

use super::plan::MOVED_BLOCKS_MAX;
use super::wire::Fault;
use crate::files::blocks::{self, Digest};
use crate::files::{Entry, FilesError, Kind, Manifest, Root, content};

/// Files of fewer bytes are sent: to name them costs nearly as much.
pub(super) const SEED_BYTES_MIN: u64 = 1024;

/// The seeds that a source was told of, in that order.
#[derive(Debug, Default)]
pub(super) struct Seeds(Vec<Seed>);

#[derive(Debug)]
struct Seed {
    root: Arc<Root>,
    path: Vec<u8>,
}

/// What a source is told: the digests of each seed.
pub(super) type Told = Vec<Arc<Vec<Digest>>>;

/// A folder, and what the source has made of it.
pub(super) type SealedTree = (PathBuf, Arc<Manifest>);

/// A search for seeds.
struct Search<'a> {
    sizes: &'a HashSet<u64>,
    /// Blocks that may still be told of.
    room: u64,
    seen: HashSet<Arc<Vec<Digest>>>,
    seeds: Vec<Seed>,
    told: Told,
}

impl Seeds {
    /// Looks for files of these sizes: in trees that are known, and then in folders, whose files it reads. Gives their
    /// digests in the order of the seeds; of files with equal content only one. A folder that cannot be read has none.
    ///
    /// # Errors
    /// When it was cancelled.
    pub(super) fn find(
        (trees, folders): (&[SealedTree], &[PathBuf]),
        sizes: &HashSet<u64>,
        cancel: &AtomicBool,
    ) -> Result<(Self, Told), FilesError> {
        let mut search = Search {
            sizes,
            room: MOVED_BLOCKS_MAX as u64,
            seen: HashSet::new(),
            seeds: Vec::new(),
            told: Vec::new(),
        };
        let unless_cancelled = |outcome| match outcome {
            Err(FilesError::Cancelled) => Err(FilesError::Cancelled),
            Err(error) => {
                tracing::warn!(%error, "blocks of this folder are not used");
                Ok(())
            }
            Ok(()) => Ok(()),
        };
        for (path, manifest) in trees {
            unless_cancelled(search.tree(path, manifest))?;
        }
        for folder in folders {
            unless_cancelled(search.folder(folder, cancel))?;
        }
        Ok((Self(search.seeds), search.told))
    }

    /// Opens a seed.
    ///
    /// # Errors
    /// [`Fault::Damaged`] when there is no such file any more: the round is then done again without it.
    pub(super) fn open(&self, index: usize) -> Result<OwnedFd, Fault> {
        let seed = self.0.get(index).ok_or(Fault::Garbled)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let opened = seed.root.open_beneath(&seed.path, flags, 0);
        let file = opened.and_then(|file| Ok((rustix::fs::fstat(&file)?, file)));
        let is_file = |mode| FileType::from_raw_mode(mode) == FileType::RegularFile;
        match file {
            Ok((stat, file)) if is_file(stat.st_mode) => Ok(file),
            _ => Err(Fault::Damaged {
                path: seed.root.shown(&seed.path).display().to_string(),
            }),
        }
    }
}

impl Search<'_> {
    fn is_wanted(&self, kind: &Kind) -> bool {
        matches!(kind, Kind::File { size } if self.sizes.contains(size))
    }

    /// Takes files of a tree whose digests are known.
    fn tree(&mut self, path: &Path, manifest: &Manifest) -> Result<(), FilesError> {
        let root = open(path)?;
        for (entry, digests) in manifest.entries.iter().zip(&manifest.digests) {
            let count = digests.len() as u64;
            if self.is_wanted(&entry.kind)
                && count <= self.room
                && self.add(&root, &entry.path, digests)
            {
                self.room -= count;
            }
        }
        Ok(())
    }

    /// Reads files of a folder, and takes them.
    fn folder(&mut self, folder: &Path, cancel: &AtomicBool) -> Result<(), FilesError> {
        let root = open(folder)?;
        let is_read = |entry: &Entry| {
            let count = blocks::count(entry.size());
            let fits = self.is_wanted(&entry.kind) && count <= self.room;
            self.room -= if fits { count } else { 0 };
            fits
        };
        let found = content::scan_files(&root, is_read, cancel)?;
        for (entry, digests) in found.entries.iter().zip(&found.digests) {
            self.add(&root, &entry.path, digests);
        }
        Ok(())
    }

    /// Takes a file unless its content is not known, or told of already.
    fn add(&mut self, root: &Arc<Root>, path: &[u8], digests: &Arc<Vec<Digest>>) -> bool {
        let is_known = !digests.is_empty() && !digests.contains(&Digest::UNKNOWN);
        let is_new = is_known && self.seen.insert(Arc::clone(digests));
        if is_new {
            self.seeds.push(Seed {
                root: Arc::clone(root),
                path: path.to_vec(),
            });
            self.told.push(Arc::clone(digests));
        }
        is_new
    }
}

fn open(folder: &Path) -> Result<Arc<Root>, FilesError> {
    let root = Root::open(folder).map_err(|errno| FilesError::read(folder.to_owned(), errno))?;
    Ok(Arc::new(root))
}
