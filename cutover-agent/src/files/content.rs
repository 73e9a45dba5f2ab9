//! Reads a tree's content block by block, over several threads; each block is read once and hashed once.
//!
//! The caller says what to do with each block ([`Visit`]); memory is one buffer of 1 MiB per thread, whatever the size.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::FilesError;
use super::blocks::{self, BLOCK_BYTES, Digest};
use super::manifest::{Entry, Kind, Manifest};
use super::remembered::Stamp;
use super::root::Root;
use super::walk::{self, WALKERS, Walked};

/// Blocks that are read at once: 1 MiB.
const BLOCKS_AT_ONCE: u64 = 64;

/// What is expected of a tree while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calm {
    /// Nobody writes: a file that changed is an error.
    Frozen,
    /// Files change; what is missing reads as zeros, and the next round sees the new stamp.
    Live,
    /// As live, and a file that may not be read counts as unknown (the target looking at its own staging).
    Staging,
}

/// What is done with each block that is read. One visitor per thread.
pub(crate) trait Visit: Send {
    /// A block was read; all-zero blocks come with empty `bytes`.
    fn block(
        &mut self,
        entry: usize,
        index: u64,
        digest: Digest,
        bytes: &[u8],
    ) -> Result<(), FilesError>;
    /// Nothing more will come on this thread.
    fn finish(&mut self) -> Result<(), FilesError>;
}

/// A run of blocks of one file.
#[derive(Clone, Copy)]
struct Run {
    entry: usize,
    first: u64,
    count: u64,
}

/// Reads the blocks of the entries in `wanted` with one thread per visitor at most, and gives their digests, in `wanted`'s
/// order. Blocks of an entry that is wanted whole come in their order, all to one visitor. `unsteady` collects the entries
/// whose content did not match their stamp.
///
/// # Errors
/// The first failure of any thread.
pub(crate) fn read<V: Visit>(
    root: &Root,
    walked: &Walked,
    (wanted, is_whole): (&[usize], &dyn Fn(usize) -> bool),
    calm: Calm,
    visitors: Vec<V>,
    cancel: &AtomicBool,
) -> Result<Contents, FilesError> {
    let shared = Shared {
        root,
        walked,
        calm,
        cancel,
        runs: plan(walked, wanted, is_whole),
        next: AtomicUsize::new(0),
        done: Mutex::default(),
    };
    // The caller's thread is one of them, and there are no more than there is work for.
    let mut visitors = visitors.into_iter().take(shared.runs.len().max(1));
    let own = visitors.next();
    let results: Vec<Result<(), FilesError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = visitors
            .map(|visitor| scope.spawn(|| shared.work(visitor)))
            .collect();
        let own = own.map_or(Ok(()), |visitor| shared.work(visitor));
        let others = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(FilesError::Cancelled)));
        others.chain([own]).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    let done = shared
        .done
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(assemble(walked, wanted, done))
}

/// The outcome of [`read`].
pub(crate) struct Contents {
    /// Per wanted entry.
    pub(crate) digests: Vec<Vec<Digest>>,
    /// Entries that changed under the reader.
    pub(crate) unsteady: Vec<usize>,
}

fn plan(walked: &Walked, wanted: &[usize], is_whole: &dyn Fn(usize) -> bool) -> Vec<Vec<Run>> {
    let mut jobs: Vec<Vec<Run>> = Vec::new();
    let mut room = 0;
    for &entry in wanted {
        let blocks = blocks::count(walked.entries[entry].size());
        let mut first = 0;
        // It has a job of its own.
        let job_blocks = if is_whole(entry) {
            room = 0;
            blocks
        } else {
            BLOCKS_AT_ONCE
        };
        while first < blocks {
            if room == 0 {
                jobs.push(Vec::new());
                room = job_blocks;
            }
            let count = room.min(blocks - first).min(BLOCKS_AT_ONCE);
            if let Some(job) = jobs.last_mut() {
                job.push(Run {
                    entry,
                    first,
                    count,
                });
            }
            first += count;
            room -= count;
        }
    }
    jobs
}

#[derive(Default)]
struct Done {
    digests: Vec<(Run, Vec<Digest>)>,
    unsteady: Vec<usize>,
}

fn assemble(walked: &Walked, wanted: &[usize], done: Done) -> Contents {
    let mut places = std::collections::HashMap::with_capacity(wanted.len());
    let mut digests: Vec<Vec<Digest>> = Vec::with_capacity(wanted.len());
    for (place, &entry) in wanted.iter().enumerate() {
        places.insert(entry, place);
        digests.push(vec![
            Digest::UNKNOWN;
            blocks::count(walked.entries[entry].size()) as usize
        ]);
    }
    for (run, found) in done.digests {
        if let Some(&place) = places.get(&run.entry) {
            digests[place][run.first as usize..][..found.len()].copy_from_slice(&found);
        }
    }
    Contents {
        digests,
        unsteady: done.unsteady,
    }
}

struct Shared<'a> {
    root: &'a Root,
    walked: &'a Walked,
    calm: Calm,
    cancel: &'a AtomicBool,
    runs: Vec<Vec<Run>>,
    next: AtomicUsize,
    done: Mutex<Done>,
}

