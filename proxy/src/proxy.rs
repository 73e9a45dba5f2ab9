//! A running proxy: worker threads, one control thread, and the handle that ends them.
//!
//! Everything that can fail for want of an address, a file or a folder fails in [`Proxy::start`], before the first
//! client is served.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use cutover_protocol::hold::{InFlight, ServiceStatus};
use cutover_protocol::id::ServiceName;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use crate::config::{Config, ListenAddress};
use crate::control::commands::Commander;
use crate::control::events::Events;
use crate::control::server::{ControlError, ControlSocket};
use crate::ledger::Ledger;
use crate::life::inherited::Inherited;
use crate::life::permits::Permits;
use crate::life::successor::{self, Estate, Predecessor, SuccessionError};
use crate::life::{self, Running, RunningSeed, supervisor};
use crate::limit::Guards;
use crate::listen::bound::Place;
use crate::listen::quic::secrets::SecretsError;
use crate::service::{Mode, Service, StateDir, StateError};
use crate::snapshot::{Ground, Logs, Shared, Snapshot};
use crate::tls::TlsError;
use crate::worker::{Farewell, Phase, Question, WorkerSeed};

/// How long the answer to an upgrade may take to be written.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Orders of the main thread that may wait.
const ORDERS_MAX: usize = 4;
/// Questions that may wait for a worker.
const QUESTIONS_MAX: usize = 16;

/// Why a proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state is not usable.
    #[error(transparent)]
    State(#[from] StateError),
    /// The control socket is not usable.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A certificate or key is not usable.
    #[error(transparent)]
    Tls(TlsError),
    /// The key of connection ids is not usable.
    #[error(transparent)]
    Quic(#[from] SecretsError),
    /// A listener's address is not ours to have.
    #[error("cannot listen on {address} for {what}; is another process using it?")]
    Listen {
        /// Where.
        address: ListenAddress,
        /// For which service, or for metrics.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A service names an upstream that is not configured.
    #[error(
        "service {service} names an upstream that does not exist; add an [[upstream]] of that name"
    )]
    Upstream {
        /// The service.
        service: ServiceName,
    },
    /// The access log cannot be opened.
    #[error("cannot open the access log {}; check its folder", .path.display())]
    AccessLog {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Spans cannot be sent.
    #[error("cannot send spans to {endpoint}; check [traces]")]
    Traces {
        /// The collector.
        endpoint: Box<str>,
        /// What the exporter said.
        source: io::Error,
    },
    /// The ledger of unknown outcomes cannot be written.
    #[error(
        "the ledger of unknown outcomes cannot be opened in the state folder; let this user write to it"
    )]
    Ledger {
        /// What the system said.
        source: io::Error,
    },
    /// No threads or no runtime to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// A running proxy. Dropped without [`Proxy::stop`], it cuts every connection.
#[derive(Debug)]
pub struct Proxy {
    /// `None` only while it ends: the last snapshot keeps the access log's thread.
    shared: Option<Shared>,
    orders: mpsc::Sender<Order>,
    wish: watch::Sender<Wish>,
    phase: watch::Sender<Phase>,
    ended: watch::Receiver<bool>,
    threads: Vec<JoinHandle<()>>,
    logs: Logs,
}

/// How long it is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Not to begin yet: another process serves.
    Wait,
    GoOn,
    /// Finish what runs, within this time.
    End(Duration),
    /// End at once.
    Cut,
}

/// What the main thread may ask of the control thread; what comes of it is in the log.
#[derive(Debug)]
enum Order {
    Reload,
    Upgrade,
    Outlive(Predecessor),
}

/// What ties a new process to the one before it.
struct Heirloom {
    predecessor: Predecessor,
    /// Places of the old configuration that the new one does not have.
    unused: Vec<Place>,
}

