//! What a round of the source consists of: which files must be read, and what their reading gave.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cutover_protocol::pattern::NamePattern;

use super::collect::{Collector, Outlet, Tally};
use super::repeats::Places;
use super::replaced::{self, Replaced};
use super::seeds::SEED_BYTES_MIN;
use super::weave::Old;
use super::wire::{Ask, Packed};
use super::{SyncReport, TransferError, Writers};
use crate::files::apply;
use crate::files::blocks::{self, BLOCK_BYTES, Digest};
use crate::files::content::{self, Calm};
use crate::files::cuts::Cut;
use crate::files::index::{Indexes, Watch};
use crate::files::manifest::{self, Entry, Manifest, Pairing};
use crate::files::remembered::{Remembered, Stamp};
use crate::files::walk::{self, WALKERS, Walked};
use crate::files::{FilesError, Kind, Root, rewalk};

/// Blocks of files that are gone by which renamed ones are recognised: 4 GiB of them, about 12 MiB of memory.
pub(super) const MOVED_BLOCKS_MAX: usize = 1 << 18;
/// Threads that read, hash and pack. Two keep a link of several Gbit/s busy, and leave the rest to the containers.
const READERS: usize = 2;
/// A tree of fewer entries is walked by one thread.
const ENTRIES_A_WALKER: usize = 512;
/// Threads that walk while the containers are frozen: beyond that they wait for each other.
const FROZEN_WALKERS_MAX: usize = 8;

/// What is remembered of a tree between rounds.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What the target sealed; absent before the first round and after a failed one.
    pub(super) sealed: Option<Sealed>,
    /// What our files were when they were last read, whatever the target has.
    pub(super) ours: Option<Arc<Ours>>,
}

/// What the target has.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) manifest: Arc<Manifest>,
    pub(super) root: Digest,
}

/// What the source's files were.
#[derive(Debug)]
pub(super) struct Ours {
    manifest: Arc<Manifest>,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
    /// Of what has changed since that walk began.
    watch: Option<Watch>,
}

impl Ours {
    /// The digests of the file that is entry `at`.
    fn digests(&self, at: usize, size: u64) -> Option<&Arc<Vec<Digest>>> {
        let digests = &self.manifest.digests[at];
        (digests.len() as u64 == blocks::count(size)).then_some(digests)
    }
}

/// A round as planned from the walk.
pub(super) struct Plan {
    root: Root,
    walked: Walked,
    watch: Option<Watch>,
    wanted: Vec<usize>,
    /// Digests that need no reading, per entry.
    kept: Vec<Option<Arc<Vec<Digest>>>>,
    pub(super) there: There,
    /// Files that were written anew, as far as the target can write them so too.
    pub(super) replaced: Vec<Replaced>,
    /// Entries of what the target has.
    based_on: usize,
    /// The root hash of what the target has; absent when it begins with nothing.
    pub(super) origin: Option<Digest>,
    pub(super) steps: Packed,
}

/// What the target has.
#[derive(Debug, Default)]
pub(super) struct There {
    /// Blocks in their places, per entry.
    pub(super) base: Vec<Option<Arc<Vec<Digest>>>>,
    /// Blocks of files that are there no more, and of seeds.
    pub(super) moved: Moved,
    /// The old content of files that are written anew, by entry. They have no blocks in their places.
    pub(super) olds: HashMap<usize, Old>,
    /// Entries whose blocks may be patched.
    pub(super) in_place: HashSet<usize>,
    /// Where other blocks of the new tree may be taken from; absent when nothing is to be.
    pub(super) places: Option<Places>,
}

impl Plan {
    /// Bytes that have to be read.
    pub(super) fn bytes(&self) -> u64 {
        let sizes = self.wanted.iter().map(|at| self.walked.entries[*at].size());
        sizes.sum()
    }

    /// The sizes of all files that may be seeds for others.
    pub(super) fn file_sizes(&self) -> impl Iterator<Item = u64> {
        let sizes = self.walked.entries.iter().map(|entry| entry.size());
        sizes.filter(|size| *size >= SEED_BYTES_MIN)
    }

    /// The sizes of files that are new at the target, or have another size there: what seeds may be for.
    pub(super) fn new_file_sizes(&self) -> impl Iterator<Item = u64> {
        let is_new = |at: usize, size: u64| {
            let there = self.there.base[at]
                .as_ref()
                .map_or(0, |there| there.len() as u64);
            there != blocks::count(size) && size >= SEED_BYTES_MIN
        };
        let sizes = self
            .wanted
            .iter()
            .map(|at| (*at, self.walked.entries[*at].size()));
        sizes
            .filter(move |(at, size)| is_new(*at, *size))
            .map(|(_, size)| size)
    }

    /// These sizes sorted, each once.
    pub(super) fn new_sizes(&self) -> Vec<u64> {
        let new: BTreeSet<u64> = self.new_file_sizes().collect();
        new.into_iter().collect()
    }

