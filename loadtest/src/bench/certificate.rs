//! The certificate of the TLS cases: self-signed, P-256, made anew for each run. It never leaves the run's folder.

use std::path::Path;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

use crate::lab::error::{LabError, OnFile, Result};

/// The name in the certificate.
pub const NAME: &str = "bench.test";

/// Writes `chain.pem`, `key.pem` and `both.pem` into `folder`.
///
/// # Errors
/// When the certificate cannot be made or written.
pub fn write(folder: &Path) -> Result<()> {
    let made = || {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&key)?;
        Ok((certificate.pem(), key.serialize_pem()))
    };
    let (chain, key) = made().map_err(|error: rcgen::Error| LabError::Output {
        program: "rcgen",
        what: error.to_string(),
    })?;
    let both = format!("{chain}{key}");
    for (name, text) in [("chain.pem", chain), ("key.pem", key), ("both.pem", both)] {
        let path = folder.join(name);
        std::fs::write(&path, text).on("write", &path)?;
    }
    Ok(())
}
