//! The ledger of unknown outcomes: one line for each request of which nobody can know what became of it, because it
//! was cut, or its answer came too late, or its client left before the end.
//!
//! Lines are only ever appended, by a thread of their own: no worker waits for the disk. The queue is bounded; where
//! the disk cannot follow, lines are dropped, counted and complained of. What has queued up is written at once and
//! then synced, so a crash of the machine loses at most what was not yet written; a kill of the process loses what
//! was in the queue. A file that has grown to [`FILE_BYTES_MAX`] becomes the last but one; the oldest of
//! [`FILES_MAX`] goes.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use cutover_protocol::id::{Epoch, ServiceName, Site};
use serde::{Deserialize, Serialize};

use crate::access_log::{since_1970, write_time};

/// Lines that may wait for the disk.
const QUEUE_LINES_MAX: usize = 4096;
/// A file of this size is put aside: about 25,000 lines.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Files that are kept, the one that is written included.
pub const FILES_MAX: usize = 4;
/// Longest method and target that a line has, in bytes.
const REQUEST_BYTES_MAX: usize = 1024;
/// The file that is written; the others have a number behind it, and the highest is the oldest.
const FILE_NAME: &str = "unknown-outcomes.jsonl";

/// Why nobody can know what became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It was in flight when a drain had taken as long as it may, and its route is `at_cut = "cut"`.
    Cut,
    /// Its answer did not come, or not to its end, within the limits.
    TimedOut,
    /// Its client left, or fell silent, after a part of it had been sent.
    ClientLeft,
    /// The upstream closed its connection without an answer.
    NoAnswer,
}

/// One request whose outcome nobody can know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When it was entered, in UTC.
    pub time: String,
    /// Its id, as the application and the access log have it.
    pub id: String,
    /// The service.
    pub service: ServiceName,
    /// The route it took, if it took one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The client's address.
    pub client: String,
    /// Method and target.
    pub request: String,
    /// The epoch it was sent in.
    pub epoch: Epoch,
    /// The site it was sent to.
    pub site: Site,
    /// The server there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Why its outcome is unknown.
    pub why: Why,
    /// Since its arrival, in milliseconds.
    pub age_ms: u64,
    /// Bytes of it that were sent.
    pub sent_bytes: u64,
    /// The status of its answer, where as much of that came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
}

/// A worker's end of the ledger.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    entries: SyncSender<Entry>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    entered: AtomicU64,
    dropped: AtomicU64,
}

impl Ledger {
    /// Opens the ledger in the state folder and starts its thread, which ends with the last worker's end.
    ///
    /// # Errors
    /// The file cannot be opened, or there is no thread to be had.
    pub(crate) fn open(state_dir: &Path) -> io::Result<(Self, JoinHandle<()>)> {
        let mut book = Book::open(state_dir)?;
        let (entries, receiver) = sync_channel(QUEUE_LINES_MAX);
        let counts = Arc::new(Counts::default());
        let thread = std::thread::Builder::new().name("ledger".to_owned());
        let thread = thread.spawn(move || keep(&receiver, &mut book))?;
        Ok((Self { entries, counts }, thread))
    }

    /// Enters a request.
    pub(crate) fn enter(&self, mut entry: Entry) {
        if entry.request.len() > REQUEST_BYTES_MAX {
            let is_boundary = |end: &usize| entry.request.is_char_boundary(*end);
            // A character has four bytes at most, so there is one.
            let end = (0..=REQUEST_BYTES_MAX).rev().find(is_boundary);
            entry.request.truncate(end.unwrap_or_default());
        }
        self.counts.entered.fetch_add(1, Ordering::Relaxed);
        if let Err(TrySendError::Full(entry) | TrySendError::Disconnected(entry)) =
            self.entries.try_send(entry)
        {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
            tracing::error!(id = entry.id, service = %entry.service, client = entry.client, request = entry.request, why = ?entry.why, "an unknown outcome was not written down: the disk cannot follow");
        }
    }

    /// How many were entered, and how many of those lost to a slow disk.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let Counts { entered, dropped } = &*self.counts;
        (
            entered.load(Ordering::Relaxed),
            dropped.load(Ordering::Relaxed),
        )
    }
}

/// The time now, as entries have it.
pub(crate) fn time_now() -> String {
    let mut time = String::new();
    // Writing to a string cannot fail.
    write_time(&mut time, since_1970()).ok();
    time
}

