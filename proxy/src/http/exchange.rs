//! One request on one upstream connection: send, receive, both at once where the body takes its time.

use std::io::{self, IoSlice};

use super::body::{Body, RelayError, Route, relay};
use super::decide::AnswerEdits;
use super::head::{self, Framing, Scan};
use super::request::{Request, Upgrade};
use super::response::{self, Encoding, Response};
use crate::buffer::{Buffer, Buffers};
use crate::config::Limits;
use crate::error::RequestError;
use crate::limit::intake::Intake;
use crate::service::Ticket;
pub(crate) use crate::service::inflight::Progress;
use crate::stream::{self, Stream};

/// Most interim answers before one final answer; an honest upstream sends two or three.
pub(super) const INTERIM_MAX: usize = 32;
/// A body of at most this many bytes that came with its head is sent in one piece with it.
const COPIED_BYTES_MAX: usize = 4096;

/// One attempt to get one request answered.
pub(crate) struct Exchange<'e> {
    pub(crate) client: &'e Stream,
    pub(crate) upstream: &'e Stream,
    pub(crate) ticket: &'e Ticket<'e>,
    pub(crate) request: &'e Request,
    /// The request's head as the upstream gets it.
    pub(crate) head: &'e [u8],
    /// What the route changes in the answer.
    pub(crate) edits: Option<AnswerEdits<'e>>,
    pub(crate) limits: &'e Limits,
    pub(crate) buffers: &'e Buffers,
    /// Whether we would go on with the client afterwards.
    pub(crate) may_persist: bool,
    pub(crate) progress: &'e Progress,
}

/// How an exchange ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// The answer is complete.
    Answer {
        client_persists: bool,
        upstream_persists: bool,
    },
    /// Both sides have left HTTP.
    Upgraded,
}

/// How sending ended without blame on the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// All of it.
    Whole,
    /// The upstream takes no more; it may have answered first.
    Refused { nothing_left_us: bool },
}

