//! A port: one service on one worker, and everything its connections share.
//!
//! The way from a request to a ticket and an upstream connection is the same for HTTP and raw TCP, and is here.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cutover_protocol::hold::AtCut;
use cutover_protocol::id::Register;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::client::Client;
use super::hangup::HangupWatch;
use super::idle::{IdleClients, IdlePlace};
use crate::access_log::{AccessLog, Line};
use crate::buffer::{Buffer, Buffers};
use crate::config::{
    AcmeConfig, DoorWhenFull, Limits, Protocol, Quic, ServiceConfig, UpstreamProtocol,
};
use crate::error::RequestError;
use crate::forwarded::{Passed, Tracing};
use crate::http::front_check::Green;
use crate::http::h2::upstream::Slot;
use crate::http::request::RequestId;
use crate::http::served::Served;
use crate::limit::{Guards, Reason};
use crate::route::Route;
use crate::service::budget::Keep;
use crate::service::inflight::InFlightTable;
use crate::service::pool::{NoConnection, Pool, Upstream};
use crate::service::roll::Roll;
use crate::service::terms::{Asker, OfAddress, Terms, Weight};
use crate::service::traffic::{Manner, Traffic};
use crate::service::writes::Intent;
use crate::service::{Admission, Mode, Parked, Service, Ticket};
use crate::stream::Stream;
use crate::traces::Traces;
use crate::upstream::{Chosen, Endpoint, Outcome, PickKey, Picked, Sender, Sites};

/// What a reload may change under a running connection; taken anew for each request.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) limits: Limits,
    pub(crate) quic: Quic,
    pub(crate) service: ServiceConfig,
    /// Who serves, where no route says otherwise.
    pub(crate) sites: Rc<Sites>,
    /// Those of routes that have servers of their own, by the route's name.
    pub(crate) route_sites: BTreeMap<String, Rc<Sites>>,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) traces: Option<Traces>,
    pub(crate) guards: Guards,
    /// Whose proofs are shown to authorities.
    pub(crate) acme: Vec<AcmeConfig>,
}

impl Settings {
    /// Whether spans are recorded.
    pub(crate) const fn tracing(&self) -> Tracing {
        match self.traces {
            Some(_) => Tracing::On,
            None => Tracing::Off,
        }
    }

    /// Everybody who may serve, by a route or without one.
    pub(crate) fn all_sites(&self) -> impl Iterator<Item = &Rc<Sites>> {
        std::iter::once(&self.sites).chain(self.route_sites.values())
    }
}

/// The settings in force for one service on one worker.
#[derive(Debug)]
pub(crate) struct Current(RefCell<Rc<Settings>>);

impl Current {
    pub(crate) fn new(settings: Settings) -> Rc<Self> {
        Rc::new(Self(RefCell::new(Rc::new(settings))))
    }

    /// As they are now; a request keeps what it began with.
    pub(crate) fn settings(&self) -> Rc<Settings> {
        Rc::clone(&self.0.borrow())
    }

    /// Puts others in force, for requests that begin from now on.
    pub(crate) fn replace(&self, settings: Settings) {
        *self.0.borrow_mut() = Rc::new(settings);
    }
}

/// Servers that are tried for one request before it fails: with a second of limit for each, a client waits no longer
/// than it would for one that is slow.
const SERVERS_TRIED_MAX: usize = 3;

/// One service on one worker.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) service: Arc<Service>,
    pub(crate) worker: usize,
    pub(crate) current: Rc<Current>,
    pub(crate) buffers: Rc<Buffers>,
    pub(crate) hangup: Rc<HangupWatch>,
    pub(crate) in_flight: Rc<InFlightTable>,
    /// Who is held.
    pub(crate) roll: Rc<Roll>,
    /// What comes, while somebody counts.
    pub(crate) traffic: Traffic,
    pub(crate) pool: Rc<Pool>,
    pub(crate) closing: Rc<Closing>,
    pub(crate) cutting: Rc<Cutting>,
    id_origin: u64,
    id_next: Cell<u64>,
}

