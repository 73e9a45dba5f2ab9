//! Upstream connections: made, kept for the next request, and closed for good when the gate closes.
//!
//! A pool belongs to one worker and one service and never hands out a connection of another epoch or server. Connections are
//! counted from before the first packet until after the upstream has closed its end too (or had
//! `upstream_close_ms_max` to do it): that is what "no connection to the source remains" means.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::id::Register;
use tokio::time::timeout;

use super::shared::Sessions;
use super::ticket::Standing;
use super::{Gate, Mode, Service, Ticket, Word};
use crate::clock;
use crate::http::h2::upstream::Slot;
use crate::listen::port::{Current, Link};
use crate::stream::{Hearsay, Stream};
use crate::upstream::{OpenConnection, Picked, ServerId, connect};

/// A turn of a busy worker's loop takes less; what the reactor said within one is fresh.
const TURN_MAX: Duration = Duration::from_millis(5);

/// Bytes that are read of an upstream behind our end of a connection: what was on its way. One that sends more would
/// keep a worker busy for nobody.
const PARTING_BYTES_MAX: usize = 256 * 1024;

/// One connection to an upstream.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) stream: Stream,
    server: ServerId,
    /// It began by naming its client, and is no other's.
    is_personal: bool,
    /// For whom, and in which epoch it was made.
    register: Register,
    /// Dropped after the stream: the count must not say zero while the socket is open.
    counted: Counted,
}

/// A connection as a gate counts it, from before its first packet until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    gate: Arc<Gate>,
    worker: usize,
    standing: Cell<Standing>,
    /// The server counts it as well, unless it is a check's.
    _server: Option<OpenConnection>,
}

impl Counted {
    pub(crate) fn new(gate: &Arc<Gate>, worker: usize, server: Option<OpenConnection>) -> Self {
        gate.connection_opens(worker);
        Self {
            gate: Arc::clone(gate),
            worker,
            standing: Cell::new(Standing::InFlight),
            _server: server,
        }
    }

    /// It is nobody's any more, and has to be gone at the end of a drain.
    fn settle(&self) {
        if self.standing.replace(Standing::InFlight) == Standing::Carried {
            self.gate.connection_opens(self.worker);
            self.gate.carried_connection_closed(self.worker);
        }
    }

    fn carry(&self) {
        if self.standing.replace(Standing::Carried) == Standing::InFlight {
            self.gate.carries_connection(self.worker);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        match self.standing.get() {
            Standing::InFlight => self.gate.connection_closed(self.worker),
            Standing::Carried => self.gate.carried_connection_closed(self.worker),
        }
    }
}

/// Why no connection came about. Nothing of the request has left us in either case.
#[derive(Debug)]
pub(crate) enum NoConnection {
    /// The gate closed or moved on meanwhile.
    GateMoved,
    /// The upstream did not accept.
    Failed(io::Error),
}

#[derive(Debug)]
struct Idle {
    upstream: Upstream,
    since: Instant,
}

/// The connections of one service on one worker.
#[derive(Debug)]
pub(crate) struct Pool {
    service: Arc<Service>,
    worker: usize,
    current: Rc<Current>,
    /// By server, the freshest last.
    idle: RefCell<BTreeMap<ServerId, Vec<Idle>>>,
    idle_count: Cell<usize>,
    /// Those that many requests share.
    sessions: Sessions,
}

impl Pool {
    pub(crate) fn new(service: Arc<Service>, worker: usize, current: Rc<Current>) -> Self {
        Self {
            service,
            worker,
            current,
            idle: RefCell::default(),
            idle_count: Cell::new(0),
            sessions: Sessions::default(),
        }
    }

    /// A place on a connection that many requests share; makes one where there is none, as [`Self::connect`] does.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(crate) async fn slot(
        &self,
        ticket: &Ticket<'_>,
        server: &Picked,
        connect_max: Duration,
    ) -> Result<Slot, NoConnection> {
        let settings = self.current.settings();
        let connect = self.connect(ticket, server, connect_max);
        self.sessions
            .slot(server.id(), ticket.register(), &settings.limits, connect)
            .await
    }

    /// Takes a connection back after a request: `sound` if it may serve another.
    pub(crate) fn give_back(&self, link: Link, sound: bool) {
        match link {
            Link::Own { upstream, .. } if sound => self.put(upstream),
            Link::Own { upstream, .. } => self.part(upstream),
            // The others on it go on, but where nobody else may come.
            Link::Shared(slot) => {
                drop(slot);
                let word = self.service.gate.word();
                if word.mode == Mode::Holding {
                    self.sweep(word);
                }
            }
        }
    }

    /// A kept connection to this server that the ticket may use and that the server has not closed, the freshest
    /// first.
    pub(crate) fn take(&self, ticket: &Ticket<'_>, server: ServerId) -> Option<Upstream> {
        let mut idle = self.idle.borrow_mut();
        let idle_max = self.current.settings().limits.upstream_idle_max;
        let kept = idle.get_mut(&server)?;
        while let Some(Idle { upstream, since }) = kept.pop() {
            self.idle_count.set(self.idle_count.get() - 1);
            let age = clock::recently().saturating_duration_since(since);
            if age < idle_max && upstream.register == ticket.register() && upstream.is_silent(age) {
                return Some(upstream);
            }
            self.part(upstream);
        }
        None
    }

