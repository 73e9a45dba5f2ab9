//! The text of every line that leaves this crate: what commands a gate, what it answers, and what a journal keeps.
//! A line that changes breaks a proxy of another version, or a hop that was left unfinished by one.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "lines/writes.rs"]
mod writes;

use cutover_protocol::hold::{
    Answer, AtCut, CheckStatus, Claim, Command, EjectedStatus, Expected, Gate, InFlight,
    InFlightPhase, Order, Refusal, ServerState, ServerStatus, ServiceStatus, WritesStatus,
};
use cutover_protocol::hop::{ActionName, Bounds, Costs, Ending, Event, Failure, Link, Round, Undo};
use cutover_protocol::id::{Epoch, Register, ServiceName, Site};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{from_str, to_string};

fn web() -> ServiceName {
    "web".parse().unwrap()
}

fn target_won() -> Register {
    Register {
        epoch: Epoch(8),
        owner: Site::Target,
    }
}

fn status() -> ServiceStatus {
    ServiceStatus {
        service: web(),
        register: target_won(),
        gate: Gate::Holding,
        lease_ms_left: None,
        holder: None,
        held_since: None,
        hold_ms_max: None,
        front_timeout_ms: None,
        in_flight: 1,
        upstream_connections: 2,
        carried: 0,
        held_now: 3,
        held: 18,
        released: 4,
        gave_up: 5,
        evicted: 6,
        front_checks_answered: 0,
        writes: WritesStatus::default(),
        budget: None,
        servers: Vec::new(),
    }
}

const STATUS: &str = r#"{"service":"web","register":{"epoch":8,"owner":"target"},"gate":"holding","in_flight":1,"upstream_connections":2,"held_now":3,"held":18,"released":4,"gave_up":5,"evicted":6}"#;

/// Written, it is exactly this text; the text read is the value again.
fn assert_line<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    value: &T,
    text: &str,
) {
    assert_eq!(to_string(value).unwrap(), text);
    assert_eq!(&from_str::<T>(text).unwrap(), value, "{text}");
}

