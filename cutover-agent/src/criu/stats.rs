//! The numbers CRIU writes about a dump: `stats-dump`, a protobuf message behind two magic words and a length.
//! Field numbers are those of CRIU's `images/stats.proto`.

use std::path::Path;

use super::protobuf::{Value, bytes, fields};

/// What a dump did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DumpStats {
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages left to the parent image because they had not changed.
    pub pages_skipped_parent: u64,
}

const HEADER_BYTES: usize = 12;
const DUMP_FIELD: u64 = 1;

/// Reads `stats-dump` from a folder; `None` when it is missing or not what CRIU writes.
#[must_use]
pub fn read(folder: &Path) -> Option<DumpStats> {
    parse(&std::fs::read(folder.join("stats-dump")).ok()?)
}

fn parse(image: &[u8]) -> Option<DumpStats> {
    let message = image.get(HEADER_BYTES..)?;
    let dump = bytes(message, DUMP_FIELD)?;
    let mut stats = DumpStats::default();
    for field in fields(dump) {
        match field {
            (5, Value::Number(value)) => stats.pages_scanned = value,
            (6, Value::Number(value)) => stats.pages_skipped_parent = value,
            _ => {}
        }
    }
    Some(stats)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_page_counts_are_read() {
        let dump = [0x10, 0x96, 0x01, 0x28, 0x0a, 0x30, 0x07, 0x38, 0x03];
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend([0x0a, dump.len() as u8]);
        bytes.extend(dump);
        let expected = DumpStats {
            pages_scanned: 10,
            pages_skipped_parent: 7,
        };
        assert_eq!(parse(&bytes), Some(expected));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
