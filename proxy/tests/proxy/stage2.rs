//! An origin that speaks HTTP/2 and that a test plays itself. Each connection is driven by a task of its own.

use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::world::PATIENCE;

/// Requests or connections that may wait for the test to look at them.
const QUEUE_MAX: usize = 1024;

/// Where connections arrive.
pub(crate) struct Stage2 {
    runtime: Runtime,
    address: SocketAddr,
    connections: Receiver<Connection2>,
}

/// One connection.
pub(crate) struct Connection2 {
    requests: Receiver<(Request<RecvStream>, SendResponse<Bytes>)>,
    /// Used to say GOAWAY.
    leave: Option<oneshot::Sender<()>>,
}

/// One request, with its answer still to come.
pub(crate) struct Asked2 {
    pub(crate) request: Request<()>,
    pub(crate) body: RecvStream,
    pub(crate) respond: SendResponse<Bytes>,
}

impl Stage2 {
    pub(crate) fn new() -> Self {
        Self::with(Builder::new())
    }

    pub(crate) fn with(builder: Builder) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (sender, connections) = sync_channel(QUEUE_MAX);
        runtime.spawn(accept(listener, builder, sender));
        Self {
            runtime,
            address,
            connections,
        }
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn accept(&self) -> Connection2 {
        self.connections.recv_timeout(PATIENCE).unwrap()
    }

    pub(crate) fn try_accept(&self) -> Option<Connection2> {
        self.connections.try_recv().ok()
    }

    /// Whether no further connection has come.
    pub(crate) fn is_deserted(&self) -> bool {
        self.connections.try_recv().is_err()
    }

    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(PATIENCE, future).await };
        self.runtime.block_on(limited).expect("it never came")
    }

    /// The body and the trailer of a request.
    pub(crate) fn body(&self, body: &mut RecvStream) -> (String, Option<HeaderMap>) {
        self.wait(async {
            let mut bytes = Vec::new();
            while let Some(data) = body.data().await {
                let data = data.unwrap();
                body.flow_control().release_capacity(data.len()).unwrap();
                bytes.extend_from_slice(&data);
            }
            let trailer = body.trailers().await.unwrap();
            (String::from_utf8(bytes).unwrap(), trailer)
        })
    }
}

async fn accept(listener: TcpListener, builder: Builder, connections: SyncSender<Connection2>) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let (sender, requests) = sync_channel(QUEUE_MAX);
        let (leave, leaving) = oneshot::channel();
        let connection = Connection2 {
            requests,
            leave: Some(leave),
        };
        if connections.send(connection).is_err() {
            return;
        }
        let handshake = builder.handshake(socket);
        tokio::runtime::Handle::current().spawn(async move {
            let Ok(mut connection) = handshake.await else {
                return;
            };
            let mut leaving = Some(leaving);
            loop {
                let left = async {
                    match &mut leaving {
                        Some(leaving) => leaving.await.is_ok(),
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    accepted = connection.accept() => match accepted {
                        Some(Ok(request)) => drop(sender.send(request)),
                        Some(Err(_)) | None => return,
                    },
                    told = left => {
                        leaving = None;
                        if told {
                            connection.graceful_shutdown();
                        }
                    }
                }
            }
        });
    }
}

impl Connection2 {
    pub(crate) fn next(&self) -> Asked2 {
        Asked2::of(self.requests.recv_timeout(PATIENCE).unwrap())
    }

    pub(crate) fn try_next(&self) -> Option<Asked2> {
        self.requests.try_recv().ok().map(Asked2::of)
    }

    /// Waits until the proxy has closed it.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(
            self.requests.recv_timeout(PATIENCE),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
        )
    }

    /// Whether nothing was asked.
    pub(crate) fn is_quiet(&self) -> bool {
        self.requests.recv_timeout(Duration::ZERO).is_err()
    }

    /// Says GOAWAY: what was asked is answered, no more is taken.
    pub(crate) fn leave(&mut self) {
        self.leave.take().unwrap().send(()).unwrap();
    }
}

impl Asked2 {
    fn of((request, respond): (Request<RecvStream>, SendResponse<Bytes>)) -> Self {
        let (parts, body) = request.into_parts();
        Self {
            request: Request::from_parts(parts, ()),
            body,
            respond,
        }
    }

    pub(crate) fn head(&mut self, status: u16, ends: bool) -> SendStream<Bytes> {
        let response = Response::builder().status(status).body(()).unwrap();
        self.respond.send_response(response, ends).unwrap()
    }

    pub(crate) fn answer(mut self, body: &str) {
        let mut stream = self.head(200, false);
        let body = Bytes::copy_from_slice(body.as_bytes());
        stream.send_data(body, true).unwrap();
    }
}