#[test]
fn every_command_is_this_line() {
    let (service, epoch) = (web(), Epoch(7));
    let named = Command::Status {
        service: Some(web()),
    };
    assert_line(
        &Command::Status { service: None },
        r#"{"command":"status"}"#,
    );
    assert_line(&named, r#"{"command":"status","service":"web"}"#);
    let hold = Command::Hold {
        service: service.clone(),
        epoch,
        lease_ms: 10_000,
        drain_ms_max: 5000,
    };
    assert_line(
        &hold,
        r#"{"command":"hold","service":"web","epoch":7,"lease_ms":10000,"drain_ms_max":5000}"#,
    );
    let renew = Command::Renew {
        service: service.clone(),
        epoch,
        lease_ms: 10_000,
    };
    assert_line(
        &renew,
        r#"{"command":"renew","service":"web","epoch":7,"lease_ms":10000}"#,
    );
    let commit = Command::Commit {
        service: service.clone(),
        epoch,
        to: Site::Target,
    };
    assert_line(
        &commit,
        r#"{"command":"commit","service":"web","epoch":7,"to":"target"}"#,
    );
    let abort = Command::Abort {
        service: service.clone(),
        epoch,
    };
    assert_line(&abort, r#"{"command":"abort","service":"web","epoch":7}"#);
    let release = Command::Release {
        service,
        epoch: Epoch(8),
        to: Site::Source,
    };
    assert_line(
        &release,
        r#"{"command":"release","service":"web","epoch":8,"to":"source"}"#,
    );
}

#[test]
fn every_command_for_several_services_is_this_line() {
    let expected = |service: &str, epoch| Expected {
        service: service.parse().unwrap(),
        epoch: Epoch(epoch),
    };
    let services = || vec![expected("web", 7), expected("db", 3)];
    let text = r#"[{"service":"web","epoch":7},{"service":"db","epoch":3}]"#;
    let to = Site::Target;
    let hold = Command::HoldAll {
        services: services(),
        lease_ms: 10_000,
        drain_ms_max: 5000,
    };
    assert_line(
        &hold,
        &format!(
            r#"{{"command":"hold_all","services":{text},"lease_ms":10000,"drain_ms_max":5000}}"#
        ),
    );
    let services = services();
    for (command, word, more) in [
        (
            Command::CommitAll {
                services: services.clone(),
                to,
            },
            "commit_all",
            r#","to":"target""#,
        ),
        (
            Command::AbortAll {
                services: services.clone(),
            },
            "abort_all",
            "",
        ),
        (
            Command::ReleaseAll { services, to },
            "release_all",
            r#","to":"target""#,
        ),
    ] {
        let line = format!(r#"{{"command":"{word}","services":{text}{more}}}"#);
        assert_line(&command, &line);
    }
}

#[test]
fn a_command_in_nobodys_name_is_the_command_alone() {
    let order = |claim| Order {
        claim,
        command: Command::Abort {
            service: web(),
            epoch: Epoch(7),
        },
    };
    let rest = r#""command":"abort","service":"web","epoch":7}"#;
    assert_line(&order(Claim::Nobody), &format!("{{{rest}"));
    let holder = Claim::Holder("hop-1".parse().unwrap());
    assert_line(
        &order(holder),
        &format!(r#"{{"claim":{{"holder":"hop-1"}},{rest}"#),
    );
    assert_line(
        &order(Claim::Force),
        &format!(r#"{{"claim":"force",{rest}"#),
    );
}

#[test]
fn every_answer_is_this_line() {
    let services = vec![status()];
    assert_line(
        &Answer::Status { services },
        &format!(r#"{{"answer":"status","services":[{STATUS}]}}"#),
    );
    let done = Answer::Done { service: status() };
    assert_line(&done, &format!(r#"{{"answer":"done","service":{STATUS}}}"#));
    let left = vec![InFlight {
        client: "198.51.100.7:4000".to_owned(),
        what: "GET /slow".to_owned(),
        age_ms: 4999,
        id: Some("1-2".to_owned()),
        route: Some("api".to_owned()),
        server: Some("10.0.0.1:80".to_owned()),
        phase: InFlightPhase::Waiting,
        sent_bytes: 5,
        answered_bytes: 6,
        at_cut: AtCut::Cut,
        waits_for: vec!["10.0.0.1:4000".to_owned()],
    }];
    let not_drained = Answer::NotDrained {
        service: status(),
        left,
    };
    assert_line(
        &not_drained,
        &format!(
            r#"{{"answer":"not_drained","service":{STATUS},"left":[{{"client":"198.51.100.7:4000","what":"GET /slow","age_ms":4999,"id":"1-2","route":"api","server":"10.0.0.1:80","phase":"waiting","sent_bytes":5,"answered_bytes":6,"at_cut":"cut","waits_for":["10.0.0.1:4000"]}}]}}"#
        ),
    );
    let refused = |register| Answer::Refused {
        reason: Refusal::WrongEpoch,
        message: "read the status".to_owned(),
        register,
    };
    assert_line(
        &refused(Some(target_won())),
        r#"{"answer":"refused","reason":"wrong_epoch","message":"read the status","register":{"epoch":8,"owner":"target"}}"#,
    );
    assert_line(
        &refused(None),
        r#"{"answer":"refused","reason":"wrong_epoch","message":"read the status"}"#,
    );
    let services = vec![status()];
    assert_line(
        &Answer::DoneAll { services },
        &format!(r#"{{"answer":"done_all","services":[{STATUS}]}}"#),
    );
    let refused_all = Answer::RefusedAll {
        service: "db".parse().unwrap(),
        reason: Refusal::NotDrained,
        message: "db did not drain".to_owned(),
        left: Vec::new(),
        services: vec![status()],
    };
    assert_line(
        &refused_all,
        &format!(
            r#"{{"answer":"refused_all","service":"db","reason":"not_drained","message":"db did not drain","services":[{STATUS}]}}"#
        ),
    );
}

#[test]
fn every_word_of_an_answer_is_spelled_so() {
    for (reason, word) in [
        (Refusal::UnknownService, "unknown_service"),
        (Refusal::WrongEpoch, "wrong_epoch"),
        (Refusal::WrongOwner, "wrong_owner"),
        (Refusal::NotHolding, "not_holding"),
        (Refusal::Holding, "holding"),
        (Refusal::HeldByOther, "held_by_other"),
        (Refusal::NotDrained, "not_drained"),
        (Refusal::NotDurable, "not_durable"),
        (Refusal::BadCommand, "bad_command"),
    ] {
        assert_line(&reason, &format!("{word:?}"));
    }
    for (gate, word) in [
        (Gate::Open, "open"),
        (Gate::Draining, "draining"),
        (Gate::Holding, "holding"),
        (Gate::Releasing, "releasing"),
    ] {
        assert_line(&gate, &format!("{word:?}"));
    }
    assert_line(&Ending::Committed, r#""committed""#);
    assert_line(&Ending::Undone, r#""undone""#);
}

#[test]
fn a_lease_is_told_only_while_there_is_one() {
    let held = ServiceStatus {
        lease_ms_left: Some(9),
        ..status()
    };
    let text = STATUS.replace(
        r#""gate":"holding","#,
        r#""gate":"holding","lease_ms_left":9,"#,
    );
    assert_line(&held, &text);
}

#[test]
fn a_hold_is_told_with_its_holder_and_its_beginning() {
    let held = ServiceStatus {
        holder: Some("hop-1".parse().unwrap()),
        held_since: Some(Epoch(7)),
        ..status()
    };
    let text = STATUS.replace(
        r#""gate":"holding","#,
        r#""gate":"holding","holder":"hop-1","held_since":7,"#,
    );
    assert_line(&held, &text);
    assert!(!held.is_undecided());
    let undecided = ServiceStatus {
        held_since: Some(target_won().epoch),
        ..status()
    };
    assert!(undecided.is_undecided());
    assert!(!status().is_undecided());
}

#[test]
fn servers_are_told_with_their_last_check() {
    let server = ServerStatus {
        site: Site::Source,
        group: "web-source".to_owned(),
        address: "10.0.0.1:80".to_owned(),
        state: ServerState::SlowStart,
        weight: 1,
        weight_percent: Some(40),
        backup: false,
        ejected: None,
        active: 2,
        connections: 8,
        requests: 3,
        connect_errors: 4,
        server_errors: 5,
        broken: 6,
        check: Some(CheckStatus {
            good: true,
            reason: "status 200".to_owned(),
            age_ms: 7,
        }),
    };
    assert_line(
        &server,
        r#"{"site":"source","group":"web-source","address":"10.0.0.1:80","state":"slow_start","weight":1,"backup":false,"weight_percent":40,"active":2,"connections":8,"requests":3,"connect_errors":4,"server_errors":5,"broken":6,"check":{"good":true,"reason":"status 200","age_ms":7}}"#,
    );
    let spared = ServerStatus {
        weight_percent: None,
        ejected: Some(EjectedStatus {
            reason: "3 connections failed in a row".to_owned(),
            ms_left: 9,
        }),
        ..server
    };
    let text = to_string(&spared).unwrap();
    assert_line(&spared, &text);
    assert!(text.contains(
        r#""backup":false,"ejected":{"reason":"3 connections failed in a row","ms_left":9},"active":2"#
    ));
    let whole = ServiceStatus {
        servers: vec![ServerStatus {
            check: None,
            ..spared
        }],
        ..status()
    };
    let text = to_string(&whole).unwrap();
    assert_line(&whole, &text);
    assert!(text.contains(r#""servers":[{"site":"source""#));
}

#[test]
fn a_command_with_a_word_too_many_or_too_few_is_refused() {
    for (line, complaint) in [
        (
            r#"{"command":"abort","service":"web","epoch":7,"force":true}"#,
            "unknown field `force`",
        ),
        (
            r#"{"command":"status","service":"web","epoch":7}"#,
            "unknown field `epoch`",
        ),
        (
            r#"{"command":"commit","service":"web","to":"target"}"#,
            "missing field `epoch`",
        ),
        (
            r#"{"command":"commit","service":"web","epoch":7,"to":"Target"}"#,
            "unknown variant `Target`",
        ),
        (
            r#"{"command":"abort","service":"../web","epoch":7}"#,
            "the name \"../web\" is not usable",
        ),
        (
            r#"{"command":"abort","service":"web","epoch":-1}"#,
            "invalid value",
        ),
        (r#"{"command":"reopen"}"#, "unknown variant `reopen`"),
        (r#"{"service":"web"}"#, "missing field `command`"),
    ] {
        let error = from_str::<Command>(line).unwrap_err().to_string();
        assert!(error.contains(complaint), "{line}: {error}");
        let error = from_str::<Order>(line).unwrap_err().to_string();
        assert!(error.contains(complaint), "{line}: {error}");
    }
}

#[test]
fn every_event_is_this_line_of_a_journal() {
    assert_line(
        &Event::Begun { epoch: Epoch(7) },
        r#"{"event":"begun","epoch":7}"#,
    );
    let failure = Failure::new("no\nroute  to\r\n host");
    let action = ActionName::Transfer;
    assert_line(
        &Event::Failed { action, failure },
        r#"{"event":"failed","action":"Transfer","failure":"no route to host"}"#,
    );
    let link = Link {
        rtt_ms: 20.5,
        bytes_per_second: 1e8,
    };
    assert_line(
        &Event::Measured { link },
        r#"{"event":"measured","link":{"rtt_ms":20.5,"bytes_per_second":100000000.0}}"#,
    );
    let round = Round {
        pages: 3,
        bytes: 12_288,
        seconds: 0.25,
        resident_bytes: 0,
    };
    assert_line(
        &Event::PreCopied { round },
        r#"{"event":"pre_copied","round":{"pages":3,"bytes":12288,"seconds":0.25}}"#,
    );
    let register = target_won();
    assert_line(
        &Event::Committed { register },
        r#"{"event":"committed","register":{"epoch":8,"owner":"target"}}"#,
    );
    assert_line(
        &Event::Settled { register },
        r#"{"event":"settled","register":{"epoch":8,"owner":"target"}}"#,
    );
    assert_line(&Event::AbortAsked, r#"{"event":"abort_asked"}"#);
    assert_line(&Event::Restarted, r#"{"event":"restarted"}"#);
}

#[test]
fn every_action_a_journal_can_name_is_spelled_so() {
    for (action, word) in ActionName::ALL.into_iter().zip([
        "Preflight",
        "OpenTunnel",
        "SyncFiles",
        "PreCopy",
        "Hold",
        "Checkpoint",
        "Transfer",
        "Restore",
        "Verify",
        "Commit",
        "Settle",
        "Redirect",
        "Undo",
    ]) {
        assert_line(
            &Event::Done { action },
            &format!(r#"{{"event":"done","action":"{word}"}}"#),
        );
    }
    for (undo, word) in
        Undo::ALL
            .into_iter()
            .zip(["CloseTunnel", "DropStaging", "Reopen", "Thaw", "KillTarget"])
    {
        assert_line(&undo, &format!("{word:?}"));
    }
    let bounds = Bounds {
        rounds_max: 4,
        stall_ms_max: 2000,
        throttle_percent_max: 0,
        costs: Costs::default(),
    };
    assert_line(&bounds, r#"{"rounds_max":4,"stall_ms_max":2000}"#);
    let slowed = Bounds {
        throttle_percent_max: 50,
        ..bounds
    };
    assert_line(
        &slowed,
        r#"{"rounds_max":4,"stall_ms_max":2000,"throttle_percent_max":50}"#,
    );
}

/// An event as a journal keeps it, beside the time.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    at_ms: u64,
    #[serde(flatten)]
    event: Event,
}

fn any_register() -> impl Strategy<Value = Register> {
    (any::<u64>(), any::<bool>()).prop_map(|(epoch, is_source)| Register {
        epoch: Epoch(epoch),
        owner: if is_source {
            Site::Source
        } else {
            Site::Target
        },
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    let amount = 0.0..1e12_f64;
    let action = prop::sample::select(ActionName::ALL.as_slice());
    prop_oneof![
        any::<u64>().prop_map(|epoch| Event::Begun {
            epoch: Epoch(epoch)
        }),
        action.clone().prop_map(|action| Event::Done { action }),
        (action, ".*").prop_map(|(action, text)| Event::Failed {
            action,
            failure: Failure::new(&text)
        }),
        (amount.clone(), amount.clone()).prop_map(|(rtt_ms, bytes_per_second)| Event::Measured {
            link: Link {
                rtt_ms,
                bytes_per_second
            }
        }),
        (any::<u64>(), any::<u64>(), amount).prop_map(|(pages, bytes, seconds)| {
            Event::PreCopied {
                round: Round {
                    pages,
                    bytes,
                    seconds,
                    resident_bytes: pages / 2,
                },
            }
        }),
        any_register().prop_map(|register| Event::Committed { register }),
        any_register().prop_map(|register| Event::Settled { register }),
        Just(Event::AbortAsked),
        Just(Event::Restarted),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    /// A fold takes the same turns as the driver that died only when not one bit of a measurement is lost.
    #[test]
    fn an_event_comes_back_from_its_journal_to_the_last_bit(event in any_event(), at_ms in any::<u64>()) {
        let entry = Entry { at_ms, event };
        let line = to_string(&entry).unwrap();
        prop_assert!(!line.contains('\n'));
        prop_assert_eq!(from_str::<Entry>(&line).unwrap(), entry);
    }
}

#[test]
fn a_stall_that_comes_close_to_a_timeout_in_front_is_warned_of() {
    let patient = ServiceStatus {
        hold_ms_max: Some(60_000),
        front_timeout_ms: Some(10_000),
        ..status()
    };
    assert_eq!(patient.stall_warnings(8_000), Vec::<String>::new());
    assert_eq!(
        patient.stall_warnings(8_001),
        [
            "web: a stall of 8001 ms passes 0.8 of front_timeout_ms = 10000; clients may see a timeout of what stands in front of the proxy: raise that, or make the stall shorter"
        ]
    );
    assert_eq!(patient.stall_warnings(60_001).len(), 2);
    assert_eq!(status().stall_warnings(u64::MAX), Vec::<String>::new());
}
