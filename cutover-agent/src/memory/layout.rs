//! Which page lies where in a container's images: kept by the source while CRIU makes a round or dumps, told to the target in
//! pieces.

use super::digest::{DIGEST_BYTES, PageDigest};
use super::runs::{Runs, Slot};
use super::wire::{Draft, ImageHead, ImageId, Piece, Region, Seal};
use super::{MemoryError, server::frames::FLAG_PRESENT};
use crate::memory::wire::IMAGES_MAX;

/// Pages in one piece at most: 4 MiB of image. The target assembles while CRIU still dumps, and the last piece is waited for.
const PIECE_PAGES: usize = 1024;

/// The hash of what the pages of a piece contain, given their digests one after the other.
pub(crate) fn hash_of_piece(digests: &[u8]) -> blake3::Hash {
    blake3::hash(digests)
}

/// One hash over all that makes a container's page images: what lies where, and what it contains.
///
/// The source hashes each piece as it tells it, the target as it puts it in its place, so that little is left to do when
/// clients wait for the last one. Equal roots mean equal memory.
#[derive(Debug, Default)]
pub(crate) struct Root {
    images: Vec<blake3::Hasher>,
}

impl Root {
    /// Adds the next piece of image `image`, counted from 1.
    pub(crate) fn add(&mut self, image: u32, piece: &blake3::Hash) {
        let image = image as usize;
        if self.images.len() < image {
            self.images.resize_with(image, blake3::Hasher::new);
        }
        if let Some(pieces) = self.images.get_mut(image.wrapping_sub(1)) {
            pieces.update(piece.as_bytes());
        }
    }

    /// The hash, with everything else about the images.
    pub(crate) fn finish(mut self, images: &[ImageHead]) -> [u8; 32] {
        self.images.resize_with(images.len(), blake3::Hasher::new);
        let mut whole = blake3::Hasher::new();
        for (head, pieces) in images.iter().zip(&self.images) {
            // Plain integers only: it cannot fail.
            whole.update(&postcard::to_stdvec(head).unwrap_or_default());
            whole.update(pieces.finalize().as_bytes());
        }
        *whole.finalize().as_bytes()
    }
}

/// The layout of one round or dump in the making.
#[derive(Debug)]
pub(crate) struct Layout {
    container: String,
    round: u32,
    images: Vec<ImageHead>,
    current: usize,
    root: Root,
    piece: Runs,
    /// Of the pages in `piece`.
    digests: Vec<u8>,
    pieces: u32,
}

impl Layout {
    /// The layout of a round, counted from 1, or of the dump behind the last one.
    pub(crate) fn new(container: &str, round: u32) -> Self {
        Self {
            container: container.to_owned(),
            round,
            images: Vec::new(),
            current: 0,
            root: Root::default(),
            piece: Runs::default(),
            digests: Vec::with_capacity(PIECE_PAGES * DIGEST_BYTES),
            pieces: 0,
        }
    }

    /// Turns to an image; gives the last piece of the one before.
    pub(crate) fn open(&mut self, id: ImageId) -> Result<Option<Piece>, MemoryError> {
        let piece = self.cut();
        let known = self.images.iter().position(|image| image.id == id);
        self.current = match known {
            Some(known) => known,
            None if self.images.len() >= IMAGES_MAX => return Err(MemoryError::Full),
            None => {
                self.images.push(ImageHead {
                    id,
                    pages: 0,
                    regions: Vec::new(),
                });
                self.images.len() - 1
            }
        };
        Ok(piece)
    }

    /// Adds a region, whose pages follow if they are present.
    pub(crate) fn region(
        &mut self,
        id: ImageId,
        region: Region,
    ) -> Result<Option<Piece>, MemoryError> {
        let piece = match self.images.get(self.current) {
            Some(image) if image.id == id => None,
            _ => self.open(id)?,
        };
        if region.flags & FLAG_PRESENT == 0 {
            return Err(MemoryError::Parent);
        }
        if let Some(image) = self.images.get_mut(self.current) {
            image.regions.push(region);
        }
        Ok(piece)
    }

