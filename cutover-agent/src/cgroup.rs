//! Freezing and killing the cgroup a process belongs to, under cgroup v1 (freezer controller) and v2.
//!
//! The freeze outlives CRIU: tasks that CRIU had stopped stay stopped when CRIU dies. Never thaw here what the
//! register has not given back.

mod brisk;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use brisk::Brisk;

const ROOT: &str = "/sys/fs/cgroup";

/// How long the kernel may take to report a freeze or a thaw. Tasks in uninterruptible sleep delay it.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The process has no cgroup that can freeze.
    #[error(
        "process {pid} is in no cgroup that can be frozen: mount the cgroup v2 hierarchy or the v1 freezer under {ROOT}"
    )]
    NoFreezer {
        /// The process.
        pid: u32,
    },
    /// A file of the hierarchy could not be used.
    #[error("cannot use {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel did not report the state in time.
    #[error("{path} did not become {wanted} within {} s", SETTLE_MAX.as_secs())]
    Unsettled {
        /// The cgroup.
        path: PathBuf,
        /// `frozen` or `thawed`.
        wanted: &'static str,
    },
}

/// One cgroup of a container.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cgroup {
    folder: PathBuf,
    unified: bool,
}

impl Cgroup {
    /// The freezable cgroup of a process.
    ///
    /// # Errors
    /// When the process is gone, or is in the root cgroup, or no freezer is mounted.
    pub fn of(pid: u32) -> Result<Self, CgroupError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text =
            fs::read_to_string(&path).map_err(|source| CgroupError::File { path, source })?;
        find(&text, Path::new(ROOT)).ok_or(CgroupError::NoFreezer { pid })
    }

    /// Stops every task and waits until the kernel says so.
    ///
    /// # Errors
    /// When the hierarchy cannot be written, or a task does not stop in time.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.set("FROZEN", "1")?;
        self.wait("frozen", |state| matches!(state, State::Frozen))
    }

    /// Lets every task run again. A cgroup that no longer exists counts as thawed.
    ///
    /// # Errors
    /// When the hierarchy cannot be written.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        if !self.folder.exists() {
            return Ok(());
        }
        self.set("THAWED", "0")?;
        self.wait("thawed", |state| matches!(state, State::Thawed))
    }

    /// Kills every task with SIGKILL, thaws so that the signals are taken, and waits until none is left.
    ///
    /// # Errors
    /// When tasks are still there after the time limit.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + SETTLE_MAX;
        loop {
            let pids = self.pids();
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids {
                if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
                    // A task that is gone already is what we want.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            self.thaw()?;
            if Instant::now() > deadline {
                return Err(CgroupError::Unsettled {
                    path: self.folder.clone(),
                    wanted: "empty",
                });
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The processes in this cgroup, as the kernel lists them now.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect()
    }

    fn set(&self, v1: &str, v2: &str) -> Result<(), CgroupError> {
        let (file, word) = if self.unified {
            ("cgroup.freeze", v2)
        } else {
            ("freezer.state", v1)
        };
        let path = self.folder.join(file);
        fs::write(&path, word).map_err(|source| CgroupError::File { path, source })
    }

    fn wait(
        &self,
        wanted: &'static str,
        reached: impl Fn(State) -> bool,
    ) -> Result<(), CgroupError> {
        let deadline = Instant::now() + SETTLE_MAX;
        while !reached(self.state()?) {
            if Instant::now() > deadline {
                return Err(CgroupError::Unsettled {
                    path: self.folder.clone(),
                    wanted,
                });
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    fn state(&self) -> Result<State, CgroupError> {
        let path = self.folder.join(if self.unified {
            "cgroup.events"
        } else {
            "freezer.state"
        });
        match fs::read_to_string(&path) {
            Ok(text) if self.unified && text.contains("frozen 1") => Ok(State::Frozen),
            Ok(_) if self.unified => Ok(State::Thawed),
            Ok(text) if text.trim() == "FROZEN" => Ok(State::Frozen),
            Ok(text) if text.trim() == "THAWED" => Ok(State::Thawed),
            Ok(_) => Ok(State::Between),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(State::Thawed),
            Err(source) => Err(CgroupError::File { path, source }),
        }
    }
}

enum State {
    Frozen,
    Between,
    Thawed,
}

/// What `/proc/PID/cgroup` says: of each hierarchy its controllers, none for the unified one, and the path in it.
fn memberships(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?))
    })
}

/// Where that is, in a hierarchy that is mounted at `mount`.
fn folder(root: &Path, mount: &str, path: &str) -> PathBuf {
    root.join(mount).join(path.trim_start_matches('/'))
}

/// Prefers the v1 freezer where it is mounted: there the v2 hierarchy of a hybrid system holds no tasks' limits.
fn find(text: &str, root: &Path) -> Option<Cgroup> {
    for (controllers, path) in memberships(text) {
        let found = if controllers.split(',').any(|name| name == "freezer") {
            Cgroup {
                folder: folder(root, "freezer", path),
                unified: false,
            }
        } else if controllers.is_empty() {
            Cgroup {
                folder: folder(root, "", path),
                unified: true,
            }
        } else {
            continue;
        };
        let file = if found.unified {
            "cgroup.freeze"
        } else {
            "freezer.state"
        };
        // The root cgroup of either version has no such file: freezing it would freeze ourselves.
        if found.folder.join(file).exists() {
            return Some(found);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v1_freezer_is_found_before_the_unified_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("freezer/web");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("freezer.state"), "THAWED\n").unwrap();
        let found = find("4:memory:/web\n6:freezer:/web\n0::/web\n", root.path()).unwrap();
        assert_eq!(
            found,
            Cgroup {
                folder,
                unified: false
            }
        );
    }

    #[test]
    fn the_unified_hierarchy_is_used_where_it_is_the_only_one() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("web")).unwrap();
        fs::write(root.path().join("web/cgroup.freeze"), "0\n").unwrap();
        let found = find("0::/web\n", root.path()).unwrap();
        assert!(found.unified);
    }

    #[test]
    fn the_root_cgroup_is_never_taken() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(find("6:freezer:/\n0::/\n", root.path()), None);
    }
}
