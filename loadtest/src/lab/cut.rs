//! A link that is cut in the middle of a hop: for a while no packet passes, in either direction, and nobody is told.

use std::cell::Cell;
use std::time::{Duration, Instant};

use cutover_protocol::hop::Phase;

use crate::lab::error::{LabError, Result};
use crate::lab::link::rule_on_arrival;
use crate::lab::netns::{Names, SITES};
use crate::progress::Progress;

/// How long a cut lasts: longer than the agents take a silent peer for alive.
pub const CUT: Duration = Duration::from_secs(5);

/// Cuts the link between the sites whenever one of its phases begins.
#[derive(Debug)]
pub struct Cutter<'a> {
    names: Names,
    phases: &'a [Phase],
    wanted: Cell<Option<Phase>>,
    since: Cell<Option<Instant>>,
    count: Cell<u32>,
}

impl<'a> Cutter<'a> {
    /// For the sites of `names`.
    #[must_use]
    pub const fn new(names: Names, phases: &'a [Phase]) -> Self {
        Self {
            names,
            phases,
            wanted: Cell::new(None),
            since: Cell::new(None),
            count: Cell::new(0),
        }
    }

    /// Hears a line of the hop: `Transfer ...` says that a phase begins, and each memory round says so.
    pub fn hear(&self, line: &str) {
        let began = line.strip_suffix(" ...").and_then(|name| name.parse().ok());
        if let Some(phase) = began.filter(|phase| self.phases.contains(phase)) {
            self.wanted.set(Some(phase));
        }
    }

    /// Cuts what is to be cut, and mends what was cut for long enough.
    ///
    /// # Errors
    /// When the packet filter cannot be changed.
    pub fn tend(&self, progress: &Progress) -> Result<()> {
        if self.since.get().is_some_and(|since| since.elapsed() >= CUT) {
            self.mend()?;
            progress.say("the link is whole again");
        }
        if self.since.get().is_some() {
            return Ok(());
        }
        if let Some(phase) = self.wanted.take() {
            self.filter("-I")?;
            self.since.set(Some(Instant::now()));
            self.count.set(self.count.get() + 1);
            progress.say(format!(
                "{phase} has begun: the link is cut for {} s",
                CUT.as_secs()
            ));
        }
        Ok(())
    }

    /// Ends with the hop: the link is whole.
    ///
    /// # Errors
    /// When the packet filter cannot be changed, or the hop committed before every phase had its cut.
    pub fn end(self, is_committed: bool) -> Result<()> {
        self.mend()?;
        if is_committed && (self.count.get() as usize) < self.phases.len() {
            return Err(LabError::Output {
                program: "the hop",
                what: format!("it was over after {} cuts of the link", self.count.get()),
            });
        }
        Ok(())
    }

    fn mend(&self) -> Result<()> {
        if self.since.take().is_some() {
            self.filter("-D")?;
        }
        Ok(())
    }

    fn filter(&self, verb: &str) -> Result<()> {
        SITES
            .into_iter()
            .try_for_each(|site| rule_on_arrival(&self.names.path(site), verb, &["-j", "DROP"]))
    }
}

impl Drop for Cutter<'_> {
    fn drop(&mut self) {
        // The world may be gone with its namespaces.
        let _ = self.mend();
    }
}
