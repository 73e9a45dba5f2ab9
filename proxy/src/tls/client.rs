//! TLS towards upstreams. A server is verified, always; there is no way to turn that off.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};

use super::files::{self, TlsError};
use super::profile::provider;
use super::stream::TlsStream;
use crate::config::{UpstreamProtocol, UpstreamTlsConfig};
use crate::stream::{Socket, Stream};
use crate::upstream::Address;

/// How often a group's servers are complained about.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// How the servers of one group are spoken to.
#[derive(Debug, Clone)]
pub(crate) struct UpstreamTls {
    /// The settings, with the sessions to be taken up again: 256 servers at most, oldest out.
    config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
    group: Box<str>,
    complained: Arc<Mutex<Option<Instant>>>,
}

impl UpstreamTls {
    /// Loads what the group names.
    ///
    /// # Errors
    /// A file cannot be used, or the system has no authorities.
    pub(crate) fn load(
        group: &str,
        config: &UpstreamTlsConfig,
        protocol: UpstreamProtocol,
    ) -> Result<Self, TlsError> {
        let roots = match &config.ca {
            Some(path) => files::roots(path)?,
            None => system_roots()?,
        };
        let set_up = |source| TlsError::SetUp {
            what: group.into(),
            source,
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(set_up)?
            .with_root_certificates(roots);
        let mut built = match &config.certificate {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder
                .with_client_auth_cert(files::chain(chain)?, files::key(key)?)
                .map_err(|source| TlsError::BadKey {
                    path: key.clone(),
                    source,
                })?,
        };
        built.alpn_protocols = match protocol {
            // What every server speaks that is not asked; raw services have no name for it at all.
            UpstreamProtocol::Http1 => Vec::new(),
            UpstreamProtocol::Http2 => vec![b"h2".to_vec()],
        };
        // The session takes the keys over after the handshake.
        built.enable_secret_extraction = true;
        Ok(Self {
            config: Arc::new(built),
            name: config.name.clone(),
            group: group.into(),
            complained: Arc::default(),
        })
    }

    /// Shakes hands with a server of the group over a fresh connection.
    ///
    /// # Errors
    /// The socket failed, `limit` passed, or the server is not who it should be; nothing of a request has left us.
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub(crate) async fn connect(
        &self,
        socket: Socket,
        server: &Address,
        limit: Duration,
    ) -> io::Result<Stream> {
        let name = self
            .name(server)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, UpstreamTlsError::NoName))?;
        let shaken = TlsStream::connect(socket, &self.config, name, limit).await;
        let stream = shaken.inspect_err(|error| self.complain(server, error))?;
        let agreed = stream.agreed().protocol.as_deref();
        let wanted = self.config.alpn_protocols.first().map(Vec::as_slice);
        if agreed != wanted {
            let error = UpstreamTlsError::OtherProtocol;
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            self.complain(server, &error);
            return Err(error);
        }
        Ok(Stream::Tls(Box::new(stream)))
    }

    /// A server that cannot be verified needs an operator, but not a line for every request.
    fn complain(&self, server: &Address, error: &io::Error) {
        // A server that is down or slow shows elsewhere.
        if error.kind() != io::ErrorKind::InvalidData {
            return;
        }
        let mut last = self
            .complained
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() > COMPLAIN_EVERY) {
            *last = Some(Instant::now());
            tracing::warn!(group = %self.group, %server, "no TLS session with the server: {error}");
        }
    }

    /// The name that a server must prove to have: that of the group, or else the one it was configured by, never
    /// one that DNS has answered with.
    fn name(&self, server: &Address) -> Option<ServerName<'static>> {
        if let Some(name) = &self.name {
            return Some(name.clone());
        }
        match server {
            Address::Socket(address) => Some(ServerName::from(address.ip())),
            Address::Name { name, .. } => ServerName::try_from(without_dot(name)).ok(),
            Address::Service(name) => {
                // _http._tcp.app.internal is a service of app.internal (RFC 6125, section 6.4).
                let host = name.split('.').skip_while(|label| label.starts_with('_'));
                let host = host.collect::<Vec<_>>().join(".");
                ServerName::try_from(without_dot(&host)).ok()
            }
            Address::Unix(_) => None,
        }
    }
}

/// What can be wrong with a server besides its session.
#[derive(Debug, thiserror::Error)]
enum UpstreamTlsError {
    #[error("no name to verify the server by; give its [upstream.tls] a \"name\"")]
    NoName,
    #[error(
        "the server does not speak the group's \"protocol\" over TLS; check what it offers by ALPN"
    )]
    OtherProtocol,
}

fn without_dot(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_owned()
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // What of it cannot be read or parsed is as good as not installed.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(TlsError::NoSystemRoots);
    }
    Ok(roots)
}
