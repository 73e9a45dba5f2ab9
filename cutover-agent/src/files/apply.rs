//! Makes a tree at the target equal to a manifest: room first, content in place, then metadata, deletions last.
//!
//! [`prepare`] removes what is in the way and makes directories, [`write`] puts blocks in place (from any thread, in
//! any order), [`finish`] does the rest. Between the three the tree is neither old nor new.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RawMode, Stat, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::FilesError;
use super::manifest::{self, Attributes, Entry, Kind, Manifest, Pairing};
use super::root::{self, Place, Root};
use super::walk;

/// Whether an entry can stay where it is and become the other one.
fn has_shape(old: &Kind, new: &Kind) -> bool {
    matches!((old, new), (Kind::File { .. }, Kind::File { .. })) || old == new
}

/// The directory that an entry is in; the root is in none.
fn parent_of(path: &[u8]) -> Option<&[u8]> {
    if path.is_empty() {
        return None;
    }
    let cut = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    Some(&path[..cut])
}

/// The paths of `old` that are in the way of `new`: what becomes something of another shape, and all that is inside it.
/// They are gone before anything is written.
pub(crate) fn in_the_way<'a>(
    old: &'a [Arc<Entry>],
    new: &[Arc<Entry>],
    pairs: &Pairing,
) -> HashSet<&'a [u8]> {
    let mut found: HashSet<&[u8]> = HashSet::new();
    for (index, entry) in new.iter().enumerate() {
        // Most entries are the very same, and need no look.
        let old = pairs.old_of(index).map(|at| &old[at]);
        let other = old.filter(|old| !Arc::ptr_eq(old, entry));
        if let Some(old) = other.filter(|old| !has_shape(&old.kind, &entry.kind)) {
            found.insert(&old.path);
        }
    }
    if !found.is_empty() {
        for old in old {
            if parent_of(&old.path).is_some_and(|parent| found.contains(parent)) {
                found.insert(&old.path);
            }
        }
    }
    found
}

