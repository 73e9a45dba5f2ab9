//! The driver: the only owner of a hop. It journals an event, steps the machine, does the action, and so on.
//!
//! What it never does: act before the event that led there is durable, keep two actions outstanding (but that the target
//! restores while the end of the transfer is on its way back), or decide anything that the machine or the register should
//! decide.

mod act;
mod ahead;
mod costs;
mod freeze;
pub mod journal;
mod lease;
mod link;
mod memory;
mod patience;
mod register;
mod throttle;
mod trees;
mod tunnel;
mod writes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::hop::{
    Action, Bounds, Ending, Event, Failure, Hop, Phase, Step, StepError, Undo, predict,
};
use cutover_protocol::id::{ContainerName, Epoch, Holder, HopId, ServiceName, Site};
use cutover_protocol::plan::{Engine, Memory, Plan, Tracking};
use cutover_protocol::tunnel::Kind;
use cutover_protocol::wire::{Finding, Inspect, Inspected, Request, Response};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use crate::config::IMAGES_TREE;
use crate::control::Checked;
use crate::engine::Host;
use crate::memory::{MemoryError, Parent};
use crate::names::Names;
use crate::peer::{Answering, Priority};
use crate::preflight;
use crate::proxy::{Proxy, ProxyError};
use crate::report::{Outcome, Progress, Report};
use crate::tunnel::Tunnel;
use freeze::{BegunDump, FrozenFiles, Sealing};
use journal::{Header, Journal, JournalError};
use lease::Lease;
use link::Link;
use writes::Writes;

/// Pauses between tries to read the register or to finish a committed hop: doubled up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// How often the register is asked, or a redirect tried, before the hop is left to `recover`: about a minute.
const TRIES_MAX: u32 = 16;

/// A hop could not be begun or recovered.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The register cannot be read.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The site has no proxy.
    #[error(
        "this agent's configuration has no [proxy]: a hop is driven by the agent that commands the gate"
    )]
    NoProxy,
    /// Only a source drives.
    #[error("this agent is the target (`site`): a hop is driven by the source's agent")]
    NotSource,
    /// The service is not the source's.
    #[error(
        "the service {service} belongs to the {owner} at epoch {epoch}: this site cannot hop it away"
    )]
    NotOurs {
        /// The service.
        service: ServiceName,
        /// Its owner.
        owner: Site,
        /// The epoch.
        epoch: Epoch,
    },
    /// The journal and the machine do not agree.
    #[error("the machine refused its own journal: {0}")]
    Step(#[from] StepError),
}

/// What the driver shares with whoever watches or aborts a hop.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The hop.
    pub hop: HopId,
    /// Lines of progress.
    pub progress: broadcast::Sender<Progress>,
    /// Set to true to ask for an abort.
    pub abort: watch::Sender<bool>,
    /// Where the hop stands.
    pub phase: watch::Sender<Phase>,
    /// What moves right now.
    pub moving: watch::Sender<Option<Progress>>,
}

impl Watch {
    fn new(hop: HopId) -> Self {
        Self {
            hop,
            progress: broadcast::Sender::new(PROGRESS_LINES_MAX),
            abort: watch::Sender::new(false),
            phase: watch::Sender::new(Phase::Plan),
            moving: watch::Sender::new(None),
        }
    }
}

/// A watcher that falls further behind than this misses lines, never the hop.
const PROGRESS_LINES_MAX: usize = 1024;

/// What a driver works with at its own site.
pub type Place = (Host, Arc<Tunnel>, Arc<Names>);

/// One hop being driven.
#[derive(Debug)]
pub struct Driver {
    host: Host,
    proxy: Proxy,
    header: Header,
    hop: Hop,
    journal: Journal,
    report: Report,
    watch: Watch,
    link: Arc<Link>,
    tunnel: Arc<Tunnel>,
    names: Arc<Names>,
    lease: Option<Lease>,
    fail_at: Option<Phase>,
    first: Event,
    bytes: u64,
    /// The memory of each container that was dumped, while the target completes its images.
    sealing: Vec<Sealing>,
    /// The files of containers that were dumped, on their way.
    files: Option<FrozenFiles>,
    /// The target's answer to come: it restores as soon as everything has arrived.
    restoring: Option<Answering<Response>>,
    /// Dumps that have begun and wait, their containers running on.
    begun: Vec<BegunDump>,
    /// What the last of CRIU's own memory rounds saw.
    parents: BTreeMap<ContainerName, Arc<Parent>>,
    /// The target's images of that round, which are put together while the containers run.
    drafts: JoinSet<Result<(), MemoryError>>,
    /// What each container has in memory, as of the last round.
    resident: Vec<(String, u64)>,
    /// Processor time each container had used, in microseconds, when its last round began.
    used: BTreeMap<ContainerName, (Instant, u64)>,
    /// What comes to the services, and how it is slowed down.
    writes: Box<Writes>,
}

