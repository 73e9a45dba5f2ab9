//! Session tickets: a client brings its session back, to this proxy or to another with the same key file.
//!
//! The proxy keeps no sessions, so nothing grows with clients. The first key of the file seals, all of them open;
//! what a ticket says is sealed with a key of its own for each policy about client certificates, so that no ticket
//! carries a client around a stricter one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use aws_lc_rs::rand;
use rustls::server::ProducesTickets;

use super::files::{self, TlsError};

/// Keys in one file: one that seals, one or more that used to, and one that will.
const KEYS_MAX: usize = 16;
const SECRET_BYTES: usize = 32;
/// A ticket tells by this which key sealed it.
const NAME_BYTES: usize = 16;
const TIME_BYTES: usize = 8;
/// How long a session may be taken up again. RFC 8446 allows a week; whoever learns a key file can read the
/// sessions of that time.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// Largest ticket a client may bring; ours are below 4 KiB even with a chain of client certificates inside.
const TICKET_BYTES_MAX: usize = 16 * 1024;

/// Seals and opens tickets.
pub(super) struct Tickets {
    file: Option<PathBuf>,
    /// What the keys are bound to.
    policy: Vec<u8>,
    keys: ArcSwap<Keys>,
}

struct Keys {
    /// Never empty; the first seals.
    keys: Vec<Key>,
    since: Instant,
}

struct Key {
    name: [u8; NAME_BYTES],
    secret: [u8; SECRET_BYTES],
    cipher: LessSafeKey,
}

impl Tickets {
    /// Reads the keys of a file, or makes one that stays in memory.
    ///
    /// # Errors
    /// The file cannot be read or holds something else.
    pub(super) fn new(file: Option<PathBuf>, policy: Vec<u8>) -> Result<Self, TlsError> {
        let keys = match &file {
            Some(path) => read(path, &policy)?,
            None => vec![Key::random(&policy)?],
        };
        Ok(Self {
            file,
            policy,
            keys: ArcSwap::from_pointee(Keys::of(keys)),
        })
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// As [`Tickets::new`]; the keys in force stay.
    pub(super) fn reload(&self) -> Result<(), TlsError> {
        if let Some(path) = &self.file {
            let keys = read(path, &self.policy)?;
            self.keys.store(Keys::of(keys).into());
        }
        Ok(())
    }

    /// Replaces a key that stays in memory once it is old; tickets under the one before are still taken.
    pub(super) fn renew(&self) -> Result<(), TlsError> {
        let now = self.keys.load();
        if self.file.is_none() && now.since.elapsed() > LIFETIME {
            let mut keys = vec![Key::random(&self.policy)?];
            if let Some(former) = now.keys.first() {
                keys.push(Key::new(former.secret, &self.policy)?);
            }
            self.keys.store(Keys::of(keys).into());
        }
        Ok(())
    }

    fn seal(&self, session: &[u8]) -> Option<Vec<u8>> {
        let keys = self.keys.load();
        let key = keys.keys.first()?;
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).ok()?;
        let mut sealed = [&now_s().to_be_bytes()[..], session].concat();
        key.cipher
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(key.name),
                &mut sealed,
            )
            .ok()?;
        Some([&key.name[..], &nonce, &sealed].concat())
    }

    fn open(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (name, rest) = ticket.split_first_chunk::<NAME_BYTES>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let keys = self.keys.load();
        let key = keys.keys.iter().find(|key| key.name == *name)?;
        let mut sealed = sealed.to_vec();
        let text = key
            .cipher
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(*name),
                &mut sealed,
            )
            .ok()?;
        let (made, session) = text.split_first_chunk::<TIME_BYTES>()?;
        let age = now_s().saturating_sub(u64::from_be_bytes(*made));
        (age <= LIFETIME.as_secs()).then(|| session.to_vec())
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.seal(session)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket)
    }
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tickets")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Keys {
    fn of(keys: Vec<Key>) -> Self {
        Self {
            keys,
            since: Instant::now(),
        }
    }
}

impl Key {
    fn random(policy: &[u8]) -> Result<Self, TlsError> {
        let mut secret = [0; SECRET_BYTES];
        rand::fill(&mut secret).map_err(failed)?;
        Self::new(secret, policy)
    }

