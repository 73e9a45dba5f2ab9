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
    let before = before.cloned().unwrap_or_default();
    let own_from = if section.has("own_from") {
        networks(section, "own_from")?
    } else {
        before.own_from
    };
    let at_cut = section.choice(
        "at_cut",
        &[
            ("wait", AtCut::Wait),
            ("cut", AtCut::Cut),
            ("carry", AtCut::Carry),
        ],
        "\"wait\", \"cut\" or \"carry\"",
    )?;
    let release_class = section.choice(
        "release_class",
        &[
            ("first", ReleaseClass::First),
            ("usual", ReleaseClass::Usual),
            ("last", ReleaseClass::Last),
        ],
        "\"first\", \"usual\" or \"last\"",
    )?;
    let at_limit = section.choice(
        "at_limit",
        &[
            ("wait", AtLimit::Wait),
            ("retry_page", AtLimit::RetryPage),
            ("error", AtLimit::Error),
        ],
        "\"wait\", \"retry_page\" or \"error\"",
    )?;
    let when_full = section.choice(
        "when_full",
        &[("wait", WhenFull::Wait), ("refuse", WhenFull::Refuse)],
        "\"wait\" or \"refuse\"",
    )?;
    Ok(HoldConfig {
        at_cut: at_cut.unwrap_or(before.at_cut),
        own_from,
        limit: None,
        at_limit: at_limit.unwrap_or(before.at_limit),
        release_class: release_class.unwrap_or(before.release_class),
        when_full: when_full.unwrap_or(before.when_full),
    })
}
