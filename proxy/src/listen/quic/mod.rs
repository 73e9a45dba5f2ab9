//! Listening for HTTP/3: one QUIC endpoint per listener and worker, on UDP sockets that share one address.
//!
//! From the first packet of a client to an established connection, which goes to [`h3`](crate::http::h3). A
//! connection needs a permit like any other. While many handshakes are under way, new clients have to prove their
//! address first (Retry). Nothing here knows of requests or holds; GOAWAY and the end of connections are
//! [`h3`](crate::http::h3)'s as well.

pub(crate) mod connection_id;
mod relay;
pub(crate) mod router;
pub(crate) mod secrets;
mod socket;
pub(crate) mod transport;

use std::cell::Cell;
use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{
    Connecting, Connection, Endpoint, Incoming, Runtime, ServerConfig, TokioRuntime, VarInt,
};
use socket2::SockRef;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::bound::Bound;
use super::client::Client;
use super::port::{Port, Settings};
use super::{Listening, Manner, take_seat};
use crate::config::Quic;
use crate::limit::Reason;
use crate::tls::profile::Offer;
use connection_id::{Generation, Place};
use relay::Outlet;
use router::{Inbox, Routed, Router, Succession};
use secrets::Secrets;
use socket::Demultiplexer;

/// What the kernel keeps for us while a worker is busy, if net.core.rmem_max lets it: 1,500 full packets.
const SOCKET_BUFFER_BYTES: usize = 2 * 1024 * 1024;
/// `H3_NO_ERROR` (RFC 9114, section 8.1).
const NO_ERROR: VarInt = VarInt::from_u32(0x100);
/// `H3_EXCESSIVE_LOAD` of the same section.
const EXCESSIVE_LOAD: VarInt = VarInt::from_u32(0x107);

/// The HTTP/3 side of a listener: its sockets, and what its workers share. It outlives reloads with its sockets.
#[derive(Debug)]
pub(crate) struct QuicListener {
    pub(crate) bound: Arc<Bound>,
    pub(crate) router: Arc<Router>,
    secrets: Secrets,
    /// In the order of the workers, until each takes its own.
    inboxes: Mutex<Vec<Option<Inbox>>>,
    /// One worker takes in what a successor passes on.
    inlets: Mutex<Option<mpsc::Receiver<UnixDatagram>>>,
    /// Workers that serve it, if only their last connections.
    serving: watch::Sender<usize>,
}

/// One worker's part in serving; ends when dropped.
struct Serves<'l>(&'l QuicListener);

impl<'l> Serves<'l> {
    fn begin(listener: &'l QuicListener) -> Self {
        listener.serving.send_modify(|workers| *workers += 1);
        Self(listener)
    }
}

impl Drop for Serves<'_> {
    fn drop(&mut self) {
        self.0.serving.send_modify(|workers| *workers -= 1);
    }
}

/// What one worker takes of it.
struct Share {
    inbox: Inbox,
    inlets: Option<mpsc::Receiver<UnixDatagram>>,
}

impl QuicListener {
    /// For so many workers; `predecessor` is what the process before us has handed over, if there was one.
    ///
    /// # Errors
    /// What a predecessor handed over is no socket.
    pub(crate) fn open(
        bound: Arc<Bound>,
        workers: usize,
        secrets: &Secrets,
        predecessor: Option<Succession>,
    ) -> io::Result<Self> {
        let (generation, outlet) = match predecessor {
            None => (Generation::first(), None),
            Some(Succession { generation, outlet }) => {
                (generation.next(), Some(Outlet::new(outlet)?))
            }
        };
        let codec = Arc::clone(&secrets.codec);
        let Routed {
            router,
            inboxes,
            inlets,
        } = Router::open(codec, generation, workers, outlet);
        Ok(Self {
            bound,
            router,
            secrets: secrets.clone(),
            inboxes: Mutex::new(inboxes.into_iter().map(Some).collect()),
            inlets: Mutex::new(Some(inlets)),
            serving: watch::Sender::new(0),
        })
    }

    /// The value of `Alt-Svc` (RFC 7838) that leads here, unless clients are not to be told.
    pub(crate) fn alt_svc(&self, quic: &Quic) -> Option<Rc<str>> {
        let port = self.bound.address?.port();
        let seconds = quic.alt_svc_ma_s;
        (seconds > 0).then(|| format!("h3=\":{port}\"; ma={seconds}").into())
    }

    /// Each worker asks once.
    fn share_of(&self, worker: usize) -> io::Result<Share> {
        let mut inboxes = self.inboxes.lock().unwrap_or_else(PoisonError::into_inner);
        let inbox = inboxes.get_mut(worker).and_then(Option::take);
        let mut inlets = self.inlets.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Share {
            inbox: inbox.ok_or(io::ErrorKind::AlreadyExists)?,
            inlets: inlets.take(),
        })
    }
}

