//! A new process in the place of the old one while a gate holds: nobody who is held loses a connection or a place,
//! and everybody is let through when the new process' gate opens.

use std::io::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use cutover_protocol::hold::{Answer, Claim, Command, Gate, Order, Refusal, ServiceStatus, Tier};
use cutover_protocol::id::{Epoch, Site};
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand, ProcessStatus};
use quinn::TransportConfig;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::client2::Client2;
use crate::client3::Client3;
use crate::process::{Running, run, text};
use crate::world::{Control, Origin, Peer, Plan, Stage, done, hold, web};

fn order(command: Command) -> Order {
    Order {
        claim: Claim::Holder("hop-5".parse().unwrap()),
        command,
    }
}

fn process(folder: &TempDir) -> ProcessStatus {
    match Control::connect(folder).process(&ProcessCommand::Process) {
        ProcessAnswer::Process(process) => *process,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn ctl(folder: &TempDir, arguments: &[&str]) -> (Option<i32>, String) {
    let socket = ["ctl", "--socket", "control.sock"];
    let output = run(folder, &[&socket, arguments].concat());
    let said = [text(&output.stdout), text(&output.stderr)].concat();
    (output.status.code(), said)
}

fn until_held(folder: &TempDir, count: u64) -> ServiceStatus {
    let mut control = Control::connect(folder);
    loop {
        let status = control.status();
        if status.held_now == count {
            return status;
        }
    }
}

/// Commits to the target and lets everybody through.
fn move_to_target(folder: &TempDir) {
    let mut control = Control::connect(folder);
    let (service, epoch, to) = (web(), Epoch(1), Site::Target);
    done(control.order(&order(Command::Commit { service, epoch, to })));
    done(control.order(&order(Command::Release {
        service: web(),
        epoch: Epoch(2),
        to,
    })));
}

#[test]
fn whoever_is_held_stays_so_across_an_upgrade_and_goes_where_the_new_gate_opens_to() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address())
        .limits("shutdown_ms_max = 300\nlinger_ms_max = 50")
        .write(&folder);
    let mut running = Running::start(&folder);
    let mut idle = Peer::connect(running.address);
    idle.get("/before").message();
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut get = Peer::connect(running.address);
    get.get("/get");
    let mut post = Peer::connect(running.address);
    post.send("POST /post HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n");
    let mut http2 = Client2::connect(running.address);
    let stream = http2.post("/http2", "x");
    until_held(&folder, 3);

    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    let begun = Instant::now();
    let old = i32::try_from(running.child.id()).unwrap();
    let status = Control::connect(&folder).status();
    assert_eq!(
        (status.gate, status.register.epoch),
        (Gate::Holding, Epoch(1))
    );
    assert_eq!(status.holder.unwrap().as_str(), "hop-5");
    assert!(status.lease_ms_left.unwrap() > 30_000);
    let mut late = Peer::connect(running.address);
    late.get("/late");
    until_held(&folder, 1);
    // The old process waits for the new one's gate, however short its own patience is.
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(process(&folder).predecessor, Some(old));
    }
    // A client that was idle asks there, too.
    idle.get("/idle");
    // The hop goes on as if nothing had happened: it may even hold again.
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    move_to_target(&folder);
    post.socket()
        .try_clone()
        .unwrap()
        .write_all(&[b'x'; 100_000])
        .unwrap();
    assert_eq!(get.message().body, "target GET /get");
    assert_eq!(
        post.message().body.len(),
        "target POST /post ".len() + 100_000
    );
    assert_eq!(http2.answer(stream).body, "target POST /http2 x");
    assert_eq!(late.message().body, "target GET /late");
    assert_eq!(idle.message().body, "target GET /idle");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert_eq!(source.seen(), ["GET /before"]);
    assert_eq!(target.seen().len(), 5);
    done(Control::connect(&folder).order(&order(hold(Epoch(2), 60_000, 20_000))));
}

#[test]
fn who_waits_in_the_kernel_when_the_binary_is_upgraded_is_held_by_the_new_process() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address())
        .limits("held_max = 1")
        .write(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut held = Peer::connect(running.address);
    held.get("/held");
    let status = until_held(&folder, 1);
    assert_eq!(status.budget.unwrap().tier, Tier::Refuse);
    let mut queued = Peer::connect(running.address);
    queued.get("/queued");
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    // Its budget is its own, and it finds the client in the sockets that it got.
    until_held(&folder, 1);
    move_to_target(&folder);
    assert_eq!(held.message().body, "target GET /held");
    assert_eq!(queued.message().body, "target GET /queued");
}

#[test]
fn a_raw_connection_that_is_held_outlives_an_upgrade() {
    let (source, target) = (Stage::new(), Stage::new());
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address())
        .tcp()
        .write(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    until_held(&folder, 1);
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    move_to_target(&folder);
    let mut upstream = target.accept();
    upstream.send("greetings\n");
    assert_eq!(client.line(), "greetings");
    assert!(source.is_deserted());
}

