//! One HTTP/2 stream as [`mux`](crate::http::mux) wants it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::Request;

use super::{Shared, to_io, to_io_reason};
use crate::http::head::HeadError;
use crate::http::mux::head::{BodyFollows, write_head, write_trailer};
use crate::http::mux::{
    AnswerHead, AnswerSink, Asked, BodyFailed, More, Part, Reading, RequestBody, Reset, answer,
    serve_read,
};

/// Turns the header list of a request into a head.
pub(super) fn read(
    shared: &Shared,
    request: Request<RecvStream>,
) -> (Result<Asked, HeadError>, RecvStream) {
    let (parts, receive) = request.into_parts();
    let follows = if receive.is_end_stream() {
        BodyFollows::No
    } else {
        BodyFollows::Yes
    };
    let mut head = shared.port.buffers.take_output();
    let mut builder = shared.builder.borrow_mut();
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    let key = write_head(&mut builder, &parts, protocol, follows, &mut head);
    (key.map(|key| Asked { head, key }), receive)
}

/// Serves one stream to its end.
pub(super) async fn serve(
    shared: &Shared,
    reading: &mut Reading,
    body: &mut Body,
    respond: SendResponse<Bytes>,
) {
    let sending = RefCell::new(Sending::Respond(respond));
    let gone = poll_fn(|context| sending.borrow_mut().poll_gone(context));
    let mut answer = Answer(&sending);
    let Shared { port, client, .. } = shared;
    serve_read(port, client, reading, body, &mut answer, gone).await;
}

/// A stream's body.
pub(super) struct Body {
    /// What came of it while the stream was held.
    early: Bytes,
    receive: RecvStream,
}

impl Body {
    pub(super) const fn new(receive: RecvStream) -> Self {
        Self {
            early: Bytes::new(),
            receive,
        }
    }

    /// The body behind this beginning.
    pub(super) fn after(early: Vec<u8>, receive: RecvStream) -> Self {
        Self {
            early: early.into(),
            receive,
        }
    }
}

impl RequestBody for Body {
    async fn next(&mut self) -> Result<Part, BodyFailed> {
        if !self.early.is_empty() {
            return Ok(Part::Data(std::mem::take(&mut self.early)));
        }
        loop {
            match poll_fn(|context| self.receive.poll_data(context)).await {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Ok(Part::Data(data)),
                Some(Err(error)) => return Err(BodyFailed::Left(to_io(error))),
                None => break,
            }
        }
        let fields = poll_fn(|context| self.receive.poll_trailers(context)).await;
        let fields = fields.map_err(|error| BodyFailed::Left(to_io(error)))?;
        let mut trailer = Vec::new();
        if let Some(fields) = fields {
            let fields = fields
                .iter()
                .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
            write_trailer(fields, &mut trailer).map_err(BodyFailed::Trailer)?;
        }
        Ok(Part::End { trailer })
    }

    fn written(&mut self, bytes: usize) {
        // Fails only for more than was received.
        self.receive.flow_control().release_capacity(bytes).ok();
    }
}

/// The sending half of a stream, shared by those who write and those who watch for its end.
enum Sending {
    Respond(SendResponse<Bytes>),
    Stream(SendStream<Bytes>),
}

impl Sending {
    fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let reset = match self {
            Self::Respond(respond) => respond.poll_reset(context),
            Self::Stream(stream) => stream.poll_reset(context),
        };
        reset.map(|reset| match reset {
            Ok(reason) => to_io_reason(reason).into(),
            Err(error) => to_io(error),
        })
    }

    fn stream(&mut self) -> io::Result<&mut SendStream<Bytes>> {
        match self {
            Self::Stream(stream) => Ok(stream),
            Self::Respond(_) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn respond(&mut self) -> io::Result<&mut SendResponse<Bytes>> {
        match self {
            Self::Respond(respond) => Ok(respond),
            Self::Stream(_) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

struct Answer<'s>(&'s RefCell<Sending>);

impl AnswerSink for Answer<'_> {
    async fn interim(&mut self, head: AnswerHead<'_>) -> io::Result<()> {
        let mut sending = self.0.borrow_mut();
        let sent = sending.respond()?.send_informational(head.to_response());
        sent.map_err(to_io)
    }

    async fn head(&mut self, head: AnswerHead<'_>, more: More) -> io::Result<()> {
        let mut sending = self.0.borrow_mut();
        let stream = sending
            .respond()?
            .send_response(head.to_response(), more == More::Ends)
            .map_err(to_io)?;
        *sending = Sending::Stream(stream);
        Ok(())
    }

    async fn data(&mut self, data: &[u8], more: More) -> io::Result<()> {
        let mut data = Bytes::copy_from_slice(data);
        loop {
            poll_fn(|context| poll_room(self.0.borrow_mut().stream()?, data.len(), context))
                .await?;
            if send_some(self.0.borrow_mut().stream()?, &mut data, more)? {
                return Ok(());
            }
        }
    }

    async fn trailer(&mut self, lines: &[u8]) -> io::Result<()> {
        let trailer = answer::to_trailer(lines);
        let mut sending = self.0.borrow_mut();
        sending.stream()?.send_trailers(trailer).map_err(to_io)
    }

    fn reset(&mut self, why: Reset) {
        let reason = match why {
            Reset::Malformed => Reason::PROTOCOL_ERROR,
            Reset::Broken => Reason::INTERNAL_ERROR,
            Reset::Cancelled => Reason::CANCEL,
        };
        match &mut *self.0.borrow_mut() {
            Sending::Respond(respond) => respond.send_reset(reason),
            Sending::Stream(stream) => stream.send_reset(reason),
        }
    }
}

/// Sends data as fast as flow control and the length of our queue allow.
pub(super) async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    more: More,
) -> io::Result<()> {
    loop {
        poll_fn(|context| poll_room(stream, data.len(), context)).await?;
        if send_some(stream, &mut data, more)? {
            return Ok(());
        }
    }
}

/// Waits until some of so many bytes may be sent.
fn poll_room(
    stream: &mut SendStream<Bytes>,
    bytes: usize,
    context: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    if bytes == 0 {
        return Poll::Ready(Ok(()));
    }
    stream.reserve_capacity(bytes);
    if stream.capacity() > 0 {
        return Poll::Ready(Ok(()));
    }
    match stream.poll_capacity(context) {
        Poll::Ready(Some(Ok(_))) => Poll::Ready(Ok(())),
        Poll::Ready(Some(Err(error))) => Poll::Ready(Err(to_io(error))),
        Poll::Ready(None) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        Poll::Pending => Poll::Pending,
    }
}

/// Sends what there is room for; true when that was all.
fn send_some(stream: &mut SendStream<Bytes>, data: &mut Bytes, more: More) -> io::Result<bool> {
    let piece = data.split_to(stream.capacity().min(data.len()));
    let last = data.is_empty();
    let ends = last && more == More::Ends;
    if !piece.is_empty() || ends {
        stream.send_data(piece, ends).map_err(to_io)?;
    }
    Ok(last)
}
