//! A new process in the place of the old one: nobody notices, and where it comes to nothing the old one goes on.

use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Output;

use cutover_protocol::hold::{Answer, Gate, Refusal};
use cutover_protocol::id::Epoch;
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand, ProcessStatus};
use http::Method;
use quinn::TransportConfig;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::client3::Client3;
use crate::process::{Crowd, Running, run, text};
use crate::world::{Control, Origin, Peer, Plan, Stage, done, hold};

fn world() -> (TempDir, Origin, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    (folder, source, target)
}

fn ctl(folder: &TempDir, arguments: &[&str]) -> Output {
    run(
        folder,
        &[&["ctl", "--socket", "control.sock"], arguments].concat(),
    )
}

fn upgrade(folder: &TempDir) {
    let output = ctl(folder, &["upgrade"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// What `ctl upgrade` says when it comes to nothing.
fn fails(folder: &TempDir, arguments: &[&str], code: i32) -> String {
    let output = ctl(folder, &[&["upgrade"], arguments].concat());
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    text(&output.stderr)
}

fn process(folder: &TempDir) -> ProcessStatus {
    match Control::connect(folder).process(&ProcessCommand::Process) {
        ProcessAnswer::Process(process) => *process,
        other => panic!("{other:?}"),
    }
}

fn goes_on(folder: &TempDir, running: &Running, client: &mut Peer) {
    let process = process(folder);
    assert_eq!(
        (process.pid, process.predecessor),
        (running.child.id(), None)
    );
    assert_eq!(client.get("/kept").message().status(), 200);
    let mut fresh = Peer::connect(running.address);
    assert_eq!(fresh.get("/fresh").message().status(), 200);
    // Also its gates are still its own.
    let mut control = Control::connect(folder);
    let epoch = control.status().register.epoch;
    control.hold(epoch);
    assert_eq!(ctl(folder, &["reopen", "web"]).status.code(), Some(0));
    assert_eq!(client.get("/reopened").message().status(), 200);
}

fn script(folder: &TempDir, body: &str) -> PathBuf {
    let path = folder.path().join("program");
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    path
}

#[test]
fn ten_upgrades_in_a_row_under_load_fail_no_request() {
    let (folder, _source, _target) = world();
    let mut running = Running::start(&folder);
    let crowd = Crowd::gather(8, running.address);
    let mut pids = vec![process(&folder).pid];
    for _ in 0..10 {
        upgrade(&folder);
        crowd.until_answered(100);
        pids.push(process(&folder).pid);
        while process(&folder).predecessor.is_some() {
            crowd.until_answered(1);
        }
    }
    assert!(crowd.disperse() >= 1000);
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 11);
}

#[test]
fn connections_that_never_last_are_all_served_across_upgrades() {
    let (folder, _source, _target) = world();
    let running = Running::start(&folder);
    let crowd = Crowd::coming_and_going(4, running.address);
    for _ in 0..3 {
        upgrade(&folder);
        crowd.until_answered(50);
        while process(&folder).predecessor.is_some() {
            crowd.until_answered(1);
        }
    }
    assert!(crowd.disperse() >= 150);
}

#[test]
fn a_signal_upgrades_and_the_register_goes_with_it() {
    let (folder, _source, _target) = world();
    let mut running = Running::start(&folder);
    Control::connect(&folder).hold(Epoch(1));
    assert_eq!(
        ctl(&folder, &["release", "web", "--to", "target"])
            .status
            .code(),
        Some(0)
    );
    running.signal(Signal::USR2);
    running.until_said("upgraded");
    let mut control = Control::connect(&folder);
    let status = control.status();
    assert_eq!((status.gate, status.register.epoch), (Gate::Open, Epoch(2)));
    let mut client = Peer::connect(running.address);
    assert_eq!(client.get("/").message().body, "target GET /");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert!(folder.path().join("control.sock").exists());
}

#[test]
fn a_process_started_by_hand_takes_over_too() {
    let (folder, _source, _target) = world();
    let mut old = Running::start(&folder);
    let new = Running::start_with(&folder, &["--upgrade"]);
    assert_eq!(new.address, old.address);
    assert_eq!(process(&folder).pid, new.child.id());
    assert_eq!(old.child.wait().unwrap().code(), Some(0));
    assert_eq!(Peer::connect(new.address).get("/").message().status(), 200);
}

#[test]
fn what_runs_in_the_old_process_ends_there_and_nothing_is_held_until_then() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    Plan::new(stage.address(), stage.address()).write(&folder);
    let mut running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    client.get("/long");
    let mut upstream = stage.accept();
    upstream.head();
    upgrade(&folder);
    let old = i32::try_from(running.child.id()).unwrap();
    assert_eq!(process(&folder).predecessor, Some(old));
    match Control::connect(&folder).say(&hold(Epoch(1), 60_000, 20_000)) {
        Answer::Refused {
            reason: Refusal::Busy,
            message,
            ..
        } => assert!(
            message.starts_with("the process before the last upgrade"),
            "{message}"
        ),
        other => panic!("{other:?}"),
    }
    assert!(fails(&folder, &[], 1).contains("still finishes what it began"));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.message().body, "ok");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    running.until_said("the process before this one has ended");
    done(Control::connect(&folder).say(&hold(Epoch(1), 60_000, 20_000)));
}

