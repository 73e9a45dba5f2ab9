//! The target's store: pages in the slots that the source gave them, each checked on arrival, and the images that are
//! assembled from them. One hop at a time; what a former one left is removed when the next begins.
//!
//! Pages lie in a file of which the page cache is all we want: it is never synced, and removed with the hop.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cutover_protocol::id::ContainerName;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::assembly::Assembly;
use super::digest::{DIGEST_BYTES, DigestKey, PAGE_BYTES, PageDigest};
use super::runs::{Run, SLOTS_MAX, Slot, ZERO};
use super::wire::{FRAME_PAGES_MAX, PageAnswer, PageAsk, PageFault, PagesHead, Piece, Seal};
use crate::peer::message::{Outbox, Topic};
use crate::peer::{Arrivals, Frame, FrameError, Part};
use crate::transfer::{Codec, unpack};

/// Frames that are unpacked, checked and written at once; each takes about 2 MiB.
const FRAMES_AT_ONCE: usize = 4;
/// Pieces and seals worked on at once.
const WORKS_AT_ONCE: usize = 4;
/// Room that pages leave on their file system, for everything else that arrives with a hop.
const SPARE_BYTES: u64 = 256 << 20;

/// The page store of a target agent.
#[derive(Debug)]
pub struct PageStore {
    folder: PathBuf,
    open: Mutex<Option<Arc<Store>>>,
    frames: Arc<Semaphore>,
    works: Arc<Semaphore>,
}

/// The pages of one hop.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    file: File,
    key: DigestKey,
    slots_max: u32,
    digests: Mutex<Vec<PageDigest>>,
    standing: watch::Sender<Standing>,
    assemblies: Mutex<HashMap<String, Arc<Assembly>>>,
}

/// How far the pages have come.
#[derive(Debug, Clone)]
struct Standing {
    /// Every slot below it is there.
    end: Slot,
    fault: Option<PageFault>,
}

