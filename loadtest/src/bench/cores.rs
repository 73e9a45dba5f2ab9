//! Which core the proxy gets and which one everything else: client, origin and the lab itself.
//!
//! The proxy's core is shared with nothing of ours, so that the time the proxy used is all it could have used.

use std::fs;

use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::command::Shell;
use crate::lab::error::{LabError, Result};

/// Niceness of everything that is measured, and of what measures it.
const PRIORITY: i32 = -15;

/// The share of this session, where the kernel groups processes by session (sched(7), "The autogroup feature").
const SESSION: &str = "/proc/self/autogroup";

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

    /// Moves the calling thread, and with it all it starts from now on, off the proxy's core.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn leave_to_proxy(self) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(self.rest);
        sched_setaffinity(None, &set).map_err(|errno| LabError::Cores {
            why: errno.to_string(),
        })
    }
}

/// The right of way of what is measured over what else the machine does; dropping it gives it back.
///
/// Where the kernel groups processes by session, niceness counts only inside a session, so the session's own share is
/// raised too. Only root may; others measure with more noise.
#[derive(Debug)]
pub struct Ahead {
    session_before: Option<String>,
}

impl Ahead {
    /// Takes it for the calling thread and all it starts from now on.
    #[must_use]
    pub fn take() -> Self {
        let _ = setpriority_process(None, PRIORITY);
        let before = fs::read_to_string(SESSION).ok();
        let session_before =
            before.and_then(|text| Some(text.rsplit_once("nice ")?.1.trim().to_owned()));
        let _ = fs::write(SESSION, PRIORITY.to_string());
        Self { session_before }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let _ = setpriority_process(None, 0);
        if let Some(before) = &self.session_before {
            let _ = fs::write(SESSION, before);
        }
    }
}

/// A program that runs on core `number` only, and whatever it starts with it.
#[must_use]
pub fn on_core(number: usize, program: &str) -> Shell {
    // taskset replaces itself by the program, so the process id stays that of the child.
    Shell::new("taskset").args(["--cpu-list", &number.to_string(), program])
}
