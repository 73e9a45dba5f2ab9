//! The commands of a hop, as the agent of the source would give them, to all services of the proxy in turn.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::hold::{Answer, Command, LINE_BYTES_MAX, ServiceStatus};
use cutover_protocol::id::{Epoch, ServiceName, Site};

use crate::lab::error::{LabError, Result};

/// Longest wait for the proxy's answer beyond what a command may take, in seconds.
const ANSWER_S: u64 = 60;
/// How long a hold may go on without being renewed, in milliseconds: longer than any case.
const LEASE_MS: u64 = 600_000;
/// Longest a drain may take, in milliseconds.
const DRAIN_MS_MAX: u64 = 30_000;

/// The lab's end of a control socket; each command has a connection of its own, so that it survives the proxy.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// For the proxy with this socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Whether a proxy answers.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.status().is_ok()
    }

    fn ask(&self, command: &Command) -> Result<Answer> {
        let told = || {
            let stream = UnixStream::connect(&self.socket)?;
            let limit = Some(Duration::from_secs(ANSWER_S));
            stream.set_read_timeout(limit)?;
            stream.set_write_timeout(limit)?;
            let mut stream = BufReader::new(stream);
            let line = serde_json::to_string(command)? + "\n";
            stream.get_mut().write_all(line.as_bytes())?;
            let mut answer = String::new();
            stream.take(LINE_BYTES_MAX as u64).read_line(&mut answer)?;
            Ok(serde_json::from_str(&answer)?)
        };
        told().map_err(|error: std::io::Error| LabError::Differs {
            what: format!("{command:?} got no answer from the proxy: {error}"),
        })
    }

    fn done(&self, command: &Command) -> Result<ServiceStatus> {
        match self.ask(command)? {
            Answer::Done { service } => Ok(service),
            other => Err(LabError::Differs {
                what: format!("{command:?} was answered by {other:?}"),
            }),
        }
    }

    /// Memory that the held of all services keep, by the proxy's own count.
    ///
    /// # Errors
    /// When the proxy does not answer.
    pub fn held_bytes(&self) -> Result<u64> {
        let services = self.status()?;
        let budgets = services.iter().filter_map(|service| service.budget);
        Ok(budgets.map(|budget| budget.held_bytes).sum())
    }

    /// All services.
    ///
    /// # Errors
    /// When the proxy does not answer.
    pub fn status(&self) -> Result<Vec<ServiceStatus>> {
        match self.ask(&Command::Status { service: None })? {
            Answer::Status { services } => Ok(services),
            other => Err(LabError::Differs {
                what: format!("a status was answered by {other:?}"),
            }),
        }
    }

    /// Requests held by all services now.
    ///
    /// # Errors
    /// When the proxy does not answer.
    pub fn held_now(&self) -> Result<u64> {
        Ok(self.status()?.iter().map(|service| service.held_now).sum())
    }

    /// Holds `service` at `epoch`, and returns when it is drained.
    ///
    /// # Errors
    /// When it is not.
    pub fn hold_one(&self, service: &ServiceName, epoch: Epoch) -> Result<()> {
        let command = Command::Hold {
            service: service.clone(),
            epoch,
            lease_ms: LEASE_MS,
            drain_ms_max: DRAIN_MS_MAX,
        };
        self.done(&command).map(drop)
    }

    /// Holds all services, and returns when they are drained.
    ///
    /// # Errors
    /// When one is not.
    pub fn hold(&self) -> Result<()> {
        for service in self.status()? {
            self.hold_one(&service.service, service.register.epoch)?;
        }
        Ok(())
    }

    /// Commits all services to the site that does not own them.
    ///
    /// # Errors
    /// When one is refused.
    pub fn commit(&self) -> Result<()> {
        for service in self.status()? {
            let to = match service.register.owner {
                Site::Source => Site::Target,
                Site::Target => Site::Source,
            };
            self.done(&Command::Commit {
                service: service.service,
                epoch: service.register.epoch,
                to,
            })?;
        }
        Ok(())
    }

    /// Decides all holds in favour of who owns them.
    ///
    /// # Errors
    /// When one is refused.
    pub fn abort(&self) -> Result<()> {
        for service in self.status()? {
            self.done(&Command::Abort {
                service: service.service,
                epoch: service.register.epoch,
            })?;
        }
        Ok(())
    }

    /// Releases all services, decided before, to their owners.
    ///
    /// # Errors
    /// When one is refused.
    pub fn release(&self) -> Result<()> {
        for service in self.status()? {
            self.done(&Command::Release {
                service: service.service,
                epoch: service.register.epoch,
                to: service.register.owner,
            })?;
        }
        Ok(())
    }
}
