//! One HTTP/2 connection to an upstream, and the task that keeps it going.
//!
//! It ends when nobody holds it any more and its last request is over, when it fails, or when the upstream does not
//! answer a PING. Only then does whatever counts it see it go.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::config::Limits;
use crate::stream::Stream;

/// Bytes of one answer that an upstream may send before the client has taken any.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same for all answers of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// One connection that many requests share.
#[derive(Debug)]
pub(crate) struct Session {
    send: SendRequest<Bytes>,
    state: Rc<State>,
    /// What `:scheme` says.
    scheme: &'static str,
}

#[derive(Debug)]
struct State {
    active: Cell<usize>,
    idle_since: Cell<Instant>,
    /// It can take no further request.
    ended: Cell<bool>,
    /// The upstream has said what it is ready for.
    settled: Cell<bool>,
    changed: Notify,
}

/// The place of one request on a connection.
#[derive(Debug)]
pub(crate) struct Slot {
    session: Rc<Session>,
}

impl Slot {
    fn new(session: Rc<Session>) -> Self {
        let active = &session.state.active;
        active.set(active.get() + 1);
        Self { session }
    }

    pub(crate) fn session(&self) -> &Rc<Session> {
        &self.session
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let State {
            active, idle_since, ..
        } = &*self.session.state;
        active.set(active.get() - 1);
        if active.get() == 0 {
            idle_since.set(Instant::now());
        }
    }
}

impl Session {
    /// Opens HTTP/2 on a connection that was just made. `counted` is dropped when the connection is closed at both
    /// ends, or `upstream_close_ms_max` later.
    ///
    /// # Errors
    /// The upstream did not take our first bytes.
    pub(crate) async fn open(
        stream: Stream,
        limits: &Limits,
        counted: impl Sized + 'static,
    ) -> io::Result<Rc<Self>> {
        let scheme = match stream {
            Stream::Plain(_) => "http",
            Stream::Tls(_) => "https",
        };
        let stream = Rc::new(stream);
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_header_list_size(limits.http2.header_list_bytes_max)
            .max_send_buffer_size(limits.http2.send_buffer_bytes_max);
        let (send, connection) = builder
            .handshake(Shared(Rc::clone(&stream)))
            .await
            .map_err(super::super::to_io)?;
        let state = Rc::new(State {
            active: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            ended: Cell::new(false),
            settled: Cell::new(false),
            changed: Notify::new(),
        });
        let driver = Driver {
            connection,
            stream,
            state: Rc::clone(&state),
            ping: limits.http2.upstream_ping,
            close_max: limits.upstream_close_max,
        };
        tokio::task::spawn_local(async move {
            driver.run().await;
            drop(counted);
        });
        Ok(Rc::new(Self {
            send,
            state,
            scheme,
        }))
    }

    /// A place for one more request, if the upstream takes as many and the connection is sound.
    pub(crate) fn slot(self: &Rc<Self>) -> Option<Slot> {
        let room = self.state.active.get() < self.send.current_max_send_streams();
        (room && !self.has_ended()).then(|| Slot::new(Rc::clone(self)))
    }

    /// Whether it takes no new request, ever.
    pub(crate) fn has_ended(&self) -> bool {
        let mut nobody = Context::from_waker(std::task::Waker::noop());
        self.state.ended.get()
            || matches!(
                self.send.clone().poll_ready(&mut nobody),
                Poll::Ready(Err(_))
            )
    }

    /// For how long no request has had a place on it; `None` while one has.
    pub(crate) fn idle_for(&self) -> Option<Duration> {
        (self.state.active.get() == 0).then(|| self.state.idle_since.get().elapsed())
    }

    pub(super) fn sender(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    pub(super) const fn scheme(&self) -> &'static str {
        self.scheme
    }

    /// Whether the upstream takes WebSockets (RFC 8441); waits until it has said so.
    pub(super) async fn takes_websockets(&self, limit: Duration) -> bool {
        let settled = async {
            while !self.state.settled.get() && !self.state.ended.get() {
                self.state.changed.notified().await;
            }
        };
        // Without a word from it, what is known so far counts.
        drop(timeout(limit, settled).await);
        self.send.is_extended_connect_protocol_enabled()
    }
}

struct Driver {
    connection: Connection<Shared, Bytes>,
    stream: Rc<Stream>,
    state: Rc<State>,
    ping: Duration,
    close_max: Duration,
}

impl Driver {
    async fn run(self) {
        let Self {
            mut connection,
            stream,
            state,
            ping,
            close_max,
        } = self;
        let pings = connection.ping_pong();
        tokio::select! {
            biased;
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!("an upstream's HTTP/2 connection ended: {error}");
                }
            }
            () = prove_alive(pings, &state, ping) => {
                tracing::warn!("an upstream did not answer a PING within {ping:?}; its connection is closed");
            }
        }
        state.ended.set(true);
        state.changed.notify_waiters();
        drop(connection);
        stream.finish();
        drop(timeout(close_max, until_closed(&stream)).await);
    }
}

/// Completes when the upstream does not answer a PING in time. The first one tells when its settings are here.
async fn prove_alive(pings: Option<PingPong>, state: &State, every: Duration) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        let pong = timeout(every, pings.ping(Ping::opaque())).await;
        match pong {
            Ok(Ok(_)) => {}
            // The connection itself says what is wrong.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
        state.settled.set(true);
        state.changed.notify_waiters();
        loop {
            sleep(every).await;
            if state.active.get() > 0 {
                break;
            }
        }
    }
}

async fn until_closed(stream: &Stream) {
    let mut scrap = [0; 512];
    loop {
        match stream.try_read(&mut scrap) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if poll_fn(|context| stream.poll_readable(context))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Ok(0) | Err(_) => return,
        }
    }
}

/// A stream that outlives the protocol on it, so that its end can be waited for.
struct Shared(Rc<Stream>);

impl AsyncRead for Shared {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.0.try_read(room.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_readable(context))?;
                }
                read => {
                    room.advance(read?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Shared {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.0.try_write(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_writable(context))?;
                }
                done => return Poll::Ready(done),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_flush(context))?;
        self.0.finish();
        Poll::Ready(Ok(()))
    }
}
