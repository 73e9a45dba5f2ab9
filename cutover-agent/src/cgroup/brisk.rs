//! Keeps moves between cgroups quick while clients wait for a restore.
//!
//! Whoever writes a process to a `cgroup.procs` takes a lock that every fork and exit holds for reading
//! (`cgroup_threadgroup_rwsem`). After a pause that means to wait for an RCU grace period, some 8 ms on an idle machine,
//! because until then readers go without atomics; shortly after another writer it takes a tenth of one (`rcu_sync_enter`
//! in kernel/rcu/sync.c; the mount option `favordynmods` of cgroup2 makes it so for good, at the cost of every fork). runc
//! moves CRIU before it tells it to restore, and CRIU moves what it restores. So somebody writes all the while: we, who
//! are moved to where we are.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::{ROOT, folder, memberships};

/// Between two writes: well below a grace period, with which the effect of the last one ends.
const PAUSE: Duration = Duration::from_millis(5);

/// Moves are quick for as long as this is kept.
#[derive(Debug)]
pub(crate) struct Brisk {
    is_over: Arc<AtomicBool>,
    thread: Thread,
}

impl Brisk {
    /// Begins, and goes on for `limit` at most. `None` where there is no cgroup to be moved to: then moves are as slow as
    /// they are.
    pub(crate) fn begin(limit: Duration) -> Option<Self> {
        let cgroups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mut own = own_file(&cgroups, Path::new(ROOT))?;
        let is_over = Arc::<AtomicBool>::default();
        let told = Arc::clone(&is_over);
        let end = Instant::now() + limit;
        let moving = move || {
            while !told.load(Ordering::Relaxed) && Instant::now() < end {
                if let Err(error) = move_ourselves(&mut own) {
                    tracing::debug!(%error, "moves between cgroups are not kept quick");
                    return;
                }
                thread::park_timeout(PAUSE);
            }
        };
        let thread = thread::Builder::new().name("cgroup-moves".to_owned());
        let thread = thread.spawn(moving).ok()?.thread().clone();
        Some(Self { is_over, thread })
    }
}

impl Drop for Brisk {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.unpark();
    }
}

/// The kernel takes 0 for whoever writes.
fn move_ourselves(own: &mut File) -> std::io::Result<()> {
    own.write_all(b"0")
}

/// The list of processes of a cgroup that we are in, whichever: all hierarchies share the lock.
fn own_file(cgroups: &str, root: &Path) -> Option<File> {
    let open = |path: PathBuf| OpenOptions::new().write(true).open(path).ok();
    memberships(cgroups).find_map(|(controllers, path)| {
        let mounts = match controllers {
            "" => ["", "unified"],
            named => [named, named.strip_prefix("name=").unwrap_or(named)],
        };
        let list = |mount| folder(root, mount, path).join("cgroup.procs");
        mounts.into_iter().map(list).find_map(open)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(file: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        root
    }

    #[test]
    fn our_own_list_is_found_in_either_version_and_in_a_hybrid() {
        const CGROUPS: &str = "12:cpu,cpuacct:/web\n2:name=systemd:/web\n0::/web\n";
        for list in [
            "web/cgroup.procs",
            "unified/web/cgroup.procs",
            "systemd/web/cgroup.procs",
            "cpu,cpuacct/web/cgroup.procs",
        ] {
            let root = made(list);
            let mut own = own_file(CGROUPS, root.path()).unwrap();
            move_ourselves(&mut own).unwrap();
            assert_eq!(fs::read(root.path().join(list)).unwrap(), b"0", "{list}");
        }
    }

    #[test]
    fn without_a_cgroup_there_is_nothing_to_keep_quick() {
        let root = made("web/cgroup.procs");
        for cgroups in ["", "garbage\n", "0::/other\n", "1:memory:/web\n"] {
            assert!(own_file(cgroups, root.path()).is_none(), "{cgroups:?}");
        }
    }
}
