//! An index of what changes on a file system, kept while containers run, so that the walk of a frozen tree looks at
//! nothing else.
//!
//! The kernel tells (fanotify) of every change of a file system: of names that come into a directory or leave it, and of
//! files and directories that are written to. Both are told by handles, which stay with a file whatever its path: whoever
//! writes to a file may have opened it by a name that it no longer has, or never had in the tree. The index keeps them
//! since [`Mark`]s, and never guesses: when anything was missed, [`Mark::changes`] gives nothing, and the tree is walked
//! as a whole. It knows nothing of writes through mappings and of asynchronous ones (io_submit) until the file is closed:
//! files that are open for writing have to be looked at anyway.

mod fanotify;
mod record;
mod watch;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::Stat;
use rustix::io::Errno;
use thiserror::Error;

use super::Root;
use fanotify::Group;
pub(crate) use record::Handle;
use record::Told;
pub(crate) use watch::{Indexes, Watch};

/// Names and objects that are kept; beyond them everything counts as changed. Some 25 MiB, 60 with the longest names.
const KEPT_MAX: usize = 1 << 17;
/// Bytes read at once, some 600 events.
const READ_BYTES: usize = 64 << 10;
/// Reads in a row: four times what the kernel's queue holds by default. Whoever writes faster is not waited for.
const READS_MAX: usize = 128;
/// ext4 says that there is no memory, too, when an inode number that was free is being given to a new file at this very
/// moment (iget_locked gives nothing then): a little later it says that the old file is gone.
const OPENS_MAX: u32 = 1000;
/// Between two looks at the queue: the kernel merges meanwhile what changes again and again, and the queue has room for
/// 1.6 million different events a second.
const PAUSE: Duration = Duration::from_millis(10);
/// The first kernel that tells of writes through an overlay (commit bc2473c90fca): before it, an overlay opened the
/// files of its upper layer such that nobody was told.
const KERNEL_MIN: (u32, u32) = (6, 5);
/// File systems that only this machine changes, with handles that stay: ext2 to ext4, XFS, Btrfs, F2FS, tmpfs.
const LOCAL: [u32; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994];

/// Why a file system has no index.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    /// The kernel does not tell everything.
    #[error("Linux {release} does not tell of writes through an overlay: it takes 6.5 or later")]
    Kernel { release: String },
    /// Changes may come from elsewhere, or are told of the layers only.
    #[error("its file system (type {kind:#x}) is none of ext4, XFS, Btrfs, F2FS, tmpfs")]
    FileSystem { kind: u64 },
    /// Not root of the machine, or it cannot.
    #[error("the system refuses to tell of changes: {0}")]
    System(#[from] Errno),
    /// No thread to listen with.
    #[error("there is no thread to listen with: {0}")]
    Thread(#[source] std::io::Error),
}

/// What changed since a mark. Things outside of the tree are among it.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Directories, with the names that came or went in each.
    pub(crate) names: Vec<(Handle, Vec<Box<[u8]>>)>,
    /// Files and directories that were written to, or whose attributes were changed.
    pub(crate) objects: Vec<Handle>,
}

impl Changes {
    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.names
            .iter()
            .map(|(_, names)| names.len())
            .sum::<usize>()
            + self.objects.len()
    }
}

/// Listens to one file system as long as it lives.
#[derive(Debug)]
pub(crate) struct Index {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    listener: Option<std::thread::JoinHandle<()>>,
}

/// A moment since which changes are kept, until it is dropped.
#[derive(Debug)]
pub(crate) struct Mark {
    index: Arc<Index>,
    at: Arc<u64>,
}

#[derive(Debug)]
struct Shared {
    group: Group,
    kept: Mutex<Kept>,
}

/// What is kept. A moment is the number of marks made before it.
#[derive(Debug, Default)]
struct Kept {
    now: u64,
    /// When each was last told of.
    names: HashMap<Handle, HashMap<Box<[u8]>, u64>>,
    objects: HashMap<Handle, u64>,
    /// Entries of all of these.
    count: usize,
    /// The last moment at which something was missed.
    lost: Option<u64>,
    marks: Vec<Weak<u64>>,
}

impl Index {
    /// Begins to listen to the file system that `root` is on.
    ///
    /// # Errors
    /// When not every change would be told.
    pub(crate) fn open(root: &Root) -> Result<Self, Refused> {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        if kernel(&release).is_none_or(|found| found < KERNEL_MIN) {
            return Err(Refused::Kernel { release });
        }
        let kind = rustix::fs::fstatfs(root.fd())?.f_type as u64;
        if !LOCAL.contains(&(kind as u32)) {
            return Err(Refused::FileSystem { kind });
        }
        // What a handle names can be opened, or nothing that is told would help.
        fanotify::open(root.fd(), &fanotify::handle_of(root.fd())?)?;
        let shared = Arc::new(Shared {
            group: Group::watch(root.fd())?,
            kept: Mutex::default(),
        });
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let (listening, stopping) = (Arc::clone(&shared), Arc::clone(&stop));
        let listener = std::thread::Builder::new()
            .name("file changes".to_owned())
            .spawn(move || listening.listen(&stopping))
            .map_err(Refused::Thread)?;
        Ok(Self {
            shared,
            stop,
            listener: Some(listener),
        })
    }

