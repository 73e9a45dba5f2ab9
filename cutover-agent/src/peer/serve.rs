//! The accepting side: lets one trusted session in at a time, hands its requests to the handler and its trees to the
//! receiver. It never connects anywhere.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::ReadHalf;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::hello::{self, Hello, Purpose, Refusal, SessionId, VERSION, Welcome};
use super::message::{self, Inbox, Message, Outbox, Topic};
use super::{Accept, Channel, FrameError, Part, PeerError, PeerTimeouts, frame, socket};
use crate::memory::PageStore;
use crate::tls::{self, ServerTls};
use crate::transfer::{Known, Receiver, TreeName};

/// Connections that may be greeting at once; more wait in the kernel.
const GREETINGS_MAX: usize = 64;
/// Requests that may wait for the handler.
const CALLS_QUEUED: usize = 64;
/// How long nothing may come on the streams of a session that ended, and nothing be written of what came, before they
/// are given up.
const DRAIN_PAUSE: Duration = Duration::from_secs(1);
/// The most that reading the streams of a session that ended may take: what the kernel holds of them is written within
/// that even to a slow disk, and a peer that goes on sending is not waited for longer.
const DRAIN_MAX: Duration = Duration::from_secs(8);
/// Pause after a failed accept (no descriptors left): the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the accepting agent does with the driver's requests.
pub trait Handler: Send + Sync + 'static {
    /// What the driver asks.
    type Request: DeserializeOwned + Send;
    /// What it gets.
    type Response: Serialize + Send;

    /// Carries out one request. Requests come one at a time, also across sessions: the next one waits.
    fn handle(&self, request: Self::Request) -> impl Future<Output = Self::Response> + Send;

    /// Where pages of memory go; without one a session that sends any is ended.
    fn pages(&self) -> Option<Arc<PageStore>> {
        None
    }

    /// The session ended, for whatever reason; comes after all its requests were handled.
    fn peer_lost(&self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// Where the trees are at this site: by our own configuration only, a peer can never name a path.
pub type Trees = Arc<dyn Fn(&TreeName) -> Option<Folder> + Send + Sync>;

/// The place of a tree.
#[derive(Debug, Clone)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// Folders with files that may be in it as well, such as the layers of an image. Nothing is ever written there.
    pub seeds: Vec<PathBuf>,
}

enum Job {
    Call {
        number: u64,
        bytes: Vec<u8>,
        outbox: Outbox,
    },
    Lost,
}

type Stream = TlsStream<TcpStream>;

/// The session in charge.
#[derive(Clone)]
struct Current {
    id: SessionId,
    streams: mpsc::Sender<Stream>,
    receiver: Arc<Receiver>,
}

struct Server {
    tls: ServerTls,
    timeouts: PeerTimeouts,
    trees: Trees,
    pages: Option<Arc<PageStore>>,
    jobs: mpsc::Sender<Job>,
    /// One permit: the session in charge holds it until its last write is done.
    charge: Arc<Semaphore>,
    current: watch::Sender<Option<Current>>,
    /// What the last session knew of its trees.
    left: Mutex<Option<(SessionId, Known)>>,
}

