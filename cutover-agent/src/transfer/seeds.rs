//! Files that a target has anyway, such as those in the layers of its images. A tree that is new there often consists of
//! them: a container that changes the owner of a folder at its first start has a copy of it in its upper layer, and one
//! that unpacks an application into a volume has that twice. Their blocks need not cross.
//!
//! A seed is a hint. Its digests are told to the source, which may then name its blocks in place of sending them; each
//! is compared with its digest once more when it is used.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::OFlags;

use super::plan::MOVED_BLOCKS_MAX;
use super::wire::Fault;
use crate::files::blocks::{self, Digest};
use crate::files::{FilesError, Kind, Root, content};

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

impl Seeds {
    /// Looks in these folders for files of these sizes, and reads them. Gives their digests in the order of the seeds; of
    /// files with equal content only one. A folder that cannot be read has none.
    ///
    /// # Errors
    /// When it was cancelled.
    pub(super) fn find(
        folders: &[PathBuf],
        sizes: &HashSet<u64>,
        cancel: &AtomicBool,
    ) -> Result<(Self, Told), FilesError> {
        let (mut seeds, mut found) = (Vec::new(), Vec::new());
        let mut room = MOVED_BLOCKS_MAX as u64;
        let mut seen = HashSet::new();
        for folder in folders {
            let (root, manifest) = match look(folder, sizes, &mut room, cancel) {
                Ok(looked) => looked,
                Err(FilesError::Cancelled) => return Err(FilesError::Cancelled),
                Err(error) => {
                    tracing::warn!(%error, "blocks of this folder are not used");
                    continue;
                }
            };
            for (entry, digests) in manifest {
                if !seen.insert(Arc::clone(&digests)) {
                    continue;
                }
                seeds.push(Seed {
                    root: Arc::clone(&root),
                    path: entry,
                });
                found.push(digests);
            }
        }
        Ok((Self(seeds), found))
    }

    /// Opens a seed.
    ///
    /// # Errors
    /// [`Fault::Damaged`] when it is not there any more: the round is then done again without it.
    pub(super) fn open(&self, index: usize) -> Result<OwnedFd, Fault> {
        let seed = self.0.get(index).ok_or(Fault::Garbled)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        seed.root.open_beneath(&seed.path, flags, 0).map_err(|_| {
            let path = seed.root.shown(&seed.path).display().to_string();
            Fault::Damaged { path }
        })
    }
}

type Found = Vec<(Vec<u8>, Arc<Vec<Digest>>)>;

fn look(
    folder: &Path,
    sizes: &HashSet<u64>,
    room: &mut u64,
    cancel: &AtomicBool,
) -> Result<(Arc<Root>, Found), FilesError> {
    let root = Root::open(folder).map_err(|errno| FilesError::read(folder.to_owned(), errno))?;
    let manifest = content::scan_files(
        &root,
        |entry| {
            let is_wanted = matches!(entry.kind, Kind::File { size } if sizes.contains(&size));
            let count = blocks::count(entry.size());
            let fits = is_wanted && count <= *room;
            *room -= if fits { count } else { 0 };
            fits
        },
        cancel,
    )?;
    let files = manifest.entries.iter().zip(&manifest.digests);
    let is_known = |digests: &[Digest]| !digests.is_empty() && !digests.contains(&Digest::UNKNOWN);
    let found = files
        .filter(|(_, digests)| is_known(digests))
        .map(|(entry, digests)| (entry.path.clone(), Arc::clone(digests)));
    Ok((Arc::new(root), found.collect()))
}