    /// Keeps what changes from now on.
    pub(crate) fn mark(self: &Arc<Self>) -> Mark {
        let mut kept = self.shared.lock();
        self.shared.drain(&mut kept);
        let at = kept.mark();
        Mark {
            index: Arc::clone(self),
            at,
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        let told = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let (Ok(_), Some(listener)) = (told, self.listener.take()) {
            // It has nothing to give back.
            let _ = listener.join();
        }
    }
}

impl Mark {
    /// What changed since then (`None` when that is not known), and the mark of now.
    pub(crate) fn changes(&self) -> (Option<Changes>, Mark) {
        let shared = &self.index.shared;
        let mut kept = shared.lock();
        shared.drain(&mut kept);
        let changes = kept.since(*self.at);
        let next = Mark {
            index: Arc::clone(&self.index),
            at: kept.mark(),
        };
        (changes, next)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the kernel's queue again and again, until told to stop.
    fn listen(&self, stop: &OwnedFd) {
        let wait = |fds: &mut [PollFd<'_>], limit: Option<&Timespec>| {
            loop {
                match rustix::event::poll(fds, limit) {
                    Err(Errno::INTR) => {}
                    other => return other,
                }
            }
        };
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: PAUSE.subsec_nanos().into(),
        };
        let of = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let (group, stop): (BorrowedFd<'_>, BorrowedFd<'_>) = (self.group.as_fd(), stop.as_fd());
        loop {
            if wait(&mut [of(group), of(stop)], None).is_err() {
                // Whoever asks empties the queue, too; it may have run over by then.
                return;
            }
            self.drain(&mut self.lock());
            match wait(&mut [of(stop)], Some(&pause)) {
                Ok(0) => {}
                _ => return,
            }
        }
    }

