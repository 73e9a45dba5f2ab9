//! What a memory round saw of a container: which page lay where. CRIU says of memory that has not changed since only that
//! its parent has it; here is what that was.

use std::collections::{BTreeMap, HashMap};

use super::MemoryError;
use super::digest::{PAGE_BYTES, PageDigest};
use super::runs::Slot;
use super::server::frames::FLAG_PARENT;
use super::wire::{ImageId, Region};

/// Every page of a container, 20 bytes a page; of a dump that follows no round, none.
#[derive(Debug, Default)]
pub(crate) struct Parent {
    images: HashMap<ImageId, Image>,
}

#[derive(Debug, Default)]
struct Image {
    /// By their first address; none overlap.
    stretches: BTreeMap<u64, Stretch>,
    pages: Vec<(Slot, PageDigest)>,
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// The place of the first one in the image's pages.
    place: usize,
    count: usize,
}

impl Parent {
    /// Whether no round has seen anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Whether anything of an image was seen.
    pub(crate) fn has(&self, id: ImageId) -> bool {
        self.images.contains_key(&id)
    }

    /// Adds the pages that lie at an address and behind it.
    pub(crate) fn add(&mut self, id: ImageId, address: u64, pages: &[(Slot, PageDigest)]) {
        let image = self.images.entry(id).or_default();
        let place = image.pages.len();
        image.pages.extend_from_slice(pages);
        if let Some(mut last) = image.stretches.last_entry()
            && last.get().place + last.get().count == place
            && last.key() + (last.get().count * PAGE_BYTES) as u64 == address
        {
            last.get_mut().count += pages.len();
            return;
        }
        let count = pages.len();
        image.stretches.insert(address, Stretch { place, count });
    }

    /// The pages of a region that CRIU leaves out, in order; `None` when it does not.
    ///
    /// # Errors
    /// [`MemoryError::Parent`] when one of them was not seen.
    pub(crate) fn left_out(
        &self,
        id: ImageId,
        region: Region,
    ) -> Result<Option<Vec<(Slot, PageDigest)>>, MemoryError> {
        if region.flags & FLAG_PARENT == 0 {
            return Ok(None);
        }
        self.pages(id, region).map(Some)
    }

    fn pages(&self, id: ImageId, region: Region) -> Result<Vec<(Slot, PageDigest)>, MemoryError> {
        let image = self.images.get(&id).ok_or(MemoryError::Parent)?;
        let mut found = Vec::new();
        while found.len() < region.pages as usize {
            let at = region.address + (found.len() * PAGE_BYTES) as u64;
            let below = image.stretches.range(..=at).next_back();
            let (start, stretch) = below.ok_or(MemoryError::Parent)?;
            let skipped = ((at - start) / PAGE_BYTES as u64) as usize;
            if skipped >= stretch.count {
                return Err(MemoryError::Parent);
            }
            let count = (stretch.count - skipped).min(region.pages as usize - found.len());
            found.extend_from_slice(&image.pages[stretch.place + skipped..][..count]);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ImageId = ImageId::Process(1);

    fn pages(slots: std::ops::Range<Slot>) -> Vec<(Slot, PageDigest)> {
        slots
            .map(|slot| (slot, PageDigest([slot as u8; 16])))
            .collect()
    }

    fn region(first: u64, pages: u32) -> Region {
        Region {
            address: first * PAGE_BYTES as u64,
            pages,
            flags: 0,
        }
    }

    #[test]
    fn a_region_is_found_across_the_pieces_it_was_seen_in() {
        let mut parent = Parent::default();
        let at = |page: u64| page * PAGE_BYTES as u64;
        parent.add(ID, at(20), &pages(5..8));
        parent.add(ID, at(10), &pages(1..3));
        parent.add(ID, at(12), &pages(3..5));
        assert_eq!(parent.pages(ID, region(11, 3)).unwrap(), pages(2..5));
        assert_eq!(parent.pages(ID, region(21, 2)).unwrap(), pages(6..8));
        for beyond in [region(9, 1), region(11, 4), region(14, 1), region(22, 2)] {
            let refused = parent.pages(ID, beyond);
            assert!(matches!(refused, Err(MemoryError::Parent)), "{beyond:?}");
        }
        let stranger = ImageId::Shared(1);
        assert!(parent.has(ID) && !parent.has(stranger));
        assert!(parent.pages(stranger, region(10, 1)).is_err());
    }
}