/// Why nothing was taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The old process did not hand over.
    #[error(transparent)]
    Succession(#[from] SuccessionError),
    /// This one could not have served.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// What the control thread needs; made on the main thread.
struct ControlSeed {
    running: RunningSeed,
    socket: ControlSocket,
    phase: watch::Sender<Phase>,
    over: mpsc::Receiver<Vec<InFlight>>,
    orders: mpsc::Receiver<Order>,
    wish: watch::Receiver<Wish>,
    ended: watch::Sender<bool>,
}

/// Where a proxy's open files come from.
enum Origin {
    /// Made, or given by a supervisor.
    Fresh(Inherited),
    /// Handed over by the process before this one.
    Estate(Estate),
}

impl Proxy {
    /// Reads the state back, takes every address and starts serving.
    ///
    /// # Errors
    /// Anything the configuration names that is not usable; nothing keeps running then.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let (proxy, _) = Self::prepare(config, Origin::Fresh(Inherited::default()))?;
        proxy.begin();
        Ok(proxy)
    }

    /// The same, with the sockets that a supervisor has bound for this process; those that no listener has are left
    /// alone.
    ///
    /// # Errors
    /// As [`Proxy::start`].
    pub fn start_supervised(config: &Config) -> Result<Self, StartError> {
        let (proxy, _) = Self::prepare(config, Origin::Fresh(supervisor::sockets()))?;
        proxy.begin();
        Ok(proxy)
    }

    /// Takes over from the proxy that runs with the same state folder and control socket: its listening sockets
    /// with everybody who waits in their queues, its registers, its commands. Blocks until this is done.
    ///
    /// # Errors
    /// The running proxy goes on as if nothing had happened.
    pub fn take_over(config: &Config) -> Result<Self, TakeOverError> {
        let limit = config.limits.upgrade_max;
        let estate = successor::ask(config, limit)?;
        let (proxy, predecessor) = match Self::prepare(config, Origin::Estate(estate)) {
            Ok((proxy, Some(estate))) => (proxy, estate),
            Ok((proxy, None)) => return Ok(proxy),
            Err(error) => return Err(error.into()),
        };
        let Heirloom {
            predecessor,
            unused,
        } = predecessor;
        let services = config.services.iter();
        let gates = services.map(|service| service.name.clone()).collect();
        predecessor.wait_for_our_turn(unused, gates)?;
        // Clients first: those who are in the queues wait for nothing but this.
        proxy.phase.send_replace(Phase::Running);
        if let Err(error) = predecessor.say_serving() {
            tracing::warn!("the process before this one went away without a farewell: {error}");
        }
        // It waits for room for one, and there is room for four.
        proxy.orders.try_send(Order::Outlive(predecessor)).ok();
        proxy.begin();
        Ok(proxy)
    }

    /// Lets workers and commands begin.
    fn begin(&self) {
        self.phase.send_replace(Phase::Running);
        self.wish.send_replace(Wish::GoOn);
    }

    /// Makes everything, serves nobody.
    fn prepare(config: &Config, origin: Origin) -> Result<(Self, Option<Heirloom>), StartError> {
        let (state, mut inherited, control, predecessor) = match origin {
            Origin::Fresh(inherited) => (StateDir::open(&config.state_dir)?, inherited, None, None),
            Origin::Estate(estate) => (
                StateDir::inherit(&config.state_dir, estate.lock)?,
                estate.inherited,
                Some(estate.control),
                Some(estate.predecessor),
            ),
        };
        let declined = |error: StartError| {
            if let Some(predecessor) = &predecessor {
                successor::decline(&predecessor.channel, &life::chain(&error));
            }
            error
        };
        let ledger = Ledger::open(&config.state_dir);
        let ledger = ledger.map_err(|source| declined(StartError::Ledger { source }));
        let (ledger, keeper) = ledger?;
        let logs = Logs::default();
        logs.add(keeper);
        let ground = Ground {
            state,
            logs: logs.clone(),
            guards: Guards::new(ledger),
            events: Events::default(),
        };
        let snapshot = Snapshot::make(config.clone(), None, &ground, &mut inherited);
        let snapshot = Arc::new(snapshot.map_err(&declined)?);
        let socket = match control {
            Some(socket) => ControlSocket::inherit(&config.control, socket),
            None => ControlSocket::bind(&config.control)?,
        };
        if predecessor.is_none() {
            supervisor::mention_unused(&inherited);
        }
        let heirloom = predecessor.map(|predecessor| Heirloom {
            predecessor,
            unused: inherited.left(),
        });
        let proxy = Self::spawn(snapshot, ground, logs, socket)?;
        Ok((proxy, heirloom))
    }

    fn spawn(
        snapshot: Arc<Snapshot>,
        ground: Ground,
        logs: Logs,
        socket: ControlSocket,
    ) -> Result<Self, StartError> {
        let count = snapshot.config.workers;
        let permits = Permits::new(snapshot.config.limits.connections_max);
        let phase = watch::Sender::new(Phase::Waiting);
        let (over, ended) = mpsc::channel(count);
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for index in 0..count {
            let (questions, inbox) = mpsc::channel::<Question>(QUESTIONS_MAX);
            workers.push(questions);
            let seed = WorkerSeed {
                index,
                snapshot: Arc::clone(&snapshot),
                permits: Arc::clone(&permits.free),
                questions: inbox,
                phase: phase.subscribe(),
                over: over.clone(),
            };
            threads.push(spawn(format!("worker-{index}"), move || seed.run())?);
        }
        let shared = Shared::new(ArcSwap::new(snapshot));
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        let (wish, wished) = watch::channel(Wish::Wait);
        let (has_ended, is_over) = watch::channel(false);
        let seed = ControlSeed {
            running: RunningSeed {
                shared: Arc::clone(&shared),
                workers,
                permits,
                ground,
                binary: this_program(),
                control: socket.share().map_err(StartError::Thread)?,
            },
            socket,
            phase: phase.clone(),
            over: ended,
            orders: ordered,
            wish: wished,
            ended: has_ended,
        };
        threads.push(spawn("control".to_owned(), move || seed.run())?);
        Ok(Self {
            shared: Some(shared),
            orders,
            wish,
            phase,
            ended: is_over,
            threads,
            logs,
        })
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.shared.as_ref().map(|shared| shared.load_full())
    }

    fn service(&self, name: &ServiceName) -> Option<Arc<Service>> {
        self.snapshot()?.service(name).map(Arc::clone)
    }

    /// Where a service's clients connect by TCP first, with the port the kernel chose if the configuration said
    /// zero.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<SocketAddr> {
        self.addresses(name).into_iter().flatten().next()
    }

    /// The same for each of its listeners in turn; unix sockets have none.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Vec<Option<SocketAddr>> {
        let Some(snapshot) = self.snapshot() else {
            return Vec::new();
        };
        let mut services = snapshot.services.iter();
        let found = services.find(|serving| serving.service.name().as_str() == name);
        found.map_or_else(Vec::new, |serving| {
            serving
                .listeners
                .iter()
                .map(|bound| bound.address)
                .collect()
        })
    }

    /// Where metrics are scraped, if they are.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.snapshot()?.metrics.as_ref()?.address
    }

    /// A service's state now.
    #[must_use]
    pub fn status(&self, name: &ServiceName) -> Option<ServiceStatus> {
        self.service(name).map(|service| service.status())
    }

    /// Waits until what is known of a service is as the caller wants it. Wakes with every change of the held
    /// counters, the gate or the register, not with changes of what is in flight.
    ///
    /// # Cancel safety
    /// Yes.
    pub async fn until(
        &self,
        name: &ServiceName,
        wanted: impl Fn(&ServiceStatus) -> bool,
    ) -> Option<ServiceStatus> {
        let service = self.service(name)?;
        loop {
            let counted = service.gate.counted.notified();
            tokio::pin!(counted);
            counted.as_mut().enable();
            let status = service.status();
            if wanted(&status) {
                return Some(status);
            }
            counted.await;
        }
    }

    /// How long requests in flight may take to finish, by the configuration in force.
    #[must_use]
    pub fn shutdown_max(&self) -> Duration {
        let snapshot = self.snapshot();
        snapshot.map_or(Duration::ZERO, |snapshot| {
            snapshot.config.limits.shutdown_max
        })
    }

    /// Asks for the configuration to be read again; what comes of it is in the log.
    pub fn reload(&self) {
        if self.orders.try_send(Order::Reload).is_err() {
            tracing::warn!("not reloading: enough reloads are waiting already");
        }
    }

    /// Asks for a new process in the place of this one; what comes of it is in the log, and at the end of this
    /// proxy.
    pub fn upgrade(&self) {
        if self.orders.try_send(Order::Upgrade).is_err() {
            tracing::warn!("not upgrading: enough is waiting to be done already");
        }
    }

    /// Stops accepting, lets requests in flight finish within `limit`, refuses whoever is still held then, cuts off
    /// the rest. Returns at once; [`Proxy::ended`] says when it is over.
    pub fn begin_stop(&self, limit: Duration) {
        self.wish.send_replace(Wish::End(limit));
    }

    /// Cuts off everybody now, also those a stop would still wait for.
    pub fn cut(&self) {
        self.wish.send_replace(Wish::Cut);
    }

    /// Completes when the last connection has ended, after a stop or because another process has taken over.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // A sender that is gone has ended, too.
        drop(ended.wait_for(|ended| *ended).await);
    }

    /// Whether it is over already.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// [`Proxy::begin_stop`], and waits for the end.
    pub fn stop(mut self, limit: Duration) {
        self.begin_stop(limit);
        self.join();
    }

    fn join(&mut self) {
        let mut threads = std::mem::take(&mut self.threads);
        join_all(&mut threads);
        self.shared = None;
        join_all(&mut self.logs.take());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.wish.send_if_modified(|wish| {
            let goes_on = matches!(*wish, Wish::Wait | Wish::GoOn);
            if goes_on {
                *wish = Wish::Cut;
            }
            goes_on
        });
        self.join();
    }
}

