//! Which pages of a process CRIU would dump, as far as reading them ahead is worth it. Missing some costs bytes at the
//! freeze, never correctness: what is restored comes from the dump itself.

/// Bits of an entry of `/proc/PID/pagemap` (pagemap(5)).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// What a mapping is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Anonymous, or of a file but private: the pages that are the process's own are dumped.
    Private,
    /// Shared memory without a name: dumped once, whoever maps it.
    Shared {
        /// Identifies it.
        inode: u64,
    },
}

/// One mapping that is worth reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) kind: Kind,
}

/// Reads `/proc/PID/maps`.
pub(super) fn parse(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(mapping).collect()
}

/// "start-end perms offset dev inode path".
fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let inode: u64 = words.nth(2)?.parse().ok()?;
    let path = words.next().unwrap_or("");
    let kind = if permissions.ends_with('s') {
        let is_nameless = path.starts_with("/dev/zero")
            || path.starts_with("/memfd:")
            || path.starts_with("/SYSV");
        if !is_nameless {
            return None;
        }
        Kind::Shared { inode }
    } else if path.starts_with("[vvar") || path == "[vsyscall]" {
        return None;
    } else {
        Kind::Private
    };
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping {
        start: number(start)?,
        end: number(end)?,
        kind,
    })
}

/// Runs of pages (first, count) that are the process's own, of consecutive pagemap entries.
pub(super) fn own_runs(entries: &[u64]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        if entry & (PRESENT | SWAPPED) == 0 || entry & FILE_OR_SHARED != 0 {
            continue;
        }
        match runs.last_mut() {
            Some((first, count)) if *first + *count == index => *count += 1,
            _ => runs.push((index, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn private_and_nameless_shared_memory_is_read_and_files_are_not() {
        let text = "\
            00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/php\n\
            7f00-7f01 rw-s 00001000 00:01 99 /dev/zero (deleted)\n\
            7f02-7f03 rw-s 00000000 08:02 7 /var/lib/mysql/aria_log\n\
            7f04-7f05 r--p 00000000 00:00 0 [vvar]\n\
            7f06-7f07 rw-p 00000000 00:00 0 [heap]\n\
            nonsense\n";
        let seen: Vec<(u64, Kind)> = parse(text)
            .iter()
            .map(|mapping| (mapping.start, mapping.kind))
            .collect();
        assert_eq!(
            seen,
            [
                (0x40_0000, Kind::Private),
                (0x7f00, Kind::Shared { inode: 99 }),
                (0x7f06, Kind::Private)
            ]
        );
    }

    #[test]
    fn only_own_pages_count() {
        let own = PRESENT;
        let entries = [own, own, 0, SWAPPED, own | FILE_OR_SHARED, own];
        assert_eq!(own_runs(&entries), [(0, 2), (3, 1), (5, 1)]);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9a-f\\-rwxps /\\n]{0,200}") {
            let _ = parse(&text);
        }
    }
}
