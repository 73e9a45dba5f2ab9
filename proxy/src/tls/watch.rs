//! Whether files have changed, told from their metadata alone: cheap enough to ask every second.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// How some files looked at one moment. A file that is not there looks like none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Stamp(Vec<Option<Look>>);

/// Renaming a file into place changes its inode, writing into it its time or its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    device: u64,
    inode: u64,
    length: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    pub(super) fn of<'p>(paths: impl IntoIterator<Item = Option<&'p PathBuf>>) -> Self {
        let look = |path: &PathBuf| {
            let metadata = std::fs::metadata(path).ok()?;
            Some(Look {
                device: metadata.dev(),
                inode: metadata.ino(),
                length: metadata.len(),
                modified_s: metadata.mtime(),
                modified_ns: metadata.mtime_nsec(),
            })
        };
        Self(paths.into_iter().flatten().map(look).collect())
    }
}
