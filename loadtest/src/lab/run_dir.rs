//! The run directory: a tmpfs with a number that belongs to one running lab, and the cleaning after a dead one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::command::Shell;
use crate::interrupt;
use crate::lab::app::ContainerKind;
use crate::lab::container::{Runtime, thaw};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::netns::{self, Names, SITES};
use crate::progress::Progress;

/// Highest number of a run: more labs at once than one machine can carry.
const NUMBER_MAX: u32 = 99;
/// Every file in a run directory must have room in a unix socket's address of 108 bytes.
const PATH_BYTES_MAX: usize = 84;
/// How long a process may take to end before it is killed, in seconds.
const TERM_S: u64 = 5;

/// One run's directory and number; dropping it removes everything that belongs to the number.
#[derive(Debug)]
pub struct RunDir {
    /// The directory, a tmpfs.
    pub path: PathBuf,
    /// The names of its namespaces.
    pub names: Names,
}

impl RunDir {
    /// Cleans up after labs that died, then takes the first free number.
    ///
    /// # Errors
    /// When no number is free or the tmpfs cannot be mounted.
    pub fn claim(folders: &Folders, progress: &Progress) -> Result<Self> {
        let _lock = folders.lock("runs")?;
        reconcile(folders, progress);
        for number in 1..=NUMBER_MAX {
            let (path, names) = (folders.lab.join(format!("run-{number}")), Names { number });
            if path.as_os_str().len() > PATH_BYTES_MAX {
                return Err(LabError::PathTooLong { path });
            }
            // The name of a namespace is taken atomically and machine-wide, also against labs of other checkouts.
            if path.exists()
                || !Shell::new("ip")
                    .args(["netns", "add", &names.name("edge")])
                    .succeeds()
            {
                continue;
            }
            fs::create_dir_all(&path).on("create", &path)?;
            let run = Self { path, names };
            mount(
                "tmpfs",
                &run.path,
                "tmpfs",
                MountFlags::empty(),
                c"size=70%,mode=0755",
            )
            .on("mount", &run.path)?;
            let owner = run.path.join("lab.pid");
            fs::write(&owner, std::process::id().to_string()).on("write", &owner)?;
            return Ok(run);
        }
        let what = format!("a free run number up to {NUMBER_MAX}");
        Err(LabError::NotInTime {
            what,
            seconds: 0,
            hint: ": is another lab using /run/netns/hg*?".into(),
        })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        interrupt::shielded(|| clear(&self.path, self.names));
    }
}

fn reconcile(folders: &Folders, progress: &Progress) {
    let Ok(entries) = fs::read_dir(&folders.lab) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(number) = name
            .strip_prefix("run-")
            .and_then(|number| number.parse().ok())
        else {
            continue;
        };
        if !owner_lives(&entry.path()) {
            progress.say(format!(
                "cleaning up after an earlier run that died ({name})"
            ));
            clear(&entry.path(), Names { number });
        }
    }
}

fn owner_lives(run: &Path) -> bool {
    let Ok(text) = fs::read_to_string(run.join("lab.pid")) else {
        return false;
    };
    let pid = text.trim();
    let is_lab = fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.to_string_lossy().contains("/lab"));
    is_lab
        && pid
            .parse()
            .ok()
            .and_then(Pid::from_raw)
            .is_some_and(|pid| test_kill_process(pid).is_ok())
}

/// Ends what lives in the run's namespaces, deletes its containers, mounts, cgroups, namespaces and directory.
fn clear(path: &Path, names: Names) {
    let cgroups = cgroups(names);
    for cgroup in &cgroups {
        thaw(cgroup);
    }
    end(names, Signal::TERM, Duration::from_secs(TERM_S));
    for site in SITES {
        for kind in ContainerKind::ALL {
            if path.join(site).join("runc").join(kind.name()).exists() {
                Runtime::new(path.to_owned(), site, names).delete(kind);
            }
        }
    }
    end(names, Signal::KILL, Duration::from_secs(TERM_S));
    netns::remove(names);
    // Overlays, bind mounts and leftovers of CRIU lie below the run's own tmpfs: deepest first.
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|point| Path::new(point).starts_with(path));
    let mut below: Vec<&str> = below.collect();
    below.sort_unstable_by_key(|point| std::cmp::Reverse(point.len()));
    for point in below {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
    let _ = fs::remove_dir(path);
    for cgroup in cgroups {
        for hierarchy in hierarchies() {
            let _ = fs::remove_dir(hierarchy.join(&cgroup));
        }
    }
}

fn end(names: Names, signal: Signal, limit: Duration) {
    let mut signalled = Vec::new();
    interrupt::wait_until(limit, || {
        let living = netns::processes(names);
        for pid in &living {
            if !signalled.contains(pid) {
                signalled.push(*pid);
                if let Some(pid) = Pid::from_raw(*pid) {
                    let _ = kill_process(pid, signal);
                }
            }
        }
        living.is_empty()
    });
}

fn hierarchies() -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("/sys/fs/cgroup")];
    if let Ok(entries) = fs::read_dir("/sys/fs/cgroup") {
        all.extend(
            entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir()),
        );
    }
    all
}

fn cgroups(names: Names) -> Vec<String> {
    let prefix = names.name("");
    let entries = hierarchies()
        .into_iter()
        .filter_map(|path| fs::read_dir(path).ok())
        .flatten()
        .flatten();
    let mut found: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.retain(|name| name.starts_with(&prefix));
    found.sort();
    found.dedup();
    found
}