impl Exchange<'_> {
    /// Runs the exchange to its end.
    ///
    /// # Cancel safety
    /// None: after a drop both connections must be closed.
    pub(crate) async fn run(
        &self,
        client_buffer: &mut Buffer,
        upstream_buffer: &mut Buffer,
        scratch: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        if let Some(sent) = self.send_at_once(client_buffer, scratch).await? {
            self.judge(sent)?;
            return self.receive(upstream_buffer, scratch).await;
        }
        // Boxed: most requests have come with all that they are, and should not pay for its room.
        Box::pin(self.run_both_ways(client_buffer, upstream_buffer, scratch)).await
    }

    async fn run_both_ways(
        &self,
        client_buffer: &mut Buffer,
        upstream_buffer: &mut Buffer,
        scratch: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let mut body = Body::new(self.request.framing);
        let sending = self.send(client_buffer, &mut body);
        let receiving = self.receive(upstream_buffer, scratch);
        tokio::pin!(sending, receiving);
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

    /// Sends the request in one piece, if all of a small body came with its head or there is none. The body stays in
    /// the buffer until it is sent.
    async fn send_at_once(
        &self,
        buffer: &mut Buffer,
        scratch: &mut Vec<u8>,
    ) -> Result<Option<Sent>, RequestError> {
        let here = match self.request.framing {
            Framing::Empty => 0,
            Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
            Framing::Chunked | Framing::UntilClose => return Ok(None),
        };
        if here > COPIED_BYTES_MAX.min(buffer.filled().len()) {
            return Ok(None);
        }
        let mut whole = self.head;
        if here > 0 {
            let intake = Intake::new(self.limits, &self.progress.answering);
            intake.take(here).map_err(|_| RequestError::BodyTooLong)?;
            // One slice is cheaper to send than two, and a short copy costs nothing.
            scratch.clear();
            scratch.extend_from_slice(self.head);
            scratch.extend_from_slice(&buffer.filled()[..here]);
            whole = scratch;
        }
        let mut slices = [IoSlice::new(whole)];
        let written = stream::write_all(self.upstream, &mut slices, self.limits.response_max).await;
        Ok(Some(match written {
            Ok(()) => {
                self.progress.sent.set(whole.len() as u64);
                buffer.consume(here);
                self.buffers.give_empty(buffer);
                Sent::Whole
            }
            Err(failed) => Sent::Refused {
                nothing_left_us: failed.written == 0,
            },
        }))
    }

    async fn send(&self, buffer: &mut Buffer, body: &mut Body) -> Result<Sent, RequestError> {
        let intake = Intake::new(self.limits, &self.progress.answering);
        let route = Route {
            intake: Some(&intake),
            from: self.client,
            to: self.upstream,
            buffers: self.buffers,
            read_silence: self.limits.client_silence_max,
            write_silence: self.limits.response_max,
        };
        let sent = &self.progress.sent;
        let mut prefix = self.head;
        let mut encoding = Encoding::Plain;
        if matches!(body, Body::Chunked(_)) {
            // Decoding changes the buffer, so the write that may fail with nothing sent comes before it.
            let written = stream::write_all(
                self.upstream,
                &mut [IoSlice::new(prefix)],
                route.write_silence,
            )
            .await;
            if let Err(failed) = written {
                return Ok(Sent::Refused {
                    nothing_left_us: failed.written == 0,
                });
            }
            sent.set(prefix.len() as u64);
            (prefix, encoding) = (&[], Encoding::Chunked);
        }
        match relay(route, buffer, body, encoding, prefix, sent).await {
            Ok(()) => Ok(Sent::Whole),
            Err(RelayError::Write(failed)) => Ok(Sent::Refused {
                nothing_left_us: failed.written == 0 && sent.get() == 0,
            }),
            Err(RelayError::Chunk(error)) => Err(RequestError::Chunk(error)),
            Err(RelayError::TooLong) => Err(RequestError::BodyTooLong),
            Err(RelayError::TooSlow) => Err(RequestError::BodyTooSlow),
            Err(RelayError::Read(error)) if error.kind() == io::ErrorKind::TimedOut => {
                Err(RequestError::ClientSilent)
            }
            Err(RelayError::Read(error)) => Err(RequestError::ClientLeft(error)),
        }
    }

    async fn receive(
        &self,
        buffer: &mut Buffer,
        out: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        let mut interim_count = 0;
        let source = AnswerSource {
            upstream: self.upstream,
            buffers: self.buffers,
            limits: self.limits,
            progress: self.progress,
        };
        loop {
            let end = source.read_head(buffer).await?;
            out.clear();
            let may_persist = self.may_persist && self.progress.request_done.get();
            let head = &buffer.filled()[..end];
            let response = response::rewrite(head, self.request, may_persist, self.edits, out)
                .map_err(RequestError::AnswerHead)?;
            buffer.consume(end);
            match response.status {
                101 if self.request.upgrade == Upgrade::Asked => return self.upgrade(out).await,
                101 => return Err(RequestError::AnswerHead(head::HeadError::Syntax)),
                100..200 if interim_count == INTERIM_MAX => {
                    return Err(RequestError::AnswerHead(head::HeadError::TooManyInterim));
                }
                100..200 => {
                    interim_count += 1;
                    self.interim(out).await?;
                }
                _ => return self.answer(buffer, &response, out).await,
            }
        }
    }

    /// Passes 100 Continue and early hints on, to those who know what they are.
    async fn interim(&self, head: &[u8]) -> Result<(), RequestError> {
        match self.request.version {
            head::Version::Http11 => self.write(head).await,
            head::Version::Http10 => Ok(()),
        }
    }

    async fn upgrade(&self, head: &[u8]) -> Result<Received, RequestError> {
        self.ticket.tunnels();
        self.progress.status.set(101);
        self.progress.answering.set(true);
        self.write(head).await?;
        Ok(Received::Upgraded)
    }

    async fn answer(
        &self,
        buffer: &mut Buffer,
        response: &Response,
        head: &mut Vec<u8>,
    ) -> Result<Received, RequestError> {
        self.ticket.answered(response.status);
        self.progress.status.set(response.status);
        self.progress.answering.set(true);
        let route = Route {
            from: self.upstream,
            to: self.client,
            buffers: self.buffers,
            read_silence: self.limits.between_bytes_max,
            write_silence: self.limits.client_silence_max,
            intake: None,
        };
        // A body that is not there has no last chunk either.
        let encoding = if response.framing == Framing::Empty {
            Encoding::Plain
        } else {
            response.encoding
        };
        let mut body = Body::new(response.framing);
        if let Body::Length(length) = &mut body {
            // One slice is cheaper to send than two, and a short copy costs nothing.
            let here = usize::try_from(*length).unwrap_or(usize::MAX);
            if here <= COPIED_BYTES_MAX && here <= buffer.filled().len() {
                head.extend_from_slice(&buffer.filled()[..here]);
                buffer.consume(here);
                *length = 0;
            }
        }
        let answered = &self.progress.answered;
        let before = answered.get();
        let relayed = if matches!(body, Body::Length(0)) {
            let mut slices = [IoSlice::new(head)];
            let written = stream::write_all(self.client, &mut slices, route.write_silence).await;
            written
                .map(|()| answered.set(before + head.len() as u64))
                .map_err(RelayError::Write)
        } else {
            // Boxed: small answers, which are most, do without.
            Box::pin(relay(route, buffer, &mut body, encoding, head, answered)).await
        };
        if matches!(relayed, Err(RelayError::Chunk(_) | RelayError::Read(_)))
            && answered.get() == before
        {
            // Bad from its first byte: the client can still be told.
            self.progress.answering.set(false);
        }
        relayed.map_err(|error| match error {
            RelayError::Chunk(error) => RequestError::AnswerChunk(error),
            RelayError::Read(error) if error.kind() == io::ErrorKind::TimedOut => {
                RequestError::UpstreamSilent
            }
            RelayError::Read(error) => RequestError::AnswerCut(error),
            RelayError::Write(failed) => client_failed(failed.source),
            // Answers are not limited; were they, the client would be told the same.
            RelayError::TooLong | RelayError::TooSlow => RequestError::UpstreamSilent,
        })?;
        // Bytes after the end of an answer belong to no request of ours.
        let whole = self.progress.request_done.get();
        Ok(Received::Answer {
            client_persists: response.client_persists && whole,
            upstream_persists: response.upstream_persists && whole && buffer.is_empty(),
        })
    }

    async fn write(&self, bytes: &[u8]) -> Result<(), RequestError> {
        let silence = self.limits.client_silence_max;
        let written = stream::write_all(self.client, &mut [IoSlice::new(bytes)], silence).await;
        written.map_err(|failed| client_failed(failed.source))?;
        self.progress
            .answered
            .set(self.progress.answered.get() + bytes.len() as u64);
        Ok(())
    }
}

