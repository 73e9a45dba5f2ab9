//! Which files a container may be changing right now. Their times cannot be trusted: a file mapped for writing may
//! change without a new modification time, so the frozen pass hashes them again whatever they look like.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

use crate::cgroup::Cgroup;

/// Inode numbers of regular files that any process of the container has open, or mapped, for writing.
///
/// Only the inode counts: through an overlay the device number is the overlay's, not the layer's. An inode number
/// that happens to be used on another file system as well costs one needless hash.
#[must_use]
pub(crate) fn being_written(init_pid: u32) -> HashSet<u64> {
    if init_pid == 0 {
        return HashSet::new();
    }
    let pids = Cgroup::of(init_pid)
        .map(|cgroup| cgroup.pids())
        .unwrap_or_default();
    pids.into_iter()
        .flat_map(|pid| {
            open_for_writing(pid)
                .into_iter()
                .chain(mapped_for_writing(pid))
        })
        .collect()
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

fn mapped_for_writing(pid: u32) -> Vec<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    text.lines().filter_map(shared_writable_inode).collect()
}

/// "address perms offset dev inode path": shared and writable mappings of files.
fn shared_writable_inode(line: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let permissions = words.nth(1)?;
    let inode = words.nth(2)?.parse().ok()?;
    (permissions.contains('w') && permissions.ends_with('s') && inode != 0).then_some(inode)
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
    fn only_shared_writable_mappings_of_files_count() {
        assert_eq!(
            shared_writable_inode("7f00-7f01 rw-s 00000000 00:1b 4711 /var/lib/mysql/aria_log"),
            Some(4711)
        );
        assert_eq!(
            shared_writable_inode("7f00-7f01 rw-p 00000000 00:1b 4711 /lib/libc.so"),
            None
        );
        assert_eq!(
            shared_writable_inode("7f00-7f01 rw-s 00000000 00:00 0"),
            None
        );
    }
}
