//! Reads a tree's structure, over several threads: one status call per entry, no content. What is in the state in which
//! it was the last time is not described again.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, OFlags, RawDir, Stat};
use rustix::io::Errno;

use super::manifest::{self, Entry, Kind, ManifestError};
use super::remembered::{Remembered, Siblings, Stamp};
use super::root::{Place, Root};
use super::{FilesError, blocks};

/// Threads of a walk beside running containers.
pub(crate) const WALKERS: usize = 2;
/// Names of a directory are read so many bytes at a time.
const NAMES_BYTES: usize = 32 << 10;

/// A tree's structure at one moment.
#[derive(Debug, Default)]
pub struct Walked {
    /// In canonical order; the root first.
    pub entries: Vec<Arc<Entry>>,
    /// As many as entries.
    pub stamps: Vec<Stamp>,
    /// As many as entries: which remembered one is the same, in the same state.
    pub(crate) known: Vec<Option<u32>>,
    /// Of how many the state was looked at.
    pub(crate) looked: usize,
    /// When the walk began: nanoseconds since 1970.
    pub started_ns: i64,
    /// Of all files so far.
    blocks: u64,
    /// The files that have several names.
    linked: Vec<u32>,
}

/// An entry that was looked at.
pub(super) struct Found {
    pub(super) entry: Arc<Entry>,
    pub(super) stamp: Stamp,
    pub(super) known: Option<u32>,
    /// Which folder it is.
    pub(super) folder: Option<usize>,
}

/// Walks the tree with so many threads. What vanishes meanwhile is left out.
///
/// # Errors
/// When something cannot be read, or the tree exceeds [`manifest::TREE_BLOCKS_MAX`].
pub(crate) fn walk(
    root: &Root,
    remembered: Option<&Remembered<'_>>,
    threads: usize,
    cancel: &AtomicBool,
) -> Result<Walked, FilesError> {
    let started_ns = now_ns();
    let first = root_entry(root)?;
    let remembered = remembered.filter(|remembered| !remembered.entries.is_empty());
    let survey = Survey::new(root, remembered, first.stamp.device, cancel);
    survey.add(Vec::new(), Some(0));
    let mut folders = survey.run(threads)?;
    let count = folders.iter().map(Vec::len).sum::<usize>() + 1;
    let mut found = Vec::with_capacity(count);
    found.push(first);
    collect(&mut folders, 0, |item| found.push(item));
    let mut walked = Walked::with_capacity(count, started_ns);
    walked.looked = count;
    for item in found {
        walked.push(item.entry, item.stamp, item.known);
    }
    walked.finish()
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as i64)
}

impl Walked {
    pub(super) fn with_capacity(count: usize, started_ns: i64) -> Self {
        Self {
            entries: Vec::with_capacity(count),
            stamps: Vec::with_capacity(count),
            known: Vec::with_capacity(count),
            started_ns,
            ..Self::default()
        }
    }

    /// Adds what comes next in canonical order.
    pub(super) fn push(&mut self, entry: Arc<Entry>, stamp: Stamp, known: Option<u32>) {
        self.blocks = self.blocks.saturating_add(blocks::count(entry.size()));
        if stamp.is_linked {
            self.linked.push(self.entries.len() as u32);
        }
        self.entries.push(entry);
        self.stamps.push(stamp);
        self.known.push(known);
    }

    /// Tells files from their second names, and checks the size of it all.
    pub(super) fn finish(mut self) -> Result<Self, FilesError> {
        if self.blocks > manifest::TREE_BLOCKS_MAX {
            return Err(ManifestError::TooLarge.into());
        }
        // The first name in canonical order is the file; the others become links to it.
        let mut firsts: HashMap<(u64, u64), usize> = HashMap::new();
        for index in std::mem::take(&mut self.linked) {
            let index = index as usize;
            let stamp = &self.stamps[index];
            match firsts.entry((stamp.device, stamp.inode)) {
                Slot::Vacant(slot) => {
                    slot.insert(index);
                }
                Slot::Occupied(first) => {
                    let to = self.entries[*first.get()].path.clone();
                    Arc::make_mut(&mut self.entries[index]).kind = Kind::HardLink { to };
                }
            }
        }
        Ok(self)
    }
}

/// A walk under way: folders that threads read side by side.
pub(super) struct Survey<'a> {
    root: &'a Root,
    remembered: Option<&'a Remembered<'a>>,
    device: u64,
    cancel: &'a AtomicBool,
    folders: Mutex<Folders>,
    more: Condvar,
}

/// The folders found so far.
#[derive(Default)]
struct Folders {
    found: Vec<Vec<Found>>,
    waiting: Vec<Waiting>,
    /// How many threads read one.
    busy: usize,
    failure: Option<FilesError>,
}

/// A folder that was found and not read yet.
struct Waiting {
    number: usize,
    path: Vec<u8>,
    known: Option<usize>,
}

impl Folders {
    fn add(&mut self, path: Vec<u8>, known: Option<usize>) -> usize {
        let number = self.found.len();
        self.found.push(Vec::new());
        self.waiting.push(Waiting {
            number,
            path,
            known,
        });
        number
    }
}

