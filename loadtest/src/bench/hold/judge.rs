//! Compares what clients were told with what origins executed, and when. Pure; lost, doubled and failed are those of
//! the lab's one, [`crate::verdict`].

use std::collections::HashMap;
use std::time::Duration;

use crate::bench::hold::plan::{Execution, Kind, Outcome, Request, Wave};
use crate::record::{Asked, Outcome as Recorded, Record};
use crate::verdict::{self, Verdict};

/// Everything known about a run.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// What clients wrote down.
    pub requests: &'a [Request],
    /// What all origins wrote down.
    pub executions: &'a [Execution],
    /// When the held were let through; nothing where they never were.
    pub released: Option<Released>,
    /// Requests that may be under way to an origin at the same time. Of those that are, chance says which one the
    /// origin sees first: one finds a kept connection, the one before it has to connect.
    pub window: usize,
}

/// The moments around a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// The command was about to be given: whoever was sent before it and not answered was held.
    pub asked_ns: u64,
    /// It was answered: whoever is sent after it comes behind the held.
    pub done_ns: u64,
}

/// What came of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Lost, doubled, failed.
    pub verdict: Verdict,
    /// Requests that were held.
    pub held: usize,
    /// Later requests whose execution was over before that of an earlier one began, and so long before that more than a
    /// window of others began in between: one that was sent after the release and one that was held for the same
    /// service, or two streams of an HTTP/2 connection.
    pub overtaken: usize,
    /// Those of them that came after the release.
    pub newcomers: usize,
    /// From the release to the last answer of a held request.
    pub release: Option<Duration>,
    /// From the release to the answers of the held: half of them took at most this.
    pub stall_p50: Option<Duration>,
    /// 99 of 100 took at most this.
    pub stall_p99: Option<Duration>,
}

/// Judges a run.
#[must_use]
pub fn judge(evidence: &Evidence<'_>) -> Tally {
    let held = held(evidence);
    let mut stalls: Vec<u64> = held.iter().map(|(_, stall_ns)| *stall_ns).collect();
    stalls.sort_unstable();
    let at = |part: usize| {
        let index = (stalls.len() * part).div_ceil(100).max(1) - 1;
        stalls.get(index).copied().map(Duration::from_nanos)
    };
    let executed = by_id(evidence.executions);
    let newcomers = newcomers_before_held(evidence, &executed);
    Tally {
        verdict: account(evidence),
        held: held.len(),
        overtaken: newcomers + streams_out_of_order(evidence, &executed),
        newcomers,
        release: stalls.last().copied().map(Duration::from_nanos),
        stall_p50: at(50),
        stall_p99: at(99),
    }
}

/// The requests that were held and then answered, with the time from the release to the answer.
fn held<'a>(evidence: &Evidence<'a>) -> Vec<(&'a Request, u64)> {
    let Some(released) = evidence.released else {
        return Vec::new();
    };
    let requests = evidence.requests.iter();
    let held = requests.filter(|request| {
        request.sent_ns < released.asked_ns
            && request.ended_ns > released.asked_ns
            && matches!(request.outcome, Outcome::Answered(_))
    });
    held.map(|request| (request, request.ended_ns - released.asked_ns))
        .collect()
}

/// A request that was sent on purpose to be left is no failure, but must not be found at an origin either.
fn account(evidence: &Evidence<'_>) -> Verdict {
    let name = |id: u64| format!("{id:016x}");
    let requests = evidence.requests.iter();
    let records: Vec<Record> = requests
        .filter(|request| request.outcome != Outcome::Left)
        .map(|request| Record {
            client: request.connection as usize,
            asked: Asked::Add(name(request.id)),
            sent_at: Duration::from_nanos(request.sent_ns),
            ended_at: Duration::from_nanos(request.ended_ns.max(request.sent_ns)),
            outcome: match request.outcome {
                Outcome::Answered(status) => Recorded::Answered(status),
                Outcome::Waiting => Recorded::Broken("no answer".into()),
                Outcome::Broken | Outcome::Left => Recorded::Broken("broken".into()),
            },
        })
        .collect();
    let methods: HashMap<u64, _> = evidence
        .requests
        .iter()
        .map(|request| (request.id, request.method))
        .collect();
    // An id that came by another method than it was sent with was not executed: a POST that became a GET stores nothing.
    let stored: Vec<String> = evidence
        .executions
        .iter()
        .filter(|execution| {
            methods
                .get(&execution.id)
                .is_none_or(|method| *method == execution.method)
        })
        .map(|execution| name(execution.id))
        .collect();
    verdict::judge(&records, &stored)
}

/// Which gate a request meets.
fn is_raw(request: &Request) -> bool {
    request.kind == Kind::Tcp
}

/// An execution and its place in the order of their beginnings.
#[derive(Debug, Clone, Copy)]
struct Placed<'a> {
    execution: &'a Execution,
    place: usize,
}

impl Placed<'_> {
    /// Whether `self`, the later request, is out of order with an earlier one.
    fn overtakes(&self, earlier: &Self, window: usize) -> bool {
        let is_over = self.execution.ended_ns > 0;
        is_over
            && self.execution.ended_ns < earlier.execution.began_ns
            && earlier.place.saturating_sub(self.place) > window
    }
}

fn by_id(executions: &[Execution]) -> HashMap<u64, Placed<'_>> {
    let mut ordered: Vec<&Execution> = executions.iter().collect();
    ordered.sort_by_key(|execution| execution.began_ns);
    let places = ordered.into_iter().enumerate();
    places
        .map(|(place, execution)| (execution.id, Placed { execution, place }))
        .collect()
}