/// Serves sessions until it is dropped.
///
/// # Errors
/// Never by itself; a failed connection is logged and only ends that connection.
///
/// # Cancel safety
/// Dropping it aborts the handler at its next await and closes all connections.
pub async fn serve<H: Handler>(
    mut listener: impl Accept,
    tls: ServerTls,
    timeouts: PeerTimeouts,
    handler: Arc<H>,
    trees: Trees,
) -> Result<Infallible, PeerError> {
    let (jobs, queue) = mpsc::channel(CALLS_QUEUED);
    let server = Arc::new(Server {
        tls,
        timeouts,
        trees,
        pages: handler.pages(),
        jobs,
        charge: Arc::new(Semaphore::new(1)),
        current: watch::Sender::new(None),
        left: Mutex::new(None),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(work(handler, queue));
    let greetings = Arc::new(Semaphore::new(GREETINGS_MAX));
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(greeting) = Arc::clone(&greetings).acquire_owned().await else {
            continue;
        };
        match listener.accept().await {
            Ok((stream, addr)) => {
                let server = Arc::clone(&server);
                tasks.spawn(async move {
                    if let Err(error) = server.connection(stream, greeting).await {
                        tracing::warn!(%addr, %error, "connection refused");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The only place where the handler runs.
async fn work<H: Handler>(handler: Arc<H>, mut queue: mpsc::Receiver<Job>) {
    while let Some(job) = queue.recv().await {
        match job {
            Job::Lost => handler.peer_lost().await,
            Job::Call {
                number,
                bytes,
                outbox,
            } => {
                let Ok(request) = postcard::from_bytes(&bytes) else {
                    outbox.send(Topic::Unreadable, number, &[]).await;
                    continue;
                };
                let response = handler.handle(request).await;
                let bytes = postcard::to_stdvec(&response).unwrap_or_default();
                // Who asked may be gone; then the answer has no reader, and the request is done all the same.
                outbox.send(Topic::Reply, number, &bytes).await;
            }
        }
    }
}

impl Server {
    async fn connection(
        &self,
        stream: TcpStream,
        greeting: OwnedSemaphorePermit,
    ) -> Result<(), PeerError> {
        let limit = self.timeouts.connect;
        let greeted = tokio::time::timeout(limit, self.greet(stream)).await;
        let (mut stream, hello) = greeted.map_err(|_| PeerError::Deadline {
            what: "the greeting",
            limit,
        })??;
        drop(greeting);
        match hello.purpose {
            Purpose::Data { .. } => self.attach(stream, hello.session).await,
            Purpose::Control {
                dead_after_ms,
                instead_of,
                ..
            } => {
                let dead_after = Duration::from_millis(dead_after_ms);
                self.end(instead_of);
                // A session that just died still has writes to finish.
                let charge =
                    tokio::time::timeout(limit / 4, Arc::clone(&self.charge).acquire_owned()).await;
                let Ok(Ok(charge)) = charge else {
                    return answer(&mut stream, &Welcome::Refused(Refusal::Busy)).await;
                };
                self.control(stream, (hello.session, instead_of), dead_after)
                    .await;
                drop(charge);
                Ok(())
            }
        }
    }

    async fn greet(&self, stream: TcpStream) -> Result<(Stream, Hello), PeerError> {
        let addr = stream
            .peer_addr()
            .map_err(|source| PeerError::Accept { source })?;
        socket::prepare(&stream, self.timeouts.dead_after)
            .map_err(|source| PeerError::Accept { source })?;
        let accepted = TlsAcceptor::from(Arc::clone(&self.tls.config))
            .accept(stream)
            .await;
        let mut stream = accepted.map_err(|source| match tls::explain(&source, "") {
            Some(source) => PeerError::Tls { addr, source },
            None => PeerError::Greeting {
                addr,
                source: source.into(),
            },
        })?;
        let hello: Hello = hello::receive(&mut stream)
            .await
            .map_err(|source| PeerError::Greeting { addr, source })?;
        let refusal = match self.tls.check_role(stream.get_ref().1.peer_certificates()) {
            Err(error) => Some(Refusal::Role(error.to_string())),
            Ok(()) if hello.version != VERSION => Some(Refusal::Version { theirs: VERSION }),
            Ok(()) if !hello.purpose.is_reasonable() => Some(Refusal::Bounds),
            Ok(()) => None,
        };
        match refusal {
            None => Ok((stream, hello)),
            Some(refusal) => {
                answer(&mut stream, &Welcome::Refused(refusal.clone())).await?;
                Err(PeerError::Refused { addr, refusal })
            }
        }
    }

    async fn attach(&self, mut stream: Stream, session: SessionId) -> Result<(), PeerError> {
        let streams = self.streams_of(session).await;
        match streams {
            None => answer(&mut stream, &Welcome::Refused(Refusal::UnknownSession)).await,
            Some(streams) => {
                answer(&mut stream, &Welcome::Accepted).await?;
                streams.send(stream).await.map_err(|_| PeerError::Lost {
                    reason: "its session ended".into(),
                })
            }
        }
    }

    /// Where the data streams of a session go; they may have overtaken its control connection.
    async fn streams_of(&self, session: SessionId) -> Option<mpsc::Sender<Stream>> {
        let its =
            |current: &Option<Current>| current.as_ref().is_some_and(|known| known.id == session);
        let mut current = self.current.subscribe();
        let waiting = current.wait_for(its);
        let found = tokio::time::timeout(self.timeouts.connect / 2, waiting).await;
        let current = found.ok()?.ok()?;
        current.as_ref().map(|known| known.streams.clone())
    }

    fn left(&self) -> MutexGuard<'_, Option<(SessionId, Known)>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a session of which its own peer says that it is broken.
    fn end(&self, session: Option<SessionId>) {
        let current = self.current.borrow().clone();
        if let Some(current) = current.filter(|current| Some(current.id) == session) {
            current.receiver.fail("its successor is here".to_owned());
        }
    }

    /// Runs a session to its end.
    async fn control(
        &self,
        mut stream: Stream,
        (session, instead_of): (SessionId, Option<SessionId>),
        dead_after: Duration,
    ) {
        let (tx, streams) = mpsc::channel(usize::from(hello::STREAMS_MAX));
        let left = self.left().take();
        let known = left.filter(|(id, _)| Some(*id) == instead_of);
        let known = known.map(|(_, known)| known).unwrap_or_default();
        let receiver = Arc::new(Receiver::new(Arc::clone(&self.trees), dead_after, known));
        self.current.send_replace(Some(Current {
            id: session,
            streams: tx,
            receiver: Arc::clone(&receiver),
        }));
        let reason = match answer(&mut stream, &Welcome::Accepted).await {
            Err(error) => error.to_string(),
            Ok(()) => self.session(stream, streams, &receiver, dead_after).await,
        };
        self.current.send_replace(None);
        tracing::info!(reason, "the session with the peer ended");
        receiver.close().await;
        *self.left() = Some((session, receiver.known()));
        // The queue only closes with the server itself.
        let _ = self.jobs.send(Job::Lost).await;
    }

    async fn session(
        &self,
        control: Stream,
        mut streams: mpsc::Receiver<Stream>,
        receiver: &Arc<Receiver>,
        dead_after: Duration,
    ) -> String {
        let (outbox, pending) = message::outbox();
        let (mut read, mut write) = tokio::io::split(control);
        let mut tasks: JoinSet<()> = JoinSet::new();
        let writer = Arc::clone(receiver);
        tasks.spawn(async move {
            let outcome = message::write(pending, &mut write).await;
            writer.fail(
                outcome
                    .err()
                    .map_or_else(|| "closed by us".to_owned(), |error| error.to_string()),
            );
        });
        tasks.spawn(beat(outbox.clone(), dead_after));
        let (mut data, mut asks): (JoinSet<()>, JoinSet<()>) = Default::default();
        let reading = async {
            let mut inbox = Inbox::default();
            loop {
                while asks.try_join_next().is_some() {}
                let message = match tokio::time::timeout(dead_after, inbox.next(&mut read)).await {
                    Err(_) => break format!("no sign of life for {} ms", dead_after.as_millis()),
                    Ok(Err(error)) => break error.to_string(),
                    Ok(Ok(None)) => break "the peer closed the connection".to_owned(),
                    Ok(Ok(Some(message))) => message,
                };
                if let Err(reason) = self.hand_on(message, &outbox, receiver, &mut asks) {
                    break reason;
                }
            }
        };
        let attaching = async {
            let mut attached = 0;
            while let Some(stream) = streams.recv().await {
                attached += 1;
                if attached > hello::STREAMS_MAX {
                    return format!("more than {} data streams", hello::STREAMS_MAX);
                }
                data.spawn(read_data(Arc::clone(receiver), self.pages.clone(), stream));
            }
            "the server is closing".to_owned()
        };
        let failing = receiver.failed();
        let reason = tokio::select! { reason = reading => reason, reason = attaching => reason, reason = failing => reason };
        drain(&mut data, receiver).await;
        reason
    }

    /// Gives a message to whom it is for; an error ends the session.
    fn hand_on(
        &self,
        message: Message,
        outbox: &Outbox,
        receiver: &Arc<Receiver>,
        asks: &mut JoinSet<()>,
    ) -> Result<(), String> {
        let (number, bytes, outbox) = (message.number, message.bytes, outbox.clone());
        match message.topic {
            Topic::Call => {
                let job = Job::Call {
                    number,
                    bytes,
                    outbox,
                };
                let queued = self.jobs.try_send(job);
                queued.map_err(|_| format!("more than {CALLS_QUEUED} requests at once"))?;
            }
            Topic::CallAfter => {
                let (parts, bytes): (Vec<Part>, Vec<u8>) = postcard::from_bytes(&bytes)
                    .map_err(|_| "the peer does not say what its request waits for".to_owned())?;
                let (arrived, jobs) = (receiver.arrivals().after(&parts), self.jobs.clone());
                asks.spawn(async move {
                    arrived.await;
                    let job = Job::Call {
                        number,
                        bytes,
                        outbox,
                    };
                    // The queue only closes with the server itself.
                    let _ = jobs.send(job).await;
                });
            }
            Topic::Ask => receiver.ask(number, &bytes, outbox, asks),
            Topic::PageAsk => {
                let pages = self.pages.as_ref();
                let pages = pages.ok_or("the peer asked about pages, and nobody keeps any here")?;
                pages.ask(number, &bytes, outbox, receiver.arrivals(), asks);
            }
            Topic::Ping => {
                outbox.offer(Topic::Pong, number, &[]);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Lets the streams of a session that ended read what has arrived: it need not cross again. Ends when they have, or when
/// nothing comes any more.
async fn drain(data: &mut JoinSet<()>, receiver: &Receiver) {
    let draining = async {
        let mut seen = receiver.taken();
        while !data.is_empty() {
            let ended = tokio::time::timeout(DRAIN_PAUSE, data.join_next()).await;
            let taken = receiver.taken();
            if ended.is_err() && taken == seen && !receiver.is_writing() {
                return;
            }
            seen = taken;
        }
    };
    // Whoever is left then is aborted with the session.
    let _ = tokio::time::timeout(DRAIN_MAX, draining).await;
}

async fn answer(stream: &mut Stream, welcome: &Welcome) -> Result<(), PeerError> {
    hello::send(stream, welcome)
        .await
        .map_err(|error| PeerError::Lost {
            reason: error.to_string(),
        })
}

async fn beat(outbox: Outbox, dead_after: Duration) {
    let mut ticks = tokio::time::interval(dead_after / 3);
    loop {
        ticks.tick().await;
        outbox.offer(Topic::Beat, 0, &[]);
    }
}

/// Reads one data stream; whatever ends it ends the session.
async fn read_data(receiver: Arc<Receiver>, pages: Option<Arc<PageStore>>, stream: Stream) {
    let (mut read, _write): (ReadHalf<Stream>, _) = tokio::io::split(stream);
    let reason = loop {
        let outcome = match frame::read(&mut read).await {
            Ok(Some(frame)) => match (frame.channel(), &pages) {
                (Channel::Trees, _) => receiver.data(frame).await,
                (Channel::Pages, Some(pages)) => pages.data(frame).await,
                (Channel::Pages, None) => Err(FrameError::Garbled),
            },
            Ok(None) => break "the peer closed a data stream".to_owned(),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            break FrameError::to_string(&error);
        }
    };
    receiver.fail(reason);
}
