//! What each action of the machine means on real hosts. Every one may be repeated after a crash.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::hold::{Command, Expected};
use cutover_protocol::hop::{Action, Event, Round};
use cutover_protocol::id::{ContainerName, Epoch, ServiceName};
use cutover_protocol::plan::{Engine, Tracking};
use cutover_protocol::wire::{Request, Response, Severity};

use super::freeze::sealed;
use super::link::{SyncJob, unless_failed};
use super::memory::cgroup;
use super::trees::{Trees, finish};
use super::{Driver, patience};
use crate::cgroup::Cgroup;
use crate::config::Container;
use crate::lender;
use crate::peer::Priority;
use crate::report::{Moving, Progress, eta_seconds};

/// Passes over the files while the source runs: one for the bulk, one for what changed meanwhile.
const FILE_PASSES: u32 = 2;

/// The least a pre-copy or file pass may take, whatever the plan says of steps while clients wait.
pub(super) const UNHELD_MAX: Duration = Duration::from_secs(24 * 3600);

/// How often progress is told.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// How long the target may take to tear down before we stop waiting for it; clients may be held meanwhile.
pub(super) const KILL_MAX: Duration = Duration::from_secs(20);

impl Driver {
    /// Does one action; the event says what came of it.
    pub(super) async fn act(&mut self, action: Action) -> Result<Event, String> {
        let done = |()| Event::Done {
            action: action.name(),
        };
        match action {
            Action::Preflight => self.preflight().await.map(done),
            Action::OpenTunnel => self.open_tunnel().await,
            Action::SyncFiles => self.unless_aborted(Self::sync_files).await.map(done),
            Action::PreCopy { round } => self.pre_copy(round).await,
            Action::Hold { .. } => {
                // While nobody waits. Not given up half-way: what begins then would meet the next hop's.
                self.begin_dumps().await?;
                self.unless_aborted(Self::hold).await.map(done)
            }
            Action::Checkpoint => self.checkpoint().await.map(done),
            Action::Transfer => self.transfer().await.map(done),
            Action::Restore => self.restore().await.map(done),
            Action::Verify => self.verify().await.map(done),
            Action::Commit { epoch } => self
                .commit(epoch)
                .await
                .map(|register| Event::Committed { register }),
            Action::Settle { epoch } => self
                .settle(epoch)
                .await
                .map(|register| Event::Settled { register }),
            Action::Redirect => self.redirect().await.map(done),
            Action::Undo(undo) => self.undo(undo).await.map(done),
        }
    }

    pub(super) fn engine(&self) -> Engine {
        self.header.plan.settings().engine
    }

    pub(super) fn containers(&self) -> Vec<ContainerName> {
        self.header.plan.order().to_vec()
    }

    pub(super) fn container(&self, name: &ContainerName) -> Result<&Container, String> {
        self.host.container(name).map_err(|error| error.to_string())
    }

    pub(super) fn step_max(&self) -> Duration {
        Duration::from_millis(self.header.plan.settings().step_ms_max)
    }

    pub(super) fn step_ms(&self) -> u64 {
        self.header.plan.settings().step_ms_max
    }

    /// Long work up to the drain is dropped as soon as an abort is asked: it left nothing that an undo misses. A hold
    /// that reaches the proxy only after it was dropped names an epoch that settling the register has ended.
    async fn unless_aborted(
        &mut self,
        work: impl AsyncFnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut abort = self.watch.abort.subscribe();
        tokio::select! {
            result = work(self) => result,
            _ = abort.wait_for(|asked| *asked) => Err("an operator asked for the hop to be aborted".to_owned()),
        }
    }

    async fn preflight(&mut self) -> Result<(), String> {
        let (_, findings) =
            super::look(&self.host, &self.link, &self.header.plan, self.step_max()).await?;
        self.report.findings = findings
            .iter()
            .map(|finding| finding.message.clone())
            .collect();
        let refusals: Vec<&str> = findings
            .iter()
            .filter(|finding| finding.severity == Severity::Refusal)
            .map(|finding| finding.message.as_str())
            .collect();
        if refusals.is_empty() {
            Ok(())
        } else {
            Err(refusals.join("; "))
        }
    }

