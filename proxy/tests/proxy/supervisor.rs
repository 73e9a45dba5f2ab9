//! What a supervisor hears, and what it may give.

use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{Running, activate, pass, run, serving};
use crate::world::{Origin, PATIENCE, Peer, Plan, Stage};

/// A supervisor that only listens.
struct Supervisor(UnixDatagram);

impl Supervisor {
    fn new(folder: &TempDir) -> Self {
        let socket = UnixDatagram::bind(folder.path().join("notify.sock")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    fn hears(&self) -> Vec<String> {
        let mut room = [0; 4096];
        let count = self.0.recv(&mut room).unwrap();
        let text = std::str::from_utf8(&room[..count]).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

fn world() -> (TempDir, Origin) {
    let origin = Origin::new("source");
    let folder = tempfile::tempdir().unwrap();
    Plan::new(origin.address(), origin.address()).write(&folder);
    (folder, origin)
}

fn start(folder: &TempDir, more: &[(&str, &str)]) -> Running {
    let socket = folder.path().join("notify.sock");
    let mut variables = vec![("NOTIFY_SOCKET", socket.to_str().unwrap())];
    variables.extend(more);
    Running::start_among(folder, &variables)
}

#[test]
fn it_says_when_it_is_ready_reloads_and_stops() {
    let (folder, _origin) = world();
    let supervisor = Supervisor::new(&folder);
    let running = start(&folder, &[]);
    assert_eq!(
        supervisor.hears(),
        ["READY=1", "STATUS=1 services, configuration 1"]
    );
    running.signal(Signal::HUP);
    let reloading = supervisor.hears();
    assert_eq!(reloading[0], "RELOADING=1");
    let time = reloading[1].strip_prefix("MONOTONIC_USEC=").unwrap();
    assert!(time.parse::<u64>().unwrap() > 0);
    assert_eq!(
        supervisor.hears(),
        ["READY=1", "STATUS=1 services, configuration 2"]
    );
    running.signal(Signal::TERM);
    assert_eq!(
        supervisor.hears(),
        ["STOPPING=1", "STATUS=finishing what runs"]
    );
}

#[test]
fn an_upgrade_names_the_new_process_before_that_says_it_is_ready() {
    let (folder, _origin) = world();
    let supervisor = Supervisor::new(&folder);
    let mut running = start(&folder, &[]);
    supervisor.hears();
    let output = run(&folder, &["ctl", "--socket", "control.sock", "upgrade"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let new = serving(&folder.path().join("control.sock")).unwrap();
    assert_eq!(supervisor.hears(), [format!("MAINPID={new}")]);
    assert_eq!(
        supervisor.hears(),
        ["READY=1", "STATUS=1 services, configuration 1"]
    );
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    // The old one has ended without a word: the next is the new one's.
    let pid = rustix::process::Pid::from_raw(i32::try_from(new).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(supervisor.hears()[0], "STOPPING=1");
}

#[test]
fn it_gives_signs_of_life_when_they_are_wanted() {
    let (folder, _origin) = world();
    let supervisor = Supervisor::new(&folder);
    let _running = start(&folder, &[("WATCHDOG_USEC", "50000")]);
    let mut heard = Vec::new();
    while heard.len() < 3 {
        heard.extend(
            supervisor
                .hears()
                .into_iter()
                .filter(|word| word == "WATCHDOG=1"),
        );
    }
}

#[test]
fn sockets_of_the_supervisor_are_taken_by_their_address_with_whoever_waits_there() {
    let (folder, _origin) = world();
    let (tcp, udp) = (Stage::new(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let socket_path = folder.path().join("web.sock");
    let unix = UnixListener::bind(&socket_path).unwrap();
    let stray = TcpListener::bind("127.0.0.1:0").unwrap();
    let path = folder.path().join("proxy.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let listen = format!(
        "listen = [{{ address = \"{}\" }}, {{ address = \"unix:web.sock\" }}, {{ address = \"127.0.0.1:0\" }}]",
        tcp.address()
    );
    std::fs::write(&path, text.replace("listen = \"127.0.0.1:0\"", &listen)).unwrap();

    // Here before the proxy is.
    let mut early = Peer::connect(tcp.address());
    early.get("/early");
    let given = [pass(tcp.listener()), pass(&unix), pass(&udp), pass(&stray)];
    let mut running = activate(&folder, &given);
    drop(given);
    assert_eq!(early.message().status(), 200);
    // Two sockets are nobody's, and said to be.
    assert_eq!(running.mentioned_unused, 2);

    // The supervisor keeps them: who comes while the proxy is away waits for the next.
    running.signal(Signal::TERM);
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert!(socket_path.exists());
    let mut late = Peer::connect(tcp.address());
    late.get("/late");
    let given = [pass(tcp.listener()), pass(&unix)];
    let again = activate(&folder, &given);
    drop(given);
    assert_eq!(late.message().status(), 200);
    // Also an upgrade hands them on.
    let output = run(&folder, &["ctl", "--socket", "control.sock", "upgrade"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_ne!(
        serving(&folder.path().join("control.sock")),
        Some(again.child.id())
    );
    assert_eq!(
        Peer::connect(tcp.address()).get("/").message().status(),
        200
    );
}

#[test]
fn the_unit_calls_the_program_as_it_can_be_called() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/systemd");
    let unit = std::fs::read_to_string(folder.join("hopgate-proxy.service")).unwrap();
    let calls: Vec<&str> = unit
        .lines()
        .filter_map(|line| {
            line.strip_prefix("Exec")?
                .split_once("=/usr/bin/hopgate-proxy ")
        })
        .map(|(_, arguments)| arguments)
        .collect();
    assert_eq!(calls.len(), 2);
    let anywhere = tempfile::tempdir().unwrap();
    for call in calls {
        let mut arguments: Vec<&str> = call.split(' ').collect();
        arguments.push("--help");
        let output = run(&anywhere, &arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}
