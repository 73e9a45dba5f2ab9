//! The journal of one hop: a header line, then one line an event, each synced before it is acted upon. A last line
//! without its line break was being written when the power went: it was never acted upon and is dropped.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cutover_protocol::hop::{Bounds, Event};
use cutover_protocol::id::{Epoch, HopId, ServiceName};
use cutover_protocol::plan::{Plan, Tracking};
use serde::{Deserialize, Serialize};

use crate::preflight::now_ms;

/// What never changes during a hop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The hop.
    pub hop: HopId,
    /// The plan, frozen.
    pub plan: Plan,
    /// Each service's epoch when the hop began.
    pub epochs: BTreeMap<ServiceName, Epoch>,
    /// When memory rounds end.
    pub bounds: Bounds,
    /// How memory is tracked.
    #[serde(default)]
    pub tracking: Tracking,
}

impl Header {
    /// The services in the order clients meet them, and the epochs they are held in.
    pub(super) fn holds(&self) -> Vec<(ServiceName, Epoch)> {
        let epoch = |service| self.epochs.get(service).copied().unwrap_or(Epoch::FIRST);
        let services = self.plan.settings().services.iter();
        services
            .map(|service| (service.clone(), epoch(service)))
            .collect()
    }
}

#[derive(Serialize, Deserialize)]
struct Entry {
    at_ms: u64,
    #[serde(flatten)]
    event: Event,
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
}

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("cannot use the journal {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A complete line is not an entry.
    #[error(
        "line {line} of the journal {path} is damaged: {source}; read the register (hopgate-proxy ctl status), see docs/operating.md, then move the file away"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
    /// A hop is under way, or was left unfinished.
    #[error("a hop is unfinished in {path}: run `cutover-agent recover` first")]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
}

fn current(state_dir: &Path) -> PathBuf {
    state_dir.join("journal").join("current.jsonl")
}

