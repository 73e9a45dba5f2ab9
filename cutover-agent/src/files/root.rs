//! A directory nobody can lead us out of: every path is resolved by the kernel beneath it, never through a symlink.
//!
//! The source walks trees that running containers can change under its feet, the target writes where a peer tells it
//! to; in both cases a planted symlink must not reach the host's own files.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::manifest::Attributes;

/// An open directory and the path it was opened by, for messages.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens an existing directory. The operator's own path may lead through symlinks.
    ///
    /// # Errors
    /// The system's, when it is no directory or not accessible.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let fd = rustix::fs::openat(
            CWD,
            path,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The path to show for an entry.
    #[must_use]
    pub fn shown(&self, relative: &[u8]) -> PathBuf {
        self.path.join(OsStr::from_bytes(relative))
    }

    /// Opens an entry beneath the root, following no symlink at any place of the path.
    pub(crate) fn open_beneath(
        &self,
        relative: &[u8],
        flags: OFlags,
        mode: u32,
    ) -> Result<OwnedFd, Errno> {
        let name: &[u8] = if relative.is_empty() { b"." } else { relative };
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(&self.fd, name, flags, Mode::from_raw_mode(mode), resolve)
    }

    /// Opens the directory that holds an entry, and gives the entry's name within it. The root is its own parent.
    pub(crate) fn parent(&self, relative: &[u8]) -> Result<Place, Errno> {
        let (directory, name) = match relative.iter().rposition(|byte| *byte == b'/') {
            Some(cut) => (&relative[..cut], &relative[cut + 1..]),
            None => (&relative[..0], relative),
        };
        let name =
            CString::new(if name.is_empty() { b"." } else { name }).map_err(|_| Errno::INVAL)?;
        Ok(Place {
            directory: self.open_beneath(directory, OFlags::DIRECTORY | OFlags::PATH, 0)?,
            name,
        })
    }

    /// The root's own descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One name in one open directory: what every change of metadata is applied to.
pub(crate) struct Place {
    pub(crate) directory: OwnedFd,
    pub(crate) name: CString,
}

impl Place {
    /// The entry's own status; a symlink is not followed.
    pub(crate) fn stat(&self) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// A path for the calls that take no descriptor; only its last part could be a symlink, and the `l` forms of
    /// those calls do not follow it.
    pub(crate) fn through_proc(&self) -> PathBuf {
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()));
        path.push(OsStr::from_bytes(self.name.as_bytes()));
        path
    }

    /// The extended attributes by name, sorted; empty where the file system has none.
    pub(crate) fn attributes(&self) -> Result<Attributes, Errno> {
        let path = self.through_proc();
        attributes(
            |buffer| self.list_attributes(&path, buffer),
            |name, buffer| rustix::fs::lgetxattr(&path, name, buffer),
        )
    }
}

/// `listxattrat` (Linux 6.13), by its number: the same on all architectures, and in no library yet.
const SYS_LISTXATTRAT: libc::c_long = 465;
/// Whether this kernel has it, as far as we know.
static HAS_LISTXATTRAT: AtomicBool = AtomicBool::new(true);

impl Place {
    /// The names, by one call where the kernel can: a walk asks this of every entry, and the way through `/proc` is long.
    fn list_attributes(&self, path: &Path, buffer: &mut [u8]) -> Result<usize, Errno> {
        if HAS_LISTXATTRAT.load(Ordering::Relaxed) {
            match self.list_at(buffer) {
                // Older kernels, or a filter of system calls that does not know it.
                Err(Errno::NOSYS | Errno::PERM) => HAS_LISTXATTRAT.store(false, Ordering::Relaxed),
                listed => return listed,
            }
        }
        rustix::fs::llistxattr(path, buffer)
    }

    fn list_at(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the name ends with a zero, the buffer is as long as we say, and both live through the call.
        let listed = unsafe {
            libc::syscall(
                SYS_LISTXATTRAT,
                self.directory.as_raw_fd(),
                self.name.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        };
        usize::try_from(listed).map_err(|_| {
            let error = std::io::Error::last_os_error();
            Errno::from_io_error(&error).unwrap_or(Errno::IO)
        })
    }
}

/// Extended attributes by name, sorted; empty where the file system has none.
pub(super) fn attributes(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
) -> Result<Attributes, Errno> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    match grow(256, list) {
        Ok(list) => names.extend(
            list.split(|byte| *byte == 0)
                .filter(|name| !name.is_empty())
                .map(<[u8]>::to_vec),
        ),
        Err(Errno::NOTSUP) => {}
        Err(other) => return Err(other),
    }
    names.sort();
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        match grow(256, |buffer| get(&name, buffer)) {
            Ok(value) => found.push((name, value)),
            Err(Errno::NODATA) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}

/// Calls with a growing buffer until the answer fits. The kernel bounds both lists and values at 64 KiB.
fn grow(start: usize, call: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; start];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < 128 << 10 => buffer.resize(buffer.len() * 8, 0),
            Err(other) => return Err(other),
        }
    }
}
