//! HTTP/2 from clients: one task a connection, one more for each stream that is not held, on the same worker.
//!
//! Frames, header compression and flow control are the `h2` crate's; what a request means is
//! [`mux`](super::mux)'s. A hold never shows on a connection: PING and SETTINGS go on, no GOAWAY is sent. GOAWAY
//! comes when the proxy stops, when a connection was idle for too long, and when its client abuses it.

mod early;
mod held;
mod overheard;
mod sips;
mod stream;
pub(crate) mod upstream;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::mux::active::{Active, Running};
use super::mux::head::HeadBuilder;
use super::mux::held::HeldRequest;
use super::mux::{Reading, Waited, read_stream};
use crate::buffer::Buffer;
use crate::config::Http2;
use crate::error::RequestError;
use crate::limit;
use crate::listen::client::Client;
use crate::listen::port::Port;
use crate::stream::Stream;
use early::Early;
use held::{HeldStream, HeldStreams};
use overheard::{Given, Overheard};
use sips::{Sips, Thirst};
use stream::Body;

/// What a client that knows that we speak HTTP/2 sends first, up to where it looks like a head.
const PREFACE_HEAD: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// Whether the first head of a connection is the beginning of HTTP/2 (RFC 9113, section 3.4).
pub(crate) fn is_preface(head: &[u8]) -> bool {
    head == PREFACE_HEAD
}

/// Serves a client to the end of its connection. `early` is what was read of it already, from its first byte on.
pub(crate) async fn serve(port: Rc<Port>, stream: Stream, early: Buffer, client: Client) {
    let settings = port.settings();
    let limits = &settings.limits;
    let shared = Rc::new(Shared {
        given: Given::new(limits.http2.streams_max),
        port,
        client,
        builder: RefCell::default(),
        active: Active::new(),
    });
    let sips = Sips::default();
    let io = Early::new(stream, early, Overheard::new(&shared), sips.clone());
    let handshake = builder(&limits.http2).handshake(io);
    let connection = match timeout(limits.client_head_max, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return shared.ended(&error),
        Err(_) => return shared.port.count_refusal(&RequestError::HeadTimeout),
    };
    let mut session = Session {
        shared,
        connection,
        sips,
        streams: JoinSet::new(),
        held: HeldStreams::default(),
        closing: false,
    };
    if let Err(error) = session.run(limits.client_idle_max).await {
        session.shared.ended(&error);
    }
    session.end().await;
}

fn builder(limits: &Http2) -> Builder {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(limits.header_list_bytes_max)
        .initial_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .max_frame_size(limits.frame_bytes_max)
        .max_send_buffer_size(limits.send_buffer_bytes_max)
        .max_pending_accept_reset_streams(limits.resets_pending_max)
        .max_local_error_reset_streams(Some(limits.resets_local_max))
        .max_concurrent_reset_streams(limits.resets_remembered_max)
        .enable_connect_protocol();
    builder
}

/// What the streams of a connection share.
struct Shared {
    port: Rc<Port>,
    client: Client,
    builder: RefCell<HeadBuilder>,
    active: Rc<Active>,
    given: Given,
}

impl Shared {
    fn taking(&self) -> Taking {
        if self.port.reads(&self.client) {
            Taking::On
        } else {
            Taking::Stopped
        }
    }

    /// Counts why the `h2` crate has ended the connection, if it was the client's doing.
    fn ended(&self, error: &h2::Error) {
        let Self { port, client, .. } = self;
        match error.reason() {
            // Resets, and the parts of a head.
            Some(Reason::ENHANCE_YOUR_CALM) if error.is_library() => {
                port.count_reason(limit::Reason::Flood);
            }
            Some(_) if error.is_library() => port.count_reason(limit::Reason::Protocol),
            _ => {}
        }
        tracing::debug!(client = %client.address, "an HTTP/2 connection ended: {error}");
    }
}

struct Session {
    shared: Rc<Shared>,
    connection: Connection<Early, Bytes>,
    sips: Sips,
    streams: JoinSet<()>,
    held: HeldStreams,
    closing: bool,
}

/// What a connection's task has to see to.
#[allow(clippy::large_enum_variant)] // it is matched at once
enum Happened {
    Accepted(Accepted),
    /// A stream is held no longer.
    Over(Box<HeldStream>, Waited),
    /// No more streams are taken up, as of now.
    Stopped,
}

/// Whether new streams are taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taking {
    On,
    /// Not before there is room in the budget of the held.
    Stopped,
}

/// A new stream, if the connection has not ended.
type Accepted = Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>>;