impl Shared<'_> {
    fn work<V: Visit>(&self, mut visitor: V) -> Result<(), FilesError> {
        let mut buffer = vec![0; BLOCKS_AT_ONCE as usize * BLOCK_BYTES];
        let mut open: Option<(usize, Option<OwnedFd>)> = None;
        let outcome = (|| {
            while let Some(job) = self.runs.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                for run in job {
                    if self.cancel.load(Ordering::Relaxed) {
                        return Err(FilesError::Cancelled);
                    }
                    if open.as_ref().is_none_or(|(entry, _)| *entry != run.entry) {
                        open = Some((run.entry, self.open(run.entry)?));
                    }
                    let file = open.as_ref().and_then(|(_, file)| file.as_ref());
                    self.run(*run, file, &mut buffer, &mut visitor)?;
                }
            }
            visitor.finish()
        })();
        if outcome.is_err() {
            // The other threads stop at their next block instead of reading on for nothing.
            self.next.store(self.runs.len(), Ordering::Relaxed);
        }
        outcome
    }

    /// Opens a file; `None` when it is gone and that is to be expected.
    fn open(&self, index: usize) -> Result<Option<OwnedFd>, FilesError> {
        let entry = &self.walked.entries[index];
        // Without NONBLOCK, a pipe put in the file's place would stop us for ever.
        let opened = self
            .root
            .open_beneath(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK, 0)
            .and_then(|fd| {
                let stat = rustix::fs::fstat(&fd)?;
                Ok((fd, stat))
            });
        match opened {
            Ok((fd, stat)) if Stamp::of(&stat).is_same(&self.walked.stamps[index]) => Ok(Some(fd)),
            Ok(_) | Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO)
                if self.calm == Calm::Frozen =>
            {
                Err(FilesError::Changed {
                    path: self.root.shown(&entry.path),
                })
            }
            Ok((fd, stat)) => {
                self.unsteady(index);
                Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(fd))
            }
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => {
                self.unsteady(index);
                Ok(None)
            }
            Err(Errno::ACCESS | Errno::PERM) if self.calm == Calm::Staging => {
                self.unsteady(index);
                Ok(None)
            }
            Err(errno) => Err(FilesError::read(self.root.shown(&entry.path), errno)),
        }
    }

    fn unsteady(&self, index: usize) {
        self.done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .unsteady
            .push(index);
    }

    fn run<V: Visit>(
        &self,
        run: Run,
        file: Option<&OwnedFd>,
        buffer: &mut [u8],
        visitor: &mut V,
    ) -> Result<(), FilesError> {
        let entry = &self.walked.entries[run.entry];
        let size = entry.size();
        let bytes = ((run.count - 1) as usize) * BLOCK_BYTES
            + blocks::length(size, run.first + run.count - 1);
        let data = &mut buffer[..bytes];
        let filled = match file {
            Some(file) => self.fill(entry, run, file, data)?,
            None => 0,
        };
        if filled < bytes && self.calm == Calm::Frozen && filled > 0 {
            return Err(FilesError::Changed {
                path: self.root.shown(&entry.path),
            });
        }
        data[filled..].fill(0);
        let mut digests = Vec::with_capacity(run.count as usize);
        for (offset, block) in data.chunks(BLOCK_BYTES).enumerate() {
            let index = run.first + offset as u64;
            let is_zero = offset * BLOCK_BYTES >= filled || blocks::is_zero(block);
            let (digest, block) = if is_zero {
                (Digest::of_zeros(block.len()), &block[..0])
            } else {
                (Digest::of(block), block)
            };
            visitor.block(run.entry, index, digest, block)?;
            digests.push(digest);
        }
        self.done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .digests
            .push((run, digests));
        Ok(())
    }

    /// Reads a run; 0 when the run is one hole, else how much there was.
    fn fill(
        &self,
        entry: &Entry,
        run: Run,
        file: &OwnedFd,
        data: &mut [u8],
    ) -> Result<usize, FilesError> {
        let failed = |errno| FilesError::read(self.root.shown(&entry.path), errno);
        let start = run.first * BLOCK_BYTES as u64;
        if self.walked.stamps[run.entry].is_sparse {
            match rustix::fs::seek(file, SeekFrom::Data(start)) {
                Ok(found) if found >= start + data.len() as u64 => return Ok(0),
                Err(Errno::NXIO) => return Ok(0),
                // Not every file system can tell; then everything is read.
                _ => {}
            }
        }
        blocks::read_at(file, data, start).map_err(failed)
    }
}

/// A visitor that only wants the digests.
pub(crate) struct HashOnly;

impl Visit for HashOnly {
    fn block(&mut self, _: usize, _: u64, _: Digest, _: &[u8]) -> Result<(), FilesError> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), FilesError> {
        Ok(())
    }
}

/// Walks and hashes a whole tree over two threads: what a target has before the first round.
///
/// # Errors
/// When something cannot be read.
pub(crate) fn scan(root: &Root, cancel: &AtomicBool) -> Result<Manifest, FilesError> {
    scan_files(root, |_| true, cancel)
}

/// As [`scan`], but hashes only the files that are wanted; the others have no digests.
///
/// # Errors
/// When something cannot be read.
pub(crate) fn scan_files(
    root: &Root,
    mut is_wanted: impl FnMut(&Entry) -> bool,
    cancel: &AtomicBool,
) -> Result<Manifest, FilesError> {
    let walked = walk::walk(root, None, WALKERS, cancel)?;
    let mut is_wanted = |entry: &Entry| matches!(entry.kind, Kind::File { .. }) && is_wanted(entry);
    let wanted: Vec<usize> = (0..walked.entries.len())
        .filter(|at| is_wanted(&walked.entries[*at]))
        .collect();
    let contents = read(
        root,
        &walked,
        (&wanted, &|_| false),
        Calm::Staging,
        vec![HashOnly, HashOnly],
        cancel,
    )?;
    let mut digests = vec![Arc::default(); walked.entries.len()];
    for (entry, found) in wanted.iter().zip(contents.digests) {
        digests[*entry] = Arc::new(found);
    }
    for entry in contents.unsteady {
        let blocks = digests[entry].len();
        digests[entry] = Arc::new(vec![Digest::UNKNOWN; blocks]);
    }
    Ok(Manifest {
        entries: walked.entries,
        digests,
    })
}
