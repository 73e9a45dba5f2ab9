//! The system calls of the index: a group that is told of every change of one file system, and handles of files.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::record::{HANDLE_BYTES_MAX, Handle, WANTED};

/// `struct file_handle` with room for the longest one.
#[repr(C)]
struct RawHandle {
    length: u32,
    kind: i32,
    bytes: [u8; HANDLE_BYTES_MAX],
}

/// A queue of changes of one file system. The kernel bounds it (`fs.fanotify.max_queued_events`, 16,384 by default), and
/// says so when it ran over.
#[derive(Debug)]
pub(super) struct Group(OwnedFd);

impl Group {
    /// Is told from now on of every change of the file system that `root` is on.
    ///
    /// # Errors
    /// The system's: without `CAP_SYS_ADMIN`, on a file system without handles or id, or in an old kernel.
    pub(super) fn watch(root: BorrowedFd<'_>) -> Result<Self, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DFID_NAME
            | libc::FAN_NONBLOCK
            | libc::FAN_CLOEXEC;
        // SAFETY: plain numbers; no memory of ours is touched.
        let fd = unsafe { libc::fanotify_init(flags, 0) };
        if fd < 0 {
            return Err(last_error());
        }
        // SAFETY: the call has just given this descriptor to us, and to nobody else.
        let group = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let how = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: both descriptors are open through the call; without a path, the directory itself is meant.
        let marked = unsafe {
            libc::fanotify_mark(
                group.0.as_raw_fd(),
                how,
                WANTED,
                root.as_raw_fd(),
                std::ptr::null(),
            )
        };
        if marked < 0 {
            return Err(last_error());
        }
        Ok(group)
    }

    /// As many whole events as there are and fit; [`Errno::AGAIN`] when there are none.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.0, buffer)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The handle of an open directory.
///
/// # Errors
/// Where the file system has none.
pub(super) fn handle_of(directory: BorrowedFd<'_>) -> Result<Handle, Errno> {
    let mut raw = RawHandle {
        length: HANDLE_BYTES_MAX as u32,
        kind: 0,
        bytes: [0; HANDLE_BYTES_MAX],
    };
    let mut mount: libc::c_int = 0;
    // SAFETY: the name ends with a zero; the handle has as much room as its length says; all live through the call.
    let made = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            directory.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if made < 0 {
        return Err(last_error());
    }
    let length = (raw.length as usize).min(HANDLE_BYTES_MAX);
    Ok(Handle {
        kind: raw.kind,
        bytes: raw.bytes[..length].into(),
    })
}

/// Opens what a handle names, of the file system that `root` is on, without reading it.
///
/// # Errors
/// [`Errno::STALE`] when it is gone; [`Errno::PERM`] without `CAP_DAC_READ_SEARCH`.
pub(super) fn open(root: BorrowedFd<'_>, handle: &Handle) -> Result<OwnedFd, Errno> {
    let mut raw = RawHandle {
        length: handle.bytes.len() as u32,
        kind: handle.kind,
        bytes: [0; HANDLE_BYTES_MAX],
    };
    let room = raw.bytes.get_mut(..handle.bytes.len());
    room.ok_or(Errno::INVAL)?.copy_from_slice(&handle.bytes);
    // SAFETY: the handle is as long as its length says, and lives through the call.
    let opened = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            root.as_raw_fd(),
            &raw mut raw,
            libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW,
        )
    };
    let Ok(fd @ 0..) = i32::try_from(opened) else {
        return Err(last_error());
    };
    // SAFETY: the call has just given this descriptor to us, and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn last_error() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
