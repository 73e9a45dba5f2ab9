//! The target's end: keeps the rounds that are under way, and what each tree was sealed with.
//!
//! Streams hand in frames in any order and at any time; a frame that comes before its round waits, one that comes after
//! its end is dropped. All file work is done on blocking threads, a bounded number of frames at a time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::old;
use super::round::{Round, open_tree};
use super::seeds::{SealedTree, Seeds};
use super::wire::{Answer, Ask, Base, DataHead, Fault, Listing, Packed, Space};
use super::{TreeName, discard};
use crate::files::blocks::Digest;
use crate::files::{FilesError, Manifest, apply, content, walk};
use crate::peer::message::{Outbox, Topic};
use crate::peer::{Arrivals, Frame, FrameError, Part, Trees};

/// Frames that are unpacked and written at once; each takes about 2 MiB.
const FRAMES_AT_ONCE: u32 = 4;
/// Other file work at once: scans, preparations, seals.
const WORKS_AT_ONCE: u32 = 8;

/// The receiving half of a session.
pub(crate) struct Receiver {
    trees: Trees,
    registry: Mutex<Registry>,
    /// The highest round that has begun.
    begun: watch::Sender<u64>,
    failure: watch::Sender<Option<String>>,
    /// Changes whenever a tree is left.
    left: watch::Sender<()>,
    frames: Arc<Semaphore>,
    works: Arc<Semaphore>,
    cancel: Arc<AtomicBool>,
    dead_after: Duration,
    /// Frames that streams have handed in.
    taken: AtomicU64,
    arrivals: Arc<Arrivals>,
}

/// What a session knows of its trees.
#[derive(Clone, Default)]
pub(crate) struct Known {
    held: Held,
    sealed: BTreeSet<TreeName>,
}

/// What each tree was sealed with or found to be, while nobody has written there since.
type Held = HashMap<TreeName, (Arc<Manifest>, Digest)>;

#[derive(Default)]
struct Registry {
    rounds: HashMap<u64, Arc<Round>>,
    active: HashSet<TreeName>,
    known: Held,
    /// Trees that the source has filled in this session, but for those that began with nothing.
    sealed: BTreeSet<TreeName>,
    seeds: HashMap<TreeName, Arc<Seeds>>,
    /// Trees that were told of blocks and did not find them as they were told: they do without other trees.
    wary: HashSet<TreeName>,
}

impl Receiver {
    /// A receiver that writes only where `trees` says. `known` is what the session knew in whose place this one comes.
    pub(crate) fn new(trees: Trees, dead_after: Duration, known: Known) -> Self {
        Self {
            trees,
            registry: Mutex::new(Registry {
                known: known.held,
                sealed: known.sealed,
                ..Registry::default()
            }),
            begun: watch::Sender::new(0),
            failure: watch::Sender::new(None),
            left: watch::Sender::new(()),
            frames: Arc::new(Semaphore::new(FRAMES_AT_ONCE as usize)),
            works: Arc::new(Semaphore::new(WORKS_AT_ONCE as usize)),
            cancel: Arc::default(),
            dead_after,
            taken: AtomicU64::new(0),
            arrivals: Arc::default(),
        }
    }

    /// Takes a request; rounds are entered before this returns, so that they begin in order.
    pub(crate) fn ask(
        self: &Arc<Self>,
        number: u64,
        bytes: &[u8],
        outbox: Outbox,
        tasks: &mut JoinSet<()>,
    ) {
        let Ok(ask) = postcard::from_bytes::<Ask>(bytes) else {
            let refusal = postcard::to_stdvec(&Answer::Failed(Fault::Garbled)).unwrap_or_default();
            tasks.spawn(async move {
                outbox.send(Topic::Answer, number, &refusal).await;
            });
            return;
        };
        let opened = match &ask {
            Ask::Begin { round, .. } | Ask::Measure { round, .. } => Some(self.enter(*round)),
            _ => None,
        };
        let ask = match ask {
            Ask::Seal {
                round,
                frames,
                root,
                repeats,
            } => return self.on(round, |found| found.seal((frames, root), repeats)),
            Ask::Abandon { round } => return self.on(round, |found| found.fail(Fault::Abandoned)),
            ask => ask,
        };
        let receiver = Arc::clone(self);
        tasks.spawn(async move {
            let answer = match receiver.carry_out(ask, opened).await {
                Ok(answer) => answer,
                Err(fault) => Answer::Failed(fault),
            };
            let bytes = postcard::to_stdvec(&answer).unwrap_or_default();
            // Without a reader the session is ending.
            outbox.send(Topic::Answer, number, &bytes).await;
        });
    }

