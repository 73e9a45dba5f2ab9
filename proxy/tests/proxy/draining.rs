//! The drain and its honesty: who is waited for, who is cut or carried, who passes because the application itself
//! asks, and what is written down of those whose outcome nobody can know.

use std::thread;

use cutover_protocol::hold::{Answer, AtCut, Gate, InFlight, InFlightPhase};
use cutover_protocol::id::{Epoch, Site};
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand};
use hopgate_proxy::ledger::{Entry, Why};

use crate::world::{Nobody, PATIENCE, Peer, Plan, Stage, World, done, hold};

fn world(source: &Stage, service: &str, limits: &str) -> World {
    Plan::new(source.address(), Nobody::new().address())
        .service(service)
        .limits(limits)
        .start()
}

/// What a hold with hardly any patience finds left.
fn left(world: &World) -> Vec<InFlight> {
    match world.control().say(&hold(Epoch(1), 60_000, 1)) {
        Answer::NotDrained { left, .. } => left,
        other => panic!("{other:?}"),
    }
}

/// The ledger, once it has an entry.
fn ledger(world: &World) -> Vec<Entry> {
    let since = std::time::Instant::now();
    loop {
        let answer = world
            .control()
            .process(&ProcessCommand::Ledger { count: 100 });
        let ProcessAnswer::Ledger { entries } = answer else {
            panic!("{answer:?}");
        };
        if !entries.is_empty() {
            return entries;
        }
        assert!(since.elapsed() < PATIENCE, "nothing was entered");
        thread::yield_now();
    }
}

fn busy(world: &World, source: &Stage, text: &str) -> (Peer, Peer) {
    let mut client = world.client();
    client.send(text);
    let mut upstream = source.accept();
    upstream.message();
    (client, upstream)
}

