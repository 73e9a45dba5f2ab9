//! The agent's side of the proxy's control socket: one command, one answer, one connection.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::hold::{
    Answer, Claim, Command, InFlight, LINE_BYTES_MAX, Order, Refusal, ServiceStatus,
};
use cutover_protocol::id::{Holder, Register, ServiceName};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::{Instant, sleep};

use crate::sockets;

/// What the proxy may add to a drain limit before we give up on its answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Pause before a proxy is asked again that gives way to a new process just now.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// The proxy could not be commanded.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// Nobody answers on the socket.
    #[error(
        "cannot reach the proxy at {path}: {source}; is hopgate-proxy running with this `control`?"
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It did not answer in time.
    #[error("the proxy at {path} did not answer within {seconds} s")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        seconds: u64,
    },
    /// It answered something else.
    #[error("the proxy's answer makes no sense: {0}")]
    Nonsense(String),
    /// It refused.
    #[error("the proxy refused: {message}")]
    Refused {
        /// Of which kind.
        reason: Refusal,
        /// In the proxy's words.
        message: String,
        /// The register that beat us.
        register: Option<Register>,
    },
    /// The hold stands but something is still in flight.
    #[error("{service} did not drain in time: {} left, the oldest {}", .left.len(), oldest(.left))]
    NotDrained {
        /// The service.
        service: ServiceName,
        /// What is left.
        left: Vec<InFlight>,
    },
}

fn oldest(left: &[InFlight]) -> String {
    left.first().map_or_else(
        || "an idle connection to the source".to_owned(),
        |first| {
            format!(
                "{} from {} for {} ms",
                first.what, first.client, first.age_ms
            )
        },
    )
}

/// A proxy behind its control socket.
#[derive(Debug, Clone)]
pub struct Proxy {
    path: PathBuf,
    claim: Claim,
}