    /// What is known of the trees, for the session that comes in the place of this one.
    pub(crate) fn known(&self) -> Known {
        let registry = self.lock();
        Known {
            held: registry.known.clone(),
            sealed: registry.sealed.clone(),
        }
    }

    /// What has arrived whole in this session.
    pub(crate) fn arrivals(&self) -> &Arc<Arrivals> {
        &self.arrivals
    }

    fn enter(&self, number: u64) -> Arc<Round> {
        let round = Arc::new(Round::new());
        self.lock().rounds.insert(number, Arc::clone(&round));
        self.begun.send_modify(|begun| *begun = number.max(*begun));
        round
    }

    fn on(&self, number: u64, act: impl FnOnce(&Round)) {
        let round = self.lock().rounds.get(&number).cloned();
        if let Some(round) = round {
            act(&round);
        }
    }

    async fn carry_out(
        self: &Arc<Self>,
        ask: Ask,
        opened: Option<Arc<Round>>,
    ) -> Result<Answer, Fault> {
        match ask {
            Ask::Begin {
                round,
                tree,
                base,
                steps,
                replaced,
                is_durable,
            } => {
                let opened = opened.ok_or(Fault::Garbled)?;
                let list = (steps, replaced);
                let outcome = self.round(&opened, &tree, base, list, is_durable).await;
                if let Err(fault) = &outcome {
                    // Streams may be waiting for this round to be ready.
                    opened.fail(fault.clone());
                }
                self.lock().rounds.remove(&round);
                discard(opened);
                outcome.map(|()| Answer::Done)
            }
            Ask::Measure { round, frames } => {
                let opened = opened.ok_or(Fault::Garbled)?;
                opened.standing.send_modify(|standing| {
                    standing.is_ready = true;
                    standing.seal = Some((frames, Digest::UNKNOWN));
                });
                let outcome = over(&opened).await;
                self.lock().rounds.remove(&round);
                outcome.map(|_| Answer::Done)
            }
            Ask::Have { tree } => self.have(tree).await,
            Ask::Seeds { tree, sizes } => self.seeds(tree, sizes).await,
            Ask::Cuts { tree, files } => self.cuts(tree, files).await,
            Ask::Forget { tree } => {
                self.lock().known.remove(&tree);
                Ok(Answer::Done)
            }
            Ask::Drop { tree } => {
                let path = self.enter_tree(&tree).await?;
                let cancel = Arc::clone(&self.cancel);
                let cleared = self
                    .work(move || Ok(apply::clear(&open_tree(&path)?, &cancel)?))
                    .await;
                self.leave_tree(&tree);
                cleared.map(|()| Answer::Done)
            }
            Ask::Space { tree } => {
                let path = self.path(&tree)?;
                self.work(move || space(path)).await.map(Answer::Space)
            }
            Ask::Size { tree } => {
                let (path, cancel) = (self.path(&tree)?, Arc::clone(&self.cancel));
                let (bytes, entries) = self
                    .work(move || Ok(walk::size(&open_tree(&path)?, &cancel)?))
                    .await?;
                Ok(Answer::Size { bytes, entries })
            }
            Ask::Seal { .. } | Ask::Abandon { .. } => Err(Fault::Garbled),
        }
    }

