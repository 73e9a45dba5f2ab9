//! One request, whatever it came by, from its head to its log line: what is known of it, and what its failure means.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cutover_protocol::hold::AtCut;

use super::answer::{self, After};
use super::decide::{AnswerEdits, RedirectTo, Treatment};
use super::exchange::Progress;
use super::head::Framing;
use super::request::{Method, Request, RequestId, Upgrade};
use crate::buffer::Buffers;
use crate::config::Limits;
use crate::error::RequestError;
use crate::forwarded::Hop;
use crate::listen::port::{Cutting, Passage};
use crate::service::inflight::Entry;
use crate::upstream::{Chosen, Outcome};

/// One request from its head to its log line.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) id: RequestId,
    pub(crate) arrival: Instant,
    pub(crate) request: Request,
    /// What its route means for it, if it has one.
    pub(crate) treatment: Option<Box<Treatment>>,
    /// Its place in a trace, where spans are recorded.
    pub(crate) hop: Option<Box<Hop>>,
    /// As the upstream gets it; begins with method and target.
    pub(crate) head: Vec<u8>,
    pub(crate) passage: Passage,
    pub(crate) progress: Rc<Progress>,
}

impl Served {
    /// Method and target, as the client sent them.
    pub(crate) fn line(&self) -> &[u8] {
        let asked = self
            .treatment
            .as_ref()
            .and_then(|treatment| treatment.asked.as_deref());
        asked.unwrap_or(&self.head[..self.request.line_bytes])
    }

    /// The limits in force for it: its route's, or these.
    pub(crate) fn limits<'l>(&'l self, general: &'l Limits) -> &'l Limits {
        let treatment = self.treatment.as_ref();
        treatment
            .and_then(|treatment| treatment.route.limits.as_deref())
            .unwrap_or(general)
    }

    /// What its route changes in the answer.
    pub(crate) fn answer_edits(&self) -> Option<AnswerEdits<'_>> {
        self.treatment
            .as_ref()
            .and_then(|treatment| treatment.answer_edits())
    }

    /// Where its route sends the client, if it does.
    pub(crate) fn redirect(&self) -> Option<&RedirectTo> {
        self.treatment
            .as_ref()
            .and_then(|treatment| treatment.redirect.as_ref())
    }

    /// Status and text of the answer that does so.
    pub(crate) fn write_redirect(&self, buffers: &Buffers, after: After) -> Option<(u16, Vec<u8>)> {
        let RedirectTo { status, location } = self.redirect()?;
        let lines = self.answer_edits().map_or(&[][..], |edits| edits.lines);
        let mut out = buffers.take_output();
        answer::write_redirect(&mut out, *status, location, lines, after);
        Some((status.code(), out))
    }

    /// What is told of it while it is in flight.
    pub(crate) fn entry(&self, client: SocketAddr) -> Entry<'_> {
        let treatment = self.treatment.as_ref();
        Entry {
            client,
            what: &self.head[..self.request.line_bytes],
            id: self.id,
            route: treatment.map(|treatment| treatment.route.name.as_str()),
            server: self.passage.server.clone(),
            since: self.arrival,
            at_cut: self.passage.terms.at_cut,
            progress: &self.progress,
        }
    }

    /// What comes of the future, unless a drain that takes too long cuts the request off first.
    pub(crate) async fn unless_cut<T>(
        &self,
        cutting: &Cutting,
        mut future: impl Future<Output = Option<Result<T, RequestError>>> + Unpin,
    ) -> Option<Result<T, RequestError>> {
        let at_cut = self.passage.terms.at_cut;
        if at_cut != AtCut::Cut {
            return future.await;
        }
        tokio::select! {
            biased;
            done = &mut future => done,
            () = cutting.cut(at_cut) => Some(Err(RequestError::Cut(self.id))),
        }
    }

    /// Since its arrival.
    pub(crate) fn age(&self) -> Duration {
        self.arrival.elapsed()
    }

    /// Tells the group how its server did. A kept connection that ends before anything is heard was idle for too
    /// long: no fault of anybody's.
    pub(crate) fn report(&self, chosen: &Chosen, kept: bool, error: Option<&RequestError>) {
        let outcome = match error {
            None => Some(Outcome::Answered(self.progress.status.get())),
            Some(_) if kept && !self.progress.heard.get() => None,
            Some(error) => error.outcome(),
        };
        if let Some(outcome) = outcome {
            chosen.report(outcome);
        }
    }

    /// After a connection failed: yes if nothing left us on one that was kept, or if the upstream said nothing at
    /// all and asking twice is asking once. For that we take a safe request on a kept connection, which may just
    /// have been closed, or whatever the route says.
    pub(crate) fn may_be_sent_again(&self, error: &RequestError, kept: bool) -> bool {
        match error {
            RequestError::NotSent | RequestError::NotProcessed => kept,
            RequestError::NoAnswer(_) => {
                let unheard = !self.progress.heard.get() && !self.progress.answering.get();
                let safe = matches!(self.request.method, Method::Safe | Method::Head);
                let plain =
                    self.request.framing == Framing::Empty && self.request.upgrade == Upgrade::None;
                unheard && plain && self.route_lets_repeat(kept && safe)
            }
            _ => false,
        }
    }

    fn route_lets_repeat(&self, by_default: bool) -> bool {
        let method = self.head.split(|byte| *byte == b' ').next();
        self.treatment.as_ref().map_or(by_default, |treatment| {
            let route = &treatment.route;
            route.may_send_again(method.unwrap_or_default(), by_default)
        })
    }
}
