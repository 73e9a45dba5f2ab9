//! A proxy's life beyond its requests: reading its configuration anew, passing its sockets on to a new process,
//! and what it says to the supervisor that started it. Nothing here touches a request; clients notice nothing.

pub(crate) mod channel;
pub(crate) mod facts;
pub(crate) mod inherited;
pub(crate) mod permits;
pub(crate) mod reload;
pub(crate) mod successor;
pub(crate) mod supervisor;
pub(crate) mod upgrade;

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::id::ServiceName;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::acme;
use crate::config::AcmeConfig;
use crate::control::events::Events;
use crate::limit::memory::Watermark;
use crate::listen::bound::Bound;
use crate::metrics::Metrics;
use crate::service::{Service, Word, keep};
use crate::snapshot::{Ground, Shared, Snapshot};
use crate::tls::profile;
use crate::upstream::{Care, Group};
use crate::worker::Question;
use channel::{Channel, Message};
use facts::Facts;
use permits::Permits;
use successor::Predecessor;
use upgrade::{Handed, Passing, say};

/// How long a worker may take to go by a new snapshot; it does so between two polls of its tasks.
const APPLY_MAX: Duration = Duration::from_secs(5);

/// A running proxy, as the control thread sees it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) shared: Shared,
    pub(crate) workers: Vec<mpsc::Sender<Question>>,
    pub(crate) permits: Permits,
    pub(crate) facts: Arc<Facts>,
    /// False while a new process is about to obey in our place.
    pub(crate) commands: watch::Sender<bool>,
    /// Once another process serves.
    pub(crate) handed: watch::Sender<Option<Handed>>,
    /// Taken while somebody is owed the answer to an upgrade.
    pub(crate) answering: Mutex<()>,
    /// No new work is begun any more.
    pub(crate) ending: Cell<bool>,
    ground: Ground,
    /// What an upgrade starts where it is not told otherwise.
    binary: PathBuf,
    /// The control socket.
    control: OwnedFd,
    tended: RefCell<Tended>,
    /// One reload or upgrade at a time.
    turn: Arc<Mutex<()>>,
    passing: Cell<Passing>,
    /// Why the last handover came to nothing.
    failure: watch::Sender<Option<String>>,
    /// The process before this one, while it still finishes what it began.
    predecessor: RefCell<Option<Option<i32>>>,
    /// Another process has taken over, and is gone.
    pub(crate) deserted: watch::Sender<bool>,
}

/// What a [`Running`] is made of.
pub(crate) struct RunningSeed {
    pub(crate) shared: Shared,
    pub(crate) workers: Vec<mpsc::Sender<Question>>,
    pub(crate) permits: Permits,
    pub(crate) ground: Ground,
    pub(crate) binary: PathBuf,
    pub(crate) control: OwnedFd,
}

/// What runs on the control thread for the snapshot in force.
#[derive(Debug, Default)]
struct Tended {
    keepers: Vec<(ServiceName, AbortHandle)>,
    metrics: Option<(Arc<Bound>, AbortHandle)>,
    /// Looks after the files of TLS profiles.
    profiles: Option<AbortHandle>,
    /// Checks servers, and resolves their names.
    care: Option<Care>,
    /// Watches how much memory is in use.
    memory: Option<AbortHandle>,
    /// Orders certificates. A reload that changes nothing about that does not disturb it.
    orders: Option<(Vec<AcmeConfig>, AbortHandle)>,
}

impl Running {
    pub(crate) fn new(seed: RunningSeed) -> Self {
        Self {
            shared: seed.shared,
            workers: seed.workers,
            permits: seed.permits,
            facts: Arc::new(Facts::new()),
            commands: watch::Sender::new(true),
            handed: watch::Sender::new(None),
            answering: Mutex::new(()),
            ending: Cell::new(false),
            ground: seed.ground,
            binary: seed.binary,
            control: seed.control,
            tended: RefCell::default(),
            turn: Arc::default(),
            passing: Cell::default(),
            failure: watch::Sender::new(None),
            predecessor: RefCell::default(),
            deserted: watch::Sender::new(false),
        }
    }

    /// Remembers the process before this one until it has ended. Until then nothing is held here: what it still
    /// does would not be.
    pub(crate) async fn outlive(&self, predecessor: Predecessor) {
        let Predecessor { channel, pid } = predecessor;
        *self.predecessor.borrow_mut() = Some(pid);
        if let Err(error) = self.lead(channel).await {
            tracing::warn!("cannot tell whether the process before this one has ended: {error}");
        }
        *self.predecessor.borrow_mut() = None;
        tracing::info!(pid, "the process before this one has ended");
    }

    /// Tells the process before this one what the gates do, until it has ended.
    async fn lead(&self, channel: Channel) -> io::Result<()> {
        let channel = Rc::new(channel.watch()?);
        let mut tellers = JoinSet::new();
        for serving in &self.shared.load().services {
            let (channel, service) = (Rc::clone(&channel), Arc::clone(&serving.service));
            tellers.spawn_local(async move { tell_gate(&channel, &service).await });
        }
        wait_for_end(&channel).await
    }

