//! One command for several services. It takes effect for all of them or for none: what it cannot finish it takes
//! back, and the answer tells how each of them is afterwards.
//!
//! Holds go from the outside in, each drained before the next begins: what is in flight at the web server still needs
//! the database. Releases go from the inside out, so that nobody is let through to a service that still waits. A crash
//! in the middle leaves every register where its file says, and leases end what nobody finishes.

use std::sync::Arc;

use cutover_protocol::hold::{
    Answer, Claim, Expected, InFlight, Refusal, SERVICES_MAX, ServiceStatus,
};
use cutover_protocol::id::{Epoch, ServiceName};
use tokio::time::Instant;

use super::commands::{Commander, Unknown, drain_limit};
use crate::service::{Began, Change, Drain, Hold, Refused, Service};

/// How long a hold lasts, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct HoldLimits {
    pub(super) lease_ms: u64,
    pub(super) drain_ms_max: u64,
}

impl HoldLimits {
    pub(super) const fn new(lease_ms: u64, drain_ms_max: u64) -> Self {
        Self {
            lease_ms,
            drain_ms_max,
        }
    }
}

/// One service of a command.
struct Member {
    service: Arc<Service>,
    epoch: Epoch,
}

impl Member {
    /// The same refusal, because of this service.
    fn blame(&self, refused: Refused) -> Blame {
        Blame {
            service: self.service.name().clone(),
            reason: refused.reason,
            message: refused.message,
            left: Vec::new(),
        }
    }
}

/// Why it came to nothing, and because of whom.
struct Blame {
    service: ServiceName,
    reason: Refusal,
    message: String,
    left: Vec<InFlight>,
}

/// What the command has closed, in its order.
type Held<'m> = Vec<(&'m Member, Hold)>;

impl Commander {
    /// Holds all of them, drained, or none.
    ///
    /// # Cancel safety
    /// Dropped, what is held so far stays so until its lease runs out.
    pub(super) async fn hold_all(
        &self,
        services: &[Expected],
        limits: HoldLimits,
        claim: &Claim,
    ) -> Answer {
        let members = match self.members(services) {
            Ok(members) => members,
            Err(answer) => return *answer,
        };
        let mut held = Vec::new();
        let blame = match self.close_all(&members, limits, claim, &mut held).await {
            Ok(()) => {
                return Answer::DoneAll {
                    services: statuses(&members),
                };
            }
            Err(blame) => blame,
        };
        let kept = take_back(&held, claim);
        refusal(&members, blame.noting(&kept))
    }

