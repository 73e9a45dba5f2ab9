//! Listening: one socket per listener and worker, all on the same address, so that the kernel spreads connections
//! and no worker hands one to another. A unix socket has no such spreading: its workers accept from one queue.

pub(crate) mod bound;
pub(crate) mod client;
mod delayed;
pub(crate) mod hangup;
mod held;
pub(crate) mod hello;
pub(crate) mod idle;
pub(crate) mod port;
pub(crate) mod proxy_protocol;
pub(crate) mod quic;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::acme;
use crate::buffer::Buffer;
use crate::config::{DoorWhenFull, ListenConfig, Protocol};
use crate::http::connection::{self, Ended};
use crate::http::h2;
use crate::limit::Reason;
use crate::limit::connections::Seat;
use crate::stream::{Socket, Stream};
use crate::tcp;
use crate::tls::profile::{Offer, Profile};
use crate::tls::stream::TlsStream;
use bound::Bound;
use client::Client;
use port::Port;

/// Pause after the system refused to give us a connection, mostly for want of open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// One listener of a service on one worker.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) bound: Arc<Bound>,
    door: RefCell<Rc<Door>>,
    ended: Cell<Option<Manner>>,
    notify: Notify,
}

/// What all connections of a listener share.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) config: ListenConfig,
    /// What clients meet before the protocol, if they speak TLS.
    pub(crate) tls: Option<Arc<Profile>>,
    /// What clients over TCP are told of HTTP/3.
    pub(crate) alt_svc: Option<Rc<str>>,
}

/// How a listener ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Somebody else has the socket and serves those who wait in its queue.
    Leave,
    /// Nobody does: no one new is let in, and those who have been are served.
    Empty {
        /// For handshakes that are under way.
        linger: Duration,
    },
}

impl Listening {
    pub(crate) fn new(bound: Arc<Bound>, door: Door) -> Self {
        Self {
            bound,
            door: RefCell::new(Rc::new(door)),
            ended: Cell::new(None),
            notify: Notify::new(),
        }
    }

    /// Connections accepted from now on go by this.
    pub(crate) fn configure(&self, door: Door) {
        *self.door.borrow_mut() = Rc::new(door);
    }

    /// Stops accepting; the first word counts.
    pub(crate) fn end(&self, manner: Manner) {
        if self.ended.get().is_none() {
            self.ended.set(Some(manner));
            self.notify.notify_waiters();
        }
    }

    async fn ended(&self) -> Manner {
        loop {
            let notified = self.notify.notified();
            if let Some(manner) = self.ended.get() {
                return manner;
            }
            notified.await;
        }
    }

    fn door(&self) -> Rc<Door> {
        Rc::clone(&self.door.borrow())
    }
}

/// Lets the runtime say when a file becomes readable.
fn watch(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open file from here until it is dropped, inside the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) }?)
}

