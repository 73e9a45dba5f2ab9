//! The one place where options of the peers' sockets are set.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use socket2::{Domain, SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use super::Priority;

/// A lost packet is no sign of a full link on the long paths we hop over: BBR goes by measured rate and round trip
/// instead, where the kernel has it (`modprobe tcp_bbr`).
const CONGESTION: &[u8] = b"bbr";
/// What may lie in the kernel without being sent. More would only bind frames to a stream that has no room for them,
/// while another one has.
const UNSENT_BYTES_MAX: u32 = 128 << 10;

/// DSCP 000001, "Lower Effort" (RFC 8622), in the upper six bits of the byte that carries it: whoever heeds it sends these
/// packets when there is nothing else to send, and whoever does not sends them as any others.
const LOWER_EFFORT: u32 = 0b00_0001 << 2;
const DEFAULT_CLASS: u32 = 0;

// linux/pkt_sched.h. pfifo_fast, prio (tc-prio(8)) and fq send 6 first and 1 last unless they are told otherwise. Not 2,
// "bulk", although these treat it as 1: where a VLAN or a radio takes the number over, 802.1Q has it above the default.
const BEST_EFFORT: u32 = 0;
const FILLER: u32 = 1;
const INTERACTIVE: u32 = 6;

/// What a connection of a session carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Requests, lists and signs of life: little, and the session ends when it is late.
    Control,
    /// Frames.
    Bulk,
}

/// Prepares a connection for requests and bulk alike.
///
/// Buffers are left to the kernel: it grows them up to `tcp_rmem`/`tcp_wmem` (megabytes), while a size set by hand is
/// cut to `rmem_max` and switches the growing off.
pub(super) fn prepare(stream: &TcpStream, dead_after: Duration) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    // Where the kernel lacks either, connections work as ever, only slower over links that lose packets.
    let _ = socket.set_tcp_congestion(CONGESTION);
    let _ = socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
    socket.set_tcp_user_timeout(Some(dead_after))?;
    let probe = (dead_after / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(probe).with_interval(probe))
}

/// Tells the kernel how much the packets of a connection matter: to the networks on their way by the DSCP, to the queues of
/// this host by SO_PRIORITY. Both go for whatever is sent from now on. Where one is refused, the connection works as ever.
pub(super) fn mark(socket: BorrowedFd<'_>, load: Load, priority: Priority) {
    let (class, queue) = match (priority, load) {
        (Priority::Urgent, _) => (DEFAULT_CLASS, INTERACTIVE),
        (Priority::Background, Load::Bulk) => (LOWER_EFFORT, FILLER),
        (Priority::Background, Load::Control) => (DEFAULT_CLASS, BEST_EFFORT),
    };
    let socket = SockRef::from(&socket);
    // IP_TOS comes first, for it sets a priority of its own. It counts also for IPv4 through a socket of IPv6.
    let marked = socket
        .set_tos_v4(class)
        .and_then(|()| match socket.domain()? {
            Domain::IPV6 => socket.set_tclass_v6(class),
            _ => Ok(()),
        });
    let outcomes: [std::io::Result<()>; 2] = [marked, socket.set_priority(queue)];
    for error in outcomes.into_iter().filter_map(Result::err) {
        tracing::debug!(?priority, %error, "a connection is not marked");
    }
}

/// Whether this network namespace makes a connection start slowly again after a pause. During a hop that costs the
/// frozen transfer several round trips: `sysctl net.ipv4.tcp_slow_start_after_idle=0` on both sites avoids it.
/// `None` when it cannot be read.
#[must_use]
pub fn slows_down_after_idle() -> Option<bool> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_slow_start_after_idle").ok()?;
    Some(text.trim() != "0")
}
