//! Which core the proxy gets and which one everything else: client, origin and the lab itself.
//!
//! The proxy's core is shared with nothing of ours, so that the time the proxy used is all it could have used.

use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::command::Shell;
use crate::lab::error::{LabError, Result};

/// Niceness of everything that is measured, and of what measures it.
const PRIORITY: i32 = -15;

/// The two cores of a benchmark, by the kernel's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cores {
    /// The proxy's.
    pub proxy: usize,
    /// That of client, origin and the lab.
    pub rest: usize,
}

impl Cores {
    /// The first two cores this process may run on.
    ///
    /// # Errors
    /// When there is only one: client and proxy would then measure each other.
    pub fn find() -> Result<Self> {
        let allowed = sched_getaffinity(None).map_err(|errno| LabError::Cores {
            why: errno.to_string(),
        })?;
        let mut numbers = (0..CpuSet::MAX_CPU).filter(|number| allowed.is_set(*number));
        match (numbers.next(), numbers.next()) {
            (Some(proxy), Some(rest)) => Ok(Self { proxy, rest }),
            _ => Err(LabError::Cores {
                why: "this process may use only one".into(),
            }),
        }
    }

    /// Moves the calling thread, and with it all it starts from now on, off the proxy's core, and ahead of what else
    /// the machine does.
    ///
    /// # Errors
    /// When the kernel refuses the core.
    pub fn leave_to_proxy(self) -> Result<()> {
        // Only root may; others measure with more noise.
        let _ = setpriority_process(None, PRIORITY);
        let mut set = CpuSet::new();
        set.set(self.rest);
        sched_setaffinity(None, &set).map_err(|errno| LabError::Cores {
            why: errno.to_string(),
        })
    }
}

/// A program that runs on core `number` only, and whatever it starts with it.
#[must_use]
pub fn on_core(number: usize, program: &str) -> Shell {
    // taskset replaces itself by the program, so the process id stays that of the child.
    Shell::new("taskset").args(["--cpu-list", &number.to_string(), program])
}
