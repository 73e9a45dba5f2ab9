//! What a client process writes down. Nothing is ever taken back.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::{Crowd, Fault};
use crate::bench::hold::clock::now_ns;
use crate::bench::hold::plan::{Kind, Method, Outcome, Request, Told, Wave};

/// Failures that are told in words, at most.
const FAULTS_MAX: usize = 5;

/// The notes of one process.
#[derive(Debug, Default)]
pub(super) struct Notes {
    process: u32,
    requests: RefCell<Vec<Request>>,
    faults: RefCell<Vec<String>>,
    connected: Cell<usize>,
    unconnected: Cell<usize>,
    /// Requests whose last byte was given to the kernel, or that are over.
    sent_held: Cell<usize>,
    sent_more: Cell<usize>,
    open: Cell<usize>,
}

fn add(cell: &Cell<usize>, count: usize) {
    cell.set(cell.get() + count);
}

impl Notes {
    pub(super) fn new(process: u32) -> Self {
        Self {
            process,
            ..Self::default()
        }
    }

    pub(super) fn connects(&self) {
        add(&self.connected, 1);
    }

    pub(super) fn fails_to_connect(&self, fault: &Fault) {
        add(&self.unconnected, 1);
        self.fault(fault);
    }

    pub(super) fn fault(&self, fault: &Fault) {
        let mut faults = self.faults.borrow_mut();
        if faults.len() < FAULTS_MAX {
            faults.push(fault.to_string());
        }
    }

    /// Requests that could not even be sent: they count as broken ones.
    pub(super) fn unsent(&self, kind: Kind, connection: u32, wave: Wave, count: usize) {
        for _ in 0..count {
            let index = self.push(kind, connection, wave, Method::Get);
            self.requests.borrow_mut()[index].outcome = Outcome::Broken;
            self.leaves(wave);
        }
    }

    fn push(&self, kind: Kind, connection: u32, wave: Wave, method: Method) -> usize {
        let mut requests = self.requests.borrow_mut();
        let index = requests.len();
        let now = now_ns();
        requests.push(Request {
            id: u64::from(self.process) << 40 | index as u64,
            kind,
            method,
            wave,
            connection,
            sent_ns: now,
            ended_ns: 0,
            outcome: Outcome::Waiting,
        });
        index
    }

    fn leaves(&self, wave: Wave) {
        match wave {
            Wave::Held => add(&self.sent_held, 1),
            Wave::More => add(&self.sent_more, 1),
            Wave::First | Wave::Steady => {}
        }
    }

    pub(super) const fn connected(&self) -> usize {
        self.connected.get()
    }

    pub(super) const fn unconnected(&self) -> usize {
        self.unconnected.get()
    }

    /// Whether so many requests of a wave were sent.
    pub(super) const fn sent(&self, wave: Wave, count: usize) -> bool {
        match wave {
            Wave::More => self.sent_more.get() >= count,
            _ => self.sent_held.get() >= count,
        }
    }

    /// Requests without an end.
    pub(super) const fn open(&self) -> usize {
        self.open.get()
    }

    /// Connected, and not.
    pub(super) fn sums(&self) -> String {
        format!("{} {}", self.connected.get(), self.unconnected.get())
    }

    pub(super) fn told(&self) -> Told {
        Told {
            requests: self.requests.borrow().clone(),
            faults: self.faults.borrow().clone(),
        }
    }
}

/// One request's line in the notes. Dropped before its end, its client has left.
pub(super) struct Place {
    crowd: Rc<Crowd>,
    index: usize,
    pub(super) id: u64,
    pub(super) kind: Kind,
    pub(super) method: Method,
    wave: Wave,
    is_sent: Cell<bool>,
    is_over: Cell<bool>,
}

impl Place {
    pub(super) fn new(
        crowd: &Rc<Crowd>,
        kind: Kind,
        connection: u32,
        wave: Wave,
        method: Method,
    ) -> Self {
        let index = crowd.notes.push(kind, connection, wave, method);
        let id = crowd.notes.requests.borrow()[index].id;
        add(&crowd.notes.open, 1);
        Self {
            crowd: Rc::clone(crowd),
            index,
            id,
            kind,
            method,
            wave,
            is_sent: Cell::new(false),
            is_over: Cell::new(false),
        }
    }

    /// Its last byte has been given away.
    pub(super) fn sent(&self) {
        if !self.is_sent.replace(true) {
            self.crowd.notes.leaves(self.wave);
            self.crowd.moved.notify_one();
        }
    }

    pub(super) fn end(&self, ended: Result<u16, Fault>) {
        let outcome = match ended {
            Ok(status) => Outcome::Answered(status),
            Err(fault) => {
                self.crowd.notes.fault(&fault);
                match fault {
                    Fault::Status(status) => Outcome::Answered(status),
                    _ => Outcome::Broken,
                }
            }
        };
        self.close(outcome);
    }

    /// Whether it was answered as it should be.
    pub(super) fn is_good(&self) -> bool {
        let requests = self.crowd.notes.requests.borrow();
        requests[self.index].outcome == Outcome::Answered(200)
    }

    fn close(&self, outcome: Outcome) {
        if self.is_over.replace(true) {
            return;
        }
        {
            let mut requests = self.crowd.notes.requests.borrow_mut();
            let request = &mut requests[self.index];
            request.ended_ns = now_ns();
            request.outcome = outcome;
        }
        let open = &self.crowd.notes.open;
        open.set(open.get() - 1);
        self.sent();
        self.crowd.moved.notify_one();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.close(Outcome::Left);
    }
}
