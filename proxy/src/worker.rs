//! A worker: one thread, one single-threaded runtime, its own ports, pools and buffers. Workers share nothing but
//! the gates, the registers behind them and the number of connections.
//!
//! What a worker serves is told by a [`Snapshot`]; a reload brings another, and the worker goes from one to the
//! other between two polls of its tasks. Connections never notice.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cutover_protocol::hold::InFlight;
use cutover_protocol::id::ServiceName;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::buffer::Buffers;
use crate::limit::memory::Memory;
use crate::listen::bound::{Bound, Keeper, Place};
use crate::listen::hangup::HangupWatch;
use crate::listen::port::{Closing, Current, Port, PortSeed};
use crate::listen::quic::{self, QuicListener};
use crate::listen::{self, Door, Listening, Manner};
use crate::service::Mode;
use crate::service::roll::RollPart;
use crate::service::traffic::TrafficSum;
use crate::snapshot::{Serving, Snapshot};

/// Smallest size of a connection's buffer, in bytes: large enough that a system call is worth its price.
const BUFFER_BYTES_MIN: usize = 16 * 1024;

/// What the control thread may ask a worker.
#[derive(Debug)]
pub(crate) enum Question {
    /// Who is in flight for this service.
    InFlight {
        service: ServiceName,
        reply: oneshot::Sender<Vec<InFlight>>,
    },
    /// Who is held for this service: sums, and so many who came first and last.
    Held {
        service: ServiceName,
        most: usize,
        reply: oneshot::Sender<RollPart>,
    },
    /// Count what comes for this service, until then at most. Answered with whether nobody else does.
    Observe {
        service: ServiceName,
        until: Instant,
        reply: oneshot::Sender<bool>,
    },
    /// End the counting and tell.
    Observed {
        service: ServiceName,
        reply: oneshot::Sender<TrafficSum>,
    },
    /// Cut whoever may be cut for this service; how many that is.
    Cut {
        service: ServiceName,
        reply: oneshot::Sender<usize>,
    },
    /// Whether it still answers.
    Alive { reply: oneshot::Sender<()> },
    /// Go by this snapshot from now on.
    Apply {
        snapshot: Arc<Snapshot>,
        reply: oneshot::Sender<()>,
    },
}

/// How far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Ready, but another process still serves.
    Waiting,
    /// Serving.
    Running,
    /// Accept nobody, finish what runs.
    Closing(Farewell),
    /// Whoever is left is cut off.
    Cut,
}

/// Why a proxy ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// Nobody comes after it.
    Stop,
    /// Another process has the sockets and goes on, except for those of these places.
    HandOver { unused: Arc<[Place]> },
}

/// Everything a worker needs to start; it is made on the main thread.
pub(crate) struct WorkerSeed {
    pub(crate) index: usize,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) questions: mpsc::Receiver<Question>,
    pub(crate) phase: watch::Receiver<Phase>,
    /// Told who had to be cut off, when it is over.
    pub(crate) over: mpsc::Sender<Vec<InFlight>>,
}

impl WorkerSeed {
    /// Runs the worker on this thread until the proxy ends.
    pub(crate) fn run(self) -> io::Result<()> {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().build_local(LocalOptions::default())?;
        runtime.block_on(self.work())
    }

    async fn work(mut self) -> io::Result<()> {
        let hangup = HangupWatch::new()?;
        let mut helpers = JoinSet::new();
        helpers.spawn_local(watch_hangups(Rc::clone(&hangup)));
        let mut worker = Worker {
            index: self.index,
            buffers: Buffers::new(buffer_size(&self.snapshot)),
            hangup,
            permits: self.permits,
            memory: Arc::clone(&self.snapshot.guards.memory),
            open: Vec::new(),
            leaving: Vec::new(),
            listening: JoinSet::new(),
            ports_made: 0,
        };
        // A dropped sender means that the main thread is gone; that ends us like a word from it.
        let begun = self.phase.wait_for(|phase| *phase != Phase::Waiting).await;
        // Another process serves: not even a look at its sockets.
        if begun.is_ok_and(|phase| *phase != Phase::Cut) {
            worker.apply(&self.snapshot);
        }
        drop(self.snapshot);
        let farewell = worker.run(&mut self.questions, &mut self.phase).await;
        worker.close(&farewell);
        let left = worker.finish(&mut self.questions, &mut self.phase).await;
        // The control thread may have given up on us.
        drop(self.over.send(left).await);
        Ok(())
    }
}

