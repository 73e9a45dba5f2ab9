//! How much of a request's body is taken, and how slowly: the limits of one body while it is under way.
//!
//! Once the answer has begun there is no least pace any more: a client that streams both ways may have nothing to
//! say for long.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::pace::{Pace, PaceLimit, TooSlow};
use crate::config::Limits;

/// A body longer than it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

/// The limits of one body.
#[derive(Debug)]
pub(crate) struct Intake<'p> {
    /// Bytes that may still come.
    left: Cell<u64>,
    pace: RefCell<Pace>,
    answering: &'p Cell<bool>,
}

impl<'p> Intake<'p> {
    /// `answering` is true from the beginning of the answer on.
    pub(crate) fn new(limits: &Limits, answering: &'p Cell<bool>) -> Self {
        let most = match limits.body_bytes_max {
            0 => u64::MAX,
            most => most,
        };
        let pace = PaceLimit {
            bytes_per_s_min: limits.client_body_bytes_per_s_min,
            window: limits.client_body_window,
        };
        Self {
            left: Cell::new(most),
            pace: RefCell::new(Pace::new(pace)),
            answering,
        }
    }

    /// So many bytes of the body itself came, without what frames them.
    ///
    /// # Errors
    /// They are too many; none of these may be passed on.
    pub(crate) fn take(&self, bytes: usize) -> Result<(), TooLong> {
        let left = self.left.get().checked_sub(bytes as u64);
        self.left.set(left.ok_or(TooLong)?);
        Ok(())
    }

    /// How long to wait for the client at most; `silence` is what holds apart from the pace.
    pub(crate) fn wait_max(&self, silence: Duration) -> Duration {
        if self.answering.get() {
            return silence;
        }
        let by_pace = self.pace.borrow().wait_max();
        by_pace.map_or(silence, |pace| pace.min(silence))
    }

    /// We waited so long for the client and got so many bytes.
    ///
    /// # Errors
    /// That is too slow.
    pub(crate) fn waited(&self, time: Duration, bytes: u64) -> Result<(), TooSlow> {
        if self.answering.get() {
            return Ok(());
        }
        let mut pace = self.pace.borrow_mut();
        pace.received(bytes);
        pace.waited(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(30);

    fn intake(body_bytes_max: u64, answering: &Cell<bool>) -> Intake<'_> {
        let pace = PaceLimit {
            bytes_per_s_min: 100,
            window: Duration::from_secs(10),
        };
        Intake {
            left: Cell::new(body_bytes_max),
            pace: RefCell::new(Pace::new(pace)),
            answering,
        }
    }

    #[test]
    fn a_body_is_taken_up_to_its_limit() {
        let answering = Cell::new(false);
        let intake = intake(5, &answering);
        assert_eq!(intake.take(5), Ok(()));
        assert_eq!(intake.take(0), Ok(()));
        assert_eq!(intake.take(1), Err(TooLong));
    }

    #[test]
    fn a_client_that_streams_both_ways_may_be_silent_once_the_answer_flows() {
        let answering = Cell::new(false);
        let intake = intake(5, &answering);
        assert_eq!(intake.wait_max(SILENCE), Duration::from_secs(10));
        assert_eq!(intake.waited(Duration::from_secs(9), 0), Ok(()));
        answering.set(true);
        assert_eq!(intake.wait_max(SILENCE), SILENCE);
        assert_eq!(intake.waited(Duration::from_secs(3600), 0), Ok(()));
        answering.set(false);
        assert_eq!(intake.waited(Duration::from_secs(1), 0), Err(TooSlow));
    }
}