    /// Where everything that happens is told.
    pub(crate) const fn events(&self) -> &Events {
        &self.ground.events
    }

    /// The process before this one, while it is there; zero if its number is unknown.
    pub(crate) fn predecessor(&self) -> Option<i32> {
        self.predecessor.borrow().map(Option::unwrap_or_default)
    }

    /// Keeps exactly the services of this snapshot, and serves its metrics. Must be called within a local set.
    pub(crate) fn tend(&self, snapshot: &Snapshot) {
        let mut tended = self.tended.borrow_mut();
        tended.keepers.retain(|(name, task)| {
            let stays = snapshot.service(name).is_some();
            if !stays {
                task.abort();
            }
            stays
        });
        for serving in &snapshot.services {
            let name = serving.service.name();
            if !tended.keepers.iter().any(|(known, _)| known == name) {
                let service = &serving.service;
                let followed = self.events().clone().follow(Arc::clone(service));
                for task in [
                    tokio::task::spawn_local(keep(Arc::clone(service))),
                    tokio::task::spawn_local(followed),
                ] {
                    tended.keepers.push((name.clone(), task.abort_handle()));
                }
            }
        }
        let profiles = snapshot.profiles.clone();
        let profiles = tokio::task::spawn_local(profile::keep(profiles)).abort_handle();
        if let Some(before) = tended.profiles.replace(profiles) {
            before.abort();
        }
        let memory = Arc::clone(&snapshot.guards.memory);
        let mark = Watermark::of(&snapshot.config.limits);
        let memory = tokio::task::spawn_local(memory.keep(mark)).abort_handle();
        if let Some(before) = tended.memory.replace(memory) {
            before.abort();
        }
        let gates_of = |group: &Arc<Group>| {
            let serving = snapshot.services.iter();
            let ours = serving.filter(|serving| serving.all_sites().any(|sites| sites.has(group)));
            ours.map(|serving| Arc::clone(&serving.service.gate))
                .collect()
        };
        // The old tasks end before the new ones begin: two checks at once would count twice.
        tended.care = None;
        let resolver = &snapshot.config.resolver;
        tended.care = Some(Care::begin(&snapshot.directory, resolver, gates_of));
        let wanted = snapshot.config.acme();
        if tended.orders.as_ref().map(|(configs, _)| configs) != Some(&wanted) {
            let task = tokio::task::spawn_local(acme::keep(wanted.clone())).abort_handle();
            if let Some((_, before)) = tended.orders.replace((wanted, task)) {
                before.abort();
            }
        }
        let serves = tended.metrics.as_ref().map(|(bound, _)| bound);
        let unchanged = match (serves, &snapshot.metrics) {
            (Some(serves), Some(wanted)) => Arc::ptr_eq(serves, wanted),
            (None, None) => true,
            _ => false,
        };
        if !unchanged {
            if let Some((bound, task)) = tended.metrics.take() {
                task.abort();
                bound.release();
            }
            tended.metrics = snapshot.metrics.clone().map(|bound| {
                let task = tokio::task::spawn_local(self.scrape(Arc::clone(&bound)));
                (bound, task.abort_handle())
            });
        }
    }

    /// Metrics are the new process' now.
    pub(crate) fn stop_scrapes(&self) {
        if let Some((_, task)) = self.tended.borrow_mut().metrics.take() {
            task.abort();
        }
    }

    fn scrape(&self, bound: Arc<Bound>) -> impl Future<Output = ()> + 'static {
        let metrics = Metrics {
            shared: Arc::clone(&self.shared),
            facts: Arc::clone(&self.facts),
        };
        async move {
            if let Err(error) = Arc::new(metrics).serve(&bound).await {
                tracing::error!("metrics are no longer served: {error}");
            }
        }
    }

    /// Returns when every worker goes by the snapshot.
    async fn tell_workers(&self, snapshot: &Arc<Snapshot>) {
        let mut replies = Vec::new();
        for worker in &self.workers {
            let (reply, applied) = oneshot::channel();
            let snapshot = Arc::clone(snapshot);
            if worker
                .send(Question::Apply { snapshot, reply })
                .await
                .is_ok()
            {
                replies.push(applied);
            }
        }
        for applied in replies {
            // A worker that ended has nothing to apply.
            if timeout(APPLY_MAX, applied).await.is_err() {
                tracing::warn!(
                    "a worker is busy; it goes by the new configuration as soon as it can"
                );
            }
        }
    }
}

/// Tells of one gate, now and with each change, until nobody hears it any more.
async fn tell_gate(channel: &AsyncFd<Channel>, service: &Service) {
    let mut words = service.gate.subscribe();
    loop {
        let Word { mode, register } = *words.borrow_and_update();
        let message = Message::Gate {
            service: service.name().clone(),
            gate: mode.into(),
            register,
        };
        if say(channel, &message, &[]).await.is_err() || words.changed().await.is_err() {
            return;
        }
    }
}

async fn wait_for_end(channel: &AsyncFd<Channel>) -> io::Result<()> {
    // Nothing more is said on it.
    match channel.async_io(Interest::READABLE, Channel::receive).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => other.map(drop),
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}
