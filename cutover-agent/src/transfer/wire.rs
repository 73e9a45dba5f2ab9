//! What the two ends of a transfer say to each other. Bytes of files are never in here: they follow a [`DataHead`].

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::TreeName;
use crate::files::blocks::Digest;
use crate::files::manifest::ManifestError;
use crate::files::{FilesError, manifest};

/// The most bytes a packed list may unpack to: 4 million digests and their entries.
pub(crate) const LIST_BYTES_MAX: usize = 256 << 20;
/// The most bytes of file data in one frame.
pub(crate) const DATA_BYTES_MAX: usize = 1 << 20;
/// The most blocks in a woven or patched piece: it is put together in memory.
pub(crate) const WOVEN_BLOCKS_MAX: usize = 16;
/// The most files of a round that are written anew beside their old content, which stays open until the round's end.
pub(crate) const REPLACED_MAX: usize = 256;

/// What the source asks for. The answer to `Begin` comes when the whole round is over.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    Have {
        tree: TreeName,
    },
    /// Which other files the target has of these sizes (sorted, a packed `Vec<u64>`). They are for the next round of this
    /// tree.
    Seeds {
        tree: TreeName,
        sizes: Packed,
    },
    /// What files of the tree, by their places in its list, are cut into (a packed `Vec<u32>`).
    Cuts {
        tree: TreeName,
        files: Packed,
    },
    /// `replaced` are files of the base, by their places there, that are written anew. Their old content can be read
    /// until the round's end.
    Begin {
        round: u64,
        tree: TreeName,
        base: Base,
        steps: Packed,
        replaced: Vec<u32>,
        is_durable: bool,
    },
    /// `repeats` is a packed `Vec<Repeat>`.
    Seal {
        round: u64,
        frames: u64,
        root: Digest,
        repeats: Packed,
    },
    Abandon {
        round: u64,
    },
    Forget {
        tree: TreeName,
    },
    Drop {
        tree: TreeName,
    },
    Space {
        tree: TreeName,
    },
    Size {
        tree: TreeName,
    },
    Measure {
        round: u64,
        frames: u64,
    },
}

/// What a round builds on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Base {
    /// The tree whose root hash this is; both ends know it.
    Known(Digest),
    /// Nothing: whatever is there is removed first.
    Empty,
}

/// What the target answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Have {
        list: Packed,
        root: Digest,
        has_seeds: bool,
    },
    /// A packed `Vec<Vec<Digest>>`, one of each seed.
    Seeds(Packed),
    /// A packed `Vec<Vec<Cut>>`, one of each file; none of a file that cannot be written anew beside its old content.
    Cuts(Packed),
    Done,
    Space(Space),
    Size {
        bytes: u64,
        entries: u64,
    },
    Failed(Fault),
}

/// Room in the file system under a tree at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes that can still be written by us.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Files that can still be made; 0 where the file system has no such limit.
    pub free_files: u64,
}

/// Why the target did not do it. What the tree holds after a failed round is known to nobody: the next round asks.
#[derive(Debug, Clone, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The target's configuration has no such tree.
    #[error("the target knows no tree {0}: name it in the target's configuration")]
    UnknownTree(TreeName),
    /// Another round of the same tree is under way.
    #[error("tree {0} is being written already: wait for that round to end")]
    Busy(TreeName),
    /// The target does not have what the source believed it has.
    #[error("the target does not hold the round before this one of {0}")]
    StaleBase(TreeName),
    /// The target's disk is full.
    #[error("no space left at the target for {path}: free some and try again")]
    NoSpace {
        /// Which file.
        path: String,
    },
    /// The target could not read or write.
    #[error("at the target: {reason}")]
    Files {
        /// Its own sentence.
        reason: String,
    },
    /// The list of files breaks a rule.
    #[error("the target refused the list of files: {reason}")]
    Refused {
        /// Its own sentence.
        reason: String,
    },
    /// A block does not have the digest it was sent with.
    #[error("bytes of {path} were damaged on the way: try again")]
    Damaged {
        /// Which file.
        path: String,
    },
    /// All frames arrived, yet the target's tree is not the source's.
    #[error("tree {0} at the target is not what the source sealed: try again")]
    NotSealed(TreeName),
    /// The source gave the round up.
    #[error("the round was given up")]
    Abandoned,
    /// The request could not be understood.
    #[error("the target does not understand the request: both agents must be of the same version")]
    Garbled,
}

impl From<FilesError> for Fault {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::NoSpace { path } => Self::NoSpace {
                path: path.display().to_string(),
            },
            FilesError::Manifest(error) => error.into(),
            FilesError::Cancelled => Self::Abandoned,
            other => Self::Files {
                reason: other.to_string(),
            },
        }
    }
}

impl From<ManifestError> for Fault {
    fn from(error: ManifestError) -> Self {
        Self::Refused {
            reason: error.to_string(),
        }
    }
}

/// The head of a data frame; the pieces' bytes follow, one after the other, in `codec`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DataHead {
    pub(crate) round: u64,
    pub(crate) codec: Codec,
    /// The digest over the digests of the blocks that follow: the receiver hashes these anyway, and one for each would be
    /// a tenth of a frame of small files.
    pub(crate) digest: Digest,
    pub(crate) pieces: Vec<Piece>,
}

/// How the bytes of a frame are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Codec {
    Plain,
    Zstd {
        bytes: u32,
    },
    Lz4 {
        bytes: u32,
    },
    /// With what was in the round's frames before it, of which it is the one of this number, from 0.
    Linked {
        bytes: u32,
        number: u64,
    },
}

