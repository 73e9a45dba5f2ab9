//! Which files of a round are written anew at the target, from pieces of what they were.
//!
//! Blocks at their places are what a database changes, and enough for a log that grows. Of a file that a new version has
//! taken the place of, or into which bytes were inserted, nearly no block is what it was, and yet most of its pieces are.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use cutover_protocol::pattern::NamePattern;
use rustix::fs::OFlags;

use super::Writers;
use super::wire::REPLACED_MAX;
use crate::files::blocks::{self, BLOCK_BYTES, Digest};
use crate::files::manifest::{self, Manifest, Pairing};
use crate::files::walk::Walked;
use crate::files::{Kind, Root};

/// Files of fewer bytes are sent by blocks.
const FILE_BYTES_MIN: u64 = 64 << 10;
/// Bytes of all of them: the target reads as many, and tells of about a thousandth.
const BYTES_MAX: u64 = 2 << 30;
/// With fewer bytes the question would cost more time than sending them, while everybody waits.
const FROZEN_BYTES_MIN: u64 = 1 << 20;
/// Blocks that are compared to find out whether a file keeps its bytes in their places.
const SAMPLES: usize = 16;
/// One in so many may have changed.
const CHANGED_ONE_IN: usize = 4;

/// A file that was written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Replaced {
    /// Its place in the tree as it is.
    pub(super) entry: usize,
    /// Its place in what the target has.
    pub(super) old: u32,
}

/// Finds them among the files that are to be read.
pub(super) fn find(
    (root, walked): (&Root, &Walked),
    (has, pairs): (&Manifest, &Pairing),
    wanted: &[usize],
    in_place: &[NamePattern],
    writers: &Writers,
) -> Vec<Replaced> {
    let linked = linked(has, walked);
    let (mut found, mut bytes) = (Vec::new(), 0);
    for &entry in wanted {
        let file = &walked.entries[entry];
        let Some(old) = pairs.old_of(entry) else {
            continue;
        };
        let (known, size) = (&has.entries[old], file.size());
        let is_large = matches!(known.kind, Kind::File { size } if size >= FILE_BYTES_MIN)
            && size >= FILE_BYTES_MIN;
        if !is_large
            || manifest::is_same(known, file)
            || in_place.iter().any(|pattern| pattern.fits(&file.path))
            || linked.contains(file.path.as_slice())
            || bytes + known.size() > BYTES_MAX
            || !has_moved_about(root, &file.path, size, &has.digests[old])
        {
            continue;
        }
        bytes += known.size();
        // A tree has fewer than u32::MAX entries.
        let old = old as u32;
        found.push(Replaced { entry, old });
        if found.len() == REPLACED_MAX {
            break;
        }
    }
    if *writers == Writers::Frozen && bytes < FROZEN_BYTES_MIN {
        found.clear();
    }
    found
}

/// Files that have further names: these would go on naming the old content.
fn linked<'a>(has: &'a Manifest, walked: &'a Walked) -> HashSet<&'a [u8]> {
    let entries = has.entries.iter().chain(&walked.entries);
    let links = entries.filter_map(|entry| match &entry.kind {
        Kind::HardLink { to } => Some(to.as_slice()),
        _ => None,
    });
    links.collect()
}

/// Compares a few blocks of a file with what the target has in their places. One that cannot be read has not.
fn has_moved_about(root: &Root, path: &[u8], size: u64, known: &[Digest]) -> bool {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let Ok(file) = root.open_beneath(path, flags, 0) else {
        return false;
    };
    let zeros = Digest::of_zeros(BLOCK_BYTES);
    let common = (0..blocks::count(size)).zip(known);
    // Holes say nothing.
    let data: Vec<_> = common.filter(|(_, known)| **known != zeros).collect();
    let samples = SAMPLES.min(data.len());
    let is_changed = |(index, known): &(u64, &Digest)| {
        let found = digest(&file, *index, blocks::length(size, *index));
        found.is_some_and(|found| found != **known)
    };
    let places = (0..samples).map(|sample| data[place(sample, samples, data.len())]);
    samples > 0 && places.filter(is_changed).count() * CHANGED_ONE_IN >= samples
}

/// Where in `length` the sample is taken: in its share of it, and nowhere regular in that. Records of some length may all have
/// changed at their beginnings.
fn place(sample: usize, samples: usize, length: usize) -> usize {
    let (start, end) = (sample * length / samples, (sample + 1) * length / samples);
    // Multiples of the golden ratio's fraction, which are spread evenly (Knuth, TAOCP 3, 6.4).
    let spread = (sample as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    // Less than the share.
    start + ((spread * (end - start) as u64) >> 32) as usize
}

fn digest(file: &OwnedFd, index: u64, length: usize) -> Option<Digest> {
    let mut block = [0; BLOCK_BYTES];
    let start = index * BLOCK_BYTES as u64;
    let filled = blocks::read_at(file, &mut block[..length], start).ok()?;
    (filled == length).then(|| Digest::of(&block[..length]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_taken_from_everywhere_and_at_no_regular_distance() {
        for length in [16, 17, 256, 16_384, 1_000_000] {
            let places: Vec<_> = (0..16).map(|sample| place(sample, 16, length)).collect();
            assert!(places.is_sorted() && places[15] < length);
            let is_in_its_share = |(sample, place): (usize, &usize)| *place >= sample * length / 16;
            assert!(places.iter().enumerate().all(is_in_its_share));
            // Whatever the distance of what has changed, few samples hit it.
            for distance in (16..=1024).take_while(|distance| distance * 16 <= length) {
                let hits = places.iter().filter(|place| *place % distance == 0).count();
                assert!(hits * CHANGED_ONE_IN < 16, "{distance}: {hits} of {length}");
            }
        }
    }
}
