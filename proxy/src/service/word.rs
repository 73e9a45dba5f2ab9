//! The one number that tells an open gate what to do: mode, owner and epoch in 64 bits, so that a request reads
//! all three at the same instant with one load.

use cutover_protocol::hold::Gate;
use cutover_protocol::id::{Epoch, Register, Site};

/// What new requests meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They pass.
    Open,
    /// They are held.
    Holding,
    /// They are held behind those held before them, and let through in turn.
    Releasing,
}

impl From<Mode> for Gate {
    /// As others are told; a mode does not know whether anything is still in flight.
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Open => Self::Open,
            Mode::Holding => Self::Holding,
            Mode::Releasing => Self::Releasing,
        }
    }
}

/// Mode and register of a gate at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) mode: Mode,
    pub(crate) register: Register,
}

impl Word {
    /// Two bits of mode, one of owner, the rest is the epoch: 2^61 hops last longer than any machine.
    pub(super) const fn pack(self) -> u64 {
        let mode = match self.mode {
            Mode::Open => 0,
            Mode::Holding => 1,
            Mode::Releasing => 2,
        };
        let owner = match self.register.owner {
            Site::Source => 0,
            Site::Target => 4,
        };
        self.register.epoch.0 << 3 | owner | mode
    }

    /// The reverse of [`Word::pack`]; the unused fourth mode reads as holding, the safe one.
    pub(super) const fn unpack(packed: u64) -> Self {
        let mode = match packed & 3 {
            0 => Mode::Open,
            2 => Mode::Releasing,
            _ => Mode::Holding,
        };
        let owner = if packed & 4 == 0 {
            Site::Source
        } else {
            Site::Target
        };
        Self {
            mode,
            register: Register {
                epoch: Epoch(packed >> 3),
                owner,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_packing() {
        for mode in [Mode::Open, Mode::Holding, Mode::Releasing] {
            for owner in [Site::Source, Site::Target] {
                for epoch in [0, 1, 7, u64::MAX >> 3] {
                    let word = Word {
                        mode,
                        register: Register {
                            epoch: Epoch(epoch),
                            owner,
                        },
                    };
                    assert_eq!(Word::unpack(word.pack()), word);
                }
            }
        }
    }
}
