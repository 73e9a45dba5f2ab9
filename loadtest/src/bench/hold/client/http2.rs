//! One exchange as a stream of an HTTP/2 connection.

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::task::spawn_local;

use super::Fault;
use super::dial::Wire;
use super::notes::Place;
use crate::bench::certificate::NAME;
use crate::bench::hold::plan::{BODY_BYTES, Method, answer, path};

/// A connection that carries many streams; its clones are the same one.
#[derive(Clone)]
pub(super) struct Connection {
    send: SendRequest<Bytes>,
}

impl Connection {
    pub(super) async fn open(wire: Wire) -> Result<Self, Fault> {
        let (send, driver) = h2::client::handshake(wire).await?;
        spawn_local(async move {
            // How it ended, the streams say.
            let _ = driver.await;
        });
        Ok(Self { send })
    }

    pub(super) async fn exchange(&self, place: &Place) -> Result<u16, Fault> {
        let mut send = self.send.clone().ready().await?;
        let uri = format!("https://{NAME}{}", path(place.kind, place.id));
        let request = Request::builder().uri(uri);
        let (request, body) = match place.method {
            Method::Get => (request.method("GET"), None),
            Method::Post => (
                request.method("POST").header("content-length", BODY_BYTES),
                Some(Bytes::from_static(&[b'b'; BODY_BYTES])),
            ),
        };
        let request = request.body(()).map_err(|_| Fault::Malformed)?;
        let (coming, mut sending) = send.send_request(request, body.is_none())?;
        if let Some(body) = body {
            sending.send_data(body, true)?;
        }
        place.sent();
        let (head, mut coming) = coming.await?.into_parts();
        let mut body = Vec::new();
        while let Some(piece) = coming.data().await {
            let piece = piece?;
            coming.flow_control().release_capacity(piece.len())?;
            body.extend_from_slice(&piece);
        }
        match head.status.as_u16() {
            200 if body == answer(place.id).as_bytes() => Ok(200),
            200 => Err(Fault::Foreign),
            status => Err(Fault::Status(status)),
        }
    }
}
