//! How a page is recognised: by a BLAKE3 hash keyed with a secret of the hop.
//!
//! A tenant chooses what its pages contain, so it must not be able to make two different ones look alike. With a key
//! that only the two agents know it cannot even try, and 128 bits are enough: among 2^32 pages the chance of any two
//! alike by accident is 2^-65. Half the size matters, because each agent keeps one for every page of the hop.

use serde::{Deserialize, Serialize};

/// Bytes of a page; CRIU's images know no other size on the machines we move.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of a digest.
pub(crate) const DIGEST_BYTES: usize = 16;

/// The secret of one hop.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestKey([u8; 32]);

/// What a page is recognised by, within one hop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageDigest(pub(crate) [u8; DIGEST_BYTES]);

impl DigestKey {
    /// A key of these bytes, which must come from a good source of randomness.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of one page.
    #[must_use]
    pub fn digest(&self, page: &[u8]) -> PageDigest {
        let mut digest = [0; DIGEST_BYTES];
        digest.copy_from_slice(&blake3::keyed_hash(&self.0, page).as_bytes()[..DIGEST_BYTES]);
        PageDigest(digest)
    }
}

impl std::fmt::Debug for DigestKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("DigestKey(secret)")
    }
}

impl PageDigest {
    /// The mark of a slot that has not arrived; no page hashes to it.
    pub(crate) const ABSENT: Self = Self([0; DIGEST_BYTES]);
}

impl std::fmt::Debug for PageDigest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..4]
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Whether a page is all zero; written so that the compiler uses vector instructions, and ends at the first that is not.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_page_has_another_digest_under_another_key() {
        let page = [7; PAGE_BYTES];
        let digest = DigestKey::new([1; 32]).digest(&page);
        assert_eq!(digest, DigestKey::new([1; 32]).digest(&page));
        assert_ne!(digest, DigestKey::new([2; 32]).digest(&page));
    }

    #[test]
    fn a_single_bit_makes_a_page_not_zero() {
        let mut page = [0; PAGE_BYTES];
        assert!(is_zero(&page));
        page[PAGE_BYTES - 1] = 1;
        assert!(!is_zero(&page));
    }
}
