//! Listening: one socket per service and worker, all on the same address, so that the kernel spreads connections
//! and no worker hands one to another.

pub(crate) mod hangup;
pub(crate) mod port;

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
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
    let listener = TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    while let Some(permit) = permit(&port, &permits, &mut connections).await {
        tokio::select! {
            biased;
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => start(&port, stream, client, permit, &mut connections),
                Err(error) => {
                    drop(permit);
                    pause_after(&port, &error).await;
                }
            },
            () = port.closing.closed() => break,
        }
    }
    // Who has been accepted by the kernel already would be reset by the close of the listener.
    while let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
        match poll_fn(|ctx| Poll::Ready(listener.poll_accept(ctx))).await {
            Poll::Ready(Ok((stream, client))) => {
                start(&port, stream, client, permit, &mut connections)
            }
            Poll::Ready(Err(_)) | Poll::Pending => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn permit(
    port: &Port,
    permits: &Arc<Semaphore>,
    connections: &mut JoinSet<()>,
) -> Option<OwnedSemaphorePermit> {
    // Forgets the connections that have ended.
    while connections.try_join_next().is_some() {}
    tokio::select! {
        biased;
        permit = Arc::clone(permits).acquire_owned() => permit.ok(),
        () = port.closing.closed() => None,
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
