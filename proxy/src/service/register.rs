//! The register of one service on disk: who may serve, and whether the gate holds.
//!
//! The embedded arbiter is this file. A new register is written to a temporary name, synced, renamed and its folder
//! synced before it takes effect; a gate that holds or opens is one sector, overwritten and synced. So a crash leaves
//! either the old truth or the new one, and a proxy that was holding comes back holding. Nothing that is written in
//! place ever touches who serves.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cutover_protocol::id::{Epoch, Holder, Register, ServiceName, Site};
use serde::{Deserialize, Serialize};

/// Version of the file's layout.
const VERSION: u32 = 1;
/// The least that disks write at once.
const SECTOR_BYTES: usize = 512;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(super) version: u32,
    /// Who may serve.
    pub(crate) register: Register,
    /// How the register came to be what it is; makes a repeated command recognisable.
    pub(crate) decided: Decision,
    /// Whether the gate holds.
    pub(crate) gate: GateRecord,
}

/// The last change of the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// None yet.
    First,
    /// A commit.
    Commit,
    /// An abort, by command or by a lease that ran out.
    Abort,
}

/// The gate as far as it must survive a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum GateRecord {
    /// Open, or being released: those held before the crash are gone with their connections.
    Open,
    /// Holding since this epoch, for this long at a time.
    Holding {
        /// The register's epoch when the hold began.
        epoch: Epoch,
        /// Time without renewal after which the hold aborts by itself, in milliseconds.
        lease_ms: u64,
        /// In whose name, if in somebody's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holder: Option<Holder>,
    },
}

/// What went wrong with a state file.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder is not usable.
    #[error("the state folder {} cannot be used; create it, or let this user write to it", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another proxy keeps its registers there.
    #[error("another hopgate-proxy uses the state folder {}; stop it, or give this one its own", .path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("the state of a service in {} cannot be read; restore it, or ask both agents who serves before removing it", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not say what it should.
    #[error("the state of a service in {} is damaged ({problem}); restore it, or ask both agents who serves before removing it", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// A change could not be made durable.
    #[error("the state could not be written to {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The folder of all state files, locked while it exists.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    /// Holds the lock; the kernel lets go of it when we die, however that happens.
    lock: File,
}

impl StateDir {
    /// Creates the folder if need be and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Folder {
            path: path.to_owned(),
            source,
        };
        std::fs::create_dir_all(path).map_err(failed)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(failed)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                lock,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::InUse {
                path: path.to_owned(),
            }),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// Takes over the lock that another process holds on this folder, as one of its two holders.
    pub(crate) fn inherit(path: &Path, lock: OwnedFd) -> Result<Self, StateError> {
        let failed = |errno: rustix::io::Errno| StateError::Folder {
            path: path.to_owned(),
            source: errno.into(),
        };
        let given = rustix::fs::fstat(&lock).map_err(failed)?;
        let there = rustix::fs::stat(path.join("lock")).map_err(failed)?;
        if (given.st_dev, given.st_ino) != (there.st_dev, there.st_ino) {
            return Err(StateError::InUse {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            lock: lock.into(),
        })
    }

    /// The lock, for the process that comes after this one. It holds until both have let go.
    pub(crate) fn share_lock(&self) -> io::Result<OwnedFd> {
        Ok(self.lock.try_clone()?.into())
    }

    /// The file of one service.
    pub(crate) fn file(&self, service: &ServiceName) -> StateFile {
        StateFile {
            folder: self.path.clone(),
            path: self.path.join(format!("{service}.json")),
        }
    }
}

/// Where one service's record lives.
#[derive(Debug)]
pub(crate) struct StateFile {
    folder: PathBuf,
    path: PathBuf,
}

impl StateFile {
    /// Reads the record; a service never seen before belongs to its source, and that is written down first.
    pub(crate) fn load_or_create(&self) -> Result<Record, StateError> {
        match std::fs::read(&self.path) {
            Ok(bytes) => self.decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let record = Record::first();
                self.store(&record)?;
                Ok(record)
            }
            Err(source) => Err(StateError::Unreadable {
                path: self.path.clone(),
                source,
            }),
        }
    }

    fn decode(&self, bytes: &[u8]) -> Result<Record, StateError> {
        let damaged = |problem| StateError::Damaged {
            path: self.path.clone(),
            problem,
        };
        let record: Record =
            serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version == VERSION {
            Ok(record)
        } else {
            Err(damaged(format!(
                "its version is {}, this program writes {VERSION}",
                record.version
            )))
        }
    }

    /// Makes a record durable; when this returns without error, no crash brings the old one back.
    pub(crate) fn store(&self, record: &Record) -> Result<(), StateError> {
        self.write(record).map_err(|source| StateError::Write {
            path: self.path.clone(),
            source,
        })
    }

    /// Two syncs replace a file; one is enough to change the gate's part of it in its place. That is safe whatever a
    /// crash leaves of such a write: who serves is said before, in bytes that stay the same, and a gate that is neither
    /// the old nor the new one cannot be read.
    fn write(&self, record: &Record) -> io::Result<()> {
        let text = padded(serde_json::to_vec(record)?);
        match self.with_same_register(&text) {
            Some(file) => {
                file.write_all_at(&text, 0)?;
                file.sync_data()
            }
            None => self.replace(&text),
        }
    }

    /// The file, if it differs from this text in nothing but the gate.
    fn with_same_register(&self, text: &[u8]) -> Option<File> {
        let gate = memchr::memmem::find(text, b"\"gate\":")?;
        let there = std::fs::read(&self.path).ok()?;
        let is_same = text.len() == SECTOR_BYTES
            && there.len() == SECTOR_BYTES
            && there[..gate] == text[..gate];
        let file = is_same.then(|| File::options().write(true).open(&self.path));
        file?.ok()
    }

    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &self.path)?;
        File::open(&self.folder)?.sync_all()
    }
}

