//! The real binary in processes of its own, and clients that never stop asking.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command as Process, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use tempfile::TempDir;

use crate::world::Peer;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_hopgate-proxy");

/// A proxy in a process of its own; killed when dropped.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    control: PathBuf,
    /// Sockets of the supervisor that no listener has.
    pub(crate) mentioned_unused: usize,
    /// Kept open: a proxy that cannot write its log is another test.
    log: BufReader<ChildStderr>,
}

impl Running {
    pub(crate) fn start(folder: &TempDir) -> Self {
        Self::start_with(folder, &[])
    }

    pub(crate) fn start_with(folder: &TempDir, more: &[&str]) -> Self {
        Self::start_as(Path::new(BINARY), &[], folder, more, &[])
    }

    /// With these in its environment.
    pub(crate) fn start_among(folder: &TempDir, variables: &[(&str, &str)]) -> Self {
        Self::start_as(Path::new(BINARY), &[], folder, &[], variables)
    }

    /// By another program, which gets what the proxy is called with behind `first`.
    pub(crate) fn start_by(program: &Path, first: &[&str], folder: &TempDir) -> Self {
        Self::start_as(program, first, folder, &[], &[])
    }

    fn start_as(
        program: &Path,
        first: &[&str],
        folder: &TempDir,
        more: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut command = Process::new(program);
        command
            .args(first)
            .args(["run", "--config"])
            .arg(folder.path().join("proxy.toml"))
            .args(more)
            .envs(variables.iter().copied())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut running = Self {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            control: folder.path().join("control.sock"),
            mentioned_unused: 0,
            log,
        };
        running.until_ready();
        running
    }

    fn until_ready(&mut self) {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "ended before it was ready");
            if let Some((_, rest)) = line.split_once("serving service=web address=") {
                // A unix socket has none.
                if let Ok(address) = rest.split(' ').next().unwrap().parse() {
                    self.address = address;
                }
            }
            if line.contains("no listener of the configuration has") {
                self.mentioned_unused += 1;
            }
            if line.contains(" ready ") {
                return;
            }
        }
    }

    /// The next line of its log; empty at its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.log.read_line(&mut line).unwrap();
        line
    }

    /// Reads its log up to a line with this in it.
    pub(crate) fn until_said(&mut self, wanted: &str) -> String {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "ended before it said: {wanted}");
            if line.contains(wanted) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After an upgrade somebody else serves, who is no child of ours.
        if let Some(pid) = serving(&self.control).filter(|pid| *pid != self.child.id()) {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).ok();
        }
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

/// A copy of a socket that the next program gets, far from the numbers it is to have there.
pub(crate) fn pass(socket: impl AsFd) -> OwnedFd {
    let copy = fcntl_dupfd_cloexec(socket, 100).unwrap();
    fcntl_setfd(&copy, FdFlags::empty()).unwrap();
    copy
}

/// Starts the proxy as systemd would: sockets from number 3 on, and a word to whom they are given.
pub(crate) fn activate(folder: &TempDir, sockets: &[OwnedFd]) -> Running {
    let moves: Vec<String> = sockets
        .iter()
        .enumerate()
        .map(|(index, socket)| {
            let (from, to) = (socket.as_raw_fd(), index + 3);
            format!("exec {to}<&{from} {from}<&-")
        })
        .collect();
    let script = format!(
        "{}\nLISTEN_PID=$$ LISTEN_FDS={} exec {BINARY} \"$@\"",
        moves.join("\n"),
        sockets.len()
    );
    Running::start_by(Path::new("bash"), &["-c", &script, "proxy"], folder)
}

pub(crate) fn run(folder: &TempDir, arguments: &[&str]) -> Output {
    Process::new(BINARY)
        .current_dir(folder.path())
        .args(arguments)
        .output()
        .unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The number of the process that answers on a control socket.
pub(crate) fn serving(control: &Path) -> Option<u32> {
    let mut client = ControlClient::connect(control).ok()?;
    match client.process(&ProcessCommand::Process).ok()? {
        ProcessAnswer::Process(process) => Some(process.pid),
        other => panic!("{other:?}"),
    }
}

/// What a client does after an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Habit {
    Stays,
    Leaves,
}

/// Clients on connections they keep, asking without pause. Any answer but a good one, or none, is a failure.
pub(crate) struct Crowd {
    enough: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

impl Crowd {
    pub(crate) fn gather(count: usize, address: SocketAddr) -> Self {
        Self::of(count, address, Habit::Stays)
    }

    /// The same with a connection for each request.
    pub(crate) fn coming_and_going(count: usize, address: SocketAddr) -> Self {
        Self::of(count, address, Habit::Leaves)
    }

    fn of(count: usize, address: SocketAddr, habit: Habit) -> Self {
        let (enough, answered) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let client = |number: usize| {
            let (enough, answered) = (Arc::clone(&enough), Arc::clone(&answered));
            std::thread::spawn(move || ask_on(number, address, habit, &enough, &answered))
        };
        Self {
            clients: (0..count).map(client).collect(),
            enough,
            answered,
        }
    }

    /// Waits until so many more requests were answered.
    pub(crate) fn until_answered(&self, more: u64) {
        let wanted = self.answered.load(Ordering::Relaxed) + more;
        while self.answered.load(Ordering::Relaxed) < wanted {
            assert!(
                !self.clients.iter().any(JoinHandle::is_finished),
                "a client failed"
            );
            std::thread::yield_now();
        }
    }

    /// Sends everybody home; how many requests were answered, all of them well.
    pub(crate) fn disperse(self) -> u64 {
        self.enough.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().unwrap();
        }
        self.answered.load(Ordering::Relaxed)
    }
}

fn ask_on(
    number: usize,
    address: SocketAddr,
    habit: Habit,
    enough: &AtomicBool,
    answered: &AtomicU64,
) {
    let mut peer = Peer::connect(address);
    let mut asked = 0;
    while !enough.load(Ordering::Relaxed) {
        asked += 1;
        let path = format!("/{number}/{asked}");
        let message = if asked % 2 == 0 {
            peer.get(&path).message()
        } else {
            peer.post(&path, "x").message()
        };
        assert_eq!(message.status(), 200, "{message:?}");
        assert!(message.body.contains(&path), "{message:?}");
        answered.fetch_add(1, Ordering::Relaxed);
        if habit == Habit::Leaves || message.field("Connection") == Some("close") {
            peer = Peer::connect(address);
        }
    }
}
