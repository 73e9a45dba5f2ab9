//! Of what blocks of databases consist, in short: where a row has changed, the bytes around it cross and not its whole block.
//!
//! The target has the block as it was, and only the source knows what it is now. It remembers a hash of each sub-block of
//! blocks that it has sent or compared, and sends those sub-blocks whose hash is another one. Two may have the same one:
//! whoever took one for another finds out by the digest of the block that comes of it.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use twox_hash::XxHash3_64;

use crate::files::blocks::{BLOCK_BYTES, Digest};

/// Bytes in a sub-block: a row of a table with its neighbours, and the head and the end of its page.
pub(super) const SUBBLOCK_BYTES: usize = 512;
/// Sub-blocks in a block, a bit each.
const SUBBLOCKS: usize = BLOCK_BYTES / SUBBLOCK_BYTES;
const _: () = assert!(SUBBLOCKS == u32::BITS as usize);
/// With more of them changed, the whole block is as good.
const CHANGED_MAX: u32 = 24;
/// Blocks that are remembered: 3.5 GiB of files. The table takes about 36 MiB then, half as much again while it grows.
const BLOCKS_MAX: usize = 7 << 15;
/// Blocks that are remembered although they were never seen to change: who changed once will change again.
const UNCHANGED_MAX: usize = BLOCKS_MAX / 2;

/// The hashes of a block's sub-blocks: XXH3, as the specification of xxHash has it, cut to 32 bits.
type Fingerprint = [u32; SUBBLOCKS];

/// What is remembered of blocks.
#[derive(Debug, Default)]
pub(super) struct Fingerprints(Mutex<Known>);

/// By the beginnings of the blocks' digests.
#[derive(Debug, Default)]
struct Known {
    blocks: HashMap<u64, Fingerprint>,
    /// Those that others have taken the place of, unless their round fails.
    replaced: HashSet<u64>,
}

impl Fingerprints {
    /// Remembers a block in the place of the one that the target has there, `before`. Says which sub-blocks differ, the first
    /// one's bit being the lowest, if that is known and most of the block is as it was.
    pub(super) fn replace(
        &self,
        before: Option<&Digest>,
        digest: &Digest,
        block: &[u8],
    ) -> Option<u32> {
        if block.len() != BLOCK_BYTES || self.lock().is_same(before, digest) {
            return None;
        }
        let now = fingerprint(block);
        let before = before.filter(|before| *before != digest).map(key);
        let old = self.lock().replace(before, key(digest), now)?;
        let changed = changed(&old, &now);
        (1..=CHANGED_MAX)
            .contains(&changed.count_ones())
            .then_some(changed)
    }

    /// Forgets blocks that were replaced: a round is sealed, and the target has the new ones.
    pub(super) fn forget_replaced(&self) {
        let mut known = self.lock();
        for replaced in std::mem::take(&mut known.replaced) {
            known.blocks.remove(&replaced);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Whether the target has this block in its place, and it is remembered.
    fn is_same(&mut self, before: Option<&Digest>, digest: &Digest) -> bool {
        let is_same = before == Some(digest) && self.blocks.contains_key(&key(digest));
        if is_same {
            self.replaced.remove(&key(digest));
        }
        is_same
    }

    /// Remembers a block, if there is room, and gives what is remembered of the one before.
    fn replace(
        &mut self,
        before: Option<u64>,
        block: u64,
        now: Fingerprint,
    ) -> Option<Fingerprint> {
        let is_full = self.blocks.len() >= BLOCKS_MAX;
        let old = before.and_then(|before| {
            if is_full {
                return self.blocks.remove(&before);
            }
            let old = self.blocks.get(&before).copied()?;
            self.replaced.insert(before);
            Some(old)
        });
        let most = before.map_or(UNCHANGED_MAX, |_| BLOCKS_MAX);
        if self.blocks.len() < most {
            self.blocks.insert(block, now);
            self.replaced.remove(&block);
        }
        old
    }
}

fn key(digest: &Digest) -> u64 {
    let mut key = [0; 8];
    key.copy_from_slice(&digest.0[..8]);
    u64::from_le_bytes(key)
}

fn fingerprint(block: &[u8]) -> Fingerprint {
    let mut hashes = block.chunks(SUBBLOCK_BYTES).map(XxHash3_64::oneshot);
    // A block has as many of them; cut off on purpose.
    std::array::from_fn(|_| hashes.next().unwrap_or_default() as u32)
}

fn changed(old: &Fingerprint, now: &Fingerprint) -> u32 {
    let differs = old.iter().zip(now).map(|(old, now)| old != now);
    differs.enumerate().fold(0, |changed, (at, differs)| {
        changed | u32::from(differs) << at
    })
}

/// The sub-blocks of a block that `changed` speaks of.
pub(super) fn subblocks(changed: u32, block: &[u8]) -> impl Iterator<Item = &[u8]> {
    let chunks = block.chunks(SUBBLOCK_BYTES).enumerate();
    chunks
        .filter(move |(at, _)| changed >> at & 1 == 1)
        .map(|(_, bytes)| bytes)
}

/// How many bytes they are in all of these blocks.
pub(super) fn patch_bytes(changed: &[u32]) -> usize {
    let subblocks: u32 = changed.iter().map(|changed| changed.count_ones()).sum();
    subblocks as usize * SUBBLOCK_BYTES
}

/// Puts sub-blocks in their places in a block, and gives the bytes that belong to the next one; `None` when there are too
/// few.
pub(super) fn patch<'a>(block: &mut [u8], changed: u32, mut new: &'a [u8]) -> Option<&'a [u8]> {
    let chunks = block.chunks_mut(SUBBLOCK_BYTES).enumerate();
    for (_, place) in chunks.filter(|(at, _)| changed >> at & 1 == 1) {
        let bytes;
        (bytes, new) = new.split_at_checked(place.len())?;
        place.copy_from_slice(bytes);
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        let mut noise = vec![0; BLOCK_BYTES];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.finalize_xof().fill(&mut noise);
        noise
    }

