//! The verdict: a pure function over what the clients wrote down and what the serving side has stored.
//!
//! It never asks how the hop went. A client that got an acknowledgement must find its id exactly once; a client
//! that got none may find it once or not at all, but that request counts as failed.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::record::{Asked, Outcome, Record};

/// Ids named in a verdict, at most: enough to look them up in the logs.
const NAMED_MAX: usize = 20;

/// What came of a run, request by request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Something was sent and nothing failed, was lost, doubled or made up.
    pub ok: bool,
    /// Requests sent: ids and pages.
    pub sent: usize,
    /// Requests that got a complete answer, whatever its status.
    pub answered: usize,
    /// Requests without a complete answer of a 2xx status.
    pub failed: usize,
    /// Ids that were acknowledged and are not stored.
    pub lost: usize,
    /// Ids that are stored more than once, acknowledged or not.
    pub doubled: usize,
    /// Ids that are stored and were never sent.
    pub unknown: usize,
    /// Ids that were acknowledged.
    pub ids_acknowledged: usize,
    /// Some of the lost, doubled and unknown ids, by name.
    #[serde(default)]
    pub suspects: Vec<String>,
    /// Some of the failures, as the clients saw them.
    #[serde(default)]
    pub failures: Vec<String>,
}

/// Compares `records` with the ids `stored` at the serving side, duplicates included.
#[must_use]
pub fn judge(records: &[Record], stored: &[String]) -> Verdict {
    let mut count: HashMap<&str, usize> = HashMap::new();
    for id in stored {
        *count.entry(id).or_default() += 1;
    }
    let mut verdict = Verdict {
        sent: records.len(),
        ..Verdict::default()
    };
    let mut suspects = Vec::new();
    let mut sent_ids = HashSet::new();
    for record in records {
        verdict.answered += usize::from(matches!(record.outcome, Outcome::Answered(_)));
        if !record.acknowledged() {
            verdict.failed += 1;
            if verdict.failures.len() < NAMED_MAX {
                verdict.failures.push(failure(record));
            }
        }
        let Asked::Add(id) = &record.asked else {
            continue;
        };
        sent_ids.insert(id.as_str());
        let times = count.get(id.as_str()).copied().unwrap_or(0);
        verdict.ids_acknowledged += usize::from(record.acknowledged());
        let (lost, doubled) = (times == 0 && record.acknowledged(), times > 1);
        verdict.lost += usize::from(lost);
        verdict.doubled += usize::from(doubled);
        if lost || doubled {
            suspects.push(format!("{} {id}", if lost { "lost" } else { "doubled" }));
        }
    }
    let mut unknown: Vec<&str> = count
        .keys()
        .filter(|id| !sent_ids.contains(*id))
        .copied()
        .collect();
    unknown.sort_unstable();
    verdict.unknown = unknown.len();
    suspects.extend(unknown.iter().map(|id| format!("unknown {id}")));
    suspects.truncate(NAMED_MAX);
    verdict.suspects = suspects;
    verdict.ok =
        verdict.sent > 0 && verdict.failed + verdict.lost + verdict.doubled + verdict.unknown == 0;
    verdict
}

fn failure(record: &Record) -> String {
    let asked = match &record.asked {
        Asked::Add(id) => id.as_str(),
        Asked::Page => "page",
    };
    let why = match &record.outcome {
        Outcome::Answered(status) => format!("status {status}"),
        Outcome::Broken(why) => why.clone(),
    };
    format!(
        "{asked} at {:.2} s after {:.2} s: {why}",
        record.sent_at.as_secs_f64(),
        record.latency().as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn add(id: &str, outcome: Outcome) -> Record {
        let asked = Asked::Add(id.to_owned());
        Record {
            client: 0,
            asked,
            sent_at: Duration::ZERO,
            ended_at: Duration::from_secs(1),
            outcome,
        }
    }

    fn ids(stored: &[&str]) -> Vec<String> {
        stored.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn an_acknowledged_id_that_is_stored_once_is_fine() {
        let verdict = judge(&[add("a", Outcome::Answered(201))], &ids(&["a"]));
        assert!(verdict.ok);
        assert_eq!(
            (verdict.sent, verdict.answered, verdict.ids_acknowledged),
            (1, 1, 1)
        );
    }

    #[test]
    fn an_acknowledged_id_that_is_missing_is_lost() {
        let verdict = judge(
            &[
                add("a", Outcome::Answered(201)),
                add("b", Outcome::Answered(201)),
            ],
            &ids(&["a"]),
        );
        assert_eq!(
            (verdict.ok, verdict.lost, verdict.suspects.as_slice()),
            (false, 1, &ids(&["lost b"])[..])
        );
    }

    #[test]
    fn an_id_that_is_stored_twice_is_doubled_even_when_nobody_was_told() {
        let verdict = judge(
            &[add("a", Outcome::Broken("reset".into()))],
            &ids(&["a", "a"]),
        );
        assert_eq!(
            (verdict.ok, verdict.failed, verdict.doubled, verdict.lost),
            (false, 1, 1, 0)
        );
    }

    #[test]
    fn a_failed_request_is_not_lost() {
        let verdict = judge(&[add("a", Outcome::Answered(502))], &[]);
        assert_eq!(
            (verdict.ok, verdict.answered, verdict.failed, verdict.lost),
            (false, 1, 1, 0)
        );
        assert_eq!(verdict.failures, ["a at 0.00 s after 1.00 s: status 502"]);
    }

    #[test]
    fn an_id_nobody_sent_is_suspect() {
        let verdict = judge(&[add("a", Outcome::Answered(201))], &ids(&["a", "ghost"]));
        assert_eq!((verdict.ok, verdict.unknown), (false, 1));
    }

    #[test]
    fn a_run_that_sent_nothing_proves_nothing() {
        assert!(!judge(&[], &[]).ok);
    }

    proptest! {
        /// Whatever is taken away from or added to a faithful store turns the verdict red, and is counted.
        #[test]
        fn a_spoiled_store_never_passes(acknowledged in 1_usize..200, at in any::<prop::sample::Index>(), lose in any::<bool>()) {
            let names: Vec<String> = (0..acknowledged).map(|number| format!("id-{number}")).collect();
            let records: Vec<Record> = names.iter().map(|name| add(name, Outcome::Answered(201))).collect();
            prop_assert!(judge(&records, &names).ok);
            let mut spoiled = names.clone();
            let place = at.index(names.len());
            if lose { spoiled.remove(place); } else { spoiled.push(names[place].clone()); }
            let verdict = judge(&records, &spoiled);
            prop_assert!(!verdict.ok);
            prop_assert_eq!((verdict.lost, verdict.doubled), (usize::from(lose), usize::from(!lose)));
        }

        /// Every request is either acknowledged or failed, whatever its outcome.
        #[test]
        fn every_request_is_counted_once(statuses in prop::collection::vec(prop::option::of(100_u16..600), 0..100)) {
            let outcome = |status: &Option<u16>| status.map_or(Outcome::Broken("reset".into()), Outcome::Answered);
            let records: Vec<Record> = statuses.iter().enumerate().map(|(n, status)| add(&format!("{n}"), outcome(status))).collect();
            let verdict = judge(&records, &[]);
            prop_assert_eq!(verdict.sent, records.len());
            prop_assert_eq!(verdict.failed + verdict.ids_acknowledged, verdict.sent);
            prop_assert_eq!(verdict.lost, verdict.ids_acknowledged);
        }
    }
}
