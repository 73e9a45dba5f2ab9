//! Puts a container's page images together from the store, flat and without a parent, while CRIU still dumps at the
//! source: a piece is copied as soon as all its pages are there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio::sync::watch;

use super::digest::PAGE_BYTES;
use super::layout::Root;
use super::pagemap;
use super::runs::{Run, Slot, ZERO};
use super::store::{Store, write_fault};
use super::wire::{FRAME_DATA_MAX, IMAGES_MAX, PageFault, Piece, Seal};

/// Runs of the images, by image and the page each piece begins with.
type Places = HashMap<u32, BTreeMap<u32, Vec<Run>>>;

/// The images of one container in the making.
#[derive(Debug)]
pub(super) struct Assembly {
    folder: PathBuf,
    places: Mutex<Places>,
    standing: watch::Sender<Standing>,
    /// The root that was sealed. From then on the images belong to whoever restores them.
    sealed: OnceLock<[u8; 32]>,
}

#[derive(Debug, Clone, Default)]
struct Standing {
    /// Pieces in their places, by image and first page: one may come twice when connections break.
    done: HashSet<(u32, u32)>,
    fault: Option<PageFault>,
}

impl Assembly {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            places: Mutex::default(),
            standing: watch::Sender::default(),
            sealed: OnceLock::new(),
        }
    }

    /// Whether the images are complete, and no more changed whatever comes a second time.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.get().is_some()
    }

    /// Notes a piece; false when it cannot be right, which whoever waits for the images is told.
    pub(super) fn enter(&self, piece: &Piece) -> bool {
        if !is_reasonable(piece) {
            self.count(&(piece.image, piece.first), Err(PageFault::Garbled));
            return false;
        }
        self.places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(piece.image)
            .or_default()
            .insert(piece.first, piece.runs.clone());
        true
    }

    /// Counts a piece that is in its place, or what went wrong with it.
    pub(super) fn count(&self, place: &(u32, u32), outcome: Result<(), PageFault>) {
        self.standing.send_modify(|standing| match outcome {
            Ok(()) => {
                standing.done.insert(*place);
            }
            Err(fault) => {
                standing.fault.get_or_insert(fault);
            }
        });
    }

    /// Waits until so many pieces are in their places.
    pub(super) async fn until(&self, pieces: u32) -> Result<(), PageFault> {
        let mut standing = self.standing.subscribe();
        let is_over = |standing: &Standing| {
            standing.done.len() >= pieces as usize || standing.fault.is_some()
        };
        let standing = standing.wait_for(is_over).await;
        let fault = standing.map_err(|_| PageFault::NotOpen)?.fault.clone();
        fault.map_or(Ok(()), Err)
    }

    /// Copies the pages of a piece from the store into its image. Zeros stay a hole.
    pub(super) fn copy(&self, store: &Store, piece: &Piece) -> Result<(), PageFault> {
        let (path, file) = self.open(piece.image)?;
        let mut buffer = vec![0; FRAME_DATA_MAX];
        let mut at = u64::from(piece.first) * PAGE_BYTES as u64;
        for run in &piece.runs {
            let mut left = u64::from(run.count) * PAGE_BYTES as u64;
            let mut slot = run.first;
            while left > 0 && run.first != ZERO {
                let length = buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                store.read(slot, &mut buffer[..length])?;
                file.write_all_at(&buffer[..length], at)
                    .map_err(|error| write_fault(&path, &error))?;
                slot += (length / PAGE_BYTES) as Slot;
                at += length as u64;
                left -= length as u64;
            }
            at += left;
        }
        Ok(())
    }

    fn open(&self, image: u32) -> Result<(PathBuf, File), PageFault> {
        let path = self.folder.join(pagemap::pages_name(image));
        let open = || {
            std::fs::create_dir_all(&self.folder)?;
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        let file = open().map_err(|error| write_fault(&path, &error))?;
        Ok((path, file))
    }

    /// Compares what is here with what was dumped, and completes the images.
    pub(super) fn finish(&self, store: &Store, seal: &Seal) -> Result<(), PageFault> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let not_sealed = || PageFault::NotSealed(seal.container.clone());
        if let Some(sealed) = self.sealed.get() {
            // The answer was lost with its connection.
            return (*sealed == seal.root).then_some(()).ok_or_else(not_sealed);
        }
        let root = root(&places, store, seal).ok_or_else(not_sealed)?;
        if root != seal.root {
            return Err(not_sealed());
        }
        for (number, head) in (1..).zip(&seal.images) {
            let (path, file) = self.open(number)?;
            file.set_len(u64::from(head.pages) * PAGE_BYTES as u64)
                .map_err(|error| write_fault(&path, &error))?;
            let path = self.folder.join(pagemap::name(head.id));
            write(&path, &pagemap::encode(number, head))?;
        }
        let _ = self.sealed.set(root);
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PageFault> {
    std::fs::write(path, bytes).map_err(|error| write_fault(path, &error))
}

/// Whether the numbers of a piece are within their bounds.
fn is_reasonable(piece: &Piece) -> bool {
    let end = piece.runs.iter().try_fold(piece.first, |pages, run| {
        run.last()?;
        pages.checked_add(run.count)
    });
    (1..=IMAGES_MAX).contains(&(piece.image as usize)) && end.is_some()
}

/// The root hash of what the pieces say, with the digests of the store. Nothing unless every image is covered without
/// gap or overlap.
fn root(places: &Places, store: &Store, seal: &Seal) -> Option<[u8; 32]> {
    if seal.images.len() > IMAGES_MAX {
        return None;
    }
    let mut root = Root::new();
    let empty = BTreeMap::new();
    for (number, head) in (1..).zip(&seal.images) {
        let mut next = 0_u32;
        for (first, runs) in places.get(&number).unwrap_or(&empty) {
            if *first != next {
                return None;
            }
            for run in runs {
                next = next.checked_add(run.count)?;
            }
            store.with_digests(|digests| {
                for slot in runs.iter().flat_map(|run| run.slots()) {
                    root.add(number, *digests.get(slot as usize)?);
                }
                Some(())
            })?;
        }
        let regions: u64 = head
            .regions
            .iter()
            .map(|region| u64::from(region.pages))
            .sum();
        if next != head.pages || regions != u64::from(next) {
            return None;
        }
    }
    Some(root.finish(&seal.images))
}