    /// Takes in what the target told of its seeds.
    pub(super) fn add_seeds(&mut self, seeds: &[Vec<Digest>]) {
        for (place, digests) in (self.based_on..).zip(seeds) {
            let moved = &mut self.there.moved;
            if moved.len() + digests.len() > MOVED_BLOCKS_MAX {
                break;
            }
            // There are fewer than u32::MAX blocks of the base and of seeds.
            let places = (0..).map(|at| (place as u32, at));
            moved.extend(digests.iter().copied().zip(places));
        }
    }

    /// Takes in what the target told of the files that were written anew.
    pub(super) fn add_cuts(&mut self, cuts: &[Vec<Cut>]) {
        let told = std::mem::take(&mut self.replaced).into_iter().zip(cuts);
        for (replaced, cuts) in told.filter(|(_, cuts)| !cuts.is_empty()) {
            let blocks = blocks::count(self.walked.entries[replaced.entry].size());
            let old = Old::new(replaced.old, cuts, blocks);
            self.there.olds.insert(replaced.entry, old);
            self.there.base[replaced.entry] = None;
            self.replaced.push(replaced);
        }
    }
}

/// A tree that was walked.
pub(super) struct Surveyed {
    root: Root,
    walked: Walked,
    watch: Option<Watch>,
}

/// What a walk of a tree is to know.
pub(super) struct Survey {
    /// What the tree was when it was walked before, if it was.
    pub(super) ours: Option<Arc<Ours>>,
    pub(super) writers: Writers,
    /// Files (device, inode) that may change without anybody being told.
    pub(super) written: HashSet<(u64, u64)>,
    pub(super) indexes: Arc<Indexes>,
    pub(super) cancel: Arc<AtomicBool>,
}

impl Survey {
    /// Opens and walks a tree. While its writers run, everything is looked at, also what changes without anybody being
    /// told; when they are frozen, only what has changed since then, if that is known.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub(super) fn walk(&self, path: &Path) -> Result<Surveyed, TransferError> {
        let root = Root::open(path).map_err(|errno| FilesError::read(path.to_owned(), errno))?;
        let remembered = self
            .ours
            .as_ref()
            .map(|ours| Remembered::new(&ours.manifest.entries, &ours.stamps, ours.scanned_ns));
        let remembered = remembered.as_ref();
        let known = self.ours.as_ref().and_then(|ours| ours.watch.as_ref());
        let (changes, watch) = match (&self.writers, known) {
            (Writers::Running, _) => (None, self.indexes.watch(&root)),
            (Writers::Frozen, Some(watch)) => watch.changes(&root),
            (Writers::Frozen, None) => (None, None),
        };
        let threads = self.threads();
        let mut walked = None;
        if let (Some(changes), Some(remembered)) = (changes, remembered) {
            let (written, cancel) = (&self.written, &*self.cancel);
            let changes = (&changes, rewalk::most(remembered.len()));
            walked = rewalk::walk_changed(&root, remembered, changes, written, threads, cancel)?;
        }
        let walked = match walked {
            Some(walked) => walked,
            None => walk::walk(&root, remembered, threads, &self.cancel)?,
        };
        Ok(Surveyed {
            root,
            walked,
            watch,
        })
    }

    fn threads(&self) -> usize {
        let known = self.ours.as_ref().map(|ours| ours.manifest.entries.len());
        let threads = match self.writers {
            _ if known.is_some_and(|known| known < ENTRIES_A_WALKER) => 1,
            Writers::Running => WALKERS,
            // The containers leave all processors to us.
            Writers::Frozen => std::thread::available_parallelism().map_or(WALKERS, usize::from),
        };
        threads.min(FROZEN_WALKERS_MAX)
    }
}

/// How a round is to be planned.
pub(super) struct Wishes {
    /// Files (device, inode) that are read in any case.
    pub(super) rehash: HashSet<(u64, u64)>,
    /// Files that are never taken for written anew, and blocks of which may be patched; absent when nothing is to be put
    /// together from what the target has.
    pub(super) in_place: Option<Arc<[NamePattern]>>,
    pub(super) writers: Writers,
}

