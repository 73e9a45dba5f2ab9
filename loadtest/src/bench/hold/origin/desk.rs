//! The workers of an origin and their notes.
//!
//! When a request is done is arithmetic: it begins when the first worker is free and takes the time that each takes. A
//! thread of its own waits for that moment, because the runtime's timer counts in whole milliseconds, and a capacity
//! that is 5 % below its name would spoil what is measured.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Options, Spoil};
use crate::bench::hold::clock::now_ns;
use crate::bench::hold::plan::{Execution, Method, Seen};

/// Of so many requests an origin spoils one.
const SPOILS_ONE_OF: u64 = 10;

/// Workers and notes.
#[derive(Debug)]
pub(super) struct Desk {
    options: Options,
    /// When each worker is free.
    free_ns: RefCell<BinaryHeap<Reverse<u64>>>,
    alarm: Arc<Alarm>,
    seen: RefCell<Vec<Execution>>,
    busy: Cell<usize>,
    peak: Cell<usize>,
    count: Cell<u64>,
    is_ready: Cell<bool>,
}

/// A request that is being worked on; it is noted as done or, dropped before that, as broken off.
pub(super) struct Work<'d> {
    desk: &'d Desk,
    place: Option<usize>,
}

impl Desk {
    pub(super) fn open(options: Options) -> io::Result<Rc<Self>> {
        let alarm = Arc::new(Alarm::default());
        let ringing = Arc::clone(&alarm);
        std::thread::Builder::new()
            .name("alarm".into())
            .spawn(move || ringing.ring())?;
        Ok(Rc::new(Self {
            options,
            free_ns: RefCell::new((0..options.workers.max(1)).map(|_| Reverse(0)).collect()),
            alarm,
            seen: RefCell::default(),
            busy: Cell::new(0),
            peak: Cell::new(0),
            count: Cell::new(0),
            is_ready: Cell::new(false),
        }))
    }

    /// A request's head is here.
    pub(super) fn begin(&self, id: u64, method: Method) -> Work<'_> {
        self.busy.set(self.busy.get() + 1);
        self.peak.set(self.peak.get().max(self.busy.get()));
        self.count.set(self.count.get() + 1);
        let is_spoilt = self.count.get().is_multiple_of(SPOILS_ONE_OF);
        let execution = Execution {
            id,
            method,
            began_ns: now_ns(),
            ended_ns: 0,
        };
        let mut seen = self.seen.borrow_mut();
        if is_spoilt && self.options.spoil == Spoil::Double {
            seen.push(execution);
        }
        let place = if is_spoilt && self.options.spoil == Spoil::Lose {
            None
        } else {
            seen.push(execution);
            Some(seen.len() - 1)
        };
        Work { desk: self, place }
    }

    pub(super) fn seen(&self) -> Seen {
        Seen {
            executions: self.seen.borrow().clone(),
            peak: self.peak.get(),
        }
    }

    pub(super) fn count_anew(&self) {
        self.peak.set(self.busy.get());
    }

    pub(super) fn become_ready(&self) {
        self.is_ready.set(true);
    }

    pub(super) const fn is_ready(&self) -> bool {
        self.is_ready.get()
    }
}

impl Work<'_> {
    /// Waits for a worker, and until it is done.
    pub(super) async fn done(&self) {
        if self.desk.options.work_us == 0 {
            return;
        }
        let end = {
            let mut free = self.desk.free_ns.borrow_mut();
            let begin = free.pop().map_or(0, |Reverse(free)| free).max(now_ns());
            let end = begin + self.desk.options.work_us * 1000;
            free.push(Reverse(end));
            end
        };
        self.desk.alarm.at(end).await;
    }

    /// The whole request was executed; its answer is about to be sent.
    pub(super) fn finish(&self) {
        if let Some(place) = self.place {
            self.desk.seen.borrow_mut()[place].ended_ns = now_ns();
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.desk.busy.set(self.desk.busy.get() - 1);
    }
}

/// Wakes tasks at a given nanosecond.
#[derive(Debug, Default)]
struct Alarm {
    waiting: Mutex<Waiting>,
    sooner: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    at: BTreeMap<(u64, u64), oneshot::Sender<()>>,
    unique: u64,
}

impl Alarm {
    async fn at(&self, ns: u64) {
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.unique += 1;
            let key = (ns, waiting.unique);
            waiting.at.insert(key, sender);
            if waiting.at.first_key_value().map(|(first, _)| *first) == Some(key) {
                self.sooner.notify_one();
            }
        }
        // The thread never ends.
        let _ = receiver.await;
    }

    fn ring(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = now_ns();
            while let Some(entry) = waiting.at.first_entry()
                && entry.key().0 <= now
            {
                // Whoever waited may have gone.
                let _ = entry.remove().send(());
            }
            let next = waiting.at.first_key_value().map(|((ns, _), _)| *ns);
            waiting = match next {
                Some(next) => {
                    let left = Duration::from_nanos(next.saturating_sub(now));
                    let woken = self.sooner.wait_timeout(waiting, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .sooner
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}
