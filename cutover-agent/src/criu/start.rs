//! When a CRIU began. Its log tells time from the log's own beginning; before that a process was started, its libraries
//! were bound, and its caller's request was read.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::ticks::{TICK_US, behind_name};

/// Milliseconds from the start of process `pid` until it made the file `log`: never more than it was. `None` when either
/// is gone, or the file system does not note when files are made.
///
/// The kernel tells the start in clock ticks since the machine's (proc_pid_stat(5), field 22), and rounds down, so that one
/// tick is taken off.
#[must_use]
pub(crate) fn ms_before_log(pid: u32, log: &Path) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = start_ticks(&stat)?;
    let started = Duration::from_micros(ticks.checked_add(1)?.checked_mul(TICK_US)?);
    let made = statx(CWD, log, AtFlags::empty(), StatxFlags::BTIME).ok()?;
    if made.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return None;
    }
    let made = Duration::new(
        u64::try_from(made.stx_btime.tv_sec).ok()?,
        made.stx_btime.tv_nsec,
    );
    // Both clocks go on alike, but for who sets the time of day just now.
    let now = since_epoch(clock_gettime(ClockId::Realtime))?;
    let up = since_epoch(clock_gettime(ClockId::Boottime))?;
    let before = made.checked_sub(now.checked_sub(up)? + started);
    Some(before.unwrap_or_default().as_millis() as u64)
}

/// Field 22.
fn start_ticks(stat: &str) -> Option<u64> {
    behind_name(stat, 19)
}

fn since_epoch(time: Timespec) -> Option<Duration> {
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let behind = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        for name in ["criu", "a) b", "1 2 3 ("] {
            assert_eq!(start_ticks(&format!("77 ({name}) {behind}")), Some(4711));
        }
        assert_eq!(start_ticks("77 (criu) S 1 2"), None);
        assert_eq!(start_ticks(""), None);
    }

    #[test]
    fn a_file_that_is_older_than_its_process_takes_no_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut later = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let before = ms_before_log(later.id(), file.path());
        later.kill().unwrap();
        later.wait().unwrap();
        assert!(matches!(before, Some(0) | None), "{before:?}");
    }

    #[test]
    fn a_file_of_this_process_was_made_after_its_start() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let up = since_epoch(clock_gettime(ClockId::Boottime)).unwrap();
        let before = ms_before_log(std::process::id(), file.path());
        assert!(
            before.is_none_or(|before| u128::from(before) <= up.as_millis()),
            "{before:?}"
        );
        assert_eq!(
            ms_before_log(std::process::id(), Path::new("/there/is/none")),
            None
        );
        assert_eq!(ms_before_log(u32::MAX, file.path()), None);
    }
}
