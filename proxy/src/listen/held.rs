//! How long one request may be held, and what it is told when that is over. It never lets a request go upstream whose
//! client has no use for an answer any more.

use std::time::Instant;

use super::port::Settings;
use crate::config::{AtLimit, HoldConfig};
use crate::error::{RequestError, Words};
use crate::http::deadline;
use crate::route::Route;
use crate::service::Eviction;
use crate::service::terms::{End, EndsBy};

/// What a hold means for a request: as its route has it, or its service.
pub(super) fn hold_of<'h>(settings: &'h Settings, route: Option<&'h Route>) -> &'h HoldConfig {
    route.map_or(&settings.service.hold, |route| &route.hold)
}

/// When somebody is answered by us, if that is earlier than by the service's bound: at the limit of its route, or when
/// its own deadline passes. `head` is empty for raw connections.
pub(super) fn end_of(hold: &HoldConfig, arrival: Instant, head: &[u8]) -> Option<End> {
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
pub(super) fn is_too_late(end: Option<End>) -> bool {
    end.is_some_and(|end| end.by == EndsBy::Deadline && end.at <= Instant::now())
}

/// Its answer, in words that its client understands.
pub(super) fn refusal(hold: &HoldConfig, head: &[u8], why: Eviction) -> RequestError {
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