    async fn open_tunnel(&mut self) -> Result<Event, String> {
        let begin = Request::Begin {
            hop: self.header.hop.clone(),
            containers: self.containers(),
        };
        self.link.order(&begin, self.step_max()).await?;
        self.prepare_names().await?;
        self.raise_tunnel().await?;
        let link = self.link.measure().await?;
        self.open_pages(&link).await?;
        tracing::info!(
            rtt_ms = link.rtt_ms,
            bytes_per_second = link.bytes_per_second,
            "the link was measured"
        );
        Ok(Event::Measured { link })
    }

    async fn sync_files(&mut self) -> Result<(), String> {
        for _ in 0..FILE_PASSES {
            self.sync_trees().await?;
        }
        Ok(())
    }

    /// Copies what changed in the file trees of every container, all at once.
    async fn sync_trees(&mut self) -> Result<(), String> {
        let jobs = self.trees().live(UNHELD_MAX)?;
        self.bytes += self.join(jobs).await?;
        Ok(())
    }

    pub(super) fn trees(&self) -> Trees {
        Trees {
            host: self.host.clone(),
            link: Arc::clone(&self.link),
            containers: self.containers(),
        }
    }

    /// Runs syncs side by side and tells their progress; returns the bytes that crossed the link.
    pub(super) async fn join(&self, jobs: Vec<SyncJob>) -> Result<u64, String> {
        self.telling_trees(finish(jobs)).await
    }