/// Decides what has to be read: everything but files that have not changed since we read them, and that the target has.
///
/// # Errors
/// When the list of entries exceeds its bounds.
pub(super) fn plan(
    surveyed: Surveyed,
    sealed: Option<Sealed>,
    ours: Option<Arc<Ours>>,
    wishes: &Wishes,
) -> Result<Plan, TransferError> {
    let Surveyed {
        root,
        walked,
        watch,
    } = surveyed;
    let origin = sealed.as_ref().map(|sealed| sealed.root);
    let has = sealed.map(|sealed| sealed.manifest).unwrap_or_default();
    let pairs = Pairing::of(&has.entries, &walked.entries);
    let steps = manifest::difference(&has.entries, &walked.entries, &pairs);
    let steps = Packed::of(&steps)?;
    let (mut wanted, mut kept, mut base) = (Vec::new(), Vec::new(), Vec::new());
    for (index, (entry, stamp)) in walked.entries.iter().zip(&walked.stamps).enumerate() {
        if !matches!(entry.kind, Kind::File { .. }) {
            kept.push(None);
            base.push(None);
            continue;
        }
        let there = pairs.old_of(index).and_then(|at| has.digests_of(at));
        let unchanged = walked.known[index]
            .filter(|_| !wishes.rehash.contains(&(stamp.device, stamp.inode)))
            .and_then(|at| ours.as_ref()?.digests(at as usize, entry.size()))
            .filter(|here| there.is_some_and(|there| Arc::ptr_eq(here, there) || *here == there));
        if unchanged.is_none() {
            wanted.push(index);
        }
        kept.push(unchanged.cloned());
        base.push(there.cloned());
    }
    let moved = moved(&has, &walked.entries, &pairs);
    let patterns = wishes.in_place.as_deref().unwrap_or_default();
    let is_in_place = |entry: &usize| {
        let file = &walked.entries[*entry];
        file.size() >= BLOCK_BYTES as u64 && patterns.iter().any(|pattern| pattern.fits(&file.path))
    };
    let in_place = wanted.iter().copied().filter(is_in_place).collect();
    let replaced = wishes.in_place.as_ref().map(|in_place| {
        let (tree, known) = ((&root, &walked), (&*has, &pairs));
        replaced::find(tree, known, &wanted, in_place, &wishes.writers)
    });
    Ok(Plan {
        root,
        walked,
        watch,
        wanted,
        kept,
        there: There {
            base,
            moved,
            olds: HashMap::new(),
            in_place,
            places: wishes.in_place.as_ref().map(|_| Places::default()),
        },
        replaced: replaced.unwrap_or_default(),
        based_on: has.entries.len(),
        origin,
        steps,
    })
}

/// Blocks the target has, until the end of the round, in files that are not part of the new tree, by digest: which entry
/// of the base, or behind its last which seed, and which block. A renamed file is found through them.
pub(super) type Moved = HashMap<Digest, (u32, u32)>;

fn moved(has: &Manifest, entries: &[Arc<Entry>], pairs: &Pairing) -> Moved {
    let removed_first = apply::in_the_way(&has.entries, entries, pairs);
    let mut moved = Moved::new();
    for index in pairs.gone() {
        let (entry, digests) = (&has.entries[index], &has.digests[index]);
        if digests.is_empty() || removed_first.contains(entry.path.as_slice()) {
            continue;
        }
        if moved.len() + digests.len() > MOVED_BLOCKS_MAX {
            break;
        }
        // A tree has fewer than u32::MAX entries and blocks.
        let places = (0..).map(|at| (index as u32, at));
        moved.extend(digests.iter().copied().zip(places));
    }
    moved
}

/// A round whose frames are all handed to the streams.
pub(super) struct ReadRound {
    manifest: Manifest,
    hash: Digest,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
    looked: usize,
    watch: Option<Watch>,
    tally: Arc<Tally>,
    repeats: Packed,
}

/// Reads what is wanted, and hands what changed to the streams.
///
/// # Errors
/// When a file cannot be read, changed while frozen, or the round was given up.
pub(super) fn read(plan: Plan, calm: Calm, outlet: Outlet) -> Result<ReadRound, TransferError> {
    let Plan {
        root,
        walked,
        watch,
        wanted,
        kept,
        ..
    } = plan;
    let collectors = (0..READERS).map(|_| Collector::new(&outlet)).collect();
    // A file that is written anew is read by one thread, from its beginning to its end.
    let is_whole: &dyn Fn(usize) -> bool = &|entry| outlet.there.olds.contains_key(&entry);
    let what = (wanted.as_slice(), is_whole);
    let contents = content::read(&root, &walked, what, calm, collectors, &outlet.cancel)?;
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
        looked: walked.looked,
        watch,
        repeats: outlet.tally.repeats()?,
        tally: outlet.tally,
    })
}

impl ReadRound {
    /// The words that end it.
    pub(super) fn seal(&mut self, round: u64) -> Ask {
        Ask::Seal {
            round,
            frames: self.tally.frames.load(Ordering::Relaxed),
            root: self.hash,
            repeats: std::mem::take(&mut self.repeats),
        }
    }

    /// What to remember when the target has sealed it.
    pub(super) fn into_memory(self) -> Memory {
        let manifest = Arc::new(self.manifest);
        let ours = Ours {
            manifest: Arc::clone(&manifest),
            stamps: self.stamps,
            scanned_ns: self.scanned_ns,
            watch: self.watch,
        };
        let sealed = Sealed {
            manifest,
            root: self.hash,
        };
        Memory {
            sealed: Some(sealed),
            ours: Some(Arc::new(ours)),
        }
    }

    /// What it cost; the time is the caller's to fill in.
    pub(super) fn report(&self, bytes_read: u64, list_bytes: u64) -> SyncReport {
        SyncReport {
            bytes_data: self.tally.bytes_data.load(Ordering::Relaxed),
            bytes_wire: self.tally.bytes_wire.load(Ordering::Relaxed) + list_bytes,
            bytes_read,
            bytes_tree: self.manifest.bytes(),
            files: self.manifest.files(),
            looked: self.looked as u64,
            took: Duration::ZERO,
        }
    }
}
