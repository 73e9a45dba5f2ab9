//! What a hold means for the requests of a service or of one of its routes: whether they are waited for, cut or
//! carried at the cut, who is the application itself, and in which order they are let through.
//!
//! A route says what is different for it; everything else is as its service has it.

use std::time::Duration;

use cutover_protocol::hold::AtCut;

use super::load::{MS_MAX, milliseconds_or, to_u64};
use super::route::networks;
use super::table::{Problem, Section};
use crate::forwarded::TrustedFrom;
use crate::service::budget::WhenFull;
use crate::service::terms::ReleaseClass;

/// What a hold means for a request.
#[derive(Debug, Clone, Default)]
pub struct HoldConfig {
    /// What becomes of it if it does not end while the service drains.
    pub at_cut: AtCut,
    /// Where the application's own requests come from.
    pub(crate) own_from: TrustedFrom,
    /// How long it is held, where that is shorter than its service's bound.
    pub(crate) limit: Option<Duration>,
    /// What it gets when it has been held for as long as it may.
    pub at_limit: AtLimit,
    /// Who of the held leave before it.
    pub(crate) release_class: ReleaseClass,
    /// What becomes of it when the budget of the held is used.
    pub(crate) when_full: WhenFull,
}

/// What a request gets that has been held for as long as it may.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AtLimit {
    /// An error, but only at the service's bound: no route's limit ends its wait.
    Wait,
    /// A page that loads itself again, if it is a browser's; an error otherwise.
    RetryPage,
    /// An error.
    #[default]
    Error,
}

/// `hold_ms_max` and `front_timeout_ms` of a service.
pub(super) fn bounds(
    section: &Section<'_>,
    hold_max: Duration,
) -> Result<(Duration, Option<Duration>), Problem> {
    let hold_max = milliseconds_or(section, "hold_ms_max", hold_max)?;
    let front = section.whole("front_timeout_ms", 1..=MS_MAX)?;
    Ok((
        hold_max,
        front.map(|front| Duration::from_millis(to_u64(front))),
    ))
}

/// A route's own limit.
pub(super) fn limit(
    section: &Section<'_>,
    at_limit: AtLimit,
    hold_max: Duration,
) -> Result<Option<Duration>, Problem> {
    let most = i64::try_from(hold_max.as_millis()).unwrap_or(MS_MAX);
    let Some(limit) = section.whole("hold_ms_max", 1..=most)? else {
        return Ok(None);
    };
    if at_limit == AtLimit::Wait {
        return Err(section.together(
            "has \"hold_ms_max\" with at_limit = \"wait\", which goes on to the service's; say \"error\" or \"retry_page\"",
        ));
    }
    Ok(Some(Duration::from_millis(to_u64(limit))))
}

/// As the table says; what it leaves out is as in `before`, or the default.
pub(super) fn hold(
    section: &Section<'_>,
    before: Option<&HoldConfig>,
) -> Result<HoldConfig, Problem> {
    let at_cut = match section.text("at_cut")? {
        None => before.map_or(AtCut::Wait, |before| before.at_cut),
        Some("wait") => AtCut::Wait,
        Some("cut") => AtCut::Cut,
        Some("carry") => AtCut::Carry,
        Some(other) => {
            return Err(section.bad_text("at_cut", other, "\"wait\", \"cut\" or \"carry\""));
        }
    };
    let own_from = match before {
        Some(before) if !section.has("own_from") => before.own_from.clone(),
        _ => networks(section, "own_from")?,
    };
    let release_class = match section.text("release_class")? {
        None => before.map_or(ReleaseClass::Usual, |before| before.release_class),
        Some("first") => ReleaseClass::First,
        Some("usual") => ReleaseClass::Usual,
        Some("last") => ReleaseClass::Last,
        Some(other) => {
            let wanted = "\"first\", \"usual\" or \"last\"";
            return Err(section.bad_text("release_class", other, wanted));
        }
    };
    let at_limit = match section.text("at_limit")? {
        None => before.map_or(AtLimit::Error, |before| before.at_limit),
        Some("wait") => AtLimit::Wait,
        Some("retry_page") => AtLimit::RetryPage,
        Some("error") => AtLimit::Error,
        Some(other) => {
            let wanted = "\"wait\", \"retry_page\" or \"error\"";
            return Err(section.bad_text("at_limit", other, wanted));
        }
    };
    let when_full = match section.text("when_full")? {
        None => before.map_or(WhenFull::Wait, |before| before.when_full),
        Some("wait") => WhenFull::Wait,
        Some("refuse") => WhenFull::Refuse,
        Some(other) => {
            return Err(section.bad_text("when_full", other, "\"wait\" or \"refuse\""));
        }
    };
    Ok(HoldConfig {
        at_cut,
        own_from,
        limit: None,
        at_limit,
        release_class,
        when_full,
    })
}