impl Driver {
    /// Begins a hop: reads the registers and writes the journal's header.
    ///
    /// # Errors
    /// [`DriverError`]; nothing has been changed then.
    pub async fn begin(
        (host, tunnel, names): Place,
        plan: Plan,
        fail_at: Option<Phase>,
    ) -> Result<Self, DriverError> {
        if host.config.site != Site::Source {
            return Err(DriverError::NotSource);
        }
        let proxy = Proxy::new(&proxy_socket(&host)?);
        let mut epochs = BTreeMap::new();
        for service in &plan.settings().services {
            let status = proxy.status(service).await?;
            if status.register.owner != Site::Source {
                return Err(DriverError::NotOurs {
                    service: service.clone(),
                    owner: status.register.owner,
                    epoch: status.register.epoch,
                });
            }
            epochs.insert(service.clone(), status.register.epoch);
        }
        let tracking = tracking(&host, &plan).await;
        let bounds = Bounds {
            rounds_max: rounds_max(&plan, tracking),
            stall_ms_max: plan.settings().stall_ms_max,
            throttle_percent_max: plan.settings().throttle_percent_max,
            costs: costs::read(&host.config.state_dir),
        };
        let header = Header {
            hop: new_hop_id(),
            plan,
            epochs,
            bounds,
            tracking,
        };
        let journal = Journal::begin(&host.config.state_dir, &header)?;
        let epoch = header
            .epochs
            .get(&header.plan.settings().services[0])
            .copied()
            .unwrap_or(Epoch::FIRST);
        let hop = Hop::new(bounds);
        Ok(Self::new(
            (host, tunnel, names),
            proxy,
            header,
            hop,
            journal,
            Event::Begun { epoch },
            fail_at,
        ))
    }

    /// Takes up the unfinished hop of this agent, if there is one.
    ///
    /// # Errors
    /// [`DriverError`] when the journal cannot be read or folded.
    pub fn resume((host, tunnel, names): Place) -> Result<Option<Self>, DriverError> {
        let Some((journal, header, events)) = Journal::resume(&host.config.state_dir)? else {
            return Ok(None);
        };
        let proxy = Proxy::new(&proxy_socket(&host)?);
        let mut hop = Hop::new(header.bounds);
        for event in events {
            hop.step(event)?;
        }
        if hop.phase() == Phase::Plan {
            // The first event never became durable, so nothing was done and nothing is to be undone.
            journal.finish(&header.hop)?;
            return Ok(None);
        }
        let is_holding = hop.phase().is_holding();
        let mut driver = Self::new(
            (host, tunnel, names),
            proxy,
            header,
            hop,
            journal,
            Event::Restarted,
            None,
        );
        if driver.header.bounds.throttle_percent_max > 0 {
            driver.writes.note_restart();
        }
        if is_holding {
            driver.link.set_priority(Priority::Urgent);
            driver.renew_leases();
        }
        Ok(Some(driver))
    }

    fn new(
        (host, tunnel, names): Place,
        proxy: Proxy,
        header: Header,
        hop: Hop,
        journal: Journal,
        first: Event,
        fail_at: Option<Phase>,
    ) -> Self {
        let mut report = Report::new(header.hop.clone(), header.plan.settings().engine.as_str());
        report.memory.tracking = header.tracking;
        report.memory.schedule = header.plan.settings().schedule;
        let proxy = proxy.in_name_of(Holder::from(&header.hop));
        let watch = Watch::new(header.hop.clone());
        let writes = Writes::new(
            proxy.clone(),
            header.holds(),
            header.plan.settings().lease_ms,
        );
        let link = Link::new(&host.config, header.plan.settings());
        let link = Arc::new(link.through(Arc::clone(&tunnel), header.hop.clone()));
        Self {
            host,
            tunnel,
            names,
            proxy,
            header,
            hop,
            journal,
            report,
            watch,
            link,
            lease: None,
            fail_at,
            first,
            bytes: 0,
            sealing: Vec::new(),
            files: None,
            restoring: None,
            begun: Vec::new(),
            parents: BTreeMap::new(),
            drafts: JoinSet::new(),
            resident: Vec::new(),
            used: BTreeMap::new(),
            writes: Box::new(writes),
        }
    }