#[test]
fn a_tunnel_outlives_the_upgrade_and_is_named_when_it_is_cut() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    Plan::new(stage.address(), stage.address())
        .limits("shutdown_ms_max = 300\nlinger_ms_max = 100")
        .write(&folder);
    let mut running = Running::start(&folder);
    let mut tunnel = Peer::connect(running.address);
    tunnel.send("GET /tunnel HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    let mut upstream = stage.accept();
    upstream.head();
    upstream
        .send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    assert_eq!(tunnel.head().status(), 101);
    upgrade(&folder);
    let line = running.until_said("cut off at shutdown");
    assert!(line.contains("GET /tunnel"), "{line}");
    assert!(tunnel.is_closed());
}

#[test]
fn a_quic_connection_stays_with_the_old_process_and_the_next_meets_the_new_one() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    // The end of the old process may take longer than upstream connections are kept by default.
    let certificate = Plan::new(stage.address(), stage.address())
        .limits("upstream_idle_ms_max = 60000")
        .write_http3(&folder);
    let mut running = Running::start(&folder);
    let connect = || Client3::connect(running.address, &certificate, TransportConfig::default());
    let mut before = connect().unwrap();
    let mut long = before.begin(Method::POST, "/long");
    let mut upstream = stage.accept();
    upstream.head();
    upgrade(&folder);
    let mut after = connect().unwrap();
    let short = after.get("/short");
    let mut fresh = stage.accept();
    fresh.head();
    fresh.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(after.answer(short).status, 204);
    // These packets come in at the new process, which passes them on.
    before.data(&mut long, "late");
    before.wait(long.finish()).unwrap();
    assert_eq!(upstream.chunks(), b"late");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(before.answer(long).text(), "ok");
    drop(before);
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let last = after.get("/last");
    fresh.head();
    fresh.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(after.answer(last).status, 204);
}

#[test]
fn a_handover_that_comes_to_nothing_leaves_quic_connections_where_they_are() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    let certificate = Plan::new(source.address(), target.address()).write_http3(&folder);
    let mut running = Running::start(&folder);
    let connect = || Client3::connect(running.address, &certificate, TransportConfig::default());
    let mut client = connect().unwrap();
    let stream = client.get("/1");
    assert_eq!(client.answer(stream).text(), "source GET /1");
    let mut impostor = Impostor::ask(&folder);
    impostor.say("{\"is\":\"ready\",\"unused\":[]}");
    assert_eq!(impostor.hear()["is"], "yours");
    drop(impostor);
    let stream = client.get("/2");
    assert_eq!(client.answer(stream).text(), "source GET /2");
    drop(connect().unwrap());
    running.until_said("nothing was handed over, this process goes on");
    upgrade(&folder);
    let mut new =
        Client3::connect(running.address, &certificate, TransportConfig::default()).unwrap();
    let stream = new.get("/4");
    assert_eq!(new.answer(stream).text(), "source GET /4");
}

#[test]
fn a_changed_configuration_is_matched_and_whom_the_kernel_let_in_is_served() {
    let (folder, source, _target) = world();
    let path = folder.path().join("proxy.toml");
    let more = format!(
        "[[service]]\nname = \"shop\"\nlisten = \"127.0.0.1:0\"\nsource = \"{0}\"\ntarget = \"{0}\"\n",
        source.address()
    );
    let web = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{web}{more}")).unwrap();
    let running = Running::start(&folder);
    let shop = process(&folder).listeners[1].bound.unwrap();
    let mut late = Peer::connect(shop);
    // Fewer services and more workers than before.
    std::fs::write(&path, web.replace("workers = 2", "workers = 3")).unwrap();
    upgrade(&folder);
    assert_eq!(late.get("/late").message().status(), 200);
    let listeners = process(&folder).listeners;
    assert_eq!(listeners.len(), 1);
    assert_eq!(listeners[0].bound, Some(running.address));
    assert_eq!(process(&folder).workers, 3);
}

#[test]
fn a_program_that_is_none_leaves_the_old_process_serving() {
    let (folder, _source, _target) = world();
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    let said = fails(&folder, &["--binary", "nothing"], 1);
    assert!(
        said.contains("nothing cannot be started: No such file"),
        "{said}"
    );
    let said = fails(&folder, &["--binary", "/bin/false"], 1);
    assert!(
        said.contains("does not accept the configuration: exit status: 1"),
        "{said}"
    );
    goes_on(&folder, &running, &mut client);
}

#[test]
fn a_program_that_ends_at_once_leaves_the_old_process_serving() {
    let (folder, _source, _target) = world();
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    let program = script(&folder, "[ \"$1\" = check ] || exit 7");
    let said = fails(&folder, &["--binary", program.to_str().unwrap()], 1);
    assert!(said.contains("ended before it had taken over"), "{said}");
    assert!(said.contains("exit status: 7"), "{said}");
    goes_on(&folder, &running, &mut client);
}

