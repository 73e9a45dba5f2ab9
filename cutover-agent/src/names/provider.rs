//! Who keeps the zones: a name server that takes dynamic updates, or a [cloud](super::cloud) behind the same trait.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::update::{Change, TsigKey, Update, UpdateError};
use crate::preflight::now_ms;

/// How long one update may take.
const UPDATE_MAX: Duration = Duration::from_secs(10);

/// A zone could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The server cannot be asked.
    #[error("the name server {server} cannot be asked: {source}")]
    Unreachable {
        /// The server.
        server: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It was asked in vain.
    #[error("{server}: {source}")]
    Update {
        /// The server.
        server: SocketAddr,
        /// What it said.
        source: UpdateError,
    },
    /// A cloud did not do it.
    #[error("{cloud} did not change the zone: {reason}")]
    Cloud {
        /// Which.
        cloud: &'static str,
        /// What it, or the way to it, said.
        reason: String,
    },
}

/// What setting a name comes to.
pub type Setting<'a> = Pin<Box<dyn Future<Output = Result<(), ProviderError>> + Send + 'a>>;

/// Whoever can change zones.
pub trait Provider: std::fmt::Debug + Send + Sync {
    /// Replaces all addresses of a name, of the families that are given.
    fn set<'a>(&'a self, change: Change<'a>) -> Setting<'a>;
}

/// A name server that takes updates by RFC 2136, signed by TSIG.
#[derive(Debug)]
pub struct Rfc2136 {
    /// The zone's primary server.
    pub server: SocketAddr,
    /// The key it knows us by.
    pub key: TsigKey,
}

impl Provider for Rfc2136 {
    fn set<'a>(&'a self, change: Change<'a>) -> Setting<'a> {
        Box::pin(async move {
            let wrong = |source| ProviderError::Update {
                server: self.server,
                source,
            };
            let broken = |source| ProviderError::Unreachable {
                server: self.server,
                source,
            };
            let id = (now_ms() % 0xffff) as u16;
            let update = Update::new(&change, &self.key, id, now_ms() / 1000).map_err(wrong)?;
            let answer = tokio::time::timeout(UPDATE_MAX, ask(self.server, &update.message)).await;
            let answer = answer
                .map_err(|_| broken(std::io::ErrorKind::TimedOut.into()))?
                .map_err(broken)?;
            update.check(&answer, &self.key).map_err(wrong)
        })
    }
}

/// One question over TCP: an update may be larger than a datagram, and its sender must be who he says he is.
async fn ask(server: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let mut bytes = (message.len() as u16).to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.write_all(&bytes).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
