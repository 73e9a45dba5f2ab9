//! Reads a tree's structure: one status call per entry, no content.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Dir, FileType, OFlags, Stat};
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
    pub entries: Vec<Entry>,
    /// As many as entries.
    pub stamps: Vec<Stamp>,
    /// When the walk began: nanoseconds since 1970.
    pub started_ns: i64,
}

struct Found {
    entry: Entry,
    stamp: Stamp,
    links: u64,
}

/// Walks the tree. What vanishes meanwhile is left out.
///
/// # Errors
/// When something cannot be read, or the tree exceeds [`manifest::TREE_BLOCKS_MAX`].
pub fn walk(root: &Root, cancel: &AtomicBool) -> Result<Walked, FilesError> {
    let started_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as i64);
    let mut found = vec![root_entry(root)?];
    let device = found[0].stamp.device;
    let mut blocks: u64 = 0;
    // What is left of each folder that the walk is in, in canonical order.
    let mut folders = vec![read_folder(root, b"")?.into_iter()];
    while let Some(folder) = folders.last_mut() {
        let Some(item) = folder.next() else {
            folders.pop();
            continue;
        };
        if item.entry.kind == Kind::Directory && item.stamp.device == device {
            if cancel.load(Ordering::Relaxed) {
                return Err(FilesError::Cancelled);
            }
            folders.push(read_folder(root, &item.entry.path)?.into_iter());
        }
        blocks = blocks.saturating_add(blocks::count(item.entry.size()));
        found.push(item);
    }
    if blocks > manifest::TREE_BLOCKS_MAX {
        return Err(ManifestError::TooLarge.into());
    }
    mark_hard_links(&mut found);
    let (entries, stamps) = found
        .into_iter()
        .map(|item| (item.entry, item.stamp))
        .unzip();
    Ok(Walked {
        entries,
        stamps,
        started_ns,
    })
}

fn root_entry(root: &Root) -> Result<Found, FilesError> {
    let failed = |errno| FilesError::read(root.shown(b""), errno);
    let place = root.parent(b"").map_err(failed)?;
    let stat = place.stat().map_err(failed)?;
    describe(&place, Vec::new(), &stat)
        .map_err(failed)?
        .ok_or_else(|| failed(Errno::NOTDIR))
}

/// What is in a folder, sorted by name; nothing when it is gone.
fn read_folder(root: &Root, folder: &[u8]) -> Result<Vec<Found>, FilesError> {
    let failed = |errno| FilesError::read(root.shown(folder), errno);
    let directory = match root.open_beneath(folder, OFlags::DIRECTORY | OFlags::RDONLY, 0) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !folder.is_empty() => {
            return Ok(Vec::new());
        }
        opened => opened.map_err(failed)?,
    };
    let names = Dir::read_from(&directory).map_err(failed)?;
    let mut found: Vec<Found> = Vec::new();
    let mut place = Place {
        directory,
        name: c".".to_owned(),
    };
    for name in names {
        place.name = name.map_err(failed)?.file_name().to_owned();
        let bytes = place.name.to_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        let path = if folder.is_empty() {
            bytes.to_vec()
        } else {
            [folder, b"/", bytes].concat()
        };
        let described = place
            .stat()
            .and_then(|stat| describe(&place, path.clone(), &stat));
        match described {
            Ok(item) => found.extend(item),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(FilesError::read(root.shown(&path), errno)),
        }
    }
    found.sort_unstable_by(|left, right| left.entry.path.cmp(&right.entry.path));
    Ok(found)
}

/// `None` for what has no place in a tree.
fn describe(place: &Place, path: Vec<u8>, stat: &Stat) -> Result<Option<Found>, Errno> {
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
    let stamp = Stamp::of(stat);
    let entry = Entry {
        path,
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: stamp.mtime_ns,
        attributes: place.attributes()?,
    };
    Ok(Some(Found {
        entry,
        stamp,
        links: stat.st_nlink,
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
                found[index].entry.kind = Kind::HardLink { to };
            }
        }
    }
}

/// What a tree holds, for a preflight: bytes of files and number of entries.
///
/// # Errors
/// As [`walk`].
pub fn size(root: &Root, cancel: &AtomicBool) -> Result<(u64, u64), FilesError> {
    let walked = walk(root, cancel)?;
    Ok((
        walked.entries.iter().map(Entry::size).sum(),
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
        let walked = walk(&Root::open(folder.path()).unwrap(), &AtomicBool::new(false)).unwrap();
        let kinds: Vec<_> = walked
            .entries
            .iter()
            .map(|entry| (entry.path.as_slice(), entry.kind.clone()))
            .collect();
        assert_eq!(kinds[1], (&b"a"[..], Kind::File { size: 1 }));
        assert_eq!(kinds[2], (&b"b"[..], Kind::HardLink { to: b"a".to_vec() }));
        assert_eq!(kinds.len(), 3);
    }
}