    /// Adds a page of the last region; gives a piece when one is full.
    pub(crate) fn page(&mut self, slot: Slot, digest: PageDigest) -> Option<Piece> {
        self.images.get_mut(self.current)?.pages += 1;
        self.piece.push(slot);
        self.digests.extend_from_slice(&digest.0);
        (self.digests.len() >= PIECE_PAGES * DIGEST_BYTES)
            .then(|| self.cut())
            .flatten()
    }

    /// What was collected and not yet given.
    pub(crate) fn cut(&mut self) -> Option<Piece> {
        if self.digests.is_empty() {
            return None;
        }
        let pages = self.images.get(self.current)?.pages;
        // Both are bounded: by the number of images, and of pages in a piece.
        let (image, own) = (self.current as u32 + 1, self.digests.len() / DIGEST_BYTES);
        let piece = Piece {
            container: self.container.clone(),
            round: self.round,
            image,
            first: pages - own as u32,
            runs: self.piece.take(),
        };
        self.root.add(image, &hash_of_piece(&self.digests));
        self.digests.clear();
        self.pieces += 1;
        Some(piece)
    }

    /// What a round saw, once the last piece was cut.
    pub(crate) fn draft(self) -> Draft {
        Draft {
            container: self.container,
            round: self.round,
            pieces: self.pieces,
        }
    }

    /// The seal of a dump, once the last piece was cut.
    pub(crate) fn seal(self) -> Seal {
        let root = self.root.finish(&self.images);
        Seal {
            container: self.container,
            round: self.round,
            pieces: self.pieces,
            images: self.images,
            root,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: u32) -> Region {
        Region {
            address: 0x1000,
            pages,
            flags: FLAG_PRESENT,
        }
    }

    #[test]
    fn pieces_say_where_in_which_image_their_pages_are() {
        let mut layout = Layout::new("db", 1);
        let (one, two) = (ImageId::Process(1), ImageId::Shared(9));
        layout.open(one).unwrap();
        let more = PIECE_PAGES as u32 + 1;
        layout.region(one, region(more)).unwrap();
        let mut pieces = Vec::new();
        for slot in 1..=more {
            pieces.extend(layout.page(slot, PageDigest([1; 16])));
        }
        pieces.extend(layout.open(two).unwrap());
        layout.region(two, region(1)).unwrap();
        pieces.extend(layout.page(5, PageDigest([2; 16])));
        pieces.extend(layout.cut());
        let seen: Vec<(u32, u32)> = pieces
            .iter()
            .map(|piece| (piece.image, piece.first))
            .collect();
        assert_eq!(seen, [(1, 0), (1, more - 1), (2, 0)]);
        assert_eq!(pieces[0].runs.len(), 1);
        let seal = layout.seal();
        assert_eq!((seal.pieces, seal.images.len()), (3, 2));
        assert_eq!(seal.images[0].pages, more);
    }

    #[test]
    fn the_root_tells_a_changed_page_and_a_moved_region() {
        let images = |address| {
            vec![ImageHead {
                id: ImageId::Process(1),
                pages: 1,
                regions: vec![Region {
                    address,
                    ..region(1)
                }],
            }]
        };
        let root = |byte, address| {
            let mut root = Root::default();
            root.add(1, &hash_of_piece(&[byte; DIGEST_BYTES]));
            root.finish(&images(address))
        };
        assert_eq!(root(1, 0), root(1, 0));
        assert_ne!(root(1, 0), root(2, 0));
        assert_ne!(root(1, 0), root(1, 0x1000));
    }

    #[test]
    fn pages_that_only_a_parent_would_have_are_refused() {
        let mut layout = Layout::new("db", 1);
        let hole = Region {
            flags: 1,
            ..region(1)
        };
        assert!(matches!(
            layout.region(ImageId::Process(1), hole),
            Err(MemoryError::Parent)
        ));
    }
}