    fn new(secret: [u8; SECRET_BYTES], policy: &[u8]) -> Result<Self, TlsError> {
        let source = Salt::new(HKDF_SHA256, b"hopgate session tickets 1").extract(&secret);
        let mut name = [0; NAME_BYTES];
        source
            .expand(&[b"name", policy], NameLength)
            .and_then(|name_source| name_source.fill(&mut name))
            .map_err(failed)?;
        let info = [&b"key"[..], policy];
        let cipher = source
            .expand(&info, &AES_256_GCM_SIV)
            .map(UnboundKey::from)
            .map_err(failed)?;
        Ok(Self {
            name,
            secret,
            // Two proxies draw nonces for the same key: this cipher bears one drawn twice (RFC 8452).
            cipher: LessSafeKey::new(cipher),
        })
    }
}

struct NameLength;

impl KeyType for NameLength {
    fn len(&self) -> usize {
        NAME_BYTES
    }
}

fn failed(_: aws_lc_rs::error::Unspecified) -> TlsError {
    TlsError::SetUp {
        what: "session tickets".into(),
        source: rustls::Error::FailedToGetRandomBytes,
    }
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn read(path: &Path, policy: &[u8]) -> Result<Vec<Key>, TlsError> {
    let bytes = files::read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let secret = from_hex(line).ok_or_else(|| TlsError::BadTicketKey {
            path: path.to_owned(),
            line: index + 1,
        })?;
        keys.push(Key::new(secret, policy)?);
    }
    if keys.is_empty() || keys.len() > KEYS_MAX {
        return Err(TlsError::TicketKeyCount {
            path: path.to_owned(),
            count: keys.len(),
            most: KEYS_MAX,
        });
    }
    Ok(keys)
}

fn from_hex(text: &str) -> Option<[u8; SECRET_BYTES]> {
    let mut secret = [0; SECRET_BYTES];
    if text.len() != 2 * SECRET_BYTES || !text.is_ascii() {
        return None;
    }
    for (index, byte) in secret.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(keys: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ticket.keys");
        std::fs::write(&path, keys.join("\n")).unwrap();
        (folder, path)
    }

    fn digits(digit: &str) -> String {
        digit.repeat(64)
    }

    #[test]
    fn another_proxy_with_the_same_file_opens_a_ticket_also_after_a_rotation_and_not_after_the_key_is_gone()
     {
        let (_folder, path) = file(&["# shared", &digits("a")]);
        let ours = Tickets::new(Some(path.clone()), Vec::new()).unwrap();
        let ticket = ours.seal(b"session").unwrap();
        let theirs = Tickets::new(Some(path.clone()), Vec::new()).unwrap();
        assert_eq!(theirs.open(&ticket).unwrap(), b"session");
        std::fs::write(&path, [digits("b"), digits("a")].join("\n")).unwrap();
        theirs.reload().unwrap();
        assert_eq!(theirs.open(&ticket).unwrap(), b"session");
        let newer = theirs.seal(b"newer").unwrap();
        assert_eq!(ours.open(&newer), None);
        std::fs::write(&path, digits("b")).unwrap();
        theirs.reload().unwrap();
        assert_eq!(theirs.open(&ticket), None);
        assert_eq!(theirs.open(&newer).unwrap(), b"newer");
    }

    #[test]
    fn a_changed_ticket_and_one_of_another_policy_are_refused() {
        let (_folder, path) = file(&[&digits("a")]);
        let lax = Tickets::new(Some(path.clone()), Vec::new()).unwrap();
        let strict = Tickets::new(Some(path), b"clients".to_vec()).unwrap();
        let mut ticket = lax.seal(b"session").unwrap();
        assert_eq!(strict.open(&ticket), None);
        *ticket.last_mut().unwrap() ^= 1;
        assert_eq!(lax.open(&ticket), None);
        assert_eq!(lax.open(b"short"), None);
    }

    #[test]
    fn a_broken_file_leaves_the_keys_in_force() {
        let (_folder, path) = file(&[&digits("a")]);
        let tickets = Tickets::new(Some(path.clone()), Vec::new()).unwrap();
        let ticket = tickets.seal(b"session").unwrap();
        for (text, said) in [
            (format!("{}\nxyz", digits("a")), "line 2 of"),
            (
                "# none".to_owned(),
                "holds 0 ticket keys; it must hold 1 to 16",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = tickets.reload().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert_eq!(tickets.open(&ticket).unwrap(), b"session");
    }
}
