//! What is kept of a stream's request while it is held: what was read and decided of it, and its place in the queue.
//!
//! No task and no future waits for it; those are made when it is called. Whoever speaks the protocol keeps it beside
//! the stream, asks whether it was called ([`HeldRequest::poll_called`]), and then goes on as with any other request
//! ([`HeldRequest::resume`]). Dropped before, it counts as given up.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use super::serve::{Begun, Reading, Waited};
use super::websocket::Key;
use crate::forwarded::Hop;
use crate::http::decide::{Treatment, passage};
use crate::http::request::{Method, Request, RequestId};
use crate::http::served::Served;
use crate::listen::port::{FrontCheckOf, Port};
use crate::service::Parked;
use crate::service::roll::View;
use crate::service::terms::{Asker, Terms};
use crate::service::traffic::Manner;

/// A request that waits in the queue.
#[derive(Debug)]
pub(crate) struct HeldRequest {
    parked: Parked,
    head: Box<[u8]>,
    request: Request,
    treatment: Option<Box<Treatment>>,
    hop: Option<Box<Hop>>,
    key: Option<Box<Key>>,
    terms: Terms,
    id: RequestId,
}

impl HeldRequest {
    /// Joins the queue of a gate that is closed. `None`, and nothing is taken, for a request that is not simply held:
    /// it is refused or answered by us, or the gate may let it through.
    pub(crate) fn park(port: &Port, reading: &mut Reading) -> Option<Self> {
        let begun = reading.begun.as_mut()?.as_mut().ok()?;
        let Begun {
            served, refusal, ..
        } = begun;
        let terms = served.passage.terms;
        if refusal.is_some()
            || served.redirect().is_some()
            || served.request.method == Method::Connect
            || terms.asker != Asker::Client
            || served.passage.front_check != FrontCheckOf::No
        {
            return None;
        }
        let parked = match port.park(&mut served.passage, Manner::InStreams, &served.head) {
            Ok(parked) => parked,
            Err(error) => {
                *refusal = Some(error);
                return None;
            }
        };
        let Begun { served, key, .. } = reading.begun.take()?.ok()?;
        port.in_flight.end(served.progress);
        let head = served.head.as_slice().into();
        port.buffers.give_output(served.head);
        Some(Self {
            parked,
            head,
            request: served.request,
            treatment: served.treatment,
            hop: served.hop,
            key: key.map(Box::new),
            terms: served.passage.terms,
            id: served.id,
        })
    }

    /// Ready when it is let through or refused, and not to be polled again then.
    pub(crate) fn poll_called(&mut self, context: &mut Context<'_>) -> Poll<Waited> {
        self.parked.poll_called(context).map(Waited::Called)
    }

    /// So many bytes of its body are kept.
    pub(crate) fn grew(&self, bytes: usize) {
        self.parked.grew(bytes);
    }

    /// As it goes on.
    pub(crate) fn resume(self, port: &Port, waited: Waited) -> Reading {
        let mut passage = passage(
            self.terms,
            self.request.method,
            self.treatment.as_deref(),
            &port.settings(),
        );
        passage.held = self.terms.arrival.elapsed();
        let served = Served {
            id: self.id,
            arrival: self.terms.arrival,
            request: self.request,
            treatment: self.treatment,
            hop: self.hop,
            head: self.head.into(),
            passage,
            progress: port.in_flight.begin(),
        };
        Reading {
            begun: Some(Ok(Begun {
                served,
                key: self.key.map(|key| *key),
                refusal: None,
                waited: Some(waited),
            })),
        }
    }

    /// As it is shown to whoever looks.
    pub(crate) fn view(&self) -> View<'_> {
        let treatment = self.treatment.as_ref();
        View {
            client: self.client(),
            head: &self.head,
            route: treatment.map(|treatment| treatment.route.name.as_str()),
            since: self.terms.arrival,
            end: self.terms.end,
        }
    }

    const fn client(&self) -> SocketAddr {
        self.terms.client
    }
}
