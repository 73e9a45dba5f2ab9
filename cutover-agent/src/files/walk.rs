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
use super::root::{Place, Root};
use super::{FilesError, blocks};

/// By what a file is recognised as unchanged between two rounds.
#[derive(Debug, Clone, Copy)]
pub struct Stamp {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    /// Whether fewer bytes are allocated than the file is long.
    pub(crate) is_sparse: bool,
}

/// Clocks of file systems tick every few milliseconds, and a write through a mapping is stamped when it happens or
/// later: what changed this close to a scan may have changed after it, under the same stamp.
const STAMP_SLACK_NS: i64 = 2_000_000_000;

/// Threads of a walk beside running containers.
pub(crate) const WALKERS: usize = 2;
/// Names of a directory are read so many bytes at a time.
const NAMES_BYTES: usize = 32 << 10;

impl Stamp {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size as u64,
            mtime_ns: nanoseconds(stat.st_mtime, stat.st_mtime_nsec as i64),
            ctime_ns: nanoseconds(stat.st_ctime, stat.st_ctime_nsec as i64),
            is_sparse: (stat.st_blocks as u64) * 512 < stat.st_size as u64,
        }
    }

    /// Whether both are of the same file in the same state. Allocation is left out: delayed allocation changes it later.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let parts = |stamp: &Self| {
            (
                stamp.device,
                stamp.inode,
                stamp.size,
                stamp.mtime_ns,
                stamp.ctime_ns,
            )
        };
        parts(self) == parts(other)
    }

    /// Whether a stamp taken by a scan that started at `scanned_ns` is old enough to be relied upon.
    pub(crate) fn is_settled(&self, scanned_ns: i64) -> bool {
        self.mtime_ns.max(self.ctime_ns) < scanned_ns.saturating_sub(STAMP_SLACK_NS)
    }
}

/// A tree's structure at one moment.
#[derive(Debug, Default)]
pub struct Walked {
    /// In canonical order; the root first.
    pub entries: Vec<Arc<Entry>>,
    /// As many as entries.
    pub stamps: Vec<Stamp>,
    /// As many as entries: which remembered one is the same, in the same state.
    pub(crate) known: Vec<Option<u32>>,
    /// When the walk began: nanoseconds since 1970.
    pub started_ns: i64,
}

/// What a tree was when it was walked before.
pub(crate) struct Remembered<'a> {
    entries: &'a [Arc<Entry>],
    stamps: &'a [Option<Stamp>],
    scanned_ns: i64,
    /// For each entry, where the first one is that is not inside it.
    ends: Vec<u32>,
}

impl<'a> Remembered<'a> {
    /// Entries in canonical order, what each was when a walk that began at `scanned_ns` had them read.
    pub(crate) fn new(
        entries: &'a [Arc<Entry>],
        stamps: &'a [Option<Stamp>],
        scanned_ns: i64,
    ) -> Self {
        let mut ends: Vec<u32> = (1..=entries.len() as u32).collect();
        let mut open: Vec<usize> = Vec::new();
        let is_inside = |folder: usize, path: &[u8]| {
            let folder = entries[folder].path.as_slice();
            folder.is_empty()
                || path
                    .strip_prefix(folder)
                    .is_some_and(|rest| rest.starts_with(b"/"))
        };
        for (index, entry) in entries.iter().enumerate() {
            while let Some(folder) = open.pop_if(|folder| !is_inside(*folder, &entry.path)) {
                ends[folder] = index as u32;
            }
            if entry.kind == Kind::Directory {
                open.push(index);
            }
        }
        for folder in open {
            ends[folder] = entries.len() as u32;
        }
        Self {
            entries,
            stamps,
            scanned_ns,
            ends,
        }
    }

    fn is_unchanged(&self, at: usize, stamp: &Stamp) -> bool {
        self.stamps[at]
            .is_some_and(|known| known.is_same(stamp) && known.is_settled(self.scanned_ns))
    }
}

/// The remembered entries of one folder, in the order of their names.
struct Siblings<'a> {
    remembered: &'a Remembered<'a>,
    /// Bytes of a path before the name.
    prefix: usize,
    at: usize,
    end: usize,
}

impl<'a> Siblings<'a> {
    /// Those in the remembered folder at `folder`.
    fn of(remembered: &'a Remembered<'a>, folder: usize) -> Self {
        let length = remembered.entries[folder].path.len();
        Self {
            remembered,
            prefix: if length == 0 { 0 } else { length + 1 },
            at: folder + 1,
            end: remembered.ends[folder] as usize,
        }
    }

