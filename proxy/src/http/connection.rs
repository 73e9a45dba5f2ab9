//! One client connection, one task: read a head, ask the gate, forward, answer, again.
//!
//! Hold by not reading: a held request is its parsed head and this parked task; its body stays in the kernel.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::time::timeout;

use super::answer::{self, After};
use super::decide::{Decided, Rules, decide};
use super::exchange::{Exchange, Received};
use super::h2;
use super::h2::upstream::{self as shared, Http2Exchange, Slot};
use super::head::{self, Framing, Scan};
use super::mux::Unsent;
use super::outcome;
use super::plain::{PlainAnswer, PlainBody};
use super::request::{self, Method, RequestId};
use super::served::Served;
use crate::access_log::Line;
use crate::acme;
use crate::buffer::Buffer;
use crate::error::RequestError;
use crate::listen::Visit;
use crate::listen::client::Scheme;
use crate::listen::idle::IdlePlace;
use crate::listen::port::{Connected, Link, Presence, Settings, Visitor};
use crate::service::Ticket;
use crate::service::inflight::{Course, InFlightRow};
use crate::service::pool::Upstream;
use crate::stream;
use crate::tcp::copy::tunnel;
use crate::upstream::Outcome;

/// How a client's time with HTTP/1 ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// With its connection.
    Closed,
    /// It speaks HTTP/2 instead.
    Http2 {
        /// What was read of the connection, from its first byte on.
        early: Buffer,
    },
}

/// Serves a client until one of the two has had enough.
pub(crate) fn serve(visit: &Visit) -> impl Future<Output = Ended> {
    let mut connection = Connection {
        visit,
        settings: visit.port.settings(),
        buffer: Buffer::default(),
        is_new: true,
    };
    connection.read_at_once();
    async move {
        loop {
            // On the heap for as long as it lasts: an idle connection is its task, and should be small.
            let next = match connection.next_request_begins().await {
                Begins::Request => Box::pin(connection.next_request(None)).await,
                Begins::Unread => Box::pin(connection.next_request_unread()).await,
                Begins::Never => break,
            };
            match next {
                Next::Request => {}
                Next::Close => break,
                Next::Http2 => {
                    return Ended::Http2 {
                        early: connection.buffer,
                    };
                }
            }
        }
        connection.visit.port.buffers.give(connection.buffer);
        Ended::Closed
    }
}

/// What becomes of a connection after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    Close,
    /// What began was no request, but the preface of HTTP/2.
    Http2,
}

/// What comes of the wait for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    /// Its first bytes.
    Request,
    /// They are there, and are not to be read yet.
    Unread,
    /// None will come.
    Never,
}

/// What becomes of a connection after an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Request,
    Close,
    /// Close after reading what the client still sends, so that it can read our answer.
    Linger,
}

struct Connection<'c> {
    visit: &'c Visit,
    /// As they were when the request began.
    settings: Rc<Settings>,
    buffer: Buffer,
    /// No head has been read yet.
    is_new: bool,
}

impl<'c> Connection<'c> {
    /// Only the first head of a connection may be the preface of HTTP/2.
    fn turns_to_http2(&mut self, end: usize) -> bool {
        std::mem::take(&mut self.is_new) && h2::is_preface(&self.buffer.filled()[..end])
    }

    /// Most clients send at once: a first look saves a turn of the reactor.
    fn read_at_once(&mut self) {
        let Some(socket) = self.visit.stream.plain() else {
            return;
        };
        self.visit.port.buffers.grow(&mut self.buffer);
        // The end and errors are found again by the next read.
        if let Ok(count) = socket.read_now(self.buffer.room()) {
            self.buffer.advance(count);
        }
        self.visit.port.buffers.give_empty(&mut self.buffer);
    }

    /// Waits, without a buffer, for the first bytes of a request. While the service is held, nobody is idle: a client
    /// whose time is over then has it once more. The first request of a connection is read in any case.
    fn next_request_begins(&mut self) -> impl Future<Output = Begins> {
        let mut place = None;
        poll_fn(move |context| self.poll_begins(&mut place, context))
    }

