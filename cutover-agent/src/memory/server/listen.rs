//! Where CRIU connects: a port of the loopback, open for one dump, to processes of our own user only.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::super::MemoryError;
use super::is_silent_for;

/// How long a wait that was given up may go on.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A port that waits for CRIU.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: TcpListener,
    addr: SocketAddrV4,
}

impl Listener {
    /// Listens on a port that the kernel chooses.
    ///
    /// # Errors
    /// When there is no loopback.
    pub(crate) fn bind() -> Result<Self, MemoryError> {
        let bind = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            match listener.local_addr()? {
                SocketAddr::V4(addr) => Ok(Self { listener, addr }),
                SocketAddr::V6(_) => Err(ErrorKind::AddrNotAvailable.into()),
            }
        };
        bind().map_err(MemoryError::Listen)
    }

    /// Where.
    pub(crate) const fn addr(&self) -> SocketAddrV4 {
        self.addr
    }

    /// Waits for CRIU until `is_given_up` says that it will not come any more, at most `limit`. Strangers are closed.
    ///
    /// # Errors
    /// When nobody came.
    pub(crate) fn accept(
        &self,
        limit: Duration,
        is_given_up: impl Fn() -> bool,
    ) -> Result<TcpStream, MemoryError> {
        let deadline = Instant::now() + limit;
        while !is_given_up() && Instant::now() < deadline {
            match self.listener.accept() {
                Ok((stream, SocketAddr::V4(peer))) if is_ours(peer, self.addr) => {
                    stream.set_nonblocking(false).map_err(MemoryError::Listen)?;
                    stream.set_nodelay(true).map_err(MemoryError::Listen)?;
                    return Ok(stream);
                }
                Ok((_, peer)) => {
                    tracing::warn!(%peer, "a stranger at the page server was sent away")
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // Somebody or nobody: both are looked at again.
                    is_silent_for(&self.listener, LOOK_EVERY);
                }
                Err(error) => return Err(MemoryError::Listen(error)),
            }
        }
        Err(MemoryError::NoDump)
    }
}

/// Whether the other end belongs to our own user, by the kernel's table of this network namespace.
fn is_ours(peer: SocketAddrV4, server: SocketAddrV4) -> bool {
    let user = rustix::process::geteuid().as_raw();
    socket_of(peer, server).is_some_and(|socket| socket.user == user)
}

/// A socket of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owned {
    /// The user who made it.
    user: u32,
    /// Its number among all sockets.
    pub(super) inode: u64,
}

/// The socket with these ends, by the kernel's table of this network namespace.
pub(super) fn socket_of(local: SocketAddrV4, remote: SocketAddrV4) -> Option<Owned> {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap_or_default();
    find(&table, local, remote)
}

/// The socket with these ends, in the table of `proc_net_tcp(5)`.
fn find(table: &str, local: SocketAddrV4, remote: SocketAddrV4) -> Option<Owned> {
    let (local, remote) = (shown(local), shown(remote));
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_it = words.get(1) == Some(&local.as_str()) && words.get(2) == Some(&remote.as_str());
        let owned = || {
            Some(Owned {
                user: words.get(7)?.parse().ok()?,
                inode: words.get(9)?.parse().ok()?,
            })
        };
        is_it.then(owned).flatten()
    })
}

/// An address as that table writes it: the four bytes as one number of the machine, then the port.
fn shown(addr: SocketAddrV4) -> String {
    let number = u32::from_ne_bytes(addr.ip().octets());
    format!("{number:08X}:{:04X}", addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n\
        1: 0100007F:C001 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 2 1 0\n";

    #[test]
    fn the_owner_of_the_other_end_is_found() {
        let addr = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let owned = Owned {
            user: 1000,
            inode: 2,
        };
        assert_eq!(find(TABLE, addr(0xc001), addr(0x1f90)), Some(owned));
        assert_eq!(find(TABLE, addr(0x1f90), addr(0xc001)), None);
        assert_eq!(find("", addr(1), addr(2)), None);
    }

    #[test]
    fn our_own_connection_is_let_in() {
        let listener = Listener::bind().unwrap();
        let _near = TcpStream::connect(listener.addr()).unwrap();
        assert!(listener.accept(Duration::from_secs(10), || false).is_ok());
    }

    #[test]
    fn nobody_is_waited_for_once_it_was_given_up() {
        let listener = Listener::bind().unwrap();
        let waited = listener.accept(Duration::from_secs(3600), || true);
        assert!(matches!(waited, Err(MemoryError::NoDump)), "{waited:?}");
    }
}
