//! What becomes of a request that failed after some of it was sent: the application may still be at work on it.
//!
//! Two things follow. Its connection stays until the upstream has finished with it, and is counted until then: an
//! answer that nobody waits for is read to its end, so that a drain knows when the application has done its work.
//! And where nobody can know how it ended, it is entered in the [ledger](crate::ledger).

use std::rc::Rc;

use tokio::time::timeout;

use super::body::Body;
use super::head::{self, Scan};
use super::request::{Method, Request};
use super::response;
use super::served::Served;
use crate::buffer::{Buffer, Buffers};
use crate::error::RequestError;
use crate::ledger::{Entry, Why, time_now};
use crate::listen::client::Client;
use crate::listen::port::Port;
use crate::service::inflight::{Course, InFlightRow};
use crate::service::pool::{Upstream, close_politely};
use crate::stream::Stream;

/// Bytes of an answer that are read although nobody waits for it: more would cost the upstream and us as much as a
/// client that asks for long answers and never takes them likes. Its connection is closed instead.
const UNWANTED_BYTES_MAX: u64 = 256 * 1024;

/// Lets go of a connection whose request has failed.
pub(crate) fn let_go(
    port: &Port,
    upstream: Upstream,
    served: &Served,
    row: InFlightRow,
    error: &RequestError,
) {
    if !is_abandoned(served, error) {
        return port.pool.part(upstream);
    }
    let progress = &served.progress;
    progress.course.set(Course::Abandoned);
    let settings = port.settings();
    let (buffers, cutting) = (Rc::clone(&port.buffers), Rc::clone(&port.cutting));
    let at_cut = served.passage.terms.at_cut;
    // An upstream is told that its client has left; one that was too slow, for nothing, would only lose its work. Half
    // an answer cannot be told from another half by whoever joins in the middle.
    let is_late = matches!(
        error,
        RequestError::UpstreamSilent | RequestError::TookTooLong
    );
    let is_whole = progress.request_done.get() && !progress.heard.get();
    let request = (is_late && is_whole).then(|| served.request.clone());
    tokio::task::spawn_local(async move {
        let limits = &settings.limits;
        let ended = async {
            match &request {
                Some(request) => {
                    read_out(&upstream.stream, request, &buffers, limits.head_bytes_max).await
                }
                None => read_on(&upstream.stream, &buffers).await,
            }
        };
        tokio::select! {
            biased;
            () = cutting.cut(at_cut) => {}
            // However it ends, the connection is closed.
            _ = timeout(limits.abandoned_max, ended) => {}
        }
        close_politely(&upstream.stream, limits.upstream_close_max).await;
        drop((upstream, row));
    });
}

/// Whether an upstream may still be busy with it.
fn is_abandoned(served: &Served, error: &RequestError) -> bool {
    let gave_up = matches!(
        error,
        RequestError::UpstreamSilent
            | RequestError::TookTooLong
            | RequestError::ClientLeft(_)
            | RequestError::ClientSilent
    );
    gave_up && served.progress.sent.get() > 0
}

/// Reads an answer of which nothing has been read yet to its end.
async fn read_out(stream: &Stream, request: &Request, buffers: &Buffers, head_bytes_max: usize) {
    let mut buffer = buffers.take();
    let mut unwanted = Unwanted {
        stream,
        left: UNWANTED_BYTES_MAX,
    };
    let mut out = Vec::new();
    let mut from = 0;
    let framing = loop {
        let end = match head::scan(buffer.filled(), from) {
            Ok(Scan::Complete(end)) => end,
            Ok(Scan::Partial(next)) if buffer.filled().len() < head_bytes_max => {
                from = next;
                if !unwanted.read(&mut buffer).await {
                    return buffers.give(buffer);
                }
                continue;
            }
            Ok(Scan::Partial(_)) | Err(_) => return buffers.give(buffer),
        };
        out.clear();
        let read = response::rewrite(&buffer.filled()[..end], request, false, None, &mut out);
        buffer.consume(end);
        from = 0;
        match read {
            Ok(interim) if interim.status < 200 && interim.status != 101 => {}
            Ok(answer) if answer.status >= 200 => break answer.framing,
            // A tunnel that nobody uses, or something that is no answer.
            Ok(_) | Err(_) => return buffers.give(buffer),
        }
    };
    let mut body = Body::new(framing);
    while let Ok(piece) = body.take(buffer.filled_mut()) {
        buffer.consume(piece.used);
        if piece.last || !unwanted.read(&mut buffer).await {
            break;
        }
    }
    buffers.give(buffer);
}

/// Says that nothing more will come, and reads on until the upstream says the same.
async fn read_on(stream: &Stream, buffers: &Buffers) {
    stream.finish();
    let mut buffer = buffers.take();
    let mut unwanted = Unwanted {
        stream,
        left: UNWANTED_BYTES_MAX,
    };
    while unwanted.read(&mut buffer).await {
        buffer.consume(usize::MAX);
    }
    buffers.give(buffer);
}

/// What an upstream still sends.
struct Unwanted<'u> {
    stream: &'u Stream,
    left: u64,
}

impl Unwanted<'_> {
    /// False at the end, and where there is more than anybody should read.
    async fn read(&mut self, buffer: &mut Buffer) -> bool {
        loop {
            let room = buffer.room();
            if room.is_empty() || self.left == 0 {
                return false;
            }
            match self.stream.try_read(room) {
                Ok(0) => return false,
                Ok(count) => {
                    buffer.advance(count);
                    self.left = self.left.saturating_sub(count as u64);
                    return true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if self.stream.readable().await.is_err() {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
    }
}

/// Enters a failed request in the ledger, if nobody can know what became of it.
pub(crate) fn note(port: &Port, client: &Client, served: &Served, error: &RequestError) {
    let (Some(why), Some(register)) = (why(served, error), served.passage.register) else {
        return;
    };
    let progress = &served.progress;
    let treatment = served.treatment.as_ref();
    port.settings().guards.ledger.enter(Entry {
        time: time_now(),
        id: served.id.to_string(),
        service: port.service.name().clone(),
        route: treatment.map(|treatment| treatment.route.name.clone()),
        client: client.address.to_string(),
        request: String::from_utf8_lossy(served.line()).into_owned(),
        epoch: register.epoch,
        site: register.owner,
        server: served.passage.server.as_ref().map(ToString::to_string),
        why,
        age_ms: u64::try_from(served.age().as_millis()).unwrap_or(u64::MAX),
        sent_bytes: progress.sent.get(),
        status: Some(progress.status.get()).filter(|status| *status != 0),
    });
}

/// Whoever leaves a page that is still coming has changed nothing: of requests that are safe, only those count whose
/// clients were told that something went wrong.
fn why(served: &Served, error: &RequestError) -> Option<Why> {
    if served.progress.sent.get() == 0 {
        return None;
    }
    let is_safe = matches!(served.request.method, Method::Safe | Method::Head);
    match error {
        RequestError::Cut(_) => Some(Why::Cut),
        RequestError::UpstreamSilent | RequestError::TookTooLong => Some(Why::TimedOut),
        RequestError::ClientLeft(_) | RequestError::ClientSilent if !is_safe => {
            Some(Why::ClientLeft)
        }
        RequestError::NoAnswer(_) if !is_safe => Some(Why::NoAnswer),
        _ => None,
    }
}
