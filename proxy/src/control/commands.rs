//! From a command to its answer. Rules live in [`Service`]; this is where a drain is waited for and its remainder
//! named.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::hold::{
    Answer, Claim, Command, InFlight, Order, Refusal, ServerStatus, ServiceStatus,
};
use cutover_protocol::id::{Epoch, ServiceName, Site};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::together::HoldLimits;
use super::words::{LEDGER_ENTRIES_MAX, ProcessAnswer, ProcessCommand, ProcessRefusal};
use crate::ledger;
use crate::life::{self, Running};
use crate::service::writes::WritePace;
use crate::service::{Change, Drain, Held, Hold, Refused, Service};
use crate::snapshot::Serving;
use crate::worker::Question;

/// Most entries of the list of what is left.
pub(super) const LEFT_MAX: usize = 100;
/// Most held requests that one in flight is said to wait for.
const WAITS_FOR_MAX: usize = 3;
/// How often a drain looks for requests in flight that wait for held ones: an honest answer takes less.
const DEADLOCK_WATCH: Duration = Duration::from_secs(1);
/// How long a worker may take to say who is in flight; it answers between two polls of its tasks.
const QUESTION_MS_MAX: Duration = Duration::from_secs(1);

/// No service has that name; which there are.
#[derive(Debug)]
pub(super) struct Unknown(pub(super) String);

impl From<Unknown> for Answer {
    fn from(Unknown(message): Unknown) -> Self {
        Self::Refused {
            reason: Refusal::UnknownService,
            message,
            register: None,
        }
    }
}

/// Whoever obeys.
#[derive(Debug)]
pub(crate) struct Commander {
    pub(crate) running: Rc<Running>,
}

impl Commander {
    /// Obeys, or says why not.
    ///
    /// # Cancel safety
    /// Dropped while a drain is waited for, the hold stands and its lease runs.
    pub(crate) async fn execute(&self, order: Order) -> Answer {
        let Order { claim, command } = order;
        if let Some(message) = self.running.refuses(&command) {
            return busy(message);
        }
        match command {
            Command::Status { service } => self.status(service.as_ref()),
            Command::Hold {
                service,
                epoch,
                lease_ms,
                drain_ms_max,
            } => {
                let limits = HoldLimits::new(lease_ms, drain_ms_max);
                self.hold(&service, epoch, limits, &claim).await
            }
            Command::Renew {
                service,
                epoch,
                lease_ms,
            } => self.change(&service, Change::Renew { epoch, lease_ms }, &claim),
            Command::Commit { service, epoch, to } => {
                self.change(&service, Change::Commit { epoch, to }, &claim)
            }
            Command::Abort { service, epoch } => {
                self.change(&service, Change::Abort { epoch }, &claim)
            }
            Command::Release { service, epoch, to } => {
                self.change(&service, Change::Release { epoch, to }, &claim)
            }
            Command::Admit {
                service,
                epoch,
                interval_us,
                delay_ms_max,
                lease_ms,
            } => {
                let pace = WritePace {
                    interval_us,
                    delay_ms_max,
                };
                self.change_with(&service, |service| {
                    service.admit_writes(epoch, pace, lease_ms, &claim)
                })
            }
            Command::AdmitFreely { service, epoch } => self.change_with(&service, |service| {
                service.admit_writes_freely(epoch, &claim)
            }),
            Command::HoldAll {
                services,
                lease_ms,
                drain_ms_max,
            } => {
                let limits = HoldLimits::new(lease_ms, drain_ms_max);
                self.hold_all(&services, limits, &claim).await
            }
            Command::CommitAll { services, to } => {
                self.change_all(&services, |epoch| Change::Commit { epoch, to }, &claim)
            }
            Command::AbortAll { services } => {
                self.change_all(&services, |epoch| Change::Abort { epoch }, &claim)
            }
            Command::ReleaseAll { services, to } => {
                self.change_all(&services, |epoch| Change::Release { epoch, to }, &claim)
            }
        }
    }

