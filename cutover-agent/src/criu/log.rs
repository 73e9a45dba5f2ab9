//! CRIU's own clock: how long it took until it was parked, from the times in its log. Its statistics are
//! written too late for that: after the script in which it is parked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::park::SCRIPT;

/// A script's line is among the first or the last when CRIU is parked in it; so much of either end is looked at, in bytes.
const END_BYTES: u64 = 64 << 10;

/// Milliseconds from CRIU's start to where a restore is parked, by the log at `path`.
#[must_use]
pub fn restore_ms(path: &Path) -> Option<u64> {
    milliseconds(last(&tail(path)?, "post-restore")?)
}

/// Milliseconds that a dump took from where it was parked first to where it is parked last, by the log at `path`.
#[must_use]
pub fn dump_ms(path: &Path) -> Option<u64> {
    let end = milliseconds(last(&tail(path)?, "post-dump")?)?;
    let mut head = vec![0; usize::try_from(END_BYTES).ok()?];
    let length = File::open(path).ok()?.read_at(&mut head, 0).ok()?;
    Some(end.saturating_sub(released(&String::from_utf8_lossy(&head[..length])).unwrap_or(0)))
}

fn tail(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    let start = length.saturating_sub(END_BYTES);
    let mut tail = vec![0; usize::try_from(length - start).ok()?];
    file.read_exact_at(&mut tail, start).ok()?;
    Some(String::from_utf8_lossy(&tail).into_owned())
}

/// The last line that says that a script runs.
fn last<'a>(log: &'a str, script: &str) -> Option<&'a str> {
    let wanted = format!("Running {script} scripts");
    log.lines().rev().find(|line| line.contains(&wanted))
}

/// When the first script let a dump go on, in milliseconds: the time of what CRIU says after it has named our script.
fn released(log: &str) -> Option<u64> {
    let mut lines = log.lines();
    lines.find(|line| line.contains("Running pre-dump scripts"))?;
    lines.find(|line| line.ends_with(&format!("/{SCRIPT}]")))?;
    lines.find_map(milliseconds)
}

/// "(00.123456) Running post-dump scripts": seconds and microseconds, here to the nearest millisecond; restores put the
/// task's number before the text.
fn milliseconds(line: &str) -> Option<u64> {
    let (seconds, micros) = line.strip_prefix('(')?.split_once(')')?.0.split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    seconds
        .checked_mul(1000)?
        .checked_add(micros.saturating_add(500) / 1000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_time_between_the_scripts_is_read() {
        let log = "(00.037123) Running pre-dump scripts\n(00.037150) \tRPC\n(00.037200) \t[/state/park/db/hook.sh]\n\
                   (03.000123) irmap: Searching irmap cache in work dir\n(04.234567) Running post-dump scripts\n";
        assert_eq!(released(log), Some(3000));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), log).unwrap();
        assert_eq!(dump_ms(file.path()), Some(1235));
        assert_eq!(restore_ms(file.path()), None);
    }

    proptest! {
        #[test]
        fn no_log_makes_it_panic(text in "[()0-9.]{0,12} ?(Running post-dump scripts)?") {
            let _ = last(&text, "post-dump").and_then(milliseconds);
            let _ = released(&text);
        }
    }
}
