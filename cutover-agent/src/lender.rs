//! Sockets of another process, borrowed through `pidfd_getfd(2)` (since Linux 5.6).

use std::os::fd::OwnedFd;

use rustix::io::Result;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A process that has sockets.
#[derive(Debug)]
pub(crate) struct Lender {
    pid: i32,
    process: OwnedFd,
}

impl Lender {
    /// A process of this number; nothing when there is none.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        Some(Self { pid, process })
    }

    /// The sockets it has now: the number of the descriptor, and that of the socket among all sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (i32, u64)> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid));
        let entries = entries.into_iter().flatten().flatten();
        entries.filter_map(|entry| {
            let link = std::fs::read_link(entry.path()).ok()?;
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, inode.parse().ok()?))
        })
    }

    /// A second descriptor of what has this number there now. The socket stays open for as long as it is kept.
    ///
    /// # Errors
    /// When the process or its descriptor is gone, or we may not.
    pub(crate) fn borrow(&self, number: i32) -> Result<OwnedFd> {
        pidfd_getfd(&self.process, number, PidfdGetfdFlags::empty())
    }
}