    /// One round from beginning to end.
    async fn round(
        self: &Arc<Self>,
        opened: &Arc<Round>,
        tree: &TreeName,
        base: Base,
        list: (Packed, Vec<u32>),
        is_durable: bool,
    ) -> Result<(), Fault> {
        // Taken, not copied: from here on until the seal nobody knows what the tree holds.
        let path = self.path(tree)?;
        let known = self.lock().known.get(tree).cloned();
        let base = match (base, known) {
            (Base::Empty, _) => None,
            (Base::Known(root), Some((manifest, held))) if root == held => Some(manifest),
            (Base::Known(_), _) => return Err(Fault::StaleBase(tree.clone())),
        };
        self.enter_tree(tree).await?;
        let may_share = base.is_some();
        let outcome = async {
            let (round, cancel) = (Arc::clone(opened), Arc::clone(&self.cancel));
            // They are for one round, and keep folders open.
            let seeds = self.lock().seeds.remove(tree).unwrap_or_default();
            self.work(move || {
                let root = open_tree(&path)?;
                if base.is_none() {
                    apply::clear(&root, &cancel)?;
                }
                round.prepare(root, (base.unwrap_or_default(), seeds), list)
            })
            .await?;
            opened
                .standing
                .send_modify(|standing| standing.is_ready = true);
            let sealed = over(opened).await?;
            let (round, name) = (Arc::clone(opened), tree.clone());
            self.work(move || round.finish(&name, sealed, is_durable))
                .await
        };
        let outcome = outcome.await;
        if let Err(fault) = &outcome {
            if matches!(fault, Fault::Damaged { .. }) {
                self.lock().wary.insert(tree.clone());
            }
            opened.fail(fault.clone());
            // Frames being written now must not meet whoever looks at the tree next.
            drop(self.frames.acquire_many(FRAMES_AT_ONCE).await);
        }
        self.leave_tree(tree);
        let (manifest, root) = outcome?;
        let known = (Arc::new(manifest), root);
        discard(self.lock().known.insert(tree.clone(), known));
        if may_share {
            self.share(tree);
        }
        self.arrivals.note(Part::Tree(tree.clone()));
        Ok(())
    }

    async fn have(self: &Arc<Self>, tree: TreeName) -> Result<Answer, Fault> {
        // Not looked at again: a container may have been built on it since.
        let (known, was_shared) = {
            let registry = self.lock();
            let known = registry.known.get(&tree).cloned();
            (known, self.is_shared(&registry, &tree))
        };
        let path = self.enter_tree(&tree).await?;
        let cancel = Arc::clone(&self.cancel);
        let scanned = self.work(move || {
            let (manifest, root) = match known {
                Some(known) => known,
                None => {
                    let manifest = content::scan(&open_tree(&path)?, &cancel)?;
                    let root = manifest.root();
                    (Arc::new(manifest), root)
                }
            };
            let digests = manifest
                .digests
                .iter()
                .map(|known| known.as_ref().clone())
                .collect();
            let list = Packed::of(&Listing {
                entries: manifest.entries.clone(),
                digests,
            })?;
            Ok((manifest, root, list))
        });
        let scanned = scanned.await;
        self.leave_tree(&tree);
        let (manifest, root, list) = scanned?;
        let has_seeds = !self.seed_folders(&tree).is_empty();
        let mut registry = self.lock();
        // Else somebody has written there while we looked.
        if was_shared || !self.is_shared(&registry, &tree) {
            registry.known.insert(tree, (manifest, root));
        }
        Ok(Answer::Have {
            list,
            root,
            has_seeds,
        })
    }

    fn seed_folders(&self, tree: &TreeName) -> Vec<PathBuf> {
        (self.trees)(tree).map_or_else(Vec::new, |folder| folder.seeds)
    }

    async fn seeds(self: &Arc<Self>, tree: TreeName, sizes: Packed) -> Result<Answer, Fault> {
        let (folders, cancel) = (self.seed_folders(&tree), Arc::clone(&self.cancel));
        let others = self.others(&tree);
        let looked = self.work(move || {
            let sizes: HashSet<u64> = sizes.open()?;
            let (seeds, digests) = Seeds::find((&others, &folders), &sizes, &cancel)?;
            Ok((seeds, Packed::of(&digests)?))
        });
        let (seeds, list) = looked.await?;
        self.lock().seeds.insert(tree, Arc::new(seeds));
        Ok(Answer::Seeds(list))
    }

