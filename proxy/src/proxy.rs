//! A running proxy: worker threads, one control thread, and the handle that ends them.
//!
//! Everything that can fail for want of an address, a file or a folder fails in [`Proxy::start`], before the first
//! client is served.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use cutover_protocol::hold::{InFlight, ServiceStatus};
use cutover_protocol::id::ServiceName;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use crate::access_log::AccessLog;
use crate::config::{Config, ListenAddress, LogTarget};
use crate::control::commands::Commander;
use crate::control::server::{ControlError, ControlSocket};
use crate::listen::{self, Listener};
use crate::metrics::Metrics;
use crate::service::{Service, StateDir, StateError, keep};
use crate::tls::TlsError;
use crate::tls::profile::{self, Profile};
use crate::worker::{Phase, Question, WorkerSeed};

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
    /// The access log cannot be opened.
    #[error("cannot open the access log {}; check its folder", .path.display())]
    AccessLog {
        /// The file.
        path: PathBuf,
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
    services: Vec<Arc<Service>>,
    addresses: Addresses,
    metrics: Option<SocketAddr>,
    stop: Option<oneshot::Sender<Stop>>,
    threads: Vec<JoinHandle<()>>,
}

/// How to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Finish what runs, within this time.
    Gently(Duration),
    /// At once.
    AtOnce,
}

/// What the control thread needs; made on the main thread.
struct ControlSeed {
    socket: Arc<ControlSocket>,
    commander: Arc<Commander>,
    metrics: Option<(TcpListener, Arc<Metrics>)>,
    phase: watch::Sender<Phase>,
    over: mpsc::Receiver<Vec<InFlight>>,
    stop: oneshot::Receiver<Stop>,
    linger_max: Duration,
    profiles: Vec<Arc<Profile>>,
    /// Keeps the state folder locked until the end.
    _state: StateDir,
}

