//! The memory watermark: above it we take no more work, long before the kernel ends the process with everybody in it.
//!
//! The control thread looks about once a second and tells the workers. The decision is a function of two numbers;
//! reading them never fails the proxy: what cannot be read does not limit.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Limits;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pressure ends this many hundredths below the watermark, so that it does not flicker.
const RELIEF_PERCENT: u64 = 95;

/// Where the watermark is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watermark {
    /// Resident bytes of the process; zero for no such limit.
    pub(crate) resident_bytes_max: u64,
    /// Hundredths of the memory limit of our control group that the whole group may use; zero for no such limit.
    pub(crate) cgroup_percent_max: u64,
}

/// Whether there is too little memory for new work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pressure {
    /// There is enough.
    Relaxed,
    /// There is not.
    Pressed,
}

/// Memory in use at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of this process.
    pub(crate) resident_bytes: u64,
    /// Of our control group, if it has a limit: in use, and the limit.
    pub(crate) cgroup_bytes: Option<(u64, u64)>,
}

impl Watermark {
    /// What a look means after what the last one meant.
    pub(crate) fn judge(self, before: Pressure, usage: Usage) -> Pressure {
        let is_over = |used: u64, most: u64| match before {
            Pressure::Relaxed => used > most,
            Pressure::Pressed => used > most / 100 * RELIEF_PERCENT,
        };
        let by_process =
            self.resident_bytes_max > 0 && is_over(usage.resident_bytes, self.resident_bytes_max);
        let by_group = self.cgroup_percent_max > 0
            && usage
                .cgroup_bytes
                .is_some_and(|(used, limit)| is_over(used, limit / 100 * self.cgroup_percent_max));
        if by_process || by_group {
            Pressure::Pressed
        } else {
            Pressure::Relaxed
        }
    }

    /// What these limits ask for.
    pub(crate) const fn of(limits: &Limits) -> Self {
        Self {
            resident_bytes_max: limits.memory_bytes_max,
            cgroup_percent_max: limits.memory_percent_max,
        }
    }

    /// Whether there is anything to look at.
    const fn is_set(self) -> bool {
        self.resident_bytes_max > 0 || self.cgroup_percent_max > 0
    }
}

/// What all threads know of the pressure: a flag for whoever has a request in hand, a channel for whoever waits.
#[derive(Debug)]
pub(crate) struct Memory {
    pressed: AtomicBool,
    changes: watch::Sender<Pressure>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            pressed: AtomicBool::new(false),
            changes: watch::Sender::new(Pressure::Relaxed),
        }
    }
}

impl Memory {
    /// Whether new work has to be refused; one relaxed load.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }

    /// Sees every later change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Pressure> {
        self.changes.subscribe()
    }

    /// Tells everybody, if it is news.
    pub(crate) fn set(&self, pressure: Pressure) {
        self.pressed
            .store(pressure == Pressure::Pressed, Ordering::Relaxed);
        self.changes.send_if_modified(|known| {
            let is_news = *known != pressure;
            *known = pressure;
            is_news
        });
    }

    /// Completes when new work may be taken.
    pub(crate) async fn relaxed(&self) {
        if self.is_pressed() {
            let mut changes = self.subscribe();
            // The sender is ours.
            drop(
                changes
                    .wait_for(|pressure| *pressure == Pressure::Relaxed)
                    .await,
            );
        }
    }

    /// Looks about once a second, for ever.
    pub(crate) async fn keep(self: Arc<Self>, mark: Watermark) {
        if !mark.is_set() {
            self.set(Pressure::Relaxed);
            return;
        }
        let gauge = Gauge::open();
        loop {
            let before = self.pressure();
            let usage = gauge.usage();
            let now = mark.judge(before, usage);
            if now != before {
                tracing::warn!(?usage, "memory: {now:?}");
            }
            self.set(now);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What was told last.
    fn pressure(&self) -> Pressure {
        *self.changes.borrow()
    }
}

/// Reads the system's numbers.
#[derive(Debug)]
pub(crate) struct Gauge {
    cgroup: Option<PathBuf>,
}

impl Gauge {
    /// Finds our control group. Version 2 only: version 1 has no single place to look.
    pub(crate) fn open() -> Self {
        let group = std::fs::read_to_string("/proc/self/cgroup").ok();
        let cgroup = group.as_deref().and_then(cgroup_path);
        Self { cgroup }
    }

    /// What is in use now; zero or nothing where the system does not say.
    pub(crate) fn usage(&self) -> Usage {
        let status = std::fs::read_to_string("/proc/self/status");
        let resident_bytes = status.ok().and_then(|text| resident(&text));
        let group = self.cgroup.as_deref();
        Usage {
            resident_bytes: resident_bytes.unwrap_or(0),
            cgroup_bytes: group.and_then(|folder| cgroup_usage(folder).ok().flatten()),
        }
    }
}

/// `VmRSS:     1234 kB`; the unit is always that.
fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let number = line.trim().strip_suffix(" kB")?;
    number.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// The line of version 2 begins with `0::`.
fn cgroup_path(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

/// In use without what the kernel can drop at once (the page cache nobody used lately), and the limit.
fn cgroup_usage(folder: &Path) -> io::Result<Option<(u64, u64)>> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name));
    let Ok(limit) = read("memory.max")?.trim().parse::<u64>() else {
        // The word "max".
        return Ok(None);
    };
    let current = read("memory.current")?.trim().parse::<u64>().unwrap_or(0);
    let stat = read("memory.stat")?;
    Ok(Some((current.saturating_sub(inactive_file(&stat)), limit)))
}