    async fn close_all<'m>(
        &self,
        members: &'m [Member],
        limits: HoldLimits,
        claim: &Claim,
        held: &mut Held<'m>,
    ) -> Result<(), Blame> {
        let HoldLimits {
            lease_ms,
            drain_ms_max,
        } = limits;
        let change = |epoch| Change::Hold { epoch, lease_ms };
        all_may(members, change, claim)?;
        let deadline = Instant::now() + drain_limit(drain_ms_max);
        for member in members {
            let Member { service, epoch } = member;
            let hold = service.hold(*epoch, lease_ms, claim);
            let hold = hold.map_err(|refused| member.blame(refused))?;
            // The drains may take longer than a lease; whoever asked can renew only once it has our answer.
            service.prolong_lease(drain_limit(drain_ms_max));
            held.push((member, hold));
            match self.drained_or_cut(service, hold.mark, deadline).await {
                Drain::Quiet => {}
                Drain::Superseded => return Err(member.blame(service.superseded())),
                Drain::TimedOut => {
                    let left = self.left(service).await;
                    let message = format!(
                        "{service} did not drain within {drain_ms_max} ms, {count} still in flight",
                        service = service.name(),
                        count = service.gate.in_flight()
                    );
                    let refused = service.refused(Refusal::NotDrained, message);
                    return Err(Blame {
                        left,
                        ..member.blame(refused)
                    });
                }
            }
        }
        // Somebody may have reopened the first while the last was drained.
        for (member, hold) in held.iter() {
            let Member { service, epoch } = member;
            if !service.stands(hold) {
                return Err(member.blame(service.superseded()));
            }
            let epoch = *epoch;
            let renewed = service.change(Change::Renew { epoch, lease_ms }, claim);
            renewed.map_err(|refused| member.blame(refused))?;
        }
        Ok(())
    }

    /// The same change for all of them, or for none. Releases go the other way round.
    pub(super) fn change_all(
        &self,
        services: &[Expected],
        change: impl Fn(Epoch) -> Change,
        claim: &Claim,
    ) -> Answer {
        let members = match self.members(services) {
            Ok(members) => members,
            Err(answer) => return *answer,
        };
        let done = all_may(&members, &change, claim).and_then(|()| {
            let apply = |member: &Member| {
                let changed = member.service.change(change(member.epoch), claim);
                // Only a disk can still be in the way. Repeated, the command goes on from here.
                changed.map_err(|refused| member.blame(refused))
            };
            match change(Epoch::FIRST) {
                Change::Release { .. } => members.iter().rev().try_for_each(apply),
                _ => members.iter().try_for_each(apply),
            }
        });
        match done {
            Ok(()) => Answer::DoneAll {
                services: statuses(&members),
            },
            Err(blame) => refusal(&members, blame),
        }
    }

    fn members(&self, services: &[Expected]) -> Result<Vec<Member>, Box<Answer>> {
        let bad = |message: String| {
            Box::new(Answer::Refused {
                reason: Refusal::BadCommand,
                message,
                register: None,
            })
        };
        if services.is_empty() || services.len() > SERVICES_MAX {
            return Err(bad(format!("name 1 to {SERVICES_MAX} services")));
        }
        let (mut members, mut unknown) = (Vec::new(), None);
        for Expected { service, epoch } in services {
            let known = |member: &Member| member.service.name() == service;
            if members.iter().any(known) {
                return Err(bad(format!("{service} is named twice")));
            }
            match self.find(service) {
                Ok(service) => members.push(Member {
                    service,
                    epoch: *epoch,
                }),
                Err(Unknown(message)) => {
                    unknown.get_or_insert(Blame {
                        service: service.clone(),
                        reason: Refusal::UnknownService,
                        message,
                        left: Vec::new(),
                    });
                }
            }
        }
        match unknown {
            None => Ok(members),
            Some(blame) => Err(Box::new(refusal(&members, blame))),
        }
    }
}

/// Before anything is changed: whether all of it would be.
fn all_may(
    members: &[Member],
    change: impl Fn(Epoch) -> Change,
    claim: &Claim,
) -> Result<(), Blame> {
    members.iter().try_for_each(|member| {
        let may = member.service.may(change(member.epoch), claim);
        may.map_err(|refused| member.blame(refused))
    })
}

/// Reopens what the command has closed itself, the last one first, and returns what stays held for lack of a disk.
fn take_back(held: &Held<'_>, claim: &Claim) -> Vec<ServiceName> {
    let mut kept = Vec::new();
    let ours = held.iter().rev();
    for (Member { service, epoch }, hold) in ours.filter(|(_, hold)| hold.began == Began::Now) {
        // Decided by somebody else meanwhile, it is theirs to release.
        if !service.stands(hold) {
            continue;
        }
        let epoch = *epoch;
        let aborted = service.change(Change::Abort { epoch }, claim);
        let to = service.gate.word().register.owner;
        let epoch = epoch.next();
        let reopened = aborted.and_then(|()| service.change(Change::Release { epoch, to }, claim));
        if let Err(refused) = reopened
            && refused.reason == Refusal::NotDurable
        {
            kept.push(service.name().clone());
        }
    }
    kept
}

fn statuses(members: &[Member]) -> Vec<ServiceStatus> {
    let statuses = members.iter().map(|member| member.service.status());
    statuses.collect()
}

fn refusal(members: &[Member], blame: Blame) -> Answer {
    let Blame {
        service,
        reason,
        message,
        left,
    } = blame;
    Answer::RefusedAll {
        service,
        reason,
        message,
        left,
        services: statuses(members),
    }
}

impl Blame {
    /// Also says what could not be taken back.
    fn noting(mut self, kept: &[ServiceName]) -> Self {
        if !kept.is_empty() {
            let names: Vec<&str> = kept.iter().map(ServiceName::as_str).collect();
            let names = names.join(", ");
            self.message = format!(
                "{}; {names} could not be reopened and stays held until its lease runs out",
                self.message
            );
        }
        self
    }
}
