//! The source's end of a file that was written anew: of what the target's old file holds somewhere, only the place is
//! sent.

use std::collections::{HashMap, VecDeque};

use super::wire::{Blocks, Part, Piece, WOVEN_BLOCKS_MAX};
use crate::files::blocks::{BLOCK_BYTES, Digest};
use crate::files::cuts::{Cut, Cutter, Mark};

/// What the target's old file is cut into.
#[derive(Debug)]
pub(super) struct Old {
    /// Its place in the round's base.
    from: u32,
    /// Where its pieces are: first byte, and length.
    places: HashMap<Mark, (u64, u32)>,
    /// How many blocks the new file has.
    blocks: u64,
}

impl Old {
    pub(super) fn new(from: u32, cuts: &[Cut], blocks: u64) -> Self {
        let mut at = 0;
        let places = cuts.iter().map(|cut| {
            let place = (at, cut.length);
            at += u64::from(cut.length);
            (cut.mark, place)
        });
        Self {
            from,
            places: places.collect(),
            blocks,
        }
    }

    /// Whether the new file ends with this block.
    pub(super) fn ends_with(&self, index: u64) -> bool {
        index + 1 == self.blocks
    }
}

/// One file being woven: its blocks come one after the other, and leave as pieces.
#[derive(Debug, Default)]
pub(super) struct Weaver {
    cutter: Cutter,
    web: Web,
    /// Of the blocks that have come and not left.
    digests: VecDeque<Digest>,
}

/// What the next bytes consist of.
#[derive(Debug, Default)]
struct Web {
    parts: VecDeque<Part>,
    /// Bytes of the parts that are new.
    bytes: Vec<u8>,
    /// Bytes of all parts.
    length: usize,
}

impl Web {
    fn add(&mut self, piece: &[u8], old: &Old) {
        // At most PIECE_BYTES_MAX.
        let length = piece.len() as u32;
        self.length += piece.len();
        let place = old.places.get(&Mark::of(piece));
        match place.filter(|(_, known)| *known == length) {
            Some((at, _)) => match self.parts.back_mut() {
                Some(Part::Old {
                    at: from,
                    length: before,
                }) if *from + u64::from(*before) == *at => {
                    *before += length;
                }
                _ => self.parts.push_back(Part::Old { at: *at, length }),
            },
            None => {
                self.bytes.extend_from_slice(piece);
                match self.parts.back_mut() {
                    Some(Part::New(before)) => *before += length,
                    _ => self.parts.push_back(Part::New(length)),
                }
            }
        }
    }

    /// Takes so many bytes from the front.
    fn take(&mut self, length: usize) -> (Vec<Part>, Vec<u8>) {
        let (mut taken, mut left, mut new) = (Vec::new(), length as u32, 0);
        while left > 0
            && let Some(part) = self.parts.pop_front()
        {
            let (first, rest) = part.split(left);
            left -= first.length();
            if let Part::New(length) = first {
                new += length as usize;
            }
            taken.push(first);
            if let Some(rest) = rest {
                self.parts.push_front(rest);
            }
        }
        self.length -= length;
        (taken, self.bytes.drain(..new).collect())
    }
}

impl Weaver {
    /// Takes the next block, which is not all zeros.
    pub(super) fn push(&mut self, old: &Old, digest: Digest, bytes: &[u8]) {
        self.digests.push_back(digest);
        let web = &mut self.web;
        self.cutter.push(bytes, |piece| web.add(piece, old));
    }

    /// No further block comes, or not the next one.
    pub(super) fn finish(&mut self, old: &Old) {
        let web = &mut self.web;
        self.cutter.finish(|piece| web.add(piece, old));
    }

