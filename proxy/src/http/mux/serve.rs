//! One stream from its header list to its log line: the stream's counterpart of a client connection.
//!
//! Held by not reading: a held stream is its written head and a parked future, or a record ([`super::held`]) where the
//! protocol looks after many; its body stays with the protocol, which gives no credit for it. A stream that is reset
//! frees its place at once.

use std::io;
use std::pin::{Pin, pin};
use std::time::Instant;

use super::exchange::{Received, StreamExchange, Unsent, within};
use super::tunnel::Tunnel;
use super::websocket::Key;
use super::{AnswerHead, AnswerSink, More, RequestBody, Reset};
use crate::access_log::Line;
use crate::buffer::Buffer;
use crate::error::RequestError;
use crate::http::answer::{self, After};
use crate::http::decide::{Rules, decide};
use crate::http::h2::upstream::{Http2Exchange, Slot};
use crate::http::head::{self, HeadError, Scan};
use crate::http::outcome;
use crate::http::request::{self, Method};
use crate::http::served::Served;
use crate::listen::client::{Client, Scheme};
use crate::listen::port::{Connected, Link, Port, Presence, Visitor};
use crate::service::inflight::Course;
use crate::service::pool::Upstream;
use crate::service::{Called, Ticket};
use crate::stream;
use crate::upstream::Outcome;

/// What a header list asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    /// As HTTP/1.1; from [`Buffers::take_output`](crate::buffer::Buffers::take_output), where it goes back.
    pub(crate) head: Vec<u8>,
    /// The key in it, if it asks for a WebSocket.
    pub(crate) key: Option<Key>,
}

/// A request whose header list was read, or why it cannot be served.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Nothing once it is served.
    pub(super) begun: Option<Result<Begun, RequestError>>,
}

/// A request at its beginning.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) served: Served,
    /// The key in it, if it asks for a WebSocket.
    pub(super) key: Option<Key>,
    /// Why it is refused, if it is.
    pub(super) refusal: Option<RequestError>,
    /// How its wait ended, if it has waited at the gate already.
    pub(super) waited: Option<Waited>,
}

/// How the wait of a held request ended.
#[derive(Debug)]
pub(crate) enum Waited {
    /// It was let through, or refused.
    Called(Called),
    /// Its stream was reset, or its connection died.
    Left(io::Error),
}

/// Serves one request from its header list to the end of its answer. `gone` completes when the stream was reset or
/// its connection died; it is not polled again after that.
pub(crate) async fn serve_stream<B: RequestBody, A: AnswerSink>(
    port: &Port,
    client: &Client,
    asked: Result<Asked, HeadError>,
    body: &mut B,
    answer: &mut A,
    gone: impl Future<Output = io::Error>,
) {
    let mut reading = read_stream(port, client, asked);
    serve_read(port, client, &mut reading, body, answer, gone).await;
}

/// The same once the header list was read.
pub(crate) async fn serve_read<B: RequestBody, A: AnswerSink>(
    port: &Port,
    client: &Client,
    reading: &mut Reading,
    body: &mut B,
    answer: &mut A,
    gone: impl Future<Output = io::Error>,
) {
    let mut gone = pin!(gone);
    let begun = match &mut reading.begun {
        Some(Ok(begun)) => begun,
        Some(Err(error)) => return Box::pin(refuse(port, client, answer, error)).await,
        None => return,
    };
    let Begun {
        served,
        key,
        refusal,
        waited,
    } = begun;
    let mut forwarding = Forwarding {
        port,
        client,
        key: key.as_ref(),
        answer,
    };
    let outcome = match (refusal.take(), served.redirect()) {
        (Some(error), _) => Err(error),
        (None, Some(_)) => {
            Box::pin(forwarding.redirect(served)).await;
            Ok(())
        }
        (None, None) if served.request.method == Method::Connect => {
            Box::pin(forwarding.connect(served, body, gone.as_mut())).await
        }
        (None, None) => {
            let waited = waited.take();
            forwarding
                .forward(served, waited, body, gone.as_mut())
                .await
        }
    };
    if let Err(error) = outcome {
        // Boxed like all that a held stream has no need of.
        Box::pin(forwarding.answer_failure(served, &error)).await;
    }
    port.count(served.progress.status.get());
    port.tell(client, served);
    if let Some(Ok(Begun { served, .. })) = reading.begun.take() {
        port.in_flight.end(served.progress);
        port.buffers.give_output(served.head);
    }
}

/// Reads the head by the rules of HTTP/1 and writes the upstream's version of it.
pub(crate) fn read_stream(
    port: &Port,
    client: &Client,
    asked: Result<Asked, HeadError>,
) -> Reading {
    let begun = asked
        .map_err(RequestError::Head)
        .and_then(|asked| read(port, client, asked));
    Reading { begun: Some(begun) }
}

