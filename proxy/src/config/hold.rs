//! What a hold means for the requests of a service or of one of its routes: whether they are waited for, cut or
//! carried at the cut, and who is the application itself.
//!
//! A route says what is different for it; everything else is as its service has it.

use cutover_protocol::hold::AtCut;

use super::route::networks;
use super::table::{Problem, Section};
use crate::forwarded::TrustedFrom;

/// What a hold means for a request.
#[derive(Debug, Clone, Default)]
pub struct HoldConfig {
    /// What becomes of it if it does not end while the service drains.
    pub at_cut: AtCut,
    /// Where the application's own requests come from.
    pub(crate) own_from: TrustedFrom,
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
    Ok(HoldConfig { at_cut, own_from })
}
