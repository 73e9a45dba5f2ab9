//! One request on a shared HTTP/2 connection to an upstream.
//!
//! Whether a request may be sent again is decided by what HTTP/2 proves: a stream that the upstream refused, or that
//! lies beyond the last one of its GOAWAY, was not processed (RFC 9113, sections 6.8 and 8.7). A body that has left
//! us is gone all the same; it is never kept.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};

use super::message::{self, Asks, Size};
use super::session::Session;
use crate::config::Limits;
use crate::error::RequestError;
use crate::http::decide::AnswerEdits;
use crate::http::exchange::{INTERIM_MAX, Progress};
use crate::http::h2::stream::send_data;
use crate::http::h2::to_io;
use crate::http::head::{Framing, HeadError};
use crate::http::mux::head::write_trailer;
use crate::http::mux::websocket::accept_of;
use crate::http::mux::{
    AnswerHead, AnswerSink, Idle, More, Part, RequestBody, Reset, Unsent, count_down, fill_in_time,
    within,
};
use crate::http::request::{Method, Request, Upgrade};
use crate::http::response::{self, Encoding};
use crate::limit::intake::Intake;
use crate::service::Ticket;

/// One attempt to get one request answered.
pub(crate) struct Http2Exchange<'e> {
    pub(crate) session: &'e Session,
    pub(crate) ticket: &'e Ticket<'e>,
    pub(crate) request: &'e Request,
    /// The request's head as an HTTP/1 upstream would get it.
    pub(crate) head: &'e [u8],
    /// What the route changes in the answer.
    pub(crate) edits: Option<AnswerEdits<'e>>,
    pub(crate) limits: &'e Limits,
    /// Whether we would go on with the client afterwards.
    pub(crate) may_persist: bool,
    pub(crate) progress: &'e Progress,
}

/// How an exchange ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// The answer is complete.
    Answer { client_persists: bool },
    /// A WebSocket came and went.
    Tunnelled,
}

/// What an upstream's stream is once its head is here.
struct Begun {
    response: Response<RecvStream>,
    send: SendStream<Bytes>,
}

