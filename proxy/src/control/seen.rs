//! What a person may look at while things happen: who is held, what a hold would cost, what goes on. Nothing here
//! changes anything. The words come by the control socket, a JSON line each way; `watch` is answered with many.

use cutover_protocol::hold::{Gate, InFlight, Tier};
use cutover_protocol::id::{Register, ServiceName};
use serde::{Deserialize, Serialize};

/// Longest time that live traffic is watched for a forecast, in milliseconds.
pub const FORECAST_MS_MAX: u64 = 3_600_000;

/// One thing to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Look {
    /// Who is held.
    Held {
        /// Only for this service when given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service: Option<ServiceName>,
    },
    /// Watch live traffic and say what a hold of that length would have cost.
    Forecast {
        /// The service.
        service: ServiceName,
        /// How long, in milliseconds; [`FORECAST_MS_MAX`] at most.
        duration_ms: u64,
    },
    /// Tell every [`Event`] from now on, a line each, for as long as the connection lasts.
    Watch,
}

/// What is seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Seen {
    /// Answer to `held`.
    Held {
        /// In the order of the configuration.
        services: Vec<HeldTable>,
    },
    /// Answer to `forecast`.
    Forecast(Box<Forecast>),
    /// First answer to `watch`.
    Watching,
    /// Nothing to be seen.
    Refused {
        /// Why, and what to do.
        message: String,
    },
}

/// Who is held at a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldTable {
    /// The service.
    pub service: ServiceName,
    /// How many.
    pub held_now: u64,
    /// Addresses they come from.
    pub addresses: u64,
    /// Those who wait longest, the longest first; twenty at most.
    pub oldest: Vec<HeldEntry>,
    /// Those who came last, the last first; twenty at most.
    pub newest: Vec<HeldEntry>,
    /// Routes with most of the held, twenty at most; `-` stands for none.
    pub by_route: Vec<Share>,
    /// Client addresses with most of the held, twenty at most.
    pub by_address: Vec<Share>,
}

/// One held request or raw connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldEntry {
    /// The client's address.
    pub client: String,
    /// Method and path, or `tcp`.
    pub what: String,
    /// The route it takes, if it takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Since its arrival, in milliseconds.
    pub age_ms: u64,
    /// Until we answer it ourselves if the hold goes on, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<u64>,
    /// Why then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_by: Option<EndsBy>,
}

/// What ends somebody's time among the held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndsBy {
    /// The limit of its service or its route.
    Limit,
    /// Its client's own deadline.
    Deadline,
}

impl EndsBy {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Deadline => "deadline",
        }
    }
}

/// How many belong to one of several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Whose.
    pub name: String,
    /// How many.
    pub count: u64,
}

/// What a hold would have cost, had it begun when the watching did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// The service.
    pub service: ServiceName,
    /// How long its traffic was watched, in milliseconds.
    pub duration_ms: u64,
    /// Requests and raw connections that came in that time.
    pub arrived: u64,
    /// Of them, how many would be held at the end: one for each connection whose client waits for its answer before
    /// it asks again, and every stream of the connections that carry several.
    pub held: u64,
    /// Client connections they came by.
    pub connections: u64,
    /// Bytes of their heads that the proxy would keep.
    pub head_bytes: u64,
    /// Client addresses with most of what would be held, ten at most.
    pub by_address: Vec<Share>,
    /// Of those held, how many would have given up themselves by then, as they say in their heads: they would be
    /// answered by us, and not executed.
    #[serde(default)]
    pub out_of_time: u64,
    /// Memory that they would keep, by our own count; of connections whose protocol is not known, in clear.
    #[serde(default)]
    pub held_bytes: u64,
    /// What the budget of the held would make of that.
    #[serde(default)]
    pub tier: Tier,
    /// Limits that such a hold would meet; empty if it would meet none.
    pub limits: Vec<LimitMet>,
    /// What was in flight at the end and older than the time watched: it would not have drained within it. Oldest
    /// first, a hundred at most.
    pub undrained: Vec<InFlight>,
    /// How many of those there were.
    pub undrained_count: u64,
}

/// A limit that a hold would meet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitMet {
    /// Its key in the configuration.
    pub limit: String,
    /// Its value.
    pub most: u64,
    /// What it would be confronted with, in the same unit.
    pub wanted: u64,
    /// Who meets it, where that is somebody in particular.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// A gate or its register has changed. The end of a release may be told together with what came after it.
    Gate {
        /// The service.
        service: ServiceName,
        /// What the gate does now; `draining` and `holding` are told apart by `counts`.
        gate: Gate,
        /// The register now.
        register: Register,
    },
    /// Numbers have changed while a gate was not open; told a few times a second at most.
    Counts {
        /// The service.
        service: ServiceName,
        /// In flight now.
        in_flight: u64,
        /// Held now.
        held_now: u64,
        /// Ever held. `held = released + gave_up + evicted + held_now`.
        held: u64,
        /// Held and then let through.
        released: u64,
        /// Held, and the client left.
        gave_up: u64,
        /// Held, and refused by us.
        evicted: u64,
    },
    /// A lease has run out, and the gate opens to the owner.
    LeaseRanOut {
        /// The service.
        service: ServiceName,
        /// The register then.
        register: Register,
    },
    /// Somebody commanded something.
    Command {
        /// The user, as the kernel tells it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uid: Option<u32>,
        /// The process.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
        /// The name of its program.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        comm: Option<String>,
        /// The line, as it was understood.
        command: String,
        /// What came of it, or `begun`.
        outcome: String,
    },
    /// The watcher was too slow: so many events are not told.
    Missed {
        /// How many.
        count: u64,
    },
}

impl Look {
    /// Whether a line is meant to be one of these.
    pub(crate) fn is_meant_by(line: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Word {
            command: String,
        }
        const WORDS: [&str; 3] = ["held", "forecast", "watch"];
        serde_json::from_slice::<Word>(line)
            .is_ok_and(|word| WORDS.contains(&word.command.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use cutover_protocol::id::{Epoch, Site};

    use super::*;

    #[test]
    fn what_is_asked_and_told_is_spelled_so() {
        let held = serde_json::to_string(&Look::Held { service: None }).unwrap();
        assert_eq!(held, r#"{"command":"held"}"#);
        let forecast = Look::Forecast {
            service: "web".parse().unwrap(),
            duration_ms: 9,
        };
        let text = r#"{"command":"forecast","service":"web","duration_ms":9}"#;
        assert_eq!(serde_json::to_string(&forecast).unwrap(), text);
        assert!(Look::is_meant_by(text.as_bytes()));
        assert!(!Look::is_meant_by(br#"{"command":"status"}"#));
        let event = Event {
            at_ms: 1,
            what: Happening::Gate {
                service: "web".parse().unwrap(),
                gate: Gate::Holding,
                register: Register {
                    epoch: Epoch(7),
                    owner: Site::Source,
                },
            },
        };
        let text = r#"{"at_ms":1,"event":"gate","service":"web","gate":"holding","register":{"epoch":7,"owner":"source"}}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), text);
        let missed = Event {
            at_ms: 2,
            what: Happening::Missed { count: 3 },
        };
        let text = r#"{"at_ms":2,"event":"missed","count":3}"#;
        assert_eq!(serde_json::to_string(&missed).unwrap(), text);
        assert_eq!(serde_json::from_str::<Event>(text).unwrap(), missed);
    }
}