    /// What watchers and aborters use.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// Drives the hop to its end.
    ///
    /// # Errors
    /// [`DriverError`] when the journal cannot be written or refuses to be stepped: the hop then stands as it is,
    /// frozen and holding, until `recover`.
    pub async fn run(mut self) -> Result<Report, DriverError> {
        let mut event = self.first.clone();
        let mut tries = 0;
        let mut last = None;
        loop {
            if self.abort_is_due() {
                self.step(Event::AbortAsked)?;
                self.watch.abort.send_replace(false);
            }
            let before = self.hop.phase();
            let action = match self.step(event)? {
                Step::Act(action) => action,
                Step::Over(ending) => return self.over(ending),
                Step::Nothing => {
                    let event = "a repetition".to_owned();
                    return Err(StepError {
                        phase: before,
                        event,
                    }
                    .into());
                }
            };
            // The machine repeats an action only where there is no other way than to try again.
            tries = if last == Some(action) { tries + 1 } else { 0 };
            last = Some(action);
            if tries >= TRIES_MAX {
                return Ok(self.unfinished());
            }
            if tries > 0 {
                tokio::time::sleep((RETRY_FIRST * 2_u32.pow(tries.min(10))).min(RETRY_LAST)).await;
            }
            event = self.timed(action).await;
        }
    }

    fn abort_is_due(&self) -> bool {
        let phase = self.hop.phase();
        *self.watch.abort.borrow() && phase.is_before_commit() && phase != Phase::Plan
    }

    fn step(&mut self, event: Event) -> Result<Step, DriverError> {
        self.journal.append(&event)?;
        let step = self.hop.step(event)?;
        self.watch.phase.send_replace(self.hop.phase());
        Ok(step)
    }

    /// Does one action and reports how long it took.
    async fn timed(&mut self, action: Action) -> Event {
        let name = match action {
            Action::Undo(undo) => format!("Undo{undo}"),
            _ => self.hop.phase().to_string(),
        };
        self.tell(Progress::Began {
            name: name.clone(),
            phase: self.hop.phase(),
        });
        let begun = Instant::now();
        self.bytes = 0;
        let mut result = Box::pin(self.act(action)).await;
        if result.is_ok()
            && self.fail_at == Some(self.hop.phase())
            && self.hop.phase().is_before_commit()
        {
            result = Err(format!(
                "a drill: --fail-at {} was asked for",
                self.hop.phase()
            ));
        }
        let seconds = begun.elapsed().as_secs_f64();
        self.report.add(&name, seconds, self.bytes);
        let failure = result.as_ref().err().cloned();
        match &failure {
            Some(message) => {
                tracing::warn!(hop = %self.header.hop, phase = %name, seconds, "failed: {message}")
            }
            None => {
                tracing::info!(hop = %self.header.hop, phase = %name, seconds, bytes = self.bytes, "done")
            }
        }
        self.tell(Progress::Ended {
            name,
            seconds,
            bytes: self.bytes,
            failure,
        });
        result.unwrap_or_else(|message| Event::Failed {
            action: action.name(),
            failure: Failure::new(&message),
        })
    }

    fn tell(&self, progress: Progress) {
        let moving = matches!(progress, Progress::Moving { .. }).then(|| progress.clone());
        self.watch.moving.send_replace(moving);
        // Nobody watching is not an error.
        let _ = self.watch.progress.send(progress);
    }

    fn over(mut self, ending: Ending) -> Result<Report, DriverError> {
        self.report.outcome = match ending {
            Ending::Committed => Outcome::Committed,
            Ending::Undone => Outcome::Undone,
        };
        self.fill();
        if ending == Ending::Committed {
            costs::learn(
                &self.host.config.state_dir,
                self.header.bounds.costs,
                &self.report,
            );
        }
        self.journal.finish(&self.header.hop)?;
        Ok(self.report)
    }

    fn unfinished(mut self) -> Report {
        self.report.outcome = Outcome::Unfinished;
        self.fill();
        self.report
    }

    fn fill(&mut self) {
        if self.report.outcome != Outcome::Committed {
            self.report.cause = self.hop.failure().map(ToString::to_string);
        }
        self.report.rounds = self.hop.rounds().to_vec();
        self.report.owed = self.hop.owed().iter().map(ToString::to_string).collect();
    }
}

fn proxy_socket(host: &Host) -> Result<PathBuf, DriverError> {
    host.config
        .proxy_control
        .clone()
        .ok_or(DriverError::NoProxy)
}

