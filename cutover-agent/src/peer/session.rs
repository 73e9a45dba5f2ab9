//! The connecting side: opens control and data streams, numbers the requests, notices a dead peer.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::hello::{self, Hello, Purpose, Refusal, SessionId, VERSION, Welcome};
use super::message::{self, Inbox, Message, Outbox, Topic};
use super::pace::{PIECE_BYTES, Pace};
use super::priority::{Priority, Sockets};
use super::socket::{self, Load};
use super::{Parcel, PeerError, PeerTimeouts, Queue};
use crate::tls::{self, ClientTls};
use crate::transfer::{Gauge, Look, Sender};

/// Frames that may wait for a stream, each at most 1 MiB: enough for the streams not to starve, little memory.
const QUEUED_FRAMES: usize = 16;
/// How long to wait before a broken session is tried to be taken up once more.
const REVIVE_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait before asking again a peer that is still busy with a dying session.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// An open session with a peer. Dropping it closes every connection.
#[derive(Debug)]
pub struct Session {
    door: Door,
    current: Mutex<Connection>,
    /// Held by whoever takes the session up again; tells whether that was tried for long enough, in vain.
    reviving: tokio::sync::Mutex<Patience>,
    pub(crate) sender: Sender,
}

/// How long a broken session is tried to be taken up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// As long as its timeouts say.
    Whole,
    /// Just once: whoever undoes a hop asks for many things, and must not wait for each of them as long.
    Spent,
}

/// Where a session leads, and how to get in.
#[derive(Debug)]
struct Door {
    addr: SocketAddr,
    tls: ClientTls,
    timeouts: PeerTimeouts,
    streams: u16,
}

/// All connections of a session, until one of them breaks.
#[derive(Debug)]
struct Connection {
    id: SessionId,
    link: Arc<Link>,
    // Aborts its tasks when dropped.
    _tasks: JoinSet<()>,
}

/// What everything on a session shares.
#[derive(Debug)]
pub(crate) struct Link {
    outbox: Outbox,
    numbers: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Message>>>,
    lost: watch::Sender<Option<String>>,
    /// Encoded data frames on their way to whichever stream has room.
    pub(crate) frames: Queue<Parcel>,
    /// Bytes that the data streams have taken.
    pub(crate) bytes_sent: AtomicU64,
    /// How strongly frames are packed.
    pub(crate) gauge: Gauge,
    streams: usize,
    pace: Pace,
    sockets: Sockets,
    dead_after: Duration,
}

/// Connects to an agent: one control connection and `streams` data connections (1 to [`super::STREAMS_MAX`]).
///
/// # Errors
/// When nobody listens there, certificates do not fit, versions differ, another session is in charge, or
/// `timeouts.connect` is over.
pub async fn connect(
    addr: SocketAddr,
    tls: ClientTls,
    timeouts: PeerTimeouts,
    streams: u16,
) -> Result<Session, PeerError> {
    let door = Door {
        addr,
        tls,
        timeouts,
        streams,
    };
    let connection = door.open(None).await?;
    Ok(Session {
        door,
        current: Mutex::new(connection),
        reviving: tokio::sync::Mutex::new(Patience::Whole),
        sender: Sender::default(),
    })
}

impl Door {
    async fn open(&self, instead_of: Option<SessionId>) -> Result<Connection, PeerError> {
        let limit = self.timeouts.connect;
        tokio::time::timeout(limit, self.enter(instead_of))
            .await
            .map_err(|_| PeerError::Deadline {
                what: "connecting",
                limit,
            })?
    }

