//! A client process: thousands of connections on one thread, each a small task. It connects, sends and leaves when it
//! is told to on standard input, says on standard output when it has, and hands over its notes in the end.
//!
//! A request is sent once, whatever comes of it: only the proxy could double it.

mod dial;
mod http1;
mod http2;
mod http3;
mod notes;
mod raw;

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{JoinSet, LocalSet, spawn_local};

use crate::bench::hold::plan::{First, Group, Kind, Manner, Method, Plan, Posts, Wave};
use dial::{Config, Wire};
use notes::{Notes, Place};

/// Commands that wait for the one before them.
const COMMANDS_MAX: usize = 8;
/// Pause of a client that never pauses, after a failure, in milliseconds: a proxy that refuses everything would be
/// asked as fast as we can.
const AFTER_FAULT_MS: u64 = 20;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("HTTP/2: {0}")]
    H2(#[from] h2::Error),
    #[error("HTTP/3: {0}")]
    H3(#[from] h3::error::StreamError),
    #[error("QUIC: {0}")]
    Quic(String),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("closed in the middle of an exchange")]
    Closed,
    #[error("not an HTTP answer")]
    Malformed,
    #[error("status {0}")]
    Status(u16),
    #[error("an answer that is somebody else's")]
    Foreign,
}

/// How far a process has been told to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Ready,
    Send,
    More,
    Stop,
    Leave,
}

/// What all connections of a process share.
struct Crowd {
    notes: Notes,
    phase: watch::Receiver<Phase>,
    at_once: Semaphore,
    config: Config,
    /// Something was connected, sent or ended.
    moved: Notify,
}

/// Does what `plan` and standard input say, until the latter ends.
///
/// # Errors
/// When the system gives no threads, or TLS cannot be set up.
pub fn run(plan: &Plan) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (tell, told) = mpsc::channel(COMMANDS_MAX);
    std::thread::Builder::new()
        .name("commands".into())
        .spawn(move || {
            for line in io::stdin().lock().lines().map_while(Result::ok) {
                if tell.blocking_send(line).is_err() {
                    break;
                }
            }
        })?;
    LocalSet::new().block_on(&runtime, obey(plan, told))
}

async fn obey(plan: &Plan, mut told: mpsc::Receiver<String>) -> io::Result<()> {
    let (set, phase) = watch::channel(Phase::Ready);
    let crowd = Rc::new(Crowd {
        notes: Notes::new(plan.process),
        phase,
        at_once: Semaphore::new(plan.at_once),
        config: Config::new(&plan.groups).map_err(io::Error::other)?,
        moved: Notify::new(),
    });
    let wanted = |wave| -> usize { plan.groups.iter().map(|group| group.requests(wave)).sum() };
    while let Some(command) = told.recv().await {
        match command.as_str() {
            "connect" => {
                let count = gather(plan, &crowd);
                crowd
                    .until(|notes| notes.connected() + notes.unconnected() >= count)
                    .await;
            }
            "send" => {
                set.send_replace(Phase::Send);
                let count = wanted(Wave::Held);
                crowd.until(|notes| notes.sent(Wave::Held, count)).await;
            }
            "more" => {
                set.send_replace(Phase::More);
                let count = wanted(Wave::More);
                crowd.until(|notes| notes.sent(Wave::More, count)).await;
            }
            "settle" => crowd.until(|notes| notes.open() == 0).await,
            "stop" => {
                set.send_replace(Phase::Stop);
                crowd.until(|notes| notes.open() == 0).await;
            }
            "leave" => {
                set.send_replace(Phase::Leave);
                crowd.until(|notes| notes.open() == 0).await;
                crowd.config.close();
            }
            "report" => {}
            other => return Err(io::Error::other(format!("no such command: {other}"))),
        }
        let mut out = io::stdout().lock();
        if command == "report" {
            writeln!(out, "{}", serde_json::to_string(&crowd.notes.told())?)?;
        } else {
            writeln!(out, "{command} {}", crowd.notes.sums())?;
        }
        out.flush()?;
    }
    Ok(())
}

/// Starts all connections, and says how many.
fn gather(plan: &Plan, crowd: &Rc<Crowd>) -> usize {
    let mut number = 0;
    for group in &plan.groups {
        for _ in 0..group.connections {
            let (crowd, group) = (Rc::clone(crowd), *group);
            spawn_local(async move {
                let mut phase = crowd.phase.clone();
                tokio::select! {
                    () = live(&crowd, &group, number) => {}
                    _ = phase.wait_for(|phase| *phase == Phase::Leave) => {}
                }
            });
            number += 1;
        }
    }
    number as usize
}

/// A connection from its beginning to its end.
async fn live(crowd: &Rc<Crowd>, group: &Group, number: u32) {
    let mut talk = {
        let _permit = crowd.at_once.acquire().await;
        let opened = Talk::open(crowd, group, number).await;
        match opened {
            Ok(mut talk) => {
                if group.first == First::Ask {
                    talk.ask(Wave::First, 1).await;
                }
                crowd.note(Notes::connects);
                talk
            }
            Err(fault) => {
                for wave in [Wave::First, Wave::Held, Wave::More] {
                    let unsent = group.requests(wave) / group.connections.max(1);
                    crowd.notes.unsent(group.kind, number, wave, unsent);
                }
                crowd.note(|notes| notes.fails_to_connect(&fault));
                return;
            }
        }
    };
    crowd.told(Phase::Send).await;
    if group.manner == Manner::Steady {
        return talk.steady().await;
    }
    talk.begin(Wave::Held, group.streams).await;
    if group.more > 0 {
        crowd.told(Phase::More).await;
        talk.begin(Wave::More, group.more).await;
    }
    talk.finish().await;
    // The connection stays until the process ends: closing thousands at once would disturb what is measured.
    std::future::pending::<()>().await;
}

