//! What a hold means for the requests of a service or of one of its routes: whether they are waited for, cut or
//! carried at the cut, who is the application itself, and in which order they are let through.
//!
//! A route says what is different for it; everything else is as its service has it.

use cutover_protocol::hold::AtCut;

use super::route::networks;
use super::table::{Problem, Section};
use crate::forwarded::TrustedFrom;
use crate::service::terms::ReleaseClass;

/// What a hold means for a request.
#[derive(Debug, Clone, Default)]
pub struct HoldConfig {
    /// What becomes of it if it does not end while the service drains.
    pub at_cut: AtCut,
    /// Where the application's own requests come from.
    pub(crate) own_from: TrustedFrom,
    /// Who of the held leave before it.
    pub(crate) release_class: ReleaseClass,
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
    Ok(HoldConfig {
        at_cut,
        own_from,
        release_class,
    })
}
