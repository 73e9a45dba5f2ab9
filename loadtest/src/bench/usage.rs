//! What a proxy's processes have used: processor time to the nanosecond, and resident memory.
//!
//! Processor time comes from each process's own clock. It counts all threads, also those that ended, in user and in
//! system mode, without the rounding to hundredths of a second of `/proc/PID/stat`.

use std::fs;
use std::mem::MaybeUninit;
use std::time::Duration;

/// The clock of a process that counts the time its threads ran (`CPUCLOCK_SCHED` of the kernel's clock numbers).
const CLOCK_OF_RUNNING: i32 = 2;

/// `pid` and all its descendants, as far as they live.
#[must_use]
pub fn family(pid: u32) -> Vec<u32> {
    let mut members = vec![pid];
    let mut next = 0;
    while let Some(parent) = members.get(next) {
        members.extend(children(*parent));
        next += 1;
    }
    members
}

/// The kernel lists children by the thread that started them.
fn children(parent: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let parsed = |list: String| -> Vec<u32> {
        let children = list.split_whitespace();
        children.filter_map(|child| child.parse().ok()).collect()
    };
    lists.flat_map(parsed).collect()
}

/// Processor time of `pids` since each began; a process that is gone counts nothing.
#[must_use]
pub fn processor_time(pids: &[u32]) -> Duration {
    pids.iter().filter_map(|pid| time_of(*pid)).sum()
}

fn time_of(pid: u32) -> Option<Duration> {
    // The kernel's numbering of clocks: the complement of the pid above three bits that name the kind.
    let clock = (!i32::try_from(pid).ok()?) << 3 | CLOCK_OF_RUNNING;
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the pointer is valid for one timespec, which the kernel fills when it returns 0.
    let time = unsafe {
        if libc::clock_gettime(clock, time.as_mut_ptr()) != 0 {
            return None;
        }
        time.assume_init()
    };
    let (seconds, nanoseconds) = (
        u64::try_from(time.tv_sec).ok()?,
        u32::try_from(time.tv_nsec).ok()?,
    );
    Some(Duration::new(seconds, nanoseconds))
}

/// Resident memory of `pids` in bytes; pages they share are counted once for each.
#[must_use]
pub fn resident_bytes(pids: &[u32]) -> u64 {
    let kibibytes = pids.iter().filter_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    kibibytes.sum::<u64>() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_time_grows_while_we_work_and_our_memory_is_not_nothing() {
        let own = [std::process::id()];
        let before = processor_time(&own);
        let mut sum = 0_u64;
        while processor_time(&own) < before + Duration::from_millis(2) {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        assert!(resident_bytes(&own) > 100 << 10);
    }

    #[test]
    fn a_process_that_is_gone_counts_nothing() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = [child.id()];
        child.wait().unwrap();
        assert_eq!(processor_time(&pid), Duration::ZERO);
        assert_eq!(resident_bytes(&pid), 0);
    }

    #[test]
    fn a_family_has_the_process_and_what_it_started() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let family = family(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(family.first(), Some(&std::process::id()));
        assert!(family.contains(&child.id()), "{family:?}");
    }
}