/// With spaces behind it up to the size of a sector, so that a change of the gate is one write of one sector. Longer than
/// that it is only ever replaced.
fn padded(mut text: Vec<u8>) -> Vec<u8> {
    text.resize(text.len().max(SECTOR_BYTES - 1), b' ');
    text.push(b'\n');
    text
}

impl Record {
    pub(crate) const fn first() -> Self {
        Self {
            version: VERSION,
            register: Register {
                epoch: Epoch::FIRST,
                owner: Site::Source,
            },
            decided: Decision::First,
            gate: GateRecord::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let file = state.file(&"web".parse().unwrap());
        assert_eq!(file.load_or_create().unwrap(), Record::first());
        let mut record = Record::first();
        record.register.owner = Site::Target;
        record.gate = GateRecord::Holding {
            epoch: Epoch(3),
            lease_ms: 77,
            holder: Some("hop-1".parse().unwrap()),
        };
        file.store(&record).unwrap();
        assert_eq!(file.load_or_create().unwrap(), record);
    }

    fn held() -> Record {
        Record {
            gate: GateRecord::Holding {
                epoch: Epoch::FIRST,
                lease_ms: 77,
                holder: None,
            },
            ..Record::first()
        }
    }

    #[test]
    fn a_gate_is_changed_in_its_place_and_a_register_only_by_another_file() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let file = state.file(&"web".parse().unwrap());
        file.load_or_create().unwrap();
        let inode = || std::fs::metadata(&file.path).unwrap().ino();
        let first = inode();
        for record in [held(), Record::first(), held()] {
            file.store(&record).unwrap();
            assert_eq!(file.load_or_create().unwrap(), record);
            assert_eq!(inode(), first);
        }
        let mut moved = held();
        moved.register = Register {
            epoch: Epoch(2),
            owner: Site::Target,
        };
        // While it is there its number is nobody else's.
        let before = File::open(&file.path).unwrap();
        file.store(&moved).unwrap();
        assert_eq!(file.load_or_create().unwrap(), moved);
        assert_ne!(inode(), before.metadata().unwrap().ino());
    }

    #[test]
    fn whatever_is_left_of_a_change_of_the_gate_names_no_other_owner() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let file = state.file(&"web".parse().unwrap());
        let texts = [Record::first(), held()];
        let texts = texts.map(|record| padded(serde_json::to_vec(&record).unwrap()));
        for (old, new) in [(0, 1), (1, 0)] {
            for torn in 0..=SECTOR_BYTES {
                let text = [&texts[new][..torn], &texts[old][torn..]].concat();
                std::fs::write(&file.path, text).unwrap();
                match file.load_or_create() {
                    Ok(record) => assert!([Record::first(), held()].contains(&record), "{torn}"),
                    Err(StateError::Damaged { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }

    #[test]
    fn a_record_from_before_there_were_holders_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let text = r#"{"version":1,"register":{"epoch":4,"owner":"target"},"decided":"commit","gate":{"is":"holding","epoch":3,"lease_ms":9}}"#;
        std::fs::write(folder.path().join("web.json"), text).unwrap();
        let record = state.file(&"web".parse().unwrap()).load_or_create();
        let record = record.unwrap();
        assert!(record.holds_since(Epoch(3)));
        assert_eq!(record.holder(), None);
    }

    #[test]
    fn a_damaged_record_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        std::fs::write(folder.path().join("web.json"), "{\"version\":1").unwrap();
        let error = state
            .file(&"web".parse().unwrap())
            .load_or_create()
            .unwrap_err()
            .to_string();
        assert!(error.contains("web.json is damaged"), "{error}");
        assert!(error.contains("ask both agents who serves"), "{error}");
    }

    #[test]
    fn two_proxies_cannot_share_a_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        let _first = StateDir::open(folder.path()).unwrap();
        assert!(matches!(
            StateDir::open(folder.path()),
            Err(StateError::InUse { .. })
        ));
    }
}
