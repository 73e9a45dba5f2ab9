//! Walks a tree again by what an index says has changed: everything else is taken over from what is remembered, without
//! a look at it. What comes out is what a walk of the whole tree would find.
//!
//! Looked at are: names that came or went (what is in a directory of such a name, too), the directories they are in,
//! files and directories that were written to under whatever name, files with several names, and those that had changed
//! while they were read. Of what is not understood the caller is told, and walks everything.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::FilesError;
use super::index::{self, Changes};
use super::manifest::{self, Kind};
use super::remembered::{Remembered, is_inside};
use super::root::{Place, Root};
use super::walk::{self, Found, Survey, Walked};

/// Where more than one in so many has changed, or may have, a walk of everything is as fast: it takes several threads.
const CHANGED_SHARE: usize = 8;
/// So many are few in any tree.
const CHANGED_FEW: usize = 1024;

/// What has to be looked at.
struct Look {
    path: Vec<u8>,
    reach: Reach,
}

/// How far a change goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// The entry itself; what is in it has changes of its own.
    Entry,
    /// What is in it as well, if it is a directory: it may be another one than was remembered.
    Whole,
}

/// What was seen there.
enum Seen {
    Nothing,
    /// A directory of which only the entry itself has changed.
    Itself(Found),
    /// All there is now; the folder, if it is one, is read.
    Anew(Found),
}

/// So many changes are worth a walk of them alone, in a tree of so many entries.
pub(crate) fn most(entries: usize) -> usize {
    CHANGED_FEW.max(entries / CHANGED_SHARE)
}

/// Walks a tree of which the changes since it was walked as `remembered` are known. `written` are files (device, inode)
/// that are looked at in any case. `None`: the changes are more than `most` or not understood, and only a walk of everything
/// tells.
///
/// # Errors
/// When something cannot be read, or the tree exceeds [`manifest::TREE_BLOCKS_MAX`].
pub(crate) fn walk_changed(
    root: &Root,
    remembered: &Remembered<'_>,
    (changes, most): (&Changes, usize),
    written: &HashSet<(u64, u64)>,
    threads: usize,
    cancel: &AtomicBool,
) -> Result<Option<Walked>, FilesError> {
    let started_ns = walk::now_ns();
    let first = walk::root_entry(root)?;
    let is_same_root = remembered.stamps.first().is_some_and(|stamp| {
        stamp.is_some_and(|known| {
            (known.device, known.inode) == (first.stamp.device, first.stamp.inode)
        })
    });
    if !is_same_root || changes.count() > most {
        return Ok(None);
    }
    let device = first.stamp.device;
    let Ok(looks) = looks(root, remembered, changes, written, device) else {
        return Ok(None);
    };
    if looks.len() > most {
        return Ok(None);
    }
    let survey = Survey::new(root, Some(remembered), device, cancel);
    let mut seen = Vec::with_capacity(looks.len());
    let mut sight = Sight {
        root,
        remembered,
        survey: &survey,
        device,
        parent: None,
    };
    let mut covered: Option<Vec<u8>> = None;
    for look in looks {
        // The root itself was looked at already.
        let is_covered = |above: &Vec<u8>| is_inside(above, &look.path);
        if look.path.is_empty() || covered.as_ref().is_some_and(is_covered) {
            continue;
        }
        let there = sight.look(&look)?;
        if !matches!(there, Seen::Itself(_)) {
            covered = Some(look.path.clone());
        }
        seen.push((look.path, there));
    }
    let folders = survey.run(threads)?;
    let walked = assemble(remembered, first, seen, folders, started_ns);
    walked.map(Walked::finish).transpose()
}

/// What has to be looked at, in canonical order.
fn looks(
    root: &Root,
    remembered: &Remembered<'_>,
    changes: &Changes,
    written: &HashSet<(u64, u64)>,
    device: u64,
) -> Result<Vec<Look>, Errno> {
    let mut named: HashMap<u64, Vec<&[Box<[u8]>]>> = HashMap::new();
    let mut inodes: HashSet<u64> = HashSet::new();
    for (directory, names) in &changes.names {
        // Nothing is to be seen in one that is gone; that it is gone was told of the one above.
        if let Some(stat) = index::status(root, directory)?.filter(|stat| stat.st_dev == device) {
            named.entry(stat.st_ino).or_default().push(names);
            inodes.insert(stat.st_ino);
        }
    }
    for object in &changes.objects {
        if let Some(stat) = index::status(root, object)?.filter(|stat| stat.st_dev == device) {
            inodes.insert(stat.st_ino);
        }
    }
    inodes.extend(
        written
            .iter()
            .filter(|file| file.0 == device)
            .map(|file| file.1),
    );
    let mut looks = Vec::new();
    let sieve = Sieve::of(&inodes);
    for (entry, stamp) in remembered.entries.iter().zip(remembered.stamps) {
        let is_meant = stamp.is_none_or(|stamp| {
            let is_hit = sieve.may_hold(stamp.inode) && inodes.contains(&stamp.inode);
            is_hit || stamp.is_linked || stamp.device != device
        });
        if !is_meant {
            continue;
        }
        let path = entry.path.clone();
        let names = stamp.and_then(|stamp| named.get(&stamp.inode));
        for name in names.into_iter().flatten().copied().flatten() {
            looks.push(Look {
                path: walk::joined(&path, name),
                reach: Reach::Whole,
            });
        }
        looks.push(Look {
            path,
            reach: Reach::Entry,
        });
    }
    looks.sort_unstable_by(|one, other| {
        let by_path = manifest::order(&one.path, &other.path);
        by_path.then(other.reach.cmp(&one.reach))
    });
    looks.dedup_by(|later, first| later.path == first.path);
    Ok(looks)
}

