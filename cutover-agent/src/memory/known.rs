//! What the source knows of the target's store: which page lies in which slot. The source gives out the slots, so the
//! target needs no index, and a page is referred to by a number.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::digest::PageDigest;
use super::runs::{SLOTS_MAX, Slot, ZERO};

/// Where a page belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The target has it, or it is on its way.
    Known(Slot),
    /// It must be sent.
    New(Slot),
}

/// Digest to slot. 24 bytes a page, up to twice that while it grows.
#[derive(Debug)]
pub(crate) struct Known {
    slots: HashMap<PageDigest, Slot, BuildHasherDefault<FirstBytes>>,
    next: Slot,
}

impl Known {
    pub(crate) fn new() -> Self {
        Self {
            slots: HashMap::default(),
            next: ZERO + 1,
        }
    }

    /// The place of a page that is not all zero; `None` when there is no slot left.
    pub(crate) fn place(&mut self, digest: PageDigest) -> Option<Place> {
        if let Some(slot) = self.slots.get(&digest) {
            return Some(Place::Known(*slot));
        }
        let slot = self.next;
        if slot >= SLOTS_MAX {
            return None;
        }
        self.next += 1;
        self.slots.insert(digest, slot);
        Some(Place::New(slot))
    }

    /// The first slot that was not given out; all below are on their way or there.
    pub(crate) const fn end(&self) -> Slot {
        self.next
    }
}

/// Digests are uniform already, and keyed with a secret: eight of their bytes are as good a hash as any.
#[derive(Debug, Default)]
struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _: usize) {
        // The length of an array says nothing.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_gets_one_slot_and_the_first_is_not_the_zeros() {
        let mut known = Known::new();
        let (a, b) = (PageDigest([1; 16]), PageDigest([2; 16]));
        assert_eq!(known.place(a), Some(Place::New(1)));
        assert_eq!(known.place(b), Some(Place::New(2)));
        assert_eq!(known.place(a), Some(Place::Known(1)));
        assert_eq!(known.end(), 3);
    }
}
