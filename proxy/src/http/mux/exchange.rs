//! One stream's request on one HTTP/1 upstream connection: send, receive, both at once where there is a body.
//!
//! What a stream brings is written upstream before more is asked for, and only then does the peer get credit for
//! it; what the upstream answers is read only as fast as the stream takes it.

use std::io;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::websocket::Key;
use super::{AnswerHead, AnswerSink, BodyFailed, More, Part, RequestBody};
use crate::buffer::{Buffer, Buffers};
use crate::config::Limits;
use crate::error::RequestError;
use crate::http::body::{self, Body, End, Route};
use crate::http::decide::AnswerEdits;
use crate::http::exchange::{AnswerSource, INTERIM_MAX, Progress};
use crate::http::head::{Framing, HeadError};
use crate::http::request::{Request, Upgrade};
use crate::http::response::{self, Encoding, Response};
use crate::limit::intake::Intake;
use crate::service::Ticket;
use crate::stream::{self, Stream};

/// One attempt to get one stream's request answered.
pub(super) struct StreamExchange<'e> {
    pub(super) upstream: &'e Stream,
    pub(super) ticket: &'e Ticket<'e>,
    pub(super) request: &'e Request,
    /// The request's head as the upstream gets it.
    pub(super) head: &'e [u8],
    /// The key in it, if it asks for a WebSocket.
    pub(super) key: Option<&'e Key>,
    /// What the route changes in the answer.
    pub(super) edits: Option<AnswerEdits<'e>>,
    pub(super) limits: &'e Limits,
    pub(super) buffers: &'e Buffers,
    pub(super) progress: &'e Progress,
}

/// How an exchange ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The answer is complete.
    Answer { upstream_persists: bool },
    /// The upstream has left HTTP; what it sent since is in the buffer.
    Tunnel,
}

/// A stream's body, and the part of it that is not yet written: it outlives an attempt that failed with nothing
/// sent.
pub(crate) struct Unsent<'b, B> {
    pub(crate) body: &'b mut B,
    part: Option<Part>,
    /// What comes behind it, where that had to be known.
    after: Option<Part>,
}

/// How sending ended without blame on the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Whole,
    /// The upstream takes no more; it may have answered first.
    Refused {
        nothing_left_us: bool,
    },
}

impl<'b, B: RequestBody> Unsent<'b, B> {
    pub(crate) const fn new(body: &'b mut B) -> Self {
        Self {
            body,
            part: None,
            after: None,
        }
    }

    /// The end is there.
    const fn ended(&self) -> bool {
        matches!(self.part, Some(Part::End { .. }))
    }

    /// Sees to it that there is a part.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn fill(&mut self) -> Result<(), BodyFailed> {
        if self.part.is_none() {
            self.part = match self.after.take() {
                Some(after) => Some(after),
                None => Some(self.body.next().await?),
            };
        }
        Ok(())
    }

    /// Sees to it that the end is what comes next, behind the data that is there: a request that its stream may still
    /// contradict must not be whole at the upstream.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn expect_end(&mut self, silence: Duration) -> Result<(), RequestError> {
        let next = match &mut self.part {
            Some(Part::End { .. }) => return Ok(()),
            Some(Part::Data(_)) => &mut self.after,
            empty @ None => empty,
        };
        if next.is_none() {
            *next = match within(silence, pin!(self.body.next())).await {
                Some(part) => Some(part?),
                None => return Err(RequestError::ClientSilent),
            };
        }
        match next {
            Some(Part::End { .. }) => Ok(()),
            _ => Err(RequestError::BodyLength),
        }
    }

    /// Bytes of the part that is there, and whether it is the end.
    pub(crate) const fn size(&self) -> (usize, bool) {
        match &self.part {
            None => (0, false),
            Some(Part::Data(data)) => (data.len(), false),
            Some(Part::End { .. }) => (0, true),
        }
    }

    /// Takes the part: it is about to leave us.
    pub(crate) const fn take(&mut self) -> Option<Part> {
        self.part.take()
    }

    /// Takes the next part if it is there already.
    async fn fill_at_once(&mut self) -> Result<(), BodyFailed> {
        let mut filling = pin!(self.fill());
        std::future::poll_fn(|context| match filling.as_mut().poll(context) {
            Poll::Ready(filled) => Poll::Ready(filled),
            Poll::Pending => Poll::Ready(Ok(())),
        })
        .await
    }
}

