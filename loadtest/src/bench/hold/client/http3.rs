//! One exchange as a stream of an HTTP/3 connection.

use std::net::SocketAddr;

use bytes::{Buf, Bytes};
use h3::client::SendRequest;
use h3_quinn::OpenStreams;
use http::Request;
use tokio::task::spawn_local;

use super::Fault;
use super::dial::Config;
use super::notes::Place;
use crate::bench::certificate::NAME;
use crate::bench::hold::plan::{BODY_BYTES, Method, answer, path};

/// A connection that carries many streams; its clones are the same one.
#[derive(Clone)]
pub(super) struct Connection {
    send: SendRequest<OpenStreams, Bytes>,
}

impl Connection {
    pub(super) async fn open(config: &Config, address: SocketAddr) -> Result<Self, Fault> {
        let quic = |error: &dyn std::error::Error| Fault::Quic(error.to_string());
        let endpoint = config.endpoint().ok_or(Fault::Closed)?;
        let connecting = endpoint
            .connect(address, NAME)
            .map_err(|error| quic(&error))?;
        let connection = connecting.await.map_err(|error| quic(&error))?;
        let wire = h3_quinn::Connection::new(connection);
        let (mut driver, send) = h3::client::new(wire).await.map_err(|error| quic(&error))?;
        spawn_local(async move {
            // How it ended, the streams say.
            std::future::poll_fn(|context| driver.poll_close(context)).await;
        });
        Ok(Self { send })
    }

    pub(super) async fn exchange(&self, place: &Place) -> Result<u16, Fault> {
        let uri = format!("https://{NAME}{}", path(place.kind, place.id));
        let request = Request::builder().uri(uri);
        let request = match place.method {
            Method::Get => request.method("GET"),
            Method::Post => request.method("POST").header("content-length", BODY_BYTES),
        };
        let request = request.body(()).map_err(|_| Fault::Malformed)?;
        let mut stream = self.send.clone().send_request(request).await?;
        if place.method == Method::Post {
            stream
                .send_data(Bytes::from_static(&[b'b'; BODY_BYTES]))
                .await?;
        }
        stream.finish().await?;
        place.sent();
        let head = stream.recv_response().await?;
        let mut body = Vec::new();
        while let Some(mut piece) = stream.recv_data().await? {
            body.extend_from_slice(&piece.copy_to_bytes(piece.remaining()));
        }
        match head.status().as_u16() {
            200 if body == answer(place.id).as_bytes() => Ok(200),
            200 => Err(Fault::Foreign),
            status => Err(Fault::Status(status)),
        }
    }
}
