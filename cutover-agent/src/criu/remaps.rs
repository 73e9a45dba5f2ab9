//! Files that CRIU gives a name for while it dumps: one that was unlinked where it was opened and still has another name
//! gets a `link_remap.N` beside it, in the container's own tree (`create_link_remap` in files-reg.c). What was copied of that
//! tree before the dump was over lacks it, and the restore would not find it.

use std::path::Path;

use super::protobuf::{Value, fields};

/// CRIU's list of such files, and of others whose content or place it keeps by itself; absent when there are none.
const LIST: &str = "remap-fpath.img";
/// Two magic words.
const HEADER_BYTES: usize = 8;
/// The field with the kind, in `remap_file_path_entry` of CRIU's `images/remap-file-path.proto`.
const KIND_FIELD: u64 = 3;
/// A copy inside the images, and a place in a process's folder of `/proc`.
const KINDS_ELSEWHERE: [u64; 2] = [1, 2];

/// Whether the dump with its images in `folder` may have put names into the container's trees.
#[must_use]
pub fn made_names(folder: &Path) -> bool {
    match std::fs::read(folder.join(LIST)) {
        Ok(list) => may_have_linked(&list),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// Whatever is not known to be something else counts.
fn may_have_linked(list: &[u8]) -> bool {
    let mut rest = list.get(HEADER_BYTES..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first_chunk() {
        let Ok(length) = usize::try_from(u32::from_le_bytes(*length)) else {
            return true;
        };
        let Some((entry, after)) = after.split_at_checked(length) else {
            return true;
        };
        let is_elsewhere = |(field, value): (u64, Value<'_>)| matches!(value, Value::Number(kind) if field == KIND_FIELD && KINDS_ELSEWHERE.contains(&kind));
        if !fields(entry).any(is_elsewhere) {
            return true;
        }
        rest = after;
    }
    !rest.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(kinds: &[Option<u8>]) -> Vec<u8> {
        let mut list = vec![0; HEADER_BYTES];
        for kind in kinds {
            let mut entry = vec![0x08, 7, 0x10, 9];
            entry.extend(kind.iter().flat_map(|kind| [0x18, *kind]));
            list.extend((entry.len() as u32).to_le_bytes());
            list.extend(entry);
        }
        list
    }

    #[test]
    fn only_links_are_names_in_a_tree_and_the_unknown_counts_as_one() {
        assert!(!may_have_linked(&list(&[])));
        assert!(!may_have_linked(&list(&[Some(1), Some(2), Some(1)])));
        for kind in [Some(0), None, Some(4)] {
            assert!(may_have_linked(&list(&[Some(1), kind, Some(1)])));
        }
        let mut cut = list(&[Some(1)]);
        cut.pop();
        assert!(may_have_linked(&cut));
        let folder = tempfile::tempdir().unwrap();
        assert!(!made_names(folder.path()));
        std::fs::write(folder.path().join(LIST), list(&[Some(0)])).unwrap();
        assert!(made_names(folder.path()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = may_have_linked(&bytes);
        }
    }
}
