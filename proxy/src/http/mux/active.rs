//! Which streams of a connection run, and since when none does: an idle connection is ended by that.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// The streams of one connection.
#[derive(Debug)]
pub(crate) struct Active {
    count: Cell<usize>,
    since: Cell<Instant>,
}

/// A stream that runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Running(Rc<Active>);

impl Active {
    /// None runs yet.
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            count: Cell::new(0),
            since: Cell::new(Instant::now()),
        })
    }

    /// One more runs.
    pub(crate) fn begin(self: &Rc<Self>) -> Running {
        self.count.set(self.count.get() + 1);
        Running(Rc::clone(self))
    }

    /// Completes when no stream has run for this long. While the service is held, nobody is idle: where `holds` is
    /// true when the time is over, it begins anew.
    pub(crate) async fn idle(&self, idle_max: Duration, holds: impl Fn() -> bool) {
        loop {
            if self.count.get() == 0 && holds() {
                self.since.set(Instant::now());
            }
            let runs = self.count.get() > 0;
            let since = if runs {
                Instant::now()
            } else {
                self.since.get()
            };
            let deadline = since + idle_max;
            if !runs && deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let left = self.0.count.get() - 1;
        self.0.count.set(left);
        if left == 0 {
            self.0.since.set(Instant::now());
        }
    }
}
