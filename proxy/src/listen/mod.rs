//! Listening: one socket per listener and worker, all on the same address, so that the kernel spreads connections
//! and no worker hands one to another. A unix socket has no such spreading: its workers accept from one queue.

pub(crate) mod client;
pub(crate) mod hangup;
pub(crate) mod port;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol as SocketProtocol, SockAddr, Socket as Socket2, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::acme;
use crate::config::{ListenAddress, ListenConfig, Protocol};
use crate::stream::{Socket, Stream};
use crate::tls::profile::{Offer, Profile};
use crate::tls::stream::TlsStream;
use client::Client;
use port::Port;

/// Connections the kernel keeps for us before it turns the next away; it caps this at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Pause after the system refused to give us a connection, mostly for want of open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// One worker's socket of one listener.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) config: ListenConfig,
    /// What clients meet before the protocol, if they speak TLS.
    pub(crate) tls: Option<Arc<Profile>>,
    pub(crate) socket: OwnedFd,
}

/// What all connections of a listener share.
#[derive(Debug)]
struct Door {
    config: ListenConfig,
    tls: Option<Arc<Profile>>,
}

/// Binds one listener a worker. Port zero lets the kernel choose one port for all of them.
pub(crate) fn bind(address: &ListenAddress, workers: usize) -> io::Result<Vec<OwnedFd>> {
    match address {
        ListenAddress::Tcp(address) => bind_tcp(*address, workers),
        ListenAddress::Unix(path) => bind_unix(path, workers),
    }
}

/// Where a bound TCP socket is, with the port the kernel chose. `None` for a unix socket.
pub(crate) fn bound_address(socket: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()
}

fn bind_tcp(address: SocketAddr, workers: usize) -> io::Result<Vec<OwnedFd>> {
    if address.port() != 0 {
        // With SO_REUSEPORT a second proxy of the same user would silently take half of our clients; without it
        // the kernel says that the address is taken.
        let probe = new_socket(address)?;
        probe.bind(&address.into())?;
    }
    let first = bind_one(address)?;
    let chosen = bound_address(&first).unwrap_or(address);
    let mut listeners = vec![first];
    for _ in 1..workers {
        listeners.push(bind_one(chosen)?);
    }
    Ok(listeners)
}

fn new_socket(address: SocketAddr) -> io::Result<Socket2> {
    let socket = Socket2::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(SocketProtocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // A listener is what its address says, whatever net.ipv6.bindv6only is: IPv4 has a listener of its own.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn bind_one(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(address)?;
    socket.set_reuse_port(true)?;
    // Accepted sockets inherit both: no call per connection.
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket file that nobody listens on is left over from a process that was killed, and goes.
fn bind_unix(path: &Path, workers: usize) -> io::Result<Vec<OwnedFd>> {
    let address = SockAddr::unix(path)?;
    let socket = Socket2::new(Domain::UNIX, Type::STREAM, None)?;
    match Socket2::new(Domain::UNIX, Type::STREAM, None)?.connect(&address) {
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
    let first = OwnedFd::from(socket);
    let mut listeners = Vec::new();
    for _ in 1..workers {
        listeners.push(first.try_clone()?);
    }
    listeners.push(first);
    Ok(listeners)
}

/// Lets the runtime say when a file becomes readable.
fn watch(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open file from here until it is dropped, inside the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) }?)
}