fn read(port: &Port, client: &Client, asked: Asked) -> Result<Begun, RequestError> {
    let Asked { head: text, key } = asked;
    let id = port.next_id();
    let arrival = Instant::now();
    let mut head = port.buffers.take_output();
    let settings = port.settings();
    let limit = settings.limits.head_bytes_max;
    let decided = if text.len() > limit {
        Err(RequestError::HeadTooLong)
    } else {
        let mut room = request::field_room();
        let by = Rules {
            service: &settings.service,
            limits: &settings.limits,
            is_pressed: settings.guards.memory.is_pressed(),
            tracing: settings.tracing(),
            client,
            id,
            now: arrival,
        };
        request::parse(&text, &mut room)
            .map(|parsed| decide(by, &parsed, &mut head))
            .map_err(RequestError::Head)
    };
    port.buffers.give_output(text);
    let decided = match decided {
        Ok(decided) => decided,
        Err(error) => {
            port.buffers.give_output(head);
            return Err(error);
        }
    };
    let passage = decided.passage(&settings);
    let served = Served {
        id,
        arrival,
        request: decided.request,
        treatment: decided.treatment,
        hop: decided.hop,
        head,
        passage,
        progress: port.in_flight.begin(),
    };
    Ok(Begun {
        served,
        key,
        refusal: decided.refusal,
        waited: None,
    })
}

/// Answers what cannot be served. Malformed is malformed for the protocol itself, and has no answer.
async fn refuse<A: AnswerSink>(port: &Port, client: &Client, answer: &mut A, error: &RequestError) {
    let malformed = matches!(
        error,
        RequestError::Head(
            HeadError::Pseudo
                | HeadError::FieldName
                | HeadError::Blank
                | HeadError::ConnectionField
                | HeadError::Control
        )
    );
    let status = error.status().filter(|_| !malformed).unwrap_or(0);
    if status == 0 {
        answer.reset(Reset::Malformed);
    } else {
        let after = port.settings().limits.client_silence_max;
        // A client that does not take its answer has none.
        drop(within(after, pin!(say(port, answer, status, error, false))).await);
    }
    port.count(status);
    port.count_refusal(error);
    port.log(|| Line::refused(port, client.address, status, 0, error));
}

/// Writes the answer to a failed request.
async fn say<A: AnswerSink>(
    port: &Port,
    answer: &mut A,
    status: u16,
    error: &RequestError,
    is_head: bool,
) -> io::Result<usize> {
    let mut out = port.buffers.take_output();
    let retry_after_s = port.settings().limits.retry_after_s;
    answer::write(
        &mut out,
        status,
        error,
        retry_after_s,
        After::KeepAlive,
        is_head,
    );
    say_text(port, answer, status, out).await
}

/// Writes an answer of our own, given as HTTP/1.
async fn say_text<A: AnswerSink>(
    port: &Port,
    answer: &mut A,
    status: u16,
    out: Vec<u8>,
) -> io::Result<usize> {
    let end = match head::scan(&out, 0) {
        Ok(Scan::Complete(end)) => end,
        Ok(Scan::Partial(_)) | Err(_) => out.len(),
    };
    let (text, body) = out.split_at(end);
    let text = AnswerHead::new(status, text);
    let said = if body.is_empty() {
        answer.head(text, More::Ends).await
    } else {
        match answer.head(text, More::Follows).await {
            Ok(()) => answer.data(body, More::Ends).await,
            Err(error) => Err(error),
        }
    };
    let count = body.len();
    port.buffers.give_output(out);
    said.map(|()| count)
}

type Gone<'g> = Pin<&'g mut dyn Future<Output = io::Error>>;

struct Forwarding<'f, A> {
    port: &'f Port,
    client: &'f Client,
    key: Option<&'f Key>,
    answer: &'f mut A,
}

impl<'f, A: AnswerSink> Forwarding<'f, A> {
    /// Forwards until the answer is complete, on a second connection where the first was dead before it began.
    async fn forward<B: RequestBody>(
        &mut self,
        served: &mut Served,
        waited: Option<Waited>,
        body: &mut B,
        mut gone: Gone<'_>,
    ) -> Result<(), RequestError> {
        let mut unsent = Unsent::new(body);
        let mut ticket = match waited {
            None => {
                let mut visitor = visitor(served, self.client, gone.as_mut());
                self.port.admit(&mut visitor).await?
            }
            Some(Waited::Called(called)) => {
                let ticket = called.ticket(&self.port.service.gate);
                let (passage, head) = (&served.passage, &mut served.head);
                let ticket = self.port.called(ticket, passage, head, passage.held)?;
                self.port.count_write(passage);
                ticket
            }
            Some(Waited::Left(reason)) => return Err(RequestError::ClientLeft(reason)),
        };
        let mut may_reuse = true;
        loop {
            // Boxed, so that a held stream is small: none of this exists before a request goes upstream.
            let attempt =
                Box::pin(self.attempt(ticket, may_reuse, served, &mut unsent, gone.as_mut()));
            match attempt.await? {
                None => return Ok(()),
                Some(again) => ticket = again,
            }
            may_reuse = false;
        }
    }

