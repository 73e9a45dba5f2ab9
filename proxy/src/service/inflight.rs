//! Who is in flight, by name: one table a worker, so that a drain that does not end can say what it waits for.
//!
//! Slots and their text buffers are reused; a request costs one copy of its first line's beginning. How far it has
//! come is read where the request itself notes it.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use cutover_protocol::hold::{AtCut, InFlight, InFlightPhase};

use super::milliseconds;
use crate::http::request::RequestId;
use crate::upstream::Endpoint;

/// Bytes of method and path that are remembered.
const WHAT_BYTES_MAX: usize = 200;
/// Records of progress that a worker keeps for later; more than that are freed.
const SPARE_MAX: usize = 256;

/// How far an exchange has come, for whoever has to decide what to do when it fails.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Bytes written to the upstream.
    pub(crate) sent: Cell<u64>,
    /// The last byte of the request is written.
    pub(crate) request_done: Cell<bool>,
    /// Anything was read from the upstream.
    pub(crate) heard: Cell<bool>,
    /// Any byte of the final answer may have been written to the client.
    pub(crate) answering: Cell<bool>,
    /// Status of the answer, zero before there is one.
    pub(crate) status: Cell<u16>,
    /// Bytes written to the client, heads and framing included.
    pub(crate) answered: Cell<u64>,
    pub(crate) course: Cell<Course>,
}

/// What kind of thing is under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Course {
    /// A request and its answer.
    #[default]
    Exchange,
    /// Bytes both ways.
    Tunnel,
    /// An answer that nobody waits for.
    Abandoned,
}

impl Progress {
    fn reset(&self) {
        self.sent.set(0);
        self.request_done.set(false);
        self.heard.set(false);
        self.answering.set(false);
        self.status.set(0);
        self.answered.set(0);
        self.course.set(Course::Exchange);
    }

    fn phase(&self) -> InFlightPhase {
        match self.course.get() {
            Course::Tunnel => InFlightPhase::Tunnel,
            Course::Abandoned => InFlightPhase::Abandoned,
            Course::Exchange if self.answering.get() => InFlightPhase::Answering,
            Course::Exchange if self.request_done.get() => InFlightPhase::Waiting,
            Course::Exchange => InFlightPhase::Sending,
        }
    }
}

/// What is to be known of one who is in flight.
#[derive(Debug)]
pub(crate) struct Entry<'e> {
    pub(crate) client: SocketAddr,
    /// Method and path, or what stands for them.
    pub(crate) what: &'e [u8],
    pub(crate) id: RequestId,
    pub(crate) route: Option<&'e str>,
    pub(crate) server: Option<Endpoint>,
    pub(crate) since: Instant,
    pub(crate) at_cut: AtCut,
    pub(crate) progress: &'e Rc<Progress>,
}

#[derive(Debug)]
struct Slot {
    client: SocketAddr,
    what: Vec<u8>,
    id: RequestId,
    route: String,
    server: Option<Endpoint>,
    at_cut: AtCut,
    /// Since when, and how far; `None` while nobody has the slot.
    occupied: Option<(Instant, Rc<Progress>)>,
}

/// The table of one service on one worker.
#[derive(Debug, Default)]
pub(crate) struct InFlightTable {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
    spare: RefCell<Vec<Rc<Progress>>>,
}

/// One row; it leaves the table when dropped.
#[derive(Debug)]
pub(crate) struct InFlightRow {
    table: Rc<InFlightTable>,
    index: usize,
}

impl InFlightTable {
    /// A record that nobody else has, with nothing in it.
    pub(crate) fn begin(&self) -> Rc<Progress> {
        self.spare.borrow_mut().pop().unwrap_or_default()
    }

    /// Takes a record back, to be used again.
    pub(crate) fn end(&self, progress: Rc<Progress>) {
        let mut spare = self.spare.borrow_mut();
        // A row may still tell of it.
        if Rc::strong_count(&progress) == 1 && spare.len() < SPARE_MAX {
            progress.reset();
            spare.push(progress);
        }
    }

    /// Enters a request.
    pub(crate) fn enter(self: &Rc<Self>, entry: Entry<'_>) -> InFlightRow {
        let what = &entry.what[..entry.what.len().min(WHAT_BYTES_MAX)];
        let mut slots = self.slots.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(Slot {
                client: entry.client,
                what: Vec::new(),
                id: entry.id,
                route: String::new(),
                server: None,
                at_cut: entry.at_cut,
                occupied: None,
            });
            slots.len() - 1
        });
        if let Some(slot) = slots.get_mut(index) {
            slot.client = entry.client;
            slot.what.clear();
            slot.what.extend_from_slice(what);
            slot.id = entry.id;
            slot.route.clear();
            slot.route.push_str(entry.route.unwrap_or_default());
            slot.server = entry.server;
            slot.at_cut = entry.at_cut;
            slot.occupied = Some((entry.since, Rc::clone(entry.progress)));
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
        slots.iter().filter_map(|slot| slot.tell(now)).collect()
    }

    /// How many are to be cut when a drain takes too long.
    pub(crate) fn to_be_cut(&self) -> usize {
        let slots = self.slots.borrow();
        let cut = |slot: &&Slot| slot.occupied.is_some() && slot.at_cut == AtCut::Cut;
        slots.iter().filter(cut).count()
    }
}

impl Slot {
    fn tell(&self, now: Instant) -> Option<InFlight> {
        let (since, progress) = self.occupied.as_ref()?;
        Some(InFlight {
            client: self.client.to_string(),
            what: String::from_utf8_lossy(&self.what).into_owned(),
            age_ms: milliseconds(now.saturating_duration_since(*since)),
            id: Some(self.id.to_string()),
            route: (!self.route.is_empty()).then(|| self.route.clone()),
            server: self.server.as_ref().map(ToString::to_string),
            phase: progress.phase(),
            sent_bytes: progress.sent.get(),
            answered_bytes: progress.answered.get(),
            at_cut: self.at_cut,
            waits_for: Vec::new(),
        })
    }
}

impl Drop for InFlightRow {
    fn drop(&mut self) {
        if let Some(slot) = self.table.slots.borrow_mut().get_mut(self.index) {
            slot.occupied = None;
            slot.server = None;
        }
        self.table.free.borrow_mut().push(self.index);
    }
}
