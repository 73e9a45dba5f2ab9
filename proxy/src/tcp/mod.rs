//! Raw TCP: a connection is held after accept and before connect, because the server may speak first; it is in
//! flight from then until both directions have ended.

pub(crate) mod copy;

use std::rc::Rc;
use std::time::Instant;

use crate::access_log::Line;
use crate::error::RequestError;
use crate::listen::client::Client;
use crate::listen::port::{Connected, Link, Passage, Port, Presence, Visitor};
use crate::stream::Stream;
use crate::upstream::Outcome;

/// Serves one raw connection to its end.
pub(crate) async fn serve(port: Rc<Port>, stream: Stream, client: Client) {
    let arrival = Instant::now();
    let mut passage = Passage::new(arrival);
    let outcome = forward(&port, &stream, &client, &mut passage).await;
    port.count(if outcome.is_ok() { 200 } else { 0 });
    if let Err(error) = &outcome {
        tracing::debug!(client = %client.address, "{error}");
    }
    port.log(|| Line::raw(&port, client.address, port.next_id(), &passage, &outcome));
}

async fn forward(
    port: &Port,
    stream: &Stream,
    client: &Client,
    passage: &mut Passage,
) -> Result<copy::Moved, RequestError> {
    let mut head = Vec::new();
    let mut visitor = Visitor {
        presence: Presence::Connection(stream),
        client: client.address,
        buffer: None,
        head: &mut head,
        passage,
    };
    let ticket = port.admit(&mut visitor).await?;
    let Connected {
        ticket,
        link,
        chosen,
    } = port.connect(ticket, false, &mut visitor).await?;
    let Link::Own { upstream, .. } = link else {
        // Raw bytes have no place on a connection that others use.
        return Err(RequestError::NoTunnel);
    };
    ticket.answered();
    // What it says is not ours to understand: that it listens is all we know.
    chosen.report(Outcome::Answered(200));
    passage.register = Some(ticket.register());
    let _row = port
        .in_flight
        .enter(client.address, b"tcp", passage.arrival);
    let moved = copy::tunnel(
        stream,
        &upstream.stream,
        &port.buffers,
        port.settings().limits.tunnel_idle_max,
    )
    .await;
    port.pool.part(upstream);
    Ok(moved)
}