    fn poll_begins(
        &mut self,
        place: &mut Option<IdlePlace<'c>>,
        context: &mut Context<'_>,
    ) -> Poll<Begins> {
        let Visit {
            port,
            stream,
            client,
            ..
        } = self.visit;
        while self.buffer.is_empty() {
            if !self.is_new && !port.reads(client) && stream.has_unread() {
                return Poll::Ready(Begins::Unread);
            }
            port.buffers.grow(&mut self.buffer);
            match stream.try_read(self.buffer.room()) {
                Ok(0) => return Poll::Ready(Begins::Never),
                Ok(count) => self.buffer.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    port.buffers.give_empty(&mut self.buffer);
                    if place.is_none() {
                        let idle_max = self.settings.limits.client_idle_max;
                        *place = port.closing.enter_idle(idle_max);
                    }
                    let Some(held) = place else {
                        return Poll::Ready(Begins::Never);
                    };
                    // An error is found again by the read.
                    if stream.poll_readable(context).is_pending() {
                        ready!(held.poll_over(context));
                        if !port.holds() || port.closing.is_closed() {
                            return Poll::Ready(Begins::Never);
                        }
                        *place = None;
                    }
                }
                Err(_) => return Poll::Ready(Begins::Never),
            }
        }
        self.settings = port.settings();
        Poll::Ready(Begins::Request)
    }

    /// Waits until the first bytes of a request may be read, which came now, or its client leaves.
    async fn next_request_unread(&mut self) -> Next {
        let Visit { port, stream, .. } = self.visit;
        let since = Instant::now();
        tokio::select! {
            biased;
            _ = port.hangup.left(stream) => return Next::Close,
            () = port.closing.over() => {}
            () = port.service.gate.budget.reads_again() => {}
        }
        // Whatever the budget has become meanwhile: it has waited, and is the next to be held or refused.
        let was_new = std::mem::replace(&mut self.is_new, true);
        let begins = self.next_request_begins().await;
        self.is_new = was_new;
        match begins {
            Begins::Request => self.next_request(Some(since)).await,
            Begins::Unread | Begins::Never => Next::Close,
        }
    }

    /// Serves a request whose first bytes are there, and came just now or at another time.
    async fn next_request(&mut self, came: Option<Instant>) -> Next {
        let then = match self.read_head().await {
            Ok(end) if self.turns_to_http2(end) => return Next::Http2,
            Ok(end) => self.serve_request(end, came).await,
            Err(error) => self.refuse(&error).await,
        };
        match then {
            Then::Request => Next::Request,
            Then::Close => Next::Close,
            Then::Linger => {
                let limit = self.settings.limits.linger_max;
                let buffers = &self.visit.port.buffers;
                // Boxed: hardly any request needs its room.
                Box::pin(stream::linger(
                    &self.visit.stream,
                    buffers,
                    &mut self.buffer,
                    limit,
                ))
                .await;
                Next::Close
            }
        }
    }

    /// Reads up to the end of a head whose first bytes are there.
    async fn read_head(&mut self) -> Result<usize, RequestError> {
        if let Some(end) = self.find_head(&mut 0)? {
            return Ok(end);
        }
        let head_max = self.settings.limits.client_head_max;
        // Boxed: most heads come in one piece.
        Box::pin(timeout(head_max, self.read_rest_of_head()))
            .await
            .unwrap_or(Err(RequestError::HeadTimeout))
    }

    async fn read_rest_of_head(&mut self) -> Result<usize, RequestError> {
        let mut from = 0;
        loop {
            if let Some(end) = self.find_head(&mut from)? {
                return Ok(end);
            }
            if !self.read_more().await? {
                // Half a head, and nobody to answer.
                return Err(RequestError::ClientLeft(
                    io::ErrorKind::UnexpectedEof.into(),
                ));
            }
        }
    }

    fn find_head(&mut self, from: &mut usize) -> Result<Option<usize>, RequestError> {
        // One empty line before a request is forgiven (RFC 9112, section 2.2).
        if *from == 0 && self.buffer.filled().starts_with(b"\r\n") {
            self.buffer.consume(2);
        }
        let head_bytes_max = self.settings.limits.head_bytes_max;
        match head::scan(self.buffer.filled(), *from).map_err(RequestError::Head)? {
            Scan::Complete(end) if end <= head_bytes_max => Ok(Some(end)),
            Scan::Partial(next) if self.buffer.filled().len() < head_bytes_max => {
                *from = next;
                Ok(None)
            }
            Scan::Complete(_) | Scan::Partial(_) => Err(RequestError::HeadTooLong),
        }
    }

    async fn read_more(&mut self) -> Result<bool, RequestError> {
        let silence = self.settings.limits.client_head_max;
        match stream::read(
            &self.visit.stream,
            &self.visit.port.buffers,
            &mut self.buffer,
            silence,
        )
        .await
        {
            Ok(count) => Ok(count > 0),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(RequestError::HeadTimeout),
            Err(error) => Err(RequestError::ClientLeft(error)),
        }
    }

    /// Answers a head that cannot be served. No gate, no ticket, no log line but the status.
    async fn refuse(&mut self, error: &RequestError) -> Then {
        let Some(status) = error.status() else {
            return Then::Close;
        };
        self.visit.port.count(status);
        self.visit.port.count_refusal(error);
        let mut out = self.visit.port.buffers.take_output();
        answer::write(
            &mut out,
            status,
            error,
            self.settings.limits.retry_after_s,
            After::Close,
            false,
        );
        self.write(&out).await;
        self.visit.port.log(|| {
            Line::refused(
                &self.visit.port,
                self.visit.client.address,
                status,
                out.len(),
                error,
            )
        });
        self.visit.port.buffers.give_output(out);
        Then::Linger
    }

    async fn write(&self, out: &[u8]) {
        // A client that does not take its answer has none.
        drop(
            stream::write_all(
                &self.visit.stream,
                &mut [IoSlice::new(out)],
                self.settings.limits.client_silence_max,
            )
            .await,
        );
    }

    async fn serve_request(&mut self, end: usize, came: Option<Instant>) -> Then {
        let id = self.visit.port.next_id();
        let arrival = came.unwrap_or_else(Instant::now);
        let mut head = self.visit.port.buffers.take_output();
        let decided = match self.decide(end, id, arrival, &mut head) {
            Ok(decided) => decided,
            Err(error) => {
                self.visit.port.buffers.give_output(head);
                return self.refuse(&error).await;
            }
        };
        if let Some(proof) = acme::answer(&self.settings.acme, &self.buffer.filled()[..end]) {
            self.visit.port.buffers.give_output(head);
            return self.show_proof(end, &proof).await;
        }
        self.buffer.consume(end);
        // While the request waits for its answer, the buffer serves others.
        self.visit.port.buffers.give_empty(&mut self.buffer);
        let passage = decided.passage(&self.settings);
        let mut served = Served {
            id,
            arrival,
            request: decided.request,
            treatment: decided.treatment,
            hop: decided.hop,
            head,
            passage,
            progress: self.visit.port.in_flight.begin(),
        };
        let outcome = match (decided.refusal, served.redirect()) {
            (Some(error), _) => Err(error),
            (None, Some(_)) => Ok(self.redirect(&served).await),
            // Boxed: few have any.
            (None, None) if served.request.method == Method::Connect => {
                Box::pin(self.connect(&mut served)).await
            }
            (None, None) => self.forward(&mut served).await,
        };
        let next = match outcome {
            Ok(next) => next,
            Err(error) => self.answer_failure(&served, &error).await,
        };
        let Visit { port, client, .. } = self.visit;
        port.count(served.progress.status.get());
        port.tell(client, &served);
        port.in_flight.end(served.progress);
        port.buffers.give_output(served.head);
        next
    }

    /// Answers an authority that looks for a proof, whatever the gate does: a certificate may end during a hop.
    async fn show_proof(&mut self, end: usize, proof: &[u8]) -> Then {
        self.buffer.consume(end);
        self.visit.port.count(200);
        let mut out = self.visit.port.buffers.take_output();
        answer::write_proof(&mut out, proof);
        self.write(&out).await;
        self.visit.port.buffers.give_output(out);
        Then::Linger
    }

    /// Reads the head, decides, and writes the upstream's version of it. Nothing of the parsed form outlives this
    /// call.
    fn decide(
        &self,
        end: usize,
        id: RequestId,
        now: Instant,
        head: &mut Vec<u8>,
    ) -> Result<Decided, RequestError> {
        let mut room = request::field_room();
        let parsed = request::parse(&self.buffer.filled()[..end], &mut room);
        let by = Rules {
            service: &self.settings.service,
            limits: &self.settings.limits,
            is_pressed: self.settings.guards.memory.is_pressed(),
            tracing: self.settings.tracing(),
            client: &self.visit.client,
            id,
            now,
        };
        Ok(decide(by, &parsed.map_err(RequestError::Head)?, head))
    }

    /// Forwards until the answer is complete, on a second connection where the first was dead before it began.
    async fn forward(&mut self, served: &mut Served) -> Result<Then, RequestError> {
        let port = &self.visit.port;
        let mut ticket = port.admit(&mut self.visitor(served)).await?;
        let mut may_reuse = true;
        loop {
            let connected = port
                .connect(ticket, may_reuse, &mut self.visitor(served))
                .await?;
            connected.carry(served.passage.terms);
            let Connected {
                ticket: current,
                link,
                chosen,
            } = connected;
            ticket = current;
            served.passage.register = Some(ticket.register());
            served.request.set_cookie =
                chosen.set_cookie(self.visit.client.scheme == Scheme::Https);
            let row = port
                .in_flight
                .enter(served.entry(self.visit.client.address));
            let (error, kept) = match link {
                Link::Own { upstream, kept } => {
                    let exchanged =
                        self.exchange_own(served, &ticket, upstream, row, |served, error| {
                            served.report(&chosen, kept, error);
                        });
                    match exchanged.await {
                        Err(error) => (error, kept),
                        done => return done,
                    }
                }
                Link::Shared(slot) => {
                    // Boxed: an HTTP/1 upstream should not pay for its room.
                    let exchanged = Box::pin(self.exchange_shared(served, &ticket, &slot)).await;
                    served.report(&chosen, may_reuse, exchanged.as_ref().err());
                    // What was read of a body is not kept, so there must have been none.
                    let bodiless = served.request.framing == Framing::Empty;
                    match exchanged {
                        Err(error) => (error, bodiless),
                        done => return done,
                    }
                }
            };
            if !(may_reuse && served.may_be_sent_again(&error, kept)) {
                return Err(error);
            }
            may_reuse = false;
        }
    }

    /// Opens the tunnel that a CONNECT asks for, and carries bytes both ways to its end. It is held like a request.
    async fn connect(&mut self, served: &mut Served) -> Result<Then, RequestError> {
        let port = &self.visit.port;
        let ticket = port.admit(&mut self.visitor(served)).await?;
        let connected = port
            .connect(ticket, false, &mut self.visitor(served))
            .await?;
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
        let _row = port
            .in_flight
            .enter(served.entry(self.visit.client.address));
        ticket.tunnels();
        // What is said in it is not ours to understand: that it listens is all we know.
        chosen.report(Outcome::Answered(200));
        served.progress.status.set(200);
        served.progress.answering.set(true);
        self.write(answer::TUNNEL).await;
        served.progress.answered.set(answer::TUNNEL.len() as u64);
        let carried = async {
            self.upgraded(served, &upstream, Buffer::default()).await;
            Some(Ok(Then::Close))
        };
        let ended = served.unless_cut(&port.cutting, Box::pin(carried)).await;
        port.pool.part(upstream);
        ended.unwrap_or(Ok(Then::Close))
    }

    /// Forwards on a connection of its own, and keeps or closes that.
    async fn exchange_own(
        &mut self,
        served: &Served,
        ticket: &Ticket<'_>,
        upstream: Upstream,
        row: InFlightRow,
        report: impl FnOnce(&Served, Option<&RequestError>),
    ) -> Result<Then, RequestError> {
        let port = &self.visit.port;
        let settings = Rc::clone(&self.settings);
        let limits = served.limits(&settings.limits);
        let mut upstream_buffer = Buffer::default();
        let mut scratch = port.buffers.take_output();
        let exchange = Exchange {
            client: &self.visit.stream,
            upstream: &upstream.stream,
            ticket,
            request: &served.request,
            head: &served.head,
            edits: served.answer_edits(),
            limits,
            buffers: &port.buffers,
            may_persist: !port.closing.is_closed(),
            progress: &served.progress,
        };
        let received = {
            // Pinned here: handed on it would take its room twice.
            let exchanged = exchange.run(&mut self.buffer, &mut upstream_buffer, &mut scratch);
            let exchanged = pin!(exchanged);
            let received = stream::within(limits.request_max, exchanged);
            let received = served.unless_cut(&port.cutting, pin!(received)).await;
            received.unwrap_or(Err(RequestError::TookTooLong))
        };
        port.buffers.give_output(scratch);
        report(served, received.as_ref().err());
        match received {
            Ok(Received::Upgraded) => {
                served.progress.course.set(Course::Tunnel);
                let upgraded = async {
                    self.upgraded(served, &upstream, upstream_buffer).await;
                    Some(Ok(Then::Close))
                };
                // Boxed: a tunnel lasts, and a request should not pay for its room.
                let ended = served.unless_cut(&port.cutting, Box::pin(upgraded)).await;
                port.pool.part(upstream);
                ended.unwrap_or(Ok(Then::Close))
            }
            Ok(Received::Answer {
                client_persists,
                upstream_persists,
            }) => {
                port.buffers.give(upstream_buffer);
                self.after_answer(upstream, upstream_persists);
                Ok(self.next_after(served, client_persists))
            }
            Err(error) => {
                port.buffers.give(upstream_buffer);
                outcome::let_go(port, upstream, served, row, &error);
                Err(error)
            }
        }
    }

    /// Forwards on a connection that many requests share.
    async fn exchange_shared(
        &mut self,
        served: &Served,
        ticket: &Ticket<'_>,
        slot: &Slot,
    ) -> Result<Then, RequestError> {
        let (port, settings) = (&self.visit.port, Rc::clone(&self.settings));
        let (limits, request) = (served.limits(&settings.limits), &served.request);
        let mut answer =
            PlainAnswer::new(&self.visit.stream, &port.buffers, limits, request.version);
        let mut body = PlainBody::new(
            &self.visit.stream,
            &port.buffers,
            &mut self.buffer,
            limits,
            request,
        );
        let exchange = Http2Exchange {
            session: slot.session(),
            ticket,
            request,
            head: &served.head,
            edits: served.answer_edits(),
            limits,
            may_persist: !port.closing.is_closed(),
            progress: &served.progress,
        };
        let mut scratch = port.buffers.take_output();
        let received = {
            let mut unsent = Unsent::new(&mut body);
            let exchanged = pin!(exchange.run(&mut unsent, &mut answer, &mut scratch));
            let received = stream::within(limits.request_max, exchanged);
            served.unless_cut(&port.cutting, pin!(received)).await
        };
        port.buffers.give_output(scratch);
        match received.unwrap_or(Err(RequestError::TookTooLong))? {
            _ if answer.is_broken => Ok(Then::Close),
            shared::Received::Tunnelled => Ok(Then::Close),
            shared::Received::Answer { client_persists } => {
                Ok(self.next_after(served, client_persists))
            }
        }
    }

    fn visitor<'v>(&'v mut self, served: &'v mut Served) -> Visitor<'v> {
        Visitor {
            presence: Presence::Connection(&self.visit.stream),
            client: self.visit.client.address,
            // Requests have CDN-Loop for it; what was said of the connection goes on as it came.
            passed: self.visit.client.passed.clone(),
            buffer: Some(&mut self.buffer),
            head: &mut served.head,
            passage: &mut served.passage,
        }
    }

    fn after_answer(&self, upstream: Upstream, persists: bool) {
        if persists {
            self.visit.port.pool.put(upstream);
        } else {
            self.visit.port.pool.part(upstream);
        }
    }

    fn next_after(&self, served: &Served, client_persists: bool) -> Then {
        // A client that was told that it may go on may be doing so already.
        if client_persists {
            Then::Request
        } else if served.progress.request_done.get()
            && self.buffer.is_empty()
            && !self.visit.stream.has_unread()
        {
            self.visit.stream.farewell();
            Then::Close
        } else {
            Then::Linger
        }
    }

    async fn upgraded(&mut self, served: &Served, upstream: &Upstream, mut from_upstream: Buffer) {
        let port = &self.visit.port;
        let limit = served.limits(&self.settings.limits).tunnel_idle_max;
        let early = [
            (&self.visit.stream, from_upstream.filled()),
            (&upstream.stream, self.buffer.filled()),
        ];
        for (to, bytes) in early {
            if stream::write_all(to, &mut [IoSlice::new(bytes)], limit)
                .await
                .is_err()
            {
                return;
            }
        }
        let progress = &served.progress;
        let answered = &progress.answered;
        answered.set(answered.get() + from_upstream.filled().len() as u64);
        from_upstream.consume(usize::MAX);
        port.buffers.give(from_upstream);
        port.buffers.give(std::mem::take(&mut self.buffer));
        tunnel(
            &self.visit.stream,
            &upstream.stream,
            &port.buffers,
            limit,
            progress,
        )
        .await;
    }

    /// Whether the connection goes on after an answer of ours.
    fn after(&self, served: &Served) -> After {
        let body_untouched = served.request.framing == Framing::Empty;
        if served.request.persists && body_untouched && !self.visit.port.closing.is_closed() {
            After::KeepAlive
        } else {
            After::Close
        }
    }

    /// Sends the client elsewhere.
    async fn redirect(&self, served: &Served) -> Then {
        let after = self.after(served);
        let Some((status, out)) = served.write_redirect(&self.visit.port.buffers, after) else {
            return Then::Close;
        };
        served.progress.status.set(status);
        served.progress.answered.set(out.len() as u64);
        self.write(&out).await;
        self.visit.port.buffers.give_output(out);
        match after {
            After::KeepAlive => Then::Request,
            After::Close => Then::Linger,
        }
    }

    async fn answer_failure(&mut self, served: &Served, error: &RequestError) -> Then {
        let progress = &served.progress;
        outcome::note(&self.visit.port, &self.visit.client, served, error);
        tracing::debug!(client = %self.visit.client.address, id = %served.id, fault = ?error.fault(), "{error}");
        if progress.answering.get() {
            // Half an answer is out; only a broken connection tells the client that it is half.
            return Then::Close;
        }
        let Some(status) = error.status() else {
            return Then::Close;
        };
        self.visit.port.count_refusal(error);
        let after = self.after(served);
        let mut out = self.visit.port.buffers.take_output();
        let is_head = served.request.method == Method::Head;
        let retry_after_s = self.settings.limits.retry_after_s;
        answer::write(&mut out, status, error, retry_after_s, after, is_head);
        progress.status.set(status);
        progress.answered.set(out.len() as u64);
        self.write(&out).await;
        self.visit.port.buffers.give_output(out);
        if after == After::KeepAlive {
            Then::Request
        } else {
            Then::Linger
        }
    }
}
