//! The lock of whoever orders: a file that says until when, so that a proxy that died holds nobody up for long.
//!
//! Two orders at once would do no harm but to the authority's patience; so this needs no more than what every shared
//! file system has: creating a file that must not exist, and renaming.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;

/// Longer than an order may take.
const LEASE: Duration = Duration::from_secs(15 * 60);

/// Ours until dropped.
#[derive(Debug)]
pub(super) struct Lease {
    path: PathBuf,
    text: String,
}

impl Lease {
    /// Takes the lease unless somebody has it.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub(super) fn take(path: &Path) -> io::Result<Option<Self>> {
        let text = format!("{} {:016x}\n", now_s() + LEASE.as_secs(), random());
        if Self::create(path, &text)? {
            return Ok(Some(Self {
                path: path.to_owned(),
                text,
            }));
        }
        let Some(found) = read(path) else {
            // Given back this moment.
            return Ok(None);
        };
        if !is_over(&found, path) {
            return Ok(None);
        }
        // Of several that find it over, one renames it; and one that came late finds a newer lease in its hands and
        // puts it back.
        let aside = path.with_extension(format!("{:016x}.old", random()));
        match fs::rename(path, &aside) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        }
        if read(&aside).as_ref() != Some(&found) {
            fs::hard_link(&aside, path).ok();
            fs::remove_file(&aside)?;
            return Ok(None);
        }
        fs::remove_file(&aside)?;
        let ours = Self::create(path, &text)?;
        Ok(ours.then(|| Self {
            path: path.to_owned(),
            text,
        }))
    }

    fn create(path: &Path, text: &str) -> io::Result<bool> {
        match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(mut file) => file.write_all(text.as_bytes()).map(|()| true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Not if it took so long that another has it by now.
        if read(&self.path).as_ref() == Some(&self.text) {
            fs::remove_file(&self.path).ok();
        }
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// A file whose writer died between making and filling it is over when it is as old as a lease.
fn is_over(text: &str, path: &Path) -> bool {
    let until = text.split(' ').next().and_then(|until| until.parse().ok());
    let made = || {
        let modified = fs::metadata(path).ok()?.modified().ok()?;
        let made = modified.duration_since(UNIX_EPOCH).ok()?;
        Some(made.as_secs() + LEASE.as_secs())
    };
    until
        .or_else(made)
        .is_some_and(|until: u64| until < now_s())
}

/// Tells two leases of the same second apart.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the time alone tells them apart.
    rand::fill(&mut bytes).ok();
    u64::from_ne_bytes(bytes)
}

pub(super) fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_until_it_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.lease");
        let ours = Lease::take(&path).unwrap();
        assert!(ours.is_some());
        assert!(Lease::take(&path).unwrap().is_none());
        drop(ours);
        assert!(Lease::take(&path).unwrap().is_some());
    }

    #[test]
    fn what_a_dead_proxy_left_is_over_after_its_time_and_giving_back_late_takes_nothing_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.lease");
        let mut dead = Lease::take(&path).unwrap().unwrap();
        dead.text = "1 dead\n".to_owned();
        fs::write(&path, &dead.text).unwrap();
        let ours = Lease::take(&path).unwrap().unwrap();
        drop(dead);
        assert_eq!(read(&path).unwrap(), ours.text);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn half_a_lease_counts_until_it_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.lease");
        fs::write(&path, "").unwrap();
        assert!(Lease::take(&path).unwrap().is_none());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1))
            .unwrap();
        assert!(Lease::take(&path).unwrap().is_some());
    }
}
