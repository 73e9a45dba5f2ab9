//! The ways in for the fuzz targets of `fuzz/`, and what must hold there for any input. Each function takes bytes and
//! panics when a rule is broken; none of them does input or output.
//!
//! Built for tests and with the feature `fuzzing` only; no part of the agent may use it.

use crate::memory::{FuzzedSink, PAGE_BYTES, fuzz_dump, fuzz_peer_words};

/// What CRIU says to its page server: a close is answered well only after whole pages, and once.
pub fn page_server(bytes: &[u8]) {
    let (mut heard, mut sink) = (Vec::new(), FuzzedSink::default());
    let is_whole = fuzz_dump(bytes, &mut heard, &mut sink).is_ok();
    assert_eq!(sink.bytes % PAGE_BYTES, 0);
    assert_eq!(is_whole, sink.is_closed);
    if is_whole {
        assert!(heard.ends_with(&0_i32.to_ne_bytes()));
    }
}

/// What the other agent says about pages: read or refused, never a panic.
pub fn page_words(bytes: &[u8]) {
    fuzz_peer_words(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Headers that are mostly right, with pages between them now and then.
    fn dump() -> impl Strategy<Value = Vec<u8>> {
        let header = (
            prop::sample::select(vec![1_u32, 2, 3, 4, 5, 6 | 4 << 16, 0x1023, 7]),
            0_u64..3,
            1_u64..4,
        );
        let part = (header, any::<bool>()).prop_map(|((command, pages, image), follows)| {
            let mut bytes = vec![0; 32];
            bytes[..4].copy_from_slice(&command.to_ne_bytes());
            bytes[8..16].copy_from_slice(&pages.to_ne_bytes());
            bytes[24..].copy_from_slice(&(image << 8 | 1).to_ne_bytes());
            if follows {
                bytes.resize(32 + pages as usize * PAGE_BYTES, 7);
            }
            bytes
        });
        prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_dump_is_taken_whole_or_refused(bytes in dump()) {
            page_server(&bytes);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            page_server(&bytes);
            page_words(&bytes);
        }
    }
}
