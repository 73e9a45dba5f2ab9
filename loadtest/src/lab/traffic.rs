//! Bytes on the wide-area link while a hop runs, and from them how long it will still take.

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::lab::world::World;
use crate::progress::Progress;

/// How often a plain line is printed where there is no terminal, in seconds.
const LINE_S: u64 = 2;

/// The counter of the source's end of the link.
#[derive(Debug)]
pub struct Traffic {
    counters: PathBuf,
    before: u64,
    began: Instant,
    /// How much the last hop of this application sent, if one is known.
    expected: Option<u64>,
    memory: PathBuf,
    printed: Cell<(Instant, u64)>,
}

impl Traffic {
    /// Starts counting, by the namespace of the source agent with this process id.
    #[must_use]
    pub fn watch(agent: u32, world: &World, progress: &Progress) -> Self {
        let counters = PathBuf::from(format!("/proc/{agent}/net/dev"));
        let lab = world
            .run
            .path
            .parent()
            .map(PathBuf::from)
            .unwrap_or_default();
        let memory = lab.join(format!("bytes-{}", world.app.as_str()));
        let expected = fs::read_to_string(&memory)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        progress.now("the hop begins");
        let now = Instant::now();
        let mut traffic = Self {
            counters,
            before: 0,
            began: now,
            expected,
            memory,
            printed: Cell::new((now, 0)),
        };
        traffic.before = traffic.total().unwrap_or(0);
        traffic
    }

    /// Bytes sent towards the target since the start, headers included.
    fn total(&self) -> Option<u64> {
        let table = fs::read_to_string(&self.counters).ok()?;
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("wan:"))?;
        // The ninth number of /proc/net/dev is the bytes transmitted.
        line.split_whitespace().nth(8)?.parse().ok()
    }

    fn sent(&self) -> u64 {
        self.total()
            .unwrap_or(self.before)
            .saturating_sub(self.before)
    }

    /// Shows what was sent and what is left.
    pub fn show(&self, progress: &Progress) {
        let bytes = self.sent();
        let (sent, seconds) = (bytes as f64 / 1e6, self.began.elapsed().as_secs_f64());
        let left = match self.expected.map(|bytes| bytes as f64 / 1e6) {
            Some(expected) if sent > 1.0 && expected > sent => {
                format!(", about {:.0} s left", seconds * (expected - sent) / sent)
            }
            _ => String::new(),
        };
        let line = format!("hopping: {sent:.1} MB sent in {seconds:.0} s{left}");
        if progress.is_live() {
            progress.now(line);
            return;
        }
        // Plain lines only while something moves.
        let (at, shown) = self.printed.get();
        if at.elapsed() >= Duration::from_secs(LINE_S) && bytes > shown + (1 << 20) {
            self.printed.set((Instant::now(), bytes));
            progress.say(format!("  {line}"));
        }
    }

    /// Keeps the sum for the next run's estimate.
    pub fn remember(&self) {
        // Only an estimate depends on it.
        let _ = fs::write(&self.memory, self.sent().to_string());
    }
}
