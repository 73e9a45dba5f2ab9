//! Connections to the proxy: TCP, TLS over it, and the one QUIC endpoint of a process.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::Endpoint;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::Fault;
use crate::bench::certificate::NAME;
use crate::bench::client::channel::tls_config;
use crate::bench::hold::plan::{Group, Kind};

/// Bytes there and back.
pub(super) trait Talks: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Talks for T {}

/// A connection, in clear or not.
pub(super) type Wire = Box<dyn Talks>;

/// What TLS and QUIC need.
pub(super) struct Config {
    http1: Arc<rustls::ClientConfig>,
    http2: Arc<rustls::ClientConfig>,
    endpoint: Option<Endpoint>,
}

fn tls(protocol: &[u8]) -> io::Result<Arc<rustls::ClientConfig>> {
    let config = tls_config().map_err(|fault| io::Error::other(fault.to_string()))?;
    let mut config = Arc::unwrap_or_clone(config);
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(Arc::new(config))
}

impl Config {
    /// Inside a runtime, for its sockets.
    pub(super) fn new(groups: &[Group]) -> io::Result<Self> {
        let has_h3 = groups.iter().any(|group| group.kind == Kind::H3);
        Ok(Self {
            http1: tls(b"http/1.1")?,
            http2: tls(b"h2")?,
            endpoint: if has_h3 { Some(endpoint()?) } else { None },
        })
    }

    pub(super) fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    /// Tells all servers of QUIC that we leave.
    pub(super) fn close(&self) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.close(0_u32.into(), b"left");
        }
    }
}

fn endpoint() -> io::Result<Endpoint> {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let mut endpoint = Endpoint::client(any)?;
    let tls = Arc::unwrap_or_clone(tls(b"h3")?);
    let quic = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(quic)));
    Ok(endpoint)
}

/// Connects as the group does.
pub(super) async fn wire(config: &Config, group: &Group) -> Result<Wire, Fault> {
    let stream = super::connect(group.address).await?;
    let tls = match group.kind {
        Kind::Tls => &config.http1,
        Kind::H2 => &config.http2,
        _ => return Ok(Box::new(stream)),
    };
    let name = ServerName::try_from(NAME).map_err(|_| Fault::Malformed)?;
    let stream = TlsConnector::from(Arc::clone(tls))
        .connect(name, stream)
        .await?;
    Ok(Box::new(stream))
}
