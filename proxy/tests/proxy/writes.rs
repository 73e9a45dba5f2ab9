//! The limit on writes: they are delayed and never refused, nothing else is, and whatever ends the limit ends every
//! delay with it.
//!
//! The interval is an hour wherever somebody is delayed: nobody's time comes by itself while a test runs.

use std::num::NonZeroU64;

use cutover_protocol::hold::{Answer, Claim, Command, Gate, Order, Refusal, ServiceStatus};
use cutover_protocol::id::{Epoch, Site};
use h2::Reason;

use crate::client2::Client2;
use crate::holding::{balanced, two_sites};
use crate::process::{run, text};
use crate::world::{Origin, Plan, Stage, World, done, hold, web};

const HOUR_US: u64 = 3_600_000_000;
const HOUR_MS: u64 = 3_600_000;

fn admit(epoch: Epoch, interval_us: u64, delay_ms_max: u64, lease_ms: u64) -> Command {
    Command::Admit {
        service: web(),
        epoch,
        interval_us: NonZeroU64::new(interval_us).unwrap(),
        delay_ms_max,
        lease_ms,
    }
}

fn freely(epoch: Epoch) -> Command {
    Command::AdmitFreely {
        service: web(),
        epoch,
    }
}

/// One write an hour.
fn limit(world: &World) -> ServiceStatus {
    done(
        world
            .control()
            .say(&admit(Epoch(1), HOUR_US, HOUR_MS, HOUR_MS)),
    )
}

fn lift(world: &World) {
    let status = done(world.control().say(&freely(Epoch(1))));
    assert_eq!(status.writes.limit, None);
}

fn until_delayed(world: &World, count: u64) -> ServiceStatus {
    world.until(|status| status.writes.delayed_now == count)
}

