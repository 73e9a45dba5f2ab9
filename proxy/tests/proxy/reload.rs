//! Reading the configuration again: what changes, what stays, and what is refused.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cutover_protocol::hold::Gate;
use cutover_protocol::id::Epoch;
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand, ProcessRefusal, Reloaded};
use rustix::process::Signal;

use crate::process::{Crowd, Running, run, text};
use crate::world::{Origin, Peer, Plan, Stage, World, web};

/// Replaces text in the configuration, and has it read.
fn reload_with(world: &World, old: &str, new: &str) -> ProcessAnswer {
    rewrite(&config_of(world), old, new);
    world.control().process(&ProcessCommand::Reload)
}

fn rewrite(path: &PathBuf, old: &str, new: &str) {
    let before = std::fs::read_to_string(path).unwrap();
    assert!(before.contains(old), "{before}");
    std::fs::write(path, before.replace(old, new)).unwrap();
}

fn config_of(world: &World) -> PathBuf {
    world.folder.path().join("proxy.toml")
}

fn reloaded(answer: ProcessAnswer) -> Reloaded {
    match answer {
        ProcessAnswer::Reloaded(done) => done,
        other => panic!("{other:?}"),
    }
}

fn refused(answer: ProcessAnswer) -> (ProcessRefusal, String) {
    match answer {
        ProcessAnswer::Refused { reason, message } => (reason, message),
        other => panic!("{other:?}"),
    }
}

fn world() -> (World, Origin, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address()).start();
    (world, source, target)
}

#[test]
fn a_limit_changes_for_the_next_request_of_a_kept_connection() {
    let (world, _source, _target) = world();
    let mut client = world.client();
    let long = format!(
        "GET /long HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n",
        "x".repeat(20_000)
    );
    let done = reload_with(
        &world,
        "workers = 2",
        "workers = 2\n[limits]\nhead_bytes_max = 32768\n",
    );
    assert_eq!(reloaded(done).generation, 2);
    assert_eq!(client.send(&long).message().status(), 200);
    reloaded(reload_with(
        &world,
        "head_bytes_max = 32768",
        "head_bytes_max = 2048",
    ));
    assert_eq!(client.send(&long).message().status(), 431);
}

#[test]
fn an_upstream_that_moves_gets_the_next_request_and_no_kept_connection_of_the_old_one() {
    let (world, source, _target) = world();
    let mut client = world.client();
    assert_eq!(client.get("/1").message().body, "source GET /1");
    let moved = Origin::new("moved");
    let (old, new) = (source.address().to_string(), moved.address().to_string());
    reloaded(reload_with(&world, &old, &new));
    assert_eq!(client.get("/2").message().body, "moved GET /2");
    assert_eq!(source.seen(), ["GET /1"]);
}

#[test]
fn an_invalid_file_leaves_everything_as_it_was_and_says_why() {
    let (world, _source, _target) = world();
    let mut client = world.client();
    let before = config_of(&world);
    let answer = reload_with(&world, "workers = 2", "wrokers = 2");
    let (reason, message) = refused(answer);
    assert_eq!(reason, ProcessRefusal::Configuration);
    let expected = format!(
        "{}: unknown key \"wrokers\" in the top of the file; did you mean \"workers\"?",
        before.display()
    );
    assert_eq!(message, expected);
    assert_eq!(client.get("/").message().status(), 200);
    let ProcessAnswer::Process(process) = world.control().process(&ProcessCommand::Process) else {
        panic!("no facts");
    };
    assert_eq!((process.generation, process.reloads_refused), (1, 1));
    assert_eq!(process.last_refusal, Some(expected));
}

#[test]
fn what_needs_a_restart_is_refused_by_name() {
    for (old, new, name) in [
        ("\"state\"", "\"elsewhere\"", "state_dir"),
        ("\"control.sock\"", "\"other.sock\"", "control"),
        ("workers = 2", "workers = 3", "workers"),
    ] {
        let (world, _source, _target) = world();
        let (reason, message) = refused(reload_with(&world, old, new));
        assert_eq!(reason, ProcessRefusal::Configuration);
        assert!(
            message.starts_with(&format!("{name} cannot change from ")),
            "{message}"
        );
        assert!(
            message.ends_with(&format!("restart it, or leave {name} as it is")),
            "{message}"
        );
    }
}

#[test]
fn a_listener_that_cannot_be_had_leaves_the_old_ones() {
    let (world, _source, _target) = world();
    let taken = Stage::new();
    let listen = format!("listen = \"{}\"", taken.address());
    let (reason, message) = refused(reload_with(&world, "listen = \"127.0.0.1:0\"", &listen));
    assert_eq!(reason, ProcessRefusal::Failed);
    assert!(
        message.starts_with("cannot listen on 127.0.0.1:"),
        "{message}"
    );
    assert!(message.contains("Address already in use"), "{message}");
    assert_eq!(world.client().get("/").message().status(), 200);
}