impl StreamExchange<'_> {
    /// Runs the exchange to its end.
    ///
    /// # Cancel safety
    /// None: after a drop the upstream's connection must be closed.
    pub(super) async fn run<B: RequestBody, A: AnswerSink>(
        &self,
        unsent: &mut Unsent<'_, B>,
        answer: &mut A,
        buffer: &mut Buffer,
        scratch: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        if self.request.framing == Framing::Empty {
            if self.key.is_none() {
                unsent.expect_end(self.limits.client_silence_max).await?;
            }
            self.send_head().await?;
            return self.receive(answer, buffer, scratch).await;
        }
        // Boxed: most requests have no body, and should not pay for its room.
        let mut sending = Box::pin(self.send(unsent));
        let mut receiving = pin!(self.receive(answer, buffer, scratch));
        let mut sending_goes_on = true;
        loop {
            tokio::select! {
                biased;
                sent = &mut sending, if sending_goes_on => {
                    self.judge(sent?)?;
                    sending_goes_on = false;
                }
                received = &mut receiving => return received,
            }
        }
    }

    fn judge(&self, sent: Sent) -> Result<(), RequestError> {
        match sent {
            Sent::Refused {
                nothing_left_us: true,
            } => Err(RequestError::NotSent),
            Sent::Refused {
                nothing_left_us: false,
            } => Ok(()),
            Sent::Whole => {
                self.progress.request_done.set(true);
                Ok(())
            }
        }
    }

    async fn send_head(&self) -> Result<(), RequestError> {
        let mut slices = [io::IoSlice::new(self.head)];
        let written = stream::write_all(self.upstream, &mut slices, self.limits.response_max).await;
        let sent = match written {
            Ok(()) => Sent::Whole,
            Err(failed) => Sent::Refused {
                nothing_left_us: failed.written == 0,
            },
        };
        if sent == Sent::Whole {
            self.progress.sent.set(self.head.len() as u64);
        }
        self.judge(sent)
    }

    async fn send<B: RequestBody>(&self, unsent: &mut Unsent<'_, B>) -> Result<Sent, RequestError> {
        let route = Route {
            from: self.upstream,
            to: self.upstream,
            buffers: self.buffers,
            read_silence: self.limits.response_max,
            write_silence: self.limits.response_max,
            intake: None,
        };
        let intake = Intake::new(self.limits, &self.progress.answering);
        let (encoding, mut left) = match self.request.framing {
            Framing::Length(length) => (Encoding::Plain, Some(length)),
            _ => (Encoding::Chunked, None),
        };
        let mut prefix = self.head;
        unsent.fill_at_once().await.map_err(RequestError::from)?;
        loop {
            let (bytes, last) = unsent.size();
            left = count_down(left, bytes, last)?;
            intake.take(bytes).map_err(|_| RequestError::BodyTooLong)?;
            if left == Some(0) && bytes > 0 {
                unsent.expect_end(self.limits.client_silence_max).await?;
            }
            let (data, end): (&[u8], _) = match &unsent.part {
                None => (&[], End::Later),
                Some(Part::Data(data)) => (data, End::Later),
                // A counted body has no room for a trailer; it may be dropped (RFC 9110, section 6.5.1).
                Some(Part::End { trailer }) => (&[], End::Here(trailer)),
            };
            let written = body::write(route, prefix, data, encoding, end).await;
            let sent = &self.progress.sent;
            match written {
                Ok(count) => sent.set(sent.get() + count),
                Err(failed) => {
                    return Ok(Sent::Refused {
                        nothing_left_us: failed.written == 0 && sent.get() == 0,
                    });
                }
            }
            prefix = &[];
            if let Some(Part::Data(data)) = unsent.take() {
                unsent.body.written(data.len());
            }
            if last {
                return Ok(Sent::Whole);
            }
            // Once the answer flows, a client with nothing to say is no slow client.
            let silence = if self.progress.answering.get() {
                self.limits.tunnel_idle_max
            } else {
                self.limits.client_silence_max
            };
            fill_in_time(unsent, &intake, silence).await?;
        }
    }

    async fn receive<A: AnswerSink>(
        &self,
        answer: &mut A,
        buffer: &mut Buffer,
        out: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let source = AnswerSource {
            upstream: self.upstream,
            buffers: self.buffers,
            limits: self.limits,
            progress: self.progress,
        };
        let mut interim_count = 0;
        loop {
            let end = source.read_head(buffer).await?;
            out.clear();
            let response =
                response::rewrite(&buffer.filled()[..end], self.request, true, self.edits, out)
                    .map_err(RequestError::AnswerHead)?;
            buffer.consume(end);
            let head = AnswerHead::new(response.status, out);
            match response.status {
                101 if self.request.upgrade == Upgrade::Asked => {
                    return self.switch(answer, head).await;
                }
                101 => return Err(RequestError::AnswerHead(HeadError::Syntax)),
                100..200 if interim_count == INTERIM_MAX => {
                    return Err(RequestError::AnswerHead(HeadError::TooManyInterim));
                }
                100..200 => {
                    interim_count += 1;
                    self.taken(pin!(answer.interim(head))).await?;
                }
                _ => return self.answer(answer, buffer, &response, head).await,
            }
        }
    }

    /// The upstream speaks WebSocket from here on. To the stream this is a plain success (RFC 8441, section 5).
    async fn switch<A: AnswerSink>(
        &self,
        answer: &mut A,
        head: AnswerHead<'_>,
    ) -> Result<Received, RequestError> {
        if !self.key.is_some_and(|key| head.accepts(key)) {
            return Err(RequestError::AnswerKey);
        }
        self.ticket.tunnels();
        self.begin_answer(200);
        self.taken(pin!(answer.head(head.with_status(200), More::Follows)))
            .await?;
        Ok(Received::Tunnel)
    }

    fn begin_answer(&self, status: u16) {
        self.ticket.answered(status);
        self.progress.status.set(status);
        self.progress.answering.set(true);
    }

    async fn answer<A: AnswerSink>(
        &self,
        answer: &mut A,
        buffer: &mut Buffer,
        response: &Response,
        head: AnswerHead<'_>,
    ) -> Result<Received, RequestError> {
        self.begin_answer(response.status);
        if response.framing == Framing::Empty {
            self.taken(pin!(answer.head(head, More::Ends))).await?;
        } else {
            self.taken(pin!(answer.head(head, More::Follows))).await?;
            self.relay(answer, buffer, Body::new(response.framing))
                .await?;
        }
        // Bytes after the end of an answer belong to no request of ours.
        let whole = self.progress.request_done.get();
        Ok(Received::Answer {
            upstream_persists: response.upstream_persists && whole && buffer.is_empty(),
        })
    }

    async fn relay<A: AnswerSink>(
        &self,
        answer: &mut A,
        buffer: &mut Buffer,
        mut body: Body,
    ) -> Result<(), RequestError> {
        loop {
            let piece = body
                .take(buffer.filled_mut())
                .map_err(RequestError::AnswerChunk)?;
            let data = &buffer.filled()[piece.start..piece.end];
            let trailer = if piece.last { body.trailer() } else { &[] };
            let more = if piece.last && trailer.is_empty() {
                More::Ends
            } else {
                More::Follows
            };
            if !data.is_empty() || more == More::Ends {
                self.taken(pin!(answer.data(data, more))).await?;
                self.count(data.len());
            }
            if !trailer.is_empty() {
                self.taken(pin!(answer.trailer(trailer))).await?;
            }
            buffer.consume(piece.used);
            if piece.last {
                return Ok(());
            }
            let silence = self.limits.between_bytes_max;
            match stream::read(self.upstream, self.buffers, buffer, silence).await {
                Ok(1..) => {}
                Ok(0) if matches!(body, Body::UntilClose) => {
                    return self.taken(pin!(answer.data(&[], More::Ends))).await;
                }
                Ok(_) => return Err(RequestError::AnswerCut(io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(RequestError::UpstreamSilent);
                }
                Err(error) => return Err(RequestError::AnswerCut(error)),
            }
        }
    }

    fn count(&self, bytes: usize) {
        let answered = &self.progress.answered;
        answered.set(answered.get() + bytes as u64);
    }

    /// Waits for the stream to take something, as long as a client may be silent.
    async fn taken(
        &self,
        taking: Pin<&mut impl Future<Output = io::Result<()>>>,
    ) -> Result<(), RequestError> {
        match within(self.limits.client_silence_max, taking).await {
            Some(taken) => taken.map_err(RequestError::ClientLeft),
            None => Err(RequestError::ClientSilent),
        }
    }
}

