//! Content-defined cuts: a file is cut into pieces where its content says, so that bytes that are inserted or removed
//! change the pieces they are in, and no other.
//!
//! The cuts are FastCDC's (Xia et al., USENIX ATC 2016): pieces of 8 KiB on average. They are made only of files that
//! were written anew; what is hashed and compared in the end are blocks at their places all the same.

use std::os::fd::OwnedFd;

use fastcdc::v2020::FastCDC;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::blocks;

const PIECE_BYTES_MIN: usize = 2 << 10;
const PIECE_BYTES: usize = 8 << 10;
/// The longest piece.
const PIECE_BYTES_MAX: usize = 32 << 10;
/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 20;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cut {
    pub(crate) length: u32,
    pub(crate) mark: Mark,
}

impl Cut {
    /// The one that a piece ends with.
    pub(crate) fn of(piece: &[u8]) -> Self {
        Self {
            // At most PIECE_BYTES_MAX.
            length: piece.len() as u32,
            mark: Mark::of(piece),
        }
    }
}

/// The beginning of a piece's digest. Two pieces may have the same one: whoever takes one for another finds out by the
/// digests of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Mark([u8; 8]);

impl Mark {
    /// The mark of a piece.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut mark = [0; 8];
        mark.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
        Self(mark)
    }
}

/// Cuts a stream of bytes. The same bytes are cut at the same places, however they are handed over.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    pending: Vec<u8>,
}

impl Cutter {
    /// Takes bytes, and gives the pieces that are complete.
    pub(crate) fn push(&mut self, bytes: &[u8], piece: impl FnMut(&[u8])) {
        self.pending.extend_from_slice(bytes);
        // With fewer bytes than the longest piece has, the next cut may depend on what comes.
        self.cut(PIECE_BYTES_MAX, piece);
    }

    /// Gives what is left: the stream ends here, or begins anew.
    pub(crate) fn finish(&mut self, piece: impl FnMut(&[u8])) {
        self.cut(1, piece);
    }

    fn cut(&mut self, least: usize, mut piece: impl FnMut(&[u8])) {
        let cuts = FastCDC::new(&self.pending, PIECE_BYTES_MIN, PIECE_BYTES, PIECE_BYTES_MAX);
        let mut at = 0;
        while self.pending.len() - at >= least {
            let (_, end) = cuts.cut(at, self.pending.len() - at);
            piece(&self.pending[at..end]);
            at = end;
        }
        self.pending.drain(..at);
    }
}

/// Cuts a file.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn of_file(file: &OwnedFd) -> Result<Vec<Cut>, Errno> {
    let (mut cutter, mut cuts) = (Cutter::default(), Vec::new());
    let mut add = |piece: &[u8]| cuts.push(Cut::of(piece));
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    loop {
        let count = blocks::read_at(file, &mut buffer, at)?;
        cutter.push(&buffer[..count], &mut add);
        at += count as u64;
        if count < buffer.len() {
            break;
        }
    }
    cutter.finish(&mut add);
    Ok(cuts)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut noise = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    /// The pieces of some bytes that are handed over so many at a time.
    fn pieces(bytes: &[u8], at_once: usize) -> Vec<Vec<u8>> {
        let (mut cutter, mut pieces) = (Cutter::default(), Vec::new());
        let mut add = |piece: &[u8]| pieces.push(piece.to_vec());
        for some in bytes.chunks(at_once) {
            cutter.push(some, &mut add);
        }
        cutter.finish(&mut add);
        pieces
    }

    #[test]
    fn bytes_that_are_inserted_or_removed_change_the_pieces_they_are_in() {
        let old = noise(1 << 20);
        let known: HashSet<Vec<u8>> = pieces(&old, 1 << 20).into_iter().collect();
        for (at, removed, inserted) in
            [(0, 0, "x"), (500_000, 0, "a line more\n"), (700_123, 9, "")]
        {
            let mut new = old.clone();
            new.splice(at..at + removed, inserted.bytes());
            let new = pieces(&new, 16 << 10);
            let unknown = new.iter().filter(|piece| !known.contains(*piece)).count();
            assert!(
                new.len() > 60 && unknown <= 4,
                "{unknown} of {} at {at}",
                new.len()
            );
        }
    }

    #[test]
    fn a_file_is_cut_as_its_bytes_are() {
        use std::io::Write;
        let bytes = noise((2 << 20) + 77);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let expected: Vec<Cut> = pieces(&bytes, 5000)
            .iter()
            .map(|piece| Cut::of(piece))
            .collect();
        assert_eq!(of_file(&file.into()).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn pieces_are_all_of_the_bytes_wherever_these_were_divided(
            bytes in proptest::collection::vec(any::<u8>(), 0..100_000),
            at_once in 1_usize..70_000,
        ) {
            let cut = pieces(&bytes, at_once);
            prop_assert_eq!(&cut, &pieces(&bytes, bytes.len().max(1)));
            prop_assert!(cut.iter().all(|piece| (1..=PIECE_BYTES_MAX).contains(&piece.len())));
            prop_assert_eq!(cut.concat(), bytes);
        }
    }
}