#[test]
fn a_service_is_added_and_removed_while_another_goes_on() {
    let (world, _source, target) = world();
    let mut client = world.client();
    let more = format!(
        "[[service]]\nname = \"shop\"\nlisten = \"127.0.0.1:0\"\nsource = \"{0}\"\ntarget = \"{0}\"\n",
        target.address()
    );
    let first = "[[service]]\nname = \"web\"";
    let done = reloaded(reload_with(&world, first, &format!("{more}{first}")));
    assert_eq!(done.services_added, ["shop".parse().unwrap()]);
    let shop = world.proxy().address("shop").unwrap();
    assert_eq!(done.listeners_added, [shop.to_string()]);
    let mut buyer = Peer::connect(shop);
    assert_eq!(buyer.get("/cart").message().body, "target GET /cart");

    let done = reloaded(reload_with(&world, &more, ""));
    assert_eq!(done.services_removed, ["shop".parse().unwrap()]);
    assert_eq!(done.listeners_removed, [shop.to_string()]);
    assert!(buyer.is_closed());
    assert_eq!(client.get("/").message().status(), 200);
}

#[test]
fn a_removed_listener_serves_whom_the_kernel_had_let_in() {
    let (world, _source, _target) = world();
    let address = world.address();
    // Both are connected before the reload, whether accepted or not.
    let (mut early, mut late) = (Peer::connect(address), Peer::connect(address));
    early.get("/early");
    reloaded(reload_with(
        &world,
        "listen = \"127.0.0.1:0\"",
        "listen = \"unix:web.sock\"",
    ));
    assert_eq!(early.message().status(), 200);
    assert_eq!(late.get("/late").message().status(), 200);
    let mut inside = UnixStream::connect(world.folder.path().join("web.sock")).unwrap();
    inside.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut inside, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    reloaded(reload_with(&world, "unix:web.sock", "127.0.0.1:0"));
    assert!(!world.folder.path().join("web.sock").exists());
    assert_ne!(world.address(), address);
}

#[test]
fn a_hold_its_register_and_its_held_survive_a_reload() {
    let (world, _source, _target) = world();
    world.hold();
    let mut client = world.client();
    client.post("/held", "x");
    world.until_held(1);
    reloaded(reload_with(
        &world,
        "workers = 2",
        "workers = 2\n[limits]\nheld_max = 1\n",
    ));
    reloaded(reload_with(
        &world,
        "name = \"web\"",
        "name = \"web\"\nwhen_full = \"refuse\"",
    ));
    let status = world.status();
    assert_eq!(
        (status.gate, status.register.epoch),
        (Gate::Holding, Epoch(1))
    );
    assert_eq!(status.held_now, 1);
    // The new bound is in force.
    assert_eq!(world.client().get("/").message().status(), 503);
    world.move_to(cutover_protocol::id::Site::Target);
    assert_eq!(client.message().body, "target POST /held x");
}

#[test]
fn a_service_in_a_hop_is_not_removed() {
    let (world, _source, _target) = world();
    world.hold();
    let (reason, message) = refused(reload_with(&world, "name = \"web\"", "name = \"shop\""));
    assert_eq!(reason, ProcessRefusal::Busy);
    assert_eq!(
        message,
        "service web is not in the file, but its gate is not open (epoch 1, owner source); let the hop end first"
    );
    world.reopen();
    reloaded(world.control().process(&ProcessCommand::Reload));
    assert!(world.proxy().status(&web()).is_none());
}

#[test]
fn a_service_that_comes_back_is_the_one_its_last_connection_belongs_to() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address()).start();
    let mut client = world.client();
    client.get("/long");
    let mut upstream = stage.accept();
    upstream.head();
    reloaded(reload_with(&world, "name = \"web\"", "name = \"shop\""));
    reloaded(reload_with(&world, "name = \"shop\"", "name = \"web\""));
    assert_eq!(world.status().in_flight, 1);
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.message().status(), 204);
}

#[test]
fn fewer_connections_are_allowed_at_once_and_more_again() {
    let (world, _source, _target) = world();
    let mut first = world.client();
    assert_eq!(first.get("/").message().status(), 200);
    reloaded(reload_with(
        &world,
        "workers = 2",
        "workers = 2\n[limits]\nconnections_max = 1\n",
    ));
    let mut second = world.client();
    second.get("/");
    assert_eq!(first.get("/").message().status(), 200);
    reloaded(reload_with(
        &world,
        "connections_max = 1",
        "connections_max = 2",
    ));
    assert_eq!(second.message().status(), 200);
}