/// Waits for the next part, as long as silence and pace allow.
pub(crate) async fn fill_in_time<B: RequestBody>(
    unsent: &mut Unsent<'_, B>,
    intake: &Intake<'_>,
    silence: Duration,
) -> Result<(), RequestError> {
    loop {
        let patience = intake.wait_max(silence);
        let began = Instant::now();
        let filled = within(patience, pin!(unsent.fill())).await;
        let bytes = match &unsent.part {
            Some(Part::Data(data)) => data.len() as u64,
            Some(Part::End { .. }) | None => 0,
        };
        let in_time = intake.waited(began.elapsed(), bytes);
        match filled {
            Some(filled) if in_time.is_ok() || unsent.ended() => {
                return filled.map_err(RequestError::from);
            }
            None if in_time.is_ok() && patience < silence => {}
            None if in_time.is_ok() => return Err(RequestError::ClientSilent),
            Some(_) | None => return Err(RequestError::BodyTooSlow),
        }
    }
}

/// What is left of a counted body after so many bytes, and perhaps its end.
pub(crate) fn count_down(
    left: Option<u64>,
    bytes: usize,
    last: bool,
) -> Result<Option<u64>, RequestError> {
    let Some(left) = left else {
        return Ok(None);
    };
    match left.checked_sub(bytes as u64) {
        Some(left) if left == 0 || !last => Ok(Some(left)),
        _ => Err(RequestError::BodyLength),
    }
}

/// Waits for at most this long. A future that is ready costs no look at the clock. It is pinned by the caller: moved
/// in here it would take its room twice.
pub(crate) async fn within<F: Future>(
    limit: Duration,
    mut future: Pin<&mut F>,
) -> Option<F::Output> {
    let first = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await;
    match first {
        Poll::Ready(output) => Some(output),
        Poll::Pending => timeout(limit, future).await.ok(),
    }
}
