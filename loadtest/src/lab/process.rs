//! A long-running process of the world: started in a namespace, logging to a file, ended with the world.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::command::{CommandError, Shell, kill_group};
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};

/// How long a process may take to end after SIGTERM, in seconds.
const TERM_S: u64 = 5;

/// One process; dropping it ends it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `shell` with both outputs in `RUN/NAME.log`, appended when the same name ran before.
    ///
    /// # Errors
    /// When the log cannot be made or the program not started.
    pub fn start(name: &str, shell: &Shell, run: &Path) -> Result<Self> {
        let log = run.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .on("create", &log)?;
        let again = file.try_clone().on("open", &log)?;
        let mut command = shell.prepare();
        command.stdout(file).stderr(again);
        let child = command.spawn().map_err(|source| CommandError::Start {
            line: shell.line(),
            source,
        })?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Its process id (`nsenter` becomes the program itself).
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` holds.
    ///
    /// # Errors
    /// When the process ends first, or `limit` passes; the end of its log is part of the message.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let mut ended = None;
        let is_ready = interrupt::wait_until(limit, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || ready()
        });
        match ended {
            Some(status) => Err(LabError::Ended {
                name: self.name.clone(),
                status: status.to_string(),
                said: self.said(),
            }),
            None if is_ready => Ok(()),
            None if interrupt::requested() => Err(LabError::Interrupted),
            None => {
                let (what, hint) = (
                    format!("{} becoming ready", self.name),
                    format!("; it said: {}", self.said()),
                );
                Err(LabError::NotInTime {
                    what,
                    seconds: limit.as_secs(),
                    hint,
                })
            }
        }
    }

    /// Whether it still runs.
    pub fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it at once with everything of its process group, as a power failure would.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// The last lines of its log.
    #[must_use]
    pub fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(4)..].join(" | ")
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.lives() {
            return;
        }
        interrupt::shielded(|| {
            self.signal(Signal::TERM);
            if !interrupt::wait_until(Duration::from_secs(TERM_S), || !self.lives()) {
                kill_group(&mut self.child);
            }
        });
    }
}