impl Journal {
    /// Begins the journal of a new hop.
    ///
    /// # Errors
    /// When another hop is unfinished, or the file cannot be written.
    pub fn begin(state_dir: &Path, header: &Header) -> Result<Self, JournalError> {
        let path = current(state_dir);
        if path.exists() {
            return Err(JournalError::Unfinished { path });
        }
        let failed = |source| JournalError::File {
            path: path.clone(),
            source,
        };
        let folder = path.parent().unwrap_or(state_dir);
        fs::create_dir_all(folder).map_err(failed)?;
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(failed)?;
        let mut journal = Self {
            file,
            path: path.clone(),
        };
        journal.append_line(header)?;
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)?;
        Ok(journal)
    }

    /// Whether a hop is under way or unfinished; only looks.
    #[must_use]
    pub fn exists(state_dir: &Path) -> bool {
        current(state_dir).exists()
    }

    /// The unfinished hop of an agent, if there is one, with its events in order.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn resume(state_dir: &Path) -> Result<Option<(Self, Header, Vec<Event>)>, JournalError> {
        let path = current(state_dir);
        let failed = |source| JournalError::File {
            path: path.clone(),
            source,
        };
        // Bytes, not text: a damaged line need not be UTF-8, and is to be told like any other.
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let newline = bytes.iter().rposition(|byte| *byte == b'\n');
        let whole = newline.map_or(0, |end| end + 1);
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(failed)?;
        file.set_len(whole as u64).map_err(failed)?;
        let mut lines = bytes[..whole]
            .split_inclusive(|byte| *byte == b'\n')
            .enumerate();
        let Some((_, first)) = lines.next() else {
            // The header itself never became durable, so nothing was ever done.
            fs::remove_file(&path).map_err(failed)?;
            return Ok(None);
        };
        let damaged = |line: usize, source| JournalError::Damaged {
            path: path.clone(),
            line: line + 1,
            source,
        };
        let header = serde_json::from_slice(first).map_err(|source| damaged(0, source))?;
        let events = lines
            .map(|(line, text)| {
                serde_json::from_slice::<Entry>(text)
                    .map(|entry| entry.event)
                    .map_err(|source| damaged(line, source))
            })
            .collect::<Result<_, _>>()?;
        Ok(Some((Self { file, path }, header, events)))
    }

    /// Appends one event and syncs it.
    ///
    /// # Errors
    /// When it cannot be made durable: the event must then not be acted upon.
    pub fn append(&mut self, event: &Event) -> Result<(), JournalError> {
        self.append_line(&Entry {
            at_ms: now_ms(),
            event: event.clone(),
        })
    }

    /// Moves the journal of a hop that is over to the history.
    ///
    /// # Errors
    /// When the folder cannot be written; the hop would be recovered once more, which changes nothing.
    pub fn finish(self, hop: &HopId) -> Result<(), JournalError> {
        let failed = |source| JournalError::File {
            path: self.path.clone(),
            source,
        };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::rename(&self.path, folder.join(format!("{hop}.jsonl"))).map_err(failed)?;
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }

    fn append_line<T: Serialize>(&mut self, value: &T) -> Result<(), JournalError> {
        let write = || -> io::Result<()> {
            let mut line = serde_json::to_vec(value)?;
            line.push(b'\n');
            (&self.file).write_all(&line)?;
            self.file.sync_data()
        };
        write().map_err(|source| JournalError::File {
            path: self.path.clone(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_protocol::hop::{ActionName, Costs};
    use cutover_protocol::plan::{PlannedContainer, RawPlan};

    fn header() -> Header {
        let text =
            "services = [\"web\"]\ntarget = \"192.0.2.2:1\"\n[[container]]\nname = \"web\"\n";
        let raw: RawPlan = toml::from_str(text).unwrap();
        assert_eq!(
            raw.containers,
            [PlannedContainer {
                name: "web".parse().unwrap(),
                after: Vec::new()
            }]
        );
        Header {
            hop: "hop-1".parse().unwrap(),
            plan: Plan::try_from(raw).unwrap(),
            epochs: BTreeMap::from([("web".parse().unwrap(), Epoch(3))]),
            bounds: Bounds {
                rounds_max: 0,
                stall_ms_max: 1,
                throttle_percent_max: 0,
                costs: Costs::default(),
            },
            tracking: Tracking::None,
        }
    }

    #[test]
    fn every_whole_line_comes_back_and_a_torn_one_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let events = [
            Event::Begun { epoch: Epoch(3) },
            Event::Done {
                action: ActionName::Preflight,
            },
        ];
        let mut journal = Journal::begin(root.path(), &header()).unwrap();
        for event in &events {
            journal.append(event).unwrap();
        }
        let path = current(root.path());
        let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
        torn.write_all(b"{\"at_ms\":1,\"event\":\"do").unwrap();
        let (mut journal, read, seen) = Journal::resume(root.path()).unwrap().unwrap();
        assert_eq!((read, seen.as_slice()), (header(), events.as_slice()));
        journal.append(&Event::Restarted).unwrap();
        let (_, _, seen) = Journal::resume(root.path()).unwrap().unwrap();
        assert_eq!(seen.last(), Some(&Event::Restarted));
    }

    #[test]
    fn a_second_hop_does_not_begin_over_an_unfinished_one() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::begin(root.path(), &header()).unwrap();
        assert!(matches!(
            Journal::begin(root.path(), &header()),
            Err(JournalError::Unfinished { .. })
        ));
        journal.finish(&header().hop).unwrap();
        Journal::begin(root.path(), &header()).unwrap();
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_told_and_not_skipped() {
        let root = tempfile::tempdir().unwrap();
        let mut journal = Journal::begin(root.path(), &header()).unwrap();
        journal.append(&Event::Restarted).unwrap();
        let path = current(root.path());
        let text = fs::read_to_string(&path).unwrap();
        for damage in [&b"rest\0"[..], b"rest\xff\xfe"] {
            let (before, after) = text.split_once("restarted").unwrap();
            let damaged = [before.as_bytes(), damage, after.as_bytes()].concat();
            fs::write(&path, damaged).unwrap();
            assert!(matches!(
                Journal::resume(root.path()),
                Err(JournalError::Damaged { line: 2, .. })
            ));
        }
    }
}