    async fn enter(&self, instead_of: Option<SessionId>) -> Result<Connection, PeerError> {
        let id: SessionId = u128::from_le_bytes(random()?);
        // All at once: the other side lets streams wait for their session.
        let mut dialling = JoinSet::new();
        for index in 0..self.streams {
            let (addr, tls, dead_after) = (self.addr, self.tls.clone(), self.timeouts.dead_after);
            let hello = greeting(id, Purpose::Data { index });
            dialling.spawn(async move { dial(addr, &tls, dead_after, hello).await });
        }
        let started = Instant::now();
        let control = loop {
            let purpose = Purpose::Control {
                streams: self.streams,
                dead_after_ms: hello::milliseconds(self.timeouts.dead_after),
                instead_of,
            };
            let hello = greeting(id, purpose);
            match dial(self.addr, &self.tls, self.timeouts.dead_after, hello).await {
                Err(PeerError::Refused {
                    refusal: Refusal::Busy,
                    ..
                }) if started.elapsed() < self.timeouts.connect / 2 => {
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                other => break other?,
            }
        };
        Ok(Connection::start(
            id,
            control,
            (self.streams, dialling),
            self.timeouts,
        ))
    }
}

const fn greeting(session: SessionId, purpose: Purpose) -> Hello {
    Hello {
        version: VERSION,
        session,
        purpose,
    }
}

/// Data streams on their way.
type Dialling = JoinSet<Result<TlsStream<TcpStream>, PeerError>>;

/// Writes to each data stream from when it is there: on a lossy path some greetings take a second longer than others. One
/// that cannot be had ends the session.
async fn attach(link: Arc<Link>, mut dialling: Dialling, limit: Duration) {
    let mut writers = JoinSet::new();
    let attaching = async {
        while let Some(dialled) = dialling.join_next().await {
            match dialled {
                Ok(Ok(stream)) => {
                    link.sockets.add(stream.get_ref().0, Load::Bulk);
                    writers.spawn(write_data(Arc::clone(&link), stream))
                }
                Ok(Err(error)) => return Err(error.to_string()),
                Err(error) => return Err(error.to_string()),
            };
        }
        Ok(())
    };
    let attached = tokio::time::timeout(limit, attaching).await;
    let late = || {
        let seconds = limit.as_secs();
        Err(format!(
            "not every data stream could be opened within {seconds} s"
        ))
    };
    if let Err(reason) = attached.unwrap_or_else(|_| late()) {
        link.lose(reason);
    }
    while writers.join_next().await.is_some() {}
}

async fn dial(
    addr: SocketAddr,
    tls: &ClientTls,
    dead_after: Duration,
    hello: Hello,
) -> Result<TlsStream<TcpStream>, PeerError> {
    let failed = |source| PeerError::Connect { addr, source };
    let stream = TcpStream::connect(addr).await.map_err(failed)?;
    socket::prepare(&stream, dead_after).map_err(failed)?;
    let expected = tls.expected.to_str().into_owned();
    let blame = |source: std::io::Error| match tls::explain(&source, &expected) {
        Some(source) => PeerError::Tls { addr, source },
        None => PeerError::Greeting {
            addr,
            source: source.into(),
        },
    };
    let connector = TlsConnector::from(Arc::clone(&tls.config));
    let mut stream = connector
        .connect(tls.expected.clone(), stream)
        .await
        .map_err(blame)?;
    // In TLS 1.3 the peer's verdict on our certificate arrives after our side of the handshake is done.
    let welcome = async {
        hello::send(&mut stream, &hello).await?;
        hello::receive::<Welcome, _>(&mut stream).await
    };
    match welcome.await {
        Ok(Welcome::Accepted) => Ok(stream),
        Ok(Welcome::Refused(refusal)) => Err(PeerError::Refused { addr, refusal }),
        Err(super::FrameError::Broken(source)) => Err(blame(source)),
        Err(source) => Err(PeerError::Greeting { addr, source }),
    }
}

fn random() -> Result<[u8; 16], PeerError> {
    let mut bytes = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| PeerError::Lost {
            reason: "the system has no random numbers".into(),
        })?;
    Ok(bytes)
}

impl Connection {
    fn start(
        id: SessionId,
        control: TlsStream<TcpStream>,
        (streams, dialling): (u16, Dialling),
        timeouts: PeerTimeouts,
    ) -> Self {
        let (outbox, pending) = message::outbox();
        let link = Arc::new(Link {
            outbox,
            numbers: AtomicU64::new(1),
            waiting: Mutex::default(),
            lost: watch::Sender::new(None),
            frames: Queue::bounded(QUEUED_FRAMES),
            bytes_sent: AtomicU64::new(0),
            gauge: Gauge::new(),
            streams: usize::from(streams),
            pace: Pace::default(),
            sockets: Sockets::default(),
            dead_after: timeouts.dead_after,
        });
        link.sockets.add(control.get_ref().0, Load::Control);
        let mut tasks = JoinSet::new();
        let (read, mut write) = tokio::io::split(control);
        tasks.spawn(read_control(Arc::clone(&link), read));
        tasks.spawn(beat(Arc::clone(&link)));
        let writing = Arc::clone(&link);
        tasks.spawn(async move {
            let outcome = message::write(pending, &mut write).await;
            writing.lose(
                outcome
                    .err()
                    .map_or_else(|| "closed by us".into(), |error| error.to_string()),
            );
        });
        tasks.spawn(attach(Arc::clone(&link), dialling, timeouts.connect));
        Self {
            id,
            link,
            _tasks: tasks,
        }
    }
}