#[test]
fn an_http3_request_that_is_held_outlives_an_upgrade() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    let certificate = Plan::new(source.address(), target.address()).write_http3(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let transport = TransportConfig::default();
    let mut client = Client3::connect(running.address, &certificate, transport).unwrap();
    let stream = client.get("/held");
    until_held(&folder, 1);
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    move_to_target(&folder);
    assert_eq!(client.answer(stream).body, "target GET /held");
}

#[test]
fn a_lease_that_runs_out_in_the_new_process_lets_the_held_of_the_old_one_through() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    let mut running = Running::start(&folder);
    let mut control = Control::connect(&folder);
    done(control.order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    client.get("/held");
    until_held(&folder, 1);
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    done(Control::connect(&folder).order(&order(Command::Renew {
        service: web(),
        epoch: Epoch(1),
        lease_ms: 1,
    })));
    assert_eq!(client.message().body, "source GET /held");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let register = Control::connect(&folder).status().register;
    assert_eq!((register.epoch, register.owner), (Epoch(2), Site::Source));
}

#[test]
fn an_upgrade_during_a_hold_that_comes_to_nothing_leaves_hold_and_lease_as_they_were() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    client.get("/held");
    until_held(&folder, 1);
    let (code, said) = ctl(&folder, &["upgrade", "--binary", "/bin/false"]);
    assert_eq!(code, Some(1), "{said}");
    // A program that asks for everything and then ends.
    let path = folder.path().join("proxy.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("state_dir = \"state\"", "state_dir = \"elsewhere\""),
    )
    .unwrap();
    let (code, said) = ctl(&folder, &["upgrade"]);
    assert_eq!(code, Some(1), "{said}");
    let status = Control::connect(&folder).status();
    assert_eq!((status.gate, status.held_now), (Gate::Holding, 1));
    assert_eq!(process(&folder).pid, running.child.id());
    // Its lease runs again.
    done(Control::connect(&folder).order(&order(Command::Renew {
        service: web(),
        epoch: Epoch(1),
        lease_ms: 1,
    })));
    assert_eq!(client.message().body, "source GET /held");
}

#[test]
fn a_gate_that_drains_is_not_handed_over() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    Plan::new(stage.address(), stage.address()).write(&folder);
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    client.get("/long");
    let mut upstream = stage.accept();
    upstream.head();
    let answer = Control::connect(&folder).say(&hold(Epoch(1), 60_000, 1));
    assert!(matches!(answer, Answer::NotDrained { .. }), "{answer:?}");
    let (code, said) = ctl(&folder, &["upgrade"]);
    assert_eq!(code, Some(1));
    assert_eq!(
        said,
        "refused: the gate of service web drains or releases; upgrade when it holds, or when it is open\n"
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
    assert_eq!(process(&folder).pid, running.child.id());
}

#[test]
fn a_new_process_that_dies_while_it_holds_leaves_nobody_waiting_for_it() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    let mut running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    client.get("/held");
    until_held(&folder, 1);
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    let new = i32::try_from(process(&folder).pid).unwrap();
    kill_process(Pid::from_raw(new).unwrap(), Signal::KILL).unwrap();
    // Nobody knows what the register will say: it is answered, and not sent on.
    assert_eq!(client.message().status(), 503);
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let again = Running::start(&folder);
    let status = Control::connect(&folder).status();
    assert_eq!(
        (status.gate, status.register.epoch),
        (Gate::Holding, Epoch(1))
    );
    assert_eq!((source.seen().len(), target.seen().len()), (0, 0));
    drop(again);
}

#[test]
fn nothing_is_held_anew_while_the_old_process_finishes_what_was_held() {
    let (source, target) = (Stage::new(), Stage::new());
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    client.get("/held");
    until_held(&folder, 1);
    assert_eq!(ctl(&folder, &["upgrade"]).0, Some(0));
    move_to_target(&folder);
    let mut upstream = target.accept();
    upstream.head();
    let mut control = Control::connect(&folder);
    let busy = control.order(&order(hold(Epoch(2), 60_000, 20_000)));
    let is_busy = |reason| reason == Refusal::Busy;
    assert!(
        matches!(busy, Answer::Refused { reason, .. } if is_busy(reason)),
        "{busy:?}"
    );
    let answering = thread::spawn(move || {
        upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    });
    assert_eq!(client.message().body, "ok");
    answering.join().unwrap();
}

#[test]
fn a_service_that_holds_cannot_be_lost_by_an_upgrade() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    let path = Plan::new(source.address(), target.address()).write(&folder);
    let running = Running::start(&folder);
    done(Control::connect(&folder).order(&order(hold(Epoch(1), 60_000, 20_000))));
    let mut client = Peer::connect(running.address);
    client.get("/held");
    until_held(&folder, 1);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("name = \"web\"", "name = \"shop\"")).unwrap();
    let (code, said) = ctl(&folder, &["upgrade"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(
            "the gate of service web holds, and the new process would not say when it opens"
        ),
        "{said}"
    );
    assert_eq!(process(&folder).pid, running.child.id());
    move_to_target(&folder);
    assert_eq!(client.message().body, "target GET /held");
}
