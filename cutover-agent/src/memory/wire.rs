//! What the two ends say to each other about pages. Bytes of pages are never in here: they follow a [`PagesHead`].

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::digest::{DigestKey, PAGE_BYTES};
use super::runs::{Run, Slot};
use crate::transfer::Codec;

/// Pages in one frame at most: 1 MiB.
pub(crate) const FRAME_PAGES_MAX: usize = 256;

/// Bytes of pages in one frame at most.
pub(crate) const FRAME_DATA_MAX: usize = FRAME_PAGES_MAX * PAGE_BYTES;

/// Images of one container at most: processes and shared memories.
pub(crate) const IMAGES_MAX: usize = 1 << 16;

/// What the source asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum PageAsk {
    /// A hop begins: forget every page, and know pages by this key.
    Open { key: DigestKey },
    /// Answered when every slot below this one has arrived.
    Settle { end: Slot },
    /// Answered when these slots have arrived, whatever others have not.
    Await { runs: Vec<Run> },
    /// Which of these frames, given by their slots, have not arrived whole; for a session that was taken up again.
    Missing { frames: Vec<Vec<Run>> },
    /// A part of an image; never answered.
    Piece(Piece),
    /// A round was told; answered when the images are as it saw them.
    Drafted(Draft),
    /// The dump of a container is complete; answered when its images are.
    Seal(Seal),
}

/// Consecutive pages of one image of one container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub(crate) container: String,
    /// The round that saw them so; the dump has the number behind the last one's.
    pub(crate) round: u32,
    /// Counted from 1, in the order CRIU opened them.
    pub(crate) image: u32,
    /// The page it begins with.
    pub(crate) first: u32,
    pub(crate) runs: Vec<Run>,
}

/// A container's page images as a round saw them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Draft {
    pub(crate) container: String,
    pub(crate) round: u32,
    /// How many pieces were sent.
    pub(crate) pieces: u32,
}

/// Everything about a container's page images but their pages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seal {
    pub(crate) container: String,
    pub(crate) round: u32,
    /// How many pieces were sent.
    pub(crate) pieces: u32,
    pub(crate) images: Vec<ImageHead>,
    /// One hash over all of it; see [`super::layout::Root`].
    pub(crate) root: [u8; 32],
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageHead {
    pub(crate) id: ImageId,
    pub(crate) pages: u32,
    pub(crate) regions: Vec<Region>,
}

/// Whose memory an image holds, by CRIU's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ImageId {
    /// Private memory of a process, by its number in its own namespace.
    Process(u64),
    /// A shared memory.
    Shared(u64),
}

/// Consecutive pages of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// The first address.
    pub address: u64,
    /// How many pages.
    pub pages: u32,
    /// CRIU's flags of a pagemap entry.
    pub flags: u32,
}

/// What the target answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum PageAnswer {
    Done,
    /// Positions of the frames that were asked about.
    Missing(Vec<u32>),
    Failed(PageFault),
}

/// Why the target did not do it.
#[derive(Debug, Clone, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageFault {
    /// Pages before a key.
    #[error("the target keeps no pages yet: it was restarted meanwhile; hop again")]
    NotOpen,
    /// The target's disk is full, or the store has reached its bound.
    #[error("no room for pages of memory in {path} at the target: free some and try again")]
    NoRoom {
        /// Where.
        path: String,
    },
    /// The target could not write.
    #[error("at the target: cannot write {path}: {reason}")]
    Write {
        /// Which file.
        path: String,
        /// The system's reason.
        reason: String,
    },
    /// A page does not have the digest it was sent with.
    #[error("a page of memory was damaged on the way: try again")]
    Damaged,
    /// All arrived, yet the images are not what the source dumped.
    #[error("the memory of {0} at the target is not what the source dumped: try again")]
    NotSealed(String),
    /// The request could not be understood.
    #[error(
        "the target does not understand a request about pages: both agents must be of the same version"
    )]
    Garbled,
}

/// The head of a frame of pages; their bytes follow in order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PagesHead {
    /// The slots, as many as pages, never [`super::runs::ZERO`].
    pub(crate) runs: Vec<Run>,
    /// Their digests, one after the other.
    pub(crate) digests: Vec<u8>,
    pub(crate) codec: Codec,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_any_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = postcard::from_bytes::<PageAsk>(&bytes);
            let _ = postcard::from_bytes::<PageAnswer>(&bytes);
            let _ = postcard::from_bytes::<PagesHead>(&bytes);
        }
    }
}