/// Removes whatever would be in the way of `new`, and makes its directories, writable for us.
///
/// # Errors
/// When the tree cannot be changed; it may then be half prepared.
pub(crate) fn prepare(
    root: &Root,
    base: &Manifest,
    new: &[Arc<Entry>],
    pairs: &Pairing,
) -> Result<(), FilesError> {
    let removed = in_the_way(&base.entries, new, pairs);
    for old in base
        .entries
        .iter()
        .rev()
        .filter(|old| removed.contains(old.path.as_slice()))
    {
        remove(root, old)?;
    }
    for (index, entry) in new.iter().enumerate() {
        let old = pairs.old_of(index).map(|at| base.entries[at].as_ref());
        match entry.kind {
            // What a file no longer has is given back before the new blocks need room.
            Kind::File { size } if old.is_some_and(|old| size < old.size()) => {
                let (file, _) = open_file(root, &entry.path)?;
                rustix::fs::ftruncate(&file, size)
                    .map_err(|errno| FilesError::write(root.shown(&entry.path), errno))?;
            }
            Kind::Directory if !old.is_some_and(is_open_directory) => {
                make_directory(root, &entry.path)
                    .map_err(|errno| FilesError::write(root.shown(&entry.path), errno))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether it was left a directory that we can work in.
fn is_open_directory(old: &Entry) -> bool {
    old.kind == Kind::Directory && old.mode & 0o700 == 0o700
}

/// Has a directory there that we can work in.
fn make_directory(root: &Root, path: &[u8]) -> Result<(), Errno> {
    let place = root.parent(path)?;
    match rustix::fs::mkdirat(&place.directory, &place.name, Mode::RWXU) {
        Err(Errno::EXIST) => {}
        other => return other,
    }
    let stat = place.stat()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    if stat.st_mode & 0o700 != 0o700 {
        change_mode(&place, stat.st_mode & 0o7777 | 0o700)?;
    }
    Ok(())
}

/// Takes an entry's name away, if it is there.
///
/// # Errors
/// When the file system fails.
pub(crate) fn remove(root: &Root, entry: &Entry) -> Result<(), FilesError> {
    let failed = |errno| FilesError::write(root.shown(&entry.path), errno);
    let flags = if entry.kind == Kind::Directory {
        AtFlags::REMOVEDIR
    } else {
        AtFlags::empty()
    };
    let removal = || {
        let place = root.parent(&entry.path)?;
        match rustix::fs::unlinkat(&place.directory, &place.name, flags) {
            Err(Errno::ACCESS) => {
                // Not root, and the folder is not writable for its owner: it was made so by an earlier round.
                let folder = root.parent(parent_of(&entry.path).unwrap_or_default())?;
                change_mode(&folder, 0o700)?;
                rustix::fs::unlinkat(&place.directory, &place.name, flags)
            }
            other => other,
        }
    };
    match removal() {
        // Gone already, or with a folder that is something else by now.
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
        Err(errno) => Err(failed(errno)),
    }
}

/// Opens a file of the tree for writing blocks, making it when it is not there.
///
/// # Errors
/// When it cannot be written, or is no regular file.
pub(crate) fn open_file(root: &Root, path: &[u8]) -> Result<(OwnedFd, Stat), FilesError> {
    let failed = |errno| FilesError::write(root.shown(path), errno);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
    let opened = match root.open_beneath(path, flags, 0o600) {
        Err(Errno::ACCESS) => {
            let place = root.parent(path).map_err(failed)?;
            change_mode(&place, 0o600).map_err(failed)?;
            root.open_beneath(path, flags, 0o600)
        }
        other => other,
    };
    let file = opened.map_err(failed)?;
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(failed(Errno::INVAL));
    }
    Ok((file, stat))
}

/// Brings everything but content of a file in order whose blocks were all just written through `file`; `stat` is what it
/// was when it was opened. Does for one file what [`finish`] does for all that are left, in fewer calls.
///
/// # Errors
/// When the file system fails.
pub(crate) fn complete(
    root: &Root,
    entry: &Entry,
    file: &OwnedFd,
    stat: &Stat,
) -> Result<(), FilesError> {
    let completing = || {
        // Zeros beyond the old end were not written.
        if stat.st_size as u64 > entry.size()
            || rustix::fs::fstat(file)?.st_size as u64 != entry.size()
        {
            rustix::fs::ftruncate(file, entry.size())?;
        }
        let is_moved = (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid);
        if is_moved {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            may_stay_ours(rustix::fs::fchown(file, Some(uid), Some(gid)))?;
        }
        set_attributes(&Handle(file), entry)?;
        if is_moved || !entry.attributes.is_empty() || stat.st_mode & 0o7777 != entry.mode {
            rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode as RawMode))?;
        }
        rustix::fs::futimens(file, &times(entry))
    };
    completing().map_err(|errno| FilesError::write(root.shown(&entry.path), errno))
}

/// Only root can give files away; without it everything stays ours, as with any copying program.
fn may_stay_ours(changed: Result<(), Errno>) -> Result<(), Errno> {
    match changed {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        other => other,
    }
}

fn times(entry: &Entry) -> Timestamps {
    let mtime = walk::timespec(entry.mtime_ns);
    Timestamps {
        last_access: mtime,
        last_modification: mtime,
    }
}

/// Writes bytes at a place in an open file.
///
/// # Errors
/// When the file system is full or fails.
pub(crate) fn write(
    root: &Root,
    path: &[u8],
    file: &OwnedFd,
    bytes: &[u8],
    start: u64,
) -> Result<(), FilesError> {
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::pwrite(file, &bytes[written..], start + written as u64) {
            Ok(0) => {
                return Err(FilesError::NoSpace {
                    path: root.shown(path),
                });
            }
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(FilesError::write(root.shown(path), errno)),
        }
    }
    Ok(())
}

