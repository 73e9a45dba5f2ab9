//! TLS towards upstreams. A server is verified, always; there is no way to turn that off.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};

use super::files::{self, TlsError};
use super::profile::provider;
use crate::config::UpstreamTlsConfig;

/// How the servers of one group are spoken to.
#[derive(Debug, Clone)]
pub(crate) struct UpstreamTls {
    /// The settings, with the sessions to be taken up again: 256 servers at most, oldest out.
    pub(crate) config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl UpstreamTls {
    /// Loads what the group names; `protocols` are offered in that order.
    ///
    /// # Errors
    /// A file cannot be used, or the system has no authorities.
    pub(crate) fn load(
        group: &str,
        config: &UpstreamTlsConfig,
        protocols: &[&[u8]],
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
        built.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        // The session takes the keys over after the handshake.
        built.enable_secret_extraction = true;
        Ok(Self {
            config: Arc::new(built),
            name: config.name.clone(),
        })
    }

    /// The name that a server at `host` must prove to have; `None` where neither it nor the group has one.
    pub(crate) fn name(&self, host: &str) -> Option<ServerName<'static>> {
        let own = || ServerName::try_from(host.to_owned()).ok();
        self.name.clone().or_else(own)
    }
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