/// Gives everything in a folder, in canonical order.
pub(super) fn collect(folders: &mut [Vec<Found>], folder: usize, mut give: impl FnMut(Found)) {
    let mut take = |folder: usize| std::mem::take(&mut folders[folder]).into_iter();
    // The folders that we are in.
    let mut inside = vec![take(folder)];
    while let Some(here) = inside.last_mut() {
        let Some(item) = here.next() else {
            inside.pop();
            continue;
        };
        inside.extend(item.folder.map(&mut take));
        give(item);
    }
}

impl<'a> Survey<'a> {
    pub(super) fn new(
        root: &'a Root,
        remembered: Option<&'a Remembered<'a>>,
        device: u64,
        cancel: &'a AtomicBool,
    ) -> Self {
        Self {
            root,
            remembered,
            device,
            cancel,
            folders: Mutex::default(),
            more: Condvar::new(),
        }
    }

    /// Has a folder read with all that is in it; the number is its place in what [`Self::run`] gives.
    pub(super) fn add(&self, path: Vec<u8>, known: Option<usize>) -> usize {
        self.lock().add(path, known)
    }

    /// Reads all folders with so many threads, of which the caller's is one: most trees are small, and the start of a thread
    /// takes longer than their folders.
    pub(super) fn run(self, threads: usize) -> Result<Vec<Vec<Found>>, FilesError> {
        if !self.lock().waiting.is_empty() {
            std::thread::scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(|| self.work());
                }
                self.work();
            });
        }
        let folders = self.folders.into_inner();
        let folders = folders.unwrap_or_else(PoisonError::into_inner);
        match folders.failure {
            Some(failure) => Err(failure),
            None => Ok(folders.found),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Folders> {
        self.folders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads folders until there are no more, or one cannot be read.
    fn work(&self) {
        while let Some(folder) = self.next() {
            let read = if self.cancel.load(Ordering::Relaxed) {
                Err(FilesError::Cancelled)
            } else {
                self.read(&folder)
            };
            let mut folders = self.lock();
            folders.busy -= 1;
            match read {
                Ok(mut found) => {
                    for item in &mut found {
                        let is_folder = item.entry.kind == Kind::Directory;
                        if is_folder && item.stamp.device == self.device {
                            let known = item.known.map(|at| at as usize);
                            item.folder = Some(folders.add(item.entry.path.clone(), known));
                        }
                    }
                    folders.found[folder.number] = found;
                }
                Err(failure) => folders.failure = Some(failure),
            }
            drop(folders);
            self.more.notify_all();
        }
    }

    fn next(&self) -> Option<Waiting> {
        let mut folders = self.lock();
        loop {
            if folders.failure.is_some() {
                return None;
            }
            if let Some(folder) = folders.waiting.pop() {
                folders.busy += 1;
                return Some(folder);
            }
            if folders.busy == 0 {
                return None;
            }
            folders = self
                .more
                .wait(folders)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What is in a folder, in the order of names; nothing when it is gone.
    fn read(&self, folder: &Waiting) -> Result<Vec<Found>, FilesError> {
        let failed = |errno| FilesError::read(self.root.shown(&folder.path), errno);
        let flags = OFlags::DIRECTORY | OFlags::RDONLY;
        let directory = match self.root.open_beneath(&folder.path, flags, 0) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !folder.path.is_empty() => {
                return Ok(Vec::new());
            }
            opened => opened.map_err(failed)?,
        };
        let names = names(&directory).map_err(failed)?;
        let remembered = self.remembered.zip(folder.known);
        let mut siblings = remembered.map(|(known, folder)| Siblings::of(known, folder));
        let mut found = Vec::with_capacity(names.len());
        let mut place = Place {
            directory,
            name: c".".to_owned(),
        };
        for name in names {
            place.name = name;
            let known = siblings
                .as_mut()
                .and_then(|siblings| siblings.find(place.name.to_bytes()));
            match self.look(&place, &folder.path, known) {
                Ok(item) => found.extend(item),
                Err(Errno::NOENT) => {}
                Err(errno) => {
                    let path = joined(&folder.path, place.name.to_bytes());
                    return Err(FilesError::read(self.root.shown(&path), errno));
                }
            }
        }
        Ok(found)
    }

    /// Looks at one entry, `None` for what has no place in a tree.
    pub(super) fn look(
        &self,
        place: &Place,
        folder: &[u8],
        known: Option<usize>,
    ) -> Result<Option<Found>, Errno> {
        let stat = place.stat()?;
        let stamp = Stamp::of(&stat);
        let same = self.remembered.zip(known);
        let same = same.filter(|(remembered, at)| remembered.is_unchanged(*at, &stamp));
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let entry = match same {
            // Which of several names is the file depends on the others.
            Some((remembered, at)) if is_folder || stat.st_nlink < 2 => {
                Arc::clone(&remembered.entries[at])
            }
            _ => match describe(place, joined(folder, place.name.to_bytes()), &stat)? {
                Some(entry) => Arc::new(entry),
                None => return Ok(None),
            },
        };
        // A folder whose names have changed is still the one that was remembered.
        let known = if is_folder {
            known
        } else {
            same.map(|(_, at)| at)
        };
        Ok(Some(Found {
            entry,
            stamp,
            known: known.map(|at| at as u32),
            folder: None,
        }))
    }
}

pub(super) fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        name.to_vec()
    } else {
        [folder, b"/", name].concat()
    }
}