impl Http2Exchange<'_> {
    /// Runs the exchange to its end.
    ///
    /// # Cancel safety
    /// A drop resets the stream; the connection goes on.
    pub(crate) async fn run<B: RequestBody, A: AnswerSink>(
        &self,
        unsent: &mut Unsent<'_, B>,
        answer: &mut A,
        scratch: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        if self.request.upgrade == Upgrade::Asked {
            return self.tunnel(unsent, answer, scratch).await;
        }
        let ends = self.request.framing == Framing::Empty;
        if ends {
            unsent.expect_end(self.limits.client_silence_max).await?;
        }
        let (mut response, mut send) = self.begin(Asks::Answer, ends).await?;
        if ends {
            self.progress.request_done.set(true);
            return self.receive(&mut response, answer, scratch).await;
        }
        let untouched = std::cell::Cell::new(true);
        let mut sending = pin!(self.send(&mut send, unsent, &untouched));
        let mut receiving = pin!(self.receive(&mut response, answer, scratch));
        let mut sending_goes_on = true;
        let received = loop {
            tokio::select! {
                biased;
                sent = &mut sending, if sending_goes_on => {
                    sent?;
                    sending_goes_on = false;
                }
                received = &mut receiving => break received,
            }
        };
        match received {
            // What left us cannot be sent a second time, processed or not.
            Err(RequestError::NotProcessed) if !untouched.get() => Err(RequestError::NoAnswer(
                io::ErrorKind::ConnectionRefused.into(),
            )),
            received => received,
        }
    }

    async fn begin(
        &self,
        asks: Asks,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), RequestError> {
        let request = message::request(self.head, self.session.scheme(), asks);
        let request = request.map_err(RequestError::Head)?;
        let mut sender = self.session.sender();
        let ready = poll_fn(|context| sender.poll_ready(context));
        let ready = within(self.limits.connect_max, pin!(ready)).await;
        // A connection that takes no stream has taken nothing of the request.
        let begun = match ready {
            Some(Ok(())) => sender.send_request(request, ends).ok(),
            Some(Err(_)) | None => None,
        };
        let begun = begun.ok_or(RequestError::NotProcessed)?;
        self.progress.sent.set(self.head.len() as u64);
        Ok(begun)
    }

    async fn send<B: RequestBody>(
        &self,
        send: &mut SendStream<Bytes>,
        unsent: &mut Unsent<'_, B>,
        untouched: &std::cell::Cell<bool>,
    ) -> Result<(), RequestError> {
        let intake = Intake::new(self.limits, &self.progress.answering);
        let mut left = match self.request.framing {
            Framing::Length(length) => Some(length),
            _ => None,
        };
        loop {
            let silence = if self.progress.answering.get() {
                self.limits.tunnel_idle_max
            } else {
                self.limits.client_silence_max
            };
            fill_in_time(unsent, &intake, silence).await?;
            let (bytes, last) = unsent.size();
            left = count_down(left, bytes, last)?;
            intake.take(bytes).map_err(|_| RequestError::BodyTooLong)?;
            if left == Some(0) && bytes > 0 {
                unsent.expect_end(self.limits.client_silence_max).await?;
            }
            let Some(part) = unsent.take() else { continue };
            untouched.set(false);
            let passed = within(self.limits.response_max, pin!(pass(send, part))).await;
            match passed {
                None => return Err(RequestError::UpstreamSilent),
                // Whoever reads the answer hears the reason.
                Some(Err(_)) => return Ok(()),
                Some(Ok(())) => {}
            }
            unsent.body.written(bytes);
            let sent = &self.progress.sent;
            sent.set(sent.get() + bytes as u64);
            if last {
                self.progress.request_done.set(true);
                return Ok(());
            }
        }
    }

    /// Waits for the final head; passes interim ones on.
    async fn final_head<A: AnswerSink>(
        &self,
        future: &mut ResponseFuture,
        answer: &mut A,
        out: &mut Vec<u8>,
    ) -> Result<Response<RecvStream>, RequestError> {
        let mut interim_count = 0;
        loop {
            let interim = poll_fn(|context| {
                if let std::task::Poll::Ready(Some(interim)) = future.poll_informational(context) {
                    return std::task::Poll::Ready(Ok(interim));
                }
                Pin::new(&mut *future).poll(context).map(Err)
            });
            let next = match within(self.limits.response_max, pin!(interim)).await {
                Some(next) => next,
                // The time runs from the end of the request.
                None if !self.progress.request_done.get() => continue,
                None => return Err(RequestError::UpstreamSilent),
            };
            self.progress.heard.set(true);
            let interim = match next {
                Err(last) => return last.map_err(|error| self.no_answer(error)),
                Ok(interim) => interim.map_err(|error| self.no_answer(error))?,
            };
            let status = interim.status().as_u16();
            interim_count += 1;
            if status == 101 || interim_count > INTERIM_MAX {
                return Err(RequestError::AnswerHead(HeadError::TooManyInterim));
            }
            self.rewrite(status, interim.headers(), Size::Told, true, out)?;
            taken(
                self.limits,
                pin!(answer.interim(AnswerHead::new(status, out))),
            )
            .await?;
        }
    }

    /// Reads a head as strictly as one of HTTP/1, and writes the client's version of it.
    fn rewrite(
        &self,
        status: u16,
        fields: &HeaderMap,
        size: Size,
        may_persist: bool,
        out: &mut Vec<u8>,
    ) -> Result<response::Response, RequestError> {
        let mut text = Vec::with_capacity(512);
        message::write_answer(status, fields, size, &mut text).map_err(RequestError::AnswerHead)?;
        out.clear();
        response::rewrite(&text, self.request, may_persist, self.edits, out)
            .map_err(RequestError::AnswerHead)
    }

    async fn receive<A: AnswerSink>(
        &self,
        future: &mut ResponseFuture,
        answer: &mut A,
        out: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let response = self.final_head(future, answer, out).await?;
        self.answer(response, answer, out).await
    }

    async fn answer<A: AnswerSink>(
        &self,
        response: Response<RecvStream>,
        answer: &mut A,
        out: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let (parts, body) = response.into_parts();
        let status = parts.status.as_u16();
        let size = if parts.headers.contains_key(http::header::CONTENT_LENGTH) {
            Size::Told
        } else if !body.is_end_stream() {
            Size::Unknown
        } else if self.request.method == Method::Head || matches!(status, 204 | 304) {
            Size::Told
        } else {
            Size::Zero
        };
        let may_persist = self.may_persist && self.progress.request_done.get();
        let rewritten = self.rewrite(status, &parts.headers, size, may_persist, out)?;
        self.ticket.answered(status);
        self.progress.status.set(status);
        self.progress.answering.set(true);
        let head = AnswerHead::new(status, out);
        let bodiless = rewritten.framing == Framing::Empty || body.is_end_stream();
        if bodiless {
            taken(self.limits, pin!(answer.head(head, More::Ends))).await?;
        } else {
            taken(self.limits, pin!(answer.head(head, More::Follows))).await?;
            self.relay(body, answer).await?;
        }
        let counted = bodiless
            || rewritten.encoding == Encoding::Chunked
            || matches!(rewritten.framing, Framing::Length(_));
        Ok(Received::Answer {
            client_persists: rewritten.client_persists
                && counted
                && self.progress.request_done.get(),
        })
    }

    async fn relay<A: AnswerSink>(
        &self,
        mut body: RecvStream,
        answer: &mut A,
    ) -> Result<(), RequestError> {
        loop {
            let data = pin!(poll_fn(|context| body.poll_data(context)));
            let data = match within(self.limits.between_bytes_max, data).await {
                None => return Err(RequestError::UpstreamSilent),
                Some(None) => break,
                Some(Some(data)) => data.map_err(cut)?,
            };
            if !data.is_empty() {
                taken(self.limits, pin!(answer.data(&data, More::Follows))).await?;
                let answered = &self.progress.answered;
                answered.set(answered.get() + data.len() as u64);
            }
            // Fails only for more than was received.
            body.flow_control().release_capacity(data.len()).ok();
        }
        let trailer = pin!(poll_fn(|context| body.poll_trailers(context)));
        match within(self.limits.between_bytes_max, trailer).await {
            None => Err(RequestError::UpstreamSilent),
            Some(Err(error)) => Err(cut(error)),
            Some(Ok(None)) => taken(self.limits, pin!(answer.data(&[], More::Ends))).await,
            Some(Ok(Some(fields))) => {
                let mut lines = Vec::new();
                let fields = fields
                    .iter()
                    .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
                write_trailer(fields, &mut lines).map_err(RequestError::AnswerHead)?;
                taken(self.limits, pin!(answer.trailer(&lines))).await
            }
        }
    }

    /// A WebSocket through an upstream that takes them (RFC 8441).
    async fn tunnel<B: RequestBody, A: AnswerSink>(
        &self,
        unsent: &mut Unsent<'_, B>,
        answer: &mut A,
        out: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let websocket = message::asks_for(self.head, b"websocket");
        if !websocket || !self.session.takes_websockets(self.limits.connect_max).await {
            return Err(RequestError::NoTunnel);
        }
        let (mut future, send) = self.begin(Asks::WebSocket, false).await?;
        self.progress.request_done.set(true);
        let response = self.final_head(&mut future, answer, out).await?;
        if !response.status().is_success() {
            return self.answer(response, answer, out).await;
        }
        let mut text = Vec::new();
        message::write_answer(101, response.headers(), Size::Told, &mut text)
            .map_err(RequestError::AnswerHead)?;
        // The empty line goes, the handshake's end takes its place.
        text.truncate(text.len() - 2);
        text.extend_from_slice(b"Connection: upgrade\r\nUpgrade: websocket\r\n");
        if let Some(key) = message::value(self.head, b"sec-websocket-key") {
            text.extend_from_slice(b"Sec-WebSocket-Accept: ");
            text.extend_from_slice(&accept_of(key));
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(b"\r\n");
        out.clear();
        response::rewrite(&text, self.request, true, self.edits, out)
            .map_err(RequestError::AnswerHead)?;
        self.ticket.tunnels();
        self.progress.status.set(101);
        self.progress.answering.set(true);
        let head = AnswerHead::new(200, out);
        taken(self.limits, pin!(answer.head(head, More::Follows))).await?;
        self.copy(Begun { response, send }, unsent, answer).await;
        Ok(Received::Tunnelled)
    }

    /// Bytes both ways until both ends have finished, one has failed, or both were silent for too long.
    async fn copy<B: RequestBody, A: AnswerSink>(
        &self,
        begun: Begun,
        unsent: &mut Unsent<'_, B>,
        answer: &mut A,
    ) {
        let Begun { response, mut send } = begun;
        let mut receive = response.into_body();
        let idle = Idle::new(self.limits.tunnel_idle_max);
        let up = async {
            loop {
                let part = unsent.body.next().await.map_err(io::Error::from)?;
                let (bytes, last) = match &part {
                    Part::Data(data) => (data.len(), false),
                    Part::End { .. } => (0, true),
                };
                pass(&mut send, part).await?;
                unsent.body.written(bytes);
                idle.touch();
                if last {
                    return Ok(());
                }
            }
        };
        let down = async {
            while let Some(data) = poll_fn(|context| receive.poll_data(context)).await {
                let data = data.map_err(to_io)?;
                answer.data(&data, More::Follows).await?;
                receive.flow_control().release_capacity(data.len()).ok();
                let answered = &self.progress.answered;
                answered.set(answered.get() + data.len() as u64);
                idle.touch();
            }
            answer.data(&[], More::Ends).await
        };
        let both = async { tokio::try_join!(up, down) };
        let whole = tokio::select! {
            biased;
            both = both => both.map(|_| ()),
            () = idle.run() => Err(io::ErrorKind::TimedOut.into()),
        };
        if whole.is_err() {
            answer.reset(Reset::Broken);
            send.send_reset(Reason::CANCEL);
        }
    }

    /// Why no head came.
    fn no_answer(&self, error: h2::Error) -> RequestError {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        // Only streams beyond the last one of a GOAWAY see it as their own end.
        let beyond = error.is_go_away();
        if error.is_remote() && (refused || beyond) {
            self.progress.heard.set(false);
            return RequestError::NotProcessed;
        }
        RequestError::NoAnswer(to_io(error))
    }
}

/// Hands one part to the upstream, as fast as its flow control allows.
async fn pass(send: &mut SendStream<Bytes>, part: Part) -> io::Result<()> {
    match part {
        Part::Data(data) => send_data(send, data, More::Follows).await,
        Part::End { trailer } if trailer.is_empty() => {
            send.send_data(Bytes::new(), true).map_err(to_io)
        }
        Part::End { trailer } => {
            let trailer = crate::http::mux::answer::to_trailer(&trailer);
            send.send_trailers(trailer).map_err(to_io)
        }
    }
}

fn cut(error: h2::Error) -> RequestError {
    RequestError::AnswerCut(to_io(error))
}

/// Waits for the client to take something, as long as it may be silent.
async fn taken(
    limits: &Limits,
    taking: Pin<&mut impl Future<Output = io::Result<()>>>,
) -> Result<(), RequestError> {
    match within(limits.client_silence_max, taking).await {
        Some(taken) => taken.map_err(RequestError::ClientLeft),
        None => Err(RequestError::ClientSilent),
    }
}
