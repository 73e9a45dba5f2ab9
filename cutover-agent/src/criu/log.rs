//! CRIU's own clock: how long it took until it ran one of its scripts, from the times in its log. Its statistics are
//! written too late for that: after the script in which it is parked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The script's line is among the last when CRIU is parked in it; so much of the log's end is looked at, in bytes.
const TAIL_BYTES: u64 = 64 << 10;

/// Milliseconds from CRIU's start to its running `script` (`post-dump`, `post-restore`), by the log at `path`.
#[must_use]
pub fn until_script_ms(path: &Path, script: &str) -> Option<u64> {
    let file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    let mut tail = vec![0; usize::try_from(length - start).ok()?];
    file.read_exact_at(&mut tail, start).ok()?;
    find(&String::from_utf8_lossy(&tail), script)
}

/// "(00.123456) Running post-dump scripts": seconds and microseconds; restores put the task's number before the text.
fn find(log: &str, script: &str) -> Option<u64> {
    let wanted = format!("Running {script} scripts");
    let line = log.lines().rev().find(|line| line.contains(&wanted))?;
    let (seconds, micros) = line.strip_prefix('(')?.split_once(')')?.0.split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    seconds.checked_mul(1000)?.checked_add(micros / 1000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_time_before_the_script_is_read() {
        let log = "(00.000123) Running pre-dump scripts\n(01.234567) Running post-dump scripts\n(09.0) x\n";
        assert_eq!(find(log, "post-dump"), Some(1234));
        assert_eq!(find(log, "post-restore"), None);
    }

    proptest! {
        #[test]
        fn no_log_makes_it_panic(text in "[()0-9.]{0,12} ?(Running post-dump scripts)?") {
            let _ = find(&text, "post-dump");
        }
    }
}