    /// The next piece of the file that is entry `entry`, whose block before `next` came last: its new bytes go with it, and
    /// digests of the blocks if it is all new. After [`Self::finish`] what is left comes too, call by call.
    pub(super) fn take(
        &mut self,
        entry: u32,
        next: u64,
        old: &Old,
        is_finished: bool,
    ) -> Option<(Piece, Vec<u8>, Vec<Digest>)> {
        let (blocks, length) = if self.web.length >= WOVEN_BLOCKS_MAX * BLOCK_BYTES {
            (WOVEN_BLOCKS_MAX, WOVEN_BLOCKS_MAX * BLOCK_BYTES)
        } else if is_finished && !self.digests.is_empty() {
            (self.digests.len(), self.web.length)
        } else {
            return None;
        };
        // A tree has fewer than u32::MAX blocks.
        let first = (next - self.digests.len() as u64) as u32;
        let digests: Vec<Digest> = self.digests.drain(..blocks).collect();
        let (parts, bytes) = self.web.take(length);
        let (blocks, digests) = if let [Part::New(_)] = parts[..] {
            (Blocks::Data(blocks as u32), digests)
        } else {
            let digest = Digest::over(&digests);
            let woven = Blocks::Woven {
                from: old.from,
                blocks: blocks as u32,
                parts,
                digest,
            };
            (woven, Vec::new())
        };
        let piece = Piece {
            entry,
            first,
            blocks,
        };
        Some((piece, bytes, digests))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::files::blocks;
    use crate::transfer::send::noise;

    fn old_of(content: &[u8], new: &[u8]) -> Old {
        let mut cuts = Vec::new();
        let mut add = |piece: &[u8]| cuts.push(Cut::of(piece));
        let mut cutter = Cutter::default();
        cutter.push(content, &mut add);
        cutter.finish(&mut add);
        Old::new(3, &cuts, blocks::count(new.len() as u64))
    }

    /// What a piece's blocks are, put together as a target does it.
    fn put_together(piece: &Piece, new: &[u8], content: &[u8]) -> Vec<u8> {
        let Blocks::Woven { from, parts, .. } = &piece.blocks else {
            return new.to_vec();
        };
        assert_eq!(*from, 3);
        let (mut left, mut woven) = (new, Vec::new());
        for part in parts {
            let bytes;
            match part {
                Part::Old { at, length } => bytes = &content[*at as usize..][..*length as usize],
                Part::New(length) => (bytes, left) = left.split_at(*length as usize),
            }
            woven.extend_from_slice(bytes);
        }
        assert!(left.is_empty());
        woven
    }

    /// Weaves all blocks, with zeros left out, and gives the file and how many bytes of it were new.
    fn woven(new: &[u8], content: &[u8]) -> (Vec<u8>, usize) {
        let (old, mut weaver) = (old_of(content, new), Weaver::default());
        let (mut file, mut sent) = (vec![0; new.len()], 0);
        for (index, block) in (0..).zip(new.chunks(BLOCK_BYTES)) {
            let is_zero = blocks::is_zero(block);
            if !is_zero {
                weaver.push(&old, Digest::of(block), block);
            }
            let is_finished = is_zero || old.ends_with(index);
            if is_finished {
                weaver.finish(&old);
            }
            let next = index + u64::from(!is_zero);
            while let Some((piece, bytes, digests)) = weaver.take(7, next, &old, is_finished) {
                let done = put_together(&piece, &bytes, content);
                let found: Vec<Digest> = done.chunks(BLOCK_BYTES).map(Digest::of).collect();
                match &piece.blocks {
                    Blocks::Woven { digest, .. } => assert_eq!(*digest, Digest::over(&found)),
                    _ => assert_eq!(digests, found),
                }
                assert_eq!((piece.entry, piece.blocks.count()), (7, found.len() as u64));
                assert!(found.len() <= WOVEN_BLOCKS_MAX);
                sent += bytes.len();
                file[piece.first as usize * BLOCK_BYTES..][..done.len()].copy_from_slice(&done);
            }
        }
        (file, sent)
    }

    #[test]
    fn a_file_of_old_bytes_in_another_order_has_few_new_ones() {
        let content = noise(1 << 20);
        let mut new = content.clone();
        new.rotate_left(300_000);
        let (file, sent) = woven(&new, &content);
        assert!(file == new && sent < 100_000, "{sent}");
        let (file, sent) = woven(&content, b"nothing of it");
        assert!(file == content && sent == content.len(), "{sent}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_is_woven_is_the_new_file_whatever_was_done_to_the_old_one(
            bytes in 0..600_000_usize,
            edits in proptest::collection::vec(
                (any::<prop::sample::Index>(), 0..70_000_usize, 0..70_000_usize, any::<u8>()), 0..6),
        ) {
            let content = noise(bytes);
            let mut new = content.clone();
            for (at, removed, inserted, fill) in edits {
                let at = at.index(new.len() + 1);
                let end = (at + removed).min(new.len());
                // Every third is zeros.
                new.splice(at..end, vec![if fill % 3 == 0 { 0 } else { fill }; inserted]);
            }
            prop_assert!(woven(&new, &content).0 == new);
        }
    }
}