impl PageStore {
    /// A store below `folder`, which is made when a hop begins and emptied when it ends.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            open: Mutex::new(None),
            frames: Arc::new(Semaphore::new(FRAMES_AT_ONCE)),
            works: Arc::new(Semaphore::new(WORKS_AT_ONCE)),
        }
    }

    /// Takes a request; what it asks is done by a task of its own.
    pub(crate) fn ask(
        self: &Arc<Self>,
        number: u64,
        bytes: &[u8],
        outbox: Outbox,
        arrivals: &Arc<Arrivals>,
        tasks: &mut JoinSet<()>,
    ) {
        let ask = postcard::from_bytes::<PageAsk>(bytes);
        if let Ok(PageAsk::Piece(piece)) = ask {
            // Entered now, so that a seal that follows knows of it.
            self.piece(piece, tasks);
            return;
        }
        let (store, arrivals) = (Arc::clone(self), Arc::clone(arrivals));
        tasks.spawn(async move {
            let answer = match ask {
                Ok(ask) => store.carry_out(ask, &arrivals).await,
                Err(_) => Err(PageFault::Garbled),
            };
            let answer = answer.unwrap_or_else(PageAnswer::Failed);
            let bytes = postcard::to_stdvec(&answer).unwrap_or_default();
            // Without a reader the session is ending.
            outbox.send(Topic::PageAnswer, number, &bytes).await;
        });
    }

    async fn carry_out(
        self: &Arc<Self>,
        ask: PageAsk,
        arrivals: &Arrivals,
    ) -> Result<PageAnswer, PageFault> {
        match ask {
            PageAsk::Open { key } => {
                let folder = self.folder.clone();
                let opened = blocking(move || Store::create(folder, key)).await?;
                *self.lock() = Some(Arc::new(opened));
            }
            PageAsk::Settle { end } => self.current()?.until(end).await?,
            PageAsk::Await { runs } => self.current()?.until_present(&checked(runs)?).await?,
            PageAsk::Missing { frames } => {
                return self.current()?.missing(frames).map(PageAnswer::Missing);
            }
            PageAsk::Drafted(draft) => {
                let assembly = self.current()?.assembly(&draft.container)?;
                assembly.until(draft.round, draft.pieces).await?;
                blocking(move || assembly.complete(draft.round)).await?;
            }
            PageAsk::Seal(seal) => {
                let container = seal.container.clone();
                self.seal(seal).await?;
                arrivals.note(Part::Memory(container));
            }
            PageAsk::Piece(_) => return Err(PageFault::Garbled),
        }
        Ok(PageAnswer::Done)
    }

    fn piece(self: &Arc<Self>, piece: Piece, tasks: &mut JoinSet<()>) {
        // A piece has no answer; what is wrong with it is told by the seal.
        let Ok(store) = self.current() else { return };
        let Ok(assembly) = store.assembly(&piece.container) else {
            return;
        };
        if assembly.is_sealed() || !assembly.enter(&piece) {
            return;
        }
        let works = Arc::clone(&self.works);
        tasks.spawn(async move {
            let putting = async {
                store.until_present(&piece.runs).await?;
                let _permit = works.acquire_owned().await;
                let (assembly, store) = (Arc::clone(&assembly), Arc::clone(&store));
                blocking(move || assembly.put(&store, &piece)).await
            };
            if let Err(fault) = putting.await {
                assembly.fail(fault);
            }
        });
    }

    async fn seal(&self, seal: Seal) -> Result<(), PageFault> {
        let store = self.current()?;
        let assembly = store.assembly(&seal.container)?;
        let began = Instant::now();
        assembly.until(seal.round, seal.pieces).await?;
        let waited = began.elapsed();
        let container = seal.container.clone();
        blocking(move || assembly.finish(&seal)).await?;
        tracing::debug!(%container, ?waited, sealed = ?began.elapsed(), "images of memory are complete");
        Ok(())
    }

    /// Takes a frame of pages; returns when there is room for the next one.
    ///
    /// # Errors
    /// When the frame cannot be read, or no hop has begun.
    pub(crate) async fn data(self: &Arc<Self>, frame: Frame) -> Result<(), FrameError> {
        let head: PagesHead = frame.head()?;
        let store = self.current().map_err(|_| FrameError::Garbled)?;
        let Ok(permit) = Arc::clone(&self.frames).acquire_owned().await else {
            return Ok(());
        };
        // Not awaited: the stream reads its next frame meanwhile.
        tokio::task::spawn_blocking(move || {
            if let Err(fault) = store.take(&head, frame.body()) {
                store.fail(fault);
            }
            drop(permit);
        });
        Ok(())
    }

    /// Moves the images assembled for a container into `images`, where its other images are.
    ///
    /// # Errors
    /// When a file cannot be moved.
    pub(crate) fn place(&self, container: &ContainerName, images: &Path) -> std::io::Result<()> {
        let folder = assembled(&self.folder, container.as_str());
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            std::fs::rename(entry.path(), images.join(entry.file_name()))?;
        }
        Ok(())
    }

    /// Forgets everything; called when a hop is over.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub(crate) fn clear(&self) -> std::io::Result<()> {
        *self.lock() = None;
        remove(&self.folder)
    }

    fn current(&self) -> Result<Arc<Store>, PageFault> {
        self.lock().clone().ok_or(PageFault::NotOpen)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Store>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs with numbers within their bounds.
fn checked(runs: Vec<Run>) -> Result<Vec<Run>, PageFault> {
    if runs.iter().all(|run| run.last().is_some()) {
        Ok(runs)
    } else {
        Err(PageFault::Garbled)
    }
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, PageFault> + Send + 'static,
) -> Result<T, PageFault> {
    tokio::task::spawn_blocking(act)
        .await
        .unwrap_or(Err(PageFault::NotOpen))
}

fn remove(folder: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn assembled(folder: &Path, container: &str) -> PathBuf {
    folder.join("images").join(container)
}

/// Turns a failed write into what the source is told.
pub(super) fn write_fault(path: &Path, error: &std::io::Error) -> PageFault {
    let path = path.display().to_string();
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            PageFault::NoRoom { path }
        }
        _ => PageFault::Write {
            path,
            reason: error.to_string(),
        },
    }
}

impl Store {
    fn create(folder: PathBuf, key: DigestKey) -> Result<Self, PageFault> {
        let path = folder.join("pages");
        let create = || {
            remove(&folder)?;
            std::fs::create_dir_all(&folder)?;
            File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
        };
        let file = create().map_err(|error| write_fault(&path, &error))?;
        let free = rustix::fs::statvfs(&folder)
            .map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        // Each page takes its slot, and its place in the images.
        let slots = free.saturating_sub(SPARE_BYTES) / (2 * PAGE_BYTES as u64);
        Ok(Self {
            folder,
            file,
            key,
            slots_max: u32::try_from(slots).unwrap_or(u32::MAX).min(SLOTS_MAX),
            digests: Mutex::new(vec![key.digest(&[0; PAGE_BYTES])]),
            standing: watch::Sender::new(Standing {
                end: ZERO + 1,
                fault: None,
            }),
            assemblies: Mutex::default(),
        })
    }