#[test]
fn the_access_log_is_opened_anew_so_that_it_can_be_rotated() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[access_log]\npath = \"access.log\"")
        .start();
    let (log, old) = (
        world.folder.path().join("access.log"),
        world.folder.path().join("access.log.1"),
    );
    assert_eq!(world.client().get("/before").message().status(), 200);
    std::fs::rename(&log, &old).unwrap();
    reloaded(world.control().process(&ProcessCommand::Reload));
    assert_eq!(world.client().get("/after").message().status(), 200);
    let World { proxy, folder } = world;
    proxy.unwrap().stop(crate::world::PATIENCE);
    let (old, new) = (
        std::fs::read_to_string(old).unwrap(),
        std::fs::read_to_string(log).unwrap(),
    );
    assert!(
        old.contains("GET /before") && !old.contains("GET /after"),
        "{old}"
    );
    assert!(
        new.contains("GET /after") && !new.contains("GET /before"),
        "{new}"
    );
    drop(folder);
}

#[test]
fn metrics_tell_the_generation_and_what_became_of_reloads() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .start();
    reloaded(world.control().process(&ProcessCommand::Reload));
    refused(reload_with(&world, "workers = 2", "workers = 0"));
    let mut scraper = Peer::connect(world.proxy().metrics_address().unwrap());
    let text = scraper.get("/metrics").rest();
    for line in [
        "hopgate_config_generation 2",
        "hopgate_config_last_reload_ok 0",
        "hopgate_reloads_total{outcome=\"done\"} 1",
        "hopgate_reloads_total{outcome=\"refused\"} 1",
    ] {
        assert!(
            text.contains(&format!("\n{line}\n")),
            "{line} is not in {text}"
        );
    }
}

#[test]
fn a_hundred_reloads_under_load_fail_no_request() {
    let (world, _source, _target) = world();
    let crowd = Crowd::gather(8, world.address());
    let path = config_of(&world);
    let more = "\n[[service]]\nname = \"shop\"\nlisten = \"127.0.0.1:0\"\nsource = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:1\"\n";
    let without = std::fs::read_to_string(&path).unwrap();
    let with = format!("{without}{more}");
    let mut control = world.control();
    for turn in 0..100 {
        std::fs::write(&path, if turn % 2 == 0 { &with } else { &without }).unwrap();
        reloaded(control.process(&ProcessCommand::Reload));
        crowd.until_answered(20);
    }
    assert!(crowd.disperse() >= 2000);
}

#[test]
fn the_real_program_reloads_on_a_signal_and_by_command() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    let path = Plan::new(source.address(), target.address()).write(&folder);
    let mut running = Running::start(&folder);
    running.signal(Signal::HUP);
    let line = running.until_said("reloaded");
    assert!(line.contains("generation=2"), "{line}");
    rewrite(&path, "workers = 2", "wrokers = 2");
    running.signal(Signal::HUP);
    let line = running.until_said("not reloaded, the configuration stays as it is");
    assert!(line.contains("did you mean \"workers\"?"), "{line}");
    let ctl = |verb: &str| run(&folder, &["ctl", "--socket", "control.sock", verb]);
    let output = ctl("reload");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).starts_with("refused: "), "{output:?}");
    rewrite(&path, "wrokers = 2", "workers = 2");
    let output = ctl("reload");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        text(&output.stdout),
        "reloaded: configuration 3 is in force\n"
    );
    let said = text(&ctl("status").stdout);
    let expected = format!("  listening on {} for web\n", running.address);
    assert!(said.contains(&expected), "{said}");
    assert!(said.contains("reloads: 2 done, 2 refused"), "{said}");
}

#[test]
fn a_second_signal_ends_at_once_and_names_who_remained() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    Plan::new(stage.address(), stage.address()).write(&folder);
    let mut running = Running::start(&folder);
    let mut tunnel = Peer::connect(running.address);
    tunnel.send("GET /tunnel HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    let mut upstream = stage.accept();
    upstream.head();
    upstream
        .send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    assert_eq!(tunnel.head().status(), 101);
    let mut idle = Peer::of(TcpStream::connect(running.address).unwrap());
    running.signal(Signal::TERM);
    running.until_said("stopping: no new clients");
    assert!(idle.is_closed());
    running.signal(Signal::TERM);
    let line = running.until_said("cut off at shutdown");
    assert!(line.contains("GET /tunnel"), "{line}");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert!(tunnel.is_closed());
}