struct Worker {
    index: usize,
    buffers: Rc<Buffers>,
    hangup: Rc<HangupWatch>,
    permits: Arc<Semaphore>,
    memory: Arc<Memory>,
    open: Vec<Open>,
    /// Of services that are no longer configured, until their last connection has ended.
    leaving: Vec<Open>,
    listening: JoinSet<io::Result<()>>,
    ports_made: usize,
}

/// A port, its listeners, and the task that keeps its pool and its idle clients.
struct Open {
    port: Rc<Port>,
    listeners: Vec<Rc<Listening>>,
    tidy: AbortHandle,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.tidy.abort();
    }
}

impl Worker {
    /// Serves until the end begins, and says which end.
    async fn run(
        &mut self,
        questions: &mut mpsc::Receiver<Question>,
        phase: &mut watch::Receiver<Phase>,
    ) -> Farewell {
        let memory = Arc::clone(&self.memory);
        let mut pressure = memory.subscribe();
        loop {
            tokio::select! {
                Ok(()) = pressure.changed() => self.press(),
                ending = phase.wait_for(|phase| matches!(phase, Phase::Closing(_) | Phase::Cut)) => {
                    return match ending.as_deref() {
                        Ok(Phase::Closing(farewell)) => farewell.clone(),
                        _ => Farewell::Stop,
                    };
                }
                Some(question) = questions.recv() => self.answer(question),
                Some(ended) = self.listening.join_next() => self.note_end(ended),
            }
        }
    }

    /// Lets idle clients go while memory is short.
    fn press(&self) {
        let pressed = self.memory.is_pressed();
        self.ports().for_each(|port| port.closing.press(pressed));
    }

    /// Waits for every connection to end or for the cut; returns whom that cuts off.
    async fn finish(
        &mut self,
        questions: &mut mpsc::Receiver<Question>,
        phase: &mut watch::Receiver<Phase>,
    ) -> Vec<InFlight> {
        loop {
            tokio::select! {
                biased;
                ended = self.listening.join_next() => match ended {
                    Some(ended) => self.note_end(ended),
                    None => return Vec::new(),
                },
                _ = phase.wait_for(|phase| *phase == Phase::Cut) => {
                    return self.ports().flat_map(|port| port.in_flight.list()).collect();
                }
                Some(question) = questions.recv() => self.answer(question),
            }
        }
    }

    fn ports(&self) -> impl Iterator<Item = &Rc<Port>> {
        self.open.iter().chain(&self.leaving).map(|open| &open.port)
    }

    fn port_of(&self, service: &ServiceName) -> Option<&Rc<Port>> {
        self.ports().find(|port| port.service.name() == service)
    }

    fn answer(&mut self, question: Question) {
        // Whoever asked may not wait any longer.
        match question {
            Question::InFlight { service, reply } => {
                let ports = self.ports().filter(|port| *port.service.name() == service);
                let list = ports.flat_map(|port| port.in_flight.list()).collect();
                drop(reply.send(list));
            }
            Question::Held {
                service,
                most,
                reply,
            } => {
                let port = self.port_of(&service);
                let part = port.map(|port| {
                    let bound = port.settings().service.hold_bound();
                    port.roll.part(most, bound)
                });
                let part = part.unwrap_or_default();
                drop(reply.send(part));
            }
            Question::Observe {
                service,
                until,
                reply,
            } => {
                let port = self.port_of(&service);
                let is_free = port.is_none_or(|port| port.traffic.begin(until));
                reply.send(is_free).ok();
            }
            Question::Observed { service, reply } => {
                let port = self.port_of(&service);
                let sum = port.map(|port| port.traffic.end()).unwrap_or_default();
                drop(reply.send(sum));
            }
            Question::Cut { service, reply } => {
                let ports = self.ports().filter(|port| *port.service.name() == service);
                let count = ports.map(|port| port.cut()).sum();
                reply.send(count).ok();
            }
            Question::Alive { reply } => {
                reply.send(()).ok();
            }
            Question::Apply { snapshot, reply } => {
                self.apply(&snapshot);
                reply.send(()).ok();
            }
        }
    }