/// Says that a port is going away.
#[derive(Debug, Default)]
pub(crate) struct Closing {
    /// Once it is: how long a client that is idle may go on being so.
    idle_grace: Cell<Option<Duration>>,
    /// The proxy is short of memory: whoever is idle has to go.
    pressed: Cell<bool>,
    notify: Notify,
    /// HTTP/1 clients between two requests.
    idle: IdleClients,
}

impl Closing {
    /// A client may be sending its next request this very moment, and a connection that closes then fails it. Where
    /// the proxy goes on (in another process, or without this service), idle clients are given `idle_grace`.
    pub(crate) fn close(&self, idle_grace: Duration) {
        self.idle_grace.set(Some(idle_grace));
        self.idle.hurry(idle_grace);
        self.notify.notify_waiters();
    }

    /// Says whether idle clients have to go because memory is short.
    pub(crate) fn press(&self, pressed: bool) {
        self.pressed.set(pressed);
        if pressed {
            self.idle.hurry(Duration::ZERO);
        }
    }

    pub(crate) const fn is_closed(&self) -> bool {
        self.idle_grace.get().is_some()
    }

    /// A place for a client that is idle now and has to go after `idle_max`, or earlier when the port goes away; none
    /// when it has to go at once.
    pub(crate) fn enter_idle(&self, idle_max: Duration) -> Option<IdlePlace<'_>> {
        if self.pressed.get() {
            return None;
        }
        let grace = self.idle_grace.get().unwrap_or(Duration::MAX);
        Some(self.idle.enter(idle_max.min(grace)))
    }

    /// Keeps the deadlines of idle clients, for ever.
    pub(crate) async fn keep_idle(&self) {
        self.idle.keep().await;
    }

    /// Completes once closed, and who is idle has had his time.
    pub(crate) async fn over(&self) {
        self.closed().await;
        tokio::time::sleep(self.idle_grace.get().unwrap_or_default()).await;
    }

    /// Completes once closed.
    pub(crate) async fn closed(&self) {
        loop {
            let notified = self.notify.notified();
            if self.is_closed() {
                return;
            }
            notified.await;
        }
    }
}

/// Says that a drain has taken as long as it may.
#[derive(Debug, Default)]
pub(crate) struct Cutting(Notify);

impl Cutting {
    /// Cuts what is in flight on such terms.
    pub(crate) fn begin(&self) {
        self.0.notify_waiters();
    }

    /// Completes when somebody on these terms is cut.
    pub(crate) async fn cut(&self, at_cut: AtCut) {
        match at_cut {
            AtCut::Cut => self.0.notified().await,
            AtCut::Wait | AtCut::Carry => std::future::pending().await,
        }
    }
}

/// What one request (or raw connection) went through on its way upstream.
#[derive(Debug, Clone)]
pub(crate) struct Passage {
    /// On what terms it is held.
    pub(crate) terms: Terms,
    /// Whether it asks for a change.
    pub(crate) intent: Intent,
    /// Time it was delayed as a write, before anything else.
    pub(crate) delayed: Duration,
    /// Time it was held, all in all.
    pub(crate) held: Duration,
    /// To whom it went, once it did.
    pub(crate) register: Option<Register>,
    /// The server that took it.
    pub(crate) server: Option<Endpoint>,
    /// Who serves it and how long a connection may take, where its route says so.
    pub(crate) sites: Option<Rc<Sites>>,
    pub(crate) connect_max: Option<Duration>,
    /// The route it takes, if it takes one.
    pub(crate) route: Option<Arc<Route>>,
    /// Whether it is a health probe of a balancer in front of us.
    pub(crate) front_check: FrontCheckOf,
}

/// Whether a request is a front check, and whether we have answered it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum FrontCheckOf {
    /// It is a request like any other.
    #[default]
    No,
    /// It is one, and told this if it would have to wait.
    Asks(Green),
    /// It was told so.
    Answered,
}

impl Passage {
    pub(crate) const fn new(terms: Terms) -> Self {
        Self {
            terms,
            intent: Intent::Read,
            delayed: Duration::ZERO,
            held: Duration::ZERO,
            register: None,
            server: None,
            sites: None,
            connect_max: None,
            route: None,
            front_check: FrontCheckOf::No,
        }
    }
}

