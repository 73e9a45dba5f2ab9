//! A non-blocking stream socket, TCP or unix, in the worker's reactor.
//!
//! It spends as few system calls as the kernel's rules allow. Readiness is edge-triggered: a read that did not fill
//! its room has emptied the socket, and whatever comes later makes a new edge, so the reactor is told "not ready"
//! at once instead of being shown an EAGAIN first (epoll(7), "Questions and answers", 9). Writes go straight to the
//! kernel and ask the reactor only after an EAGAIN. The reactor learns of a socket when somebody first waits for it:
//! a connection that brings its request along and ends with its answer never does. It forgets a sender whose bytes
//! cannot be passed on, until somebody waits for it again. Reads and writes share `&self`: one task serves both ways.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How much a look at what has arrived has shown.
#[derive(Debug)]
pub(crate) enum Look<T> {
    /// Enough.
    Seen(T),
    /// Not enough yet.
    Further,
}

/// What is known of a socket without asking the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hearsay {
    /// The reactor would have told of bytes, the end or an error, a turn of its loop ago at the latest.
    Silent,
    /// The reactor has told of something, which may have been read since.
    Readable,
    /// The reactor does not know the socket.
    None,
}

/// A connected stream socket.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Dropped before the file it watches.
    watch: RefCell<Option<AsyncFd<Watched>>>,
    /// A write waits for room, and the reactor is to tell of it.
    wants_room: Cell<bool>,
    /// A read has emptied the socket, and the reactor does not know it yet: it will tell of what has come since.
    emptied: Cell<bool>,
    /// What is written now waits in the kernel for what follows.
    more_follows: Cell<bool>,
    fd: OwnedFd,
}

/// The number of a file that its [`Socket`] keeps open.
#[derive(Debug)]
struct Watched(RawFd);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Socket {
    /// Takes over a connected, non-blocking socket.
    pub(crate) const fn new(fd: OwnedFd) -> Self {
        Self {
            watch: RefCell::new(None),
            wants_room: Cell::new(false),
            emptied: Cell::new(false),
            more_follows: Cell::new(false),
            fd,
        }
    }

    /// Asks the reactor, which tells of what is there already as of something new. Must be called inside a runtime.
    fn ask(
        &self,
        question: impl FnOnce(&AsyncFd<Watched>) -> Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        let mut watch = self.watch.borrow_mut();
        let watch = match &mut *watch {
            Some(watch) => watch,
            none => {
                let both = Interest::READABLE | Interest::WRITABLE;
                let watched = Watched(self.fd.as_raw_fd());
                // SAFETY: the number names this open file until the OwnedFd is dropped, and the AsyncFd is dropped
                // before it.
                let new = unsafe { AsyncFd::register_with_interest(watched, both) }?;
                none.insert(new)
            }
        };
        question(watch)
    }

    /// Has the reactor forget the socket until somebody waits for it again: each packet that comes while none can be
    /// passed on would be an edge, and wake the worker for nothing. Left as it is while a write waits for room here.
    pub(crate) fn unwatch(&self) {
        if !self.wants_room.get() {
            self.emptied.set(false);
            self.watch.borrow_mut().take();
        }
    }

