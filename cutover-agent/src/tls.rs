//! Mutual TLS between the agents: TLS 1.3 only, one pinned authority, and the peer known by its role.
//!
//! This is the only place that reads keys or decides whom to trust. Both directions check chain *and* name: an agent
//! that holds a good certificate of the wrong role is refused, so two sources can never talk to each other by mistake.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;

/// The three files that make an agent's identity, all PEM.
#[derive(Debug, Clone)]
pub struct TlsPaths {
    /// Certificate of the authority both agents trust.
    pub ca: PathBuf,
    /// This agent's certificate.
    pub certificate: PathBuf,
    /// This agent's private key.
    pub key: PathBuf,
}

/// Why there is no trusted connection; each says what to do about it.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {reason}; `cutover-agent pki --dir DIR` makes the certificates")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason, in its own words.
        reason: String,
    },
    /// A file is there, but holds no PEM of the kind needed.
    #[error("{path} holds no {wanted} in PEM form: check that the right file is named")]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        wanted: &'static str,
    },
    /// Certificate and key are not a pair.
    #[error(
        "the key {key} does not belong to the certificate {certificate}: name the two that were made together"
    )]
    KeyMismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// A file's content is well-formed PEM, but unusable.
    #[error("{path} cannot be used")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The library's reason.
        source: rustls::Error,
    },
    /// The peer's certificate comes from somebody else's authority.
    #[error(
        "the peer's certificate was not issued by our authority: both sites need the same ca.pem"
    )]
    WrongAuthority,
    /// The peer has a good certificate, but is not the one we talk to.
    #[error(
        "the peer's certificate is not made out to \"{expected}\": it may be another agent, or have the other role's certificate"
    )]
    WrongRole {
        /// The role that was expected of it.
        expected: String,
    },
    /// The peer showed no certificate.
    #[error("the peer showed no certificate: it is not a cutover-agent")]
    NoCertificate,
    /// A certificate's time is over or has not begun.
    #[error(
        "the peer's certificate is not valid at this time: check both clocks, or make new certificates"
    )]
    NotInTime,
    /// The peer looked at our certificate and said no.
    #[error(
        "the peer refused our certificate ({reason}): both sites need the same ca.pem, and each its own role's certificate"
    )]
    Refused {
        /// The alert it sent.
        reason: String,
    },
    /// Any other failure of the handshake.
    #[error("the TLS handshake failed")]
    Handshake {
        /// The library's reason.
        source: rustls::Error,
    },
}

/// Everything an agent needs to open connections to a peer.
#[derive(Debug, Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) expected: ServerName<'static>,
}

/// Everything an agent needs to accept connections from its peer.
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    expected: ServerName<'static>,
}

impl ClientTls {
    /// Loads the files; `expected` is the role the peer's certificate must name (`target` when we are the source).
    ///
    /// # Errors
    /// When a file is missing, not PEM, or the key does not belong to the certificate.
    pub fn load(paths: &TlsPaths, expected: &str) -> Result<Self, TlsError> {
        let identity = Identity::load(paths)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| TlsError::Handshake { source })?
            .with_root_certificates(identity.roots)
            .with_client_auth_cert(identity.chain, identity.key)
            .map_err(|source| unusable(paths, source))?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            expected: role(expected)?,
        })
    }
}

impl ServerTls {
    /// Loads the files; `expected` is the role the peer's certificate must name (`source` when we are the target).
    ///
    /// # Errors
    /// When a file is missing, not PEM, or the key does not belong to the certificate.
    pub fn load(paths: &TlsPaths, expected: &str) -> Result<Self, TlsError> {
        let identity = Identity::load(paths)?;
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::new(identity.roots),
            Arc::clone(&provider),
        )
        .build()
        .map_err(|_| TlsError::NotPem {
            path: paths.ca.clone(),
            wanted: "certificate",
        })?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| TlsError::Handshake { source })?
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain, identity.key)
            .map_err(|source| unusable(paths, source))?;
        // Connections last for a whole hop: a ticket would only be one more secret to keep.
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            expected: role(expected)?,
        })
    }

    /// Checks the name in the certificate of a peer whose chain the handshake has already verified.
    ///
    /// # Errors
    /// When there is none, or it names another role.
    pub(crate) fn check_role(&self, chain: Option<&[CertificateDer<'_>]>) -> Result<(), TlsError> {
        let leaf = chain
            .and_then(<[_]>::first)
            .ok_or(TlsError::NoCertificate)?;
        let wrong = || TlsError::WrongRole {
            expected: self.expected.to_str().into_owned(),
        };
        let parsed = ParsedCertificate::try_from(leaf).map_err(|_| wrong())?;
        verify_server_name(&parsed, &self.expected).map_err(|_| wrong())
    }
}

/// Turns what the TLS library reports inside an IO error into one of our sentences; `None` when TLS was not to blame.
pub(crate) fn explain(error: &std::io::Error, expected: &str) -> Option<TlsError> {
    let source = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match source {
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => TlsError::WrongAuthority,
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => TlsError::WrongRole {
            expected: expected.to_owned(),
        },
        rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => TlsError::NotInTime,
        rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
        rustls::Error::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied),
        ) => TlsError::Refused {
            reason: format!("{alert:?}"),
        },
        other => TlsError::Handshake {
            source: other.clone(),
        },
    })
}

struct Identity {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&paths.ca)? {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Unusable {
                    path: paths.ca.clone(),
                    source,
                })?;
        }
        let chain = certificates(&paths.certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(&read(&paths.key)?).map_err(|_| TlsError::NotPem {
                path: paths.key.clone(),
                wanted: "private key",
            })?;
        Ok(Self { roots, chain, key })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let parsed: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match parsed {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::NotPem {
            path: path.to_owned(),
            wanted: "certificate",
        }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| TlsError::Read {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn unusable(paths: &TlsPaths, source: rustls::Error) -> TlsError {
    match source {
        rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch {
            certificate: paths.certificate.clone(),
            key: paths.key.clone(),
        },
        source => TlsError::Unusable {
            path: paths.certificate.clone(),
            source,
        },
    }
}

fn role(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::WrongRole {
        expected: name.to_owned(),
    })
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(folder: &Path, name: &str) -> TlsPaths {
        TlsPaths {
            ca: folder.join("ca.pem"),
            certificate: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
        }
    }

    #[test]
    fn a_missing_file_is_named_with_the_command_that_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        let text = ClientTls::load(&site(folder.path(), "source"), "target")
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("ca.pem") && text.contains("cutover-agent pki"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_is_not_pem_is_named() {
        let folder = tempfile::tempdir().unwrap();
        crate::pki::create(folder.path()).unwrap();
        let mut paths = site(folder.path(), "source");
        std::fs::write(&paths.certificate, "not a certificate").unwrap();
        let text = ServerTls::load(&paths, "target").unwrap_err().to_string();
        assert!(
            text.contains("source.pem holds no certificate in PEM form"),
            "{text}"
        );
        paths.certificate = folder.path().join("target.pem");
        let text = ServerTls::load(&paths, "target").unwrap_err().to_string();
        assert!(
            text.contains("source.key does not belong to the certificate"),
            "{text}"
        );
        std::fs::write(&paths.key, "").unwrap();
        let text = ServerTls::load(&paths, "target").unwrap_err().to_string();
        assert!(text.contains("source.key holds no private key"), "{text}");
    }
}
