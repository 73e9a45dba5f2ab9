//! What the freeze benchmark runs.

use std::fmt;

use crate::lab::app::App;
use crate::lab::link::Link;

/// How changed memory is found; the words of plans.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// By the kernel; not on every one.
    SoftDirty,
    /// By content.
    Content,
    /// Not at all: everything crosses while frozen.
    None,
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::SoftDirty => "soft-dirty",
            Self::Content => "content",
            Self::None => "none",
        })
    }
}

/// One counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// Its memory, in MiB.
    pub memory_mb: u32,
    /// How much of it is written every second, in MiB.
    pub write_mb_s: u32,
}

impl Counter {
    /// What it is told. Counters with different seeds have no page in common.
    #[must_use]
    pub fn arguments(&self, seed: usize) -> Vec<String> {
        vec![
            "--seed".to_owned(),
            (seed + 1).to_string(),
            "--memory-mb".to_owned(),
            self.memory_mb.to_string(),
            "--write-mb-s".to_owned(),
            self.write_mb_s.to_string(),
        ]
    }
}

/// One hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// How changes are found.
    pub mode: Mode,
    /// In which order containers use the link; the words of plans.
    pub schedule: &'static str,
    /// One counter, or four.
    pub counters: Vec<Counter>,
}

impl Case {
    /// The lab's application for it.
    #[must_use]
    pub fn app(&self) -> App {
        if self.counters.len() == 1 {
            App::Counter
        } else {
            App::Counters
        }
    }

    /// The link it runs over where none is asked for. Schedules differ by what is sent again, so theirs is one that is the
    /// limit in every round; over a faster one reading takes longer than sending. Without rounds nothing is sent again, and
    /// all of it is waited for.
    #[must_use]
    pub const fn link(&self) -> Link {
        let is_quick = self.counters.len() == 1 || matches!(self.mode, Mode::None);
        if is_quick {
            Link::shaped(800.0, 20, 0.1)
        } else {
            Link::shaped(100.0, 80, 1.0)
        }
    }

    /// Memory of all counters, in MiB.
    #[must_use]
    pub fn memory_mb(&self) -> u32 {
        self.counters.iter().map(|counter| counter.memory_mb).sum()
    }

    /// Writes of all counters, in MiB a second.
    #[must_use]
    pub fn write_mb_s(&self) -> u32 {
        self.counters.iter().map(|counter| counter.write_mb_s).sum()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<String> = self
            .counters
            .iter()
            .map(|counter| format!("{}", counter.memory_mb))
            .collect();
        write!(
            formatter,
            "{}, {}: {} MiB, {} MiB/s written",
            self.mode,
            self.schedule,
            sizes.join("+"),
            self.write_mb_s()
        )
    }
}

/// Sizes of the four counters that move together, in MiB.
const FOUR: [u32; 4] = [400, 200, 100, 50];
/// What each of them writes, in MiB a second.
const EACH_WRITES_MB_S: u32 = 1;
/// Size and writes of one counter alone, in MiB and MiB a second.
const ALONE: [(u32, u32); 3] = [(128, 1), (256, 8), (512, 32)];
/// The words of plans.
const SCHEDULES: [&str; 4] = ["gang", "staircase", "sequential", "parallel"];

/// Every case in these modes: one counter in three sizes, then four of them under each schedule.
#[must_use]
pub fn all(modes: &[Mode]) -> Vec<Case> {
    let alone = modes.iter().flat_map(|mode| {
        ALONE.map(|(memory_mb, write_mb_s)| Case {
            mode: *mode,
            schedule: SCHEDULES[0],
            counters: vec![Counter {
                memory_mb,
                write_mb_s,
            }],
        })
    });
    let together = modes.iter().flat_map(|mode| {
        SCHEDULES.map(|schedule| Case {
            mode: *mode,
            schedule,
            counters: FOUR
                .map(|memory_mb| Counter {
                    memory_mb,
                    write_mb_s: EACH_WRITES_MB_S,
                })
                .to_vec(),
        })
    });
    alone.chain(together).collect()
}

/// The cases whose line contains `filter`.
#[must_use]
pub fn chosen(modes: &[Mode], filter: &str) -> Vec<Case> {
    let mut cases = all(modes);
    cases.retain(|case| case.to_string().contains(filter));
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_chooses_by_the_line_of_a_case() {
        let cases = chosen(&[Mode::Content, Mode::None], "none, gang: 400+200+100+50");
        assert_eq!(cases.len(), 1);
        assert_eq!((cases[0].memory_mb(), cases[0].app()), (750, App::Counters));
        assert_eq!(all(&[Mode::Content]).len(), 7);
    }

    #[test]
    fn four_move_over_a_slow_link_but_not_where_all_of_it_is_waited_for() {
        let links = |mode| {
            let cases = all(&[mode]);
            [&cases[0], &cases[6]].map(|case| case.link().to_string())
        };
        let (quick, slow) = ("800mbit,20ms,0.1%", "100mbit,80ms,1%");
        assert_eq!(links(Mode::Content), [quick, slow]);
        assert_eq!(links(Mode::SoftDirty), [quick, slow]);
        assert_eq!(links(Mode::None), [quick, quick]);
    }
}
