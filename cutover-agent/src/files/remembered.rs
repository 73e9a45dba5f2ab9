//! What is remembered of a tree between two walks, and by what a file is recognised as unchanged.

use std::sync::{Arc, OnceLock};

use rustix::fs::{FileType, Stat};

use super::manifest::{self, Entry, Kind};

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
    /// Whether it is a file with several names: one of them may be written to under any other.
    pub(super) is_linked: bool,
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
            is_linked: stat.st_nlink > 1
                && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        }
    }

    /// The modification time: nanoseconds since 1970.
    pub(super) fn mtime_ns(&self) -> i64 {
        self.mtime_ns
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

/// What a tree was when it was walked before.
pub(crate) struct Remembered<'a> {
    pub(super) entries: &'a [Arc<Entry>],
    pub(super) stamps: &'a [Option<Stamp>],
    scanned_ns: i64,
    /// For each entry, where the first one is that is not inside it; made when it is first asked for.
    ends: OnceLock<Vec<u32>>,
}

impl<'a> Remembered<'a> {
    /// Entries in canonical order, what each was when a walk that began at `scanned_ns` had them read.
    pub(crate) fn new(
        entries: &'a [Arc<Entry>],
        stamps: &'a [Option<Stamp>],
        scanned_ns: i64,
    ) -> Self {
        Self {
            entries,
            stamps,
            scanned_ns,
            ends: OnceLock::new(),
        }
    }

    /// How many entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn ends(&self) -> &[u32] {
        self.ends.get_or_init(|| ends(self.entries))
    }

    /// Where the first entry from `from` on is that does not come before this path.
    pub(super) fn place_of(&self, from: usize, path: &[u8]) -> usize {
        let comes_before = |entry: &Arc<Entry>| manifest::order(&entry.path, path).is_lt();
        from + self.entries[from..].partition_point(comes_before)
    }

    /// Where the first entry behind `at` is that is not inside it.
    pub(super) fn end_of(&self, at: usize) -> usize {
        let folder = &self.entries[at].path;
        let behind = &self.entries[at + 1..];
        at + 1 + behind.partition_point(|entry| is_inside(folder, &entry.path))
    }

    pub(super) fn is_unchanged(&self, at: usize, stamp: &Stamp) -> bool {
        self.stamps[at]
            .is_some_and(|known| known.is_same(stamp) && known.is_settled(self.scanned_ns))
    }
}

/// Whether a path leads into a folder.
pub(super) fn is_inside(folder: &[u8], path: &[u8]) -> bool {
    folder.is_empty()
        || path
            .strip_prefix(folder)
            .is_some_and(|rest| rest.starts_with(b"/"))
}

/// For each entry, where the first one is that is not inside it.
fn ends(entries: &[Arc<Entry>]) -> Vec<u32> {
    let mut ends: Vec<u32> = (1..=entries.len() as u32).collect();
    let mut open: Vec<usize> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let is_left = |folder: &mut usize| !is_inside(&entries[*folder].path, &entry.path);
        while let Some(folder) = open.pop_if(is_left) {
            ends[folder] = index as u32;
        }
        if entry.kind == Kind::Directory {
            open.push(index);
        }
    }
    for folder in open {
        ends[folder] = entries.len() as u32;
    }
    ends
}

/// The remembered entries of one folder, in the order of their names.
pub(super) struct Siblings<'a> {
    remembered: &'a Remembered<'a>,
    /// Bytes of a path before the name.
    prefix: usize,
    at: usize,
    end: usize,
}

impl<'a> Siblings<'a> {
    /// Those in the remembered folder at `folder`.
    pub(super) fn of(remembered: &'a Remembered<'a>, folder: usize) -> Self {
        let length = remembered.entries[folder].path.len();
        Self {
            remembered,
            prefix: if length == 0 { 0 } else { length + 1 },
            at: folder + 1,
            end: remembered.ends()[folder] as usize,
        }
    }

    /// Where the entry of this name is; names are asked for in their order.
    pub(super) fn find(&mut self, name: &[u8]) -> Option<usize> {
        while self.at < self.end {
            let known = &self.remembered.entries[self.at].path[self.prefix..];
            match known.cmp(name) {
                std::cmp::Ordering::Less => self.at = self.remembered.ends()[self.at] as usize,
                std::cmp::Ordering::Equal => return Some(self.at),
                std::cmp::Ordering::Greater => break,
            }
        }
        None
    }
}

fn nanoseconds(seconds: i64, part: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(part)
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
            is_linked: false,
        };
        assert!(!stamp.is_settled(6_000_000_000));
        assert!(stamp.is_settled(8_000_000_000));
    }
}