    /// The assembly of a container, whose name is checked before it becomes a folder.
    fn assembly(&self, container: &str) -> Result<Arc<Assembly>, PageFault> {
        let name: ContainerName = container.parse().map_err(|_| PageFault::Garbled)?;
        let mut assemblies = self
            .assemblies
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = assemblies.get(container) {
            return Ok(Arc::clone(known));
        }
        let folder = assembled(&self.folder, name.as_str());
        let made = Arc::new(Assembly::new(folder));
        assemblies.insert(container.to_owned(), Arc::clone(&made));
        Ok(made)
    }

    /// Checks the pages of a frame and puts them into their slots.
    fn take(&self, head: &PagesHead, body: &[u8]) -> Result<(), PageFault> {
        let mut pages: usize = 0;
        for run in &head.runs {
            let last = run.last().ok_or(PageFault::Garbled)?;
            if run.first == ZERO {
                return Err(PageFault::Garbled);
            }
            if last >= self.slots_max {
                let path = self.folder.display().to_string();
                return Err(PageFault::NoRoom { path });
            }
            pages = pages.saturating_add(run.count as usize);
        }
        if pages > FRAME_PAGES_MAX || head.digests.len() != pages * DIGEST_BYTES {
            return Err(PageFault::Garbled);
        }
        let unpacked;
        let bytes = match head.codec {
            Codec::Plain => body,
            Codec::Zstd { bytes } | Codec::Lz4 { bytes } => {
                if bytes as usize != pages * PAGE_BYTES {
                    return Err(PageFault::Garbled);
                }
                unpacked =
                    unpack(head.codec, body, pages * PAGE_BYTES).map_err(|_| PageFault::Damaged)?;
                &unpacked
            }
            Codec::Linked { .. } => return Err(PageFault::Garbled),
        };
        if bytes.len() != pages * PAGE_BYTES {
            return Err(PageFault::Garbled);
        }
        let is_intact = bytes
            .chunks_exact(PAGE_BYTES)
            .zip(head.digests.chunks_exact(DIGEST_BYTES))
            .all(|(page, digest)| self.key.digest(page).0 == digest);
        if !is_intact {
            return Err(PageFault::Damaged);
        }
        self.write(&head.runs, bytes)?;
        self.enter(head);
        Ok(())
    }

    fn write(&self, runs: &[Run], mut bytes: &[u8]) -> Result<(), PageFault> {
        for run in runs {
            let (pages, rest) = bytes.split_at(run.count as usize * PAGE_BYTES);
            self.file
                .write_all_at(pages, u64::from(run.first) * PAGE_BYTES as u64)
                .map_err(|error| write_fault(&self.folder, &error))?;
            bytes = rest;
        }
        Ok(())
    }

    fn enter(&self, head: &PagesHead) {
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = head.runs.iter().flat_map(|run| run.slots());
        for (slot, digest) in slots.zip(head.digests.chunks_exact(DIGEST_BYTES)) {
            let slot = slot as usize;
            if digests.len() <= slot {
                digests.resize(slot + 1, PageDigest::ABSENT);
            }
            digests[slot] = digest.try_into().map_or(PageDigest::ABSENT, PageDigest);
        }
        let mut end = self.standing.borrow().end as usize;
        while digests
            .get(end)
            .is_some_and(|digest| *digest != PageDigest::ABSENT)
        {
            end += 1;
        }
        drop(digests);
        self.standing.send_modify(|standing| {
            // Another thread may have come further.
            standing.end = standing.end.max(end as Slot);
        });
    }

    fn fail(&self, fault: PageFault) {
        self.standing.send_modify(|standing| {
            standing.fault.get_or_insert(fault);
        });
    }

    /// Which of these frames have not arrived whole.
    fn missing(&self, frames: Vec<Vec<Run>>) -> Result<Vec<u32>, PageFault> {
        let frames = frames
            .into_iter()
            .map(checked)
            .collect::<Result<Vec<_>, _>>()?;
        let is_missing = |runs: &Vec<Run>| {
            let mut slots = runs.iter().copied().flat_map(Run::slots);
            self.with_digests(|digests| {
                slots.any(|slot| {
                    digests
                        .get(slot as usize)
                        .is_none_or(|digest| *digest == PageDigest::ABSENT)
                })
            })
        };
        let positions = (0..).zip(&frames);
        let missing = positions.filter(|(_, runs)| is_missing(runs));
        Ok(missing.map(|(position, _)| position).collect())
    }