    /// Tells how far trees and images have come while `work` goes on.
    async fn telling_trees<T>(&self, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {
                    let (done, total) = self.link.progress();
                    self.tell_moving(done, total, began, Vec::new());
                }
            }
        }
    }

    /// Says how far something has come since it began.
    pub(super) fn tell_moving(
        &self,
        done: u64,
        total: u64,
        began: Instant,
        containers: Vec<Moving>,
    ) {
        let elapsed = began.elapsed().as_secs_f64().max(1e-3);
        self.tell(Progress::Moving {
            name: self.hop.phase().to_string(),
            done,
            total,
            bytes_per_second: (done as f64 / elapsed) as u64,
            eta_seconds: eta_seconds(done, total, elapsed),
            containers,
        });
    }

    async fn pre_copy(&mut self, round: u32) -> Result<Event, String> {
        let begun = Instant::now();
        self.throttle(round, self.hop.throttle_percent()).await?;
        let (pages, bytes) = match self.header.tracking {
            Tracking::Content => self.content_round().await?,
            Tracking::SoftDirty | Tracking::None => self.dirty_round(round).await?,
        };
        self.bytes += bytes;
        // What changed in the files meanwhile goes along, so that the frozen delta stays small.
        self.sync_trees().await?;
        let round = Round {
            pages,
            bytes,
            seconds: begun.elapsed().as_secs_f64(),
            resident_bytes: self.resident.iter().map(|(_, bytes)| bytes).sum(),
        };
        Ok(Event::PreCopied { round })
    }

    pub(super) fn holds(&self) -> Vec<(ServiceName, Epoch)> {
        self.header.holds()
    }

    /// The service whose register decides the hop: the one clients meet first.
    pub(super) fn deciding(&self) -> ServiceName {
        self.header.plan.settings().services[0].clone()
    }

    async fn hold(&mut self) -> Result<(), String> {
        let stall = self.hop.predicted_stall();
        (self.report.stall_ms_predicted, self.report.stall_predicted) = (stall.total_ms(), stall);
        self.tell(Progress::Predicted { stall });
        // The hop goes on: whether a timeout of somebody in front is worse than no hop was for preflight to ask.
        let services = &self.header.plan.settings().services;
        for finding in patience::findings(&self.proxy, services, stall.total_ms()).await {
            tracing::warn!("{}", finding.message);
        }
        let settings = self.header.plan.settings();
        let (lease_ms, drain_ms_max) = (settings.lease_ms, settings.drain_ms_max);
        let expected = |(service, epoch)| Expected { service, epoch };
        let command = Command::HoldAll {
            services: self.holds().into_iter().map(expected).collect(),
            lease_ms,
            drain_ms_max,
        };
        let cgroups = self.cgroups().await?;
        // A hold ends every limit: clients wait for the drain, and what dumps a container runs inside it.
        self.writes.end_renewals().await;
        self.unthrottle().await?;
        // The leases of before a restart are no longer renewed for a hold that is begun anew.
        self.lease = None;
        // From the first held client on, until nobody is.
        self.link.set_priority(Priority::Urgent);
        let held = self.proxy.command_all(&command).await;
        held.map_err(|error| error.to_string())?;
        self.renew_leases();
        let closing = tokio::task::spawn_blocking(move || lender::let_close(&cgroups));
        closing.await.map_err(|error| error.to_string())
    }

    /// Where the processes of the containers are that a checkpoint will freeze.
    async fn cgroups(&self) -> Result<Vec<Cgroup>, String> {
        let mut cgroups = Vec::new();
        if self.engine() == Engine::Criu {
            for name in self.containers() {
                cgroups.push(cgroup(&self.host, &name).await?);
            }
        }
        Ok(cgroups)
    }

    async fn checkpoint(&mut self) -> Result<(), String> {
        let (engine, limit) = (self.engine(), self.step_max());
        if engine == Engine::Restart {
            // Whoever depends on another stops before it.
            for name in self.containers().iter().rev() {
                self.host
                    .stop(name, limit)
                    .await
                    .map_err(|error| error.to_string())?;
            }
            return Ok(());
        }
        if self.begun.is_empty() {
            // Another agent has held.
            self.begin_dumps().await?;
        }
        self.dump(limit).await
    }

    async fn transfer(&mut self) -> Result<(), String> {
        let limit = self.step_max();
        let Some(files) = self.files.take() else {
            // Nothing was dumped: there are trees only.
            self.ask_to_restore().await?;
            let (jobs, _) = self.trees().frozen(limit)?;
            self.bytes += self.join(jobs).await?;
            return Ok(());
        };
        let moved = self.telling_trees(files.arrived()).await?;
        self.report.memory.freeze_bytes += moved.images;
        self.bytes += moved.trees + moved.images;
        sealed(std::mem::take(&mut self.sealing)).await
    }

    pub(super) fn restore_request(&self) -> Request {
        Request::Restore {
            hop: self.header.hop.clone(),
            containers: self.containers(),
            engine: self.engine(),
            timeout_ms: self.step_ms(),
        }
    }

    async fn restore(&mut self) -> Result<(), String> {
        let asked = match self.restoring.take() {
            Some(answering) => answering.answer().await.ok(),
            None => None,
        };
        // Whatever became of a request that was lost with its connections, this one comes to the same.
        let response = match asked {
            Some(response) => unless_failed(response)?,
            None => {
                let request = self.restore_request();
                self.link.call(&request, self.step_max()).await?
            }
        };
        match response {
            Response::Restored { restore_ms } => {
                self.report.memory.restore_ms = restore_ms;
                Ok(())
            }
            other => Err(format!(
                "the target answered nonsense to restore: {other:?}"
            )),
        }
    }

    async fn verify(&mut self) -> Result<(), String> {
        let request = Request::Verify {
            hop: self.header.hop.clone(),
            probes: self.header.plan.settings().probes.clone(),
            timeout_ms: self.step_ms(),
        };
        match self.link.call(&request, self.step_max()).await? {
            Response::Verified(told) => {
                self.report.probes = told;
                Ok(())
            }
            other => Err(format!("the target answered nonsense to verify: {other:?}")),
        }
    }
}
