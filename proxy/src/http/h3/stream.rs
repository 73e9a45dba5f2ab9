//! One HTTP/3 stream as [`mux`](crate::http::mux) wants it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h3::error::{Code, StreamError};
use h3::ext::Protocol;
use h3::server::{RequestResolver, RequestStream};
use http::{HeaderMap, Method, header, request::Parts};
use tokio::time::timeout;

use super::wire::{Handle, Receiver, Sender, Wire};
use crate::access_log::Line;
use crate::error::RequestError;
use crate::http::head::HeadError;
use crate::http::mux::head::{BodyFollows, HeadBuilder, write_head, write_trailer};
use crate::http::mux::{
    AnswerHead, AnswerSink, Asked, BodyFailed, More, Part, RequestBody, Reset, answer, serve_stream,
};
use crate::listen::client::Client;
use crate::listen::port::Port;

/// Serves one stream to its end.
pub(super) async fn serve(
    port: &Port,
    client: &Client,
    resolver: RequestResolver<Wire, Bytes>,
    handle: &RefCell<Handle>,
) {
    let limit = port.settings().limits.client_head_max;
    let Ok(read) = timeout(limit, read_head(port, resolver, handle)).await else {
        handle.borrow().stop(Code::H3_REQUEST_CANCELLED);
        return refused(port, client, &RequestError::HeadTimeout);
    };
    match read {
        Ok(Read {
            asked,
            mut body,
            send,
        }) => {
            handle.borrow().on_drop(Code::H3_INTERNAL_ERROR);
            let gone = poll_fn(|context| handle.borrow_mut().poll_gone(context));
            let mut answer = Answer { send, handle };
            serve_stream(port, client, asked, &mut body, &mut answer, gone).await;
        }
        Err(StreamError::HeaderTooBig { .. }) => refused(port, client, &RequestError::HeadTooLong),
        Err(StreamError::StreamError { .. }) => {
            refused(port, client, &RequestError::Head(HeadError::Syntax));
        }
        Err(_) if handle.borrow().is_overfull() => {
            refused(port, client, &RequestError::HeadTooLong);
        }
        // Nobody is there any more.
        Err(_) => {}
    }
}

/// Counts and logs a stream that never became a request; `h3` or its reset has answered it.
fn refused(port: &Port, client: &Client, error: &RequestError) {
    let status = match error {
        RequestError::HeadTooLong => 431,
        _ => 0,
    };
    port.count(status);
    port.count_refusal(error);
    port.log(|| Line::refused(port, client.address, status, 0, error));
}

/// A request whose head has come.
struct Read<'h> {
    asked: Result<Asked, HeadError>,
    body: Body<'h>,
    send: RequestStream<Sender, Bytes>,
}

async fn read_head<'h>(
    port: &Port,
    resolver: RequestResolver<Wire, Bytes>,
    handle: &'h RefCell<Handle>,
) -> Result<Read<'h>, StreamError> {
    let (request, stream) = resolver.resolve_request().await?;
    let (parts, ()) = request.into_parts();
    let (send, receive) = stream.split();
    let mut body = Body {
        receive,
        handle,
        first: None,
        left: announced(&parts),
        data_ended: false,
    };
    let follows = body.follows(&parts).await;
    let mut head = port.buffers.take_output();
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    let key = write_head(
        &mut HeadBuilder::default(),
        &parts,
        protocol,
        follows,
        &mut head,
    );
    Ok(Read {
        asked: key.map(|key| Asked { head, key }),
        body,
        send,
    })
}

struct Body<'h> {
    receive: RequestStream<Receiver, Bytes>,
    handle: &'h RefCell<Handle>,
    /// Read to learn whether there is a body.
    first: Option<Result<Part, BodyFailed>>,
    /// What is still to come of a body that was announced with its length.
    left: Option<usize>,
    data_ended: bool,
}

