//! Passive ejection: a server that fails its requests is spared them for a while, and for longer each time.
//!
//! Never ejects more than the configured share of a group: if all fail, the fault is rarely theirs. Counting costs
//! a worker nothing that another worker has to wait for; sums are made only when something failed.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::moment::Moment;
use super::server::bump;
use crate::config::EjectConfig;

/// How a request on a server ended, as far as the server is to blame or to praise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It answered with this status; a raw connection that worked counts as 200.
    Answered(u16),
    /// No connection came about.
    Unreachable,
    /// The connection ended, or the answer was not understood, before it was whole.
    Broken,
}

/// Why a server was ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Cause {
    /// So many in a row.
    #[error("{0} connections failed in a row")]
    ConnectErrors(u32),
    /// So many in a row.
    #[error("{0} requests failed in a row")]
    ServerErrors(u32),
    /// Too large a share of a window.
    #[error("{errors} of {requests} requests failed")]
    Share {
        /// Failed requests.
        errors: u64,
        /// All requests.
        requests: u64,
    },
}

/// Failures in a row, over all workers. Written only when one happens, and when one ends the row.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    connect_errors: AtomicU32,
    server_errors: AtomicU32,
}

impl Rows {
    /// Takes note of an outcome; says why, if a row is now long enough for an ejection.
    pub(super) fn note(&self, outcome: Outcome, rule: &EjectConfig) -> Option<Cause> {
        match outcome {
            Outcome::Answered(status) if status < 500 => {
                self.clear();
                None
            }
            Outcome::Unreachable => {
                let row = self.connect_errors.fetch_add(1, Relaxed) + 1;
                reached(row, rule.connect_errors).then_some(Cause::ConnectErrors(row))
            }
            Outcome::Answered(_) | Outcome::Broken => {
                let row = self.server_errors.fetch_add(1, Relaxed) + 1;
                reached(row, rule.server_errors).then_some(Cause::ServerErrors(row))
            }
        }
    }

    pub(super) fn clear(&self) {
        for row in [&self.connect_errors, &self.server_errors] {
            if row.load(Relaxed) != 0 {
                row.store(0, Relaxed);
            }
        }
    }
}

/// Zero means: never.
const fn reached(row: u32, limit: u32) -> bool {
    limit != 0 && row >= limit
}

/// One worker's requests and errors of the current window.
#[derive(Debug, Default)]
pub(crate) struct Window {
    index: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
}

impl Window {
    /// Which window a moment lies in.
    pub(super) fn index(now: Moment, length: Duration) -> u64 {
        let length_ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
        now.0 / length_ns.max(1)
    }

    /// Counts a request. Only the worker it belongs to calls this.
    pub(super) fn note(&self, index: u64, failed: bool) {
        if self.index.load(Relaxed) != index {
            self.requests.store(0, Relaxed);
            self.errors.store(0, Relaxed);
            self.index.store(index, Relaxed);
        }
        bump(&self.requests);
        if failed {
            bump(&self.errors);
        }
    }

    /// Requests and errors, if this is still the window.
    pub(super) fn counts(&self, index: u64) -> (u64, u64) {
        if self.index.load(Relaxed) != index {
            return (0, 0);
        }
        (self.requests.load(Relaxed), self.errors.load(Relaxed))
    }
}

/// Whether the sums of a window are reason enough.
pub(super) fn share(sums: (u64, u64), rule: &EjectConfig) -> Option<Cause> {
    let (requests, errors) = sums;
    let enough = rule.error_percent != 0 && requests >= rule.window_requests_min;
    let too_many = errors * 100 >= requests * u64::from(rule.error_percent);
    (enough && too_many).then_some(Cause::Share { errors, requests })
}

/// How many of a group may be ejected at once.
pub(super) fn allowed(servers: usize, rule: &EjectConfig) -> usize {
    servers * usize::from(rule.share_percent_max) / 100
}

/// One server's ejections so far.
#[derive(Debug, Default)]
pub(crate) struct Ejections {
    /// In close succession.
    times: u32,
    /// End of the last one.
    until: u64,
    /// Why it was.
    cause: Option<Cause>,
}