/// Tells in one step of most numbers that they are not among some.
struct Sieve(Vec<u64>);

impl Sieve {
    /// Bits, as a power of two: 8 KiB of them stay in the processor's nearest cache.
    const BITS: u32 = 16;

    fn place(number: u64) -> (usize, u64) {
        // Neighbouring inode numbers belong to neighbouring files: their lowest bits are the ones that differ.
        let bit = (number ^ (number >> Self::BITS)) & ((1 << Self::BITS) - 1);
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    fn of(numbers: &HashSet<u64>) -> Self {
        let mut words = vec![0; 1 << (Self::BITS - 6)];
        for number in numbers {
            let (word, bit) = Self::place(*number);
            words[word] |= bit;
        }
        Self(words)
    }

    fn may_hold(&self, number: u64) -> bool {
        let (word, bit) = Self::place(number);
        self.0[word] & bit != 0
    }
}

/// Looks at one entry after the other.
struct Sight<'a, 'b> {
    root: &'a Root,
    remembered: &'a Remembered<'a>,
    survey: &'b Survey<'a>,
    device: u64,
    /// The directory that was looked into last.
    parent: Option<(Vec<u8>, OwnedFd)>,
}

impl Sight<'_, '_> {
    fn look(&mut self, look: &Look) -> Result<Seen, FilesError> {
        let failed = |errno| FilesError::read(self.root.shown(&look.path), errno);
        let (folder, name) = split(&look.path);
        let directory = match self.parent.take() {
            Some((path, directory)) if path == folder => directory,
            _ => match self
                .root
                .open_beneath(folder, OFlags::DIRECTORY | OFlags::PATH, 0)
            {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Seen::Nothing),
                opened => opened.map_err(failed)?,
            },
        };
        let place = Place {
            directory,
            name: CString::new(name).map_err(|_| failed(Errno::INVAL))?,
        };
        let at = self.remembered.place_of(0, &look.path);
        let entry = self.remembered.entries.get(at);
        let known = entry.filter(|entry| entry.path == look.path).map(|_| at);
        let found = match self.survey.look(&place, folder, known) {
            Ok(found) => found,
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(failed(errno)),
        };
        self.parent = Some((folder.to_vec(), place.directory));
        let Some(mut found) = found else {
            return Ok(Seen::Nothing);
        };
        let is_folder = found.entry.kind == Kind::Directory && found.stamp.device == self.device;
        if is_folder && look.reach == Reach::Entry && self.is_still(known, &found) {
            return Ok(Seen::Itself(found));
        }
        if is_folder {
            let path = found.entry.path.clone();
            let known = known.filter(|at| self.remembered.entries[*at].kind == Kind::Directory);
            found.folder = Some(self.survey.add(path, known));
        }
        Ok(Seen::Anew(found))
    }

    /// Whether the directory is the one that was remembered.
    fn is_still(&self, known: Option<usize>, found: &Found) -> bool {
        let stamp = known.and_then(|at| self.remembered.stamps[at]);
        stamp.is_some_and(|stamp| {
            (stamp.device, stamp.inode) == (found.stamp.device, found.stamp.inode)
        })
    }
}

/// Puts what was seen in the place of what was remembered; `None` if something is taken over that cannot be.
fn assemble(
    remembered: &Remembered<'_>,
    root: Found,
    seen: Vec<(Vec<u8>, Seen)>,
    mut folders: Vec<Vec<Found>>,
    started_ns: i64,
) -> Option<Walked> {
    let fresh = seen.len() + folders.iter().map(Vec::len).sum::<usize>();
    let mut walked = Walked::with_capacity(remembered.entries.len() + fresh, started_ns);
    walked.looked = fresh + 1;
    walked.push(root.entry, root.stamp, root.known);
    let mut at = 1;
    for (path, seen) in seen {
        let place = remembered.place_of(at, &path);
        take_over(remembered, at..place, &mut walked)?;
        let entry = remembered.entries.get(place);
        let is_there = entry.is_some_and(|entry| entry.path == path);
        at = match &seen {
            _ if !is_there => place,
            Seen::Itself(_) => place + 1,
            Seen::Nothing | Seen::Anew(_) => remembered.end_of(place),
        };
        if let Seen::Itself(found) | Seen::Anew(found) = seen {
            let folder = found.folder;
            walked.push(found.entry, found.stamp, found.known);
            if let Some(folder) = folder {
                walk::collect(&mut folders, folder, |found| {
                    walked.push(found.entry, found.stamp, found.known);
                });
            }
        }
    }
    take_over(remembered, at..remembered.entries.len(), &mut walked)?;
    Some(walked)
}

fn take_over(
    remembered: &Remembered<'_>,
    range: std::ops::Range<usize>,
    walked: &mut Walked,
) -> Option<()> {
    for at in range {
        let entry = &remembered.entries[at];
        // One without a stamp was looked at, and is not among these.
        walked.push(Arc::clone(entry), remembered.stamps[at]?, Some(at as u32));
    }
    Some(())
}

/// The directory's path and the name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(cut) => (&path[..cut], &path[cut + 1..]),
        None => (&path[..0], path),
    }
}

#[cfg(test)]
mod tests;