    #[test]
    fn only_a_block_that_is_remembered_and_mostly_as_it_was_can_be_patched() {
        let known = Fingerprints::default();
        let (old, other) = (noise(1), noise(2));
        let mut new = old.clone();
        new[SUBBLOCK_BYTES - 1] ^= 1;
        new[BLOCK_BYTES - 1] ^= 1;
        let [before, after, else_] = [&old, &new, &other].map(|block| Digest::of(block));
        assert_eq!(known.replace(Some(&before), &after, &new), None, "unknown");
        assert_eq!(known.replace(None, &before, &old), None, "the first");
        assert_eq!(known.replace(Some(&before), &before, &old), None, "same");
        let changed = known.replace(Some(&before), &after, &new);
        assert_eq!(changed, Some(1 << 31 | 1));
        let parts: Vec<u8> = subblocks(1 << 31 | 1, &new).flatten().copied().collect();
        assert_eq!(parts.len(), patch_bytes(&[1 << 31 | 1]));
        let (mut block, left) = (old.clone(), [&parts[..], b"next"].concat());
        assert_eq!(patch(&mut block, 1 << 31 | 1, &left), Some(&b"next"[..]));
        assert!(block == new);
        assert_eq!(patch(&mut block, 7, &parts), None, "too few bytes");
        assert_eq!(known.replace(Some(&after), &else_, &other), None, "all new");
        let short = &old[1..];
        let last = Digest::of(short);
        assert_eq!(known.replace(Some(&else_), &last, short), None, "the last");
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered_and_room_for_what_changes() {
        let known = Fingerprints::default();
        let digest = |number: usize| Digest::of(&number.to_le_bytes());
        let fill = |numbers: std::ops::Range<usize>| {
            let blocks = numbers.map(|number| (key(&digest(number)), [0; SUBBLOCKS]));
            known.lock().blocks.extend(blocks);
        };
        let length = || known.lock().blocks.len();
        fill(0..UNCHANGED_MAX);
        let (block, mut changed) = (noise(1), noise(1));
        changed[0] ^= 1;
        let [before, after] = [&block, &changed].map(|block| Digest::of(block));
        known.replace(None, &before, &block);
        assert_eq!(length(), UNCHANGED_MAX);
        known.replace(Some(&after), &before, &block);
        assert_eq!(length(), UNCHANGED_MAX + 1);
        fill(UNCHANGED_MAX..BLOCKS_MAX - 1);
        assert_eq!(known.replace(Some(&before), &after, &changed), Some(1));
        assert_eq!(length(), BLOCKS_MAX);
        // The one before makes room at once.
        assert_eq!(known.replace(Some(&after), &before, &block), Some(1));
        assert_eq!(length(), BLOCKS_MAX);
    }

    #[test]
    fn a_block_whose_round_fails_is_patched_again_and_one_that_arrived_is_forgotten() {
        let known = Fingerprints::default();
        let versions: Vec<Vec<u8>> = (0..3)
            .map(|version| [vec![version; 600], noise(1)[600..].to_vec()].concat())
            .collect();
        let digests: Vec<Digest> = versions.iter().map(|block| Digest::of(block)).collect();
        let replace = |before: usize, now: usize| {
            known.replace(Some(&digests[before]), &digests[now], &versions[now])
        };
        known.replace(None, &digests[0], &versions[0]);
        assert_eq!(replace(0, 1), Some(0b11));
        assert_eq!(replace(0, 1), Some(0b11), "the round failed");
        assert_eq!(replace(0, 2), Some(0b11));
        known.forget_replaced();
        assert_eq!(replace(0, 1), None);
        assert_eq!(replace(2, 1), Some(0b11));
        // It is what it was again before the round was sealed.
        assert_eq!(replace(2, 2), None);
        known.forget_replaced();
        assert_eq!(replace(2, 0), Some(0b11));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_is_patched_is_the_new_block(
            edits in proptest::collection::vec((0..BLOCK_BYTES, 0..2000_usize, any::<u8>()), 1..5),
        ) {
            let old = noise(1);
            let mut new = old.clone();
            for (at, length, fill) in edits {
                let end = (at + length).min(BLOCK_BYTES);
                new[at..end].fill(fill);
            }
            let changed = changed(&fingerprint(&old), &fingerprint(&new));
            let parts: Vec<u8> = subblocks(changed, &new).flatten().copied().collect();
            let mut block = old.clone();
            prop_assert_eq!(patch(&mut block, changed, &parts), Some(&b""[..]));
            prop_assert!(block == new);
        }
    }
}