#[test]
fn what_is_left_is_told_with_everything_one_has_to_know() {
    let source = Stage::new();
    let world = world(
        &source,
        "[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"",
        "",
    );
    let (mut client, mut upstream) =
        busy(&world, &source, "GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n");
    let told = left(&world);
    assert_eq!(told.len(), 1, "{told:?}");
    let waits = &told[0];
    assert_eq!(
        (
            waits.what.as_str(),
            waits.route.as_deref(),
            waits.phase,
            waits.at_cut
        ),
        (
            "GET /api/x",
            Some("api"),
            InFlightPhase::Waiting,
            AtCut::Wait
        )
    );
    assert_eq!(waits.server, Some(source.address().to_string()));
    assert!(
        waits.id.is_some() && waits.sent_bytes > 0 && waits.answered_bytes == 0,
        "{waits:?}"
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot yet");
    client.head();
    assert_eq!(client.bytes(7), b"not yet");
    let told = left(&world);
    assert_eq!(told[0].phase, InFlightPhase::Answering);
    assert!(told[0].answered_bytes > 7, "{told:?}");
    upstream.send("ok");
    assert_eq!(client.bytes(2), b"ok");
}

#[test]
fn a_request_that_may_be_cut_is_told_its_number_and_entered_in_the_ledger() {
    let source = Stage::new();
    let world = world(&source, "at_cut = \"cut\"", "upstream_close_ms_max = 50");
    let (mut client, _upstream) = busy(
        &world,
        &source,
        "POST /pay HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx",
    );
    let drained = done(world.control().say(&hold(Epoch(1), 60_000, 1)));
    assert_eq!((drained.gate, drained.in_flight), (Gate::Holding, 0));
    let answer = client.message();
    let id = answer.field("X-Request-Id").unwrap().to_owned();
    assert_eq!(answer.status(), 504);
    assert!(answer.body.contains(&id), "{}", answer.body);
    let entries = ledger(&world);
    assert_eq!(entries.len(), 1);
    let entry = &entries[0];
    assert_eq!((entry.id.as_str(), entry.why), (id.as_str(), Why::Cut));
    assert_eq!(
        (entry.request.as_str(), entry.epoch, entry.site),
        ("POST /pay", Epoch(1), Site::Source)
    );
}

#[test]
fn a_raw_connection_that_may_be_cut_is() {
    let source = Stage::new();
    let world = Plan::new(source.address(), Nobody::new().address())
        .tcp()
        .service("at_cut = \"cut\"")
        .limits("upstream_close_ms_max = 50")
        .start();
    let mut client = world.client();
    let mut upstream = source.accept();
    client.send("INSERT\n");
    assert_eq!(upstream.line(), "INSERT");
    done(world.control().say(&hold(Epoch(1), 60_000, 1)));
    assert!(client.is_closed() && upstream.is_closed());
    assert_eq!(ledger(&world)[0].request, "tcp");
}

#[test]
fn what_is_carried_is_not_waited_for_and_goes_on_through_the_hop() {
    let source = Stage::new();
    let world = world(
        &source,
        "[[service.route]]\nname = \"live\"\npath_prefix = \"/live\"\nat_cut = \"carry\"",
        "",
    );
    let (mut client, mut upstream) = busy(
        &world,
        &source,
        "GET /live HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    upstream.send(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    );
    assert_eq!(client.head().status(), 101);
    let drained = world.hold();
    assert_eq!(
        (
            drained.gate,
            drained.in_flight,
            drained.upstream_connections,
            drained.carried
        ),
        (Gate::Holding, 0, 0, 1)
    );
    world.move_to(Site::Target);
    client.send("still\n");
    assert_eq!(upstream.line(), "still");
    upstream.send("here\n");
    assert_eq!(client.line(), "here");
    drop((client, upstream));
}

#[test]
fn a_connection_that_served_a_carried_request_is_closed_by_the_hold() {
    let source = crate::world::Origin::new("source");
    let world = Plan::new(source.address(), Nobody::new().address())
        .service("at_cut = \"carry\"")
        .start();
    assert_eq!(world.client().get("/").message().status(), 200);
    assert_eq!(world.hold().upstream_connections, 0);
}

#[test]
fn an_answer_that_came_too_late_is_waited_for_all_the_same() {
    let source = Stage::new();
    let world = world(&source, "", "response_ms_max = 50");
    let (mut client, mut upstream) = busy(&world, &source, "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(client.message().status(), 504);
    let told = left(&world);
    assert_eq!(
        (told[0].what.as_str(), told[0].phase),
        ("GET /slow", InFlightPhase::Abandoned)
    );
    assert_eq!(ledger(&world)[0].why, Why::TimedOut);
    let mut control = world.control();
    let drain = thread::spawn(move || done(control.say(&hold(Epoch(1), 60_000, 60_000))));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone");
    assert!(upstream.is_closed());
    drop(upstream);
    assert_eq!(drain.join().unwrap().gate, Gate::Holding);
}

#[test]
fn a_client_that_leaves_in_the_middle_leaves_work_that_is_waited_for() {
    let source = Stage::new();
    let world = world(&source, "", "");
    let (mut client, mut upstream) = busy(
        &world,
        &source,
        "POST /long HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx",
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n");
    assert_eq!(client.head().status(), 200);
    drop(client);
    // Until the proxy notices that nobody takes it.
    while world.status().in_flight > 0 {
        if std::io::Write::write_all(&mut upstream.socket(), &[b'x'; 1000]).is_err() {
            break;
        }
    }
    let entry = &ledger(&world)[0];
    assert_eq!((entry.why, entry.status), (Why::ClientLeft, Some(200)));
    let told = left(&world);
    assert_eq!(told[0].phase, InFlightPhase::Abandoned);
    drop(upstream);
    done(world.control().say(&hold(Epoch(1), 60_000, 60_000)));
}

#[test]
fn the_application_passes_while_anything_is_in_flight_and_is_held_after_that() {
    let source = Stage::new();
    let world = world(
        &source,
        "trusted_from = [\"127.0.0.1\"]\nown_marker = \"X-Own\"",
        "",
    );
    let (mut client, mut upstream) = busy(&world, &source, "GET /page HTTP/1.1\r\nHost: h\r\n\r\n");
    left(&world);
    let mut stranger = world.client();
    stranger.get("/stranger");
    world.until_held(1);
    let own = "GET /own HTTP/1.1\r\nHost: h\r\nX-Own: 1\r\n\r\n";
    let (mut asks, mut serves) = busy(&world, &source, own);
    serves.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nme");
    assert_eq!(asks.message().body, "me");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone");
    assert_eq!(client.message().body, "done");
    drop((upstream, serves));
    done(world.control().say(&hold(Epoch(1), 60_000, 60_000)));
    let mut late = world.client();
    late.send(own);
    world.until_held(2);
    assert!(source.is_deserted());
}

#[test]
fn the_application_passes_by_its_address() {
    let source = Stage::new();
    let world = world(&source, "own_from = [\"127.0.0.0/8\"]", "");
    let (_client, _upstream) = busy(&world, &source, "GET /page HTTP/1.1\r\nHost: h\r\n\r\n");
    left(&world);
    busy(&world, &source, "GET /own HTTP/1.1\r\nHost: h\r\n\r\n");
}

#[test]
fn a_marker_from_a_stranger_is_taken_off_and_means_nothing() {
    let source = Stage::new();
    let world = world(
        &source,
        "trusted_from = [\"192.0.2.1\"]\nown_marker = \"X-Own\"",
        "",
    );
    let own = "GET /own HTTP/1.1\r\nHost: h\r\nX-Own: 1\r\n\r\n";
    let mut client = world.client();
    client.send(own);
    let mut upstream = source.accept();
    assert_eq!(upstream.message().field("X-Own"), None);
    left(&world);
    let mut held = world.client();
    held.send(own);
    world.until_held(1);
    assert!(source.is_deserted());
}

#[test]
fn a_request_that_waits_for_a_held_one_of_its_own_server_is_named() {
    let source = Stage::new();
    let world = world(&source, "", "");
    let (_client, _upstream) = busy(&world, &source, "GET /cron HTTP/1.1\r\nHost: h\r\n\r\n");
    left(&world);
    let mut own = world.client();
    own.get("/own");
    world.until_held(1);
    let told = left(&world);
    assert_eq!(
        told[0].waits_for,
        [own.socket().local_addr().unwrap().to_string()]
    );
}

#[test]
fn a_connection_that_is_being_made_when_the_gate_closes_is_waited_for() {
    let source = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    let authority = crate::tls::Authority::new();
    std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
    let tls = format!(
        "[upstream.tls]\nname = \"app.internal\"\nca = \"{}\"",
        folder.path().join("ca.pem").display()
    );
    let group = |name: &str, server, tls: &str| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nservers = [{{ address = \"{server}\" }}]\n{tls}\n"
        )
    };
    let target = Nobody::new().address();
    let world = Plan::new(source.address(), target)
        .named("here", "there")
        .table(&group("here", source.address(), &tls))
        .table(&group("there", target, ""))
        .limits("upstream_close_ms_max = 60_000")
        .start();
    let mut client = world.client();
    client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    // Its handshake is never answered.
    let upstream = source.accept();
    thread::scope(|scope| {
        let held = scope.spawn(|| world.control().say(&hold(Epoch(1), 60_000, 60_000)));
        let status = world.until(|status| status.gate != Gate::Open);
        assert_eq!(status.upstream_connections, 1, "{status:?}");
        assert!(!held.is_finished());
        drop(upstream);
        let drained = done(held.join().unwrap());
        assert_eq!(
            (drained.gate, drained.upstream_connections),
            (Gate::Holding, 0)
        );
    });
    world.until_held(1);
}