    fn note_end(&mut self, ended: Result<io::Result<()>, JoinError>) {
        if let Ok(Err(error)) = ended {
            tracing::error!("a listener failed: {error}");
        }
        // Connections hold their port.
        self.leaving.retain(|open| Rc::strong_count(&open.port) > 1);
    }

    /// Goes by this snapshot: what it does not name ends gracefully, what it names goes on or begins.
    fn apply(&mut self, snapshot: &Snapshot) {
        self.buffers.resize(buffer_size(snapshot));
        let mut before = std::mem::take(&mut self.open);
        for serving in &snapshot.services {
            let known = before
                .iter()
                .position(|open| Arc::ptr_eq(&open.port.service, &serving.service));
            let mut open = match known {
                Some(index) => before.swap_remove(index),
                None => self.open_port(serving, snapshot),
            };
            open.port.current.replace(serving.settings(snapshot));
            self.listen(&mut open, serving, snapshot);
            self.open.push(open);
        }
        for open in before {
            let idle_grace = open.port.settings().limits.linger_max;
            open.port.closing.close(idle_grace);
            for listening in &open.listeners {
                listening.end(end_of(&listening.bound, snapshot, idle_grace));
            }
            self.leaving.push(open);
        }
        self.leaving.retain(|open| Rc::strong_count(&open.port) > 1);
    }

    fn open_port(&mut self, serving: &Serving, snapshot: &Snapshot) -> Open {
        let port = Rc::new(Port::new(PortSeed {
            service: Arc::clone(&serving.service),
            worker: self.index,
            current: Current::new(serving.settings(snapshot)),
            buffers: Rc::clone(&self.buffers),
            hangup: Rc::clone(&self.hangup),
            closing: Rc::new(Closing::default()),
            id_origin: id_origin(self.index, self.ports_made),
        }));
        self.ports_made += 1;
        let (pool, closing) = (Rc::clone(&port.pool), Rc::clone(&port.closing));
        let tidy = async move { tokio::join!(pool.keep(), closing.keep_idle()) };
        let tidy = tokio::task::spawn_local(tidy).abort_handle();
        Open {
            port,
            listeners: Vec::new(),
            tidy,
        }
    }

    fn listen(&mut self, open: &mut Open, serving: &Serving, snapshot: &Snapshot) {
        let mut before = std::mem::take(&mut open.listeners);
        let both = serving.listeners.iter().zip(&serving.quic);
        for ((bound, quic), config) in both.zip(&serving.config.listen) {
            let door = || Door {
                config: config.clone(),
                tls: snapshot.profile(config.tls.as_deref()),
                alt_svc: quic
                    .as_ref()
                    .and_then(|quic| quic.alt_svc(&snapshot.config.quic)),
            };
            let known = |bound: &Arc<Bound>, before: &mut Vec<Rc<Listening>>| {
                let mut all = before.iter();
                let known = all.position(|listening| Arc::ptr_eq(&listening.bound, bound));
                let known = before.swap_remove(known?);
                known.configure(door());
                Some(known)
            };
            let listening = known(bound, &mut before);
            let listening = listening.unwrap_or_else(|| self.begin(&open.port, bound, door()));
            open.listeners.push(listening);
            if let Some(quic) = quic {
                let listening = known(&quic.bound, &mut before);
                let begin = || self.begin_quic(&open.port, quic, door());
                open.listeners.push(listening.unwrap_or_else(begin));
            }
        }
        let linger = snapshot.config.limits.linger_max;
        for listening in before {
            listening.end(end_of(&listening.bound, snapshot, linger));
        }
    }

