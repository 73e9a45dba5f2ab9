//! Upstream connections: made, kept for the next request, and closed for good when the gate closes.
//!
//! A pool belongs to one worker and one service and never hands out a connection of another epoch. Connections are
//! counted from before the first packet until after the upstream has closed its end too (or had
//! `upstream_close_ms_max` to do it): that is what "no connection to the source remains" means.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::id::Register;
use tokio::time::timeout;

use super::{Gate, Mode, Service, Ticket, Word};
use crate::listen::port::Current;
use crate::stream::{Socket, Stream};

/// A turn of a busy worker's loop takes less; what the reactor said within one is fresh.
const TURN_MAX: Duration = Duration::from_millis(5);

/// One connection to an upstream.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) stream: Stream,
    address: SocketAddr,
    /// For whom, and in which epoch it was made.
    register: Register,
    /// Dropped after the stream: the count must not say zero while the socket is open.
    _counted: Counted,
}

#[derive(Debug)]
struct Counted {
    gate: Arc<Gate>,
    worker: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gate.connection_closed(self.worker);
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
    idle: RefCell<Vec<Idle>>,
}

impl Pool {
    pub(crate) fn new(service: Arc<Service>, worker: usize, current: Rc<Current>) -> Self {
        Self {
            service,
            worker,
            current,
            idle: RefCell::new(Vec::new()),
        }
    }

    /// A kept connection that the ticket may use and that its upstream has not closed, the freshest first.
    pub(crate) fn take(&self, ticket: &Ticket<'_>) -> Option<Upstream> {
        let mut idle = self.idle.borrow_mut();
        let idle_max = self.current.settings().limits.upstream_idle_max;
        while let Some(Idle { upstream, since }) = idle.pop() {
            let age = since.elapsed();
            let fits = upstream.register == ticket.register() && self.leads_there(&upstream);
            if age < idle_max && fits && upstream.is_silent(age) {
                return Some(upstream);
            }
        }
        None
    }

    /// Makes a connection; gives up as soon as the gate no longer wants it made.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(crate) async fn connect(&self, ticket: &Ticket<'_>) -> Result<Upstream, NoConnection> {
        let gate = &self.service.gate;
        let mut words = gate.subscribe();
        if !ticket.is_current() {
            return Err(NoConnection::GateMoved);
        }
        let register = ticket.register();
        gate.connection_opens(self.worker);
        let counted = Counted {
            gate: Arc::clone(gate),
            worker: self.worker,
        };
        let moved = words.wait_for(|word| word.mode == Mode::Holding || word.register != register);
        let settings = self.current.settings();
        let address = settings.service.upstream(register.owner);
        let attempt = timeout(settings.limits.connect_max, Socket::connect(address));
        let stream = tokio::select! {
            biased;
            _ = moved => return Err(NoConnection::GateMoved),
            made = attempt => made.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        };
        Ok(Upstream {
            stream: Stream::Plain(stream.map_err(NoConnection::Failed)?),
            address,
            register,
            _counted: counted,
        })
    }

    /// A reload may have changed where upstreams are.
    fn leads_there(&self, upstream: &Upstream) -> bool {
        let settings = self.current.settings();
        upstream.address == settings.service.upstream(upstream.register.owner)
    }

    /// Keeps a connection for the next request, or closes it if no later request may use it.
    pub(crate) fn put(&self, upstream: Upstream) {
        let word = self.service.gate.word();
        let mut idle = self.idle.borrow_mut();
        let allowed = word.mode != Mode::Holding && word.register == upstream.register;
        if !(allowed && self.leads_there(&upstream)) {
            drop(idle);
            self.part(upstream);
        } else if idle.len() < self.current.settings().limits.upstream_idle_count_max {
            idle.push(Idle {
                upstream,
                since: Instant::now(),
            });
        }
    }

    /// Closes our end and waits, for a limited time, until the upstream closes its own. While the gate holds this
    /// keeps the count honest: a socket that the application has not closed would be frozen with it.
    pub(crate) fn part(&self, upstream: Upstream) {
        let limit = self.current.settings().limits.upstream_close_max;
        tokio::task::spawn_local(close_politely(upstream, limit));
    }

    /// Closes what the gate's word no longer allows, or what has been idle for too long.
    fn sweep(&self, word: Word) {
        let idle_max = self.current.settings().limits.upstream_idle_max;
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        for entry in self.idle.borrow_mut().drain(..) {
            let allowed = word.mode != Mode::Holding && word.register == entry.upstream.register;
            if !(allowed && self.leads_there(&entry.upstream)) {
                gone.push(entry.upstream);
            } else if entry.since.elapsed() < idle_max {
                kept.push(entry);
            }
        }
        *self.idle.borrow_mut() = kept;
        gone.into_iter().for_each(|upstream| self.part(upstream));
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
    /// Neither closed nor talking out of turn. The reactor hears of either within a turn of its loop, so the kernel
    /// is asked only about connections that have been idle for longer than a turn may take.
    fn is_silent(&self, idle: Duration) -> bool {
        // A TLS upstream may still have tickets for us: its session looks at what has come.
        let readable = self.stream.socket().seems_readable();
        let may_speak = self.stream.plain().is_none();
        (!readable && idle < TURN_MAX) || ((!readable || may_speak) && self.stream.is_silent())
    }
}

async fn close_politely(upstream: Upstream, limit: Duration) {
    upstream.stream.finish();
    let until_closed = async {
        let mut scrap = [0; 512];
        loop {
            match upstream.stream.try_read(&mut scrap) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if upstream.stream.readable().await.is_err() {
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
