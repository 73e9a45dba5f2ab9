//! The shared folder: which file is where, and how it is written so that nobody ever reads half of one.
//!
//! Names of files are made from host names and tokens that have been checked; nothing a client sends leads out of
//! the folder.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::config::AcmeConfig;

/// Longest answer to a challenge: a token and a thumbprint in base64, at most.
const ANSWER_BYTES_MAX: u64 = 1024;
/// Longest token that is looked up. Authorities use 43 characters.
const TOKEN_BYTES_MAX: usize = 128;

/// One certificate's folder.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    root: PathBuf,
    /// The first name of the certificate, which tells it from others in the same folder.
    name: Box<str>,
}

impl Folder {
    pub(super) fn new(config: &AcmeConfig) -> Self {
        Self {
            root: config.folder.clone(),
            name: config.names.first().cloned().unwrap_or_default(),
        }
    }

    /// Chain and key.
    pub(super) fn certificate(&self) -> PathBuf {
        self.root.join(format!("{}.pem", self.name))
    }

    /// The account at the authority.
    pub(super) fn account(&self) -> PathBuf {
        self.root.join("account.json")
    }

    /// Who is ordering, and until when.
    pub(super) fn lease(&self) -> PathBuf {
        self.root.join(format!("{}.lease", self.name))
    }

    fn challenges(&self) -> PathBuf {
        self.root.join("challenges")
    }

    /// The answer that is served over HTTP.
    pub(super) fn http_answer(&self, token: &str) -> PathBuf {
        self.challenges().join(token)
    }

    /// The digest that is shown over TLS.
    pub(super) fn tls_answer(&self, host: &str) -> PathBuf {
        self.challenges().join(format!("{host}.tls-alpn-01"))
    }

    /// Makes what is missing of the folder, for nobody else to look into.
    pub(super) fn make(&self) -> io::Result<()> {
        fs::create_dir_all(self.challenges())
    }

    /// Replaces a file as a whole. Readable by its owner only: some of them are keys.
    pub(super) fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = path.with_file_name(name);
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            // What is left of it is of no use to anybody.
            fs::remove_file(&new).ok();
        }
        written
    }
}

/// Whether a text may be the name of an answer: base64 for URLs and nothing else, so no dots and no slashes.
pub(super) fn is_token(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=TOKEN_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

/// A small file, if it is there.
pub(super) fn read_small(path: &Path) -> Option<Vec<u8>> {
    let length = fs::metadata(path).ok()?.len();
    (length <= ANSWER_BYTES_MAX)
        .then(|| fs::read(path).ok())
        .flatten()
}
