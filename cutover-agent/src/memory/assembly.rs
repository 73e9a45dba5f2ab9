//! Puts a container's page images together from the store, flat and without a parent. They follow each of CRIU's own rounds
//! while the container runs, and the dump while CRIU is busy with it: a piece is copied as soon as all its pages are there,
//! and of it only what is not in its place since the round before.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use tokio::sync::watch;

use super::digest::PAGE_BYTES;
use super::layout::{Root, hash_of_piece};
use super::pagemap;
use super::runs::{Run, Runs, Slot, ZERO};
use super::store::{Store, write_fault};
use super::wire::{FRAME_DATA_MAX, IMAGES_MAX, PageFault, Piece, Seal};

/// Runs of the images, by image and the page each piece begins with.
type Places = HashMap<u32, BTreeMap<u32, Vec<Run>>>;

/// The images of one container in the making.
#[derive(Debug)]
pub(super) struct Assembly {
    folder: PathBuf,
    /// Held while pages are copied, so that nothing of a round is written behind the next one.
    round: RwLock<Round>,
    /// What is to be where.
    places: Mutex<Places>,
    standing: watch::Sender<Standing>,
    /// The root that was sealed. From then on the images belong to whoever restores them.
    sealed: OnceLock<[u8; 32]>,
}

/// The round, or the dump, that the images follow.
#[derive(Debug, Default)]
struct Round {
    number: u32,
    /// What the images held when it began.
    before: Places,
    /// Whether all of it is in its place.
    is_complete: bool,
}

#[derive(Debug, Clone, Default)]
struct Standing {
    /// Pieces of the round in their places, by image and first page, and what their pages contain. One may come twice when
    /// connections break.
    done: HashMap<(u32, u32), blake3::Hash>,
    fault: Option<PageFault>,
}