    /// Takes in what the kernel has to tell.
    fn drain(&self, kept: &mut Kept) {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS_MAX {
            match self.group.read(&mut buffer) {
                Ok(length) => {
                    let parsed = record::parse(&buffer[..length], |told| kept.note(told));
                    if parsed.is_err() {
                        kept.lose();
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => return kept.lose(),
            }
        }
        kept.lose();
    }
}

impl Kept {
    fn mark(&mut self) -> Arc<u64> {
        self.now += 1;
        let at = Arc::new(self.now);
        self.marks.retain(|mark| mark.strong_count() > 0);
        self.marks.push(Arc::downgrade(&at));
        self.forget();
        at
    }

    /// Forgets what happened before all marks.
    fn forget(&mut self) {
        let first = self.marks.iter().filter_map(Weak::upgrade).min();
        let first = first.map_or(u64::MAX, |first| *first);
        self.objects.retain(|_, last| *last >= first);
        for names in self.names.values_mut() {
            names.retain(|_, last| *last >= first);
        }
        self.names.retain(|_, names| !names.is_empty());
        self.count = self.objects.len() + self.names.values().map(HashMap::len).sum::<usize>();
    }

    fn note(&mut self, told: Told<'_>) {
        if self.lost == Some(self.now) || self.marks.iter().all(|mark| mark.strong_count() == 0) {
            return;
        }
        let known = match told {
            Told::Object(handle) => self.objects.insert(handle, self.now),
            Told::Name { directory, name } => {
                let names = self.names.entry(directory).or_default();
                names.insert(name.into(), self.now)
            }
        };
        self.count += usize::from(known.is_none());
        if self.count > KEPT_MAX {
            self.lose();
        }
    }

    /// Nothing is known of what happened up to now.
    fn lose(&mut self) {
        *self = Self {
            now: self.now,
            lost: Some(self.now),
            marks: std::mem::take(&mut self.marks),
            ..Self::default()
        };
    }

    fn since(&self, at: u64) -> Option<Changes> {
        if self.lost.is_some_and(|lost| lost >= at) {
            return None;
        }
        let named = self.names.iter().map(|(directory, names)| {
            let names = names.iter().filter(|(_, last)| **last >= at);
            let names = names.map(|(name, _)| name.clone());
            (directory.clone(), names.collect::<Vec<_>>())
        });
        let objects = self.objects.iter().filter(|(_, last)| **last >= at);
        Some(Changes {
            names: named.filter(|(_, names)| !names.is_empty()).collect(),
            objects: objects.map(|(handle, _)| handle.clone()).collect(),
        })
    }
}

/// Major and minor number of a kernel's release, as `6.18.4-generic`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The status of what a handle names; `None` when it is gone.
///
/// # Errors
/// When that cannot be found out.
pub(crate) fn status(root: &Root, handle: &Handle) -> Result<Option<Stat>, Errno> {
    for _ in 0..OPENS_MAX {
        match fanotify::open(root.fd(), handle) {
            Ok(object) => return rustix::fs::fstat(&object).map(Some),
            Err(Errno::STALE | Errno::NOENT) => return Ok(None),
            Err(Errno::NOMEM) => std::thread::yield_now(),
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::NOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(number: u32) -> Handle {
        Handle {
            kind: 1,
            bytes: number.to_ne_bytes().into(),
        }
    }

    fn kept_since(kept: &Kept, at: &Arc<u64>) -> Option<usize> {
        kept.since(**at).map(|changes| changes.count())
    }

    #[test]
    fn every_mark_sees_what_came_after_it_and_no_more_is_kept() {
        let mut kept = Kept::default();
        kept.note(Told::Object(handle(1)));
        assert_eq!(kept.count, 0, "nobody asked");
        let first = kept.mark();
        kept.note(Told::Object(handle(1)));
        let second = kept.mark();
        let directory = handle(2);
        kept.note(Told::Name {
            directory,
            name: b"new",
        });
        kept.note(Told::Name {
            directory: handle(2),
            name: b"new",
        });
        assert_eq!(kept_since(&kept, &first), Some(2));
        assert_eq!(kept_since(&kept, &second), Some(1));
        drop(first);
        let third = kept.mark();
        assert_eq!((kept.count, kept_since(&kept, &second)), (1, Some(1)));
        assert_eq!(kept_since(&kept, &third), Some(0));
    }

    #[test]
    fn what_was_missed_is_unknown_to_marks_before_it_only() {
        let mut kept = Kept::default();
        let before = kept.mark();
        kept.note(Told::Object(handle(1)));
        kept.lose();
        kept.note(Told::Object(handle(2)));
        assert_eq!((kept.count, kept_since(&kept, &before)), (0, None));
        let after = kept.mark();
        kept.note(Told::Object(handle(3)));
        assert_eq!(kept_since(&kept, &after), Some(1));
        assert_eq!(kept_since(&kept, &before), None);
    }

    #[test]
    fn more_than_the_bound_is_a_loss() {
        let mut kept = Kept::default();
        let mark = kept.mark();
        for number in 0..KEPT_MAX as u32 {
            kept.note(Told::Object(handle(number)));
        }
        assert_eq!(kept_since(&kept, &mark), Some(KEPT_MAX));
        kept.note(Told::Object(handle(u32::MAX)));
        assert_eq!((kept.count, kept_since(&kept, &mark)), (0, None));
    }

    #[test]
    fn a_queue_that_ran_over_is_a_loss_and_the_next_mark_is_none() {
        // A file system of its own: the queues of other tests are not to run over.
        let folder = tempfile::tempdir().unwrap();
        let call = |program: &str, words: &[&str]| {
            let mut command = std::process::Command::new(program);
            let status = command.args(words).arg(folder.path()).status();
            status.is_ok_and(|status| status.success())
        };
        if !call("mount", &["-t", "tmpfs", "tmpfs"]) {
            assert!(!rustix::process::geteuid().is_root(), "root may mount");
            return;
        }
        let root = Root::open(folder.path()).unwrap();
        // Found by its descriptor from here on, also when the test fails.
        assert!(call("umount", &["-l"]));
        let index = Arc::new(Index::open(&root).unwrap());
        let at = root.fd();
        let limit = std::fs::read_to_string("/proc/sys/fs/fanotify/max_queued_events").unwrap();
        let limit: u32 = limit.trim().parse().unwrap();
        let before = index.mark();
        // Nobody empties the queue meanwhile.
        let kept = index.shared.lock();
        for number in 0..=limit {
            rustix::fs::symlinkat("nowhere", at, number.to_string()).unwrap();
        }
        drop(kept);
        let (changes, after) = before.changes();
        assert!(changes.is_none());
        rustix::fs::symlinkat("nowhere", at, "new").unwrap();
        let (changes, _) = after.changes();
        let names = changes.unwrap().names;
        let told = names
            .iter()
            .any(|(_, names)| names.iter().any(|name| **name == *b"new"));
        assert!(told, "{names:?}");
    }

    #[test]
    fn kernels_are_told_apart_by_their_release() {
        assert_eq!(kernel("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(kernel("5.14.0-427.el9.x86_64"), Some((5, 14)));
        assert_eq!(kernel("7.0"), Some((7, 0)));
        assert_eq!(kernel("unknown"), None);
    }
}
