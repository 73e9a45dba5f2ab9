//! Live traffic of one service on one worker, counted while somebody wants to know what a hold would cost. At all
//! other times it costs a request one comparison, before the gate is asked.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use crate::http::deadline;

/// Client connections that are told apart; more are counted as one each.
const CONNECTIONS_MAX: usize = 200_000;

/// How many requests a client connection may have at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One after the other: while the first is held, the next is not sent.
    InTurn,
    /// Each in a stream of its own.
    InStreams,
}

/// Whether somebody counts, and what was counted.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    is_counted: Cell<bool>,
    counting: RefCell<Option<Counting>>,
}

#[derive(Debug)]
struct Counting {
    /// Whoever asked may be gone: nothing is counted for longer than this.
    until: Instant,
    sum: TrafficSum,
}

/// What came in the time it was watched.
#[derive(Debug, Default)]
pub(crate) struct TrafficSum {
    pub(crate) arrived: u64,
    pub(crate) connections: HashMap<SocketAddr, Arrivals>,
    /// Requests of connections that there was no more room to tell apart.
    pub(crate) beyond: Arrivals,
    /// When those would have had no use for an answer any more that say so; as many as connections are told apart.
    pub(crate) deadlines: Vec<Instant>,
}

/// What came by one connection, as far as it would be held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Arrivals {
    pub(crate) held: u64,
    pub(crate) head_bytes: u64,
}

impl Traffic {
    /// Begins to count. False if somebody else counts already.
    pub(crate) fn begin(&self, until: Instant) -> bool {
        let mut counting = self.counting.borrow_mut();
        let is_free = counting
            .as_ref()
            .is_none_or(|counting| counting.until < Instant::now());
        if is_free {
            let sum = TrafficSum::default();
            *counting = Some(Counting { until, sum });
            self.is_counted.set(true);
        }
        is_free
    }

    /// Ends it, and says what came of it.
    pub(crate) fn end(&self) -> TrafficSum {
        self.is_counted.set(false);
        let counting = self.counting.borrow_mut().take();
        counting.map(|counting| counting.sum).unwrap_or_default()
    }

    /// One more request, or raw connection, has come to the gate.
    pub(crate) fn note(&self, client: SocketAddr, manner: Manner, head: &[u8], now: Instant) {
        if self.is_counted.get() {
            self.count(client, manner, head, now);
        }
    }

    #[cold]
    fn count(&self, client: SocketAddr, manner: Manner, head: &[u8], now: Instant) {
        let mut counting = self.counting.borrow_mut();
        let Some(Counting { until, sum }) = &mut *counting else {
            return;
        };
        if *until < now {
            self.is_counted.set(false);
            *counting = None;
            return;
        }
        sum.arrived += 1;
        let head_bytes = u64::try_from(head.len()).unwrap_or(u64::MAX);
        let has_room = sum.connections.len() < CONNECTIONS_MAX;
        let arrivals = match sum.connections.get_mut(&client) {
            Some(known) => known,
            None if has_room => sum.connections.entry(client).or_default(),
            None => &mut sum.beyond,
        };
        if manner == Manner::InStreams || arrivals.held == 0 {
            arrivals.held += 1;
            arrivals.head_bytes += head_bytes;
            let deadline = deadline::of(head).and_then(|after| now.checked_add(after));
            if sum.deadlines.len() < CONNECTIONS_MAX {
                sum.deadlines.extend(deadline);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn client(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn who_waits_for_an_answer_is_held_once_and_streams_each() {
        let (traffic, now) = (Traffic::default(), Instant::now());
        traffic.note(client(1), Manner::InTurn, b"before", now);
        assert!(traffic.begin(now + Duration::from_secs(9)));
        assert!(!traffic.begin(now + Duration::from_secs(9)));
        for _ in 0..3 {
            traffic.note(client(1), Manner::InTurn, b"four", now);
            traffic.note(client(2), Manner::InStreams, b"four", now);
        }
        let sum = traffic.end();
        assert_eq!(sum.arrived, 6);
        let arrivals = |held, head_bytes| Arrivals { held, head_bytes };
        assert_eq!(sum.connections[&client(1)], arrivals(1, 4));
        assert_eq!(sum.connections[&client(2)], arrivals(3, 12));
        traffic.note(client(1), Manner::InTurn, b"after", now);
        assert_eq!(traffic.end().arrived, 0);
    }

    #[test]
    fn nothing_is_counted_for_somebody_who_does_not_come_back() {
        let (traffic, now) = (Traffic::default(), Instant::now());
        assert!(traffic.begin(now));
        traffic.note(
            client(1),
            Manner::InTurn,
            b"x",
            now + Duration::from_secs(1),
        );
        assert!(!traffic.is_counted.get());
        assert!(traffic.begin(now));
    }
}
