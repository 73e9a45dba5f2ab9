//! How a connection is read while its service is held: in sips, each followed by a look at what it brought.
//!
//! The `h2` crate reads for as long as there is anything to read before it tells of a new stream, and never gives back
//! the room it needed for all that came at once. While requests are held, that room would be for ever.

use std::cell::Cell;
use std::rc::Rc;

/// Bytes of a sip: a few heads, and little enough that a hundred streams cost less than their own state.
pub(super) const SIP_BYTES: usize = 1024;

/// Whether a connection may be read, and whether it was.
#[derive(Debug, Clone, Default)]
pub(super) struct Sips(Rc<State>);

#[derive(Debug, Default)]
struct State {
    thirst: Cell<Thirst>,
    /// Something was read since the streams were looked at.
    news: Cell<bool>,
}

/// How much may be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Thirst {
    /// Whatever comes.
    #[default]
    Endless,
    /// One sip.
    Sip,
    /// Nothing. Whoever says so comes back without being woken.
    Quenched,
}

impl Sips {
    /// Says how much may be read from now on.
    pub(super) fn allow(&self, thirst: Thirst) {
        self.0.thirst.set(thirst);
    }

    /// How much may be read.
    pub(super) fn thirst(&self) -> Thirst {
        self.0.thirst.get()
    }

    /// Something was read.
    pub(super) fn read(&self) {
        self.0.news.set(true);
        if self.thirst() == Thirst::Sip {
            self.allow(Thirst::Quenched);
        }
    }

    /// Whether something was read since [`Sips::looked`].
    pub(super) fn has_news(&self) -> bool {
        self.0.news.get()
    }

    /// All streams were looked at.
    pub(super) fn looked(&self) {
        self.0.news.set(false);
    }
}