impl Proxy {
    /// Reads the state back, takes every address and starts serving.
    ///
    /// # Errors
    /// Anything the configuration names that is not usable; nothing keeps running then.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let state = StateDir::open(&config.state_dir)?;
        let mut services = Vec::new();
        for service in &config.services {
            services.push(Arc::new(Service::open(service, config, &state)?));
        }
        let socket = ControlSocket::bind(&config.control)?;
        let metrics_listener = config
            .metrics
            .map(|address| listen_one(address, "metrics"))
            .transpose()?;
        let metrics = metrics_listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        let (log, mut threads) = open_log(config.access_log.as_ref())?;
        let profiles = load_profiles(config)?;
        let (addresses, per_worker) = listen_all(&services, &profiles, config.workers)?;
        let permits = Arc::new(Semaphore::new(
            config.limits.connections_max.min(Semaphore::MAX_PERMITS),
        ));
        let (phase, _) = watch::channel(Phase::Running);
        let (over, ended) = mpsc::channel(config.workers);
        let mut workers = Vec::new();
        for (index, services) in per_worker.into_iter().enumerate() {
            let (questions, inbox) = mpsc::channel::<Question>(QUESTIONS_MAX);
            workers.push(questions);
            let seed = WorkerSeed {
                index,
                services,
                limits: config.limits.clone(),
                access_log: log.clone(),
                permits: Arc::clone(&permits),
                questions: inbox,
                phase: phase.subscribe(),
                over: over.clone(),
            };
            threads.push(spawn(format!("worker-{index}"), move || seed.run())?);
        }
        let (stop, stopped) = oneshot::channel();
        let scraped = Arc::new(Metrics {
            services: services.clone(),
            access_log: log,
        });
        let seed = ControlSeed {
            socket: Arc::new(socket),
            commander: Arc::new(Commander {
                services: services.clone(),
                workers,
            }),
            metrics: metrics_listener.map(|listener| (listener, scraped)),
            phase,
            over: ended,
            stop: stopped,
            linger_max: config.limits.linger_max,
            profiles,
            _state: state,
        };
        threads.push(spawn("control".to_owned(), move || seed.run())?);
        Ok(Self {
            services,
            addresses,
            metrics,
            stop: Some(stop),
            threads,
        })
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
        let mut named = self.services.iter().zip(&self.addresses);
        let found = named.find(|(service, _)| service.name().as_str() == name);
        found.map_or_else(Vec::new, |(_, addresses)| addresses.clone())
    }

    /// Where metrics are scraped, if they are.
    #[must_use]
    pub const fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// A service's state now.
    #[must_use]
    pub fn status(&self, name: &ServiceName) -> Option<ServiceStatus> {
        self.services
            .iter()
            .find(|service| service.name() == name)
            .map(|service| service.status())
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
        let service = self
            .services
            .iter()
            .find(|service| service.name() == name)?;
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

    /// Stops accepting, lets requests in flight finish within `limit`, refuses whoever is still held then, cuts off
    /// the rest.
    pub fn stop(mut self, limit: Duration) {
        self.end(Stop::Gently(limit));
    }

    fn end(&mut self, how: Stop) {
        if let Some(stop) = self.stop.take() {
            // A control thread that is gone has taken the workers with it.
            stop.send(how).ok();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread panicked");
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end(Stop::AtOnce);
    }
}

/// Of each service's listeners; unix sockets have none.
type Addresses = Vec<Vec<Option<SocketAddr>>>;
type PerWorker = Vec<Vec<(Arc<Service>, Vec<Listener>)>>;

/// Binds every listener once a worker; the addresses are in the order of the services and their listeners.
fn listen_all(
    services: &[Arc<Service>],
    profiles: &[Arc<Profile>],
    workers: usize,
) -> Result<(Addresses, PerWorker), StartError> {
    let mut addresses = Vec::new();
    let mut per_worker: PerWorker = (0..workers).map(|_| Vec::new()).collect();
    for service in services {
        for worker in &mut per_worker {
            worker.push((Arc::clone(service), Vec::new()));
        }
        let mut bound = Vec::new();
        for config in &service.config.listen {
            let sockets =
                listen::bind(&config.address, workers).map_err(|source| StartError::Listen {
                    address: config.address.clone(),
                    what: format!("service {}", service.name()),
                    source,
                })?;
            bound.push(sockets.first().and_then(listen::bound_address));
            for (worker, socket) in per_worker.iter_mut().zip(sockets) {
                if let Some((_, listeners)) = worker.last_mut() {
                    let named =
                        |profile: &&Arc<Profile>| config.tls.as_deref() == Some(profile.name());
                    listeners.push(Listener {
                        tls: profiles.iter().find(named).map(Arc::clone),
                        config: config.clone(),
                        socket,
                    });
                }
            }
        }
        addresses.push(bound);
    }
    Ok((addresses, per_worker))
}

fn load_profiles(config: &Config) -> Result<Vec<Arc<Profile>>, StartError> {
    let profiles = config.tls.iter().map(Profile::load);
    profiles.collect::<Result<_, _>>().map_err(StartError::Tls)
}

fn listen_one(address: SocketAddr, what: &str) -> Result<TcpListener, StartError> {
    let address = ListenAddress::Tcp(address);
    match listen::bind(&address, 1) {
        Ok(mut sockets) => Ok(sockets.swap_remove(0).into()),
        Err(source) => Err(StartError::Listen {
            address,
            what: what.to_owned(),
            source,
        }),
    }
}

type OpenLog = (Option<AccessLog>, Vec<JoinHandle<()>>);

fn open_log(target: Option<&LogTarget>) -> Result<OpenLog, StartError> {
    let Some(target) = target else {
        return Ok((None, Vec::new()));
    };
    let path = match target {
        LogTarget::Stdout => PathBuf::from("stdout"),
        LogTarget::File(path) => path.clone(),
    };
    let (log, thread) =
        AccessLog::open(target).map_err(|source| StartError::AccessLog { path, source })?;
    Ok((Some(log), vec![thread]))
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
        let mut tasks = JoinSet::new();
        for service in &self.commander.services {
            tasks.spawn_local(keep(Arc::clone(service)));
        }
        tasks.spawn_local(profile::keep(std::mem::take(&mut self.profiles)));
        if let Some((listener, metrics)) = self.metrics.take() {
            tasks.spawn_local(async move {
                if let Err(error) = metrics.serve(listener).await {
                    tracing::error!("metrics are no longer served: {error}");
                }
            });
        }
        let (socket, commander) = (Arc::clone(&self.socket), Arc::clone(&self.commander));
        tasks.spawn_local(async move {
            if let Err(error) = socket.serve(commander).await {
                tracing::error!("the control socket no longer works, leases go on: {error}");
            }
        });
        let stop = (&mut self.stop).await.unwrap_or(Stop::AtOnce);
        // Commands are obeyed to the end: a hold may be released while we wait for its held.
        self.close(stop).await;
    }

    /// Workers finish by themselves; whoever is still held at the end of the limit is refused with 503, and gets a
    /// moment to read it.
    async fn close(&mut self, stop: Stop) {
        self.phase.send_replace(Phase::Closing);
        let workers = self.commander.workers.len();
        let mut ended = 0;
        if let Stop::Gently(limit) = stop {
            if timeout(limit, self.wait_for_workers(&mut ended, workers))
                .await
                .is_ok()
            {
                return;
            }
            self.commander
                .services
                .iter()
                .for_each(|service| service.gate.shut());
            if timeout(
                self.linger_max * 2,
                self.wait_for_workers(&mut ended, workers),
            )
            .await
            .is_ok()
            {
                return;
            }
        }
        self.phase.send_replace(Phase::Cut);
        self.wait_for_workers(&mut ended, workers).await;
    }

    async fn wait_for_workers(&mut self, ended: &mut usize, workers: usize) {
        while *ended < workers {
            let Some(left) = self.over.recv().await else {
                return;
            };
            *ended += 1;
            for InFlight {
                client,
                what,
                age_ms,
            } in left
            {
                tracing::warn!(client, what, age_ms, "cut off at shutdown");
            }
        }
    }
}
