//! A ticket: the right to hand one request to one upstream, from the gate's word to the last byte of the answer.

use std::cell::Cell;
use std::sync::Arc;

use cutover_protocol::id::Register;

use super::gate::Gate;
use super::queue::{Eviction, Parked};
use super::terms::Terms;
use super::window::Verdict;
use super::word::{Mode, Word};

/// How a ticket was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The gate was open.
    Open,
    /// The gate was not open, and it comes from the application itself: what is in flight may be waiting for it.
    Own,
    /// It was held, and let through in a release.
    Released(Slot),
}

/// One of those that a release has let through and that are not over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Which release; what belongs to an earlier one does not move the window.
    pub(super) generation: u64,
    pub(super) number: u64,
}

/// In flight from its making to its drop.
#[derive(Debug)]
pub(crate) struct Ticket<'g> {
    gate: &'g Gate,
    worker: usize,
    register: Register,
    pass: Cell<Pass>,
    standing: Cell<Standing>,
}

/// As what something in flight, or its connection, is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// A drain waits for it.
    InFlight,
    /// It is carried through a hop.
    Carried,
}

impl<'g> Ticket<'g> {
    /// Takes over one count of in flight.
    pub(super) const fn new(gate: &'g Gate, worker: usize, register: Register, pass: Pass) -> Self {
        Self {
            gate,
            worker,
            register,
            pass: Cell::new(pass),
            standing: Cell::new(Standing::InFlight),
        }
    }

    /// Whom the request goes to, and in which epoch.
    pub(crate) const fn register(&self) -> Register {
        self.register
    }

    /// The upstream has begun to answer, with this status.
    pub(crate) fn answered(&self, status: u16) {
        if let Pass::Released(slot) = self.pass.get() {
            self.gate.answered(slot, Verdict::of(status));
        }
    }

    /// The same, and what follows takes as long as both ends like: no release waits for it.
    pub(crate) fn tunnels(&self) {
        if let Pass::Released(slot) = self.pass.replace(Pass::Open) {
            self.gate.answered(slot, Verdict::Fine);
            self.gate.ended(slot);
        }
    }

    /// Whether the gate still sends requests where this ticket points: not so once it closed or moved on.
    pub(crate) fn is_current(&self) -> bool {
        self.is_allowed_by(self.gate.word())
    }

    /// The same for a word of the gate.
    pub(super) fn is_allowed_by(&self, word: Word) -> bool {
        let lets_pass = word.mode != Mode::Holding || self.pass.get() == Pass::Own;
        lets_pass && word.register == self.register
    }

    /// No drain waits for it any more.
    pub(crate) fn carry(&self) {
        if self.standing.replace(Standing::Carried) == Standing::InFlight {
            self.gate.carries(self.worker);
        }
    }

    /// Gives the ticket back because no connection came about, and waits again at the old place in the queue.
    /// `None` when the gate has been open for too long to blame the hop.
    ///
    /// # Errors
    /// The queue is full or shut.
    pub(crate) fn wait_again(
        self,
        gate: &Arc<Gate>,
        terms: Terms,
    ) -> Option<Result<Parked, Eviction>> {
        let worker = self.worker;
        if self.is_current() {
            let pass = self.pass.get();
            // Held, it might wait for a release that waits for it.
            if pass == Pass::Own {
                return None;
            }
            if !gate.may_wait_again(pass) {
                return None;
            }
            // The queue has taken note; the drop below must not count it a second time.
            self.pass.set(Pass::Open);
        }
        drop(self);
        Some(gate.park(worker, terms))
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        match self.standing.get() {
            Standing::InFlight => self.gate.leave(self.worker),
            Standing::Carried => self.gate.carried_ends(self.worker),
        }
        if let Pass::Released(slot) = self.pass.get() {
            self.gate.ended(slot);
        }
    }
}