/// Consecutive blocks of one file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub(crate) entry: u32,
    pub(crate) first: u32,
    pub(crate) blocks: Blocks,
}

/// What is in them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Blocks {
    Data(u32),
    Zeros(u32),
    /// Blocks of which the target has most in their places: which sub-blocks differ, a bit each, for each block. These follow
    /// the head. `digest` is that over the digest before, at first [`Digest::UNKNOWN`], and the block's, block by block.
    Patched {
        changed: Vec<u32>,
        digest: Digest,
    },
    /// Consecutive blocks of a file of the round's base, by its place there. The file is not part of the new tree, so
    /// it stays as it is until the seal. A place behind the base's last is that of a seed.
    Moved {
        from: u32,
        at: u32,
        digests: Vec<Digest>,
    },
    /// Bytes of the old content of a file that is written anew, and new ones, which follow the head. `digest` is that over
    /// the digests of the blocks they make.
    Woven {
        from: u32,
        blocks: u32,
        parts: Vec<Part>,
        digest: Digest,
    },
}

/// Consecutive blocks of the new tree, whole ones, that are equal to others of it. These came in frames, or are what they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Repeat {
    pub(crate) entry: u32,
    pub(crate) first: u32,
    /// The entry that has them, too, and which block of it is the first.
    pub(crate) from: u32,
    pub(crate) at: u32,
    pub(crate) count: u32,
}

/// What some bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Part {
    /// Those that were at this place of the old file.
    Old { at: u64, length: u32 },
    /// So many that were not there.
    New(u32),
}

impl Part {
    /// How many.
    pub(crate) fn length(&self) -> u32 {
        match self {
            Self::Old { length, .. } | Self::New(length) => *length,
        }
    }

    /// At most so many of them from the front, and what is left.
    pub(crate) fn split(self, most: u32) -> (Self, Option<Self>) {
        if self.length() <= most {
            return (self, None);
        }
        let left = self.length() - most;
        match self {
            Self::New(_) => (Self::New(most), Some(Self::New(left))),
            Self::Old { at, .. } => {
                let rest = Self::Old {
                    at: at + u64::from(most),
                    length: left,
                };
                (Self::Old { at, length: most }, Some(rest))
            }
        }
    }
}

impl Blocks {
    /// How many.
    pub(crate) fn count(&self) -> u64 {
        match self {
            Self::Moved { digests, .. } => digests.len() as u64,
            Self::Patched { changed, .. } => changed.len() as u64,
            Self::Data(count) | Self::Zeros(count) | Self::Woven { blocks: count, .. } => {
                u64::from(*count)
            }
        }
    }
}

/// A value that takes no more is not packed: making zstd's tables would take longer than sending it.
const SMALL_BYTES: usize = 4 << 10;

/// A postcard value under zstd, with its true length; as it is when it is no shorter so.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Packed {
    bytes: u32,
    packed: Vec<u8>,
}

impl Packed {
    /// Packs a value.
    ///
    /// # Errors
    /// When it exceeds [`LIST_BYTES_MAX`].
    pub(crate) fn of<T: Serialize>(value: &T) -> Result<Self, ManifestError> {
        let plain = postcard::to_stdvec(value).map_err(|_| ManifestError::Garbled)?;
        if plain.len() > LIST_BYTES_MAX {
            return Err(ManifestError::TooLarge);
        }
        let bytes = plain.len() as u32;
        let packed = match plain.len() {
            ..=SMALL_BYTES => plain,
            length => zstd::bulk::compress(&plain, 1)
                .ok()
                .filter(|packed| packed.len() < length)
                .unwrap_or(plain),
        };
        Ok(Self { bytes, packed })
    }

    /// Bytes it takes on the wire.
    pub(crate) fn length(&self) -> u64 {
        self.packed.len() as u64
    }

    /// Unpacks it, trusting no length.
    ///
    /// # Errors
    /// When it is not what was packed, or too long.
    pub(crate) fn open<T: serde::de::DeserializeOwned>(&self) -> Result<T, ManifestError> {
        let bytes = self.bytes as usize;
        if bytes > LIST_BYTES_MAX {
            return Err(ManifestError::TooLarge);
        }
        let unpacked;
        let plain = if self.packed.len() == bytes {
            &self.packed
        } else {
            unpacked =
                zstd::bulk::decompress(&self.packed, bytes).map_err(|_| ManifestError::Garbled)?;
            &unpacked
        };
        postcard::from_bytes(plain).map_err(|_| ManifestError::Garbled)
    }
}

/// A whole manifest as the target tells it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Listing {
    pub(crate) entries: Vec<Arc<manifest::Entry>>,
    pub(crate) digests: Vec<Vec<Digest>>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_of_any_length_open_as_they_were_and_only_long_ones_are_packed() {
        let mut noise = vec![0; 2 * SMALL_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let lists = [Vec::new(), vec![7; 100], vec![7; 2 * SMALL_BYTES], noise];
        for (list, is_packed) in lists.into_iter().zip([false, false, true, false]) {
            let packed = Packed::of(&list).unwrap();
            assert_eq!(packed.length() < u64::from(packed.bytes), is_packed);
            assert_eq!(packed.open::<Vec<u8>>().unwrap(), list);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_any_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = postcard::from_bytes::<Ask>(&bytes);
            let _ = postcard::from_bytes::<Answer>(&bytes);
            let _ = postcard::from_bytes::<DataHead>(&bytes);
            let packed = Packed { bytes: 1 << 10, packed: bytes };
            prop_assert!(packed.open::<Listing>().is_err() || packed.bytes == 1 << 10);
        }
    }
}
