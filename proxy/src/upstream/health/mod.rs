//! Active checks: what they found so far, and when that brings a server up or down.
//!
//! A check never changes a server by itself: so many in a row do.

use std::time::Instant;

use crate::config::HealthConfig;

/// What the checks of one server found.
#[derive(Debug, Default)]
pub(crate) struct CheckRecord {
    /// Results in a row that speak against the present state.
    against: u32,
    /// The last one.
    pub(crate) last: Option<CheckResult>,
}

/// One check.
#[derive(Debug, Clone)]
pub(crate) struct CheckResult {
    /// Whether the server did as it should.
    pub(crate) good: bool,
    /// What it did, for a person.
    pub(crate) reason: String,
    /// When it was over.
    pub(crate) at: Instant,
}

impl CheckRecord {
    /// Takes note; says what the server is from now on, if that changes.
    pub(super) fn note(
        &mut self,
        result: CheckResult,
        is_up: bool,
        config: &HealthConfig,
    ) -> Option<bool> {
        let good = result.good;
        self.last = Some(result);
        if good == is_up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let enough = if good { config.rise } else { config.fall };
        (self.against >= enough).then(|| {
            self.against = 0;
            good
        })
    }
}
