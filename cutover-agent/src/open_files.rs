//! Which files a container may be changing right now. Their times cannot be trusted: a file mapped for writing may
//! change without a new modification time, so the frozen pass hashes them again whatever they look like.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

use crate::cgroup::Cgroup;

/// Inode numbers of regular files.
///
/// Only the inode counts: through an overlay the device number is the overlay's, not the layer's. An inode number
/// that happens to be used on another file system as well costs one needless look, or hash.
#[derive(Debug, Clone, Default)]
pub(crate) struct OpenFiles {
    /// Those that any process has open, or mapped, for writing.
    pub(crate) written: HashSet<u64>,
    /// Those that are mapped such that they may have been written to until their mapping was made read-only: that shows
    /// in their times, but the kernel tells nobody before they are closed.
    pub(crate) mapped: HashSet<u64>,
    /// Whether any process may have asked the kernel for writes that go on without it (io_setup(2)): a frozen one is no
    /// promise then that its files are at rest.
    pub(crate) writes_on: bool,
}

/// How the kernel names the ring of such requests in `maps` (`aio_setup_ring` in aio.c).
const AIO_RING: &str = "/[aio]";

/// The files that the processes of some containers have open.
#[must_use]
pub(crate) fn of_containers(init_pids: impl Iterator<Item = u32>) -> OpenFiles {
    let mut found = OpenFiles::default();
    for init in init_pids.filter(|init| *init != 0) {
        let pids = Cgroup::of(init).map(|cgroup| cgroup.pids());
        for pid in pids.unwrap_or_default() {
            found.written.extend(open_for_writing(pid));
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            found.add_mappings(&maps);
        }
    }
    found
}

impl OpenFiles {
    fn add_mappings(&mut self, maps: &str) {
        self.writes_on |= maps.lines().any(|line| line.contains(AIO_RING));
        for (inode, is_writable) in maps.lines().filter_map(shared_inode) {
            if is_writable {
                self.written.insert(inode);
            } else {
                self.mapped.insert(inode);
            }
        }
    }
}

fn open_for_writing(pid: u32) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            let number = entry.file_name();
            let text =
                std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy()));
            text.is_ok_and(|text| is_writable(&text))
        })
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(std::fs::Metadata::is_file)
        .map(|metadata| metadata.ino())
        .collect()
}

/// `flags:` in fdinfo is octal; the last two bits are the access mode (proc_pid_fdinfo(5)).
fn is_writable(fdinfo: &str) -> bool {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & 0o3 != 0)
}

/// "address perms offset dev inode path": shared mappings of files, and whether they are writable.
fn shared_inode(line: &str) -> Option<(u64, bool)> {
    let mut words = line.split_whitespace();
    let permissions = words.nth(1)?;
    let inode = words.nth(2)?.parse().ok()?;
    (permissions.ends_with('s') && inode != 0).then_some((inode, permissions.contains('w')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_descriptors_count() {
        assert!(is_writable("pos:\t0\nflags:\t0100002\nmnt_id:\t29\n"));
        assert!(is_writable("pos:\t0\nflags:\t0100001\n"));
        assert!(!is_writable("pos:\t0\nflags:\t0100000\n"));
    }

    #[test]
    fn only_shared_mappings_of_files_count_and_writable_ones_are_told_apart() {
        let mut found = OpenFiles::default();
        found.add_mappings(
            "7f00-7f01 rw-s 00000000 00:1b 4711 /var/lib/mysql/aria_log\n\
             7f00-7f01 r--s 00000000 00:1b 4712 /var/lib/app/was writable\n\
             7f00-7f01 rw-p 00000000 00:1b 4713 /lib/libc.so\n\
             7f00-7f01 rw-s 00000000 00:00 0\n",
        );
        assert_eq!(found.written, HashSet::from([4711]));
        assert_eq!(found.mapped, HashSet::from([4712]));
        assert!(!found.writes_on);
        found.add_mappings("7f00-7f01 rw-s 00000000 00:11 5 /[aio] (deleted)\n");
        assert!(found.writes_on);
    }
}