/// What tells that a client has left while it is held.
pub(crate) enum Presence<'v> {
    /// The end of this connection.
    Connection(&'v Stream),
    /// This future's: a stream of a connection was reset, or the whole connection died.
    Stream(Pin<&'v mut dyn Future<Output = std::io::Error>>),
}

impl Presence<'_> {
    const fn manner(&self) -> Manner {
        match self {
            Self::Connection(_) => Manner::InTurn,
            Self::Stream(_) => Manner::InStreams,
        }
    }

    pub(super) async fn left(&mut self, hangup: &HangupWatch) -> std::io::Error {
        match self {
            Self::Connection(stream) => {
                let left = hangup.left(*stream).await.err();
                left.unwrap_or_else(|| std::io::ErrorKind::ConnectionAborted.into())
            }
            Self::Stream(gone) => gone.as_mut().await,
        }
    }
}

impl std::fmt::Debug for Presence<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Connection(_) => "Connection",
            Self::Stream(_) => "Stream",
        })
    }
}

/// A client that waits for a ticket or a connection, and the memory it can do without meanwhile.
#[derive(Debug)]
pub(crate) struct Visitor<'v> {
    pub(crate) presence: Presence<'v>,
    /// Who it is.
    pub(crate) client: SocketAddr,
    /// The proxies it has passed, for servers that want to know.
    pub(crate) passed: Passed,
    /// Its connection's buffer, if it has one of its own.
    pub(crate) buffer: Option<&'v mut Buffer>,
    pub(crate) head: &'v mut Vec<u8>,
    pub(crate) passage: &'v mut Passage,
}

impl Visitor<'_> {
    /// As servers are told by the PROXY protocol.
    fn sender(&self) -> Sender {
        let listener = match &self.presence {
            Presence::Connection(stream) => rustix::net::getsockname(stream).ok(),
            Presence::Stream(_) => None,
        };
        Sender {
            client: self.client,
            listener: listener.and_then(|address| SocketAddr::try_from(address).ok()),
            passed: self.passed.clone(),
        }
    }
}

/// The way to an upstream.
#[derive(Debug)]
pub(crate) enum Link {
    /// A connection of the request's own.
    Own {
        upstream: Upstream,
        /// It served another request before, and may have died since.
        kept: bool,
    },
    /// A place on one that many requests share.
    Shared(Slot),
}

impl Link {
    /// Whether it is a connection that served another request before.
    pub(crate) const fn is_kept(&self) -> bool {
        matches!(self, Self::Own { kept: true, .. })
    }

    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }
}

impl Connected<'_> {
    /// Notes that no drain waits for it, if those are its terms. A connection that others share is nobody's to carry.
    pub(crate) fn carry(&self, terms: Terms) {
        if let (AtCut::Carry, Link::Own { upstream, .. }) = (terms.at_cut, &self.link) {
            self.ticket.carry();
            upstream.carry();
        }
    }
}

/// A ticket and the connection it is good for.
#[derive(Debug)]
pub(crate) struct Connected<'p> {
    pub(crate) ticket: Ticket<'p>,
    pub(crate) link: Link,
    /// Where the connection leads.
    pub(crate) chosen: Chosen,
}

/// What a port is made of.
pub(crate) struct PortSeed {
    pub(crate) service: Arc<Service>,
    pub(crate) worker: usize,
    pub(crate) current: Rc<Current>,
    pub(crate) buffers: Rc<Buffers>,
    pub(crate) hangup: Rc<HangupWatch>,
    pub(crate) closing: Rc<Closing>,
    pub(crate) id_origin: u64,
}

impl Port {
    pub(crate) fn new(seed: PortSeed) -> Self {
        let PortSeed {
            service,
            worker,
            current,
            buffers,
            hangup,
            closing,
            id_origin,
        } = seed;
        Self {
            pool: Rc::new(Pool::new(Arc::clone(&service), worker, Rc::clone(&current))),
            in_flight: Rc::new(InFlightTable::default()),
            roll: Rc::default(),
            traffic: Traffic::default(),
            id_next: Cell::new(1),
            current,
            service,
            worker,
            buffers,
            hangup,
            closing,
            cutting: Rc::default(),
            id_origin,
        }
    }

