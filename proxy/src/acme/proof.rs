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

/// How an authority's question begins (RFC 8555, section 8.3).
const HTTP_QUESTION: &[u8] = b"GET /.well-known/acme-challenge/";
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

/// The text that proves control, if the head asks for one and a challenge with that token is open in one of the
/// folders. Anything else is none of our business.
pub(crate) fn answer(configs: &[AcmeConfig], head: &[u8]) -> Option<Vec<u8>> {
    if configs.is_empty() {
        return None;
    }
    let rest = head.strip_prefix(HTTP_QUESTION)?;
    let token = rest.split(|byte| *byte == b' ').next()?;
    let token = std::str::from_utf8(token)
        .ok()
        .filter(|token| is_token(token))?;
    let mut folders = configs.iter().map(Folder::new);
    folders.find_map(|folder| read_small(&folder.http_answer(token)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_an_open_challenge_is_answered_and_no_path_leads_out_of_the_folder() {
        let shared = tempfile::tempdir().unwrap();
        std::fs::write(shared.path().join("secret"), "s").unwrap();
        std::fs::create_dir(shared.path().join("challenges")).unwrap();
        std::fs::write(shared.path().join("challenges/To-k_en1"), "proof").unwrap();
        let config = config(shared.path());
        let ask = |head: &str| answer(std::slice::from_ref(&config), head.as_bytes());
        let known = "GET /.well-known/acme-challenge/To-k_en1 HTTP/1.1\r\n\r\n";
        assert_eq!(ask(known).unwrap(), b"proof");
        for other in [
            "other",
            "../secret",
            "..%2fsecret",
            "",
            "To-k_en1?x",
            "/etc/passwd",
        ] {
            let head = format!("GET /.well-known/acme-challenge/{other} HTTP/1.1\r\n\r\n");
            assert_eq!(ask(&head), None, "{other}");
        }
        assert_eq!(ask(&known.replace("GET", "POST")), None);
        assert_eq!(answer(&[], known.as_bytes()), None);
    }

    fn config(folder: &Path) -> AcmeConfig {
        AcmeConfig {
            directory: "https://ca.example/".into(),
            contact: Vec::new(),
            names: vec!["site.example".into()],
            folder: folder.to_owned(),
            ca: None,
            renew_before: Duration::from_secs(1),
            challenges: Vec::new(),
        }
    }
}