    fn begin(&mut self, port: &Rc<Port>, bound: &Arc<Bound>, door: Door) -> Rc<Listening> {
        let listening = Rc::new(Listening::new(Arc::clone(bound), door));
        match bound.part_of(self.index) {
            Ok(sockets) => {
                for socket in sockets {
                    let (port, listening) = (Rc::clone(port), Rc::clone(&listening));
                    let permits = Arc::clone(&self.permits);
                    self.listening
                        .spawn_local(listen::serve(port, listening, socket, permits));
                }
            }
            Err(error) => {
                tracing::error!(address = %bound.shown(), "cannot listen: {error}");
            }
        }
        listening
    }

    fn begin_quic(
        &mut self,
        port: &Rc<Port>,
        quic: &Arc<QuicListener>,
        door: Door,
    ) -> Rc<Listening> {
        let listening = Rc::new(Listening::new(Arc::clone(&quic.bound), door));
        match quic.bound.part_of(self.index) {
            Ok(sockets) => {
                let (port, quic) = (Rc::clone(port), Arc::clone(quic));
                let permits = Arc::clone(&self.permits);
                let serving = quic::serve(port, Rc::clone(&listening), quic, sockets, permits);
                self.listening.spawn_local(serving);
            }
            Err(error) => {
                tracing::error!(address = %quic.bound.shown(), "cannot listen: {error}");
            }
        }
        listening
    }

    /// No more clients; those who are idle are waited for only where another process takes the next.
    fn close(&self, farewell: &Farewell) {
        for open in self.open.iter().chain(&self.leaving) {
            let linger = open.port.settings().limits.linger_max;
            let holds = open.port.service.gate.word().mode == Mode::Holding;
            let idle_grace = match farewell {
                Farewell::Stop => Duration::ZERO,
                // Nobody is answered meanwhile, and so nobody learns that he should leave.
                Farewell::HandOver { .. } if holds => open.port.settings().limits.client_idle_max,
                Farewell::HandOver { .. } => linger,
            };
            open.port.closing.close(idle_grace);
            for listening in &open.listeners {
                let bound = &listening.bound;
                listening.end(match farewell {
                    Farewell::Stop if bound.keeper == Keeper::Supervisor => Manner::Leave,
                    Farewell::Stop => Manner::Empty {
                        linger: Duration::ZERO,
                    },
                    Farewell::HandOver { unused } if unused.contains(&bound.place) => {
                        Manner::Empty { linger }
                    }
                    Farewell::HandOver { .. } => Manner::Leave,
                });
            }
        }
    }
}

/// A listener that another service has taken over, or that the supervisor keeps, is left as it is.
fn end_of(bound: &Bound, snapshot: &Snapshot, linger: Duration) -> Manner {
    if bound.keeper == Keeper::Supervisor || snapshot.has(&bound.place) {
        Manner::Leave
    } else {
        Manner::Empty { linger }
    }
}

fn buffer_size(snapshot: &Snapshot) -> usize {
    snapshot.config.limits.head_bytes_max.max(BUFFER_BYTES_MIN)
}

async fn watch_hangups(hangup: Rc<HangupWatch>) {
    if let Err(error) = hangup.run().await {
        tracing::error!("clients that leave while held are no longer noticed: {error}");
    }
}

/// Differs between starts, workers and services: time of the start, and which.
fn id_origin(worker: usize, port: usize) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or_default();
    let place = u64::try_from(worker * 64 + port).unwrap_or_default();
    nanoseconds.rotate_left(16) ^ place ^ u64::from(std::process::id()) << 16
}