impl Assembly {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            round: RwLock::default(),
            places: Mutex::default(),
            standing: watch::Sender::default(),
            sealed: OnceLock::new(),
        }
    }

    /// Whether the images are complete, and no more changed whatever comes a second time.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.get().is_some()
    }

    /// Notes a piece; false when it is of a round that is over, or cannot be right, which whoever waits for the images is
    /// told.
    pub(super) fn enter(&self, piece: &Piece) -> bool {
        if !is_reasonable(piece) {
            self.fail(PageFault::Garbled);
            return false;
        }
        if !self.follow(piece.round) {
            return false;
        }
        self.places()
            .entry(piece.image)
            .or_default()
            .insert(piece.first, piece.runs.clone());
        true
    }

    /// Turns to a round; false when it is over.
    fn follow(&self, number: u32) -> bool {
        let current = self.read().number;
        if number <= current {
            return number == current;
        }
        let mut round = self.round.write().unwrap_or_else(PoisonError::into_inner);
        if number <= round.number {
            return number == round.number;
        }
        let last = std::mem::take(&mut *self.places());
        if round.is_complete {
            round.before = last;
        } else {
            // What is in the images nobody knows.
            let images = round.before.keys().chain(last.keys());
            if let Err(fault) = images
                .copied()
                .try_for_each(|image| self.set_pages(image, 0))
            {
                self.fail(fault);
            }
            round.before.clear();
        }
        round.number = number;
        round.is_complete = false;
        self.standing.send_modify(|standing| standing.done.clear());
        true
    }

    /// Says what went wrong to whoever waits for the images.
    pub(super) fn fail(&self, fault: PageFault) {
        self.standing.send_modify(|standing| {
            standing.fault.get_or_insert(fault);
        });
    }

    /// Waits until so many pieces of a round are in their places.
    pub(super) async fn until(&self, round: u32, pieces: u32) -> Result<(), PageFault> {
        // One without any page has told nothing.
        if !self.follow(round) {
            return Err(PageFault::Garbled);
        }
        let mut standing = self.standing.subscribe();
        let is_over = |standing: &Standing| {
            standing.done.len() >= pieces as usize || standing.fault.is_some()
        };
        let standing = standing.wait_for(is_over).await;
        let fault = standing.map_err(|_| PageFault::NotOpen)?.fault.clone();
        fault.map_or(Ok(()), Err)
    }

    /// Notes that the images are as a round saw them, so that the next one need only change what has changed.
    pub(super) fn complete(&self, number: u32) -> Result<(), PageFault> {
        let mut round = self.round.write().unwrap_or_else(PoisonError::into_inner);
        if round.number != number || round.is_complete {
            return Ok(());
        }
        let places = self.places();
        let of_before = round.before.keys().copied();
        for image in of_before.filter(|image| !places.contains_key(image)) {
            self.set_pages(image, 0)?;
        }
        for (image, pieces) in &*places {
            let length = pieces.values().map(|runs| pages(runs)).sum();
            self.set_pages(*image, length)?;
        }
        round.is_complete = is_whole(&places);
        Ok(())
    }

    /// Copies the pages of a piece from the store into its image, if the round that saw them goes on.
    pub(super) fn put(&self, store: &Store, piece: &Piece) -> Result<(), PageFault> {
        let round = self.read();
        if round.number == piece.round {
            self.copy(store, piece, &round.before)?;
            let hash = hash(store, piece).ok_or(PageFault::Garbled)?;
            self.standing.send_modify(|standing| {
                standing.done.insert((piece.image, piece.first), hash);
            });
        }
        Ok(())
    }

    /// Copies what is not there `before`. Zeros stay a hole where nothing was.
    fn copy(&self, store: &Store, piece: &Piece, before: &Places) -> Result<(), PageFault> {
        let changes = changes(piece, before);
        if changes.is_empty() {
            return Ok(());
        }
        let (path, file) = self.open(piece.image)?;
        let most = changes.iter().map(|(_, run)| run.count).max().unwrap_or(0);
        let mut buffer = vec![0; FRAME_DATA_MAX.min(most as usize * PAGE_BYTES)];
        for (first, run) in changes {
            let mut at = u64::from(first) * PAGE_BYTES as u64;
            let mut left = run.count as usize * PAGE_BYTES;
            let mut slot = run.first;
            while left > 0 {
                let length = buffer.len().min(left);
                let pages = &mut buffer[..length];
                if run.first == ZERO {
                    pages.fill(0);
                } else {
                    store.read(slot, pages)?;
                    slot += (length / PAGE_BYTES) as Slot;
                }
                file.write_all_at(pages, at)
                    .map_err(|error| write_fault(&path, &error))?;
                at += length as u64;
                left -= length;
            }
        }
        Ok(())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Round> {
        self.round.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_pages(&self, image: u32, pages: u32) -> Result<(), PageFault> {
        let (path, file) = self.open(image)?;
        file.set_len(u64::from(pages) * PAGE_BYTES as u64)
            .map_err(|error| write_fault(&path, &error))
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
    pub(super) fn finish(&self, seal: &Seal) -> Result<(), PageFault> {
        let round = self.read();
        let places = self.places();
        let not_sealed = || PageFault::NotSealed(seal.container.clone());
        if let Some(sealed) = self.sealed.get() {
            // The answer was lost with its connection.
            return (*sealed == seal.root).then_some(()).ok_or_else(not_sealed);
        }
        let root = root(&places, &self.standing.borrow().done, seal).ok_or_else(not_sealed)?;
        if root != seal.root {
            return Err(not_sealed());
        }
        for (number, head) in (1..).zip(&seal.images) {
            self.set_pages(number, head.pages)?;
            let path = self.folder.join(pagemap::name(head.id));
            write(&path, &pagemap::encode(number, head))?;
        }
        let gone = |image: &&u32| **image as usize > seal.images.len();
        for image in round.before.keys().filter(gone) {
            // A process that has ended since a round; nothing refers to it.
            let _ = std::fs::remove_file(self.folder.join(pagemap::pages_name(*image)));
        }
        let _ = self.sealed.set(root);
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PageFault> {
    std::fs::write(path, bytes).map_err(|error| write_fault(path, &error))
}

/// Whether every image is covered without gap or overlap.
fn is_whole(places: &Places) -> bool {
    places.values().all(|pieces| {
        let end = pieces.iter().try_fold(0, |next, (first, runs)| {
            (*first == next).then(|| next + pages(runs))
        });
        end.is_some()
    })
}

/// How many pages there are in the runs of a piece, which is reasonable.
fn pages(runs: &[Run]) -> u32 {
    runs.iter().map(|run| run.count).sum()
}

/// What of a piece is not in its place: where in the image, and from which slots.
fn changes(piece: &Piece, before: &Places) -> Vec<(u32, Run)> {
    let end = piece.first + pages(&piece.runs);
    let empty = BTreeMap::new();
    let old = before.get(&piece.image).unwrap_or(&empty);
    let begun = old.range(..=piece.first).next_back();
    let old = begun
        .into_iter()
        .chain(old.range(piece.first + 1..end.max(piece.first + 1)));
    let mut old = old
        .flat_map(|(first, runs)| (*first..).zip(runs.iter().flat_map(|run| run.slots())))
        .skip_while(|(page, _)| *page < piece.first)
        .peekable();
    let mut changes = Vec::new();
    let (mut from, mut changed) = (piece.first, Runs::default());
    let mut flush = |from: u32, changed: &mut Runs| {
        let mut at = from;
        for run in changed.take() {
            changes.push((at, run));
            at += run.count;
        }
    };
    for (page, slot) in (piece.first..).zip(piece.runs.iter().flat_map(|run| run.slots())) {
        let was = old
            .next_if(|(old, _)| *old == page)
            .map_or(ZERO, |(_, slot)| slot);
        if slot != was {
            changed.push(slot);
        } else {
            flush(from, &mut changed);
            from = page + 1;
        }
    }
    flush(from, &mut changed);
    changes
}

/// Whether the numbers of a piece are within their bounds.
fn is_reasonable(piece: &Piece) -> bool {
    let end = piece.runs.iter().try_fold(piece.first, |pages, run| {
        run.last()?;
        pages.checked_add(run.count)
    });
    (1..=IMAGES_MAX).contains(&(piece.image as usize)) && end.is_some()
}

/// The hash of what the pages of a piece contain, by the digests of the store, where they all are.
fn hash(store: &Store, piece: &Piece) -> Option<blake3::Hash> {
    let slots = piece.runs.iter().flat_map(|run| run.slots());
    let contained: Option<Vec<_>> = store.with_digests(|digests| {
        let digests = slots.map(|slot| Some(digests.get(slot as usize)?.0));
        digests.collect()
    });
    Some(hash_of_piece(contained?.as_flattened()))
}

/// The root hash of what is in its place. Nothing unless every image is covered without gap or overlap.
fn root(
    places: &Places,
    done: &HashMap<(u32, u32), blake3::Hash>,
    seal: &Seal,
) -> Option<[u8; 32]> {
    if seal.images.len() > IMAGES_MAX {
        return None;
    }
    let mut root = Root::default();
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
            root.add(number, done.get(&(number, *first))?);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(slots: &[Slot]) -> Vec<Run> {
        let mut runs = Runs::default();
        slots.iter().for_each(|slot| runs.push(*slot));
        runs.0
    }

    fn slots(runs: &[Run]) -> impl Iterator<Item = Slot> {
        runs.iter().flat_map(|run| run.slots())
    }

    proptest! {
        #[test]
        fn what_changes_makes_any_image_the_next_one(
            old in proptest::collection::vec(0_u32..5, 0..40),
            new in proptest::collection::vec(0_u32..5, 1..40),
            old_piece in 1_usize..12,
            new_piece in 1_usize..12,
        ) {
            let cut = |(number, slots): (usize, &[Slot])| ((number * old_piece) as u32, runs(slots));
            let pieces = old.chunks(old_piece).enumerate().map(cut).collect();
            let before = Places::from([(1, pieces)]);
            prop_assert!(is_whole(&before));
            let mut image = old.clone();
            image.resize(old.len().max(new.len()), ZERO);
            let mut written = 0;
            for (number, piece) in new.chunks(new_piece).enumerate() {
                let piece = Piece {
                    container: "db".into(),
                    round: 2,
                    image: 1,
                    first: (number * new_piece) as u32,
                    runs: runs(piece),
                };
                for (first, run) in changes(&piece, &before) {
                    for (page, slot) in (first as usize..).zip(slots(&[run])) {
                        image[page] = slot;
                        written += 1;
                    }
                }
            }
            prop_assert_eq!(&image[..new.len()], &new[..]);
            let same = old.iter().zip(&new).filter(|(old, new)| old == new).count();
            prop_assert!(written <= new.len() - same);
        }
    }

    #[test]
    fn pieces_with_a_gap_or_an_overlap_are_not_whole() {
        for (second, is_whole_then) in [(2, true), (3, false), (1, false)] {
            let pieces = [(0, runs(&[1, 2])), (second, runs(&[3]))];
            let places = Places::from([(1, BTreeMap::from(pieces))]);
            assert_eq!(is_whole(&places), is_whole_then);
        }
    }
}
