//! Blocks: the unit that is hashed, compared and sent.
//!
//! 16 KiB is InnoDB's page size, so one changed page is one changed block. Digests are whole BLAKE3 hashes: 32 bytes
//! for 16 KiB are 0.2 % of the data, and a tenant who can choose file contents must not be able to forge an equal block.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Bytes in a block; the last block of a file may be shorter.
pub const BLOCK_BYTES: usize = 16 << 10;

/// The BLAKE3 hash of a block's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub(crate) [u8; 32]);

impl Digest {
    /// No block hashes to this: the mark of one whose content is not known.
    pub(crate) const UNKNOWN: Self = Self([0; 32]);

    /// Hashes a block.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// One digest of several.
    pub(crate) fn over(digests: &[Self]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for digest in digests {
            hasher.update(&digest.0);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// One digest of this one, which may be of several itself, and the next.
    pub(crate) fn then(self, next: Self) -> Self {
        Self::over(&[self, next])
    }

    /// The digest of `length` zero bytes; `length` ≤ [`BLOCK_BYTES`].
    pub(crate) fn of_zeros(length: usize) -> Self {
        static FULL: std::sync::OnceLock<Digest> = std::sync::OnceLock::new();
        match length {
            BLOCK_BYTES => *FULL.get_or_init(|| Self::of(&[0; BLOCK_BYTES])),
            shorter => Self::of(&[0; BLOCK_BYTES][..shorter.min(BLOCK_BYTES)]),
        }
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..4]
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// How many blocks a file of `size` bytes has.
pub(crate) fn count(size: u64) -> u64 {
    size.div_ceil(BLOCK_BYTES as u64)
}

/// How long block `index` of a file of `size` bytes is.
pub(crate) fn length(size: u64, index: u64) -> usize {
    let start = index * BLOCK_BYTES as u64;
    size.saturating_sub(start).min(BLOCK_BYTES as u64) as usize
}

/// Reads from a place in a file until the buffer is full or the file ends, and says how much there was.
///
/// # Errors
/// The system's reason.
pub(crate) fn read_at(file: &OwnedFd, buffer: &mut [u8], start: u64) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(file, &mut buffer[filled..], start + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(filled)
}

/// Whether all bytes are zero; written so that the compiler uses vector instructions.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
