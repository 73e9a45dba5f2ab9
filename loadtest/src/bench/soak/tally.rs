//! Reads what siege, wrk and ab print about a slice of load. Pure. Whatever is not surely an answered request counts
//! as an error.

/// Requests and errors of one or more slices of load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that were answered as they should.
    pub requests: u64,
    /// Everything else.
    pub errors: u64,
    /// What the first error was.
    pub first_error: Option<String>,
}

impl Tally {
    /// A slice that could not be made, or whose output makes no sense.
    #[must_use]
    pub fn broken(why: String) -> Self {
        Self {
            requests: 0,
            errors: 1,
            first_error: Some(why),
        }
    }

    /// Adds another slice.
    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
    }

    fn of(answered: u64, errors: &[(&str, u64)]) -> Self {
        let found = errors.iter().filter(|(_, count)| *count > 0);
        let texts: Vec<String> = found
            .map(|(what, count)| format!("{what}: {count}"))
            .collect();
        Self {
            requests: answered,
            errors: errors.iter().map(|(_, count)| count).sum(),
            first_error: (!texts.is_empty()).then(|| texts.join(", ")),
        }
    }
}

/// What wrk printed; nothing when it is something else.
#[must_use]
pub fn wrk(said: &str) -> Option<Tally> {
    let line = said.lines().find(|line| line.contains(" requests in "))?;
    let all: u64 = line.split_whitespace().next()?.parse().ok()?;
    let refused = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Non-2xx or 3xx responses: "))
        .map_or(Some(0), |count| count.parse().ok())?;
    let sockets = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Socket errors: "));
    // «connect 0, read 0, write 0, timeout 0»: each kind by its own name.
    let parts = sockets.into_iter().flat_map(|line| line.split(", "));
    let kinds: Vec<(&str, u64)> = parts
        .map(|part| {
            let (kind, count) = part.split_once(' ')?;
            Some((kind, count.parse().ok()?))
        })
        .collect::<Option<_>>()?;
    let errors = [&[("wrong status", refused)], kinds.as_slice()].concat();
    Some(Tally::of(all.saturating_sub(refused), &errors))
}

/// What siege printed as JSON.
#[must_use]
pub fn siege(said: &str) -> Option<Tally> {
    let start = said.find('{')?;
    let end = said.rfind('}')?;
    let value: serde_json::Value = serde_json::from_str(said.get(start..=end)?).ok()?;
    let count = |key: &str| value.get(key)?.as_u64();
    let (good, all) = (count("successful_transactions")?, count("transactions")?);
    let errors = [
        ("failed transactions", count("failed_transactions")?),
        ("wrong status", all.saturating_sub(good)),
    ];
    Some(Tally::of(good, &errors))
}

/// What ab printed.
#[must_use]
pub fn ab(said: &str) -> Option<Tally> {
    let count = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    let all = count("Complete requests:")?;
    let (failed, status) = (
        count("Failed requests:")?,
        count("Non-2xx responses:").unwrap_or(0),
    );
    let errors = [
        ("failed requests", failed),
        ("wrong status", status),
        ("write errors", count("Write errors:").unwrap_or(0)),
    ];
    Some(Tally::of(all.saturating_sub(failed.max(status)), &errors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_tells_of_errors_only_when_there_are_some() {
        let good =
            "Running 1s test\n  109709 requests in 1.10s, 17.89MB read\nRequests/sec:  99551.01\n";
        let tally = wrk(good).unwrap();
        assert_eq!((tally.requests, tally.errors), (109_709, 0));
        let bad = "  10 requests in 1.10s, 1MB read\n  Socket errors: connect 1, read 2, write 0, timeout 3\n  Non-2xx or 3xx responses: 4\n";
        let tally = wrk(bad).unwrap();
        assert_eq!((tally.requests, tally.errors), (6, 10));
        assert_eq!(
            tally.first_error.as_deref(),
            Some("wrong status: 4, connect: 1, read: 2, timeout: 3")
        );
        assert_eq!(wrk("unable to connect"), None);
    }

    #[test]
    fn siege_speaks_json_between_other_lines() {
        let said = "note\n{\t\"transactions\":\t\t12,\n\t\"failed_transactions\":\t2,\n\t\"successful_transactions\":\t11\n}\n";
        let tally = siege(said).unwrap();
        assert_eq!((tally.requests, tally.errors), (11, 3));
        assert_eq!(siege("{}"), None);
    }

    #[test]
    fn ab_counts_failed_requests_and_wrong_statuses() {
        let said = "Complete requests:      1000\nFailed requests:        3\n   (Connect: 0, Receive: 0, Length: 3, Exceptions: 0)\nNon-2xx responses:      2\n";
        let tally = ab(said).unwrap();
        assert_eq!((tally.requests, tally.errors), (997, 5));
        assert_eq!(ab("Benchmarking... (be patient)"), None);
    }

    #[test]
    fn a_sum_keeps_the_first_error() {
        let mut sum = Tally::default();
        sum.add(Tally::broken("first".into()));
        sum.add(Tally::broken("second".into()));
        assert_eq!((sum.errors, sum.first_error.as_deref()), (2, Some("first")));
    }
}
