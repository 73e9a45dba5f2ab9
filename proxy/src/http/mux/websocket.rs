//! The handshake keys of a WebSocket, which HTTP/2 and HTTP/3 do without and HTTP/1 asks for (RFC 6455, section
//! 4.2; RFC 8441, section 5.1). Where the two meet we make the key and check its answer ourselves.

use aws_lc_rs::digest;

/// What RFC 6455 appends to a key.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Sixteen bytes in base64.
const KEY_BYTES: usize = 24;

/// A `Sec-WebSocket-Key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key([u8; KEY_BYTES]);

impl Key {
    /// A new one. It need not be secret, only different each time.
    pub(crate) fn random() -> Self {
        let mut bytes = [0; 16];
        // Without randomness left in the system the zero key still proves that the other end speaks WebSocket.
        aws_lc_rs::rand::fill(&mut bytes).ok();
        Self(base64(&bytes))
    }

    /// As it stands in a head.
    pub(crate) const fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this `Sec-WebSocket-Accept` answers this key.
    pub(crate) fn is_accepted_by(&self, accept: &[u8]) -> bool {
        accept == self.accept()
    }

    /// The answer to this key.
    pub(crate) fn accept(&self) -> [u8; 28] {
        accept_of(&self.0)
    }
}

/// The `Sec-WebSocket-Accept` of a key.
pub(crate) fn accept_of(key: &[u8]) -> [u8; 28] {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key);
    context.update(GUID);
    base64(context.finish().as_ref())
}

/// Base64 with padding. `OUT` must be four thirds of the length, rounded up to four.
fn base64<const OUT: usize>(bytes: &[u8]) -> [u8; OUT] {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = [b'='; OUT];
    for (group, place) in bytes.chunks(3).zip(out.chunks_mut(4)) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for (index, letter) in place.iter_mut().enumerate().take(group.len() + 1) {
            *letter = LETTERS[(bits >> (18 - 6 * index)) as usize & 63];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_rfc_is_accepted() {
        let key = Key(*b"dGhlIHNhbXBsZSBub25jZQ==");
        assert!(key.is_accepted_by(b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert!(!key.is_accepted_by(b"s3pPLMBiTxaQ9kYGzzhZRbK+xOO="));
        assert_eq!(
            base64::<24>(b"the sample nonce"),
            *b"dGhlIHNhbXBsZSBub25jZQ=="
        );
    }

    #[test]
    fn no_two_keys_are_alike() {
        assert_ne!(Key::random(), Key::random());
    }
}
