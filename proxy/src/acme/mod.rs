//! Certificates ordered over ACME (RFC 8555), for several proxies that share one folder.
//!
//! The folder holds everything: the account, the certificate, the answers to open challenges and the lock of
//! whoever orders. Any proxy that sees the folder answers any challenge, so it does not matter which of them the
//! authority reaches, nor whether a gate holds meanwhile.

mod folder;
mod keep;
mod lease;
mod order;
mod proof;

use std::sync::Arc;

use rustls::server::ResolvesServerCert;

use crate::config::{AcmeConfig, CertificateConfig};
use folder::Folder;
pub(crate) use keep::keep;
use proof::Proofs;
pub(crate) use proof::answer;

/// The application protocol by which an authority asks for a proof (RFC 8737).
pub(crate) const ALPN: &[u8] = b"acme-tls/1";

/// Where the ordered certificate is found once there is one. Chain and key are one file, so that they are replaced
/// together.
pub(crate) fn certificate_files(config: &AcmeConfig) -> CertificateConfig {
    let path = Folder::new(config).certificate();
    CertificateConfig {
        chain: path.clone(),
        key: path,
        ocsp: None,
    }
}

/// Shows proofs to authorities.
pub(crate) fn challenge_certificates(config: &AcmeConfig) -> Arc<dyn ResolvesServerCert> {
    Arc::new(Proofs::new(Folder::new(config)))
}