/// Makes a range read as zeros: a hole where the file system can, written zeros elsewhere.
///
/// # Errors
/// When the file system fails.
pub(crate) fn write_zeros(
    root: &Root,
    path: &[u8],
    file: &OwnedFd,
    start: u64,
    length: u64,
) -> Result<(), FilesError> {
    let failed = |errno| FilesError::write(root.shown(path), errno);
    let size = rustix::fs::fstat(file).map_err(failed)?.st_size as u64;
    // Beyond the end nothing is needed: the final truncation makes the hole.
    let end = size.min(start + length);
    if start >= end {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, start, end - start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = [0; super::blocks::BLOCK_BYTES];
            let mut at = start;
            while at < end {
                let count = (end - at).min(zeros.len() as u64);
                write(root, path, file, &zeros[..count as usize], at)?;
                at += count;
            }
            Ok(())
        }
        other => other.map_err(failed),
    }
}

/// What has been done before [`finish`], by indices.
pub(crate) struct Done<'a> {
    /// Entries whose content was written.
    pub(crate) touched: &'a HashSet<usize>,
    /// Those that [`complete`] was called for.
    pub(crate) completed: &'a HashSet<usize>,
    /// Whether an entry of the base was removed, and its name given to a new file.
    pub(crate) is_anew: &'a dyn Fn(usize) -> bool,
}

/// Brings everything but content in order: lengths, links, nodes, deletions, metadata.
///
/// # Errors
/// When the tree cannot be changed.
pub(crate) fn finish(
    root: &Root,
    base: &Manifest,
    new: &[Arc<Entry>],
    pairs: &Pairing,
    done: &Done<'_>,
) -> Result<(), FilesError> {
    let mut disturbed: HashSet<&[u8]> = HashSet::new();
    for (index, entry) in new.iter().enumerate() {
        let old = pairs.old_of(index).map(|at| &base.entries[at]);
        let is_same = old.is_some_and(|old| manifest::is_same(old, entry));
        // A closed one was opened to work in it.
        if entry.kind == Kind::Directory && !(is_same && is_open_directory(entry)) {
            disturbed.insert(&entry.path);
        }
        if old.is_none_or(|old| !has_shape(&old.kind, &entry.kind))
            || pairs.old_of(index).is_some_and(done.is_anew)
        {
            disturbed.extend(parent_of(&entry.path));
        }
        if (is_same && !done.touched.contains(&index))
            || done.completed.contains(&index)
            || entry.kind == Kind::Directory
        {
            continue;
        }
        make(root, entry)?;
        if !matches!(entry.kind, Kind::HardLink { .. }) {
            set_metadata(root, entry)?;
        }
    }
    for at in pairs.gone().rev() {
        let old = &base.entries[at];
        disturbed.extend(parent_of(&old.path));
        remove(root, old)?;
    }
    // Children first: making and removing them changed their directories' times.
    let directories = new
        .iter()
        .rev()
        .filter(|entry| entry.kind == Kind::Directory);
    for entry in directories.filter(|entry| disturbed.contains(entry.path.as_slice())) {
        set_metadata(root, entry)?;
    }
    Ok(())
}

/// Makes sure that something of the right kind and length is there.
fn make(root: &Root, entry: &Entry) -> Result<(), FilesError> {
    let failed = |errno| FilesError::write(root.shown(&entry.path), errno);
    if let Kind::File { size } = entry.kind {
        let (file, stat) = open_file(root, &entry.path)?;
        if stat.st_size as u64 != size {
            rustix::fs::ftruncate(&file, size).map_err(failed)?;
        }
        return Ok(());
    }
    let place = root.parent(&entry.path).map_err(failed)?;
    let mode = Mode::RUSR | Mode::WUSR;
    let node =
        |kind, number| rustix::fs::mknodat(&place.directory, &place.name, kind, mode, number);
    let made = match &entry.kind {
        Kind::Symlink { to } => rustix::fs::symlinkat(to.as_slice(), &place.directory, &place.name),
        Kind::HardLink { to } => root.parent(to).and_then(|first| {
            rustix::fs::linkat(
                &first.directory,
                &first.name,
                &place.directory,
                &place.name,
                AtFlags::empty(),
            )
        }),
        Kind::CharacterDevice { number } => node(FileType::CharacterDevice, *number),
        Kind::BlockDevice { number } => node(FileType::BlockDevice, *number),
        Kind::Fifo => node(FileType::Fifo, 0),
        Kind::Directory | Kind::File { .. } => Ok(()),
    };
    match made {
        // Entries of another shape were removed before: what is there is what we want.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(failed(errno)),
    }
}