impl Body<'_> {
    /// Whether a body follows. HTTP/3 does not say so with the head: the end of the stream may be on its way in the
    /// next packet. Where no length announces a body, we wait for the end or the first of the data of methods that
    /// rarely have one, so that a GET does not reach its upstream with an empty chunked body.
    async fn follows(&mut self, parts: &Parts) -> BodyFollows {
        if self.left == Some(0) {
            self.handle.borrow().set_whole();
        }
        if parts.headers.contains_key(header::CONTENT_LENGTH) || parts.method == Method::CONNECT {
            return BodyFollows::Yes;
        }
        let waits = matches!(
            parts.method,
            Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE
        );
        let first = poll_fn(|context| match self.poll_part(context) {
            Poll::Ready(first) => Poll::Ready(Some(first)),
            Poll::Pending if waits => Poll::Pending,
            Poll::Pending => Poll::Ready(None),
        });
        self.first = first.await;
        match &self.first {
            Some(Ok(Part::End { trailer })) if trailer.is_empty() => BodyFollows::No,
            _ => BodyFollows::Yes,
        }
    }

    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Result<Part, BodyFailed>> {
        let Self {
            receive,
            handle,
            left,
            ..
        } = self;
        let handle = handle.borrow();
        while !self.data_ended {
            let data = handle.poll_sparingly(context, |context| {
                let data = receive.poll_recv_data(context);
                data.map_ok(|data| data.map(|mut data| data.copy_to_bytes(data.remaining())))
            });
            match ready!(data).map_err(to_left)? {
                Some(data) if data.is_empty() => {}
                Some(data) => {
                    *left = left.map(|left| left.saturating_sub(data.len()));
                    if *left == Some(0) {
                        handle.set_whole();
                    }
                    return Poll::Ready(Ok(Part::Data(data)));
                }
                None => self.data_ended = true,
            }
        }
        let trailer = handle.poll_sparingly(context, |context| receive.poll_recv_trailers(context));
        Poll::Ready(match ready!(trailer).map_err(to_left)? {
            None => Ok(Part::End {
                trailer: Vec::new(),
            }),
            Some(fields) => trailer_lines(&fields).map(|trailer| Part::End { trailer }),
        })
    }
}

impl RequestBody for Body<'_> {
    async fn next(&mut self) -> Result<Part, BodyFailed> {
        if let Some(first) = self.first.take() {
            return first;
        }
        poll_fn(|context| self.poll_part(context)).await
    }

    /// quinn gives credit for what is read, and no more is read than one part ahead of what is written.
    fn written(&mut self, _: usize) {}
}

/// The length of a body, if it was announced. Whether it is one, and the only one, is for others to judge.
fn announced(parts: &Parts) -> Option<usize> {
    let length = parts.headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

fn trailer_lines(fields: &HeaderMap) -> Result<Vec<u8>, BodyFailed> {
    let mut lines = Vec::new();
    let fields = fields
        .iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    write_trailer(fields, &mut lines).map_err(BodyFailed::Trailer)?;
    Ok(lines)
}

struct Answer<'h> {
    send: RequestStream<Sender, Bytes>,
    handle: &'h RefCell<Handle>,
}

impl Answer<'_> {
    async fn end(&mut self, more: More) -> io::Result<()> {
        if more == More::Follows {
            return Ok(());
        }
        self.send.finish().await.map_err(to_io)?;
        let handle = self.handle.borrow();
        handle.on_drop(Code::H3_NO_ERROR);
        if !handle.is_whole() {
            handle.stop(Code::H3_NO_ERROR);
        }
        Ok(())
    }
}

impl AnswerSink for Answer<'_> {
    async fn interim(&mut self, head: AnswerHead<'_>) -> io::Result<()> {
        self.send
            .send_response(head.to_response())
            .await
            .map_err(to_io)
    }

    async fn head(&mut self, head: AnswerHead<'_>, more: More) -> io::Result<()> {
        self.send
            .send_response(head.to_response())
            .await
            .map_err(to_io)?;
        self.end(more).await
    }

    async fn data(&mut self, data: &[u8], more: More) -> io::Result<()> {
        if !data.is_empty() {
            let data = Bytes::copy_from_slice(data);
            self.send.send_data(data).await.map_err(to_io)?;
        }
        self.end(more).await
    }

    async fn trailer(&mut self, lines: &[u8]) -> io::Result<()> {
        let trailer = answer::to_trailer(lines);
        self.send.send_trailers(trailer).await.map_err(to_io)?;
        self.end(More::Ends).await
    }

    fn reset(&mut self, why: Reset) {
        let code = match why {
            Reset::Malformed => Code::H3_MESSAGE_ERROR,
            Reset::Broken => Code::H3_INTERNAL_ERROR,
            Reset::Cancelled => Code::H3_REQUEST_CANCELLED,
        };
        self.send.stop_stream(code);
        self.handle.borrow().stop(code);
    }
}

/// Waits until the client has all of the answer, or has had long enough.
pub(super) async fn over(handle: &RefCell<Handle>, limit: Duration) {
    let over = poll_fn(|context| handle.borrow_mut().poll_over(context));
    drop(timeout(limit, over).await);
}

fn to_left(error: StreamError) -> BodyFailed {
    BodyFailed::Left(to_io(error))
}

/// What the end of a stream is to those who read and write.
fn to_io(error: StreamError) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
