//! Certificates, keys and lists of authorities as they lie on disk.
//!
//! Every error names the file and says what to do about it. A key is never part of a message.

use std::io;
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Largest file that is read: a chain of ten large certificates has 50 KiB, a list of all authorities 300 KiB.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Why files cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}; check that it is there and that the proxy may read it", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not PEM where it should be.
    #[error("{path} is not valid PEM: {source}", path = path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// A PEM file without a certificate.
    #[error("{path} holds no certificate; it must hold the whole chain, the server's own first", path = path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A PEM file without a private key.
    #[error("{path} holds no private key", path = path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A certificate that makes no sense.
    #[error("the certificate in {path} cannot be used: {why}", path = path.display())]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A key of a kind we cannot use.
    #[error("the key in {path} cannot be used: {source}", path = path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// Two files that do not belong together.
    #[error("the key in {key} is not the one of the certificate in {chain}", key = key.display(), chain = chain.display())]
    Mismatch {
        /// The certificate's file.
        chain: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// A profile that could not serve anybody.
    #[error("the TLS profile \"{profile}\" has no usable certificate; put NAME.pem and NAME.key into {folder}", folder = folder.display())]
    NoneUsable {
        /// Its name.
        profile: Box<str>,
        /// Where they are looked for.
        folder: PathBuf,
    },
    /// A file of ticket keys with something else in it.
    #[error("line {line} of {path} is not a ticket key; each is 64 hexadecimal digits, such as `openssl rand -hex 32` prints", path = path.display())]
    BadTicketKey {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
    },
    /// A file of ticket keys without any, or with too many.
    #[error("{path} holds {count} ticket keys; it must hold 1 to {most}", path = path.display())]
    TicketKeyCount {
        /// The file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// Most there may be.
        most: usize,
    },
    /// The system has no authorities to trust.
    #[error(
        "the system has no certificates of authorities; install ca-certificates, or name a \"ca\""
    )]
    NoSystemRoots,
    /// The library refused the combination.
    #[error("cannot set up TLS for {what}: {source}")]
    SetUp {
        /// The profile or upstream.
        what: Box<str>,
        /// What the library said.
        source: rustls::Error,
    },
}

/// The whole of a file of sensible size.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > BYTES_MAX {
        return Err(unreadable(io::ErrorKind::FileTooLarge.into()));
    }
    std::fs::read(path).map_err(unreadable)
}

/// The certificates of a PEM file, at least one.
pub(super) fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain = chain.map_err(|source| TlsError::NotPem {
        path: path.to_owned(),
        source,
    })?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate {
            path: path.to_owned(),
        });
    }
    Ok(chain)
}

/// The private key of a PEM file.
pub(super) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|source| match source {
        pem::Error::NoItemsFound => TlsError::NoKey {
            path: path.to_owned(),
        },
        source => TlsError::NotPem {
            path: path.to_owned(),
            source,
        },
    })
}

/// The authorities of a PEM file, at least one.
pub(super) fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(path)? {
        roots
            .add(certificate)
            .map_err(|why| TlsError::BadCertificate {
                path: path.to_owned(),
                why: why.to_string(),
            })?;
    }
    Ok(roots)
}