    /// Cuts files of a tree that is known. Nothing is written there meanwhile: a session has one round of a tree at a time.
    async fn cuts(self: &Arc<Self>, tree: TreeName, files: Packed) -> Result<Answer, Fault> {
        let path = self.path(&tree)?;
        let known = self.lock().known.get(&tree).cloned();
        let (manifest, _) = known.ok_or_else(|| Fault::StaleBase(tree.clone()))?;
        let cancel = Arc::clone(&self.cancel);
        let cut = self.work(move || {
            let files: Vec<u32> = files.open()?;
            let cuts = old::cut(&open_tree(&path)?, &manifest, &files, &cancel)?;
            Ok(Packed::of(&cuts)?)
        });
        cut.await.map(Answer::Cuts)
    }

    /// The trees whose files may be in this one as well: only what the source has sent itself, so it is told nothing new.
    fn others(&self, tree: &TreeName) -> Vec<SealedTree> {
        let registry = self.lock();
        if registry.wary.contains(tree) {
            return Vec::new();
        }
        let others = registry.sealed.iter().filter(|other| *other != tree);
        let known = others.filter_map(|other| {
            let (manifest, _) = registry.known.get(other)?;
            Some((self.path(other).ok()?, Arc::clone(manifest)))
        });
        known.collect()
    }

    /// A tree was sealed: others may use its files. If it is the first of several in one folder, what was found there for
    /// the others is no longer true, and they ask again. Once is enough: later only what changes meanwhile differs, and each
    /// of them brings that itself.
    fn share(&self, tree: &TreeName) {
        let path = self.path(tree);
        let mut registry = self.lock();
        if !self.is_shared(&registry, tree) {
            let known = &mut registry.known;
            known.retain(|other, _| other == tree || !overlap(&path, &self.path(other)));
        }
        registry.sealed.insert(tree.clone());
    }

    /// Whether another tree was sealed in the same folder, or in a part of it.
    fn is_shared(&self, registry: &Registry, tree: &TreeName) -> bool {
        let path = self.path(tree);
        let mut others = registry.sealed.iter().filter(|other| *other != tree);
        others.any(|other| overlap(&path, &self.path(other)))
    }

    /// Reserves a tree, and forgets what it held. A round that was just given up has a moment to let go of it.
    async fn enter_tree(&self, tree: &TreeName) -> Result<PathBuf, Fault> {
        let path = self.path(tree)?;
        let mut left = self.left.subscribe();
        let entering = left.wait_for(|()| {
            let mut registry = self.lock();
            let is_free = registry.active.insert(tree.clone());
            if is_free {
                registry.known.remove(tree);
            }
            is_free
        });
        match tokio::time::timeout(self.dead_after, entering).await {
            Ok(Ok(_)) => Ok(path),
            _ => Err(Fault::Busy(tree.clone())),
        }
    }

    fn leave_tree(&self, tree: &TreeName) {
        self.lock().active.remove(tree);
        self.left.send_replace(());
    }

    fn path(&self, tree: &TreeName) -> Result<PathBuf, Fault> {
        (self.trees)(tree)
            .map(|folder| folder.path)
            .ok_or_else(|| Fault::UnknownTree(tree.clone()))
    }