/// One connection and what it has asked.
struct Talk<'c> {
    crowd: &'c Rc<Crowd>,
    group: &'c Group,
    number: u32,
    asked: usize,
    way: Way,
    streams: JoinSet<bool>,
}

/// What carries its requests.
enum Way {
    /// One after the other.
    Single(Option<Wire>),
    /// As streams of one connection.
    H2(http2::Connection),
    /// The same over QUIC.
    H3(http3::Connection),
}

impl<'c> Talk<'c> {
    async fn open(crowd: &'c Rc<Crowd>, group: &'c Group, number: u32) -> Result<Self, Fault> {
        let way = match group.kind {
            Kind::Clear | Kind::Tls | Kind::Websocket | Kind::Tcp => {
                Way::Single(Some(dial::wire(&crowd.config, group).await?))
            }
            Kind::H2 => {
                let wire = dial::wire(&crowd.config, group).await?;
                Way::H2(http2::Connection::open(wire).await?)
            }
            Kind::H3 => Way::H3(http3::Connection::open(&crowd.config, group.address).await?),
        };
        Ok(Self {
            crowd,
            group,
            number,
            asked: 0,
            way,
            streams: JoinSet::new(),
        })
    }

    fn method(&mut self) -> Method {
        self.asked += 1;
        match self.group.posts {
            // An upgrade is always a GET.
            _ if self.group.kind == Kind::Websocket => Method::Get,
            Posts::All => Method::Post,
            Posts::Half if (self.asked + self.number as usize).is_multiple_of(2) => Method::Post,
            Posts::Half => Method::Get,
        }
    }

    /// Sends `count` requests, waits for all their answers, and says whether all were good.
    async fn ask(&mut self, wave: Wave, count: usize) -> bool {
        self.begin(wave, count).await & self.finish().await
    }

    /// Sends `count` requests. A connection that carries one at a time has its answer then, the others go on.
    async fn begin(&mut self, wave: Wave, count: usize) -> bool {
        let mut well = true;
        for _ in 0..count {
            let method = self.method();
            let place = Place::new(self.crowd, self.group.kind, self.number, wave, method);
            match &mut self.way {
                Way::Single(wire) => {
                    *wire = single(self.crowd, self.group, &place, wire.take()).await;
                    well &= place.is_good();
                }
                Way::H2(connection) => {
                    let connection = connection.clone();
                    self.streams.spawn_local(async move {
                        place.end(connection.exchange(&place).await);
                        place.is_good()
                    });
                }
                Way::H3(connection) => {
                    let connection = connection.clone();
                    self.streams.spawn_local(async move {
                        place.end(connection.exchange(&place).await);
                        place.is_good()
                    });
                }
            }
        }
        well
    }

    /// Waits for the answers that are still to come.
    async fn finish(&mut self) -> bool {
        let mut well = true;
        while let Some(ended) = self.streams.join_next().await {
            well &= ended.unwrap_or(false);
        }
        well
    }

    /// Asks without a pause until told to stop; a connection that broke is opened anew.
    async fn steady(&mut self) {
        let mut usable = true;
        while *self.crowd.phase.borrow() < Phase::Stop {
            if usable {
                usable = self.ask(Wave::Steady, 1).await;
                continue;
            }
            match Self::open(self.crowd, self.group, self.number).await {
                Ok(again) => (self.way, usable) = (again.way, true),
                Err(fault) => {
                    self.crowd.note(|notes| notes.fault(&fault));
                    tokio::time::sleep(Duration::from_millis(AFTER_FAULT_MS)).await;
                }
            }
        }
    }
}

/// One exchange on a connection that carries one at a time, a new one where the last exchange used it up; gives the
/// connection back if it may be used again.
async fn single(crowd: &Crowd, group: &Group, place: &Place, wire: Option<Wire>) -> Option<Wire> {
    let opened = match wire {
        Some(wire) => Ok(wire),
        None => dial::wire(&crowd.config, group).await,
    };
    let mut wire = match opened {
        Ok(wire) => wire,
        Err(fault) => {
            place.end(Err(fault));
            return None;
        }
    };
    let ended = match group.kind {
        Kind::Tcp => raw::exchange(&mut wire, place).await.map(|()| 200),
        Kind::Websocket => http1::upgrade(&mut wire, place).await,
        _ => http1::exchange(&mut wire, place, group.redirects).await,
    };
    // What is behind an upgrade, and a raw connection, is over with its answer.
    let is_over = matches!(group.kind, Kind::Tcp | Kind::Websocket) || ended.is_err();
    place.end(ended);
    (!is_over).then_some(wire)
}

impl Crowd {
    fn note(&self, what: impl FnOnce(&Notes)) {
        what(&self.notes);
        self.moved.notify_one();
    }

    async fn until(&self, done: impl Fn(&Notes) -> bool) {
        while !done(&self.notes) {
            self.moved.notified().await;
        }
    }

    async fn told(&self, wanted: Phase) {
        let mut phase = self.phase.clone();
        // The sender lives as long as the process.
        let _ = phase.wait_for(|phase| *phase >= wanted).await;
    }
}

async fn connect(address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_nodelay(true)?;
    socket.connect(address).await
}