    /// Makes a connection. When the gate no longer wants it made it is ended as others are, and counted until then.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(crate) async fn connect(
        &self,
        ticket: &Ticket<'_>,
        server: &Picked,
        connect_max: Duration,
    ) -> Result<Upstream, NoConnection> {
        let gate = &self.service.gate;
        let mut words = gate.subscribe();
        if !ticket.is_current() {
            return Err(NoConnection::GateMoved);
        }
        let register = ticket.register();
        let counted = Counted::new(gate, self.worker, Some(server.opens()));
        let moved = words.wait_for(|word| !ticket.is_allowed_by(*word));
        let attempt = timeout(connect_max, connect(server, server.sender(), connect_max));
        tokio::pin!(attempt);
        let stream = tokio::select! {
            biased;
            _ = moved => {
                // The server may have it already, and would be frozen with it.
                let limit = self.current.settings().limits.upstream_close_max;
                Box::pin(end_attempt(attempt, limit)).await;
                return Err(NoConnection::GateMoved);
            }
            made = &mut attempt => made.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        };
        Ok(Upstream {
            stream: stream.map_err(NoConnection::Failed)?,
            server: server.id(),
            is_personal: server.sender().is_some(),
            register,
            counted,
        })
    }

    /// Keeps a connection for the next request, or closes it if no later request may use it.
    pub(crate) fn put(&self, upstream: Upstream) {
        let word = self.service.gate.word();
        let moved = word.mode == Mode::Holding || word.register != upstream.register;
        if moved || upstream.is_personal {
            self.part(upstream);
        } else if self.idle_count.get() < self.current.settings().limits.upstream_idle_count_max {
            self.idle_count.set(self.idle_count.get() + 1);
            upstream.counted.settle();
            let mut idle = self.idle.borrow_mut();
            idle.entry(upstream.server).or_default().push(Idle {
                upstream,
                since: clock::recently(),
            });
        } else {
            self.part(upstream);
        }
    }

    /// Closes our end and waits, for a limited time, until the upstream closes its own. While the gate holds this
    /// keeps the count honest: a socket that the application has not closed would be frozen with it.
    pub(crate) fn part(&self, upstream: Upstream) {
        let limit = self.current.settings().limits.upstream_close_max;
        tokio::task::spawn_local(async move { close_politely(&upstream.stream, limit).await });
    }

    /// Closes what the gate's word no longer allows, what leads to a server that is gone, and what has been idle for
    /// too long.
    fn sweep(&self, word: Word) {
        let settings = self.current.settings();
        let idle_max = settings.limits.upstream_idle_max;
        let owner = word.register.owner;
        let leads_there = |server| {
            settings
                .all_sites()
                .any(|sites| sites.of(owner).has(server))
        };
        let mut parting = Vec::new();
        let mut count = 0;
        self.idle.borrow_mut().retain(|server, kept| {
            let allowed = word.mode != Mode::Holding && leads_there(*server);
            let of_now = |entry: &mut Idle| allowed && word.register == entry.upstream.register;
            let is_over = |entry: &mut Idle| !of_now(entry) || entry.since.elapsed() >= idle_max;
            parting.extend(kept.extract_if(.., is_over));
            count += kept.len();
            !kept.is_empty()
        });
        self.idle_count.set(count);
        self.sessions.sweep(idle_max, |server, register| {
            word.mode != Mode::Holding && leads_there(server) && word.register == register
        });
        for entry in parting {
            self.part(entry.upstream);
        }
    }

    /// Sweeps at every word of the gate and every `upstream_idle_ms_max`, for ever.
    pub(crate) async fn keep(self: Rc<Self>) {
        let mut words = self.service.gate.subscribe();
        loop {
            let word = *words.borrow_and_update();
            self.sweep(word);
            // An error means that the gate is gone, and then so are we.
            let idle_max = self.current.settings().limits.upstream_idle_max;
            if let Ok(Err(_)) = timeout(idle_max, words.changed()).await {
                return;
            }
        }
    }
}

impl Upstream {
    /// No drain waits for it any more.
    pub(crate) fn carry(&self) {
        self.counted.carry();
    }

    /// The connection, and what keeps it counted until it is dropped.
    pub(super) fn into_parts(self) -> (Stream, Counted) {
        (self.stream, self.counted)
    }

    /// Neither closed nor talking out of turn. The reactor hears of either within a turn of its loop, so the kernel
    /// is asked only about connections that have been idle for longer than a turn may take.
    fn is_silent(&self, idle: Duration) -> bool {
        match self.stream.socket().hearsay() {
            Hearsay::Silent if idle < TURN_MAX => true,
            // What the reactor knows of may have been read since: the end of a large body is taken off the socket
            // without a look behind it, and a TLS session has tickets to read.
            Hearsay::Silent | Hearsay::Readable | Hearsay::None => self.stream.is_silent(),
        }
    }
}

/// Waits for a connection that nobody wants any more, and closes it; each for a limited time.
async fn end_attempt<T>(
    attempt: impl Future<Output = Result<io::Result<Stream>, T>>,
    limit: Duration,
) {
    if let Ok(Ok(Ok(stream))) = timeout(limit, attempt).await {
        close_politely(&stream, limit).await;
    }
}

/// Closes our end and reads until the other is closed, too.
pub(crate) async fn close_politely(stream: &Stream, limit: Duration) {
    stream.finish();
    let until_closed = async {
        let mut scrap = [0; 512];
        let mut left = PARTING_BYTES_MAX;
        loop {
            match stream.try_read(&mut scrap) {
                Ok(0) => return,
                // It has its time to notice that nobody reads.
                Ok(count) if count >= left => return std::future::pending().await,
                Ok(count) => {
                    left -= count;
                    // Others have their turn between two reads of what comes without a pause.
                    tokio::task::consume_budget().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if stream.readable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    };
    // Whether it closed or ran out of time, the connection ends here.
    drop(timeout(limit, until_closed).await);
}