#[test]
fn a_program_that_never_gets_ready_is_given_up() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address())
        .limits("upgrade_ms_max = 100")
        .write(&folder);
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    let program = script(
        &folder,
        "[ \"$1\" = check ] || exec cat /dev/zero > /dev/null",
    );
    let said = fails(&folder, &["--binary", program.to_str().unwrap()], 1);
    assert!(said.contains("was not ready within 100 ms"), "{said}");
    goes_on(&folder, &running, &mut client);
}

#[test]
fn a_broken_configuration_leaves_the_old_process_serving() {
    let (folder, _source, _target) = world();
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    let path = folder.path().join("proxy.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("workers", "wrokers")).unwrap();
    let said = fails(&folder, &[], 2);
    assert!(said.contains("did you mean \"workers\"?"), "{said}");
    let taken = Stage::new();
    let listen = format!("listen = \"{}\"", taken.address());
    std::fs::write(&path, text.replace("listen = \"127.0.0.1:0\"", &listen)).unwrap();
    let said = fails(&folder, &[], 1);
    assert!(
        said.contains("the new process does not take over: cannot listen on 127.0.0.1:"),
        "{said}"
    );
    std::fs::write(&path, text.replace("\"state\"", "\"elsewhere\"")).unwrap();
    let said = fails(&folder, &[], 1);
    assert!(said.contains("an upgrade cannot move it"), "{said}");
    std::fs::write(&path, text).unwrap();
    goes_on(&folder, &running, &mut client);
}

#[test]
fn nobody_to_take_over_from_is_said_in_one_line() {
    let (folder, _source, _target) = world();
    let output = run(&folder, &["run", "--config", "proxy.toml", "--upgrade"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(
        said.contains("control.sock; start without --upgrade if none runs: No such file"),
        "{said}"
    );
}

/// Plays the new process as far as a test wants it to come; whatever it has is closed when it is dropped, as the
/// kernel does for a process that is killed.
struct Impostor {
    channel: OwnedFd,
    _given: Vec<OwnedFd>,
}

impl Impostor {
    fn ask(folder: &TempDir) -> Self {
        let mut stream = UnixStream::connect(folder.path().join("control.sock")).unwrap();
        stream.write_all(b"{\"command\":\"handover\"}\n").unwrap();
        let (_, mut files) = receive(&OwnedFd::from(stream));
        let mut impostor = Self {
            channel: files.remove(0),
            _given: Vec::new(),
        };
        let offer = impostor.hear();
        assert_eq!(offer["is"], "offer");
        for _ in 0..offer["parts"].as_u64().unwrap() {
            let part = impostor.hear();
            assert!(
                part["is"] == "sockets" || part["is"] == "succession",
                "{part}"
            );
        }
        impostor
    }

    fn hear(&mut self) -> serde_json::Value {
        let (bytes, files) = receive(&self.channel);
        self._given.extend(files);
        serde_json::from_slice(&bytes).unwrap()
    }

    fn say(&self, message: &str) {
        rustix::net::send(&self.channel, message.as_bytes(), SendFlags::empty()).unwrap();
    }
}

fn receive(socket: &OwnedFd) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut room = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut slices = [IoSliceMut::new(&mut room)];
    let received = rustix::net::recvmsg(socket, &mut slices, &mut beside, flags).unwrap();
    let mut files = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(given) = message {
            files.extend(given);
        }
    }
    room.truncate(received.bytes);
    (room, files)
}

#[test]
fn a_new_process_killed_at_any_step_leaves_the_old_one_serving() {
    let (folder, _source, _target) = world();
    let mut running = Running::start(&folder);
    let mut client = Peer::connect(running.address);

    let impostor = Impostor::ask(&folder);
    match Control::connect(&folder).say(&hold(Epoch(1), 60_000, 20_000)) {
        Answer::Refused {
            reason: Refusal::Busy,
            message,
            ..
        } => assert_eq!(message, "an upgrade is under way; repeat this in a moment"),
        other => panic!("{other:?}"),
    }
    assert!(fails(&folder, &[], 1).contains("a reload or an upgrade is under way"));
    drop(impostor);
    running.until_said("nothing was handed over, this process goes on");
    goes_on(&folder, &running, &mut client);

    let mut impostor = Impostor::ask(&folder);
    impostor.say("{\"is\":\"ready\",\"unused\":[]}");
    assert_eq!(impostor.hear()["is"], "yours");
    drop(impostor);
    running.until_said("nothing was handed over, this process goes on");
    goes_on(&folder, &running, &mut client);

    let impostor = Impostor::ask(&folder);
    impostor.say("{\"is\":\"no\",\"why\":\"not today\"}");
    let line = running.until_said("nothing was handed over, this process goes on");
    assert!(line.contains("not today"), "{line}");
    goes_on(&folder, &running, &mut client);
    drop(impostor);

    let mut stream = UnixStream::connect(folder.path().join("control.sock")).unwrap();
    stream.write_all(b"{\"command\":\"handover\"}\n").unwrap();
    drop(stream);
    running.until_said("nothing was handed over, this process goes on");
    goes_on(&folder, &running, &mut client);
}
