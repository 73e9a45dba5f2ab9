//! The keys that have to outlive a process: of connection ids, stateless resets and address tokens.
//!
//! All three are derived from 64 random bytes in the state folder. A proxy that was killed and started again
//! answers the packets of its lost connections with resets that their clients recognise; a successor reads the
//! ids of its predecessor. Nothing here protects what clients send: that is TLS.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::aead::quic::{AES_128, HeaderProtectionKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, KeyType, Prk};
use aws_lc_rs::hmac;

use super::connection_id::PlaceCodec;

/// Name of the file in the state folder.
const FILE: &str = "quic.key";
const SECRET_BYTES: usize = 64;

/// The keys file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the key of QUIC connection ids in {} cannot be used; let this user read and write it, or remove it", .path.display())]
pub struct SecretsError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// Keys for every endpoint of the process.
#[derive(Clone)]
pub(crate) struct Secrets {
    pub(crate) codec: Arc<PlaceCodec>,
    pub(crate) resets: Arc<hmac::Key>,
    pub(crate) tokens: Arc<Prk>,
}

impl Secrets {
    /// Reads the file, or makes it.
    ///
    /// # Errors
    /// It can be neither read nor made, or is too short to be one of ours.
    pub(crate) fn open(folder: &Path) -> Result<Self, SecretsError> {
        let path = folder.join(FILE);
        let secret = load_or_create(&path).map_err(|source| SecretsError { path, source })?;
        Ok(Self::derive(&secret))
    }

    fn derive(secret: &[u8; SECRET_BYTES]) -> Self {
        let root = hkdf::Salt::new(HKDF_SHA256, b"hopgate quic").extract(secret);
        let codec = HeaderProtectionKey::new(&AES_128, &expand::<16>(&root, b"connection id"));
        let resets = expand::<32>(&root, b"stateless reset");
        let tokens = expand::<32>(&root, b"address token");
        Self {
            // The key has the length AES-128 asks for.
            codec: Arc::new(PlaceCodec::new(codec.unwrap_or_else(|_| unreachable!()))),
            resets: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &resets)),
            tokens: Arc::new(hkdf::Salt::new(HKDF_SHA256, b"").extract(&tokens)),
        }
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secrets")
    }
}

/// So many bytes for this purpose.
fn expand<const COUNT: usize>(root: &Prk, purpose: &[u8]) -> [u8; COUNT] {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut out = [0; COUNT];
    // HKDF can make 255 hashes' worth of bytes; these are one.
    if let Ok(bytes) = root.expand(&[purpose], Length(COUNT)) {
        bytes.fill(&mut out).ok();
    }
    out
}

fn load_or_create(path: &Path) -> io::Result<[u8; SECRET_BYTES]> {
    let mut secret = [0; SECRET_BYTES];
    match File::open(path) {
        Ok(mut file) => {
            file.read_exact(&mut secret)?;
            return Ok(secret);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    aws_lc_rs::rand::fill(&mut secret).map_err(io::Error::other)?;
    // Renamed into place, so that a crash leaves no half of it: a short file would stop the next start.
    let fresh = path.with_extension("key.new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&fresh)?;
    file.write_all(&secret)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::listen::quic::connection_id::Addressee;
    use crate::listen::quic::connection_id::tests::short_packet;

    #[test]
    fn a_second_start_reads_the_connection_ids_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Secrets::open(folder.path()).unwrap();
        let second = Secrets::open(folder.path()).unwrap();
        let packet = short_packet(&first.codec, 5, 3);
        let Addressee::Place(place) = second.codec.addressee(&packet) else {
            panic!("not recognised");
        };
        assert_eq!((place.generation.0, place.worker), (5, 3));
        let mode = std::fs::metadata(folder.path().join(FILE)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_short_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), b"short").unwrap();
        let error = Secrets::open(folder.path()).unwrap_err();
        let path = folder.path().join(FILE);
        assert_eq!(
            error.to_string(),
            format!(
                "the key of QUIC connection ids in {} cannot be used; let this user read and write it, or remove it",
                path.display()
            )
        );
    }
}
