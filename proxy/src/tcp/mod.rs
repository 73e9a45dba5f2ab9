//! Raw TCP: a connection is held after accept and before connect, because the server may speak first; it is in
//! flight from then until both directions have ended. Only where routes go by the name that a TLS client asks for is
//! that looked at first.

pub(crate) mod copy;
mod named;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::access_log::Line;
use crate::buffer::Buffer;
use crate::error::RequestError;
use crate::forwarded::Circle;
use crate::http::request::RequestId;
use crate::ledger::{self, Why, time_now};
use crate::listen::client::Client;
use crate::listen::port::{Connected, Link, Passage, Port, Presence, Settings, Visitor};
use crate::service::inflight::{Course, Entry, Progress};
use crate::service::terms::{Asker, Terms, Weight};
use crate::stream::{self, Stream};
use crate::upstream::Outcome;
use named::Called;

/// Serves one raw connection to its end.
pub(crate) async fn serve(port: Rc<Port>, stream: Stream, client: Client) {
    let settings = port.settings();
    let mut passage = Passage::new(Terms::plain(Instant::now(), client.address));
    let progress = port.in_flight.begin();
    let raw = Raw {
        port: &port,
        stream: &stream,
        client: &client,
        settings: &settings,
        id: port.next_id(),
        progress: &progress,
    };
    let (called, outcome) = match named::called(&stream, &settings).await {
        Ok(called) => {
            passage.terms = raw.terms(&called, passage.terms);
            let outcome = raw.forward(&called, &mut passage).await;
            (called, outcome)
        }
        Err(error) => (Called::default(), Err(error)),
    };
    port.count(progress.status.get());
    if let Err(error) = &outcome {
        port.count_refusal(error);
        tracing::debug!(client = %client.address, "{error}");
    }
    let name = called.name.as_deref();
    port.log(|| Line::raw(&port, client.address, name, &passage, &progress));
    if matches!(outcome, Err(RequestError::ServerName)) {
        let limit = settings.limits.linger_max;
        stream::linger(&stream, &port.buffers, &mut Buffer::default(), limit).await;
    }
    port.in_flight.end(progress);
}

/// One connection, and by what it goes.
struct Raw<'r> {
    port: &'r Port,
    stream: &'r Stream,
    client: &'r Client,
    settings: &'r Settings,
    id: RequestId,
    progress: &'r Rc<Progress>,
}

impl Raw<'_> {
    /// As its route has them, or its service.
    fn terms(&self, called: &Called, terms: Terms) -> Terms {
        let of_service = &self.settings.service.hold;
        let hold = called
            .route
            .as_ref()
            .map_or(of_service, |route| &route.hold);
        let is_own = hold.own_from.believes(self.client.address.ip());
        Terms {
            asker: if is_own {
                Asker::Application
            } else {
                Asker::Client
            },
            at_cut: hold.at_cut,
            class: hold.release_class,
            weight: Weight {
                when_full: hold.when_full,
                ..terms.weight
            },
            ..terms
        }
    }

    async fn forward(&self, called: &Called, passage: &mut Passage) -> Result<(), RequestError> {
        let port = self.port;
        let limits = called
            .route
            .as_ref()
            .and_then(|route| route.limits.as_deref());
        if let Some(route) = &called.route {
            passage.sites = self.settings.route_sites.get(&route.name).cloned();
            passage.route = Some(Arc::clone(route));
            passage.connect_max = limits.map(|limits| limits.connect_max);
        }
        let idle_max = limits.unwrap_or(&self.settings.limits).tunnel_idle_max;
        let mut head = Vec::new();
        let passed = self
            .client
            .passed
            .and(self.settings.service.loop_id.as_ref());
        let mut visitor = Visitor {
            presence: Presence::Connection(self.stream),
            client: self.client.address,
            passed: passed.map_err(|Circle| RequestError::Loop)?,
            buffer: None,
            head: &mut head,
            passage,
        };
        let ticket = port.admit(&mut visitor).await?;
        let connected = port.connect(ticket, false, &mut visitor).await?;
        self.carry(connected, called, passage, idle_max).await
    }

    /// Carries bytes both ways, with the ticket in hand, until it is over.
    async fn carry(
        &self,
        connected: Connected<'_>,
        called: &Called,
        passage: &mut Passage,
        idle_max: Duration,
    ) -> Result<(), RequestError> {
        let port = self.port;
        let terms = passage.terms;
        connected.carry(terms);
        let Connected {
            ticket,
            link,
            chosen,
        } = connected;
        let Link::Own { upstream, .. } = link else {
            // Raw bytes have no place on a connection that others use.
            return Err(RequestError::NoTunnel);
        };
        ticket.tunnels();
        // What it says is not ours to understand: that it listens is all we know.
        chosen.report(Outcome::Answered(200));
        passage.register = Some(ticket.register());
        self.progress.status.set(200);
        self.progress.course.set(Course::Tunnel);
        let what = called.what();
        let _row = port.in_flight.enter(Entry {
            client: self.client.address,
            what: what.as_bytes(),
            id: self.id,
            route: called.route.as_ref().map(|route| route.name.as_str()),
            server: passage.server.clone(),
            since: terms.arrival,
            at_cut: terms.at_cut,
            progress: self.progress,
        });
        let upstream_stream = &upstream.stream;
        let buffers = &port.buffers;
        let copied = copy::tunnel(
            self.stream,
            upstream_stream,
            buffers,
            idle_max,
            self.progress,
        );
        tokio::select! {
            biased;
            () = copied => {}
            () = port.cutting.cut(terms.at_cut) => self.note_cut(called, passage),
        }
        port.pool.part(upstream);
        Ok(())
    }

    /// Whatever was under way on it may have been carried out or not.
    fn note_cut(&self, called: &Called, passage: &Passage) {
        let Some(register) = passage.register else {
            return;
        };
        let age = passage.terms.arrival.elapsed();
        self.settings.guards.ledger.enter(ledger::Entry {
            time: time_now(),
            id: self.id.to_string(),
            service: self.port.service.name().clone(),
            route: called.route.as_ref().map(|route| route.name.clone()),
            client: self.client.address.to_string(),
            request: called.what().to_string(),
            epoch: register.epoch,
            site: register.owner,
            server: passage.server.as_ref().map(ToString::to_string),
            why: Why::Cut,
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            sent_bytes: self.progress.sent.get(),
            status: None,
        });
    }
}
