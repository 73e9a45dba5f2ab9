//! What a person sees while the lab works: on a terminal a live line below the finished ones, elsewhere plain lines.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Prints finished steps as lines and the current one live. Cheap to clone; all clones share one display.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// A display on standard error, so that standard output carries only the report.
    #[must_use]
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            started: Instant::now(),
        }
    }

    /// A display of plain lines only, for a console that is read by another lab.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            bar: None,
            started: Instant::now(),
        }
    }

    /// A finished fact: one line that stays.
    pub fn say(&self, line: impl AsRef<str>) {
        let line = format!(
            "{:7.1} s  {}",
            self.started.elapsed().as_secs_f64(),
            line.as_ref()
        );
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// What is going on now: replaced by the next one on a terminal, left out elsewhere.
    pub fn now(&self, line: impl Into<String>) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.into());
        }
    }

    /// Lets `print` write without the live line in its way.
    pub fn aside(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Whether there is a live line at all.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.bar.is_some()
    }

    /// Removes the live line.
    pub fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
