//! A proxy's life beyond its requests: reading its configuration anew, passing its sockets on to a new process,
//! and what it says to the supervisor that started it. Nothing here touches a request; clients notice nothing.

pub(crate) mod facts;
#[allow(dead_code)] // until a new process takes over
pub(crate) mod inherited;
pub(crate) mod permits;
pub(crate) mod reload;

use std::cell::RefCell;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::id::ServiceName;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::listen::bound::Bound;
use crate::metrics::Metrics;
use crate::service::keep;
use crate::snapshot::{Ground, Shared, Snapshot};
use crate::tls::profile;
use crate::upstream::{Care, Group};
use crate::worker::Question;
use facts::Facts;
use permits::Permits;

/// How long a worker may take to go by a new snapshot; it does so between two polls of its tasks.
const APPLY_MAX: Duration = Duration::from_secs(5);

/// A running proxy, as the control thread sees it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) shared: Shared,
    pub(crate) workers: Vec<mpsc::Sender<Question>>,
    pub(crate) permits: Permits,
    pub(crate) facts: Arc<Facts>,
    ground: Ground,
    tended: RefCell<Tended>,
    /// One reload or upgrade at a time.
    turn: Mutex<()>,
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
}

impl Running {
    pub(crate) fn new(
        shared: Shared,
        workers: Vec<mpsc::Sender<Question>>,
        permits: Permits,
        facts: Arc<Facts>,
        ground: Ground,
    ) -> Self {
        Self {
            shared,
            workers,
            permits,
            facts,
            ground,
            tended: RefCell::default(),
            turn: Mutex::new(()),
        }
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
                let task = tokio::task::spawn_local(keep(Arc::clone(&serving.service)));
                tended.keepers.push((name.clone(), task.abort_handle()));
            }
        }
        let profiles = snapshot.profiles.clone();
        let profiles = tokio::task::spawn_local(profile::keep(profiles)).abort_handle();
        if let Some(before) = tended.profiles.replace(profiles) {
            before.abort();
        }
        let gates_of = |group: &Arc<Group>| {
            let serving = snapshot.services.iter();
            let ours = serving.filter(|serving| serving.sites.has(group));
            ours.map(|serving| Arc::clone(&serving.service.gate))
                .collect()
        };
        // The old tasks end before the new ones begin: two checks at once would count twice.
        tended.care = None;
        let resolver = &snapshot.config.resolver;
        tended.care = Some(Care::begin(&snapshot.directory, resolver, gates_of));
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
