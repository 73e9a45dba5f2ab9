//! Which file systems have an index, and what one tree needs beside it: file systems that are mounted in a tree or taken
//! off it change what is in it, and no file system tells of that.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Changes, Index, Mark};
use crate::files::Root;
use crate::files::remembered::is_inside;

/// The indexes of a session, by device number; `None` where there can be none.
#[derive(Debug, Default)]
pub(crate) struct Indexes(Mutex<HashMap<u64, Option<Arc<Index>>>>);

/// What changes in a tree is kept since this was made.
#[derive(Debug)]
pub(crate) struct Watch {
    mark: Mark,
    device: u64,
    mounts: Vec<Vec<u8>>,
}

impl Indexes {
    /// Keeps what changes in a tree from now on; `None` where its file system does not tell.
    pub(crate) fn watch(&self, root: &Root) -> Option<Watch> {
        let device = device(root)?;
        let mut indexes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = indexes.entry(device).or_insert_with(|| {
            let opened = Index::open(root);
            match &opened {
                Ok(_) => tracing::info!(
                    path = %root.shown(b"").display(),
                    "changes are told by the kernel: the last pass looks at nothing else"
                ),
                Err(refused) => tracing::info!(
                    path = %root.shown(b"").display(),
                    "the last pass looks at every file: {refused}"
                ),
            }
            opened.ok().map(Arc::new)
        });
        Some(Watch {
            mark: index.as_ref()?.mark(),
            device,
            mounts: mounts(root)?,
        })
    }
}

impl Watch {
    /// What has changed since (`None` when that is not known), and the watch from now on.
    pub(crate) fn changes(&self, root: &Root) -> (Option<Changes>, Option<Watch>) {
        if device(root) != Some(self.device) {
            return (None, None);
        }
        let (changes, mark) = self.mark.changes();
        let Some(mounts) = mounts(root) else {
            return (None, None);
        };
        let changes = changes.filter(|_| mounts == self.mounts);
        let next = Watch {
            mark,
            device: self.device,
            mounts,
        };
        (changes, Some(next))
    }
}

fn device(root: &Root) -> Option<u64> {
    rustix::fs::fstat(root.fd()).ok().map(|stat| stat.st_dev)
}

/// What is mounted in a tree, as lines of the kernel's list; `None` when that cannot be found out.
fn mounts(root: &Root) -> Option<Vec<Vec<u8>>> {
    let link = format!("/proc/self/fd/{}", root.fd().as_raw_fd());
    let folder: OsString = std::fs::read_link(link).ok()?.into();
    let list = std::fs::read("/proc/self/mountinfo").ok()?;
    Some(mounted_in(&list, folder.as_bytes()))
}

/// Lines of proc_pid_mountinfo(5) whose mount point, their fifth word, is in a folder.
fn mounted_in(list: &[u8], folder: &[u8]) -> Vec<Vec<u8>> {
    let folder = if folder == b"/" { &folder[..0] } else { folder };
    let lines = list.split(|byte| *byte == b'\n').filter(|line| {
        let point = line.split(|byte| *byte == b' ').nth(4);
        point.is_some_and(|point| is_inside(folder, plain(point).as_bytes()))
    });
    lines.map(<[u8]>::to_vec).collect()
}

/// Spaces and the like are written as three octal digits.
fn plain(escaped: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.first_chunk::<3>().filter(|_| *first == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &behind[3..];
            }
            None => {
                plain.push(*first);
                rest = behind;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_mounted_in_the_tree_counts() {
        let list = b"36 35 98:0 / /srv rw - ext4 /dev/a rw\n\
            37 36 0:5 / /srv/my\\040data rw - tmpfs t rw\n\
            38 36 0:6 / /srv/my\\040data/in rw - tmpfs t rw\n\
            39 36 0:7 / /srv/my\\040data2 rw - tmpfs t rw\n";
        let found = mounted_in(list, b"/srv/my data");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with(b"38 "));
        assert_eq!(mounted_in(list, b"/").len(), 4);
        assert_eq!(mounted_in(list, b"/elsewhere").len(), 0);
    }
}