    /// Opens the tunnel that a CONNECT asks for, and carries bytes both ways to its end. It is held like a request.
    async fn connect<B: RequestBody>(
        &mut self,
        served: &mut Served,
        body: &mut B,
        mut gone: Gone<'_>,
    ) -> Result<(), RequestError> {
        let port = self.port;
        let mut visitor = visitor(served, self.client, gone.as_mut());
        let ticket = port.admit(&mut visitor).await?;
        let connected = port.connect(ticket, false, &mut visitor).await?;
        connected.carry(served.passage.terms);
        let Connected {
            ticket,
            link,
            chosen,
        } = connected;
        let Link::Own { upstream, .. } = link else {
            return Err(RequestError::NoTunnel);
        };
        served.passage.register = Some(ticket.register());
        served.progress.course.set(Course::Tunnel);
        let _row = port.in_flight.enter(served.entry(self.client.address));
        ticket.tunnels();
        // What is said in it is not ours to understand: that it listens is all we know.
        chosen.report(Outcome::Answered(200));
        served.progress.status.set(200);
        served.progress.answering.set(true);
        let settings = port.settings();
        let limits = served.limits(&settings.limits);
        let tunnel = Tunnel {
            upstream: &upstream.stream,
            buffers: &port.buffers,
            idle_max: limits.tunnel_idle_max,
            progress: &served.progress,
        };
        let carried = async {
            let head = AnswerHead::new(200, answer::TUNNEL);
            let silence = limits.client_silence_max;
            let said = within(silence, pin!(self.answer.head(head, More::Follows))).await;
            said.ok_or(RequestError::ClientSilent)?
                .map_err(RequestError::ClientLeft)?;
            tunnel.run(Buffer::default(), body, self.answer).await;
            Ok(())
        };
        let outcome = tokio::select! {
            biased;
            reason = gone.as_mut() => Err(RequestError::ClientLeft(reason)),
            carried = carried => carried,
            () = port.cutting.cut(served.passage.terms.at_cut) => Err(RequestError::Cut(served.id)),
        };
        port.pool.part(upstream);
        outcome
    }

