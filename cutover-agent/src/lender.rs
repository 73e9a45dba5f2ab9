//! Sockets of another process, borrowed through `pidfd_getfd(2)` (since Linux 5.6), or only looked at.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Result;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::cgroup::Cgroup;

/// How long containers may take to close what their peers have closed. Some never do.
const CLOSING_MAX: Duration = Duration::from_millis(100);
/// When nothing was to be closed for so long, all that a drain has closed has arrived: on a busy machine that takes some
/// milliseconds even if the peer is on it.
const CLOSED_FOR: Duration = Duration::from_millis(8);
const CLOSING_PAUSE: Duration = Duration::from_millis(1);

/// Waits until the processes of some cgroups have closed what their peers have closed, for a limited time: a socket that
/// is frozen half closed cannot be restored where its address is another one, and one drain ends in many of them.
pub(crate) fn let_close(cgroups: &[Cgroup]) {
    let pids = cgroups.iter().flat_map(Cgroup::pids);
    let lenders: Vec<Lender> = pids
        .filter_map(|pid| Lender::of(pid.cast_signed()))
        .collect();
    let began = Instant::now();
    let mut closed_since = began;
    let is_over = |closed: Duration| closed >= CLOSED_FOR || began.elapsed() >= CLOSING_MAX;
    while !lenders.is_empty() && !is_over(closed_since.elapsed()) {
        if lenders.iter().any(Lender::has_to_close) {
            closed_since = Instant::now();
        }
        std::thread::sleep(CLOSING_PAUSE);
    }
}

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

    /// Whether it has a TCP connection that the peer has closed and it has not, or connections that it has not accepted, of
    /// which that may be true. The kernel's tables of connections tell that as well, but take milliseconds to be read: all
    /// of a machine's namespaces share one.
    pub(crate) fn has_to_close(&self) -> bool {
        let borrowed = self.sockets().map(|(number, _)| self.borrow(number));
        borrowed.flatten().any(|socket| is_to_be_closed(&socket))
    }

    /// A second descriptor of what has this number there now. The socket stays open for as long as it is kept.
    ///
    /// # Errors
    /// When the process or its descriptor is gone, or we may not.
    pub(crate) fn borrow(&self, number: i32) -> Result<OwnedFd> {
        pidfd_getfd(&self.process, number, PidfdGetfdFlags::empty())
    }
}

/// TCP in the state `CLOSE_WAIT`: the peer will send no more, and we have not said so; or listening, and somebody is there
/// (poll(2)).
fn is_to_be_closed(socket: &OwnedFd) -> bool {
    let families = [AddressFamily::INET, AddressFamily::INET6];
    if !sockopt::socket_domain(socket).is_ok_and(|family| families.contains(&family))
        || !sockopt::socket_type(socket).is_ok_and(|kind| kind == SocketType::STREAM)
    {
        return false;
    }
    let mut watched = [PollFd::new(socket, PollFlags::RDHUP | PollFlags::IN)];
    if poll(&mut watched, Some(&Timespec::default())).is_err() {
        return false;
    }
    let state = watched[0].revents();
    if sockopt::socket_acceptconn(socket).unwrap_or(false) {
        return state.contains(PollFlags::IN);
    }
    state.contains(PollFlags::RDHUP) && !state.contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{Shutdown, TcpListener, TcpStream};

    /// Waits until the kernel has seen what a peer did.
    fn soon(is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < deadline, "it never was");
        }
    }

    #[test]
    fn what_the_peer_alone_has_closed_and_what_is_not_accepted_has_to_close() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listening = OwnedFd::from(listener.try_clone().unwrap());
        assert!(!is_to_be_closed(&listening), "nobody is there");
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        soon(|| is_to_be_closed(&listening));
        let ours = listener.accept().unwrap().0;
        let own = OwnedFd::from(ours.try_clone().unwrap());
        assert!(!is_to_be_closed(&listening) && !is_to_be_closed(&own));
        (&peer).write_all(b"said").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        soon(|| is_to_be_closed(&own));
        let this = Lender::of(std::process::id().cast_signed()).unwrap();
        assert!(this.has_to_close());
        ours.shutdown(Shutdown::Write).unwrap();
        assert!(!is_to_be_closed(&own), "closed at both ends");
        assert!(!is_to_be_closed(&OwnedFd::from(peer)));
    }
}