fn join_all(threads: &mut Vec<JoinHandle<()>>) {
    for thread in threads.drain(..) {
        if thread.join().is_err() {
            tracing::error!("a thread panicked");
        }
    }
}

/// The one way to start a thread: named, and heard of when it fails.
fn spawn(
    name: String,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<JoinHandle<()>, StartError> {
    let builder = std::thread::Builder::new().name(name.clone());
    let run = move || {
        if let Err(error) = body() {
            tracing::error!("thread {name} ended: {error}");
        }
    };
    builder.spawn(run).map_err(StartError::Thread)
}

impl ControlSeed {
    fn run(self) -> io::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, self.work());
        Ok(())
    }

    async fn work(mut self) {
        let mut wish = self.wish.clone();
        // The sender is gone with the main thread, which ends us.
        drop(wish.wait_for(|wish| *wish != Wish::Wait).await);
        let running = Rc::new(Running::new(self.running));
        let mut tasks = JoinSet::new();
        let socket = Rc::new(self.socket);
        if *wish.borrow() == Wish::GoOn {
            running.tend(&running.shared.load());
            socket.own_file(true);
            let commander = Rc::new(Commander {
                running: Rc::clone(&running),
            });
            // Known before the first command: whom this process has taken over from.
            while let Ok(order) = self.orders.try_recv() {
                tasks.spawn_local(obey(Rc::clone(&running), order));
            }
            supervisor::ready(&running.shared.load());
            let workers = running.workers.clone();
            tasks.spawn_local(supervisor::give_signs_of_life(workers));
            let socket = Rc::clone(&socket);
            tasks.spawn_local(async move {
                if let Err(error) = socket.serve(commander).await {
                    tracing::error!("the control socket no longer works, leases go on: {error}");
                }
            });
        }
        let (limit, farewell) = until_end(&running, &mut self.orders, &mut wish, &mut tasks).await;
        running.ending.set(true);
        let replaced = farewell != Farewell::Stop;
        if !replaced {
            supervisor::stopping();
        }
        // A process that was to take over and never did leaves the file to the one that has it.
        if replaced {
            socket.own_file(false);
        }
        // Commands are obeyed to the end: a hold may be released while we wait for its held.
        let mut closing = Closing {
            running: &running,
            phase: self.phase,
            over: self.over,
            wish,
            ended: 0,
        };
        closing.run(limit, farewell).await;
        if replaced {
            drop(timeout(ANSWER_MAX, running.answering.lock()).await);
        }
        self.ended.send_replace(true);
    }
}