/// Accepts until the listener ends, never more than there are permits: the others wait in the kernel. Returns when
/// the last connection has ended.
///
/// # Cancel safety
/// Dropping the future drops every connection of the listener.
pub(crate) async fn serve(
    port: Rc<Port>,
    listening: Rc<Listening>,
    socket: OwnedFd,
    permits: Arc<Semaphore>,
) -> io::Result<()> {
    let listener = watch(socket)?;
    let mut connections = JoinSet::new();
    let manner = loop {
        // Forgets the connections that have ended.
        while connections.try_join_next().is_some() {}
        let next = tokio::select! {
            biased;
            manner = listening.ended() => break manner,
            next = next_client(&port, &listening, &listener, &permits) => next,
        };
        match next {
            Ok((accepted, permit)) => start(&port, &listening, accepted, permit, &mut connections),
            Err(error) => pause_after(&port, &error).await,
        }
    };
    if let Manner::Empty { linger } = manner {
        // Closed with its file: a descriptor of the same socket elsewhere would let clients wait for nobody.
        listening.bound.release_part_of(port.worker);
        let mut accept = |accepted, permit| {
            start(&port, &listening, accepted, permit, &mut connections);
        };
        empty(&listener, &permits, linger, &mut accept).await;
    }
    drop((listener, listening));
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Turns away whoever comes now, takes everybody who has been let in by the kernel already: the close of the socket
/// would reset them.
async fn empty(
    listener: &AsyncFd<OwnedFd>,
    permits: &Arc<Semaphore>,
    linger: Duration,
    start: &mut impl FnMut(Accepted, OwnedSemaphorePermit),
) {
    if bound::bound_address(listener.get_ref()).is_some()
        && let Err(error) = bound::turn_away(listener.get_ref())
    {
        tracing::debug!("who comes while a listener closes may be reset: {error}");
    }
    while let Ok(permit) = Arc::clone(permits).acquire_owned().await {
        match accept(listener.get_ref()) {
            Ok(Some(accepted)) => start(accepted, permit),
            Ok(None) if linger.is_zero() => return,
            Ok(None) => {
                drop(permit);
                match timeout(linger, listener.readable()).await {
                    Ok(Ok(mut ready)) => ready.clear_ready(),
                    Ok(Err(_)) | Err(_) => return,
                }
            }
            Err(_) => return,
        }
    }
}

/// Waits for a client first and for a permit then: a listener that nobody calls on must not keep one from the
/// others.
///
/// # Cancel safety
/// Nothing is taken off the kernel's queue until it returns.
async fn next_client(
    port: &Port,
    listening: &Listening,
    listener: &AsyncFd<OwnedFd>,
    permits: &Arc<Semaphore>,
) -> io::Result<(Accepted, OwnedSemaphorePermit)> {
    loop {
        let mut ready = listener.readable().await?;
        // Short of memory, clients wait in the kernel.
        port.settings().guards.memory.relaxed().await;
        // As they do when as much is held as may be.
        if listening.door().config.when_full == DoorWhenFull::Stop {
            port.service.gate.budget.accepts_again().await;
        }
        let waits = permits.available_permits() == 0;
        let permit = Arc::clone(permits)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        match accept(listener.get_ref())? {
            Some(accepted) => {
                if waits {
                    port.count_waited();
                }
                return Ok((accepted, permit));
            }
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
    listening: &Listening,
    (socket, address): Accepted,
    permit: OwnedSemaphorePermit,
    connections: &mut JoinSet<()>,
) {
    let door = listening.door();
    let mut client = address.map_or_else(Client::local, Client::new);
    client.when_full = door.config.when_full;
    let visit = Visit {
        port: Rc::clone(port),
        stream: Stream::Plain(Socket::new(socket)),
        client,
        seat: None,
        permit,
    };
    if door.is_plain_to(&visit.client) {
        if let Some(visit) = visit.sit_down() {
            connections.spawn_local(visit.serve());
        }
    } else {
        let greeting = Box::pin(visit.greet(door));
        connections.spawn_local(async move {
            if let Some(visit) = greeting.await {
                visit.serve().await;
            }
        });
    }
}

/// One connection from its first byte to its last.
pub(crate) struct Visit {
    pub(crate) port: Rc<Port>,
    pub(crate) stream: Stream,
    pub(crate) client: Client,
    seat: Option<Box<Seat>>,
    permit: OwnedSemaphorePermit,
}

impl Door {
    /// Whether nothing comes before the listener's protocol.
    fn is_plain_to(&self, client: &Client) -> bool {
        self.tls.is_none() && !self.believes(client)
    }

    /// Whether the client is a balancer that says for whom it comes.
    fn believes(&self, client: &Client) -> bool {
        let allowed = &self.config.proxy_protocol_from;
        allowed.believes(client.address.ip())
    }
}

impl Visit {
    /// Does what comes before the listener's protocol. `None` where nothing is left to be served.
    async fn greet(mut self, door: Rc<Door>) -> Option<Self> {
        let Stream::Plain(socket) = self.stream else {
            return None;
        };
        if door.believes(&self.client) {
            self.client = introduced(&self.port, &socket, self.client).await?;
            self.client.when_full = door.config.when_full;
        }
        // Seated before hands are shaken: that is the dear part.
        let seat = seat_or_count(&self.port, &self.client).ok()?;
        let stream = match &door.tls {
            None => Stream::Plain(socket),
            Some(profile) => {
                let stream = shake(&self.port, &door, profile, socket).await?;
                self.client
                    .came_through_tls(stream.agreed(), door.alt_svc.as_ref());
                Stream::Tls(stream)
            }
        };
        Some(Self {
            stream,
            seat,
            ..self
        })
    }

    fn sit_down(self) -> Option<Self> {
        let seat = seat_or_count(&self.port, &self.client).ok()?;
        Some(Self { seat, ..self })
    }

    /// Speaks the listener's protocol to the end. An idle connection is the task of this future, and should be small:
    /// what does not last is in a box, and what lasts is lent and not handed on, because a future keeps room for both
    /// ends of a move.
    fn serve(self) -> impl Future<Output = ()> {
        let protocol = self.port.settings().service.protocol;
        async move {
            let early = match protocol {
                Protocol::Tcp => return Box::pin(self.serve_raw()).await,
                Protocol::Http => connection::serve(&self).await,
            };
            if let Ended::Http2 { early } = early {
                Box::pin(self.serve_http2(early)).await;
            }
        }
    }

    async fn serve_raw(self) {
        tcp::serve(self.port, self.stream, self.client).await;
        drop((self.seat, self.permit));
    }

    async fn serve_http2(self, early: Buffer) {
        h2::serve(self.port, self.stream, early, self.client).await;
        drop((self.seat, self.permit));
    }
}

/// Takes a seat, or counts that there was none.
fn seat_or_count(port: &Port, client: &Client) -> Result<Option<Box<Seat>>, NoSeat> {
    let seat = take_seat(port, client);
    seat.inspect_err(|_| port.count_reason(Reason::AddressConnections))
}

/// One client more than an address may have.
struct NoSeat;

/// Counts the connection as one of its address, where that is limited. Unix sockets have no address, and a trusted
/// peer is many clients. Whoever gets no seat is closed unanswered: an answer would cost what the limit is to save.
fn take_seat(port: &Port, client: &Client) -> Result<Option<Box<Seat>>, NoSeat> {
    let settings = port.settings();
    let most = settings.limits.address_connections_max;
    let address = client.address.ip();
    let is_one = client.address.port() != 0 && !settings.service.trusted_from.believes(address);
    if most == 0 || !is_one {
        return Ok(None);
    }
    let seat = settings.guards.connections.enter(address, most);
    seat.map(|seat| Some(Box::new(seat))).ok_or(NoSeat)
}

/// Reads who the client is from the balancer in front of us, within the time a client has for its head.
async fn introduced(port: &Port, socket: &Socket, balancer: Client) -> Option<Client> {
    let sender = balancer.address;
    let limit = port.settings().limits.client_head_max;
    let read = timeout(limit, proxy_protocol::read(socket, balancer)).await;
    match read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(client) => Some(client),
        // A check that only connects ends here, as it should.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
        Err(error) => {
            port.count_reason(Reason::ProxyProtocol);
            tracing::warn!(service = %port.service.name(), %sender, "the PROXY protocol header that this sender must send is missing or broken: {error}");
            None
        }
    }
}

/// Shakes hands, within the time a client has for its head. `None` where nothing is left to be served.
async fn shake(
    port: &Port,
    door: &Door,
    profile: &Profile,
    socket: Socket,
) -> Option<Box<TlsStream>> {
    let offer = match port.settings().service.protocol {
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
        Ok(stream) => {
            let agreed = stream.agreed();
            profile.handshakes.succeeded(agreed.resumed);
            tracing::debug!(profile = profile.name(), name = ?agreed.server_name, version = ?agreed.version, "TLS session");
            Some(Box::new(stream))
        }
        // Scanners and impatient clients: nothing that an operator has to hear of each time.
        Err(error) => {
            profile.handshakes.failed(&error);
            let listener = &door.config.address;
            tracing::debug!(%listener, profile = profile.name(), "no TLS session: {error}");
            None
        }
    }
}