    /// The settings in force.
    pub(crate) fn settings(&self) -> Rc<Settings> {
        self.current.settings()
    }

    /// Whether requests wait at the gate now.
    pub(crate) fn holds(&self) -> bool {
        self.service.gate.word().mode != Mode::Open
    }

    /// Whether more is to be read of this client, or taken up of its streams: not so when the budget of the held is
    /// nearly used.
    pub(crate) fn reads(&self, client: &Client) -> bool {
        client.when_full == DoorWhenFull::GoOn || self.service.gate.budget.reads()
    }

    /// Passes an open gate, or waits at a closed one.
    pub(crate) async fn admit(
        &self,
        visitor: &mut Visitor<'_>,
    ) -> Result<Ticket<'_>, RequestError> {
        let (manner, arrival) = (visitor.presence.manner(), visitor.passage.terms.arrival);
        // A hold would not hold it.
        if visitor.passage.front_check == FrontCheckOf::No {
            self.traffic
                .note(visitor.client, manner, visitor.head, arrival);
        }
        if visitor.passage.intent == Intent::Write
            && let Some(delayed) = self.service.gate.delay()
        {
            // Boxed: hardly any request needs its room.
            Box::pin(self.sit_out(delayed, visitor)).await?;
        }
        let ticket = self.pass_or_wait(visitor).await?;
        self.count_write(visitor.passage);
        Ok(ticket)
    }

    async fn pass_or_wait(&self, visitor: &mut Visitor<'_>) -> Result<Ticket<'_>, RequestError> {
        match self.service.gate.admit(self.worker) {
            Admission::Pass(ticket) => Ok(ticket),
            Admission::Wait => {
                self.tell_front_check(visitor.passage)?;
                // One that was delayed has its limit, and a head that says less.
                if visitor.passage.delayed.is_zero() {
                    self.limit(visitor.passage, visitor.head);
                }
                let terms = self.weighed(visitor);
                let gate = &self.service.gate;
                if terms.asker == Asker::Application
                    && let Admission::Pass(ticket) = gate.admit_own(self.worker)
                {
                    return Ok(ticket);
                }
                let parked = gate.park(self.worker, terms)?;
                self.wait(parked, visitor).await
            }
        }
    }

    /// Joins the queue, for whoever watches over its place himself.
    ///
    /// # Errors
    /// The queue takes nobody.
    pub(crate) fn park(
        &self,
        passage: &mut Passage,
        manner: Manner,
        head: &[u8],
    ) -> Result<Parked, RequestError> {
        let Terms {
            client, arrival, ..
        } = passage.terms;
        self.traffic.note(client, manner, head, arrival);
        self.limit(passage, head);
        passage.terms.weight = self.weight(passage.terms, Keep::Stream2, head.len());
        Ok(self.service.gate.park(self.worker, passage.terms)?)
    }

    /// The visitor's terms, with what it would take of the budget.
    fn weighed(&self, visitor: &mut Visitor<'_>) -> Terms {
        let keep = match &visitor.presence {
            Presence::Stream(_) => Keep::Stream3,
            Presence::Connection(_) if self.settings().service.protocol == Protocol::Tcp => {
                Keep::Raw
            }
            Presence::Connection(Stream::Tls(_)) => Keep::Tls,
            Presence::Connection(Stream::Plain(_)) => Keep::Clear,
        };
        let read = visitor
            .buffer
            .as_ref()
            .map_or(0, |buffer| buffer.filled().len());
        let terms = visitor.passage.terms;
        visitor.passage.terms.weight = self.weight(terms, keep, visitor.head.len() + read);
        visitor.passage.terms
    }

    fn weight(&self, terms: Terms, keep: Keep, bytes: usize) -> Weight {
        let address = terms.client.ip();
        let is_one =
            terms.client.port() != 0 && !self.settings().service.trusted_from.believes(address);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Weight {
            bytes: keep.bytes().saturating_add(bytes),
            of_address: if is_one {
                OfAddress::One
            } else {
                OfAddress::Many
            },
            ..terms.weight
        }
    }

    /// Finds or makes a connection for the ticket, to a server that can be reached. Where none comes about because the
    /// gate has closed, or has only just opened, the request is held again: nothing of it has left us.
    pub(crate) async fn connect<'p>(
        &'p self,
        mut ticket: Ticket<'p>,
        may_reuse: bool,
        visitor: &mut Visitor<'_>,
    ) -> Result<Connected<'p>, RequestError> {
        let own_sites = visitor.passage.sites.clone();
        let sites = own_sites.unwrap_or_else(|| Rc::clone(&self.settings().sites));
        let mut now = visitor.passage.terms.arrival;
        loop {
            let error = match self.reach(&ticket, may_reuse, &sites, visitor, now).await {
                Ok((link, picked)) => {
                    visitor.passage.server = Some(picked.endpoint().clone());
                    let site = ticket.register().owner;
                    return Ok(Connected {
                        ticket,
                        link,
                        chosen: Chosen::new(sites, site, picked),
                    });
                }
                Err(error) => error,
            };
            // One that would wait again.
            let is_check = matches!(visitor.passage.front_check, FrontCheckOf::Asks(_));
            if is_check && (self.holds() || self.service.gate.has_opened_just_now()) {
                self.tell_front_check(visitor.passage)?;
            }
            let terms = self.weighed(visitor);
            let Some(parked) = ticket.wait_again(&self.service.gate, terms) else {
                return Err(error);
            };
            ticket = self.wait(parked?, visitor).await?;
            now = Instant::now();
        }
    }

    /// Answers a front check that would have to wait, unless the proxy is going away: then the balancer had better know.
    fn tell_front_check(&self, passage: &mut Passage) -> Result<(), RequestError> {
        if self.closing.is_closed() {
            return Ok(());
        }
        match std::mem::take(&mut passage.front_check) {
            FrontCheckOf::Asks(green) => {
                passage.front_check = FrontCheckOf::Answered;
                let shard = self.service.gate.shard(self.worker);
                shard.front_checks.fetch_add(1, Ordering::Relaxed);
                Err(RequestError::FrontCheck(green))
            }
            FrontCheckOf::No | FrontCheckOf::Answered => Ok(()),
        }
    }

    /// A connection of the request's own: the kept one, or a new one.
    async fn own(
        &self,
        ticket: &Ticket<'_>,
        picked: &Picked,
        kept: Option<Upstream>,
        connect_max: Duration,
    ) -> Result<Link, NoConnection> {
        if let Some(upstream) = kept {
            return Ok(Link::Own {
                upstream,
                kept: true,
            });
        }
        // Boxed: most requests find a connection.
        let upstream = Box::pin(self.pool.connect(ticket, picked, connect_max)).await?;
        Ok(Link::Own {
            upstream,
            kept: false,
        })
    }

    /// One server after the other, until one can be reached or the gate moves on.
    async fn reach(
        &self,
        ticket: &Ticket<'_>,
        may_reuse: bool,
        sites: &Sites,
        visitor: &Visitor<'_>,
        now: Instant,
    ) -> Result<(Link, Picked), RequestError> {
        let group = sites.of(ticket.register().owner);
        let key = PickKey::of(group, self.worker, now, visitor.client.ip(), visitor.head);
        let own_connect_max = visitor.passage.connect_max;
        let connect_max = own_connect_max.unwrap_or_else(|| self.settings().limits.connect_max);
        let (mut tried, mut waited) = (Vec::new(), false);
        let mut error = RequestError::NoServer;
        while tried.len() < SERVERS_TRIED_MAX {
            let picked = group.pick(&key, &tried).or_else(|| {
                // What checks say of a site that has only just become the owner is of the time before.
                let is_fresh = self.service.gate.has_opened_just_now();
                is_fresh
                    .then(|| group.pick_untested(&key, &tried))
                    .flatten()
            });
            let Some(mut picked) = picked else {
                if waited || !tried.is_empty() {
                    break;
                }
                // Boxed: hardly any request is so early.
                Box::pin(timeout(connect_max, group.first_resolved()))
                    .await
                    .ok();
                waited = true;
                continue;
            };
            // On a connection that many share, nobody's address would be the right one.
            let is_shared = group.config().protocol == UpstreamProtocol::Http2;
            if group.config().proxy_protocol.is_some() && !is_shared {
                picked.name_sender(visitor.sender());
            }
            let link = match group.config().protocol {
                UpstreamProtocol::Http1 => {
                    let reused = may_reuse.then(|| self.pool.take(ticket, picked.id()));
                    self.own(ticket, &picked, reused.flatten(), connect_max)
                        .await
                }
                UpstreamProtocol::Http2 => {
                    let slot = Box::pin(self.pool.slot(ticket, &picked, connect_max)).await;
                    slot.map(Link::Shared)
                }
            };
            match link {
                Ok(link) if ticket.is_current() => return Ok((link, picked)),
                Ok(link) => {
                    self.pool.give_back(link, false);
                    return Err(gate_moved());
                }
                Err(NoConnection::GateMoved) => return Err(gate_moved()),
                Err(NoConnection::Failed(cause)) => {
                    group.report(&picked, Outcome::Unreachable, Instant::now);
                    tried.push(picked.id());
                    error = RequestError::Connect(cause);
                }
            }
        }
        Err(error)
    }

    /// Held: the buffer shrinks to what it holds, and the only thing watched is whether the client leaves.
    async fn wait(
        &self,
        mut parked: Parked,
        visitor: &mut Visitor<'_>,
    ) -> Result<Ticket<'_>, RequestError> {
        let since = Instant::now();
        if let Some(buffer) = &mut visitor.buffer {
            self.buffers.shrink(buffer);
        }
        visitor.head.shrink_to_fit();
        let Passage { terms, route, .. } = &*visitor.passage;
        let (route, arrival, end) = (route.clone(), terms.arrival, terms.end);
        let _entry = self
            .roll
            .enter(visitor.client, visitor.head, route, arrival, end);
        let verdict = tokio::select! {
            biased;
            verdict = parked.verdict(&self.service.gate) => {
                self.called(verdict, visitor.passage, visitor.head, since.elapsed())
            }
            reason = visitor.presence.left(&self.hangup) => Err(RequestError::ClientLeft(reason)),
        };
        visitor.passage.held += since.elapsed();
        if let Some(buffer) = &mut visitor.buffer {
            self.buffers.grow(buffer);
        }
        verdict
    }

    /// Cuts whoever is in flight on such terms; how many that are.
    pub(crate) fn cut(&self) -> usize {
        self.cutting.begin();
        self.in_flight.to_be_cut()
    }

    /// A number no other request has.
    pub(crate) fn next_id(&self) -> RequestId {
        let number = self.id_next.get();
        self.id_next.set(number + 1);
        RequestId {
            origin: self.id_origin,
            number,
        }
    }

    /// Counts one request by the class of its status; zero stands for none.
    pub(crate) fn count(&self, status: u16) {
        let answered = &self.service.gate.shard(self.worker).answered;
        let class = usize::from(status / 100).min(answered.len() - 1);
        answered[class].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an answer of ours by its reason, if it is a refusal.
    pub(crate) fn count_refusal(&self, error: &RequestError) {
        if let Some(reason) = error.reason() {
            self.count_reason(reason);
        }
    }

    /// Counts a connection that had to wait for another one's end.
    pub(crate) fn count_waited(&self) {
        let shard = self.service.gate.shard(self.worker);
        shard.waited.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts somebody who was refused.
    pub(crate) fn count_reason(&self, reason: Reason) {
        let shard = self.service.gate.shard(self.worker);
        shard.refusals.count(reason);
    }

    /// Says what became of a request, to whoever wants to know.
    pub(crate) fn tell(&self, client: &Client, served: &Served) {
        self.log(|| Line::served(self, client.address, served));
        if let (Some(traces), Some(hop)) = (&self.settings().traces, &served.hop) {
            traces.record(self.service.name().as_str(), client, served, hop);
        }
    }

    /// Writes an access line, if anybody wants one.
    pub(crate) fn log<'l>(&self, line: impl FnOnce() -> Line<'l>) {
        if let Some(log) = &self.settings().access_log {
            log.write(&line());
        }
    }
}

/// Only seen when the request cannot even wait again.
fn gate_moved() -> RequestError {
    RequestError::Connect(std::io::ErrorKind::NotConnected.into())
}