    /// Waits until every slot below `end` is there.
    async fn until(&self, end: Slot) -> Result<(), PageFault> {
        let mut standing = self.standing.subscribe();
        let standing = standing
            .wait_for(|standing| standing.end >= end || standing.fault.is_some())
            .await
            .map_err(|_| PageFault::NotOpen)?;
        standing.fault.clone().map_or(Ok(()), Err)
    }

    /// Waits until these slots are there, whatever others are not.
    async fn until_present(&self, runs: &[Run]) -> Result<(), PageFault> {
        let mut standing = self.standing.subscribe();
        let mut slots = runs.iter().copied().flat_map(Run::slots).peekable();
        loop {
            if let Some(fault) = standing.borrow_and_update().fault.clone() {
                return Err(fault);
            }
            self.with_digests(|digests| {
                let is_there = |slot: &Slot| {
                    digests
                        .get(*slot as usize)
                        .is_some_and(|digest| *digest != PageDigest::ABSENT)
                };
                while slots.next_if(is_there).is_some() {}
            });
            if slots.peek().is_none() {
                return Ok(());
            }
            standing.changed().await.map_err(|_| PageFault::NotOpen)?;
        }
    }

    /// Reads whole pages from consecutive slots.
    pub(super) fn read(&self, first: Slot, pages: &mut [u8]) -> Result<(), PageFault> {
        self.file
            .read_exact_at(pages, u64::from(first) * PAGE_BYTES as u64)
            .map_err(|error| write_fault(&self.folder, &error))
    }

    /// Looks at the digest of each slot.
    pub(super) fn with_digests<T>(&self, look: impl FnOnce(&[PageDigest]) -> T) -> T {
        look(&self.digests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(folder: &tempfile::TempDir) -> Store {
        Store::create(folder.path().join("store"), DigestKey::new([3; 32])).unwrap()
    }

    fn head(store: &Store, first: Slot, pages: &[u8]) -> PagesHead {
        let digests = pages
            .chunks_exact(PAGE_BYTES)
            .flat_map(|page| store.key.digest(page).0);
        PagesHead {
            runs: vec![Run {
                first,
                count: (pages.len() / PAGE_BYTES) as u32,
            }],
            digests: digests.collect(),
            codec: Codec::Plain,
        }
    }

    #[tokio::test]
    async fn slots_that_come_out_of_order_are_complete_when_the_gap_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder);
        let (one, two) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        store.take(&head(&store, 2, &two), &two).unwrap();
        assert_eq!(store.standing.borrow().end, 1);
        let second = [Run { first: 2, count: 1 }];
        store.until_present(&second).await.unwrap();
        store.take(&head(&store, 1, &one), &one).unwrap();
        store.until(3).await.unwrap();
        let mut back = [0; 2 * PAGE_BYTES];
        store.read(1, &mut back).unwrap();
        assert_eq!(back, *[one, two].concat());
    }

    #[test]
    fn a_damaged_page_is_found_before_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder);
        let mut page = [1; PAGE_BYTES];
        let head = head(&store, 1, &page);
        page[77] ^= 1;
        assert_eq!(store.take(&head, &page), Err(PageFault::Damaged));
        assert_eq!(store.standing.borrow().end, 1);
    }

    #[test]
    fn frames_that_lie_about_themselves_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder);
        let page = [1; PAGE_BYTES];
        let lies: [fn(&mut PagesHead); 5] = [
            |head| head.runs[0].first = ZERO,
            |head| head.runs[0].count = 2,
            |head| head.runs[0].count = u32::MAX,
            |head| {
                head.digests.pop();
            },
            |head| head.runs = vec![Run { first: 1, count: 1 }; FRAME_PAGES_MAX + 1],
        ];
        for lie in lies {
            let mut head = head(&store, 1, &page);
            lie(&mut head);
            assert_eq!(store.take(&head, &page), Err(PageFault::Garbled));
        }
    }

    #[test]
    fn a_store_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store {
            slots_max: 2,
            ..store(&folder)
        };
        let page = [1; PAGE_BYTES];
        let refused = store.take(&head(&store, 2, &page), &page);
        assert!(
            matches!(refused, Err(PageFault::NoRoom { .. })),
            "{refused:?}"
        );
        assert_eq!(store.take(&head(&store, 1, &page), &page), Ok(()));
    }
}