fn inactive_file(stat: &str) -> u64 {
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Watermark = Watermark {
        resident_bytes_max: 1_000,
        cgroup_percent_max: 90,
    };

    fn using(resident_bytes: u64) -> Usage {
        Usage {
            resident_bytes,
            cgroup_bytes: None,
        }
    }

    #[test]
    fn pressure_begins_above_the_mark_and_ends_a_little_below_it() {
        use Pressure::{Pressed, Relaxed};
        for (before, used, after) in [
            (Relaxed, 1_000, Relaxed),
            (Relaxed, 1_001, Pressed),
            (Pressed, 1_000, Pressed),
            (Pressed, 951, Pressed),
            (Pressed, 950, Relaxed),
        ] {
            assert_eq!(MARK.judge(before, using(used)), after, "{before:?} {used}");
        }
    }

    #[test]
    fn a_control_group_near_its_limit_is_pressure() {
        let group = |used| Usage {
            resident_bytes: 0,
            cgroup_bytes: Some((used, 10_000)),
        };
        assert_eq!(
            MARK.judge(Pressure::Relaxed, group(9_000)),
            Pressure::Relaxed
        );
        assert_eq!(
            MARK.judge(Pressure::Relaxed, group(9_001)),
            Pressure::Pressed
        );
    }

    #[test]
    fn without_a_mark_nothing_is_pressure() {
        let none = Watermark {
            resident_bytes_max: 0,
            cgroup_percent_max: 0,
        };
        assert!(!none.is_set());
        let all = Usage {
            resident_bytes: u64::MAX,
            cgroup_bytes: Some((10, 10)),
        };
        assert_eq!(none.judge(Pressure::Relaxed, all), Pressure::Relaxed);
    }

    #[test]
    fn the_system_says_how_much_is_in_use() {
        let text = "12:memory:/old\n0::/system.slice/hopgate.service\n";
        let path = cgroup_path(text).unwrap();
        assert_eq!(
            path,
            Path::new("/sys/fs/cgroup/system.slice/hopgate.service")
        );
        assert_eq!(resident("Name:\tx\nVmRSS:\t    1234 kB\n"), Some(1_263_616));
        assert_eq!(inactive_file("anon 5\ninactive_file 4096\n"), 4096);
        assert!(Gauge::open().usage().resident_bytes > 1 << 16);
    }

    #[test]
    fn a_control_group_without_a_limit_does_not_limit() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        assert_eq!(cgroup_usage(folder.path()).unwrap(), None);
        write("memory.max", "8192\n");
        write("memory.current", "5000\n");
        write("memory.stat", "anon 1\ninactive_file 1000\n");
        assert_eq!(cgroup_usage(folder.path()).unwrap(), Some((4000, 8192)));
    }

    #[test]
    fn everybody_hears_of_a_change_once() {
        let memory = Memory::default();
        let mut changes = memory.subscribe();
        memory.set(Pressure::Relaxed);
        assert!(!changes.has_changed().unwrap());
        memory.set(Pressure::Pressed);
        assert!(memory.is_pressed() && changes.has_changed().unwrap());
        assert_eq!(*changes.borrow_and_update(), Pressure::Pressed);
        memory.set(Pressure::Pressed);
        assert!(!changes.has_changed().unwrap());
    }
}
