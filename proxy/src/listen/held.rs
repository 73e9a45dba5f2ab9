//! How long one request may be held, and what it is told when that is over. It never lets a request go upstream whose
//! client has no use for an answer any more.

use std::time::{Duration, Instant};

use super::port::{Passage, Port, Settings};
use crate::config::{AtLimit, HoldConfig};
use crate::error::{RequestError, Words};
use crate::http::deadline;
use crate::route::Route;
use crate::service::terms::{End, EndsBy};
use crate::service::{Eviction, Ticket};

impl Port {
    /// Sets how long it may be held.
    pub(super) fn limit(&self, passage: &mut Passage, head: &[u8]) {
        let settings = self.settings();
        let hold = hold_of(&settings, passage.route.as_deref());
        passage.terms.end = end_of(hold, passage.terms.arrival, head);
    }

    /// What comes of the gate's word to a request that was held for so long: a ticket, and a head that says how long its
    /// client still waits; or the reason for its answer.
    pub(crate) fn called<'p>(
        &self,
        verdict: Result<Ticket<'p>, Eviction>,
        passage: &Passage,
        head: &mut Vec<u8>,
        held: Duration,
    ) -> Result<Ticket<'p>, RequestError> {
        let verdict = match verdict {
            Ok(_) if is_too_late(passage.terms.end) => Err(Eviction::OutOfTime),
            verdict => verdict,
        };
        match verdict {
            Ok(ticket) => {
                deadline::shorten(head, held);
                Ok(ticket)
            }
            Err(why) => Err(self.refusal(passage, head, why)),
        }
    }

    /// What a request is told that has waited in vain.
    pub(super) fn refusal(&self, passage: &Passage, head: &[u8], why: Eviction) -> RequestError {
        let settings = self.settings();
        let hold = hold_of(&settings, passage.route.as_deref());
        refusal(hold, head, why)
    }
}

/// What a hold means for a request: as its route has it, or its service.
fn hold_of<'h>(settings: &'h Settings, route: Option<&'h Route>) -> &'h HoldConfig {
    route.map_or(&settings.service.hold, |route| &route.hold)
}

/// When somebody is answered by us, if that is earlier than by the service's bound: at the limit of its route, or when
/// its own deadline passes. `head` is empty for raw connections.
fn end_of(hold: &HoldConfig, arrival: Instant, head: &[u8]) -> Option<End> {
    let ends = [
        (hold.limit, EndsBy::Limit),
        (deadline::of(head), EndsBy::Deadline),
    ];
    let ends = ends.into_iter().filter_map(|(after, by)| {
        let at = arrival.checked_add(after?)?;
        Some(End { at, by })
    });
    ends.min_by_key(|end| end.at)
}

/// Whether a request that may go now has to stay all the same.
fn is_too_late(end: Option<End>) -> bool {
    end.is_some_and(|end| end.by == EndsBy::Deadline && end.at <= Instant::now())
}

/// Its answer, in words that its client understands.
fn refusal(hold: &HoldConfig, head: &[u8], why: Eviction) -> RequestError {
    match why {
        Eviction::TooOld if deadline::is_grpc(head) => RequestError::HeldTooLong(Words::Grpc),
        Eviction::TooOld
            if hold.at_limit == AtLimit::RetryPage && deadline::may_be_shown_a_page(head) =>
        {
            RequestError::HeldTooLong(Words::Page)
        }
        Eviction::OutOfTime if deadline::is_grpc(head) => RequestError::OutOfTime(Words::Grpc),
        other => other.into(),
    }
}