    /// Runs file work on a blocking thread; [`Self::close`] waits for it.
    async fn work<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let permit = Arc::clone(&self.works)
            .acquire_owned()
            .await
            .map_err(|_| Fault::Abandoned)?;
        let working = tokio::task::spawn_blocking(move || {
            let outcome = act();
            drop(permit);
            outcome
        });
        working.await.unwrap_or(Err(Fault::Abandoned))
    }

    /// Takes a data frame; returns when there is room for the next one.
    ///
    /// # Errors
    /// When the frame cannot be read, or belongs to a round that does not begin in time.
    pub(crate) async fn data(self: &Arc<Self>, frame: Frame) -> Result<(), FrameError> {
        let head: DataHead = frame.head()?;
        self.taken.fetch_add(1, Ordering::Relaxed);
        let mut begun = self.begun.subscribe();
        let waiting = async { begun.wait_for(|begun| *begun >= head.round).await.is_ok() };
        if !tokio::time::timeout(self.dead_after, waiting)
            .await
            .unwrap_or(false)
        {
            return Err(FrameError::Garbled);
        }
        let Some(round) = self.lock().rounds.get(&head.round).cloned() else {
            return Ok(());
        };
        let mut standing = round.standing.subscribe();
        let is_wanted = match standing
            .wait_for(|standing| standing.takes(head.codec))
            .await
        {
            Ok(standing) => standing.fault.is_none(),
            Err(_) => false,
        };
        let Ok(permit) = Arc::clone(&self.frames).acquire_owned().await else {
            return Ok(());
        };
        if is_wanted {
            // Not awaited: the stream reads its next frame meanwhile. The permit is what `close` waits for.
            tokio::task::spawn_blocking(move || {
                let is_over = round.standing.borrow().fault.is_some();
                match if is_over {
                    Err(Fault::Abandoned)
                } else {
                    round.apply(&head, frame.body())
                } {
                    Ok(()) => round.standing.send_modify(|standing| standing.frames += 1),
                    Err(fault) => round.fail(fault),
                }
                drop(permit);
            });
        }
        Ok(())
    }

    /// How many frames streams have handed in.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether frames that were handed in are being written: then a stream that is silent may be waiting for the disk.
    pub(crate) fn is_writing(&self) -> bool {
        self.frames.available_permits() < FRAMES_AT_ONCE as usize
    }

    /// Ends the session for a reason that a stream noticed.
    pub(crate) fn fail(&self, reason: String) {
        self.failure.send_modify(|known| {
            known.get_or_insert(reason);
        });
    }

    /// Waits for [`Self::fail`].
    pub(crate) async fn failed(&self) -> String {
        match self.failure.subscribe().wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the server is closing".to_owned(),
        }
    }

    /// Ends everything and waits until no thread writes any more.
    pub(crate) async fn close(&self) {
        self.cancel.store(true, Ordering::Relaxed);
        // What has been taken is written: it need not cross again. It fails only when closed, which nobody does.
        drop(self.frames.acquire_many(FRAMES_AT_ONCE).await);
        for round in self.lock().rounds.values() {
            round.fail(Fault::Abandoned);
        }
        // Both fail only when closed, which nobody does.
        let _ = self.frames.acquire_many(FRAMES_AT_ONCE).await;
        let _ = self.works.acquire_many(WORKS_AT_ONCE).await;
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one of two folders is in the other.
fn overlap(one: &Result<PathBuf, Fault>, other: &Result<PathBuf, Fault>) -> bool {
    let (Ok(one), Ok(other)) = (one, other) else {
        return false;
    };
    one.starts_with(other) || other.starts_with(one)
}

/// Waits until all frames of a round are in, and gives the root hash it was sealed with.
async fn over(round: &Round) -> Result<Digest, Fault> {
    let mut standing = round.standing.subscribe();
    let standing = standing
        .wait_for(super::round::Standing::is_over)
        .await
        .map_err(|_| Fault::Abandoned)?
        .clone();
    match (standing.fault, standing.seal) {
        (Some(fault), _) => Err(fault),
        (None, Some((_, root))) => Ok(root),
        (None, None) => Err(Fault::Abandoned),
    }
}

/// Room at the nearest folder that exists, so that asking makes nothing.
fn space(mut path: PathBuf) -> Result<Space, Fault> {
    let found = loop {
        match rustix::fs::statvfs(&path) {
            Err(rustix::io::Errno::NOENT) if path.pop() => {
                if path.as_os_str().is_empty() {
                    path.push(".");
                }
            }
            found => break found.map_err(|errno| FilesError::read(path.clone(), errno))?,
        }
    };
    Ok(Space {
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        free_files: found.f_favail,
    })
}
