//! How much a session matters beside everything else on the same link, and which of its sockets have to say so. What a
//! priority means to the kernel and to the network is in `socket.rs`; nothing here sends or waits.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::socket::{self, Load};

/// How much what a session sends matters beside other traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Priority {
    /// Less than anything: the application runs, and its clients share the link with us.
    #[default]
    Background,
    /// More than anything: clients are held until it has arrived.
    Urgent,
}

/// The open sockets of a session, and the priority they have.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    priority: Priority,
    open: Vec<(OwnedFd, Load)>,
    is_over: bool,
}

impl Sockets {
    /// Gives a socket the priority of now, and each later one until [`Self::close`].
    pub(super) fn add(&self, socket: &impl AsFd, load: Load) {
        let socket = socket.as_fd();
        let mut state = self.state();
        socket::mark(socket, load, state.priority);
        // A connection is closed only with its last descriptor, so none is kept when the session has ended.
        if !state.is_over {
            match socket.try_clone_to_owned() {
                Ok(socket) => state.open.push((socket, load)),
                Err(error) => tracing::debug!(%error, "a connection keeps its first priority"),
            }
        }
    }

    /// Gives this priority to all of them, and to those to come.
    pub(super) fn set(&self, priority: Priority) {
        let mut state = self.state();
        if state.priority == priority {
            return;
        }
        state.priority = priority;
        for (socket, load) in &state.open {
            socket::mark(socket.as_fd(), *load, priority);
        }
    }

    pub(super) fn priority(&self) -> Priority {
        self.state().priority
    }

    /// Lets go of them: the session has ended.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_over = true;
        state.open.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

    use socket2::SockRef;

    use super::*;

    /// Both ends of a connection on the loopback of an address family.
    fn pair(addr: SocketAddr) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(addr).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn families() -> [SocketAddr; 2] {
        [
            (Ipv4Addr::LOCALHOST, 0).into(),
            (Ipv6Addr::LOCALHOST, 0).into(),
        ]
    }

    /// The traffic class of what a socket sends, and its place in the queues of this host.
    fn marks(stream: &TcpStream) -> (u32, u32) {
        let socket = SockRef::from(stream);
        let class = if stream.local_addr().unwrap().is_ipv4() {
            socket.tos_v4()
        } else {
            socket.tclass_v6()
        };
        (class.unwrap(), socket.priority().unwrap())
    }

    #[test]
    fn bulk_is_lower_effort_in_the_background_and_first_when_it_is_urgent() {
        for family in families() {
            let ((bulk, far), (control, _)) = (pair(family), pair(family));
            let sockets = Sockets::default();
            sockets.add(&bulk, Load::Bulk);
            sockets.add(&control, Load::Control);
            assert_eq!((marks(&bulk), marks(&control)), ((0x04, 1), (0, 0)));
            sockets.set(Priority::Urgent);
            assert_eq!((marks(&bulk), marks(&control)), ((0, 6), (0, 6)));
            sockets.set(Priority::Background);
            assert_eq!((marks(&bulk), marks(&control)), ((0x04, 1), (0, 0)));
            assert_eq!(marks(&far), (0, 0), "the other end is its own affair");
        }
    }

    #[test]
    fn a_socket_that_comes_later_has_the_priority_of_then() {
        for family in families() {
            let (bulk, _far) = pair(family);
            let sockets = Sockets::default();
            sockets.set(Priority::Urgent);
            sockets.add(&bulk, Load::Bulk);
            assert_eq!(marks(&bulk), (0, 6));
        }
    }

    #[test]
    fn a_connection_ends_with_its_session() {
        let sockets = Sockets::default();
        let [early, late] = families().map(pair);
        sockets.add(&early.0, Load::Bulk);
        sockets.close();
        sockets.add(&late.0, Load::Bulk);
        for (near, mut far) in [early, late] {
            drop(near);
            assert_eq!(far.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn what_is_no_connection_is_left_as_it_is() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let sockets = Sockets::default();
        sockets.add(&near, Load::Bulk);
        sockets.set(Priority::Urgent);
    }
}