/// Does what is asked until somebody wants an end, or another process has taken over; within what time to end, and
/// how.
async fn until_end(
    running: &Rc<Running>,
    orders: &mut mpsc::Receiver<Order>,
    wish: &mut watch::Receiver<Wish>,
    tasks: &mut JoinSet<()>,
) -> (Option<Duration>, Farewell) {
    let mut handed = running.handed.subscribe();
    loop {
        tokio::select! {
            changed = wish.wait_for(|wish| *wish != Wish::GoOn) => return match changed.as_deref() {
                Ok(Wish::End(limit)) => (Some(*limit), Farewell::Stop),
                _ => (None, Farewell::Stop),
            },
            Ok(handed) = handed.wait_for(Option::is_some) => {
                running.stop_scrapes();
                let unused = handed.iter().flat_map(|handed| handed.unused.clone()).collect();
                let limit = running.shared.load().config.limits.shutdown_max;
                return (Some(limit), Farewell::HandOver { unused });
            }
            Some(order) = orders.recv() => {
                tasks.spawn_local(obey(Rc::clone(running), order));
            }
        }
    }
}

/// Each order says itself what came of it.
async fn obey(running: Rc<Running>, order: Order) {
    match order {
        Order::Reload => drop(running.reload().await),
        Order::Upgrade => drop(running.upgrade(None).await),
        Order::Outlive(predecessor) => running.outlive(predecessor).await,
    }
}

