//! A proxy that is killed (SIGKILL) while it holds, at any moment, under load, with its sockets kept by a parent: it
//! comes back holding, nothing is executed twice, and whoever comes meanwhile waits and is never refused.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use cutover_protocol::hold::{Claim, Command, Gate, Order, ServiceStatus};
use cutover_protocol::id::{Epoch, Register, Site};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{Running, activate, pass};
use crate::seed::Seed;
use crate::world::{Control, Origin, PATIENCE, Peer, Plan, Stage, done, hold, web};

const KILLS: usize = 20;
const CLIENTS: usize = 8;

/// Clients that ask with a new id each time, also after a connection that broke: only they could ask twice.
struct Load {
    enough: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn begin(address: SocketAddr) -> Self {
        let (enough, answered) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let client = |number: usize| {
            let (enough, answered) = (Arc::clone(&enough), Arc::clone(&answered));
            thread::spawn(move || ask_on(number, address, &enough, &answered))
        };
        Self {
            clients: (0..CLIENTS).map(client).collect(),
            enough,
            answered,
        }
    }

    fn until_answered(&self, more: u64) {
        let wanted = self.answered.load(Ordering::Relaxed) + more;
        while self.answered.load(Ordering::Relaxed) < wanted {
            assert!(
                !self.clients.iter().any(JoinHandle::is_finished),
                "a client failed"
            );
            thread::yield_now();
        }
    }

    /// Ids that were answered, all of them well.
    fn end(self) -> Vec<String> {
        self.enough.store(true, Ordering::Relaxed);
        let clients = self.clients.into_iter();
        clients.flat_map(|client| client.join().unwrap()).collect()
    }
}