impl Proxy {
    /// The proxy behind this socket, commanded in nobody's name; nothing is connected yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            claim: Claim::Nobody,
        }
    }

    /// The same, commanded in this holder's name: what it holds, nobody else decides about.
    #[must_use]
    pub fn in_name_of(self, holder: Holder) -> Self {
        Self {
            claim: Claim::Holder(holder),
            ..self
        }
    }

    /// One service's status.
    ///
    /// # Errors
    /// [`ProxyError`].
    pub async fn status(&self, service: &ServiceName) -> Result<ServiceStatus, ProxyError> {
        let command = Command::Status {
            service: Some(service.clone()),
        };
        match self.ask(&command, ANSWER_MAX).await? {
            Answer::Status { mut services } if services.len() == 1 => Ok(services.remove(0)),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives a command that changes one service and returns that as it is afterwards.
    ///
    /// # Errors
    /// [`ProxyError`]; with [`ProxyError::NotDrained`] the gate holds.
    pub async fn command(&self, command: &Command) -> Result<ServiceStatus, ProxyError> {
        match self.ask(command, answer_max(command)).await? {
            Answer::Done { service } => Ok(service),
            Answer::NotDrained { service, left } => Err(ProxyError::NotDrained {
                service: service.service,
                left,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives a command that changes several services, all of them or none.
    ///
    /// # Errors
    /// [`ProxyError`]; nothing was changed then, also with [`ProxyError::NotDrained`].
    pub async fn command_all(&self, command: &Command) -> Result<Vec<ServiceStatus>, ProxyError> {
        match self.ask(command, answer_max(command)).await? {
            Answer::DoneAll { services } => Ok(services),
            Answer::RefusedAll {
                service,
                reason: Refusal::NotDrained,
                left,
                ..
            } => Err(ProxyError::NotDrained { service, left }),
            Answer::RefusedAll {
                service,
                reason,
                message,
                ..
            } => Err(ProxyError::Refused {
                reason,
                message: format!("{service}: {message}"),
                register: None,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks again for as long as the proxy is busy being replaced: whoever answers then knows the same register.
    async fn ask(&self, command: &Command, limit: Duration) -> Result<Answer, ProxyError> {
        let give_up = Instant::now() + limit;
        loop {
            match self.ask_once(command, limit).await {
                Err(ProxyError::Refused {
                    reason: Refusal::Busy,
                    ..
                }) if Instant::now() + BUSY_PAUSE < give_up => sleep(BUSY_PAUSE).await,
                answered => return answered,
            }
        }
    }

    async fn ask_once(&self, command: &Command, limit: Duration) -> Result<Answer, ProxyError> {
        let unreachable = |source| ProxyError::Unreachable {
            path: self.path.clone(),
            source,
        };
        let exchange = async {
            let mut stream = sockets::dial(&self.path)?;
            let order = Order {
                claim: self.claim.clone(),
                command: command.clone(),
            };
            let mut line = serde_json::to_vec(&order)?;
            line.push(b'\n');
            stream.write_all(&line).await?;
            let mut answer = String::new();
            BufReader::new(stream)
                .take(LINE_BYTES_MAX as u64)
                .read_line(&mut answer)
                .await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = tokio::time::timeout(limit, exchange)
            .await
            .map_err(|_| ProxyError::Silent {
                path: self.path.clone(),
                seconds: limit.as_secs(),
            })?
            .map_err(unreachable)?;
        if answer.is_empty() {
            return Err(unreachable(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&answer) {
            Ok(Answer::Refused {
                reason,
                message,
                register,
            }) => Err(ProxyError::Refused {
                reason,
                message,
                register,
            }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(ProxyError::Nonsense(error.to_string())),
        }
    }
}

/// A drain takes as long as it may.
const fn answer_max(command: &Command) -> Duration {
    match command {
        Command::Hold { drain_ms_max, .. } | Command::HoldAll { drain_ms_max, .. } => {
            ANSWER_MAX.saturating_add(Duration::from_millis(*drain_ms_max))
        }
        _ => ANSWER_MAX,
    }
}

fn unexpected(answer: &Answer) -> ProxyError {
    ProxyError::Nonsense(format!("{answer:?}"))
}

#[cfg(test)]
mod tests {
    use cutover_protocol::id::{Epoch, Site};
    use tokio::net::UnixListener;

    use super::*;

    const REFUSED_BUSY: &str =
        "{\"answer\":\"refused\",\"reason\":\"busy\",\"message\":\"an upgrade is under way\"}\n";
    const DONE: &str = "{\"answer\":\"done\",\"service\":{\"service\":\"web\",\"register\":{\"epoch\":2,\"owner\":\"target\"},\
        \"gate\":\"holding\",\"in_flight\":0,\"upstream_connections\":0,\"held_now\":0,\"held\":0,\"released\":0,\"gave_up\":0,\"evicted\":0}}\n";
    const NONE_HELD: &str = "{\"answer\":\"refused_all\",\"service\":\"db\",\"reason\":\"not_drained\",\"message\":\"m\",\
        \"left\":[{\"client\":\"c\",\"what\":\"tcp\",\"age_ms\":7}],\"services\":[]}\n";

    /// A proxy that says these lines, one a connection, and what it was told.
    fn proxy_that_says(
        folder: &tempfile::TempDir,
        lines: &'static [&'static str],
    ) -> tokio::task::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(folder.path().join("control.sock")).unwrap();
        tokio::spawn(async move {
            let mut told = Vec::new();
            for line in lines {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let mut command = String::new();
                stream.read_line(&mut command).await.unwrap();
                told.push(command);
                stream.write_all(line.as_bytes()).await.unwrap();
            }
            told
        })
    }

    #[tokio::test]
    async fn a_proxy_that_gives_way_to_a_new_process_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = proxy_that_says(&folder, &[REFUSED_BUSY, REFUSED_BUSY, DONE]);
        let holder = "hop-1".parse().unwrap();
        let ours = Proxy::new(&folder.path().join("control.sock")).in_name_of(holder);
        let commit = Command::Commit {
            service: "web".parse().unwrap(),
            epoch: Epoch(1),
            to: Site::Target,
        };
        let status = ours.command(&commit).await.unwrap();
        assert_eq!(status.register.owner, Site::Target);
        let told = proxy.await.unwrap();
        let line = "{\"claim\":{\"holder\":\"hop-1\"},\"command\":\"commit\",\"service\":\"web\",\"epoch\":1,\"to\":\"target\"}\n";
        assert_eq!(told, [line; 3]);
    }

    #[tokio::test]
    async fn what_keeps_one_of_several_services_from_draining_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = proxy_that_says(&folder, &[NONE_HELD]);
        let ours = Proxy::new(&folder.path().join("control.sock"));
        let hold = Command::HoldAll {
            services: Vec::new(),
            lease_ms: 1,
            drain_ms_max: 1,
        };
        let error = ours.command_all(&hold).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "db did not drain in time: 1 left, the oldest tcp from c for 7 ms"
        );
        proxy.await.unwrap();
    }
}
