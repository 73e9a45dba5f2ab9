//! What to do by hand when CRIU died while it was parked: sockets stuck in repair mode, mounts left behind.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::lender::Lender;

/// `TCP_REPAIR_OFF_NO_WP`: leave repair mode without a window probe (tcp.h); the fence still stands anyway.
const REPAIR_OFF_NO_PROBE: libc::c_int = -1;

/// Takes every TCP socket of these processes out of repair mode; returns how many were in it.
///
/// A process or socket that is gone meanwhile is skipped: there is
/// nothing left to cure.
#[must_use]
pub fn leave_repair_mode(pids: &[u32]) -> usize {
    pids.iter().map(|&pid| leave_repair_mode_of(pid)).sum()
}

fn leave_repair_mode_of(pid: u32) -> usize {
    let Some(lender) = Lender::of(pid.cast_signed()) else {
        return 0;
    };
    let is_cured = |number| {
        lender
            .borrow(number)
            .is_ok_and(|socket| repair_off(&socket))
    };
    let sockets = lender.sockets();
    sockets.filter(|(number, _)| is_cured(*number)).count()
}

fn repair_off(socket: &OwnedFd) -> bool {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length are valid for the call, and the descriptor is ours.
    let read = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if read != 0 || value == 0 {
        return false;
    }
    let off = REPAIR_OFF_NO_PROBE;
    // SAFETY: off is valid for the call, and the descriptor is ours.
    let written = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    written == 0
}

/// Unmounts the cgroup mounts a killed CRIU leaves in its working folder, so that the folder can be removed.
pub fn unmount_leftovers(work: &Path) {
    let Ok(entries) = std::fs::read_dir(work) else {
        return;
    };
    for entry in entries.flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(".criu.cgyard.")
        {
            let _ = rustix::mount::unmount(entry.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}
