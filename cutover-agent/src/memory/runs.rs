//! Runs of slots: how the order of many pages is said in few bytes. Memory that did not change since a round lies in
//! consecutive slots, so an image of a million pages with a thousand changed ones is some two thousand runs.

use serde::{Deserialize, Serialize};

/// Where a page lies in the target's store. Slot 0 is the page of zeros, which is never sent or stored.
pub(crate) type Slot = u32;

/// The slot of a page of zeros.
pub(crate) const ZERO: Slot = 0;

/// Slots there may be at most: 64 GiB of different pages, 256 MiB of digests.
pub(crate) const SLOTS_MAX: u32 = 1 << 24;

/// Consecutive slots; of zeros, `count` times the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) first: Slot,
    pub(crate) count: u32,
}

impl Run {
    /// The last slot of the run; `None` when its numbers are out of bounds.
    pub(crate) fn last(&self) -> Option<Slot> {
        if self.count == 0 {
            return None;
        }
        if self.first == ZERO {
            return Some(ZERO);
        }
        let last = self.first.checked_add(self.count - 1)?;
        (last < SLOTS_MAX).then_some(last)
    }

    /// Its slots in order.
    pub(crate) fn slots(self) -> impl Iterator<Item = Slot> {
        let step = u32::from(self.first != ZERO);
        (0..self.count).map(move |index| self.first + index * step)
    }
}

/// Collects slots into runs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    pub(crate) fn push(&mut self, slot: Slot) {
        if let Some(last) = self.0.last_mut() {
            let next = if last.first == ZERO {
                ZERO
            } else {
                last.first + last.count
            };
            if next == slot && (last.first == ZERO) == (slot == ZERO) {
                last.count += 1;
                return;
            }
        }
        self.0.push(Run {
            first: slot,
            count: 1,
        });
    }

    pub(crate) fn take(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeros_repeat_and_never_run_into_the_first_slot() {
        let mut runs = Runs::default();
        for slot in [0, 0, 1, 2, 3, 0, 7] {
            runs.push(slot);
        }
        let seen: Vec<(u32, u32)> = runs.0.iter().map(|run| (run.first, run.count)).collect();
        assert_eq!(seen, [(0, 2), (1, 3), (0, 1), (7, 1)]);
    }

    #[test]
    fn a_run_past_the_last_slot_has_no_last() {
        let past = |first, count| Run { first, count }.last();
        assert_eq!(past(1, u32::MAX), None);
        assert_eq!(past(5, 0), None);
        assert_eq!(past(SLOTS_MAX - 1, 2), None);
        assert_eq!(past(SLOTS_MAX - 1, 1), Some(SLOTS_MAX - 1));
        assert_eq!(past(0, u32::MAX), Some(0));
    }

    proptest! {
        #[test]
        fn runs_give_back_the_slots_they_were_made_of(slots in proptest::collection::vec(0_u32..6, 0..100)) {
            let mut runs = Runs::default();
            slots.iter().for_each(|slot| runs.push(*slot));
            let back: Vec<Slot> = runs.0.iter().flat_map(|run| run.slots()).collect();
            prop_assert_eq!(back, slots);
        }
    }
}