    /// The same for what is asked of the process as a whole.
    ///
    /// # Cancel safety
    /// A reload that has taken effect stands.
    pub(crate) async fn execute_for_process(&self, command: ProcessCommand) -> ProcessAnswer {
        match command {
            ProcessCommand::Process => {
                let snapshot = self.running.shared.load();
                let before = self.running.predecessor();
                ProcessAnswer::Process(Box::new(self.running.facts.status(&snapshot, before)))
            }
            ProcessCommand::Ledger { count } => {
                let state_dir = self.running.shared.load().config.state_dir.clone();
                match ledger::read(&state_dir, count.min(LEDGER_ENTRIES_MAX)) {
                    Ok(entries) => ProcessAnswer::Ledger { entries },
                    Err(error) => ProcessAnswer::Refused {
                        reason: ProcessRefusal::Failed,
                        message: format!("the ledger cannot be read: {error}"),
                    },
                }
            }
            ProcessCommand::Upgrade { binary } => match self.running.upgrade(binary).await {
                Ok(pid) => ProcessAnswer::Upgraded { pid },
                Err(error) => ProcessAnswer::Refused {
                    reason: error.reason(),
                    message: life::chain(&error),
                },
            },
            // It needs the connection itself, and never comes here.
            ProcessCommand::Handover => ProcessAnswer::HandingOver,
            ProcessCommand::Reload => match self.running.reload().await {
                Ok(done) => ProcessAnswer::Reloaded(done),
                Err(error) => ProcessAnswer::Refused {
                    reason: error.reason(),
                    message: life::chain(&error),
                },
            },
        }
    }

    fn status(&self, service: Option<&ServiceName>) -> Answer {
        let Some(name) = service else {
            let snapshot = self.running.shared.load();
            return Answer::Status {
                services: snapshot.services.iter().map(whole_status).collect(),
            };
        };
        match self.find(name) {
            Ok(service) => Answer::Status {
                services: vec![self.status_of(&service)],
            },
            Err(unknown) => unknown.into(),
        }
    }

    fn status_of(&self, service: &Arc<Service>) -> ServiceStatus {
        let snapshot = self.running.shared.load();
        let serving = snapshot.serving(service.name());
        serving.map_or_else(|| service.status(), whole_status)
    }

    fn change(&self, name: &ServiceName, change: Change, claim: &Claim) -> Answer {
        self.change_with(name, |service| service.change(change, claim))
    }

    fn change_with(
        &self,
        name: &ServiceName,
        change: impl FnOnce(&Service) -> Result<(), Refused>,
    ) -> Answer {
        match self.find(name) {
            Ok(service) => match change(&service) {
                Ok(()) => Answer::Done {
                    service: service.status(),
                },
                Err(refused) => refusal(refused),
            },
            Err(unknown) => unknown.into(),
        }
    }

    /// A service by its name.
    ///
    /// # Errors
    /// There is none; what there is.
    pub(super) fn find(&self, name: &ServiceName) -> Result<Arc<Service>, Unknown> {
        let snapshot = self.running.shared.load();
        snapshot.service(name).map(Arc::clone).ok_or_else(|| {
            let services = snapshot.services.iter();
            let known: Vec<&str> = services
                .map(|serving| serving.service.name().as_str())
                .collect();
            Unknown(format!(
                "no service is called {name}; there is: {}",
                known.join(", ")
            ))
        })
    }

    async fn hold(
        &self,
        name: &ServiceName,
        epoch: Epoch,
        limits: HoldLimits,
        claim: &Claim,
    ) -> Answer {
        match self.find(name) {
            Ok(service) => match service.hold(epoch, limits.lease_ms, claim) {
                Ok(hold) => self.drain(&service, &hold, limits.drain_ms_max).await,
                Err(refused) => refusal(refused),
            },
            Err(unknown) => unknown.into(),
        }
    }

    async fn drain(&self, service: &Service, hold: &Hold, drain_ms_max: u64) -> Answer {
        let deadline = Instant::now() + drain_limit(drain_ms_max);
        match self.drained_or_cut(service, hold.mark, deadline).await {
            Drain::Quiet => Answer::Done {
                service: service.status(),
            },
            Drain::TimedOut => Answer::NotDrained {
                left: self.left(service).await,
                service: service.status(),
            },
            Drain::Superseded => refusal(service.superseded()),
        }
    }

    /// Waits for the end of a drain, and cuts whoever may be cut where it takes too long.
    pub(super) async fn drained_or_cut(
        &self,
        service: &Service,
        hold: u64,
        deadline: Instant,
    ) -> Drain {
        let drain = self.drained(service, hold, deadline).await;
        if drain != Drain::TimedOut || self.cut(service).await == 0 {
            return drain;
        }
        let limits = &self.running.shared.load().config.limits;
        let closed = limits.upstream_close_max + limits.linger_max;
        service.gate.drained(hold, Instant::now() + closed).await
    }

