//! Client processes, from the lab's side: started with a plan, told what to do all at once, and asked for their notes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::bench::hold::plan::{Group, Plan, Told};
use crate::command::{Shell, kill_group};
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};

/// Connections of one process at most: its open-file limit is far above, its thread is not.
const CONNECTIONS_MAX: usize = 5_000;
/// Connections that all processes together are opening at the same time.
const AT_ONCE: usize = 192;
/// How often an interruption is looked for, in milliseconds.
const LOOK_MS: u64 = 50;

/// Several client processes that do the same.
#[derive(Debug)]
pub struct Crowd {
    processes: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    name: String,
    child: Child,
    commands: ChildStdin,
    said: Receiver<String>,
}

impl Crowd {
    /// Starts as many processes as `groups` need, at least `processes_min`. `first` is the number of the first one: no
    /// two processes of a case may have the same.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn start(
        groups: &[Group],
        processes_min: usize,
        first: u32,
        lab: &Path,
        folder: &Path,
    ) -> Result<Self> {
        let connections: usize = groups.iter().map(|group| group.connections).sum();
        let count = connections.div_ceil(CONNECTIONS_MAX).max(processes_min);
        let processes = (0..count)
            .map(|index| {
                // Each gets its share of each group.
                let share = |total: usize| total / count + usize::from(index < total % count);
                let groups = groups.iter().map(|group| Group {
                    connections: share(group.connections),
                    ..*group
                });
                let plan = Plan {
                    process: first + u32::try_from(index).unwrap_or(u32::MAX),
                    at_once: (AT_ONCE / count).max(8),
                    groups: groups.collect(),
                };
                Client::start(&plan, lab, folder)
            })
            .collect::<Result<_>>()?;
        Ok(Self { processes })
    }

    /// How many processes it is.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.processes.len()).unwrap_or(u32::MAX)
    }

    /// Whether it is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }

    /// Tells all processes, without waiting.
    ///
    /// # Errors
    /// When one has ended.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.processes
            .iter_mut()
            .try_for_each(|client| client.tell(command))
    }

    /// Waits until all have done what they were told.
    ///
    /// # Errors
    /// When one has not after `limit`, or has ended.
    pub fn heard(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.processes
            .iter_mut()
            .try_for_each(|client| client.hear(deadline).map(drop))
    }

    /// Tells all, and waits until all have done it.
    ///
    /// # Errors
    /// As [`Self::heard`].
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<()> {
        self.tell(command)?;
        self.heard(limit)
    }

    /// The notes of all.
    ///
    /// # Errors
    /// As [`Self::heard`], and when they make no sense.
    pub fn report(&mut self, limit: Duration) -> Result<Told> {
        self.tell("report")?;
        let deadline = Instant::now() + limit;
        let mut all = Told::default();
        for client in &mut self.processes {
            let line = client.hear(deadline)?;
            let told: Told = serde_json::from_str(&line).map_err(|error| LabError::Output {
                program: "a client",
                what: format!("{error} in {}", &line[..line.len().min(200)]),
            })?;
            all.requests.extend(told.requests);
            all.faults.extend(told.faults);
        }
        Ok(all)
    }
}

impl Client {
    fn start(plan: &Plan, lab: &Path, folder: &Path) -> Result<Self> {
        let name = format!("client-{}", plan.process);
        let log = folder.join(format!("{name}.log"));
        let errors = File::create(&log).on("create", &log)?;
        let text = serde_json::to_string(plan).map_err(|error| LabError::Output {
            program: "the lab",
            what: error.to_string(),
        })?;
        let shell = Shell::new(lab).args(["hold-client", "--plan", &text]);
        let mut child = shell
            .prepare()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .on("start", lab)?;
        let (Some(commands), Some(out)) = (child.stdin.take(), child.stdout.take()) else {
            kill_group(&mut child);
            return Err(LabError::Output {
                program: "the lab",
                what: "a client without pipes".into(),
            });
        };
        let (sender, said) = sync_channel(1);
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            })
            .on("listen to", lab)?;
        Ok(Self {
            name,
            child,
            commands,
            said,
        })
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        let told = writeln!(self.commands, "{command}");
        told.map_err(|_| self.ended())
    }

    fn hear(&mut self, deadline: Instant) -> Result<String> {
        loop {
            match self.said.recv_timeout(Duration::from_millis(LOOK_MS)) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) if interrupt::requested() => {
                    return Err(LabError::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(LabError::Differs {
                        what: format!("{} did not do in time what it was told", self.name),
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn ended(&mut self) -> LabError {
        LabError::Differs {
            what: format!("{} has ended: {:?}", self.name, self.child.try_wait()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}
