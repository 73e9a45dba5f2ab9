//! Slows down containers whose writes outrun the link: first what is written to them, at the proxy (`writes`), and where
//! that is not enough or there is nothing of the kind, by limiting the processor time of their cgroups.
//!
//! What was set before is kept in a file before anything is changed, and put back before the hold and by whoever
//! undoes the hop, also after a crash. What it never does: stop a container, or leave a limit behind.

use std::path::{Path, PathBuf};
use std::time::Instant;

use cutover_protocol::id::ContainerName;
use serde::{Deserialize, Serialize};

use super::Driver;
use super::memory::pids;
use super::writes::Slowing;
use crate::durable;
use crate::report::{Progress, Slowed};

/// The file below an agent's state folder.
const FILE: &str = "throttle.json";

const CGROUPS: &str = "/sys/fs/cgroup";

/// The kernel's usual period of a limit, in microseconds, and the least it takes for one.
const PERIOD_US: u64 = 100_000;
const QUOTA_US_MIN: u64 = 1_000;

/// Clock ticks of `/proc/PID/stat`, in microseconds: USER_HZ is 100 wherever Linux runs containers.
const TICK_US: u64 = 10_000;

/// A limit, and what was there before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Limit {
    file: PathBuf,
    before: String,
}

impl Driver {
    /// Begins a round: sees how much is written and how much processor time the containers use, and takes `percent` of
    /// it away. 0 leaves everything as it is.
    pub(super) async fn throttle(&mut self, round: u32, percent: u8) -> Result<(), String> {
        if self.header.bounds.throttle_percent_max == 0 {
            return Ok(());
        }
        let last = self.report.memory.slowed.last();
        let is_more = last.is_none_or(|last| last.percent < percent);
        let (writes, processors) = match self.writes.slow(percent).await {
            Slowing::None => (Vec::new(), percent > 0),
            // Perhaps that is enough.
            Slowing::First(writes) => (writes, false),
            Slowing::Further(writes) => {
                (writes, is_more || last.is_some_and(|last| last.processors))
            }
        };
        // What sufficed is left as it is.
        self.throttle_processors(if processors && is_more { percent } else { 0 })
            .await?;
        if percent > 0 {
            let slowed = Slowed {
                round,
                percent,
                writes,
                processors,
            };
            self.report.memory.slowed.push(slowed.clone());
            self.tell(Progress::Slowed { slowed });
        }
        Ok(())
    }

    /// Takes the containers' processor time, and limits it to what they used in the last round less `percent`.
    async fn throttle_processors(&mut self, percent: u8) -> Result<(), String> {
        for name in self.containers() {
            let pids = pids(&self.host, &name).await?;
            let (now, used) = (Instant::now(), pids.iter().map(|pid| used_us(*pid)).sum());
            let before = self.used.insert(name.clone(), (now, used));
            if let (Some((began, was)), Some(pid), true) = (before, pids.first(), percent > 0) {
                let elapsed = (now - began).as_secs_f64().max(1e-3);
                let share = used.saturating_sub(was) as f64 / 1e6 / elapsed;
                self.limit(&name, *pid, quota_us(share, percent))?;
            }
        }
        Ok(())
    }

    fn limit(&self, name: &ContainerName, pid: u32, quota_us: u64) -> Result<(), String> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let Some(file) = find(&text, Path::new(CGROUPS)) else {
            tracing::warn!(%name, "its cgroup has no processor limit: it is not slowed down");
            return Ok(());
        };
        let state = self.state_file();
        let mut limits: Vec<Limit> = durable::read_json(&state).unwrap_or_default();
        if limits.iter().all(|limit| limit.file != file) {
            let before = std::fs::read_to_string(&file)
                .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
            limits.push(Limit {
                file: file.clone(),
                before: before.trim().to_owned(),
            });
            durable::write_json(&state, &limits)
                .map_err(|error| format!("cannot keep {}: {error}", state.display()))?;
        }
        tracing::info!(%name, quota_us, "slowed down, because it writes faster than the link carries");
        write(&file, &limit_text(&file, quota_us))
    }

    /// Puts every limit back as it was.
    pub(super) async fn unthrottle(&self) -> Result<(), String> {
        let state = self.state_file();
        let limits: Vec<Limit> = durable::read_json(&state).unwrap_or_default();
        for limit in limits.iter().filter(|limit| limit.file.exists()) {
            write(&limit.file, &limit.before)?;
        }
        match std::fs::remove_file(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("cannot remove {}: {error}", state.display()))
            }
            _ => Ok(()),
        }
    }

    fn state_file(&self) -> PathBuf {
        self.host.config.state_dir.join(FILE)
    }
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text)
        .map_err(|error| format!("cannot write {text:?} to {}: {error}", file.display()))
}

/// Microseconds a period for a container that used `share` processors and is to use `percent` less.
fn quota_us(share: f64, percent: u8) -> u64 {
    let left = share * (100.0 - f64::from(percent)) / 100.0;
    ((left * PERIOD_US as f64) as u64).max(QUOTA_US_MIN)
}

/// What a limit file takes: cgroup v2 has quota and period in one.
fn limit_text(file: &Path, quota_us: u64) -> String {
    if file.ends_with("cpu.max") {
        format!("{quota_us} {PERIOD_US}")
    } else {
        quota_us.to_string()
    }
}

/// The limit file of the cgroup in a `/proc/PID/cgroup`.
fn find(text: &str, root: &Path) -> Option<PathBuf> {
    let candidates = text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        if controllers.split(',').any(|name| name == "cpu") {
            return Some(root.join("cpu").join(path).join("cpu.cfs_quota_us"));
        }
        controllers
            .is_empty()
            .then(|| root.join(path).join("cpu.max"))
    });
    candidates.into_iter().find(|file| file.exists())
}

/// Processor time of a process, by itself and in the kernel, in microseconds.
fn used_us(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ticks(&text) * TICK_US
}

/// utime and stime stand 12th and 13th after the name, which may hold anything (proc_pid_stat(5)).
fn ticks(stat: &str) -> u64 {
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let words = rest.split_whitespace().skip(11).take(2);
    words.filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_was_used_less_the_percentage() {
        assert_eq!(quota_us(0.5, 20), 40_000);
        assert_eq!(quota_us(2.0, 50), 100_000);
        assert_eq!(quota_us(0.0, 95), QUOTA_US_MIN);
    }

    #[test]
    fn the_limit_file_of_either_version_is_found() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let file = root.path().join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            file
        };
        let unified = make("web/cpu.max");
        assert_eq!(find("0::/web\n", root.path()), Some(unified.clone()));
        let old = make("cpu/web/cpu.cfs_quota_us");
        let text = "6:freezer:/web\n4:cpu,cpuacct:/web\n0::/web\n";
        assert_eq!(find(text, root.path()), Some(old.clone()));
        assert_eq!(limit_text(&unified, 5000), "5000 100000");
        assert_eq!(limit_text(&old, 5000), "5000");
        assert_eq!(find("6:freezer:/db\n", root.path()), None);
    }

    #[test]
    fn processor_time_is_read_past_a_name_with_spaces() {
        let stat = "42 (a (b) c) S 1 1 1 0 -1 4194560 1 0 0 0 70 30 0 0 20 0 1 0 1 1";
        assert_eq!(ticks(stat), 100);
    }
}