impl Ejections {
    /// The end of an ejection that begins now: each is twice as long as the one before, until the server has
    /// been well for as long as the longest.
    pub(super) fn next(&mut self, now: Moment, rule: &EjectConfig, cause: Cause) -> Moment {
        self.cause = Some(cause);
        if now.since(Moment(self.until)) > rule.ejected_max {
            self.times = 0;
        }
        let doubled = 1_u32.checked_shl(self.times).unwrap_or(u32::MAX);
        let length = rule.ejected_first.saturating_mul(doubled);
        let until = now.plus(length.min(rule.ejected_max));
        self.times = self.times.saturating_add(1);
        self.until = until.0;
        until
    }

    /// End and cause of the last one.
    pub(super) fn last(&self) -> Option<(Moment, Cause)> {
        self.cause.map(|cause| (Moment(self.until), cause))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn rule() -> EjectConfig {
        EjectConfig {
            connect_errors: 3,
            server_errors: 5,
            error_percent: 50,
            window: Duration::from_secs(10),
            window_requests_min: 20,
            ejected_first: Duration::from_secs(10),
            ejected_max: Duration::from_secs(60),
            share_percent_max: 50,
        }
    }

    #[test]
    fn three_failed_connections_in_a_row_are_enough_and_an_answer_ends_the_row() {
        let rows = Rows::default();
        for _ in 0..5 {
            assert_eq!(rows.note(Outcome::Unreachable, &rule()), None);
            assert_eq!(rows.note(Outcome::Unreachable, &rule()), None);
            assert_eq!(rows.note(Outcome::Answered(404), &rule()), None);
        }
        rows.note(Outcome::Unreachable, &rule());
        rows.note(Outcome::Unreachable, &rule());
        assert_eq!(
            rows.note(Outcome::Unreachable, &rule()),
            Some(Cause::ConnectErrors(3))
        );
    }

    #[test]
    fn broken_answers_and_those_of_500_count_in_one_row() {
        let rows = Rows::default();
        for outcome in [
            Outcome::Broken,
            Outcome::Answered(500),
            Outcome::Answered(503),
        ] {
            assert_eq!(rows.note(outcome, &rule()), None);
        }
        assert_eq!(rows.note(Outcome::Broken, &rule()), None);
        assert_eq!(
            rows.note(Outcome::Answered(502), &rule()),
            Some(Cause::ServerErrors(5))
        );
    }

    #[test]
    fn a_row_of_zero_is_switched_off() {
        let rows = Rows::default();
        let off = EjectConfig {
            connect_errors: 0,
            ..rule()
        };
        for _ in 0..100 {
            assert_eq!(rows.note(Outcome::Unreachable, &off), None);
        }
    }

    #[test]
    fn a_share_counts_only_from_enough_requests() {
        assert_eq!(share((19, 19), &rule()), None);
        assert_eq!(share((20, 9), &rule()), None);
        let (requests, errors) = (20, 10);
        assert_eq!(
            share((requests, errors), &rule()),
            Some(Cause::Share { errors, requests })
        );
    }

    #[test]
    fn a_window_forgets_the_one_before() {
        let window = Window::default();
        window.note(7, true);
        window.note(7, false);
        assert_eq!(window.counts(7), (2, 1));
        assert_eq!(window.counts(8), (0, 0));
        window.note(8, false);
        assert_eq!(window.counts(8), (1, 0));
    }

    #[test]
    fn each_ejection_is_twice_as_long_until_the_server_was_well_for_long() {
        let mut ejections = Ejections::default();
        let mut now = Moment::of(Instant::now());
        let cause = Cause::ConnectErrors(3);
        let mut lengths = Vec::new();
        for _ in 0..5 {
            let until = ejections.next(now, &rule(), cause);
            lengths.push(until.since(now).as_secs());
            now = until;
        }
        assert_eq!(lengths, [10, 20, 40, 60, 60]);
        now = now.plus(Duration::from_secs(61));
        assert_eq!(ejections.next(now, &rule(), cause).since(now).as_secs(), 10);
    }

    #[test]
    fn a_single_server_is_never_ejected_and_at_most_half_of_several() {
        let counts = [1, 2, 3, 4, 10].map(|servers| allowed(servers, &rule()));
        assert_eq!(counts, [0, 1, 1, 2, 5]);
    }
}