impl Session {
    /// Accepts streams until the connection ends.
    async fn run(&mut self, idle_max: Duration) -> Result<(), h2::Error> {
        let shared = Rc::clone(&self.shared);
        let mut idle = std::pin::pin!(shared.active.idle(idle_max, || shared.port.holds()));
        let budget = &shared.port.service.gate.budget;
        loop {
            let taking = shared.taking();
            tokio::select! {
                biased;
                happened = poll_fn(|context| self.poll_happens(taking, context)) => match happened {
                    Happened::Accepted(Some(Ok((request, respond)))) => self.start(request, respond),
                    Happened::Accepted(Some(Err(error))) => return Err(error),
                    Happened::Accepted(None) => return Ok(()),
                    Happened::Over(stream, waited) => self.resume(*stream, waited),
                    Happened::Stopped => {}
                },
                () = shared.port.closing.closed(), if !self.closing => self.go_away(),
                () = &mut idle, if !self.closing => self.go_away(),
                () = budget.reads_again(), if taking == Taking::Stopped => {}
            }
        }
    }

    fn poll_happens(&mut self, taking: Taking, context: &mut Context<'_>) -> Poll<Happened> {
        // Whoever waits for the budget has to know that he does.
        if taking == Taking::On && self.shared.taking() == Taking::Stopped {
            return Poll::Ready(Happened::Stopped);
        }
        if let Poll::Ready(accepted) = self.poll_accept(taking, context) {
            return Poll::Ready(Happened::Accepted(accepted));
        }
        if let Poll::Ready((stream, waited)) = self.held.poll_over(self.sips.has_news(), context) {
            return Poll::Ready(Happened::Over(stream, waited));
        }
        self.sips.looked();
        Poll::Pending
    }

    /// Reads on only when all streams that have come are accepted, while the service is held; accepts none while its
    /// budget is nearly used, but sees to all else that a connection needs.
    fn poll_accept(&mut self, taking: Taking, context: &mut Context<'_>) -> Poll<Accepted> {
        if taking == Taking::Stopped {
            self.sips.allow(Thirst::Endless);
            return self
                .connection
                .poll_closed(context)
                .map(|closed| match closed {
                    Ok(()) => None,
                    Err(error) => Some(Err(error)),
                });
        }
        if !self.shared.port.holds() {
            self.sips.allow(Thirst::Endless);
            return self.connection.poll_accept(context);
        }
        loop {
            self.sips.allow(Thirst::Quenched);
            if let ready @ Poll::Ready(_) = self.connection.poll_accept(context) {
                return ready;
            }
            self.sips.allow(Thirst::Sip);
            let ready = self.connection.poll_accept(context);
            if ready.is_ready() || self.sips.thirst() == Thirst::Sip {
                return ready;
            }
        }
    }

    /// No new streams; those that run go on to their end.
    fn go_away(&mut self) {
        self.closing = true;
        self.connection.graceful_shutdown();
    }

    fn start(&mut self, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        // Forgets the streams that have ended.
        while self.streams.try_join_next().is_some() {}
        let shared = &self.shared;
        shared.given.note(respond.stream_id().into());
        let running = shared.active.begin();
        // The header list is turned into a head here: the stream's task keeps none of it.
        let (asked, receive) = stream::read(shared, request);
        let mut reading = read_stream(&shared.port, &shared.client, asked);
        let held = shared
            .port
            .holds()
            .then(|| HeldRequest::park(&shared.port, &mut reading));
        if let Some(request) = held.flatten() {
            let stream = HeldStream {
                request,
                respond,
                receive,
                early: Vec::new(),
                running,
            };
            self.held.add(shared, stream);
        } else {
            self.serve(reading, Body::new(receive), respond, running);
        }
    }

    /// A stream that is held no longer goes on.
    fn resume(&mut self, stream: HeldStream, waited: Waited) {
        let HeldStream {
            request,
            respond,
            receive,
            early,
            running,
        } = stream;
        let reading = request.resume(&self.shared.port, waited);
        self.serve(reading, Body::after(early, receive), respond, running);
    }

    fn serve(
        &mut self,
        mut reading: Reading,
        mut body: Body,
        respond: SendResponse<Bytes>,
        running: Running,
    ) {
        let shared = Rc::clone(&self.shared);
        // Boxed: the runtime moves what it is given half a dozen times.
        self.streams.spawn_local(Box::pin(async move {
            stream::serve(&shared, &mut reading, &mut body, respond).await;
            drop(running);
        }));
    }

    /// Waits for the streams to see that their connection is gone, and to do what has to be done.
    async fn end(mut self) {
        while let Some(stream) = self.held.take() {
            let gone = io::ErrorKind::ConnectionReset.into();
            self.resume(*stream, Waited::Left(gone));
        }
        let Self {
            connection,
            mut streams,
            ..
        } = self;
        drop(connection);
        while streams.join_next().await.is_some() {}
    }
}

/// What the end of a stream is to those who read and write.
fn to_io(error: h2::Error) -> io::Error {
    match error.into_io() {
        Some(error) => error,
        None => io::ErrorKind::ConnectionReset.into(),
    }
}

const fn to_io_reason(_: Reason) -> io::ErrorKind {
    io::ErrorKind::ConnectionReset
}