/// Accepts until the listener ends, and returns when the last connection has ended.
///
/// # Cancel safety
/// Dropping the future drops every connection of the listener.
pub(crate) async fn serve(
    port: Rc<Port>,
    listening: Rc<Listening>,
    listener: Arc<QuicListener>,
    sockets: Vec<OwnedFd>,
    permits: Arc<Semaphore>,
) -> io::Result<()> {
    let Share { inbox, inlets } = listener.share_of(port.worker)?;
    let router = Arc::clone(&listener.router);
    let serves = Serves::begin(&listener);
    let takes_in = inlets.is_some();
    let mut helpers = JoinSet::new();
    if let Some(inlets) = inlets {
        helpers.spawn_local(take_in(inlets, Arc::clone(&router)));
    }
    let mut acceptor = Acceptor {
        terms: Terms {
            port: Rc::clone(&port),
            listening: Rc::clone(&listening),
            secrets: listener.secrets.clone(),
            current: None,
        },
        port: Rc::clone(&port),
        router,
        permits,
        handshakes: Rc::new(Cell::new(0)),
        connections: JoinSet::new(),
    };
    let server = acceptor.terms.now()?;
    let endpoint = open(&listener, sockets, inbox, port.worker, &server)?;
    let budget = &port.service.gate.budget;
    loop {
        // Forgets the connections that have ended.
        while acceptor.connections.try_join_next().is_some() {}
        tokio::select! {
            biased;
            manner = listening.ended() => {
                if manner != Manner::Leave {
                    // Its descriptors would keep the address taken when the last connection has ended.
                    listening.bound.release_part_of(port.worker);
                }
                break;
            }
            // Who knocks meanwhile asks again by himself, as QUIC has it.
            () = budget.accepts_again(), if !budget.accepts() => {}
            incoming = endpoint.accept(), if budget.accepts() => match incoming {
                Some(incoming) => acceptor.take(incoming).await,
                None => break,
            },
        }
    }
    acceptor.end(&endpoint).await;
    // The last acknowledgements; a client that gives none has had its answers.
    drop(timeout(port.settings().limits.linger_max, endpoint.wait_idle()).await);
    drop(serves);
    if takes_in {
        // What a successor passes on may be for connections of other workers.
        let mut serving = listener.serving.subscribe();
        drop(serving.wait_for(|workers| *workers == 0).await);
    }
    Ok(())
}

fn open(
    listener: &QuicListener,
    sockets: Vec<OwnedFd>,
    inbox: Inbox,
    worker: usize,
    server: &ServerConfig,
) -> io::Result<Endpoint> {
    let runtime = Arc::new(TokioRuntime);
    let mut wrapped = Vec::new();
    for socket in sockets {
        let known = SockRef::from(&socket);
        // The kernel may grant less; that is no reason not to start.
        known.set_recv_buffer_size(SOCKET_BUFFER_BYTES).ok();
        known.set_send_buffer_size(SOCKET_BUFFER_BYTES).ok();
        wrapped.push(runtime.wrap_udp_socket(UdpSocket::from(socket))?);
    }
    let router = Arc::clone(&listener.router);
    let place = Place {
        generation: router.generation(),
        worker: u16::try_from(worker).unwrap_or(u16::MAX),
    };
    let config = transport::endpoint_config(&listener.secrets, place);
    let socket = Demultiplexer::new(wrapped, worker, router, inbox)?;
    Endpoint::new_with_abstract_socket(config, Some(server.clone()), Arc::new(socket), runtime)
}

/// Takes in what successors pass on; each brings its own socket.
async fn take_in(mut inlets: mpsc::Receiver<UnixDatagram>, router: Arc<Router>) {
    let mut receiving = JoinSet::new();
    while let Some(inlet) = inlets.recv().await {
        let router = Arc::clone(&router);
        receiving.spawn_local(async move {
            if let Err(error) = relay::receive(inlet, router).await {
                tracing::warn!("datagrams that a successor passes on are lost: {error}");
            }
        });
    }
}

/// What new connections are told, made anew when the settings or the TLS profile have changed.
struct Terms {
    port: Rc<Port>,
    listening: Rc<Listening>,
    secrets: Secrets,
    current: Option<Made>,
}

struct Made {
    settings: Rc<Settings>,
    tls: Arc<rustls::ServerConfig>,
    server: Arc<ServerConfig>,
}

