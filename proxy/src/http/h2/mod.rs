//! HTTP/2 from clients: one task a connection, one more for each stream, on the same worker.
//!
//! Frames, header compression and flow control are the `h2` crate's; what a request means is
//! [`mux`](super::mux)'s. A hold never shows on a connection: PING and SETTINGS go on, no GOAWAY is sent. GOAWAY
//! comes when the proxy stops, when a connection was idle for too long, and when its client abuses it.

mod early;
mod overheard;
mod stream;
pub(crate) mod upstream;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::mux::active::Active;
use super::mux::head::HeadBuilder;
use crate::buffer::Buffer;
use crate::config::Http2;
use crate::error::RequestError;
use crate::limit;
use crate::listen::client::Client;
use crate::listen::port::Port;
use crate::stream::Stream;
use early::Early;
use overheard::{Given, Overheard};

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
    let io = Early::new(stream, early, Overheard::new(&shared));
    let handshake = builder(&limits.http2).handshake(io);
    let connection = match timeout(limits.client_head_max, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return shared.ended(&error),
        Err(_) => return shared.port.count_refusal(&RequestError::HeadTimeout),
    };
    let mut session = Session {
        shared,
        connection,
        streams: JoinSet::new(),
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
    streams: JoinSet<()>,
    closing: bool,
}

impl Session {
    /// Accepts streams until the connection ends.
    async fn run(&mut self, idle_max: Duration) -> Result<(), h2::Error> {
        let shared = Rc::clone(&self.shared);
        let mut idle = std::pin::pin!(shared.active.idle(idle_max, || shared.port.holds()));
        loop {
            tokio::select! {
                biased;
                accepted = self.connection.accept() => match accepted {
                    Some(Ok((request, respond))) => self.start(request, respond),
                    Some(Err(error)) => return Err(error),
                    None => return Ok(()),
                },
                () = shared.port.closing.closed(), if !self.closing => self.go_away(),
                () = &mut idle, if !self.closing => self.go_away(),
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
        let shared = Rc::clone(&self.shared);
        shared.given.note(respond.stream_id().into());
        let running = shared.active.begin();
        // The header list is turned into a head here: the stream's task keeps none of it.
        let (asked, receive) = stream::read(&shared, request);
        // Boxed: the runtime moves what it is given half a dozen times.
        self.streams.spawn_local(Box::pin(async move {
            stream::serve(&shared, asked, receive, respond).await;
            drop(running);
        }));
    }

    /// Waits for the streams to see that their connection is gone, and to do what has to be done.
    async fn end(self) {
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