/// Accepts until the proxy closes, never more than there are permits: the others wait in the kernel. Returns when
/// the last connection has ended.
///
/// # Cancel safety
/// Dropping the future drops every connection of the port.
pub(crate) async fn serve(
    port: Rc<Port>,
    listener: Listener,
    permits: Arc<Semaphore>,
) -> io::Result<()> {
    let Listener {
        config,
        tls,
        socket,
    } = listener;
    let (door, listener) = (Rc::new(Door { config, tls }), watch(socket)?);
    let mut connections = JoinSet::new();
    loop {
        // Forgets the connections that have ended.
        while connections.try_join_next().is_some() {}
        let next = tokio::select! {
            biased;
            () = port.closing.closed() => break,
            next = next_client(&listener, &permits) => next,
        };
        match next {
            Ok((accepted, permit)) => start(&port, &door, accepted, permit, &mut connections),
            Err(error) => pause_after(&port, &error).await,
        }
    }
    // Who has been accepted by the kernel already would be reset by the close of the listener.
    while let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
        match accept(listener.get_ref()) {
            Ok(Some(accepted)) => start(&port, &door, accepted, permit, &mut connections),
            Ok(None) | Err(_) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Waits for a client first and for a permit then: a listener that nobody calls on must not keep one from the
/// others.
///
/// # Cancel safety
/// Nothing is taken off the kernel's queue until it returns.
async fn next_client(
    listener: &AsyncFd<OwnedFd>,
    permits: &Arc<Semaphore>,
) -> io::Result<(Accepted, OwnedSemaphorePermit)> {
    loop {
        let mut ready = listener.readable().await?;
        let permit = Arc::clone(permits)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        match accept(listener.get_ref())? {
            Some(accepted) => return Ok((accepted, permit)),
            None => ready.clear_ready(),
        }
    }
}

/// A connection as the kernel hands it over; the peer has an address unless it came by a unix socket.
type Accepted = (OwnedFd, Option<SocketAddr>);

/// Takes a client off the kernel's queue, if there is one.
fn accept(listener: &impl AsFd) -> io::Result<Option<Accepted>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    match acceptfrom_with(listener, flags) {
        Ok((socket, peer)) => {
            let address = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
            Ok(Some((socket, address)))
        }
        Err(Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

async fn pause_after(port: &Port, error: &io::Error) {
    // The client took it back: nothing is wrong with us.
    if error.kind() == io::ErrorKind::ConnectionAborted {
        return;
    }
    tracing::warn!(service = %port.service.name(), "cannot accept a connection, trying again shortly: {error}");
    tokio::time::sleep(ACCEPT_AGAIN).await;
}

fn start(
    port: &Rc<Port>,
    door: &Rc<Door>,
    (socket, address): Accepted,
    permit: OwnedSemaphorePermit,
    connections: &mut JoinSet<()>,
) {
    let (port, door) = (Rc::clone(port), Rc::clone(door));
    connections.spawn_local(async move {
        let client = address.map_or_else(Client::local, Client::new);
        match Socket::new(socket) {
            Ok(socket) => greet(port, &door, socket, client).await,
            Err(error) => tracing::warn!("cannot watch a new connection: {error}"),
        }
        drop(permit);
    });
}

/// What comes before the listener's protocol is done here.
async fn greet(port: Rc<Port>, door: &Door, socket: Socket, mut client: Client) {
    let stream = match &door.tls {
        None => Stream::Plain(socket),
        Some(profile) => match shake(&port, door, profile, socket).await {
            Some(stream) => {
                client.came_through_tls(stream.agreed());
                Stream::Tls(stream)
            }
            None => return,
        },
    };
    match port.service.config.protocol {
        Protocol::Http => crate::http::connection::serve(port, stream, client).await,
        // Its future is larger than an idle HTTP connection's, which would have to have room for it.
        Protocol::Tcp => Box::pin(crate::tcp::serve(port, stream, client)).await,
    }
}

/// Shakes hands, within the time a client has for its head. `None` where nothing is left to be served.
async fn shake(
    port: &Port,
    door: &Door,
    profile: &Profile,
    socket: Socket,
) -> Option<Box<TlsStream>> {
    let offer = match port.service.config.protocol {
        Protocol::Http => Offer::Http,
        Protocol::Tcp => Offer::Raw,
    };
    let limit = port.settings().limits.client_head_max;
    match TlsStream::accept(socket, &profile.server_config(offer), limit).await {
        // An authority has seen what it asked for.
        Ok(stream) if stream.agreed().protocol.as_deref() == Some(acme::ALPN) => {
            stream.finish();
            None
        }
        Ok(stream) => Some(Box::new(stream)),
        // Scanners and impatient clients: nothing that an operator has to hear of each time.
        Err(error) => {
            let listener = &door.config.address;
            tracing::debug!(%listener, profile = profile.name(), "no TLS session: {error}");
            None
        }
    }
}
