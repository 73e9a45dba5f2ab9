//! Proofs that we control a name: a certificate that says so (RFC 8737), or a text at a known path.
//!
//! Both are read from the shared folder at the moment they are asked for, so that whichever proxy is asked can
//! answer at once. Only names with an open challenge have a file, and nobody else asks.

use std::fmt;
use std::sync::Arc;

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::folder::{Folder, is_token, read_small};
use crate::config::AcmeConfig;

/// Where an authority looks for a text (RFC 8555, section 8.3).
const HTTP_PREFIX: &[u8] = b"/.well-known/acme-challenge/";
/// SHA-256 of the key authorization.
const DIGEST_BYTES: usize = 32;

/// Makes certificates that prove control over a name.
pub(super) struct Proofs {
    folder: Folder,
}

impl Proofs {
    pub(super) const fn new(folder: Folder) -> Self {
        Self { folder }
    }

    fn certificate(&self, host: &str) -> Option<CertifiedKey> {
        let digest = read_small(&self.folder.tls_answer(host))?;
        let digest: [u8; DIGEST_BYTES] = digest.try_into().ok()?;
        let key = KeyPair::generate().ok()?;
        let mut params = CertificateParams::new([host.to_owned()]).ok()?;
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(&digest)];
        let certificate = params.self_signed(&key).ok()?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = any_ecdsa_type(&key).ok()?;
        Some(CertifiedKey::new(vec![certificate.der().clone()], key))
    }
}

impl fmt::Debug for Proofs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proofs").field(&self.folder).finish()
    }
}

impl ResolvesServerCert for Proofs {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // rustls takes only valid host names, which hold no slash.
        let host = hello.server_name()?.to_ascii_lowercase();
        self.certificate(&host).map(Arc::new)
    }
}

/// The text that proves control, if `path` asks for one and a challenge with that token is open in one of the
/// folders.
pub(crate) fn answer(configs: &[AcmeConfig], path: &[u8]) -> Option<Vec<u8>> {
    let token = path.strip_prefix(HTTP_PREFIX)?;
    let token = std::str::from_utf8(token)
        .ok()
        .filter(|token| is_token(token))?;
    configs
        .iter()
        .find_map(|config| read_small(&Folder::new(config).http_answer(token)))
}
