//! Who commands: what the kernel says of the other end of a control connection, for the audit log.

use tokio::net::UnixStream;

use super::events::Events;
use super::seen::Happening;

/// Whoever has connected.
#[derive(Debug, Clone, Default)]
pub(super) struct Peer {
    uid: Option<u32>,
    pid: Option<i32>,
    /// The name of its program as it was when it connected: by the time of a command it may be gone.
    comm: Option<String>,
}

impl Peer {
    /// As the kernel knows it.
    pub(super) fn of(stream: &UnixStream) -> Self {
        let Ok(credentials) = stream.peer_cred() else {
            return Self::default();
        };
        let comm = credentials.pid().and_then(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Some(name.trim_end().to_owned())
        });
        Self {
            uid: Some(credentials.uid()),
            pid: credentials.pid(),
            comm,
        }
    }

    /// Notes a command that may change something.
    pub(super) fn audit(&self, events: &Events, command: &str, outcome: &str) {
        let Self { uid, pid, comm } = self;
        tracing::info!(target: "audit", ?uid, ?pid, comm, command, outcome);
        events.tell(|| Happening::Command {
            uid: *uid,
            pid: *pid,
            comm: comm.clone(),
            command: command.to_owned(),
            outcome: outcome.to_owned(),
        });
    }

    /// Notes a question.
    pub(super) fn audit_question(&self, command: &str, outcome: &str) {
        let Self { uid, pid, comm } = self;
        tracing::debug!(target: "audit", ?uid, ?pid, comm, command, outcome);
    }
}