#[test]
fn the_first_write_passes_the_second_is_delayed_and_reads_go_by() {
    let (world, source, _target) = two_sites();
    let status = limit(&world);
    let in_force = status.writes.limit.unwrap();
    assert_eq!(
        (in_force.interval_us.get(), in_force.delay_ms_max),
        (HOUR_US, HOUR_MS)
    );
    assert!(in_force.lease_ms_left <= HOUR_MS && in_force.lease_ms_left > HOUR_MS / 2);
    let mut client = world.client();
    client.post("/1", "one");
    assert_eq!(client.message().body, "source POST /1 one");
    client.post("/2", "two");
    let status = until_delayed(&world, 1);
    assert_eq!((status.in_flight, status.held), (0, 0));
    let mut reader = world.client();
    for method in ["GET", "OPTIONS", "TRACE"] {
        reader.send(format!("{method} /r HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert_eq!(reader.message().body, format!("source {method} /r"));
    }
    assert_eq!(source.seen().len(), 4);
    lift(&world);
    assert_eq!(client.message().body, "source POST /2 two");
    client.post("/3", "three");
    assert_eq!(client.message().body, "source POST /3 three");
    let writes = world.status().writes;
    assert_eq!(
        (writes.admitted, writes.delayed, writes.delayed_now),
        (3, 1, 0)
    );
    balanced(&world);
}

#[test]
fn a_hold_takes_over_whoever_is_delayed_and_drains_at_once() {
    let (world, source, target) = two_sites();
    limit(&world);
    world.client().post("/1", "one").message();
    let mut client = world.client();
    client.post("/2", "two");
    let mut streams = Client2::connect(world.address());
    let stream = streams.post("/3", "three");
    until_delayed(&world, 2);
    let status = world.hold();
    assert_eq!((status.gate, status.writes.limit), (Gate::Holding, None));
    let status = world.until(|status| status.held_now == 2);
    assert_eq!(status.writes.delayed_now, 0);
    world.move_to(Site::Target);
    assert_eq!(client.message().body, "target POST /2 two");
    assert_eq!(streams.answer(stream).body, "target POST /3 three");
    assert_eq!(source.seen(), ["POST /1 one"]);
    assert_eq!(target.seen().len(), 2);
    assert_eq!(world.status().writes.admitted, 3);
    balanced(&world);
}

#[test]
fn a_write_whose_client_leaves_while_it_is_delayed_is_never_executed() {
    let (world, source, _target) = two_sites();
    limit(&world);
    world.client().post("/1", "one").message();
    let mut leaves = world.client();
    leaves.post("/left", "x");
    let mut unread = world.client();
    unread.send(format!(
        "POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 60000\r\n\r\n{}",
        "x".repeat(60_000)
    ));
    let mut client = Client2::connect(world.address());
    let mut reset = client.post("/reset", "x");
    let mut dies = Client2::connect(world.address());
    let dying = dies.post("/died", "x");
    until_delayed(&world, 4);
    drop(leaves);
    until_delayed(&world, 3);
    drop(unread);
    until_delayed(&world, 2);
    reset.body.send_reset(Reason::CANCEL);
    until_delayed(&world, 1);
    drop((dies, dying));
    until_delayed(&world, 0);
    lift(&world);
    let after = client.get("/after");
    assert_eq!(client.answer(after).status, 200);
    assert_eq!(source.seen(), ["POST /1 one", "GET /after"]);
    assert_eq!(world.status().writes.admitted, 1);
}

#[test]
fn streams_are_delayed_each_by_itself() {
    let (world, source, _target) = two_sites();
    limit(&world);
    let mut client = Client2::connect(world.address());
    let stream = client.post("/1", "one");
    assert_eq!(client.answer(stream).body, "source POST /1 one");
    let delayed = client.post("/2", "two");
    until_delayed(&world, 1);
    let read = client.get("/r");
    assert_eq!(client.answer(read).body, "source GET /r");
    assert_eq!(source.seen().len(), 2);
    lift(&world);
    assert_eq!(client.answer(delayed).body, "source POST /2 two");
}

#[test]
fn streams_of_http3_are_delayed_like_others() {
    let source = Origin::new("source");
    let world = Plan::new(source.address(), source.address()).start_http3();
    limit(&world.world);
    let mut client = world.client();
    let first = client.post("/1", "one");
    assert_eq!(client.answer(first).text(), "source POST /1 one");
    let delayed = client.post("/2", "two");
    until_delayed(&world.world, 1);
    let mut reset = client.post("/reset", "x");
    until_delayed(&world.world, 2);
    // Its request has ended: only the answer can still be refused.
    reset.stop_sending(h3::error::Code::H3_REQUEST_CANCELLED);
    until_delayed(&world.world, 1);
    lift(&world.world);
    assert_eq!(client.answer(delayed).text(), "source POST /2 two");
    assert_eq!(source.seen(), ["POST /1 one", "POST /2 two"]);
}

#[test]
fn a_limit_ends_with_its_lease() {
    let (world, _source, _target) = two_sites();
    limit(&world);
    let mut client = world.client();
    client.post("/1", "one").message();
    client.post("/2", "two");
    until_delayed(&world, 1);
    // Given again it has another lease, and delays whom it delayed.
    done(world.control().say(&admit(Epoch(1), HOUR_US, HOUR_MS, 50)));
    assert_eq!(client.message().body, "source POST /2 two");
    assert_eq!(world.status().writes.limit, None);
}

#[test]
fn nobody_is_delayed_for_longer_than_anybody_may() {
    let (world, source, _target) = two_sites();
    done(world.control().say(&admit(Epoch(1), HOUR_US, 20, HOUR_MS)));
    let mut client = world.client();
    for number in 1..=3 {
        client.post(&format!("/{number}"), "x");
        assert_eq!(client.message().status(), 200);
    }
    assert_eq!(source.seen().len(), 3);
    let writes = world.status().writes;
    assert_eq!((writes.admitted, writes.delayed), (3, 2));
}

#[test]
fn a_write_whose_own_deadline_passes_is_answered_then_and_never_executed() {
    let (world, source, _target) = two_sites();
    limit(&world);
    world.client().post("/1", "one").message();
    let mut client = world.client();
    client.send("POST /2 HTTP/1.1\r\nHost: h\r\nX-Request-Timeout: 1\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 504);
    assert_eq!(source.seen(), ["POST /1 one"]);
    assert_eq!(world.status().writes.delayed_now, 0);
}

#[test]
fn what_is_left_of_a_deadline_after_a_delay_is_told_to_the_upstream() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = Plan::new(source.address(), target.address()).start();
    done(world.control().say(&admit(Epoch(1), HOUR_US, 200, HOUR_MS)));
    let post =
        "POST / HTTP/1.1\r\nHost: h\r\nConnect-Timeout-Ms: 60000\r\nContent-Length: 0\r\n\r\n";
    let left = |client: &mut crate::world::Peer, upstream: &mut crate::world::Peer| {
        client.send(post);
        let head = upstream.message();
        upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(client.head().status(), 204);
        let left: u64 = head.field("Connect-Timeout-Ms").unwrap().parse().unwrap();
        left
    };
    let mut client = world.client();
    client.send(post);
    let mut upstream = source.accept();
    assert_eq!(
        upstream.message().field("Connect-Timeout-Ms"),
        Some("60000")
    );
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.head().status(), 204);
    let after_delay = left(&mut client, &mut upstream);
    // The delay of 200 ms is taken off; a machine that stands still takes off more.
    assert!((1..=59_900).contains(&after_delay), "{after_delay}");
}

#[test]
fn a_limit_is_held_to_the_rules_of_epochs_and_holders() {
    let (world, _source, _target) = two_sites();
    let mut control = world.control();
    let mut say = |claim: &Claim, command: Command| {
        control.order(&Order {
            claim: claim.clone(),
            command,
        })
    };
    let (ours, other) = (
        Claim::Holder("hop-1".parse().unwrap()),
        Claim::Holder("hop-2".parse().unwrap()),
    );
    let limit = |epoch| admit(epoch, HOUR_US, HOUR_MS, HOUR_MS);
    assert_eq!(refusal(say(&ours, limit(Epoch(2)))), Refusal::WrongEpoch);
    for _ in 0..2 {
        let status = done(say(&ours, limit(Epoch(1))));
        let holder = status.writes.limit.unwrap().holder.unwrap();
        assert_eq!(holder.as_str(), "hop-1");
    }
    for claim in [&other, &Claim::Nobody] {
        assert_eq!(refusal(say(claim, limit(Epoch(1)))), Refusal::HeldByOther);
        assert_eq!(refusal(say(claim, freely(Epoch(1)))), Refusal::HeldByOther);
    }
    assert_eq!(refusal(say(&ours, freely(Epoch(2)))), Refusal::WrongEpoch);
    for _ in 0..2 {
        done(say(&ours, freely(Epoch(1))));
    }
    // What is gone needs no epoch, and is nobody's.
    done(say(&other, freely(Epoch(7))));
    done(say(&ours, limit(Epoch(1))));
    done(say(&Claim::Force, limit(Epoch(1))));
    assert_eq!(world.status().writes.limit.unwrap().holder, None);
    // A hold does not ask whose the limit was, and there is none beside it.
    done(say(&other, hold(Epoch(1), 60_000, 20_000)));
    assert_eq!(world.status().writes.limit, None);
    assert_eq!(refusal(say(&other, limit(Epoch(1)))), Refusal::Holding);
    assert_eq!(refusal(say(&ours, limit(Epoch(1)))), Refusal::HeldByOther);
    done(say(&ours, freely(Epoch(1))));
}

#[test]
fn a_limit_ends_with_its_epoch() {
    let (world, _source, _target) = two_sites();
    limit(&world);
    let mut client = world.client();
    client.post("/1", "one").message();
    client.post("/2", "two");
    until_delayed(&world, 1);
    // An abort needs no hold: it only keeps a commit of the epoch before from winning.
    done(world.control().say(&Command::Abort {
        service: web(),
        epoch: Epoch(1),
    }));
    assert_eq!(client.message().body, "source POST /2 two");
    assert_eq!(world.status().writes.limit, None);
}

#[test]
fn while_a_release_goes_on_writes_queue_behind_the_held_and_are_not_delayed() {
    let (source, target) = (Origin::new("source"), Stage::new());
    let world = Plan::new(source.address(), target.address()).start();
    world.hold();
    let mut held = world.client();
    held.post("/held", "x");
    world.until_held(1);
    world.move_to(Site::Target);
    let mut canary = target.accept();
    assert_eq!(canary.message().first_line, "POST /held HTTP/1.1");
    let limited = admit(Epoch(2), HOUR_US, HOUR_MS, HOUR_MS);
    done(world.control().say(&limited));
    let mut clients = [world.client(), world.client()];
    for client in &mut clients {
        client.post("/new", "x");
    }
    world.until_held(2);
    canary.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    for _ in 0..2 {
        let mut upstream = target.accept();
        assert_eq!(upstream.message().first_line, "POST /new HTTP/1.1");
        upstream.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    }
    let status = world.until(|status| status.gate == Gate::Open);
    assert_eq!((status.writes.delayed, status.writes.admitted), (0, 3));
    // From here on it counts.
    let mut client = world.client();
    client.post("/first", "x");
    let mut upstream = target.accept();
    upstream.message();
    upstream.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    assert_eq!(client.head().status(), 204);
    client.post("/second", "x");
    until_delayed(&world, 1);
    balanced(&world);
}

#[test]
fn raw_connections_are_not_delayed() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = Plan::new(source.address(), target.address()).tcp().start();
    limit(&world);
    for _ in 0..2 {
        let mut client = world.client();
        client.send("POST / HTTP/1.1\r\n");
        assert_eq!(source.accept().line(), "POST / HTTP/1.1");
    }
    assert!(world.status().writes.limit.is_some());
    assert_eq!(world.status().writes.delayed, 0);
}

#[test]
fn the_limit_is_told_by_metrics_and_to_people() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .start();
    world.client().get("/").message();
    assert!(!shown(&world).contains("writes"));
    limit(&world);
    let mut clients = [world.client(), world.client()];
    clients[0].post("/1", "x").message();
    clients[1].post("/2", "x");
    until_delayed(&world, 1);
    let metrics = world.metrics();
    for line in [
        "hopgate_writes_admitted_total{service=\"web\"} 1\n",
        "hopgate_writes_delayed_total{service=\"web\"} 1\n",
        "hopgate_writes_delayed_now{service=\"web\"} 1\n",
        "hopgate_write_interval_us{service=\"web\"} 3600000000\n",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    let shown = shown(&world);
    for line in [
        "writes admitted 1, delayed 1, delayed now 1\n",
        "limited to one every 3600000000 us, delayed for 3600000 ms at most, lease 3",
    ] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
}

fn shown(world: &World) -> String {
    let status = ["ctl", "--socket", "control.sock", "status", "web"];
    text(&run(&world.folder, &status).stdout)
}

fn refusal(answer: Answer) -> Refusal {
    match answer {
        Answer::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}
