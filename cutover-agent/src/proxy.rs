//! The agent's side of the proxy's control socket: one command, one answer, one connection.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::hold::{Answer, Command, InFlight, LINE_BYTES_MAX, ServiceStatus};
use cutover_protocol::id::{Register, ServiceName};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::sockets;

/// What the proxy may add to a drain limit before we give up on its answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

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
}

impl Proxy {
    /// The proxy behind this socket; nothing is connected yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
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

    /// Gives a command that changes something and returns the service as it is afterwards.
    ///
    /// # Errors
    /// [`ProxyError`]; with [`ProxyError::NotDrained`] the gate holds.
    pub async fn command(&self, command: &Command) -> Result<ServiceStatus, ProxyError> {
        let drain_ms = if let Command::Hold { drain_ms_max, .. } = command {
            *drain_ms_max
        } else {
            0
        };
        match self
            .ask(command, ANSWER_MAX + Duration::from_millis(drain_ms))
            .await?
        {
            Answer::Done { service } => Ok(service),
            Answer::NotDrained { service, left } => Err(ProxyError::NotDrained {
                service: service.service,
                left,
            }),
            Answer::Refused {
                message, register, ..
            } => Err(ProxyError::Refused { message, register }),
            other @ Answer::Status { .. } => Err(unexpected(&other)),
        }
    }

    async fn ask(&self, command: &Command, limit: Duration) -> Result<Answer, ProxyError> {
        let unreachable = |source| ProxyError::Unreachable {
            path: self.path.clone(),
            source,
        };
        let exchange = async {
            let mut stream = sockets::dial(&self.path)?;
            let mut line = serde_json::to_vec(command)?;
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
                message, register, ..
            }) => Err(ProxyError::Refused { message, register }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(ProxyError::Nonsense(error.to_string())),
        }
    }
}

fn unexpected(answer: &Answer) -> ProxyError {
    ProxyError::Nonsense(format!("{answer:?}"))
}
