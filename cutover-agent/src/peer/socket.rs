//! The one place where options of the peers' sockets are set.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A lost packet is no sign of a full link on the long paths we hop over: BBR goes by measured rate and round trip
/// instead, where the kernel has it (`modprobe tcp_bbr`).
const CONGESTION: &[u8] = b"bbr";
/// What may lie in the kernel without being sent. More would only bind frames to a stream that has no room for them,
/// while another one has.
const UNSENT_BYTES_MAX: u32 = 128 << 10;

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

/// Whether this network namespace makes a connection start slowly again after a pause. During a hop that costs the
/// frozen transfer several round trips: `sysctl net.ipv4.tcp_slow_start_after_idle=0` on both sites avoids it.
/// `None` when it cannot be read.
#[must_use]
pub fn slows_down_after_idle() -> Option<bool> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_slow_start_after_idle").ok()?;
    Some(text.trim() != "0")
}