/// Sets owner, mode, attributes and time, in the order in which the kernel does not undo them: a change of owner
/// clears setuid and `security.capability`, everything changes the time.
fn set_metadata(root: &Root, entry: &Entry) -> Result<(), FilesError> {
    let place = root
        .parent(&entry.path)
        .map_err(|errno| FilesError::write(root.shown(&entry.path), errno))?;
    set_all(&place, entry).map_err(|errno| FilesError::write(root.shown(&entry.path), errno))
}

fn set_all(place: &Place, entry: &Entry) -> Result<(), Errno> {
    let stat = place.stat()?;
    if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        may_stay_ours(rustix::fs::chownat(
            &place.directory,
            &place.name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        ))?;
    }
    let is_symlink = matches!(entry.kind, Kind::Symlink { .. });
    set_attributes(place, entry)?;
    if !is_symlink {
        change_mode(place, entry.mode)?;
    }
    rustix::fs::utimensat(
        &place.directory,
        &place.name,
        &times(entry),
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

fn set_attributes<A: Attributed>(at: &A, entry: &Entry) -> Result<(), Errno> {
    let present = at.attributes()?;
    if present == entry.attributes {
        return Ok(());
    }
    for (name, _) in present
        .iter()
        .filter(|(name, _)| !entry.attributes.iter().any(|(wanted, _)| wanted == name))
    {
        match at.remove(name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    for (name, value) in entry
        .attributes
        .iter()
        .filter(|wanted| !present.contains(wanted))
    {
        at.set(name, value)?;
    }
    Ok(())
}

/// Where extended attributes can be changed.
trait Attributed {
    fn attributes(&self) -> Result<Attributes, Errno>;
    fn set(&self, name: &[u8], value: &[u8]) -> Result<(), Errno>;
    fn remove(&self, name: &[u8]) -> Result<(), Errno>;
}

impl Attributed for Place {
    fn attributes(&self) -> Result<Attributes, Errno> {
        Self::attributes(self)
    }

    fn set(&self, name: &[u8], value: &[u8]) -> Result<(), Errno> {
        rustix::fs::lsetxattr(self.through_proc(), name, value, XattrFlags::empty())
    }

    fn remove(&self, name: &[u8]) -> Result<(), Errno> {
        rustix::fs::lremovexattr(self.through_proc(), name)
    }
}

/// An open file.
struct Handle<'a>(&'a OwnedFd);

impl Attributed for Handle<'_> {
    fn attributes(&self) -> Result<Attributes, Errno> {
        root::attributes(
            |buffer| rustix::fs::flistxattr(self.0, buffer),
            |name, buffer| rustix::fs::fgetxattr(self.0, name, buffer),
        )
    }

    fn set(&self, name: &[u8], value: &[u8]) -> Result<(), Errno> {
        rustix::fs::fsetxattr(self.0, name, value, XattrFlags::empty())
    }

    fn remove(&self, name: &[u8]) -> Result<(), Errno> {
        rustix::fs::fremovexattr(self.0, name)
    }
}

/// Follows a symlink in the last place, so only for names that were just seen not to be one.
fn change_mode(place: &Place, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmodat(
        &place.directory,
        &place.name,
        Mode::from_raw_mode(mode as RawMode),
        AtFlags::empty(),
    )
}

/// Removes everything in the tree, the root itself stays.
///
/// # Errors
/// When something cannot be removed.
pub(crate) fn clear(root: &Root, cancel: &std::sync::atomic::AtomicBool) -> Result<(), FilesError> {
    let walked = walk::walk(root, None, walk::WALKERS, cancel)?;
    walked
        .entries
        .iter()
        .skip(1)
        .rev()
        .try_for_each(|entry| remove(root, entry))
}

/// Has the file system write everything it holds back, so that the tree survives a power cut.
///
/// # Errors
/// When the file system reports a failed write.
pub(crate) fn sync(root: &Root) -> Result<(), FilesError> {
    rustix::fs::syncfs(root.fd()).map_err(|errno| FilesError::write(root.shown(b""), errno))
}
