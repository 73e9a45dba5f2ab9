//! What each action of the machine means on real hosts. Every one may be repeated after a crash.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use cutover_protocol::hold::{Command, Gate, ServiceStatus};
use cutover_protocol::hop::{Action, Event, Round, Undo};
use cutover_protocol::id::{ContainerName, Epoch, Register, ServiceName, Site};
use cutover_protocol::plan::Engine;
use cutover_protocol::wire::{Inspect, Request, Response, Severity};

use super::Driver;
use super::lease::Lease;
use super::link::SyncJob;
use crate::engine::pre_dump;
use crate::proxy::ProxyError;
use crate::report::Progress;
use crate::{durable, open_files, preflight, probe};

/// Passes over the files while the source runs: one for the bulk, one for what changed meanwhile.
const FILE_PASSES: u32 = 2;

/// The least a pre-copy or file pass may take, whatever the plan says of steps while clients wait.
const UNHELD_MAX: Duration = Duration::from_secs(24 * 3600);

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
            Action::Hold { .. } => self.hold().await.map(done),
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

    fn engine(&self) -> Engine {
        self.header.plan.settings().engine
    }

    fn containers(&self) -> Vec<ContainerName> {
        self.header.plan.order().to_vec()
    }

    fn step_max(&self) -> Duration {
        Duration::from_millis(self.header.plan.settings().step_ms_max)
    }

    fn step_ms(&self) -> u64 {
        self.header.plan.settings().step_ms_max
    }

    /// Long work before the hold is dropped as soon as an abort is asked: it left nothing that an undo misses.
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
        let inspect = Inspect {
            containers: self.containers(),
            engine: self.engine(),
        };
        let source = preflight::inspect(&self.host, &inspect, Site::Source).await;
        let begun = Instant::now();
        let target = match self
            .link
            .call(&Request::Inspect(inspect), self.step_max())
            .await?
        {
            Response::Inspected(facts) => facts,
            other => {
                return Err(format!(
                    "the target answered nonsense to inspect: {other:?}"
                ));
            }
        };
        let round_trip_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let findings = preflight::compare(&source, &target, round_trip_ms);
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
        let link = self.link.measure().await?;
        tracing::info!(
            rtt_ms = link.rtt_ms,
            bytes_per_second = link.bytes_per_second,
            "the link was measured"
        );
        Ok(Event::Measured { link })
    }

    async fn sync_files(&mut self) -> Result<(), String> {
        for _ in 0..FILE_PASSES {
            self.sync_trees(false, UNHELD_MAX).await?;
        }
        Ok(())
    }

    /// Copies what changed in the file trees of every container, all at once.
    async fn sync_trees(&mut self, frozen: bool, limit: Duration) -> Result<(), String> {
        let jobs = self.tree_jobs(frozen, limit).await?;
        self.bytes += self.join(jobs).await?;
        Ok(())
    }

    async fn tree_jobs(&self, frozen: bool, limit: Duration) -> Result<Vec<SyncJob>, String> {
        let mut jobs = Vec::new();
        for name in self.containers() {
            let container = self
                .host
                .container(&name)
                .map_err(|error| error.to_string())?;
            let written = if frozen {
                self.being_written(&name).await
            } else {
                HashSet::new()
            };
            for tree in &container.trees {
                let tree_name = format!("{name}/{}", tree.name);
                jobs.push(self.link.sync(
                    tree_name,
                    tree.path.clone(),
                    frozen,
                    written.clone(),
                    limit,
                ));
            }
        }
        Ok(jobs)
    }

    /// The inodes a container has open for writing; a stopped one has none.
    async fn being_written(&self, name: &ContainerName) -> HashSet<u64> {
        match self.host.runc.state(name.as_str()).await {
            Ok(Some(state)) => open_files::being_written(state.pid),
            _ => HashSet::new(),
        }
    }

    /// The images of every container.
    fn image_jobs(&self, limit: Duration) -> Vec<SyncJob> {
        let job = |name: ContainerName| {
            let images = self.host.config.images(&name);
            self.link.sync(
                format!("{name}/{}", crate::config::IMAGES_TREE),
                images,
                true,
                HashSet::new(),
                limit,
            )
        };
        self.containers().into_iter().map(job).collect()
    }

    /// Runs syncs side by side and tells their progress; returns the bytes that crossed the link.
    async fn join(&self, jobs: Vec<SyncJob>) -> Result<u64, String> {
        let mut running = tokio::task::JoinSet::new();
        for job in jobs {
            running.spawn(job);
        }
        let mut ticks = tokio::time::interval(Duration::from_millis(500));
        let mut bytes = 0;
        loop {
            tokio::select! {
                joined = running.join_next() => match joined {
                    Some(result) => bytes += result.map_err(|error| error.to_string())??,
                    None => return Ok(bytes),
                },
                _ = ticks.tick() => {
                    let (done, total) = self.link.progress();
                    self.tell(Progress::Moving { name: self.hop.phase().to_string(), done, total });
                }
            }
        }
    }

    async fn pre_copy(&mut self, round: u32) -> Result<Event, String> {
        let begun = Instant::now();
        let mut pages = 0;
        let mut rounds = tokio::task::JoinSet::new();
        for name in self.containers() {
            let host = self.host.clone();
            rounds.spawn(async move { pre_dump(&host, &name, round, UNHELD_MAX).await });
        }
        while let Some(result) = rounds.join_next().await {
            pages += result
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        let jobs = self.image_jobs(UNHELD_MAX);
        let bytes = self.join(jobs).await?;
        self.bytes += bytes;
        // What changed in the files meanwhile goes along, so that the frozen delta stays small.
        self.sync_trees(false, UNHELD_MAX).await?;
        let round = Round {
            pages,
            bytes,
            seconds: begun.elapsed().as_secs_f64(),
        };
        Ok(Event::PreCopied { round })
    }

    fn holds(&self) -> Vec<(ServiceName, Epoch)> {
        let services = &self.header.plan.settings().services;
        services
            .iter()
            .map(|service| (service.clone(), self.epoch_of(service)))
            .collect()
    }

    fn epoch_of(&self, service: &ServiceName) -> Epoch {
        self.header
            .epochs
            .get(service)
            .copied()
            .unwrap_or(Epoch::FIRST)
    }

    /// The service whose register decides the hop: the one clients meet first.
    fn deciding(&self) -> ServiceName {
        self.header.plan.settings().services[0].clone()
    }

    async fn hold(&mut self) -> Result<(), String> {
        self.report.stall_ms_predicted = self.hop.predicted_stall_ms();
        let settings = self.header.plan.settings();
        let (lease_ms, drain_ms_max) = (settings.lease_ms, settings.drain_ms_max);
        self.lease = Some(Lease::keep(self.proxy.clone(), Vec::new(), lease_ms));
        let mut held = Vec::new();
        for (service, epoch) in self.holds() {
            let command = Command::Hold {
                service: service.clone(),
                epoch,
                lease_ms,
                drain_ms_max,
            };
            self.proxy
                .command(&command)
                .await
                .map_err(|error| error.to_string())?;
            held.push((service, epoch));
            self.lease = Some(Lease::keep(self.proxy.clone(), held.clone(), lease_ms));
        }
        Ok(())
    }

    async fn checkpoint(&mut self) -> Result<(), String> {
        let (engine, limit) = (self.engine(), self.step_max());
        let rounds = u32::try_from(self.hop.rounds().len()).unwrap_or(u32::MAX);
        if engine == Engine::Restart {
            // Whoever depends on another stops before it.
            for name in self.containers().iter().rev() {
                self.host
                    .checkpoint(engine, name, rounds, limit)
                    .await
                    .map_err(|error| error.to_string())?;
            }
            return Ok(());
        }
        let mut dumps = tokio::task::JoinSet::new();
        for name in self.containers() {
            let host = self.host.clone();
            dumps.spawn(async move { host.checkpoint(engine, &name, rounds, limit).await });
        }
        while let Some(result) = dumps.join_next().await {
            result
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    async fn transfer(&mut self) -> Result<(), String> {
        let limit = self.step_max();
        let mut jobs = match self.engine() {
            Engine::Criu => self.image_jobs(limit),
            Engine::Restart => Vec::new(),
        };
        jobs.extend(self.tree_jobs(true, limit).await?);
        self.bytes += self.join(jobs).await?;
        Ok(())
    }

    async fn restore(&mut self) -> Result<(), String> {
        let request = Request::Restore {
            hop: self.header.hop.clone(),
            containers: self.containers(),
            engine: self.engine(),
            timeout_ms: self.step_ms(),
        };
        self.link.order(&request, self.step_max()).await
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

    async fn commit(&mut self, epoch: Epoch) -> Result<Register, String> {
        let command = Command::Commit {
            service: self.deciding(),
            epoch,
            to: Site::Target,
        };
        self.register_after(&command).await
    }

    async fn settle(&mut self, epoch: Epoch) -> Result<Register, String> {
        let command = Command::Abort {
            service: self.deciding(),
            epoch,
        };
        self.register_after(&command).await
    }

    /// A refusal that names the register is an answer: somebody else was first.
    async fn register_after(&mut self, command: &Command) -> Result<Register, String> {
        match self.proxy.command(command).await {
            Ok(status) => Ok(status.register),
            Err(ProxyError::Refused {
                register: Some(register),
                ..
            }) => Ok(register),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn redirect(&mut self) -> Result<(), String> {
        let hop = self.header.hop.clone();
        self.link
            .order(&Request::Unfence { hop: hop.clone() }, self.step_max())
            .await?;
        for (service, epoch) in self.holds().into_iter().rev() {
            self.give(&service, epoch, Site::Target).await?;
        }
        self.lease = None;
        for name in self.containers().iter().rev() {
            self.host
                .retire(self.engine(), name, self.step_max())
                .await
                .map_err(|error| error.to_string())?;
            durable::empty_folder(&self.host.config.images(name))
                .map_err(|error| error.to_string())?;
        }
        self.link
            .order(&Request::Finish { hop }, self.step_max())
            .await
    }

    /// Brings one service's register and gate where the deciding register has gone.
    async fn give(
        &mut self,
        service: &ServiceName,
        epoch: Epoch,
        owner: Site,
    ) -> Result<(), String> {
        let mut register = self.status(service).await?.register;
        if register.epoch == epoch {
            register = self.decide(service, epoch, owner).await?;
        }
        if owner == Site::Target && register.owner == Site::Source {
            // This gate's lease ran out after the deciding register had gone to the target: follow it.
            let settings = self.header.plan.settings();
            let hold = Command::Hold {
                service: service.clone(),
                epoch: register.epoch,
                lease_ms: settings.lease_ms,
                drain_ms_max: settings.drain_ms_max,
            };
            match self.proxy.command(&hold).await {
                // What is in flight goes to a source that is fenced for good: it cannot be drained.
                Ok(_) | Err(ProxyError::NotDrained { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
            register = self.decide(service, register.epoch, owner).await?;
        }
        if register.owner != owner {
            return Err(format!(
                "the register of {service} is at epoch {} and says {}, not {owner}",
                register.epoch, register.owner
            ));
        }
        if matches!(
            self.status(service).await?.gate,
            Gate::Open | Gate::Releasing
        ) {
            return Ok(());
        }
        let release = Command::Release {
            service: service.clone(),
            epoch: register.epoch,
            to: owner,
        };
        let released = self.proxy.command(&release).await;
        released.map(drop).map_err(|error| error.to_string())
    }

    async fn status(&self, service: &ServiceName) -> Result<ServiceStatus, String> {
        let status = self.proxy.status(service).await;
        status.map_err(|error| error.to_string())
    }

    /// One compare-and-set of a register, in the direction of `owner`.
    async fn decide(
        &mut self,
        service: &ServiceName,
        epoch: Epoch,
        owner: Site,
    ) -> Result<Register, String> {
        let service = service.clone();
        let command = match owner {
            Site::Target => Command::Commit {
                service,
                epoch,
                to: owner,
            },
            Site::Source => Command::Abort { service, epoch },
        };
        self.register_after(&command).await
    }

    /// Renews every hold of this hop from now on.
    pub(super) fn renew_leases(&mut self) {
        let lease_ms = self.header.plan.settings().lease_ms;
        self.lease = Some(Lease::keep(self.proxy.clone(), self.holds(), lease_ms));
    }

    async fn undo(&mut self, undo: Undo) -> Result<(), String> {
        let hop = self.header.hop.clone();
        match undo {
            Undo::KillTarget => self.link.order(&Request::Kill { hop }, KILL_MAX).await,
            Undo::Thaw => self.thaw().await,
            Undo::Reopen => {
                for (service, epoch) in self.holds().into_iter().rev() {
                    self.give(&service, epoch, Site::Source).await?;
                }
                self.lease = None;
                Ok(())
            }
            Undo::DropStaging => {
                for name in self.containers() {
                    durable::empty_folder(&self.host.config.images(&name))
                        .map_err(|error| error.to_string())?;
                }
                let containers = self.containers();
                self.link
                    .order(&Request::Drop { hop, containers }, KILL_MAX)
                    .await
            }
            Undo::CloseTunnel => {
                self.link.close();
                Ok(())
            }
        }
    }

    async fn thaw(&mut self) -> Result<(), String> {
        let (engine, limit) = (self.engine(), self.step_max());
        for name in self.containers() {
            self.host
                .thaw(engine, &name, limit)
                .await
                .map_err(|error| error.to_string())?;
        }
        if engine == Engine::Restart {
            // Started anew, it serves only once it answers; thawed memory answers at once.
            for wanted in &self.header.plan.settings().probes {
                probe::ask(wanted).await?;
            }
        }
        Ok(())
    }
}