    /// Forwards on one connection. Gives the ticket back if the request may be sent on another.
    async fn attempt<B: RequestBody>(
        &mut self,
        ticket: Ticket<'f>,
        may_reuse: bool,
        served: &mut Served,
        unsent: &mut Unsent<'_, B>,
        mut gone: Gone<'_>,
    ) -> Result<Option<Ticket<'f>>, RequestError> {
        let port = self.port;
        let connected = port
            .connect(
                ticket,
                may_reuse,
                &mut visitor(served, self.client, gone.as_mut()),
            )
            .await?;
        connected.carry(served.passage.terms);
        let Connected {
            ticket,
            link,
            chosen,
        } = connected;
        served.passage.register = Some(ticket.register());
        served.request.set_cookie = chosen.set_cookie(self.client.scheme == Scheme::Https);
        let row = port.in_flight.enter(served.entry(self.client.address));
        // A shared connection may have ended since it was looked at, as a kept one may.
        let kept = link.is_kept() || link.is_shared();
        let received = {
            let exchange = pin!(self.exchange(served, unsent, &ticket, &link));
            tokio::select! {
                biased;
                reason = gone.as_mut() => Err(RequestError::ClientLeft(reason)),
                received = exchange => received,
                () = port.cutting.cut(served.passage.terms.at_cut) => {
                    Err(RequestError::Cut(served.id))
                }
            }
        };
        served.report(&chosen, kept, received.as_ref().err());
        match (link, &received) {
            (Link::Own { upstream, .. }, Err(error)) => {
                outcome::let_go(port, upstream, served, row, error);
            }
            (link, _) => port.pool.give_back(link, matches!(received, Ok(true))),
        }
        match received {
            Ok(_) => Ok(None),
            Err(error) if may_reuse && served.may_be_sent_again(&error, kept) => Ok(Some(ticket)),
            Err(error) => Err(error),
        }
    }

    /// True when the upstream's connection may serve another request.
    async fn exchange<B: RequestBody>(
        &mut self,
        served: &Served,
        unsent: &mut Unsent<'_, B>,
        ticket: &Ticket<'_>,
        link: &Link,
    ) -> Result<bool, RequestError> {
        match link {
            Link::Own { upstream, .. } => {
                self.exchange_plainly(served, unsent, ticket, upstream)
                    .await
            }
            // Boxed: the way to an HTTP/1 upstream should not pay for its room.
            Link::Shared(slot) => {
                Box::pin(self.exchange_shared(served, unsent, ticket, slot)).await
            }
        }
    }

    async fn exchange_shared<B: RequestBody>(
        &mut self,
        served: &Served,
        unsent: &mut Unsent<'_, B>,
        ticket: &Ticket<'_>,
        slot: &Slot,
    ) -> Result<bool, RequestError> {
        let port = self.port;
        let settings = port.settings();
        let limits = served.limits(&settings.limits);
        let mut scratch = port.buffers.take_output();
        let exchange = Http2Exchange {
            session: slot.session(),
            ticket,
            request: &served.request,
            head: &served.head,
            edits: served.answer_edits(),
            limits,
            may_persist: true,
            progress: &served.progress,
        };
        let received = {
            let exchanged = pin!(exchange.run(unsent, self.answer, &mut scratch));
            stream::within(limits.request_max, exchanged).await
        };
        port.buffers.give_output(scratch);
        let received = received.unwrap_or(Err(RequestError::TookTooLong));
        received.map(|_| true)
    }

    /// True when the upstream's connection may serve another request.
    async fn exchange_plainly<B: RequestBody>(
        &mut self,
        served: &Served,
        unsent: &mut Unsent<'_, B>,
        ticket: &Ticket<'_>,
        upstream: &Upstream,
    ) -> Result<bool, RequestError> {
        let port = self.port;
        let settings = port.settings();
        let limits = served.limits(&settings.limits);
        let mut buffer = Buffer::default();
        let mut scratch = port.buffers.take_output();
        let exchange = StreamExchange {
            upstream: &upstream.stream,
            ticket,
            request: &served.request,
            head: &served.head,
            key: self.key,
            edits: served.answer_edits(),
            limits,
            buffers: &port.buffers,
            progress: &served.progress,
        };
        let received = {
            let exchanged = pin!(exchange.run(unsent, self.answer, &mut buffer, &mut scratch));
            stream::within(limits.request_max, exchanged)
                .await
                .unwrap_or(Err(RequestError::TookTooLong))
        };
        port.buffers.give_output(scratch);
        match received {
            Ok(Received::Answer { upstream_persists }) => {
                port.buffers.give(buffer);
                Ok(upstream_persists)
            }
            Ok(Received::Tunnel) => {
                served.progress.course.set(Course::Tunnel);
                let tunnel = Tunnel {
                    upstream: &upstream.stream,
                    buffers: &port.buffers,
                    idle_max: limits.tunnel_idle_max,
                    progress: &served.progress,
                };
                Box::pin(tunnel.run(buffer, unsent.body, self.answer)).await;
                Ok(false)
            }
            Err(error) => {
                port.buffers.give(buffer);
                Err(error)
            }
        }
    }

    /// Sends the client elsewhere.
    async fn redirect(&mut self, served: &Served) {
        let Some((status, out)) = served.write_redirect(&self.port.buffers, After::KeepAlive)
        else {
            return;
        };
        served.progress.status.set(status);
        let limit = self.port.settings().limits.client_silence_max;
        let saying = say_text(self.port, self.answer, status, out);
        if !matches!(within(limit, pin!(saying)).await, Some(Ok(_))) {
            self.answer.reset(Reset::Cancelled);
        }
    }

    async fn answer_failure(&mut self, served: &Served, error: &RequestError) {
        let progress = &served.progress;
        outcome::note(self.port, self.client, served, error);
        tracing::debug!(client = %self.client.address, id = %served.id, fault = ?error.fault(), "{error}");
        let status = error.status().filter(|_| !progress.answering.get());
        let Some(status) = status else {
            // Half an answer is out, or nobody is there: only a reset says so.
            self.answer.reset(match error {
                RequestError::ClientLeft(_) | RequestError::ClientSilent => Reset::Cancelled,
                _ => Reset::Broken,
            });
            return;
        };
        progress.status.set(status);
        self.port.count_refusal(error);
        let limit = self.port.settings().limits.client_silence_max;
        let is_head = served.request.method == Method::Head;
        let saying = say(self.port, self.answer, status, error, is_head);
        if let Some(Ok(count)) = within(limit, pin!(saying)).await {
            progress.answered.set(count as u64);
        } else {
            self.answer.reset(Reset::Cancelled);
        }
    }
}

fn visitor<'v>(served: &'v mut Served, client: &Client, gone: Gone<'v>) -> Visitor<'v> {
    Visitor {
        presence: Presence::Stream(gone),
        client: client.address,
        passed: client.passed.clone(),
        buffer: None,
        head: &mut served.head,
        passage: &mut served.passage,
    }
}
