//! The roll of the held, by name: one a worker and service, for whoever wants to see them.
//!
//! A held request costs one copy of the beginning of its first line, and nothing is kept of it once it is no longer
//! held. It is asked for rarely, so the sums are made then.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::milliseconds;
use crate::control::seen::HeldEntry;
use crate::route::Route;

/// Bytes of method and path that are remembered.
const WHAT_BYTES_MAX: usize = 100;

#[derive(Debug)]
struct Entry {
    client: SocketAddr,
    what: Box<[u8]>,
    route: Option<Arc<Route>>,
    since: Instant,
}

/// Who is held at one service on one worker.
#[derive(Debug, Default)]
pub(crate) struct Roll {
    entries: RefCell<BTreeMap<u64, Entry>>,
    next: std::cell::Cell<u64>,
}

/// One on the roll; it is taken off when dropped.
#[derive(Debug)]
pub(crate) struct RollEntry {
    roll: Rc<Roll>,
    number: u64,
}

/// What one worker's roll says.
#[derive(Debug, Default)]
pub(crate) struct RollPart {
    /// With their arrival, by which the rolls of all workers are put in order.
    pub(crate) oldest: Vec<(Instant, HeldEntry)>,
    pub(crate) newest: Vec<(Instant, HeldEntry)>,
    pub(crate) by_route: BTreeMap<String, u64>,
    pub(crate) by_address: BTreeMap<IpAddr, u64>,
}

impl Roll {
    /// Enters somebody; `head` begins with method and path, or is empty on a raw connection.
    pub(crate) fn enter(
        self: &Rc<Self>,
        client: SocketAddr,
        head: &[u8],
        route: Option<Arc<Route>>,
        since: Instant,
    ) -> RollEntry {
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
        let line = line.strip_suffix(b" HTTP/1.1").unwrap_or(line);
        let what = if head.is_empty() { b"tcp" } else { line };
        let number = self.next.get();
        self.next.set(number + 1);
        let entry = Entry {
            client,
            what: what[..what.len().min(WHAT_BYTES_MAX)].into(),
            route,
            since,
        };
        self.entries.borrow_mut().insert(number, entry);
        RollEntry {
            roll: Rc::clone(self),
            number,
        }
    }

    /// Sums, and the `most` who came first and last.
    pub(crate) fn part(&self, most: usize) -> RollPart {
        let now = Instant::now();
        let entries = self.entries.borrow();
        let mut part = RollPart::default();
        let mut by_age: Vec<&Entry> = entries.values().collect();
        by_age.sort_by_key(|entry| entry.since);
        for entry in &by_age {
            let route = entry
                .route
                .as_ref()
                .map_or("-", |route| route.name.as_str());
            match part.by_route.get_mut(route) {
                Some(count) => *count += 1,
                None => drop(part.by_route.insert(route.to_owned(), 1)),
            }
            *part.by_address.entry(entry.client.ip()).or_default() += 1;
        }
        let tell = |entry: &&Entry| (entry.since, entry.tell(now));
        part.oldest = by_age.iter().take(most).map(tell).collect();
        part.newest = by_age.iter().rev().take(most).map(tell).collect();
        part
    }
}

impl Entry {
    fn tell(&self, now: Instant) -> HeldEntry {
        HeldEntry {
            client: self.client.to_string(),
            what: String::from_utf8_lossy(&self.what).into_owned(),
            route: self.route.as_ref().map(|route| route.name.clone()),
            age_ms: milliseconds(now.saturating_duration_since(self.since)),
        }
    }
}

impl Drop for RollEntry {
    fn drop(&mut self) {
        self.roll.entries.borrow_mut().remove(&self.number);
    }
}