impl Session {
    /// What carries requests and frames of this session now.
    pub(crate) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.current().link)
    }

    fn current(&self) -> MutexGuard<'_, Connection> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the session up again if its connections broke, within `resume_within` of its timeouts; when that was in
    /// vain, each later call tries once. Nothing that was under way is repeated by this.
    ///
    /// # Errors
    /// When the time is over (or zero), or the other side does not want us any more: then what was noticed first.
    pub async fn revive(&self) -> Result<(), PeerError> {
        let mut patience = self.reviving.lock().await;
        let (id, link) = {
            let current = self.current();
            (current.id, Arc::clone(&current.link))
        };
        if link.is_alive() {
            return Ok(());
        }
        let resume_within = self.door.timeouts.resume_within;
        let deadline = Instant::now() + resume_within;
        let mut may_try = !resume_within.is_zero();
        while may_try {
            match self.door.open(Some(id)).await {
                Ok(connection) => {
                    self.take_over(connection);
                    *patience = Patience::Whole;
                    tracing::info!(reason = %link.lost_error(), "the session was taken up again");
                    return Ok(());
                }
                Err(error) if error.may_pass() => {
                    tracing::debug!(%error, "the session cannot be taken up yet");
                    tokio::time::sleep(REVIVE_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
            may_try = *patience == Patience::Whole && Instant::now() < deadline;
        }
        *patience = Patience::Spent;
        Err(link.lost_error())
    }

    /// Puts new connections in the place of the old ones, with what was set for those.
    fn take_over(&self, connection: Connection) {
        let mut current = self.current();
        connection.link.pace.set(current.link.pace.limit());
        connection.link.sockets.set(current.link.sockets.priority());
        *current = connection;
    }

    /// How long a round trip takes now: the best of `times` (at least one), each at most `limit`.
    ///
    /// # Errors
    /// When the time is over or the session lost.
    pub async fn round_trip(&self, times: u32, limit: Duration) -> Result<Duration, PeerError> {
        let (mut best, link) = (Duration::MAX, self.link());
        for _ in 0..times.max(1) {
            let start = Instant::now();
            link.ask(Topic::Ping, Vec::new(), "a sign of life", limit)
                .await?;
            best = best.min(start.elapsed());
        }
        Ok(best)
    }

    /// Bounds what all streams together send from now on, in bytes a second; nothing means no bound. Requests and lists
    /// on the control connection are not counted.
    pub fn limit_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.current().link.pace.set(bytes_per_second);
    }

    /// Says how much what is sent from now on matters beside other traffic, also over connections that are opened later.
    pub fn set_priority(&self, priority: Priority) {
        self.current().link.sockets.set(priority);
    }

    /// Waits until the connections of now are lost, and says why.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn lost(&self) -> String {
        self.link().lost().await
    }

    /// Whether nothing is known to be wrong with the session.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.link().is_alive()
    }
}

impl Link {
    /// Sends a request and waits for what comes back under its number.
    pub(crate) async fn ask(
        &self,
        topic: Topic,
        bytes: Vec<u8>,
        what: &'static str,
        limit: Duration,
    ) -> Result<Message, PeerError> {
        let number = self.number();
        let answer = self.expect(number);
        tokio::time::timeout(limit, async {
            self.tell(topic, number, &bytes).await?;
            self.answer(answer).await
        })
        .await
        .map_err(|_| PeerError::Deadline { what, limit })?
    }

    /// What the streams look like to somebody with a frame in hand.
    pub(crate) fn look(&self) -> Look {
        Look {
            idle: self.frames.idle(),
            streams: self.streams,
            is_backlog: self.frames.is_backlog(),
            sent: self.bytes_sent.load(Ordering::Relaxed),
        }
    }