/// Writes and syncs what has queued up, for as long as anybody can enter something.
fn keep(entries: &Receiver<Entry>, book: &mut Book) {
    while let Ok(first) = entries.recv() {
        let queued = std::iter::once(first).chain(entries.try_iter());
        let lines: Vec<u8> = queued
            .take(QUEUE_LINES_MAX)
            .filter_map(|entry| serde_json::to_vec(&entry).ok())
            .flat_map(|mut line| {
                line.push(b'\n');
                line
            })
            .collect();
        if let Err(error) = book.append(&lines) {
            let lost = String::from_utf8_lossy(&lines);
            tracing::error!(%lost, "the ledger of unknown outcomes cannot be written: {error}");
        }
    }
}

/// The files.
#[derive(Debug)]
struct Book {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Book {
    fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(FILE_NAME);
        let file = open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes })
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            self.turn()?;
        }
        self.file.write_all(lines)?;
        self.file.sync_data()?;
        self.bytes += lines.len() as u64;
        Ok(())
    }

    /// Begins a new file.
    fn turn(&mut self) -> io::Result<()> {
        for age in (1..FILES_MAX).rev() {
            match std::fs::rename(file_of(&self.path, age - 1), file_of(&self.path, age)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.file = open(&self.path)?;
        self.bytes = 0;
        // The names are as durable as what is in the files.
        let folder = self.path.parent().unwrap_or_else(|| Path::new("."));
        File::open(folder)?.sync_all()
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

fn file_of(path: &Path, age: usize) -> PathBuf {
    if age == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{age}"));
    name.into()
}

/// The newest `count` entries of the ledger in a state folder, oldest first. Lines that are no entries, such as one
/// that was being written when the machine stopped, are left out.
///
/// # Errors
/// A file is there and cannot be read.
pub fn read(state_dir: &Path, count: usize) -> io::Result<Vec<Entry>> {
    let path = state_dir.join(FILE_NAME);
    let mut newest: Vec<Entry> = Vec::new();
    for age in 0..FILES_MAX {
        let text = match std::fs::read(file_of(&path, age)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        let lines = text.rsplit(|byte| *byte == b'\n');
        let entries = lines.filter_map(|line| serde_json::from_slice(line).ok());
        newest.extend(entries.take(count - newest.len()));
        if newest.len() == count {
            break;
        }
    }
    newest.reverse();
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: usize) -> Entry {
        Entry {
            time: time_now(),
            id: number.to_string(),
            service: "web".parse().unwrap(),
            route: None,
            client: "192.0.2.1:4000".to_owned(),
            request: "POST /pay".to_owned(),
            epoch: Epoch(7),
            site: Site::Source,
            server: None,
            why: Why::Cut,
            age_ms: 1,
            sent_bytes: 2,
            status: None,
        }
    }

    fn ids(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.id.as_str()).collect()
    }

    #[test]
    fn what_is_entered_is_read_again_the_newest_last() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), 9).unwrap(), []);
        for numbers in [0..3, 3..5] {
            let (ledger, thread) = Ledger::open(folder.path()).unwrap();
            numbers.for_each(|number| ledger.enter(entry(number)));
            drop(ledger);
            thread.join().unwrap();
        }
        assert_eq!(
            ids(&read(folder.path(), 9).unwrap()),
            ["0", "1", "2", "3", "4"]
        );
        assert_eq!(ids(&read(folder.path(), 2).unwrap()), ["3", "4"]);
    }

    #[test]
    fn a_line_that_was_cut_by_a_crash_hides_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::open(folder.path()).unwrap();
        let line = serde_json::to_vec(&entry(1)).unwrap();
        book.append(&line[..9]).unwrap();
        book.append(b"\n").unwrap();
        book.append(&line).unwrap();
        assert_eq!(ids(&read(folder.path(), 9).unwrap()), ["1"]);
    }

    #[test]
    fn the_oldest_file_goes_and_no_line_of_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = Book::open(folder.path()).unwrap();
        for number in 0..FILES_MAX + 2 {
            let mut line = serde_json::to_vec(&entry(number)).unwrap();
            line.push(b'\n');
            book.append(&line).unwrap();
            book.bytes = FILE_BYTES_MAX;
        }
        assert_eq!(ids(&read(folder.path(), 9).unwrap()), ["2", "3", "4", "5"]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), FILES_MAX);
    }
}
