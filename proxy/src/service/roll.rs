//! The roll of the held, by name: one a worker and service, for whoever wants to see them.
//!
//! A held request costs one copy of the beginning of its first line, and nothing is kept of it once it is no longer
//! held. It is asked for rarely, so the sums are made then.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::milliseconds;
use super::terms::{End, EndsBy};
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
    end: Option<End>,
}

/// One of the held as whoever keeps it shows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'v> {
    pub(crate) client: SocketAddr,
    /// Begins with method and path, or is empty on a raw connection.
    pub(crate) head: &'v [u8],
    pub(crate) route: Option<&'v str>,
    /// Its arrival.
    pub(crate) since: Instant,
    /// When it is answered by us, if that is earlier than by the service's bound.
    pub(crate) end: Option<End>,
}

/// Whoever keeps several of the held himself, so that the roll need not know each.
pub(crate) trait Keeps {
    /// Shows all of them.
    fn show(&self, to: &mut dyn FnMut(View<'_>));
}

/// Who is held at one service on one worker.
#[derive(Default)]
pub(crate) struct Roll {
    entries: RefCell<BTreeMap<u64, Entry>>,
    keepers: RefCell<BTreeMap<u64, Weak<dyn Keeps>>>,
    next: Cell<u64>,
}

impl std::fmt::Debug for Roll {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = self.entries.borrow().len();
        formatter.debug_tuple("Roll").field(&count).finish()
    }
}

/// One on the roll; it is taken off when dropped.
#[derive(Debug)]
pub(crate) struct RollEntry {
    roll: Rc<Roll>,
    number: u64,
}

/// A keeper on the roll; it is taken off when dropped.
#[derive(Debug)]
pub(crate) struct KeeperEntry {
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
        end: Option<End>,
    ) -> RollEntry {
        let entry = Entry {
            client,
            what: what(head).into(),
            route,
            since,
            end,
        };
        let number = self.next_number();
        self.entries.borrow_mut().insert(number, entry);
        RollEntry {
            roll: Rc::clone(self),
            number,
        }
    }

    /// Enters somebody who keeps several.
    pub(crate) fn enter_keeper(self: &Rc<Self>, keeper: Weak<dyn Keeps>) -> KeeperEntry {
        let number = self.next_number();
        self.keepers.borrow_mut().insert(number, keeper);
        KeeperEntry {
            roll: Rc::clone(self),
            number,
        }
    }

    fn next_number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    fn show(&self, to: &mut dyn FnMut(View<'_>)) {
        for entry in self.entries.borrow().values() {
            to(View {
                client: entry.client,
                head: &entry.what,
                route: entry.route.as_ref().map(|route| route.name.as_str()),
                since: entry.since,
                end: entry.end,
            });
        }
        for keeper in self.keepers.borrow().values() {
            if let Some(keeper) = keeper.upgrade() {
                keeper.show(to);
            }
        }
    }

    /// Sums, and the `most` who came first and last; nobody is held for longer than `bound`.
    pub(crate) fn part(&self, most: usize, bound: Duration) -> RollPart {
        let now = Instant::now();
        let mut part = RollPart::default();
        let mut arrivals = Vec::new();
        self.show(&mut |view| {
            arrivals.push(view.since);
            let route = view.route.unwrap_or("-");
            match part.by_route.get_mut(route) {
                Some(count) => *count += 1,
                None => drop(part.by_route.insert(route.to_owned(), 1)),
            }
            *part.by_address.entry(view.client.ip()).or_default() += 1;
        });
        arrivals.sort_unstable();
        let Some(last) = most.min(arrivals.len()).checked_sub(1) else {
            return part;
        };
        let (old, new) = (arrivals[last], arrivals[arrivals.len() - 1 - last]);
        // Only now is anything copied of those who are told of.
        self.show(&mut |view| {
            if view.since <= old {
                part.oldest.push((view.since, view.tell(now, bound)));
            }
            if view.since >= new {
                part.newest.push((view.since, view.tell(now, bound)));
            }
        });
        part.oldest.sort_by_key(|(since, _)| *since);
        part.newest
            .sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        part.oldest.truncate(most);
        part.newest.truncate(most);
        part
    }
}

/// Method and path at the beginning of a head, as far as they are remembered.
fn what(head: &[u8]) -> &[u8] {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
    let line = line.strip_suffix(b" HTTP/1.1").unwrap_or(line);
    let what = if head.is_empty() { b"tcp" } else { line };
    &what[..what.len().min(WHAT_BYTES_MAX)]
}

impl View<'_> {
    fn tell(&self, now: Instant, bound: Duration) -> HeldEntry {
        let last = self.since.checked_add(bound).map(|at| End {
            at,
            by: EndsBy::Limit,
        });
        let end = [self.end, last]
            .into_iter()
            .flatten()
            .min_by_key(|end| end.at);
        HeldEntry {
            client: self.client.to_string(),
            what: String::from_utf8_lossy(what(self.head)).into_owned(),
            route: self.route.map(ToOwned::to_owned),
            age_ms: milliseconds(now.saturating_duration_since(self.since)),
            left_ms: end.map(|end| milliseconds(end.at.saturating_duration_since(now))),
            ends_by: end.map(|end| end.by),
        }
    }
}

impl Drop for RollEntry {
    fn drop(&mut self) {
        self.roll.entries.borrow_mut().remove(&self.number);
    }
}

impl Drop for KeeperEntry {
    fn drop(&mut self) {
        self.roll.keepers.borrow_mut().remove(&self.number);
    }
}
