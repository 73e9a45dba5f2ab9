//! Listening sockets as a whole: made once, found again by their place when a configuration is read anew or another
//! process takes over, and closed without turning anybody away who has been let in by the kernel.
//!
//! A socket's open file is shared by everybody who holds a descriptor of it, also in another process; so is its
//! queue. It is closed when the last of them is. Nothing here accepts: that is a worker's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cutover_protocol::id::ServiceName;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol as SocketProtocol, SockAddr, SockFilter, SockRef, Socket, Type};

use crate::config::ListenAddress;

/// Connections the kernel keeps for us before it turns the next away; it caps this at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// What comes in at a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// Connections.
    Stream,
    /// Packets: QUIC.
    Datagram,
}

/// The name of a listener's sockets: two configurations that name the same place mean the same sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) kind: Kind,
    pub(crate) address: ListenAddress,
    /// A port that the kernel chose belongs to whoever asked for it, and is found again by that.
    pub(crate) of: Option<Asker>,
}

/// Who asked for a port of the kernel's choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asker {
    /// `None` for the metrics.
    pub(crate) service: Option<ServiceName>,
    /// Its how-manieth listener.
    pub(crate) turn: usize,
}

impl Place {
    pub(crate) fn new(kind: Kind, address: &ListenAddress, asker: Asker) -> Self {
        let any_port = matches!(address, ListenAddress::Tcp(address) if address.port() == 0);
        Self {
            kind,
            address: address.clone(),
            of: any_port.then_some(asker),
        }
    }
}

/// Who else keeps a socket, and with it the clients that wait in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Keeper {
    /// Nobody but the proxy.
    Us,
    /// The supervisor that gave it to us: it outlives us.
    Supervisor,
}

/// All sockets of one place.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) place: Place,
    pub(crate) keeper: Keeper,
    /// With the port the kernel chose; `None` for a unix socket.
    pub(crate) address: Option<SocketAddr>,
    /// Among whom the sockets are parted.
    workers: usize,
    /// Each until it is let go of.
    sockets: Mutex<Vec<Option<OwnedFd>>>,
}

impl Bound {
    /// Binds as many sockets as there are workers. `may_share` says that another listener of this process has the
    /// port already, on another address.
    pub(crate) fn open(place: Place, workers: usize, may_share: bool) -> io::Result<Self> {
        let sockets = match &place.address {
            ListenAddress::Tcp(address) => bind_ip(place.kind, *address, workers, may_share)?,
            ListenAddress::Unix(path) => vec![bind_unix(path)?],
        };
        Self::around(place, Keeper::Us, sockets, workers)
    }

    /// Takes over sockets that listen already.
    pub(crate) fn inherit(
        place: Place,
        keeper: Keeper,
        sockets: Vec<OwnedFd>,
        workers: usize,
    ) -> io::Result<Self> {
        for socket in &sockets {
            let socket = SockRef::from(socket);
            socket.set_nonblocking(true)?;
            socket.set_cloexec(true)?;
            if place.kind == Kind::Stream && matches!(place.address, ListenAddress::Tcp(_)) {
                set_options(&socket)?;
            }
        }
        Self::around(place, keeper, sockets, workers)
    }

    /// Every worker gets a socket: where there are too few, one of its own if the kernel gives it, or else a share
    /// in one.
    fn around(
        place: Place,
        keeper: Keeper,
        mut sockets: Vec<OwnedFd>,
        workers: usize,
    ) -> io::Result<Self> {
        let address = sockets.first().and_then(bound_address);
        for turn in sockets.len()..workers {
            let own = match address {
                Some(address) if keeper == Keeper::Us => bind_one(place.kind, address).ok(),
                _ => None,
            };
            let shared = || sockets[turn % sockets.len()].try_clone();
            let socket = own.map_or_else(shared, Ok)?;
            sockets.push(socket);
        }
        Ok(Self {
            place,
            keeper,
            address,
            workers: workers.max(1),
            sockets: Mutex::new(sockets.into_iter().map(Some).collect()),
        })
    }

    /// A worker's part of the sockets, each in a descriptor of its own. A process that was handed more sockets than
    /// it has workers serves them all: nobody may wait in a queue that no one looks at.
    pub(crate) fn part_of(&self, worker: usize) -> io::Result<Vec<OwnedFd>> {
        let sockets = self.lock();
        let mine = sockets.iter().skip(worker).step_by(self.workers);
        mine.flatten().map(OwnedFd::try_clone).collect()
    }