    /// Waits for the end of a drain, and says of each request that seems to wait for one that is held.
    async fn drained(&self, service: &Service, hold: u64, deadline: Instant) -> Drain {
        let mut named = BTreeSet::new();
        loop {
            let next = deadline.min(Instant::now() + DEADLOCK_WATCH);
            let drain = service.gate.drained(hold, next).await;
            if drain != Drain::TimedOut || next == deadline {
                return drain;
            }
            for entry in self.left(service).await {
                if !entry.waits_for.is_empty() && named.insert(entry.id.clone()) {
                    tracing::warn!(
                        service = %service.name(), request = entry.what, id = entry.id, server = entry.server,
                        held = ?entry.waits_for,
                        "a request in flight may be waiting for one that is held, from its own server; name that address in own_from"
                    );
                }
            }
        }
    }

    /// Cuts whoever may be cut; how many that are.
    async fn cut(&self, service: &Service) -> usize {
        let counts = self.ask(|reply| Question::Cut {
            service: service.name().clone(),
            reply,
        });
        let count = counts.await.into_iter().sum();
        if count > 0 {
            tracing::warn!(service = %service.name(), count, "the drain has taken as long as it may: requests are cut, and entered in the ledger");
        }
        count
    }

    /// What each worker has to say.
    pub(super) async fn ask<T>(&self, question: impl Fn(oneshot::Sender<T>) -> Question) -> Vec<T> {
        let mut said = Vec::new();
        for worker in &self.running.workers {
            let (reply, answer) = oneshot::channel();
            if worker.send(question(reply)).await.is_ok()
                && let Ok(Ok(part)) = timeout(QUESTION_MS_MAX, answer).await
            {
                said.push(part);
            }
        }
        said
    }

    /// Who is in flight, oldest first.
    pub(super) async fn in_flight(&self, service: &Service) -> Vec<InFlight> {
        let parts = self.ask(|reply| Question::InFlight {
            service: service.name().clone(),
            reply,
        });
        let mut all: Vec<InFlight> = parts.await.into_iter().flatten().collect();
        all.sort_by_key(|entry| std::cmp::Reverse(entry.age_ms));
        all
    }

    /// Who is still in flight, oldest first, a hundred at most.
    pub(super) async fn left(&self, service: &Service) -> Vec<InFlight> {
        let mut left = self.in_flight(service).await;
        left.truncate(LEFT_MAX);
        for entry in &mut left {
            let server = entry.server.as_deref().map(str::parse::<SocketAddr>);
            let Some(Ok(server)) = server else { continue };
            let clients = |held: &Held| held.clients_at(&[server.ip()], WAITS_FOR_MAX);
            let clients = service.gate.with_held(clients);
            entry.waits_for = clients.iter().map(ToString::to_string).collect();
        }
        left
    }
}

/// How long a drain may take.
pub(super) fn drain_limit(drain_ms_max: u64) -> Duration {
    // Past a century nobody waits; without the bound the sum could overflow the clock.
    Duration::from_millis(drain_ms_max.min(u64::from(u32::MAX) * 1000))
}

/// A service and its servers, also those of its routes; each once.
fn whole_status(serving: &Serving) -> ServiceStatus {
    let now = std::time::Instant::now();
    let mut servers: Vec<ServerStatus> = Vec::new();
    for server in serving.all_sites().flat_map(|sites| sites.snapshot(now)) {
        let is_same = |known: &ServerStatus| {
            (known.site, &known.group, &known.address)
                == (server.site, &server.group, &server.address)
        };
        if !servers.iter().any(is_same) {
            servers.push(server);
        }
    }
    servers.sort_by_key(|server| server.site == Site::Target);
    ServiceStatus {
        servers,
        ..serving.service.status()
    }
}

/// Another process has, or had, a part in this.
fn busy(message: String) -> Answer {
    Answer::Refused {
        reason: Refusal::Busy,
        message,
        register: None,
    }
}

fn refusal(refused: Refused) -> Answer {
    Answer::Refused {
        reason: refused.reason,
        message: refused.message,
        register: Some(refused.register),
    }
}