/// The names in a directory, sorted.
fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut buffer = Vec::with_capacity(NAMES_BYTES);
    let mut listing = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = listing.next() {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

pub(super) fn root_entry(root: &Root) -> Result<Found, FilesError> {
    let failed = |errno| FilesError::read(root.shown(b""), errno);
    let place = root.parent(b"").map_err(failed)?;
    let stat = place.stat().map_err(failed)?;
    let described = describe(&place, Vec::new(), &stat).map_err(failed)?;
    Ok(Found {
        entry: Arc::new(described.ok_or_else(|| failed(Errno::NOTDIR))?),
        stamp: Stamp::of(&stat),
        known: None,
        folder: None,
    })
}

/// `None` for what has no place in a tree.
fn describe(place: &Place, path: Vec<u8>, stat: &Stat) -> Result<Option<Entry>, Errno> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        FileType::RegularFile => Kind::File {
            size: stat.st_size as u64,
        },
        FileType::Symlink => Kind::Symlink {
            to: rustix::fs::readlinkat(&place.directory, &place.name, Vec::new())?.into_bytes(),
        },
        FileType::CharacterDevice => Kind::CharacterDevice {
            number: stat.st_rdev,
        },
        FileType::BlockDevice => Kind::BlockDevice {
            number: stat.st_rdev,
        },
        FileType::Fifo => Kind::Fifo,
        FileType::Socket | FileType::Unknown => return Ok(None),
    };
    Ok(Some(Entry {
        path,
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: Stamp::of(stat).mtime_ns(),
        attributes: place.attributes()?,
    }))
}

/// What a tree holds, for a preflight: bytes of files and number of entries.
///
/// # Errors
/// When something cannot be read, or the tree exceeds [`manifest::TREE_BLOCKS_MAX`].
pub fn size(root: &Root, cancel: &AtomicBool) -> Result<(u64, u64), FilesError> {
    let walked = walk(root, None, WALKERS, cancel)?;
    Ok((
        walked.entries.iter().map(|entry| entry.size()).sum(),
        walked.entries.len() as u64,
    ))
}

/// The modification time of an entry as the system wants it.
pub(crate) fn timespec(ns: i64) -> rustix::fs::Timespec {
    rustix::fs::Timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn sockets_are_skipped_and_a_second_name_is_a_link_to_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        std::fs::write(folder.path().join("b"), "x").unwrap();
        std::fs::hard_link(folder.path().join("b"), folder.path().join("a")).unwrap();
        let root = Root::open(folder.path()).unwrap();
        let walked = walk(&root, None, WALKERS, &AtomicBool::new(false)).unwrap();
        let kinds: Vec<_> = walked
            .entries
            .iter()
            .map(|entry| (entry.path.as_slice(), entry.kind.clone()))
            .collect();
        assert_eq!(kinds[1], (&b"a"[..], Kind::File { size: 1 }));
        assert_eq!(kinds[2], (&b"b"[..], Kind::HardLink { to: b"a".to_vec() }));
        assert_eq!(kinds.len(), 3);
    }

    #[test]
    fn what_is_remembered_is_taken_over_only_where_nothing_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in [
            "a/b/deep", "a b", "c", "gone/x", "linked", "moded", "turned/x",
        ] {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), name).unwrap();
        }
        let root = Root::open(folder.path()).unwrap();
        let fresh = || walk(&root, None, WALKERS, &AtomicBool::new(false)).unwrap();
        let before = fresh();
        let stamps: Vec<_> = before.stamps.iter().copied().map(Some).collect();
        std::fs::set_permissions(path("moded"), PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::remove_dir_all(path("gone")).unwrap();
        std::fs::hard_link(path("linked"), path("a/another name")).unwrap();
        std::fs::remove_dir_all(path("turned")).unwrap();
        std::fs::write(path("turned"), "a file now").unwrap();
        std::fs::write(path("a/b/new"), "").unwrap();
        // As if the first walk had been long after everything it saw.
        let remembered = Remembered::new(&before.entries, &stamps, i64::MAX);
        for threads in [1, 4] {
            let cancel = AtomicBool::new(false);
            let after = walk(&root, Some(&remembered), threads, &cancel).unwrap();
            assert_eq!(after.entries, fresh().entries);
            let taken_over = after
                .entries
                .iter()
                .filter(|entry| before.entries.iter().any(|known| Arc::ptr_eq(known, entry)));
            let paths: Vec<_> = taken_over.map(|entry| entry.path.as_slice()).collect();
            assert_eq!(paths, [&b"a/b/deep"[..], b"a b", b"c"]);
        }
    }
}
