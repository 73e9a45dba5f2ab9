//! What the machine gives this process, and the defaults that follow from it. Looked at once, when the process begins:
//! a reload while much is held must not find less room because of what is held.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::service::budget::Keep;

/// Files the process needs for itself: listeners, epolls, control and metrics clients, logs, libraries.
pub(super) const FILES_RESERVED: u64 = 200;
/// Share of the memory, in hundredths, that all held together may keep: as much again is left for what is under way,
/// and for the kernel's buffers of the held.
const HELD_PERCENT: u64 = 50;
/// Where the system says nothing of its memory.
const MEMORY_BYTES_UNKNOWN: u64 = 1 << 30;
/// The least and the most that defaults come to.
const HELD_BYTES_MIN: u64 = 16 << 20;
const HELD_MIN: u64 = 1_000;
const HELD_MAX: u64 = 1_000_000;
/// What version 1 of control groups says where there is no limit is far above any memory.
const MEMORY_BYTES_MAX: u64 = 1 << 60;

/// What this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Files it may have open.
    pub open_files: u64,
    /// Memory that was free for it when it began, in bytes, whatever limits it most: the machine or a control group.
    pub memory_bytes: u64,
}

impl Machine {
    /// As it was when the process began; first takes as many open files as it may have.
    #[must_use]
    pub fn look() -> Self {
        static MACHINE: OnceLock<Machine> = OnceLock::new();
        *MACHINE.get_or_init(|| Self {
            open_files: claim_open_files(),
            memory_bytes: free_memory(Path::new("/")).unwrap_or(MEMORY_BYTES_UNKNOWN),
        })
    }

    /// A client connection may need a second file for its upstream, so half of what the process may open.
    pub(super) fn connections_max(&self) -> usize {
        let files = self.open_files.saturating_sub(FILES_RESERVED) / 2;
        usize::try_from(files).unwrap_or(usize::MAX).max(16)
    }

    /// Most connections that a configuration may ask for: each needs one file at least.
    pub(super) const fn connections_limit(&self) -> u64 {
        self.open_files.saturating_sub(FILES_RESERVED)
    }

    /// Memory for the held of one of so many services.
    pub(super) fn held_bytes_max(&self, services: usize) -> u64 {
        let all = self.memory_bytes / 100 * HELD_PERCENT;
        (all / services.max(1) as u64).max(HELD_BYTES_MIN)
    }

    /// As many as fit there, were all of them plain requests in clear.
    pub(super) fn held_max(held_bytes_max: u64) -> usize {
        let count = held_bytes_max / u64::from(Keep::Clear.bytes());
        usize::try_from(count.clamp(HELD_MIN, HELD_MAX)).unwrap_or(usize::MAX)
    }
}

/// Raises the limit in force to the one that may not be passed, and says what is in force then.
fn claim_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let claimed = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Refused, the old one stays in force.
    if limit.current != limit.maximum && setrlimit(Resource::Nofile, claimed).is_ok() {
        return limit.maximum.unwrap_or(1 << 20);
    }
    limit.current.unwrap_or(1 << 20)
}

/// What is least: memory that the machine says is available, and what limits say of our control groups.
fn free_memory(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().flat_map(|line| group_limits(root, line));
    let machine = std::fs::read_to_string(root.join("proc/meminfo")).ok();
    let machine = machine.as_deref().and_then(available);
    machine.into_iter().chain(limits).min()
}

/// `MemAvailable:   123 kB`; the unit is always that.
fn available(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
    Some(kibibytes * 1024)
}

/// The limits of one line of `/proc/self/cgroup`, `ID:CONTROLLERS:PATH`: those of the group and of all above it.
fn group_limits(root: &Path, line: &str) -> Vec<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
        return Vec::new();
    };
    let (mount, name) = if controllers.is_empty() {
        ("sys/fs/cgroup", "memory.max")
    } else if controllers
        .split(',')
        .any(|controller| controller == "memory")
    {
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
    } else {
        return Vec::new();
    };
    let relative = PathBuf::from(path.trim_start_matches('/'));
    let limit = |group: &Path| {
        let file = root.join(mount).join(group).join(name);
        let text = std::fs::read_to_string(file).ok()?;
        // The word "max" is no limit.
        let bytes = text.trim().parse::<u64>().ok()?;
        (bytes < MEMORY_BYTES_MAX).then_some(bytes)
    };
    relative.ancestors().filter_map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        free_memory(root.path())
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    4096 kB\n");

    #[test]
    fn the_least_of_machine_and_control_groups_counts() {
        assert_eq!(machine(&[MEMINFO]), Some(4 << 20));
        let second = [
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1048576\n"),
        ];
        assert_eq!(machine(&second), Some(1 << 20));
        let first = [
            MEMINFO,
            ("proc/self/cgroup", "3:cpu:/x\n2:memory,pids:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "2097152\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ];
        assert_eq!(machine(&first), Some(2 << 20));
        assert_eq!(machine(&[]), None);
    }

    #[test]
    fn defaults_share_half_of_the_memory_among_the_services() {
        let machine = Machine {
            open_files: 20_000,
            memory_bytes: 4_000_000_000,
        };
        assert_eq!(machine.connections_max(), 9_900);
        assert_eq!(machine.held_bytes_max(2), 1_000_000_000);
        assert_eq!(machine.held_bytes_max(0), 2_000_000_000);
        assert_eq!(Machine::held_max(460_000_000), 100_000);
        assert_eq!(Machine::held_max(0), 1_000);
    }
}
