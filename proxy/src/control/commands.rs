//! From a command to its answer. Rules live in [`Service`]; this is where a drain is waited for and its remainder
//! named.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::hold::{Answer, Command, InFlight, Refusal, ServerStatus, ServiceStatus};
use cutover_protocol::id::{ServiceName, Site};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::words::{ProcessAnswer, ProcessCommand};
use crate::life::{self, Running};
use crate::service::{Drain, Refused, Service};
use crate::snapshot::Serving;
use crate::worker::Question;

/// Most entries of the list of what is left.
const LEFT_MAX: usize = 100;
/// How long a worker may take to say who is in flight; it answers between two polls of its tasks.
const QUESTION_MS_MAX: Duration = Duration::from_secs(1);

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
    pub(crate) async fn execute(&self, command: Command) -> Answer {
        if let Some(message) = self.running.refuses(&command) {
            return Answer::Refused {
                reason: Refusal::Busy,
                message,
                register: None,
            };
        }
        match command {
            Command::Status { service: None } => Answer::Status {
                services: self
                    .running
                    .shared
                    .load()
                    .services
                    .iter()
                    .map(whole_status)
                    .collect(),
            },
            Command::Status {
                service: Some(name),
            } => match self.find(&name) {
                Ok(service) => Answer::Status {
                    services: vec![self.status_of(&service)],
                },
                Err(unknown) => *unknown,
            },
            Command::Hold {
                service,
                epoch,
                lease_ms,
                drain_ms_max,
            } => match self.find(&service) {
                Ok(service) => match service.hold(epoch, lease_ms) {
                    Ok(hold) => self.drain(&service, hold, drain_ms_max).await,
                    Err(refused) => refusal(refused),
                },
                Err(unknown) => *unknown,
            },
            Command::Renew {
                service,
                epoch,
                lease_ms,
            } => self.apply(&service, |service| service.renew(epoch, lease_ms)),
            Command::Commit { service, epoch, to } => {
                self.apply(&service, |service| service.commit(epoch, to))
            }
            Command::Abort { service, epoch } => {
                self.apply(&service, |service| service.abort(epoch))
            }
            Command::Release { service, epoch, to } => {
                self.apply(&service, |service| service.release(epoch, to))
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

    fn status_of(&self, service: &Arc<Service>) -> ServiceStatus {
        let snapshot = self.running.shared.load();
        let serving = snapshot.serving(service.name());
        serving.map_or_else(|| service.status(), whole_status)
    }

    fn apply(
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
            Err(unknown) => *unknown,
        }
    }

    fn find(&self, name: &ServiceName) -> Result<Arc<Service>, Box<Answer>> {
        let snapshot = self.running.shared.load();
        snapshot.service(name).map(Arc::clone).ok_or_else(|| {
            let services = snapshot.services.iter();
            let known: Vec<&str> = services
                .map(|serving| serving.service.name().as_str())
                .collect();
            let message = format!(
                "no service is called {name}; there is: {}",
                known.join(", ")
            );
            let reason = Refusal::UnknownService;
            Box::new(Answer::Refused {
                reason,
                message,
                register: None,
            })
        })
    }

    async fn drain(&self, service: &Service, hold: u64, drain_ms_max: u64) -> Answer {
        // Past a century nobody waits; without the bound the sum could overflow the clock.
        let limit = Duration::from_millis(drain_ms_max.min(u64::from(u32::MAX) * 1000));
        match service.gate.drained(hold, Instant::now() + limit).await {
            Drain::Quiet => Answer::Done {
                service: service.status(),
            },
            Drain::TimedOut => {
                let left = self.left(service).await;
                Answer::NotDrained {
                    service: service.status(),
                    left,
                }
            }
            Drain::Superseded => refusal(service.superseded()),
        }
    }

    async fn left(&self, service: &Service) -> Vec<InFlight> {
        let mut left = Vec::new();
        for worker in &self.running.workers {
            let (reply, answer) = oneshot::channel();
            let question = Question::InFlight {
                service: service.name().clone(),
                reply,
            };
            if worker.send(question).await.is_ok()
                && let Ok(Ok(part)) = timeout(QUESTION_MS_MAX, answer).await
            {
                left.extend(part);
            }
        }
        left.sort_by_key(|entry: &InFlight| std::cmp::Reverse(entry.age_ms));
        left.truncate(LEFT_MAX);
        left
    }
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

fn refusal(refused: Refused) -> Answer {
    Answer::Refused {
        reason: refused.reason,
        message: refused.message,
        register: Some(refused.register),
    }
}
