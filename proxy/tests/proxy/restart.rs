//! The binary: a crash while holding, damaged state, signals, and what it says on the command line.

use cutover_protocol::hold::{Command, Gate};
use cutover_protocol::id::{Epoch, Register, Site};
use tempfile::TempDir;

use crate::process::{Running, run, text};
use crate::world::{Control, Nobody, Origin, Peer, Plan, done, hold, web};

fn world() -> (TempDir, Origin, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    (folder, source, target)
}

#[test]
fn a_proxy_killed_while_holding_comes_back_holding() {
    let (folder, source, target) = world();
    let before = Running::start(&folder);
    done(Control::connect(&folder).say(&hold(Epoch(1), 45_000, 20_000)));
    drop(before);

    let after = Running::start(&folder);
    let mut control = Control::connect(&folder);
    let status = control.status();
    assert_eq!(
        (status.gate, status.register.epoch),
        (Gate::Holding, Epoch(1))
    );
    assert!(status.lease_ms_left.unwrap() > 30_000);
    let mut client = Peer::connect(after.address);
    client.post("/after", "x");
    done(control.say(&Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    }));
    drop(after);

    let last = Running::start(&folder);
    let mut control = Control::connect(&folder);
    assert_eq!(
        control.status().register,
        Register {
            epoch: Epoch(2),
            owner: Site::Target
        }
    );
    assert_eq!(control.status().gate, Gate::Holding);
    done(control.say(&Command::Release {
        service: web(),
        epoch: Epoch(2),
        to: Site::Target,
    }));
    assert_eq!(
        Peer::connect(last.address).get("/last").message().body,
        "target GET /last"
    );
    assert_eq!((source.seen().len(), target.seen().len()), (0, 1));
}

#[test]
fn damaged_state_is_not_served_from() {
    let (folder, _source, _target) = world();
    std::fs::create_dir(folder.path().join("state")).unwrap();
    std::fs::write(folder.path().join("state/web.json"), "{\"version\":1,\"reg").unwrap();
    let output = run(&folder, &["run", "--config", "proxy.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(
        said.contains("state/web.json is damaged (EOF while parsing"),
        "{said}"
    );
    assert!(
        said.trim_end()
            .ends_with("restore it, or ask both agents who serves before removing it"),
        "{said}"
    );
}

#[test]
fn a_second_proxy_on_the_same_state_does_not_start() {
    let (folder, _source, _target) = world();
    let _first = Running::start(&folder);
    let output = run(&folder, &["run", "--config", "proxy.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("another hopgate-proxy uses the state folder"),
        "{output:?}"
    );
}

#[test]
fn an_address_that_is_taken_is_said_in_one_line() {
    let (folder, _source, _target) = world();
    let running = Running::start(&folder);
    let other = tempfile::tempdir().unwrap();
    let nobody = Nobody::new().address();
    let path = Plan::new(nobody, nobody).write(&other);
    let text_there = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text_there.replace("127.0.0.1:0", &running.address.to_string()),
    )
    .unwrap();
    let output = run(&other, &["run", "--config", "proxy.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    let expected = format!(
        "hopgate-proxy: cannot listen on {} for service web; is another process using it?: Address already in use (os error 98)\n",
        running.address
    );
    assert_eq!(said, expected);
}

#[test]
fn both_signals_end_it_with_success() {
    use rustix::process::Signal;
    for signal in [Signal::TERM, Signal::INT] {
        let (folder, _source, _target) = world();
        let mut running = Running::start(&folder);
        assert_eq!(
            Peer::connect(running.address).get("/").message().status(),
            200
        );
        running.signal(signal);
        assert_eq!(running.child.wait().unwrap().code(), Some(0));
        assert!(!folder.path().join("control.sock").exists());
    }
}

#[test]
fn a_person_holds_releases_and_reopens_from_the_command_line() {
    let (folder, _source, target) = world();
    let running = Running::start(&folder);
    let ctl = |arguments: &[&str]| {
        run(
            &folder,
            &[&["ctl", "--socket", "control.sock"], arguments].concat(),
        )
    };
    let output = ctl(&["status"]);
    assert!(
        text(&output.stdout).starts_with("web: open, epoch 1, owner source\n"),
        "{output:?}"
    );
    assert_eq!(
        ctl(&["hold", "web", "--lease", "30s"]).status.code(),
        Some(0)
    );
    let mut client = Peer::connect(running.address);
    client.get("/held");
    assert_eq!(
        ctl(&["release", "web", "--to", "target"]).status.code(),
        Some(0)
    );
    assert_eq!(client.message().body, "target GET /held");
    assert_eq!(
        ctl(&["release", "web", "--to", "target"]).status.code(),
        Some(0)
    );
    assert_eq!(ctl(&["hold", "web"]).status.code(), Some(0));
    assert_eq!(ctl(&["reopen", "web"]).status.code(), Some(0));
    let output = ctl(&["status", "web", "--json"]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["services"][0]["register"]["epoch"], 3);
    assert_eq!(said["services"][0]["register"]["owner"], "target");
    let refused = ctl(&["release", "web", "--to", "source"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).starts_with("refused: the gate does not hold; hold it first\n"),
        "{refused:?}"
    );
    assert_eq!(ctl(&["hold", "shop"]).status.code(), Some(1));
    assert_eq!(
        ctl(&["hold", "web", "--lease", "soon"]).status.code(),
        Some(2)
    );
    assert_eq!(target.seen(), ["GET /held"]);
}

#[test]
fn a_hold_that_is_not_drained_has_its_own_exit_code() {
    let stage = crate::world::Stage::new();
    let folder = tempfile::tempdir().unwrap();
    Plan::new(stage.address(), stage.address()).write(&folder);
    let running = Running::start(&folder);
    let mut client = Peer::connect(running.address);
    client.get("/long");
    let _upstream = stage.accept();
    let output = run(
        &folder,
        &[
            "ctl",
            "--socket",
            "control.sock",
            "hold",
            "web",
            "--drain",
            "1ms",
        ],
    );
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).contains("GET /long"), "{output:?}");
}

#[test]
fn a_socket_without_a_proxy_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let output = run(&folder, &["ctl", "--socket", "nobody.sock", "status"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "hopgate-proxy: no proxy answers on nobody.sock; is it running, and is --socket right?: \
                    No such file or directory (os error 2)\n";
    assert_eq!(text(&output.stderr), expected);
}
