//! The numbers CRIU writes about a dump: `stats-dump`, a protobuf message behind two magic words and a length.
//! Field numbers are those of CRIU's `images/stats.proto`.

use std::path::Path;

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

fn parse(bytes: &[u8]) -> Option<DumpStats> {
    let message = bytes.get(HEADER_BYTES..)?;
    let dump = fields(message).find_map(|field| match field {
        (DUMP_FIELD, Value::Bytes(inner)) => Some(inner),
        _ => None,
    })?;
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

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Walks a protobuf message; ends at the first thing that is not one.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let tag = varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut rest)?),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let (inner, after) = rest.split_at_checked(length)?;
                rest = after;
                Value::Bytes(inner)
            }
            _ => return None,
        };
        Some((tag >> 3, value))
    })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
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
