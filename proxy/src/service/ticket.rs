//! A ticket: the right to hand one request to one upstream, from the gate's word to the last byte of the answer.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use cutover_protocol::id::Register;

use super::gate::Gate;
use super::queue::{Eviction, Parked};
use super::word::Mode;

/// How a ticket was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The gate was open.
    Open,
    /// It was held, and let through in this release.
    Released {
        /// Which release; answers to an earlier one do not move the window.
        generation: u64,
    },
}

/// In flight from its making to its drop.
#[derive(Debug)]
pub(crate) struct Ticket<'g> {
    gate: &'g Gate,
    worker: usize,
    register: Register,
    pass: Cell<Pass>,
}

impl<'g> Ticket<'g> {
    /// Takes over one count of in flight.
    pub(super) const fn new(gate: &'g Gate, worker: usize, register: Register, pass: Pass) -> Self {
        Self {
            gate,
            worker,
            register,
            pass: Cell::new(pass),
        }
    }

    /// Whom the request goes to, and in which epoch.
    pub(crate) const fn register(&self) -> Register {
        self.register
    }

    /// The upstream has begun to answer: it works.
    pub(crate) fn answered(&self) {
        if let Pass::Released { generation } = self.pass.replace(Pass::Open) {
            self.gate.answered(generation);
        }
    }

    /// Whether the gate still sends requests where this ticket points: not so once it closed or moved on.
    pub(crate) fn is_current(&self) -> bool {
        let word = self.gate.word();
        word.mode != Mode::Holding && word.register == self.register
    }

    /// Gives the ticket back because no connection came about, and waits again at the old place in the queue.
    /// `None` when the gate has been open for too long to blame the hop.
    ///
    /// # Errors
    /// The queue is full or shut.
    pub(crate) fn wait_again(
        self,
        gate: &Arc<Gate>,
        arrival: Instant,
    ) -> Option<Result<Parked, Eviction>> {
        let worker = self.worker;
        if self.is_current() {
            let pass = self.pass.get();
            if !gate.may_wait_again(pass) {
                return None;
            }
            // The queue has taken note; the drop below must not count it a second time.
            self.pass.set(Pass::Open);
        }
        drop(self);
        Some(gate.park(worker, arrival))
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.worker);
        if let Pass::Released { generation } = self.pass.get() {
            self.gate.forgotten(generation);
        }
    }
}