    /// Where the entry of this name is; names are asked for in their order.
    fn find(&mut self, name: &[u8]) -> Option<usize> {
        while self.at < self.end {
            let known = &self.remembered.entries[self.at].path[self.prefix..];
            match known.cmp(name) {
                std::cmp::Ordering::Less => self.at = self.remembered.ends[self.at] as usize,
                std::cmp::Ordering::Equal => return Some(self.at),
                std::cmp::Ordering::Greater => break,
            }
        }
        None
    }
}

struct Found {
    entry: Arc<Entry>,
    stamp: Stamp,
    links: u64,
    known: Option<u32>,
    /// Which folder it is.
    folder: Option<usize>,
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
    let started_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as i64);
    let first = root_entry(root)?;
    let survey = Survey {
        root,
        remembered: remembered.filter(|remembered| !remembered.entries.is_empty()),
        device: first.stamp.device,
        cancel,
        folders: Mutex::default(),
        more: Condvar::new(),
    };
    survey.lock().add(Vec::new(), Some(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| survey.work());
        }
    });
    let folders = survey
        .folders
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let mut found = folders.in_order(first)?;
    mark_hard_links(&mut found);
    let count = found.len();
    let mut walked = Walked {
        entries: Vec::with_capacity(count),
        stamps: Vec::with_capacity(count),
        known: Vec::with_capacity(count),
        started_ns,
    };
    for item in found {
        walked.entries.push(item.entry);
        walked.stamps.push(item.stamp);
        walked.known.push(item.known);
    }
    Ok(walked)
}

/// A walk under way.
struct Survey<'a> {
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

    /// Everything found, in canonical order.
    fn in_order(self, root: Found) -> Result<Vec<Found>, FilesError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let count = self.found.iter().map(Vec::len).sum::<usize>() + 1;
        let mut folders: Vec<_> = self.found.into_iter().map(Vec::into_iter).collect();
        let mut found = Vec::with_capacity(count);
        found.push(root);
        let mut blocks: u64 = 0;
        // The folders that we are in.
        let mut inside = vec![0];
        while let Some(&folder) = inside.last() {
            let Some(item) = folders[folder].next() else {
                inside.pop();
                continue;
            };
            blocks = blocks.saturating_add(blocks::count(item.entry.size()));
            inside.extend(item.folder);
            found.push(item);
        }
        if blocks > manifest::TREE_BLOCKS_MAX {
            return Err(ManifestError::TooLarge.into());
        }
        Ok(found)
    }
}

impl Survey<'_> {
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
                    let path = joined(&folder.path, &place);
                    return Err(FilesError::read(self.root.shown(&path), errno));
                }
            }
        }
        Ok(found)
    }

    /// Looks at one entry, `None` for what has no place in a tree.
    fn look(
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
            _ => match describe(place, joined(folder, place), &stat)? {
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
            links: stat.st_nlink,
            known: known.map(|at| at as u32),
            folder: None,
        }))
    }
}

fn joined(folder: &[u8], place: &Place) -> Vec<u8> {
    let name = place.name.to_bytes();
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

fn root_entry(root: &Root) -> Result<Found, FilesError> {
    let failed = |errno| FilesError::read(root.shown(b""), errno);
    let place = root.parent(b"").map_err(failed)?;
    let stat = place.stat().map_err(failed)?;
    let described = describe(&place, Vec::new(), &stat).map_err(failed)?;
    Ok(Found {
        entry: Arc::new(described.ok_or_else(|| failed(Errno::NOTDIR))?),
        stamp: Stamp::of(&stat),
        links: stat.st_nlink,
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
        mtime_ns: Stamp::of(stat).mtime_ns,
        attributes: place.attributes()?,
    }))
}

/// The first name in canonical order is the file; the others become links to it.
fn mark_hard_links(found: &mut [Found]) {
    let mut firsts: HashMap<(u64, u64), usize> = HashMap::new();
    for index in 0..found.len() {
        let item = &found[index];
        if item.links < 2 || !matches!(item.entry.kind, Kind::File { .. }) {
            continue;
        }
        match firsts.entry((item.stamp.device, item.stamp.inode)) {
            Slot::Vacant(slot) => {
                slot.insert(index);
            }
            Slot::Occupied(first) => {
                let to = found[*first.get()].entry.path.clone();
                Arc::make_mut(&mut found[index].entry).kind = Kind::HardLink { to };
            }
        }
    }
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

fn nanoseconds(seconds: i64, part: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(part)
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
    fn a_stamp_close_to_the_scan_is_not_relied_upon() {
        let stamp = Stamp {
            device: 1,
            inode: 2,
            size: 3,
            mtime_ns: 10,
            ctime_ns: 5_000_000_000,
            is_sparse: false,
        };
        assert!(!stamp.is_settled(6_000_000_000));
        assert!(stamp.is_settled(8_000_000_000));
    }

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
