//! HTTP/3 from clients: one task a connection, one more for each stream, on the same worker.
//!
//! Frames and header compression are the `h3` crate's, packets and flow control quinn's; what a request means is
//! [`mux`](super::mux)'s. A hold never shows on a connection: keep-alive goes on and no GOAWAY is sent. GOAWAY comes
//! when the proxy stops; a connection that was idle for too long is closed without one, as an HTTP/1 connection is.

mod stream;
mod wire;

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use h3::error::{Code, ConnectionError, LocalError};
use h3::server::{Connection, RequestResolver};
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;

use super::mux::active::Active;
use crate::limit::Reason;
use crate::listen::client::{Client, Scheme};
use crate::listen::port::Port;
use wire::{Handle, Newest, Wire};

/// `H3_EXCESSIVE_LOAD`, as quinn wants it.
const EXCESSIVE_LOAD: quinn::VarInt = quinn::VarInt::from_u32(0x107);

/// Serves a client to the end of its connection.
pub(crate) async fn serve(port: Rc<Port>, connection: quinn::Connection) {
    let limits = port.settings();
    let wire = Wire::new(connection.clone());
    let newest = wire.newest();
    let mut builder = h3::server::builder();
    builder
        .max_field_section_size(u64::from(limits.limits.http2.header_list_bytes_max))
        .send_grease(false);
    let built = timeout(limits.limits.client_head_max, builder.build(wire));
    let Ok(Ok(http)) = built.await else {
        return;
    };
    let mut session = Session {
        port,
        connection,
        http,
        newest,
        streams: JoinSet::new(),
        active: Active::new(),
        resets: 0,
        closing: false,
    };
    if let Err(error) = session.run().await {
        session.ended(&error);
    }
    session.end().await;
}

struct Session {
    port: Rc<Port>,
    connection: quinn::Connection,
    http: Connection<Wire, Bytes>,
    newest: Newest,
    streams: JoinSet<()>,
    active: Rc<Active>,
    /// Streams in a row that were taken back before we looked at them.
    resets: usize,
    closing: bool,
}

impl Session {
    /// Accepts streams until the connection ends.
    async fn run(&mut self) -> Result<(), ConnectionError> {
        let port = Rc::clone(&self.port);
        let active = Rc::clone(&self.active);
        let idle_max = port.settings().limits.client_idle_max;
        let mut idle = std::pin::pin!(active.idle(idle_max, || port.holds()));
        let budget = &port.service.gate.budget;
        loop {
            tokio::select! {
                biased;
                // Streams wait: quinn gives no credit for more than it has told of.
                () = budget.reads_again(), if !budget.reads() => {}
                // Nobody else would notice.
                _ = self.connection.closed(), if !budget.reads() => return Ok(()),
                accepted = self.http.accept(), if budget.reads() => match accepted? {
                    Some(resolver) if self.is_flood() => {
                        drop(resolver);
                        port.count_reason(Reason::Flood);
                        self.connection.close(EXCESSIVE_LOAD, b"");
                        return Ok(());
                    }
                    Some(resolver) => {
                        self.start(resolver);
                        // It takes its place among the held before the next is taken up.
                        if port.holds() {
                            yield_now().await;
                        }
                    }
                    None => return Ok(()),
                },
                ended = self.streams.join_next(), if self.closing => if ended.is_none() {
                    return Ok(());
                },
                () = port.closing.closed(), if !self.closing => self.go_away().await?,
                () = &mut idle, if !self.closing => return Ok(()),
            }
        }
    }

    /// No new streams; those that run go on to their end. GOAWAY names the first stream that is not served, so the
    /// one after the last: told less, a client would send again what we are serving (RFC 9114, section 5.2).
    async fn go_away(&mut self) -> Result<(), ConnectionError> {
        self.closing = true;
        self.http.shutdown(1).await
    }

    /// Whether the stream that has just come is one too many of those that are taken back at once: such a client has
    /// us work for nobody.
    fn is_flood(&mut self) -> bool {
        let newest = self.newest.borrow();
        if newest.as_ref().is_some_and(Handle::is_taken_back) {
            self.resets += 1;
        } else {
            self.resets = 0;
        }
        self.resets > self.port.settings().limits.http2.resets_pending_max
    }

    /// Counts why we have ended the connection, if it was the client's doing.
    fn ended(&self, error: &ConnectionError) {
        let broken = self.connection.close_reason();
        let reason = match error {
            ConnectionError::Local {
                error: LocalError::Application { code, .. },
                ..
            } => match *code {
                Code::H3_EXCESSIVE_LOAD => Some(Reason::Flood),
                Code::H3_NO_ERROR => None,
                _ => Some(Reason::Protocol),
            },
            // What quinn itself has found: streams or bytes beyond what we gave credit for, among others.
            _ if matches!(broken, Some(quinn::ConnectionError::TransportError(_))) => {
                Some(Reason::Protocol)
            }
            _ => None,
        };
        if let Some(reason) = reason {
            self.port.count_reason(reason);
        }
        tracing::debug!(client = %self.connection.remote_address(), "an HTTP/3 connection ended: {error}");
    }

    fn start(&mut self, resolver: RequestResolver<Wire, Bytes>) {
        // Forgets the streams that have ended.
        while self.streams.try_join_next().is_some() {}
        let Some(handle) = self.newest.take() else {
            return;
        };
        if self.closing {
            // It crossed our GOAWAY; told so, the client may send it elsewhere.
            return reject(&handle);
        }
        let running = self.active.begin();
        let port = Rc::clone(&self.port);
        let mut client = Client::new(self.connection.remote_address());
        client.scheme = Scheme::Https;
        self.streams.spawn_local(async move {
            let handle = RefCell::new(handle);
            stream::serve(&port, &client, resolver, &handle).await;
            drop(running);
            stream::over(&handle, port.settings().limits.linger_max).await;
        });
    }

    /// Closes, and waits for the streams to see that their connection is gone, and to do what has to be done.
    async fn end(self) {
        let Self {
            http, mut streams, ..
        } = self;
        drop(http);
        while streams.join_next().await.is_some() {}
    }
}

fn reject(handle: &Handle) {
    handle.on_drop(Code::H3_REQUEST_REJECTED);
    handle.stop(Code::H3_REQUEST_REJECTED);
}