/// Where an answer comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnswerSource<'s> {
    pub(super) upstream: &'s Stream,
    pub(super) buffers: &'s Buffers,
    pub(super) limits: &'s Limits,
    pub(super) progress: &'s Progress,
}

impl AnswerSource<'_> {
    /// Reads until the buffer begins with a whole head, and says where it ends.
    pub(super) async fn read_head(self, buffer: &mut Buffer) -> Result<usize, RequestError> {
        let mut from = 0;
        loop {
            match head::scan(buffer.filled(), from).map_err(RequestError::AnswerHead)? {
                Scan::Complete(end) => return Ok(end),
                Scan::Partial(next) => from = next,
            }
            if buffer.filled().len() >= self.limits.head_bytes_max {
                return Err(RequestError::AnswerHeadTooLong);
            }
            let silence = self.limits.response_max;
            match stream::read(self.upstream, self.buffers, buffer, silence).await {
                Ok(0) => return Err(RequestError::NoAnswer(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => self.progress.heard.set(true),
                // The time runs from the end of the request.
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut
                        && !self.progress.request_done.get() => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(RequestError::UpstreamSilent);
                }
                Err(error) => return Err(RequestError::NoAnswer(error)),
            }
        }
    }
}

fn client_failed(error: io::Error) -> RequestError {
    if error.kind() == io::ErrorKind::TimedOut {
        RequestError::ClientSilent
    } else {
        RequestError::ClientLeft(error)
    }
}
