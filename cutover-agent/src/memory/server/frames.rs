//! CRIU's page server protocol, as spoken since 3.0 up to 4.2: decoding only, no input or output.
//!
//! ```text
//! u32 command in the low 16 bits, flags above │ 4 bytes of padding │ u64 pages │ u64 address │ u64 image
//! ```
//! in the machine's own byte order, for both ends are on one machine. Pages follow where the flags say that they are
//! present.

use super::super::digest::PAGE_BYTES;
use super::super::wire::{ImageId, Region};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// The pages are in the parent's image.
pub const FLAG_PARENT: u32 = 1;
/// The pages may be restored late.
pub const FLAG_LAZY: u32 = 2;
/// The pages follow.
pub const FLAG_PRESENT: u32 = 4;

const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN_ASKING: u32 = 4;
const PARENT: u32 = 5;
const ADD_FLAGS: u32 = 6;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;

const COMMAND_BITS: u32 = 16;
const KIND_BITS: u32 = 8;
const KIND_PROCESS: u64 = 1;
const KIND_SHARED: u64 = 2;

/// User space of 57 bits ends here.
const ADDRESS_END: u64 = 1 << 56;

/// What CRIU asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// An image begins; `asks` when CRIU waits to hear whether it has a parent.
    Open {
        /// Which.
        image: ImageId,
        /// A byte of answer is expected.
        asks: bool,
    },
    /// Whether an image has a parent, answered by an `int`.
    HasParent {
        /// Which.
        image: ImageId,
    },
    /// Pages, which follow when `region.flags` has [`FLAG_PRESENT`].
    Add {
        /// Of which image.
        image: ImageId,
        /// Where.
        region: Region,
    },
    /// All was sent; answered by an `int`, and not zero makes CRIU give up the dump.
    Close,
}

/// Bytes that are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// An unknown command.
    #[error("CRIU sent the command {0:#x}, which this page server does not know")]
    Command(u32),
    /// An unknown kind of image.
    #[error("CRIU sent pages of the image {0:#x}, which is of no known kind")]
    Image(u64),
    /// Pages that lie nowhere.
    #[error("CRIU sent {pages} pages at {address:#x}: they lie outside of any address space")]
    Region {
        /// Where.
        address: u64,
        /// How many.
        pages: u64,
    },
}

/// Decodes a header.
///
/// # Errors
/// [`BadHeader`] when a field is out of its bounds.
pub fn decode(header: &[u8; HEADER_BYTES]) -> Result<Command, BadHeader> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    let tagged = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    let (command, flags) = (tagged & ((1 << COMMAND_BITS) - 1), tagged >> COMMAND_BITS);
    let (pages, address, image) = (word(8), word(16), word(24));
    let add = |flags| {
        Ok(Command::Add {
            image: image_id(image)?,
            region: region(address, pages, flags)?,
        })
    };
    match command {
        OPEN | OPEN_ASKING => Ok(Command::Open {
            image: image_id(image)?,
            asks: command == OPEN_ASKING,
        }),
        PARENT => Ok(Command::HasParent {
            image: image_id(image)?,
        }),
        ADD => add(FLAG_PRESENT),
        HOLE => add(FLAG_PARENT),
        ADD_FLAGS if flags & !(FLAG_PARENT | FLAG_LAZY | FLAG_PRESENT) == 0 => add(flags),
        CLOSE | FORCE_CLOSE => Ok(Command::Close),
        _ => Err(BadHeader::Command(tagged)),
    }
}

fn image_id(image: u64) -> Result<ImageId, BadHeader> {
    let number = image >> KIND_BITS;
    match image & ((1 << KIND_BITS) - 1) {
        KIND_PROCESS => Ok(ImageId::Process(number)),
        KIND_SHARED => Ok(ImageId::Shared(number)),
        _ => Err(BadHeader::Image(image)),
    }
}

fn region(address: u64, pages: u64, flags: u32) -> Result<Region, BadHeader> {
    let bad = BadHeader::Region { address, pages };
    let counted = u32::try_from(pages).map_err(|_| bad)?;
    let end = pages
        .checked_mul(PAGE_BYTES as u64)
        .and_then(|bytes| address.checked_add(bytes))
        .ok_or(bad)?;
    if end > ADDRESS_END || !address.is_multiple_of(PAGE_BYTES as u64) {
        return Err(bad);
    }
    Ok(Region {
        address,
        pages: counted,
        flags,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in super::super) fn header(
        tagged: u32,
        pages: u64,
        address: u64,
        image: u64,
    ) -> [u8; HEADER_BYTES] {
        let mut bytes = [0xee; HEADER_BYTES];
        bytes[..4].copy_from_slice(&tagged.to_ne_bytes());
        bytes[8..16].copy_from_slice(&pages.to_ne_bytes());
        bytes[16..24].copy_from_slice(&address.to_ne_bytes());
        bytes[24..].copy_from_slice(&image.to_ne_bytes());
        bytes
    }

    #[test]
    fn pages_with_flags_are_decoded_as_criu_sends_them() {
        let sent = header(ADD_FLAGS | FLAG_PRESENT << 16, 3, 0x7f00_0000, 42 << 8 | 1);
        let expected = Command::Add {
            image: ImageId::Process(42),
            region: Region {
                address: 0x7f00_0000,
                pages: 3,
                flags: FLAG_PRESENT,
            },
        };
        assert_eq!(decode(&sent), Ok(expected));
    }

    #[test]
    fn the_older_commands_mean_the_same() {
        let flags = |command| match decode(&header(command, 1, 0, 1)) {
            Ok(Command::Add { region, .. }) => region.flags,
            other => panic!("{other:?}"),
        };
        assert_eq!(flags(ADD), FLAG_PRESENT);
        assert_eq!(flags(HOLE), FLAG_PARENT);
        let image = ImageId::Shared(9);
        assert_eq!(
            decode(&header(OPEN, 0, 0, 9 << 8 | 2)),
            Ok(Command::Open { image, asks: false })
        );
        assert_eq!(decode(&header(FORCE_CLOSE, 0, 0, 0)), Ok(Command::Close));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        for (pages, address) in [(1, 1), (u64::MAX, 0), (1 << 32, 0), (1, u64::MAX - 4095)] {
            assert_eq!(
                decode(&header(ADD, pages, address, 1)),
                Err(BadHeader::Region { address, pages })
            );
        }
        assert_eq!(decode(&header(ADD, 1, 0, 3)), Err(BadHeader::Image(3)));
        assert_eq!(decode(&header(7, 1, 0, 1)), Err(BadHeader::Command(7)));
        let flagged = ADD_FLAGS | 8 << 16;
        assert_eq!(
            decode(&header(flagged, 1, 0, 1)),
            Err(BadHeader::Command(flagged))
        );
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
            let _ = decode(&bytes);
        }
    }
}
