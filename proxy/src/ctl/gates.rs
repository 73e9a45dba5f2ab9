//! What `ctl` commands gates: holds, commits, aborts, releases. One service is commanded alone; several go together, for
//! all or for none.
//!
//! A person does not name epochs: they are read first. Every command is still a compare-and-set from what was read, so
//! whoever was faster wins and the person is told.

use std::time::Duration;

use anyhow::bail;
use cutover_protocol::hold::{Answer, Claim, Command, Expected, Order, ServiceStatus};
use cutover_protocol::id::{ServiceName, Site};
use hopgate_proxy::control::client::ControlClient;

/// The gates of one command line.
pub(super) struct Gates<'c> {
    client: &'c mut ControlClient,
    services: &'c [ServiceName],
    claim: Claim,
}

impl<'c> Gates<'c> {
    pub(super) fn of(
        client: &'c mut ControlClient,
        services: &'c [ServiceName],
        force: bool,
    ) -> Self {
        let claim = if force { Claim::Force } else { Claim::Nobody };
        Self {
            client,
            services,
            claim,
        }
    }

    pub(super) fn hold(
        &mut self,
        lease: Duration,
        drain: Duration,
        expect: Option<Duration>,
    ) -> anyhow::Result<Answer> {
        let statuses = match self.statuses()? {
            Ok(statuses) => statuses,
            Err(refused) => return Ok(refused),
        };
        if let Some(expect) = expect {
            let warnings = statuses
                .iter()
                .flat_map(|status| status.stall_warnings(milliseconds(expect)));
            warnings.for_each(|warning| eprintln!("warning: {warning}"));
        }
        let (lease_ms, drain_ms_max) = (milliseconds(lease), milliseconds(drain));
        let command = match one_of(&statuses) {
            Some(Expected { service, epoch }) => Command::Hold {
                service,
                epoch,
                lease_ms,
                drain_ms_max,
            },
            None => Command::HoldAll {
                services: expected(&statuses),
                lease_ms,
                drain_ms_max,
            },
        };
        self.give(command)
    }

    /// Commits those that are the other site's, aborts holds that nobody has decided, then opens.
    pub(super) fn release(&mut self, to: Site) -> anyhow::Result<Answer> {
        let statuses = match self.statuses()? {
            Ok(statuses) => statuses,
            Err(refused) => return Ok(refused),
        };
        self.release_as(statuses, to)
    }

    pub(super) fn reopen(&mut self) -> anyhow::Result<Answer> {
        let statuses = match self.statuses()? {
            Ok(statuses) => statuses,
            Err(refused) => return Ok(refused),
        };
        let Some(first) = statuses.first() else {
            bail!("name a service");
        };
        let to = first.register.owner;
        if let Some(other) = statuses.iter().find(|status| status.register.owner != to) {
            let (one, other) = (&first.service, &other.service);
            bail!("{one} and {other} belong to different sites; reopen each by itself");
        }
        self.release_as(statuses, to)
    }

    fn release_as(&mut self, statuses: Vec<ServiceStatus>, to: Site) -> anyhow::Result<Answer> {
        let mut now = statuses;
        let theirs = |status: &ServiceStatus| status.register.owner != to;
        let commit: Vec<_> = now
            .iter()
            .filter(|status| theirs(status))
            .cloned()
            .collect();
        let ours = now.iter().filter(|status| !theirs(status));
        let abort: Vec<_> = ours.filter(|ours| ours.is_undecided()).cloned().collect();
        let commands = [
            (!commit.is_empty()).then(|| match one_of(&commit) {
                Some(Expected { service, epoch }) => Command::Commit { service, epoch, to },
                None => Command::CommitAll {
                    services: expected(&commit),
                    to,
                },
            }),
            (!abort.is_empty()).then(|| match one_of(&abort) {
                Some(Expected { service, epoch }) => Command::Abort { service, epoch },
                None => Command::AbortAll {
                    services: expected(&abort),
                },
            }),
        ];
        for command in commands.into_iter().flatten() {
            let changed = match self.give(command)? {
                Answer::Done { service } => vec![service],
                Answer::DoneAll { services } => services,
                refused => return Ok(refused),
            };
            for status in &mut now {
                let mut changed = changed.iter();
                if let Some(after) = changed.find(|after| after.service == status.service) {
                    status.clone_from(after);
                }
            }
        }
        self.give(match one_of(&now) {
            Some(Expected { service, epoch }) => Command::Release { service, epoch, to },
            None => Command::ReleaseAll {
                services: expected(&now),
                to,
            },
        })
    }

    fn give(&mut self, command: Command) -> anyhow::Result<Answer> {
        let claim = self.claim.clone();
        Ok(self.client.order(&Order { claim, command })?)
    }

    /// The services as they are, or the refusal to tell.
    fn statuses(&mut self) -> anyhow::Result<Result<Vec<ServiceStatus>, Answer>> {
        let mut statuses = Vec::new();
        for service in self.services {
            match status(self.client, service)? {
                Ok(status) => statuses.push(status),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        Ok(Ok(statuses))
    }
}

/// The service's status, or the refusal to tell it.
fn status(
    client: &mut ControlClient,
    service: &ServiceName,
) -> anyhow::Result<Result<ServiceStatus, Answer>> {
    match client.command(&Command::Status {
        service: Some(service.clone()),
    })? {
        Answer::Status { mut services } if services.len() == 1 => Ok(Ok(services.remove(0))),
        refused @ Answer::Refused { .. } => Ok(Err(refused)),
        other => bail!(
            "the proxy answered a question about {service} with {other:?}; are both of the same version?"
        ),
    }
}

fn expected(statuses: &[ServiceStatus]) -> Vec<Expected> {
    let expected = |status: &ServiceStatus| Expected {
        service: status.service.clone(),
        epoch: status.register.epoch,
    };
    statuses.iter().map(expected).collect()
}

/// The only one, if it is.
fn one_of(statuses: &[ServiceStatus]) -> Option<Expected> {
    match statuses {
        [_] => expected(statuses).pop(),
        _ => None,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
