//! Who is in flight, by name: one table a worker, so that a drain that does not end can say what it waits for.
//!
//! Slots and their text buffers are reused; a request costs one copy of its first line's beginning.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use cutover_protocol::hold::InFlight;

use super::milliseconds;

/// Bytes of method and path that are remembered.
const WHAT_BYTES_MAX: usize = 200;

#[derive(Debug)]
struct Slot {
    client: SocketAddr,
    since: Option<Instant>,
    what: Vec<u8>,
}

/// The table of one service on one worker.
#[derive(Debug, Default)]
pub(crate) struct InFlightTable {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
}

/// One row; it leaves the table when dropped.
#[derive(Debug)]
pub(crate) struct InFlightRow {
    table: Rc<InFlightTable>,
    index: usize,
}

impl InFlightTable {
    /// Enters a request.
    pub(crate) fn enter(
        self: &Rc<Self>,
        client: SocketAddr,
        what: &[u8],
        since: Instant,
    ) -> InFlightRow {
        let what = &what[..what.len().min(WHAT_BYTES_MAX)];
        let mut slots = self.slots.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(Slot {
                client,
                since: None,
                what: Vec::new(),
            });
            slots.len() - 1
        });
        if let Some(slot) = slots.get_mut(index) {
            slot.client = client;
            slot.since = Some(since);
            slot.what.clear();
            slot.what.extend_from_slice(what);
        }
        InFlightRow {
            table: Rc::clone(self),
            index,
        }
    }

    /// Everyone in the table, in no order.
    pub(crate) fn list(&self) -> Vec<InFlight> {
        let now = Instant::now();
        let slots = self.slots.borrow();
        let rows = slots
            .iter()
            .filter_map(|slot| slot.since.map(|since| (slot, since)));
        rows.map(|(slot, since)| InFlight {
            client: slot.client.to_string(),
            what: String::from_utf8_lossy(&slot.what).into_owned(),
            age_ms: milliseconds(now.saturating_duration_since(since)),
        })
        .collect()
    }
}

impl Drop for InFlightRow {
    fn drop(&mut self) {
        if let Some(slot) = self.table.slots.borrow_mut().get_mut(self.index) {
            slot.since = None;
        }
        self.table.free.borrow_mut().push(self.index);
    }
}