    /// Lets go of a worker's part. Those of others stay: one that is slow to begin still finds whoever waits in its
    /// queue.
    pub(crate) fn release_part_of(&self, worker: usize) {
        let mut sockets = self.lock();
        let mine = sockets.iter_mut().skip(worker).step_by(self.workers);
        mine.for_each(|socket| *socket = None);
    }

    /// Descriptors of all sockets, for another process.
    pub(crate) fn all(&self) -> io::Result<Vec<OwnedFd>> {
        let sockets = self.lock();
        sockets.iter().flatten().map(OwnedFd::try_clone).collect()
    }

    /// Lets go of all sockets; workers close theirs by themselves.
    pub(crate) fn release(&self) {
        self.lock().clear();
    }

    /// Where it is, as a person would write it.
    pub(crate) fn shown(&self) -> ListenAddress {
        let chosen = self.address.map(ListenAddress::Tcp);
        chosen.unwrap_or_else(|| self.place.address.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a bound socket is, with the port the kernel chose. `None` for a unix socket.
pub(crate) fn bound_address(socket: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()
}

/// From now on the kernel drops connection attempts to this socket; who has begun one before may finish it. Without
/// this, who arrives between the last accept and the close would be let in and then reset.
pub(crate) fn turn_away(socket: &OwnedFd) -> io::Result<()> {
    // Classic BPF over the TCP header: load the byte of flags (offset 13), keep SYN and ACK, drop a SYN alone.
    let program = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x54, 0, 0, 0x12),
        SockFilter::new(0x15, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    SockRef::from(socket).attach_filter(&program)
}

fn bind_ip(
    kind: Kind,
    address: SocketAddr,
    workers: usize,
    may_share: bool,
) -> io::Result<Vec<OwnedFd>> {
    if address.port() != 0 && !may_share {
        // With SO_REUSEPORT a second proxy of the same user would silently take half of our clients; without it
        // the kernel says that the address is taken.
        let probe = new_socket(kind, address)?;
        probe.bind(&address.into())?;
    }
    let first = bind_one(kind, address)?;
    let chosen = bound_address(&first).unwrap_or(address);
    let mut sockets = vec![first];
    for _ in 1..workers {
        sockets.push(bind_one(kind, chosen)?);
    }
    Ok(sockets)
}

fn new_socket(kind: Kind, address: SocketAddr) -> io::Result<Socket> {
    let (kind, protocol) = match kind {
        Kind::Stream => (Type::STREAM, SocketProtocol::TCP),
        Kind::Datagram => (Type::DGRAM, SocketProtocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if kind == Type::STREAM {
        // For UDP it would let a second process take our packets.
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        // A listener is what its address says, whatever net.ipv6.bindv6only is: IPv4 has a listener of its own.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn bind_one(kind: Kind, address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(kind, address)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    if kind == Kind::Stream {
        set_options(&socket)?;
    }
    socket.bind(&address.into())?;
    if kind == Kind::Stream {
        socket.listen(BACKLOG)?;
    }
    Ok(socket.into())
}

/// Accepted sockets inherit these: no call per connection.
fn set_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)
}

/// A socket file that nobody listens on is left over from a process that was killed, and goes.
fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    match Socket::new(Domain::UNIX, Type::STREAM, None)?.connect(&address) {
        Ok(()) => return Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
        }
        // Not there, or not ours to reach: the bind below says which.
        Err(_) => {}
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_worker_that_is_slow_to_begin_finds_its_queue_when_another_has_ended_already() {
        let address = ListenAddress::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
        let asker = Asker {
            service: None,
            turn: 0,
        };
        let place = Place::new(Kind::Stream, &address, asker);
        let bound = Bound::open(place, 2, false).unwrap();
        bound.release_part_of(0);
        let client = TcpStream::connect(bound.address.unwrap()).unwrap();
        assert!(bound.part_of(0).unwrap().is_empty());
        let mut slow = bound.part_of(1).unwrap();
        let queue = std::net::TcpListener::from(slow.remove(0));
        queue.set_nonblocking(false).unwrap();
        let (_, met) = queue.accept().unwrap();
        assert_eq!(met, client.local_addr().unwrap());
    }
}