impl Terms {
    fn now(&mut self) -> io::Result<Arc<ServerConfig>> {
        let settings = self.port.settings();
        let door = self.listening.door();
        // The configuration has no HTTP/3 without a profile.
        let profile = door.tls.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let tls = profile.server_config(Offer::Http3);
        if let Some(made) = &self.current
            && Arc::ptr_eq(&made.tls, &tls)
            && Rc::ptr_eq(&made.settings, &settings)
        {
            return Ok(Arc::clone(&made.server));
        }
        let streams = &settings.limits.http2;
        let server = transport::server_config(&tls, &self.secrets, &settings.quic, streams);
        let server = Arc::new(server.map_err(io::Error::other)?);
        self.current = Some(Made {
            server: Arc::clone(&server),
            settings,
            tls,
        });
        Ok(server)
    }
}

/// Lets clients in.
struct Acceptor {
    port: Rc<Port>,
    router: Arc<Router>,
    permits: Arc<Semaphore>,
    terms: Terms,
    /// Under way now.
    handshakes: Rc<Cell<usize>>,
    connections: JoinSet<()>,
}

impl Acceptor {
    /// Answers a first packet: with a handshake, a Retry, or a refusal. Waits for a permit as listeners do; further
    /// clients wait in the endpoint meanwhile, as many as may shake hands at once.
    async fn take(&mut self, incoming: Incoming) {
        let counts = &self.router.counts;
        let under_way = self.handshakes.get();
        let settings = self.port.settings();
        if under_way >= settings.quic.handshakes_max {
            self.port.count_reason(Reason::Handshakes);
            return self.refuse(incoming);
        }
        // Only a look: who has not proved its address must not take a place of whoever has it.
        if take_seat(&self.port, &Client::new(incoming.remote_address())).is_err() {
            self.port.count_reason(Reason::AddressConnections);
            return self.refuse(incoming);
        }
        if under_way >= settings.quic.retry_from && !incoming.remote_address_validated() {
            counts.retried.fetch_add(1, Ordering::Relaxed);
            // An unproven address may always be asked to prove itself.
            drop(incoming.retry());
            return;
        }
        let port = Rc::clone(&self.port);
        if self.permits.available_permits() == 0 {
            port.count_waited();
        }
        let permit = tokio::select! {
            biased;
            permit = Arc::clone(&self.permits).acquire_owned() => permit,
            () = port.closing.closed() => return self.refuse(incoming),
        };
        let Ok(permit) = permit else {
            return self.refuse(incoming);
        };
        let connecting = match self.terms.now() {
            Ok(server) => incoming.accept_with(server).map_err(io::Error::from),
            Err(error) => Err(error),
        };
        match connecting {
            Ok(connecting) => self.start(connecting, permit),
            Err(error) => {
                counts.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!("a QUIC handshake could not begin: {error}");
            }
        }
    }

    /// Connections end by themselves; who knocks meanwhile is told to go elsewhere.
    async fn end(&mut self, endpoint: &Endpoint) {
        loop {
            tokio::select! {
                biased;
                ended = self.connections.join_next() => if ended.is_none() { break },
                incoming = endpoint.accept() => match incoming {
                    Some(incoming) => self.refuse(incoming),
                    None => break,
                },
            }
        }
        endpoint.close(NO_ERROR, b"");
        // Who knocked while the last connection ended would get no answer for as long as the endpoint lives.
        while let Some(incoming) = endpoint.accept().await {
            self.refuse(incoming);
        }
    }

    fn refuse(&self, incoming: Incoming) {
        self.router.counts.refused.fetch_add(1, Ordering::Relaxed);
        incoming.refuse();
    }

    fn start(&mut self, connecting: Connecting, permit: OwnedSemaphorePermit) {
        let (port, router) = (Rc::clone(&self.port), Arc::clone(&self.router));
        let under_way = UnderWay::new(&self.handshakes);
        self.connections.spawn_local(async move {
            let connection = shake(&port, connecting).await;
            drop(under_way);
            let counts = &router.counts;
            match connection {
                Ok(connection) => {
                    let _counted = Counted::new(&counts.connections);
                    // By where it has begun, wherever it moves to.
                    match take_seat(&port, &Client::new(connection.remote_address())) {
                        Ok(_seat) => crate::http::h3::serve(port, connection).await,
                        Err(_) => {
                            port.count_reason(Reason::AddressConnections);
                            connection.close(EXCESSIVE_LOAD, b"");
                        }
                    }
                }
                Err(error) => {
                    counts.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!("a QUIC handshake failed: {error}");
                }
            }
            drop(permit);
        });
    }
}

async fn shake(port: &Port, connecting: Connecting) -> io::Result<Connection> {
    let limit = port.settings().limits.client_head_max;
    match timeout(limit, connecting).await {
        Ok(shaken) => shaken.map_err(io::Error::from),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Counts one connection for as long as it lives.
struct Counted<'c>(&'c AtomicU64);

impl<'c> Counted<'c> {
    fn new(count: &'c AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts one handshake for as long as it lives.
struct UnderWay(Rc<Cell<usize>>);

impl UnderWay {
    fn new(count: &Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(Rc::clone(count))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests;