    /// Connects to a TCP address, with small writes sent at once.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let fd = new_socket(family)?;
        // Without it a small body behind a head waits for an acknowledgement that the peer delays.
        rustix::net::sockopt::set_tcp_nodelay(&fd, true)?;
        let begun = rustix::net::connect(&fd, &address);
        Self::connected(fd, begun).await
    }

    /// Connects to a unix socket. A full backlog there is an error at once, as the kernel has no queue to wait in.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(crate) async fn connect_unix(path: &Path) -> io::Result<Self> {
        let fd = new_socket(AddressFamily::UNIX)?;
        let begun = rustix::net::connect(&fd, &SocketAddrUnix::new(path)?);
        Self::connected(fd, begun).await
    }

    async fn connected(fd: OwnedFd, begun: rustix::io::Result<()>) -> io::Result<Self> {
        let waits = match begun {
            Ok(()) => false,
            Err(Errno::INPROGRESS) => true,
            Err(errno) => return Err(errno.into()),
        };
        let socket = Self::new(fd);
        if waits {
            poll_fn(|context| socket.poll_writable(context)).await?;
            rustix::net::sockopt::socket_error(&socket)??;
        }
        Ok(socket)
    }

    /// Reads what is there. `WouldBlock` when nothing is known to be there.
    pub(crate) fn try_read(&self, room: &mut [u8]) -> io::Result<usize> {
        let mut short = None;
        let read = self.try_with_readable(|fd| {
            match recv(fd, room)? {
                // To the reactor the emptied socket is not ready; its end or an error, which stay, are.
                count if count > 0 && count < room.len() => {
                    short = Some(count);
                    Err(io::ErrorKind::WouldBlock.into())
                }
                count => Ok(count),
            }
        });
        short.map_or(read, Ok)
    }

    /// Runs an operation that reads, unless nothing is known to be there; its `WouldBlock` means that nothing is left.
    pub(crate) fn try_with_readable<T>(
        &self,
        operation: impl FnOnce(&OwnedFd) -> io::Result<T>,
    ) -> io::Result<T> {
        if let Some(watch) = &*self.watch.borrow() {
            return watch.try_io(Interest::READABLE, |_| operation(&self.fd));
        }
        if self.emptied.get() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let done = operation(&self.fd);
        let emptied = matches!(&done, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        self.emptied.set(emptied);
        done
    }

    /// Shows what has arrived to `examine`, again after each arrival, until it has seen enough; nothing is taken off
    /// the connection. It must have seen enough by the time the room is full.
    ///
    /// # Errors
    /// What the socket says; `UnexpectedEof` when the peer finishes first.
    ///
    /// # Cancel safety
    /// Yes.
    pub(crate) async fn look<T>(
        &self,
        room: &mut [u8],
        mut examine: impl FnMut(&[u8]) -> Look<T>,
    ) -> io::Result<T> {
        let mut seen = 0;
        loop {
            poll_fn(|context| self.poll_readable(context)).await?;
            let looked = self.try_with_readable(|fd| {
                let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
                let (count, _) = rustix::net::recv(fd, &mut *room, flags)?;
                // The same bytes again: the next edge brings more. An end brings none, and stays.
                if count == seen && count > 0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(count)
            });
            match looked {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    seen = count;
                    if let Look::Seen(done) = examine(&room[..count]) {
                        return Ok(done);
                    }
                }
                // Nothing new, and still something to read: the end.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && self.hearsay() == Hearsay::Readable =>
                {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what is there without asking the reactor first: right for a socket so new that the reactor cannot know.
    pub(crate) fn read_now(&self, room: &mut [u8]) -> io::Result<usize> {
        let read = recv(&self.fd, room);
        self.emptied.set(match &read {
            Ok(count) => *count > 0 && *count < room.len(),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        });
        read
    }

    /// Writes as much of the slices as the kernel takes. `WouldBlock` when it takes nothing.
    pub(crate) fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let more = if self.more_follows.get() {
            SendFlags::MORE
        } else {
            SendFlags::empty()
        };
        self.try_with_room(|fd| send(fd, slices, SendFlags::NOSIGNAL | more))
    }

    /// Announces that more follows at once what is written next, so that TCP fills its packets (send(2), MSG_MORE). The
    /// promise is kept by a splice, or taken back by [`Socket::push`]: the kernel would wait for 200 ms.
    pub(crate) fn announce_more(&self) {
        self.more_follows.set(true);
    }

    /// Nothing follows for now: what waits for it is sent.
    pub(crate) fn push(&self) {
        if self.more_follows.replace(false) {
            // Setting the option sends what waits (tcp(7)). Only TCP makes anything wait.
            rustix::net::sockopt::set_tcp_nodelay(&self.fd, true).ok();
        }
    }

    /// Splices something to the socket, which sends what waits for it, too.
    pub(crate) fn try_splice(
        &self,
        splice: impl FnOnce(&OwnedFd) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let count = self.try_with_room(splice)?;
        self.more_follows.set(false);
        Ok(count)
    }

    /// Runs an operation that writes; its `WouldBlock` means that the socket has no room.
    fn try_with_room<T>(&self, operation: impl FnOnce(&OwnedFd) -> io::Result<T>) -> io::Result<T> {
        let done = operation(&self.fd);
        let is_full = matches!(&done, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        if let (true, Some(watch)) = (is_full, &*self.watch.borrow()) {
            // The reactor may have heard of room that is used up now. Room that comes later makes a new edge.
            drop(watch.try_io(Interest::WRITABLE, |_| {
                Err::<(), _>(io::ErrorKind::WouldBlock.into())
            }));
        }
        done
    }

    /// Completes when a read may bring something: bytes, the end, or an error.
    pub(crate) fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ask(|watch| watch.poll_read_ready(context).map_ok(drop))
    }

    /// Whether the reactor knows of something to read: bytes, the end, or an error. No system call.
    pub(crate) fn hearsay(&self) -> Hearsay {
        match &*self.watch.borrow() {
            None => Hearsay::None,
            Some(watch) if watch.try_io(Interest::READABLE, |_| Ok(())).is_ok() => {
                Hearsay::Readable
            }
            Some(_) => Hearsay::Silent,
        }
    }

    /// Completes when the kernel may take bytes again. Only worth calling after a `WouldBlock`.
    pub(crate) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let room = self.ask(|watch| watch.poll_write_ready(context).map_ok(drop));
        self.wants_room.set(room.is_pending());
        room
    }

    /// Tells the peer that nothing more will come.
    pub(crate) fn finish(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self, Shutdown::Write)?)
    }

    /// Whether the peer has sent bytes that are still in the kernel. Does not look at a closed end.
    pub(crate) fn has_unread(&self) -> bool {
        matches!(self.peek(), Ok(1..))
    }

    /// Neither closed nor talking. Asks the kernel, not the reactor: the answer is as fresh as can be.
    pub(crate) fn is_silent(&self) -> bool {
        let silent = self.peek() == Err(Errno::AGAIN);
        if let (true, Some(watch)) = (silent, &*self.watch.borrow()) {
            // So that the reactor need not be doubted the next time. What comes later makes a new edge.
            drop(watch.try_io(Interest::READABLE, |_| {
                Err::<(), _>(io::ErrorKind::WouldBlock.into())
            }));
        }
        silent
    }

    fn peek(&self) -> rustix::io::Result<usize> {
        let mut byte = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        rustix::net::recv(self, &mut byte, flags).map(|(count, _)| count)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        family,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

fn recv(fd: &OwnedFd, room: &mut [u8]) -> io::Result<usize> {
    let (count, _) =
        rustix::io::retry_on_intr(|| rustix::net::recv(fd, &mut *room, RecvFlags::empty()))?;
    Ok(count)
}

/// One slice is cheaper to send than several.
fn send(fd: &OwnedFd, slices: &[IoSlice<'_>], flags: SendFlags) -> io::Result<usize> {
    let sent = rustix::io::retry_on_intr(|| match slices {
        [one] => rustix::net::send(fd, one, flags),
        several => rustix::net::sendmsg(fd, several, &mut SendAncillaryBuffer::default(), flags),
    });
    Ok(sent?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// Our end of a connection, and the peer's.
    fn connection() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nonblocking(true).unwrap();
        (Socket::new(accepted.into()), peer)
    }

    /// Writes after an announcement; whether that waits, and what comes after a push.
    fn announce() -> (bool, Vec<u8>) {
        let (socket, mut peer) = connection();
        rustix::net::sockopt::set_tcp_nodelay(&socket, true).unwrap();
        socket.announce_more();
        socket.try_write(&[IoSlice::new(b"one")]).unwrap();
        peer.set_nonblocking(true).unwrap();
        let mut room = [0; 16];
        let waits = peer.read(&mut room).is_err();
        socket.push();
        socket.try_write(&[IoSlice::new(b"two")]).unwrap();
        socket.finish().unwrap();
        peer.set_nonblocking(false).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).unwrap();
        (waits, rest)
    }

    #[tokio::test]
    async fn a_forgotten_socket_tells_again_of_what_came_before_and_after_somebody_waits_for_it() {
        let (socket, mut peer) = connection();
        let mut room = [0; 16];
        for piece in [&b"before"[..], b"after"] {
            poll_fn(|context| Poll::Ready(socket.poll_readable(context).is_pending())).await;
            socket.unwatch();
            assert_eq!(socket.hearsay(), Hearsay::None);
            peer.write_all(piece).unwrap();
            poll_fn(|context| socket.poll_readable(context))
                .await
                .unwrap();
            assert_eq!(socket.try_read(&mut room).unwrap(), piece.len());
        }
    }

    #[tokio::test]
    async fn a_socket_is_not_forgotten_while_a_write_waits_for_room() {
        let (socket, mut peer) = connection();
        while socket.try_write(&[IoSlice::new(&[0; 65_536])]).is_ok() {}
        let is_full =
            poll_fn(|context| Poll::Ready(socket.poll_writable(context).is_pending())).await;
        socket.unwatch();
        assert_eq!(socket.hearsay() == Hearsay::None, !is_full);
        let reading = std::thread::spawn(move || io::copy(&mut peer, &mut io::sink()));
        poll_fn(|context| socket.poll_writable(context))
            .await
            .unwrap();
        socket.unwatch();
        assert_eq!(socket.hearsay(), Hearsay::None);
        drop(socket);
        assert!(reading.join().unwrap().unwrap() > 0);
    }

    #[test]
    fn what_more_is_announced_for_waits_until_it_is_pushed() {
        // The kernel waits for 200 ms; a machine that stands still for longer in every attempt is broken.
        let waited = (0..50).any(|_| {
            let (waits, rest) = announce();
            assert!(!waits || rest == b"onetwo");
            waits
        });
        assert!(waited);
    }
}
