//! What happens, told to whoever watches. Nobody who tells ever waits: each watcher has a queue of `EVENTS_MAX`, and
//! one that is too slow loses the oldest and is told how many. Without watchers an event costs one comparison.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cutover_protocol::hold::{Gate, ServiceStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{self, Receiver, Sender};
use tokio::time::sleep;

use super::seen::{Event, Happening};
use crate::service::Service;

/// Events that a watcher may be behind: some minutes of the busiest hop.
const EVENTS_MAX: usize = 1024;
/// Watchers at once; each takes the place of a commander.
const WATCHERS_MAX: usize = 16;
/// Pause between two tellings of a gate's numbers.
const COUNTS_PAUSE: Duration = Duration::from_millis(200);

/// Where everything is told. Clones tell to the same watchers.
#[derive(Debug, Clone)]
pub(crate) struct Events(Sender<Arc<Event>>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(EVENTS_MAX).0)
    }
}

impl Events {
    /// Tells, if anybody listens.
    pub(crate) fn tell(&self, what: impl FnOnce() -> Happening) {
        if self.0.receiver_count() == 0 {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let at_ms = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        let event = Event {
            at_ms,
            what: what(),
        };
        // The last watcher may just have left.
        self.0.send(Arc::new(event)).ok();
    }

    /// A new watcher; `None` if there are enough.
    pub(super) fn watch(&self) -> Option<Receiver<Arc<Event>>> {
        (self.0.receiver_count() < WATCHERS_MAX).then(|| self.0.subscribe())
    }

    /// Tells of one gate's own steps, and of its numbers, for as long as it lasts.
    pub(crate) async fn follow(self, service: Arc<Service>) {
        let mut words = service.gate.subscribe();
        let mut told = None;
        loop {
            let counted = service.gate.counted.notified();
            tokio::pin!(counted);
            counted.as_mut().enable();
            words.borrow_and_update();
            service.tell_gate();
            let status = service.status();
            let counts = (
                status.in_flight,
                status.held,
                status.held_now,
                status.released,
            );
            let is_calm = status.gate == Gate::Open && status.held_now == 0;
            let pause = if told.replace(counts) == Some(counts) || is_calm {
                None
            } else {
                self.tell(|| counts_of(status));
                Some(COUNTS_PAUSE)
            };
            // Gates are told of at once, numbers only so often.
            let quiet = async {
                match pause {
                    Some(pause) => sleep(pause).await,
                    None => counted.await,
                }
            };
            tokio::select! {
                changed = words.changed() => if changed.is_err() {
                    return;
                },
                () = quiet => {}
            }
        }
    }
}

fn counts_of(status: ServiceStatus) -> Happening {
    Happening::Counts {
        service: status.service,
        in_flight: status.in_flight,
        held_now: status.held_now,
        held: status.held,
        released: status.released,
        gave_up: status.gave_up,
        evicted: status.evicted,
    }
}

/// Writes to one watcher until it leaves.
///
/// # Cancel safety
/// A line may be cut off.
pub(super) async fn write_to(mut stream: UnixStream, mut events: Receiver<Arc<Event>>) {
    let (mut said, mut text) = ([0; 64], Vec::new());
    loop {
        let what = tokio::select! {
            biased;
            // A watcher says nothing: that it can be read from means that it has left, or breaks the rules.
            _ = stream.read(&mut said) => return,
            event = events.recv() => event,
        };
        text.clear();
        let written = match what {
            Ok(event) => serde_json::to_writer(&mut text, &*event),
            Err(RecvError::Lagged(count)) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                let at_ms = u64::try_from(now.unwrap_or_default().as_millis());
                let missed = Event {
                    at_ms: at_ms.unwrap_or(u64::MAX),
                    what: Happening::Missed { count },
                };
                serde_json::to_writer(&mut text, &missed)
            }
            Err(RecvError::Closed) => return,
        };
        text.push(b'\n');
        if written.is_err() || stream.write_all(&text).await.is_err() {
            return;
        }
    }
}