fn ask_on(
    number: usize,
    address: SocketAddr,
    enough: &AtomicBool,
    answered: &AtomicU64,
) -> Vec<String> {
    let mut good = Vec::new();
    let mut connection: Option<BufReader<TcpStream>> = None;
    for turn in 0.. {
        if enough.load(Ordering::Relaxed) {
            break;
        }
        // The kernel keeps a place for everybody, whether a proxy runs or not.
        let stream = connection.take().unwrap_or_else(|| {
            let stream = TcpStream::connect(address).expect("a new client was refused");
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            BufReader::new(stream)
        });
        let id = format!("{number}-{turn}");
        if let Some(kept) = ask(stream, &id) {
            connection = Some(kept);
            good.push(id);
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
    good
}

/// `None` when the connection breaks, which happens to those whom the killed proxy had accepted.
fn ask(mut stream: BufReader<TcpStream>, id: &str) -> Option<BufReader<TcpStream>> {
    let request = format!("POST /{id} HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx");
    stream.get_mut().write_all(request.as_bytes()).ok()?;
    let (mut line, mut length) = (String::new(), 0);
    stream
        .read_line(&mut line)
        .ok()
        .filter(|count| *count > 0)?;
    assert_eq!(line.trim_end(), "HTTP/1.1 200 OK", "{id} was refused");
    loop {
        line.clear();
        stream
            .read_line(&mut line)
            .ok()
            .filter(|count| *count > 0)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(stream)
}

/// When, in a hold, the proxy is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// So many are held.
    Held(u64),
    /// The hold is known to stand; whoever is in flight may still be.
    Begun,
    /// A renewal is on its way.
    Renewing,
    /// The commit is on its way: it may be durable or not.
    Committing,
}

impl Moment {
    fn of(seed: &mut Seed) -> Self {
        match seed.below(6) {
            0 => Self::Begun,
            1 => Self::Renewing,
            2 => Self::Committing,
            _ => Self::Held(1 + seed.below(CLIENTS as u64)),
        }
    }
}

fn order(command: Command) -> Order {
    Order {
        claim: Claim::Holder("hop-9".parse().unwrap()),
        command,
    }
}

/// Says a command and does not wait for what comes of it.
fn blurt(folder: &TempDir, command: Command) -> UnixStream {
    let mut stream = UnixStream::connect(folder.path().join("control.sock")).unwrap();
    let mut line = serde_json::to_vec(&order(command)).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    stream
}

const fn other(site: Site) -> Site {
    match site {
        Site::Source => Site::Target,
        Site::Target => Site::Source,
    }
}

/// Holds, and returns at the moment of the kill.
fn hold_until(folder: &TempDir, moment: Moment, before: Register) {
    let Register { epoch, owner } = before;
    let mut control = Control::connect(folder);
    let service = web();
    if moment == Moment::Begun {
        let _unanswered = blurt(folder, hold(epoch, 60_000, 20_000));
        while control.status().gate == Gate::Open {}
        return;
    }
    done(control.order(&order(hold(epoch, 60_000, 20_000))));
    match moment {
        Moment::Begun => {}
        Moment::Held(count) => while control.status().held_now < count {},
        Moment::Renewing => drop(blurt(
            folder,
            Command::Renew {
                service,
                epoch,
                lease_ms: 50_000,
            },
        )),
        Moment::Committing => {
            let to = other(owner);
            drop(blurt(folder, Command::Commit { service, epoch, to }));
        }
    }
}

fn came_back(status: &ServiceStatus, moment: Moment, before: Register) {
    assert_eq!(status.gate, Gate::Holding, "{moment:?}: {status:?}");
    assert_eq!(
        status.held_since,
        Some(before.epoch),
        "{moment:?}: {status:?}"
    );
    assert_eq!(status.holder.as_ref().unwrap().as_str(), "hop-9");
    assert!(status.lease_ms_left.unwrap() > 30_000, "{status:?}");
    let committed = Register {
        epoch: before.epoch.next(),
        owner: other(before.owner),
    };
    let may_be_committed = moment == Moment::Committing && status.register == committed;
    assert!(
        status.register == before || may_be_committed,
        "{moment:?}: {status:?}"
    );
}

/// Goes on where the register is.
fn release(folder: &TempDir, status: &ServiceStatus, seed: &mut Seed) {
    let mut control = Control::connect(folder);
    let mut register = status.register;
    if status.is_undecided() {
        let (service, Register { epoch, owner }) = (web(), register);
        let decision = match seed.below(2) {
            0 => Command::Abort { service, epoch },
            _ => Command::Commit {
                service,
                epoch,
                to: other(owner),
            },
        };
        register = done(control.order(&order(decision))).register;
    }
    done(control.order(&order(Command::Release {
        service: web(),
        epoch: register.epoch,
        to: register.owner,
    })));
}

#[test]
fn a_proxy_killed_twenty_times_while_holding_loses_no_newcomer_and_doubles_nothing() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    let path = Plan::new(source.address(), target.address()).write(&folder);
    let listener = Stage::new();
    let text = std::fs::read_to_string(&path).unwrap();
    let address = listener.address().to_string();
    std::fs::write(&path, text.replace("127.0.0.1:0", &address)).unwrap();
    let start = || -> Running {
        let given = [pass(listener.listener())];
        activate(&folder, &given)
    };
    let mut seed = Seed::new(9);
    let mut running = start();
    let load = Load::begin(listener.address());
    for kill in 0..KILLS {
        load.until_answered(50);
        let before = Control::connect(&folder).status().register;
        let moment = Moment::of(&mut seed);
        hold_until(&folder, moment, before);
        running.signal(Signal::KILL);
        running.child.wait().unwrap();
        // Comes while nobody is there, and waits.
        let mut newcomer = Peer::connect(listener.address());
        newcomer.post(&format!("/new-{kill}"), "x");
        drop(running);
        running = start();
        let status = Control::connect(&folder).status();
        came_back(&status, moment, before);
        let mut late = Peer::connect(listener.address());
        late.post(&format!("/late-{kill}"), "x");
        release(&folder, &status, &mut seed);
        assert_eq!(newcomer.message().status(), 200);
        assert_eq!(late.message().status(), 200);
    }
    load.until_answered(50);
    let answered = load.end();
    let mut executed = [source.seen(), target.seen()].concat();
    let count = executed.len();
    executed.sort_unstable();
    executed.dedup();
    assert_eq!(executed.len(), count, "a request was executed twice");
    for id in &answered {
        let line = format!("POST /{id} x");
        assert!(
            executed.binary_search(&line).is_ok(),
            "{id} was answered and not executed"
        );
    }
    let register = Control::connect(&folder).status().register;
    assert!(register.epoch >= Epoch(1 + KILLS as u64), "{register:?}");
}
