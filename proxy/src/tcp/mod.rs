//! Raw TCP: a connection is held after accept and before connect, because the server may speak first; it is in
//! flight from then until both directions have ended. Only where routes go by the name that a TLS client asks for is
//! that looked at first.

pub(crate) mod copy;
mod named;

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::access_log::Line;
use crate::buffer::Buffer;
use crate::error::RequestError;
use crate::listen::client::Client;
use crate::listen::port::{Connected, Link, Passage, Port, Presence, Settings, Visitor};
use crate::stream::{self, Stream};
use crate::upstream::Outcome;
use named::Called;

/// Serves one raw connection to its end.
pub(crate) async fn serve(port: Rc<Port>, stream: Stream, client: Client) {
    let mut passage = Passage::new(Instant::now());
    let settings = port.settings();
    let raw = Raw {
        port: &port,
        stream: &stream,
        client: &client,
        settings: &settings,
    };
    let (called, outcome) = match named::called(&stream, &settings).await {
        Ok(called) => {
            let outcome = raw.forward(&called, &mut passage).await;
            (called, outcome)
        }
        Err(error) => (Called::default(), Err(error)),
    };
    port.count(if outcome.is_ok() { 200 } else { 0 });
    if let Err(error) = &outcome {
        port.count_refusal(error);
        tracing::debug!(client = %client.address, "{error}");
    }
    let name = called.name.as_deref();
    port.log(|| Line::raw(&port, client.address, name, &passage, &outcome));
    if matches!(outcome, Err(RequestError::ServerName)) {
        let limit = settings.limits.linger_max;
        stream::linger(&stream, &port.buffers, &mut Buffer::default(), limit).await;
    }
}

/// One connection, and by what it goes.
struct Raw<'r> {
    port: &'r Port,
    stream: &'r Stream,
    client: &'r Client,
    settings: &'r Settings,
}

impl Raw<'_> {
    async fn forward(
        &self,
        called: &Called,
        passage: &mut Passage,
    ) -> Result<copy::Moved, RequestError> {
        let port = self.port;
        let limits = called
            .route
            .as_ref()
            .and_then(|route| route.limits.as_deref());
        if let Some(route) = &called.route {
            passage.sites = self.settings.route_sites.get(&route.name).cloned();
            passage.connect_max = limits.map(|limits| limits.connect_max);
        }
        let idle_max = limits.unwrap_or(&self.settings.limits).tunnel_idle_max;
        let mut head = Vec::new();
        let mut visitor = Visitor {
            presence: Presence::Connection(self.stream),
            client: self.client.address,
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
    ) -> Result<copy::Moved, RequestError> {
        let port = self.port;
        let Connected {
            ticket,
            link,
            chosen,
        } = connected;
        let Link::Own { upstream, .. } = link else {
            // Raw bytes have no place on a connection that others use.
            return Err(RequestError::NoTunnel);
        };
        ticket.answered();
        // What it says is not ours to understand: that it listens is all we know.
        chosen.report(Outcome::Answered(200));
        passage.register = Some(ticket.register());
        let what = called.what();
        let client = self.client.address;
        let _row = port
            .in_flight
            .enter(client, what.as_bytes(), passage.arrival);
        let moved = copy::tunnel(self.stream, &upstream.stream, &port.buffers, idle_max).await;
        port.pool.part(upstream);
        Ok(moved)
    }
}