    /// Writes a frame at the pace that is set, and counts it.
    async fn write<W: AsyncWriteExt + Unpin>(
        &self,
        stream: &mut W,
        frame: &Parcel,
    ) -> std::io::Result<()> {
        for mut rest in frame.parts() {
            while self.pace.is_set() && !rest.is_empty() {
                let (piece, next) = rest.split_at(rest.len().min(PIECE_BYTES));
                self.pace.take(piece.len()).await;
                stream.write_all(piece).await?;
                rest = next;
            }
            stream.write_all(rest).await?;
        }
        stream.flush().await?;
        self.bytes_sent
            .fetch_add(frame.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Books a place for the answer to `number`; dropped, the answer is thrown away.
    pub(crate) fn expect(&self, number: u64) -> Booking<'_> {
        let (tx, rx) = oneshot::channel();
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(number, tx);
        Booking {
            link: self,
            number,
            answer: rx,
        }
    }

    pub(crate) async fn tell(
        &self,
        topic: Topic,
        number: u64,
        bytes: &[u8],
    ) -> Result<(), PeerError> {
        tokio::select! {
            sent = self.outbox.send(topic, number, bytes) => match sent {
                true => Ok(()),
                false => Err(self.lost_error()),
            },
            reason = self.lost() => Err(PeerError::Lost { reason }),
        }
    }

    /// Says something without waiting, from where nobody can wait. When not even that is possible the connection is
    /// stuck, and the session ends: the peer must not go on with what was meant to be given up.
    pub(crate) fn farewell(&self, topic: Topic, number: u64, bytes: &[u8]) {
        if !self.outbox.offer(topic, number, bytes) {
            self.lose("the control connection is stuck".into());
        }
    }

    pub(crate) async fn answer(&self, mut booking: Booking<'_>) -> Result<Message, PeerError> {
        tokio::select! {
            answer = &mut booking.answer => answer.map_err(|_| self.lost_error()),
            reason = self.lost() => Err(PeerError::Lost { reason }),
        }
    }

    /// Whether nothing is known to be wrong.
    pub(crate) fn is_alive(&self) -> bool {
        self.lost.borrow().is_none()
    }

    pub(crate) fn lost_error(&self) -> PeerError {
        let reason = self
            .lost
            .borrow()
            .clone()
            .unwrap_or_else(|| "the connection is closing".into());
        PeerError::Lost { reason }
    }

    async fn lost(&self) -> String {
        let mut watching = self.lost.subscribe();
        match watching.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the session was closed".into(),
        }
    }

    fn lose(&self, reason: String) {
        let is_first = self.lost.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(reason);
            is_first
        });
        if is_first {
            self.frames.close();
            self.sockets.close();
            self.waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.lose("the session was closed by us".into());
    }
}

/// A place kept for an answer.
pub(crate) struct Booking<'a> {
    link: &'a Link,
    number: u64,
    answer: oneshot::Receiver<Message>,
}

impl Drop for Booking<'_> {
    fn drop(&mut self) {
        self.link
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}

async fn read_control(link: Arc<Link>, mut stream: ReadHalf<TlsStream<TcpStream>>) {
    let mut inbox = Inbox::default();
    let reason = loop {
        match tokio::time::timeout(link.dead_after, inbox.next(&mut stream)).await {
            Err(_) => break format!("no sign of life for {} ms", link.dead_after.as_millis()),
            Ok(Err(error)) => break error.to_string(),
            Ok(Ok(None)) => break "the peer closed the connection".into(),
            Ok(Ok(Some(message))) => {
                let waiting = link
                    .waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&message.number);
                if let Some(waiting) = waiting {
                    // Whoever asked may have given up meanwhile.
                    let _ = waiting.send(message);
                }
            }
        }
    };
    link.lose(reason);
}

async fn beat(link: Arc<Link>) {
    let mut ticks = tokio::time::interval(link.dead_after / 3);
    loop {
        ticks.tick().await;
        link.outbox.offer(Topic::Beat, 0, &[]);
    }
}

async fn write_data(link: Arc<Link>, stream: TlsStream<TcpStream>) {
    let (mut read, mut write): (ReadHalf<_>, WriteHalf<_>) = tokio::io::split(stream);
    let writing = async {
        while let Some(frame) = link.frames.pop().await {
            link.write(&mut write, &frame).await?;
        }
        write.shutdown().await
    };
    let mut nothing = [0; 1];
    // The peer never speaks on a data stream: whatever can be read is its end.
    let reason = tokio::select! {
        outcome = writing => outcome.err().map_or_else(|| "closed by us".into(), |error| error.to_string()),
        outcome = read.read(&mut nothing) => match outcome {
            Err(error) => error.to_string(),
            Ok(_) => "the peer closed a data stream".into(),
        },
    };
    link.lose(reason);
}