/// What an upgrade starts: the program as it was called, which may be a link that has moved on since; or else as
/// the system found it.
fn this_program() -> PathBuf {
    let called = std::env::args_os().next().map(PathBuf::from);
    let absolute = called.filter(|path| path.is_absolute());
    absolute.unwrap_or_else(|| std::env::current_exe().unwrap_or_default())
}

/// The end of a proxy.
struct Closing<'r> {
    running: &'r Running,
    phase: watch::Sender<Phase>,
    over: mpsc::Receiver<Vec<InFlight>>,
    wish: watch::Receiver<Wish>,
    /// Workers that have.
    ended: usize,
}

impl Closing<'_> {
    /// Workers finish by themselves; whoever is still held at the end of the limit is refused with 503, and gets a
    /// moment to read it. Without a limit everybody is cut off at once.
    async fn run(&mut self, limit: Option<Duration>, farewell: Farewell) {
        let snapshot = self.running.shared.load_full();
        if let Farewell::HandOver { unused } = &farewell {
            // What the new process has is its own now, to close as it likes.
            let theirs = snapshot.sockets();
            let theirs = theirs.filter(|bound| !unused.contains(&bound.place));
            theirs.for_each(|bound| bound.release());
        }
        let hands_over = matches!(farewell, Farewell::HandOver { .. });
        self.phase.send_replace(Phase::Closing(farewell));
        if let Some(limit) = limit {
            // Whoever is held here waits for the gate of the new process, and that takes its own time.
            if hands_over && self.workers_end_before_gates_open(&snapshot).await {
                return;
            }
            if self.workers_end_within(limit).await {
                return;
            }
            for serving in &snapshot.services {
                serving.service.gate.shut();
            }
            let linger = snapshot.config.limits.linger_max * 2;
            if self.workers_end_within(linger).await {
                return;
            }
        }
        self.phase.send_replace(Phase::Cut);
        self.workers_end().await;
    }

    /// False when the time is over or somebody wants it to be.
    async fn workers_end_within(&mut self, limit: Duration) -> bool {
        let mut wish = self.wish.clone();
        tokio::select! {
            biased;
            _ = wish.wait_for(|wish| *wish == Wish::Cut) => false,
            ended = timeout(limit, self.workers_end()) => ended.is_ok(),
        }
    }

    /// False when no gate holds any more, the new process is gone, or somebody wants it to be over.
    async fn workers_end_before_gates_open(&mut self, snapshot: &Snapshot) -> bool {
        let (mut wish, mut deserted) = (self.wish.clone(), self.running.deserted.subscribe());
        let services = snapshot.services.iter();
        let words: Vec<_> = services
            .map(|serving| serving.service.gate.subscribe())
            .collect();
        let open = async {
            for mut words in words {
                drop(words.wait_for(|word| word.mode != Mode::Holding).await);
            }
        };
        tokio::select! {
            biased;
            _ = wish.wait_for(|wish| *wish == Wish::Cut) => false,
            _ = deserted.wait_for(|deserted| *deserted) => false,
            () = self.workers_end() => true,
            () = open => false,
        }
    }

    async fn workers_end(&mut self) {
        while self.ended < self.running.workers.len() {
            let Some(left) = self.over.recv().await else {
                return;
            };
            self.ended += 1;
            for InFlight {
                client,
                what,
                age_ms,
                ..
            } in left
            {
                tracing::warn!(client, what, age_ms, "cut off at shutdown");
            }
        }
    }
}