/// How the memory of this plan's containers is tracked on this kernel.
async fn tracking(host: &Host, plan: &Plan) -> Tracking {
    let settings = plan.settings();
    if settings.engine != Engine::Criu {
        return Tracking::None;
    }
    let kernel_tracks = settings.memory == Memory::Auto
        && crate::criu::features::tracks_dirty_pages(&host.config.runtime.criu).await;
    settings.memory.settle(kernel_tracks)
}

/// No rounds where nothing tells what changed since the last one.
fn rounds_max(plan: &Plan, tracking: Tracking) -> u32 {
    match tracking {
        Tracking::None => 0,
        Tracking::SoftDirty | Tracking::Content => plan.settings().rounds_max,
    }
}

fn new_hop_id() -> HopId {
    let id = format!("hop-{}", preflight::now_ms());
    // "hop-" and digits are always a valid name; the fallback keeps this total.
    id.parse()
        .unwrap_or_else(|_| unreachable!("hop-<digits> is a valid name"))
}

impl Driver {
    /// The plan, which [`pay`] will need if the target cannot be reached during the unwinding.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.header.plan
    }
}

/// Does at the target what an unwinding could not do because the target was gone.
///
/// # Errors
/// One line for a person; everything stays owed then.
pub async fn pay(host: &Host, plan: &Plan, hop: &HopId, undos: &[Undo]) -> Result<(), String> {
    let link = Link::new(&host.config, plan.settings());
    for undo in undos {
        let request = match undo {
            Undo::KillTarget => Request::Kill { hop: hop.clone() },
            Undo::DropStaging => Request::Drop {
                hop: hop.clone(),
                containers: plan.order().to_vec(),
            },
            Undo::CloseTunnel if plan.settings().tunnel != Kind::None => {
                Request::CloseTunnel { hop: hop.clone() }
            }
            Undo::CloseTunnel | Undo::Reopen | Undo::Thaw => continue,
        };
        link.order(&request, act::KILL_MAX).await?;
    }
    Ok(())
}

/// Has the target at `target` close its end of a committed hop's tunnel.
///
/// # Errors
/// When it cannot be reached, or refuses.
pub async fn close_far_end(host: &Host, target: SocketAddr, hop: &HopId) -> Result<(), String> {
    let link = Link::to(&host.config, target.to_string(), 1);
    link.order(&Request::CloseTunnel { hop: hop.clone() }, act::KILL_MAX)
        .await
}

/// Inspects both sides and compares them; gives what the source is and everything found.
async fn look(
    host: &Host,
    link: &Link,
    plan: &Plan,
    limit: Duration,
) -> Result<(Inspected, Vec<Finding>), String> {
    let inspect = Inspect {
        containers: plan.order().to_vec(),
        engine: plan.settings().engine,
    };
    let source = preflight::inspect(host, &inspect, Site::Source).await;
    let begun = Instant::now();
    let target = match link.call(&Request::Inspect(inspect), limit).await? {
        Response::Inspected(facts) => facts,
        other => {
            return Err(format!(
                "the target answered nonsense to inspect: {other:?}"
            ));
        }
    };
    let round_trip_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let findings = preflight::compare(&source, &target, round_trip_ms);
    Ok((source, findings))
}

/// Inspects both sides, compares, and predicts; changes nothing anywhere.
///
/// # Errors
/// When the target cannot be reached.
pub async fn dry_run(host: &Host, plan: &Plan) -> Result<Checked, String> {
    let link = Link::new(&host.config, plan.settings());
    let (source, mut findings) = look(host, &link, plan, act::KILL_MAX).await?;
    let measured = link.measure().await?;
    let tracking = match plan.settings().engine {
        Engine::Criu => plan.settings().memory.settle(source.tracks_dirty_pages),
        Engine::Restart => Tracking::None,
    };
    let rounds_max = rounds_max(plan, tracking);
    let images: u64 = source
        .trees
        .iter()
        .filter(|tree| tree.name.ends_with(&format!("/{IMAGES_TREE}")))
        .map(|tree| tree.bytes)
        .sum();
    let moved = if rounds_max == 0 { images } else { 0 };
    let costs = costs::read(&host.config.state_dir);
    let stall = predict(moved, images, &costs, &measured);
    if let Some(control) = &host.config.proxy_control {
        let (proxy, services) = (Proxy::new(control), &plan.settings().services);
        findings.extend(patience::findings(&proxy, services, stall.total_ms()).await);
    }
    Ok(Checked {
        findings,
        stall_ms_predicted: stall.total_ms(),
        stall,
        trees: source.trees,
        rounds_max,
    })
}
