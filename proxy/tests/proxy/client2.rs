//! An HTTP/2 client as a test wants it: blocking, with every wait limited. A thread of its own keeps the connection
//! going meanwhile.

use std::future::poll_fn;
use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{PingPong, Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::world::PATIENCE;

/// One connection.
pub(crate) struct Client2 {
    runtime: Runtime,
    send: Option<SendRequest<Bytes>>,
    ping: PingPong,
    driver: Option<JoinHandle<Result<(), h2::Error>>>,
}

/// One request under way.
pub(crate) struct Stream2 {
    pub(crate) answer: ResponseFuture,
    pub(crate) body: SendStream<Bytes>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer2 {
    pub(crate) status: u16,
    pub(crate) fields: HeaderMap,
    pub(crate) body: String,
    pub(crate) trailer: Option<HeaderMap>,
}

impl Client2 {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::with(address, &Builder::new())
    }

    pub(crate) fn with(address: SocketAddr, builder: &Builder) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (send, mut connection) = runtime.block_on(async {
            let socket = tokio::net::TcpStream::connect(address).await.unwrap();
            socket.set_nodelay(true).unwrap();
            builder.handshake(socket).await.unwrap()
        });
        let ping = connection.ping_pong().unwrap();
        let driver = Some(runtime.spawn(connection));
        let send = Some(send);
        Self {
            runtime,
            send,
            ping,
            driver,
        }
    }

    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(PATIENCE, future).await };
        self.runtime.block_on(limited).expect("it never came")
    }

    pub(crate) fn send(&mut self, request: Request<()>, ends: bool) -> Stream2 {
        let send = self.send.take().unwrap();
        let mut send = self.wait(send.ready()).unwrap();
        let (answer, body) = send.send_request(request, ends).unwrap();
        self.send = Some(send);
        Stream2 { answer, body }
    }

    pub(crate) fn begin(&mut self, method: Method, path: &str, ends: bool) -> Stream2 {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://h{path}"));
        self.send(request.body(()).unwrap(), ends)
    }

    pub(crate) fn get(&mut self, path: &str) -> Stream2 {
        self.begin(Method::GET, path, true)
    }

    pub(crate) fn post(&mut self, path: &str, body: &str) -> Stream2 {
        let mut stream = self.begin(Method::POST, path, false);
        let body = Bytes::copy_from_slice(body.as_bytes());
        stream.body.send_data(body, true).unwrap();
        stream
    }

    pub(crate) fn whole(&self, stream: Stream2) -> Result<Answer2, h2::Error> {
        let Stream2 {
            answer,
            body: _body,
        } = stream;
        self.wait(async {
            let (parts, body) = answer.await?.into_parts();
            let (body, trailer) = rest(body).await?;
            Ok(Answer2 {
                status: parts.status.as_u16(),
                fields: parts.headers,
                body,
                trailer,
            })
        })
    }

    pub(crate) fn answer(&self, stream: Stream2) -> Answer2 {
        self.whole(stream).unwrap()
    }

    /// The body and the trailer of an answer whose head was read already.
    pub(crate) fn rest(&self, body: RecvStream) -> Result<(String, Option<HeaderMap>), h2::Error> {
        self.wait(rest(body))
    }

    /// Why a stream was reset.
    pub(crate) fn reset(&self, stream: Stream2) -> Option<Reason> {
        self.whole(stream).unwrap_err().reason()
    }

    /// A PING and its answer.
    pub(crate) fn ping(&mut self) {
        let Self { runtime, ping, .. } = self;
        let pong = async { tokio::time::timeout(PATIENCE, ping.ping(h2::Ping::opaque())).await };
        runtime.block_on(pong).expect("no pong came").unwrap();
    }

    /// Waits for the end of the connection; none is an end without an error.
    pub(crate) fn end(&mut self) -> Option<Reason> {
        let driver = self.driver.take().unwrap();
        let ended = self.wait(driver).unwrap();
        ended
            .err()
            .map(|error| error.reason().unwrap_or(Reason::INTERNAL_ERROR))
    }

    /// Waits until so many bytes of a body may be sent.
    pub(crate) fn room(&self, body: &mut SendStream<Bytes>) -> usize {
        self.wait(poll_fn(|context| body.poll_capacity(context)))
            .unwrap()
            .unwrap()
    }
}

async fn rest(mut body: RecvStream) -> Result<(String, Option<HeaderMap>), h2::Error> {
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    let trailer = body.trailers().await?;
    Ok((String::from_utf8(bytes).unwrap(), trailer))
}