fn newcomers_before_held(evidence: &Evidence<'_>, executed: &HashMap<u64, Placed<'_>>) -> usize {
    let Some(released) = evidence.released else {
        return 0;
    };
    let held = held(evidence);
    let of_service = |raw: bool| {
        let own = held.iter().filter(|(request, _)| is_raw(request) == raw);
        let last = own
            .filter_map(|(request, _)| executed.get(&request.id))
            .max_by_key(|placed| placed.place);
        let newcomers = evidence
            .requests
            .iter()
            .filter(|request| is_raw(request) == raw && request.sent_ns > released.done_ns);
        let executed = newcomers.filter_map(|request| executed.get(&request.id));
        last.map_or(0, |last| {
            executed
                .filter(|newcomer| newcomer.overtakes(last, evidence.window))
                .count()
        })
    };
    of_service(false) + of_service(true)
}

fn streams_out_of_order(evidence: &Evidence<'_>, executed: &HashMap<u64, Placed<'_>>) -> usize {
    let mut streams: Vec<&Request> = evidence
        .requests
        .iter()
        .filter(|request| request.kind == Kind::H2 && request.wave != Wave::Steady)
        .collect();
    // Ids grow in the order of sending; their upper part is the process.
    streams.sort_unstable_by_key(|request| (request.id >> 40, request.connection, request.id));
    let (mut connection, mut latest, mut inverted) = (None, None::<Placed<'_>>, 0);
    for request in streams {
        let own = Some((request.id >> 40, request.connection));
        if own != connection {
            (connection, latest) = (own, None);
        }
        let Some(placed) = executed.get(&request.id) else {
            continue;
        };
        match latest {
            Some(earlier) if placed.place < earlier.place => {
                inverted += usize::from(placed.overtakes(&earlier, evidence.window));
            }
            _ => latest = Some(*placed),
        }
    }
    inverted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::hold::plan::Method;

    fn request(id: u64, sent_ns: u64, ended_ns: u64) -> Request {
        Request {
            id,
            kind: Kind::Clear,
            method: Method::Post,
            wave: Wave::Held,
            connection: 0,
            sent_ns,
            ended_ns,
            outcome: Outcome::Answered(200),
        }
    }

    const fn execution(id: u64, began_ns: u64, ended_ns: u64) -> Execution {
        Execution {
            id,
            method: Method::Post,
            began_ns,
            ended_ns,
        }
    }

    const RELEASED: Released = Released {
        asked_ns: 1000,
        done_ns: 1010,
    };

    fn tally(requests: &[Request], executions: &[Execution]) -> Tally {
        judge(&Evidence {
            requests,
            executions,
            released: Some(RELEASED),
            window: 0,
        })
    }

    #[test]
    fn held_requests_that_were_executed_once_are_fine_and_their_stall_begins_at_the_release() {
        let found = tally(
            &[request(1, 10, 1100), request(2, 20, 1300)],
            &[execution(1, 1050, 1060), execution(2, 1200, 1210)],
        );
        assert!(found.verdict.ok);
        assert_eq!((found.held, found.overtaken), (2, 0));
        assert_eq!(found.release, Some(Duration::from_nanos(300)));
        assert_eq!(found.stall_p50, Some(Duration::from_nanos(100)));
        assert_eq!(found.stall_p99, Some(Duration::from_nanos(300)));
    }

    #[test]
    fn a_post_that_became_a_get_is_lost() {
        let mut got = execution(1, 1050, 1060);
        got.method = Method::Get;
        let found = tally(&[request(1, 10, 1100)], &[got]);
        assert_eq!((found.verdict.lost, found.verdict.ok), (1, false));
    }

    #[test]
    fn a_request_at_both_sites_is_doubled_also_when_one_broke_off() {
        let twice = [execution(1, 900, 0), execution(1, 1050, 1060)];
        assert_eq!(tally(&[request(1, 10, 1100)], &twice).verdict.doubled, 1);
    }

    #[test]
    fn a_client_that_left_has_not_failed_but_must_leave_no_trace() {
        let mut left = request(1, 10, 500);
        left.outcome = Outcome::Left;
        let all = [left, request(2, 20, 1100)];
        assert!(tally(&all, &[execution(2, 1050, 1060)]).verdict.ok);
        let trace = [execution(1, 1040, 1050), execution(2, 1050, 1060)];
        assert_eq!(tally(&all, &trace).verdict.unknown, 1);
    }

    #[test]
    fn a_newcomer_that_is_done_before_a_held_request_begins_has_overtaken_it() {
        let all = [request(1, 10, 2000), request(2, 1020, 1500)];
        let after = [execution(1, 1300, 1400), execution(2, 1200, 1250)];
        assert_eq!(tally(&all, &after).overtaken, 1);
        let beside = [execution(1, 1300, 1400), execution(2, 1200, 1350)];
        assert_eq!(tally(&all, &beside).overtaken, 0);
    }

    #[test]
    fn two_requests_that_may_be_under_way_together_have_no_order() {
        let requests = [request(1, 10, 2000), request(2, 1020, 1500)];
        let executions = [execution(1, 1300, 1400), execution(2, 1200, 1250)];
        let evidence = Evidence {
            requests: &requests,
            executions: &executions,
            released: Some(RELEASED),
            window: 1,
        };
        assert_eq!(judge(&evidence).overtaken, 0);
    }

    #[test]
    fn a_later_stream_that_is_done_before_an_earlier_one_begins_is_out_of_order() {
        let mut all = [request(1, 10, 2000), request(2, 11, 2000)];
        for stream in &mut all {
            stream.kind = Kind::H2;
        }
        let inverted = [execution(1, 1300, 1400), execution(2, 1200, 1250)];
        assert_eq!(tally(&all, &inverted).overtaken, 1);
        all[1].connection = 1;
        assert_eq!(tally(&all, &inverted).overtaken, 0);
    }
}
