//! Listening: one socket per service and worker, all on the same address, so that the kernel spreads connections
//! and no worker hands one to another.

pub(crate) mod hangup;
pub(crate) mod port;

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::config::Protocol;
use port::Port;

/// Connections the kernel keeps for us before it turns the next away; it caps this at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Pause after the system refused to give us a connection, mostly for want of open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Binds one listener a worker. Port zero lets the kernel choose one port for all of them.
pub(crate) fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<StdListener>> {
    if address.port() != 0 {
        // With SO_REUSEPORT a second proxy of the same user would silently take half of our clients; without it
        // the kernel says that the address is taken.
        let probe = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(SocketProtocol::TCP),
        )?;
        probe.set_reuse_address(true)?;
        probe.bind(&address.into())?;
    }
    let first = bind_one(address)?;
    let chosen = first.local_addr()?;
    let mut listeners = vec![first];
    for _ in 1..workers {
        listeners.push(bind_one(chosen)?);
    }
    Ok(listeners)
}

fn bind_one(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(SocketProtocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    // Accepted sockets inherit both: no call per connection.
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
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
    listener: StdListener,
    permits: Arc<Semaphore>,
) -> io::Result<()> {
    let listener = watch(listener.into())?;
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
            Ok((stream, client, permit)) => start(&port, stream, client, permit, &mut connections),
            Err(error) => pause_after(&port, &error).await,
        }
    }
    // Who has been accepted by the kernel already would be reset by the close of the listener.
    while let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
        match accept(&listener) {
            Ok(Some((stream, client))) => start(&port, stream, client, permit, &mut connections),
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
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    loop {
        let mut ready = listener.readable().await?;
        let permit = Arc::clone(permits)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        match accept(listener)? {
            Some((stream, client)) => return Ok((stream, client, permit)),
            None => ready.clear_ready(),
        }
    }
}

/// Takes a client off the kernel's queue, if there is one.
fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    match acceptfrom_with(listener.get_ref(), flags) {
        Ok((socket, Some(client))) => {
            let client = SocketAddr::try_from(client)?;
            Ok(Some((TcpStream::from_std(socket.into())?, client)))
        }
        Ok((_, None)) => Err(io::ErrorKind::ConnectionAborted.into()),
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
    stream: TcpStream,
    client: SocketAddr,
    permit: OwnedSemaphorePermit,
    connections: &mut JoinSet<()>,
) {
    let port = Rc::clone(port);
    connections.spawn_local(async move {
        match port.service.config.protocol {
            Protocol::Http => crate::http::connection::serve(port, stream, client).await,
            Protocol::Tcp => crate::tcp::serve(port, stream, client).await,
        }
        drop(permit);
    });
}
