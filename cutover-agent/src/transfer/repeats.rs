//! Blocks that are in a tree more than once, as a database writes each page twice and a deployment keeps the release before
//! beside its own: the first one crosses, and of the others only where they are. They are put in place when all frames have
//! arrived, so it does not matter in which order these come.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};

use super::wire::Repeat;
use crate::files::blocks::{BLOCK_BYTES, Digest};

/// Blocks by which others are recognised: 1.75 GiB of them, in about 6 MiB of memory for each tree that is on its way.
const BLOCKS_MAX: usize = 7 << 14;
/// Runs of such blocks in a round, some ten bytes each.
pub(super) const REPEATS_MAX: usize = 1 << 18;

/// Where the target has, or will have at the end of the round, blocks of the tree.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<Digest, (u32, u32)>>);

impl Places {
    /// Where an equal block is, by entry and index. If there is none, this one is it for those to come.
    pub(super) fn of(
        &self,
        digest: &Digest,
        place: (u32, u32),
        block: &[u8],
    ) -> Option<(u32, u32)> {
        if block.len() != BLOCK_BYTES {
            return None;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = known.len() < BLOCKS_MAX;
        match known.entry(*digest) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(room) => {
                if has_room {
                    room.insert(place);
                }
                None
            }
        }
    }
}

/// Adds a block to those that are equal to others, in one run with the last one where both follow each other.
pub(super) fn add(repeats: &mut Vec<Repeat>, (entry, first): (u32, u32), (from, at): (u32, u32)) {
    if let Some(last) = repeats.last_mut()
        && (last.entry, last.first + last.count) == (entry, first)
        && (last.from, last.at + last.count) == (from, at)
    {
        last.count += 1;
        return;
    }
    repeats.push(Repeat {
        entry,
        first,
        from,
        at,
        count: 1,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_blocks_is_where_the_others_come_from() {
        let (places, block) = (Places::default(), [7; BLOCK_BYTES]);
        let digest = Digest::of(&block);
        assert_eq!(places.of(&digest, (1, 5), &block), None);
        assert_eq!(places.of(&digest, (2, 9), &block), Some((1, 5)));
        assert_eq!(places.of(&Digest::of(b"x"), (2, 10), b"x"), None);
        assert_eq!(places.of(&Digest::of(b"x"), (2, 11), b"x"), None, "short");
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered() {
        let (places, block) = (Places::default(), [7; BLOCK_BYTES]);
        for number in 0..=BLOCKS_MAX {
            let digest = Digest::of(&number.to_le_bytes());
            assert_eq!(places.of(&digest, (0, number as u32), &block), None);
        }
        let of = |number: usize| places.of(&Digest::of(&number.to_le_bytes()), (1, 1), &block);
        assert_eq!(of(BLOCKS_MAX - 1), Some((0, BLOCKS_MAX as u32 - 1)));
        assert_eq!(of(BLOCKS_MAX), None);
    }

    #[test]
    fn blocks_that_follow_each_other_at_both_places_are_one_run() {
        let mut repeats = Vec::new();
        let places = [
            ((1, 5), (0, 2)),
            ((1, 6), (0, 3)),
            ((1, 7), (0, 3)),
            ((2, 8), (0, 4)),
        ];
        for (place, from) in places {
            add(&mut repeats, place, from);
        }
        let counts: Vec<u32> = repeats.iter().map(|repeat| repeat.count).collect();
        assert_eq!(counts, [2, 1, 1]);
    }
}
