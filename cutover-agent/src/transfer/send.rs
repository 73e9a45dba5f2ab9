//! The source's end of a round: walk, compare, read, send, seal.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::collect::Outlet;
use super::fingerprints::Fingerprints;
use super::linked::Linker;
use super::plan::{self, Memory, Plan, Sealed, Survey, There, Wishes};
use super::replaced::Replaced;
use super::sharing::{Rank, Ranks, Sizes};
use super::wire::{
    Answer, Ask, Base, Codec, DATA_BYTES_MAX, DataHead, Fault, Listing, Packed, Space,
};
use super::{
    Durability, Measured, Origin, SyncOptions, SyncReport, TransferError, TreeName, Writers,
    discard,
};
use crate::files::blocks::Digest;
use crate::files::content::Calm;
use crate::files::cuts::Cut;
use crate::files::index::Indexes;
use crate::files::manifest::Manifest;
use crate::files::{FilesError, ManifestError};
use crate::peer::message::{Message, Topic};
use crate::peer::{Link, PeerError, Session, encode};

/// How often a round is done again while the connections are whole: something is wrong that no trying will cure.
const TRIES_MAX: u32 = 3;
/// Round trips looked at by a measurement.
const PINGS: u32 = 5;

/// What a session knows about the trees it sends.
#[derive(Debug, Default)]
pub(crate) struct Sender {
    trees: Mutex<HashMap<TreeName, Arc<tokio::sync::Mutex<Memory>>>>,
    /// The last round's number; held while a round is announced, so that numbers arrive in order.
    rounds: tokio::sync::Mutex<u64>,
    indexes: Arc<Indexes>,
    ranks: Ranks,
    fingerprints: Arc<Fingerprints>,
}

impl Sender {
    fn memory(&self, tree: &TreeName) -> Arc<tokio::sync::Mutex<Memory>> {
        Arc::clone(
            self.trees
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(tree.clone())
                .or_default(),
        )
    }
}

async fn request(
    link: &Link,
    ask: &Ask,
    what: &'static str,
    limit: Duration,
) -> Result<Answer, TransferError> {
    understood(&link.ask(Topic::Ask, encoded(ask)?, what, limit).await?)
}

fn encoded(ask: &Ask) -> Result<Vec<u8>, TransferError> {
    postcard::to_stdvec(ask).map_err(|_| PeerError::Vocabulary.into())
}

fn understood(message: &Message) -> Result<Answer, TransferError> {
    match postcard::from_bytes(&message.bytes) {
        Ok(Answer::Failed(fault)) => Err(fault.into()),
        Ok(answer) => Ok(answer),
        Err(_) => Err(PeerError::Vocabulary.into()),
    }
}

/// Runs file work off the runtime's threads.
async fn off<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    tokio::task::spawn_blocking(act)
        .await
        .unwrap_or(Err(TransferError::Files(FilesError::Cancelled)))
}

impl Session {
    /// Makes the target's tree equal to the one under `root`: one round. Rounds of different trees may run at once;
    /// of one tree, the second waits for the first.
    ///
    /// # Errors
    /// When anything at either side or between them fails, or `options.limit` is over. The target's tree is then half
    /// changed; the next call asks what is there, and moves only what is missing.
    ///
    /// # Cancel safety
    /// Dropped, the round is given up at both sides, as after an error.
    pub async fn sync(
        &self,
        tree: &TreeName,
        root: &Path,
        options: SyncOptions,
    ) -> Result<SyncReport, TransferError> {
        let limit = options.limit;
        let start = Instant::now();
        let syncing = async {
            let memory = self.sender.memory(tree);
            let mut memory = memory.lock().await;
            let mut report = self.rounds(tree, root, options, &mut memory).await?;
            report.took = start.elapsed();
            Ok(report)
        };
        let timed = tokio::time::timeout(limit, syncing).await;
        timed.map_err(|_| TransferError::Deadline {
            tree: tree.clone(),
            limit,
        })?
    }

    /// One round, and again what of it failed for a reason that may pass.
    async fn rounds(
        &self,
        tree: &TreeName,
        root: &Path,
        mut options: SyncOptions,
        memory: &mut Memory,
    ) -> Result<SyncReport, TransferError> {
        let (mut tries, mut spent, mut weaves) = (0, Spent::default(), true);
        let rank = self.sender.ranks.enter(tree, &options);
        loop {
            let link = self.link();
            let round = self
                .sender
                .round(&link, (&rank, root), &options, weaves, memory);
            let error = match round.await {
                Ok(report) => {
                    rank.seal();
                    return Ok(spent.added_to(report));
                }
                Err(failed) => {
                    spent.add(&failed.spent);
                    failed.error
                }
            };
            if !link.is_alive() {
                // Whatever was said, this is why. The time for it is in the timeouts of the session.
                self.revive().await?;
            } else if tries < TRIES_MAX && is_worth_another(&error) {
                tries += 1;
            } else {
                return Err(error);
            }
            // One piece may have been taken for another.
            weaves &= !matches!(error, TransferError::Target(Fault::Damaged { .. }));
            tracing::info!(%tree, %error, "a round goes on from what has arrived");
            options.origin = Origin::Ask;
        }
    }

    /// Forgets what the target holds of a tree, because something else has written there (a restored container).
    ///
    /// # Errors
    /// When the session is lost.
    pub async fn forget(&self, tree: &TreeName, limit: Duration) -> Result<(), TransferError> {
        self.sender.memory(tree).lock().await.sealed = None;
        let ask = Ask::Forget { tree: tree.clone() };
        request(&self.link(), &ask, "forgetting a tree", limit)
            .await
            .map(drop)
    }

    /// Removes everything in the target's tree.
    ///
    /// # Errors
    /// When the target cannot, or the session is lost.
    pub async fn drop_tree(&self, tree: &TreeName, limit: Duration) -> Result<(), TransferError> {
        self.sender.memory(tree).lock().await.sealed = None;
        let ask = Ask::Drop { tree: tree.clone() };
        request(&self.link(), &ask, "dropping a tree", limit)
            .await
            .map(drop)
    }

    /// How much room there is at the target for a tree; nothing is made by asking.
    ///
    /// # Errors
    /// When the target does not know the tree, or the session is lost.
    pub async fn space(&self, tree: &TreeName, limit: Duration) -> Result<Space, TransferError> {
        let ask = Ask::Space { tree: tree.clone() };
        match request(&self.link(), &ask, "free space", limit).await? {
            Answer::Space(space) => Ok(space),
            _ => Err(PeerError::Vocabulary.into()),
        }
    }

    /// Bytes of files and number of entries the target's tree has now.
    ///
    /// # Errors
    /// When the target does not know the tree or cannot read it, or the session is lost.
    pub async fn size(
        &self,
        tree: &TreeName,
        limit: Duration,
    ) -> Result<(u64, u64), TransferError> {
        let ask = Ask::Size { tree: tree.clone() };
        match request(&self.link(), &ask, "the size of a tree", limit).await? {
            Answer::Size { bytes, entries } => Ok((bytes, entries)),
            _ => Err(PeerError::Vocabulary.into()),
        }
    }

    /// Measures round trip and throughput by sending `bytes` (rounded up to whole frames) of noise over all streams.
    /// It also opens the streams' windows: done shortly before a freeze, the frozen transfer starts at full speed.
    ///
    /// # Errors
    /// When `limit` is over or the session lost.
    pub async fn measure(&self, bytes: u64, limit: Duration) -> Result<Measured, TransferError> {
        let round_trip = self.round_trip(PINGS, limit).await?;
        let frames = bytes.div_ceil(DATA_BYTES_MAX as u64).max(1);
        let link = &self.link();
        let measuring = async {
            let number = link.number();
            let booking = link.expect(number);
            let mut last = self.sender.rounds.lock().await;
            *last += 1;
            let round = *last;
            link.tell(
                Topic::Ask,
                number,
                &encoded(&Ask::Measure { round, frames })?,
            )
            .await?;
            drop(last);
            let head = DataHead {
                round,
                codec: Codec::Plain,
                digest: Digest::UNKNOWN,
                pieces: Vec::new(),
            };
            let frame = encode(&head, &noise(DATA_BYTES_MAX)).map_err(|_| PeerError::Vocabulary)?;
            let frame = Arc::new(frame);
            let start = Instant::now();
            for _ in 0..frames {
                if !link.frames.push(Arc::clone(&frame)).await {
                    return Err(TransferError::from(link.lost_error()));
                }
            }
            understood(&link.answer(booking).await?)?;
            Ok(start.elapsed())
        };
        let what = "measuring the link";
        let took = tokio::time::timeout(limit, measuring)
            .await
            .map_err(|_| PeerError::Deadline { what, limit })??;
        // The answer's way back is not part of the transfer.
        let seconds = took.saturating_sub(round_trip / 2).as_secs_f64().max(1e-6);
        Ok(Measured {
            round_trip,
            bytes_per_second: (frames * DATA_BYTES_MAX as u64) as f64 / seconds,
        })
    }
}

/// Bytes that no tunnel can compress: a hash chain's output.
pub(super) fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    noise
}

/// Gives the round up at both sides unless it came to its end.
struct Underway<'a> {
    link: &'a Link,
    round: u64,
    cancel: Arc<AtomicBool>,
    is_over: bool,
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        self.cancel.store(true, Ordering::Relaxed);
        if let Ok(ask) = encoded(&Ask::Abandon { round: self.round }) {
            self.link.farewell(Topic::Ask, self.link.number(), &ask);
        }
    }
}

/// What rounds that failed have moved; it counts all the same.
#[derive(Debug, Default, Clone, Copy)]
struct Spent {
    bytes_data: u64,
    bytes_wire: u64,
}

impl Spent {
    fn add(&mut self, other: &Self) {
        self.bytes_data += other.bytes_data;
        self.bytes_wire += other.bytes_wire;
    }

    fn added_to(&self, mut report: SyncReport) -> SyncReport {
        report.bytes_data += self.bytes_data;
        report.bytes_wire += self.bytes_wire;
        report
    }
}

/// A round that came to no good end.
struct FailedRound {
    error: TransferError,
    spent: Spent,
}

impl<E: Into<TransferError>> From<E> for FailedRound {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            spent: Spent::default(),
        }
    }
}

/// Whether the same round may end well when it is done again: the target was restarted or forgot the tree, or bytes were
/// damaged on their way.
const fn is_worth_another(error: &TransferError) -> bool {
    matches!(
        error,
        TransferError::Target(Fault::StaleBase(_) | Fault::Damaged { .. } | Fault::NotSealed(_))
    )
}

impl Sender {
    /// One round. `memory` knows afterwards what the target has only if it ended well.
    async fn round(
        &self,
        link: &Arc<Link>,
        (rank, root): (&Rank<'_>, &Path),
        options: &SyncOptions,
        weaves: bool,
        memory: &mut Memory,
    ) -> Result<SyncReport, FailedRound> {
        let tree = rank.tree();
        let cancel = Arc::new(AtomicBool::new(false));
        let mut underway = Underway {
            link,
            round: 0,
            cancel: Arc::clone(&cancel),
            is_over: false,
        };
        let mut plan = self
            .plan(link, (rank, root), options, weaves, memory, &cancel)
            .await?;
        let (bytes_read, list_bytes) = (plan.bytes(), plan.steps.length());
        let progress = &options.progress;
        let there = std::mem::take(&mut plan.there);
        progress.total.fetch_add(bytes_read, Ordering::Relaxed);
        let number = link.number();
        let booking = link.expect(number);
        underway.round = self.begin(link, number, tree, options, &mut plan).await?;
        let outlet = self.outlet(link, underway.round, there, cancel, options);
        let tally = Arc::clone(&outlet.tally);
        let calm = match options.writers {
            Writers::Frozen => Calm::Frozen,
            Writers::Running => Calm::Live,
        };
        let ending = async {
            let reading = off(move || plan::read(plan, calm, outlet));
            let answering = link.answer(booking);
            tokio::pin!(reading, answering);
            let mut read = tokio::select! {
                read = &mut reading => read?,
                early = &mut answering => {
                    // It can only be a refusal: nothing was sealed yet.
                    understood(&early?)?;
                    return Err(PeerError::Vocabulary.into());
                }
            };
            let seal = encoded(&read.seal(underway.round))?;
            link.tell(Topic::Ask, link.number(), &seal).await?;
            understood(&answering.await?)?;
            Ok(read)
        };
        let ended: Result<_, TransferError> = ending.await;
        let read = ended.map_err(|error| FailedRound {
            error,
            spent: Spent {
                bytes_data: tally.bytes_data.load(Ordering::Relaxed),
                bytes_wire: tally.bytes_wire.load(Ordering::Relaxed) + list_bytes,
            },
        })?;
        underway.is_over = true;
        self.fingerprints.forget_replaced();
        let report = read.report(bytes_read, list_bytes);
        discard(std::mem::replace(memory, read.into_memory()));
        Ok(report)
    }

    fn outlet(
        &self,
        link: &Arc<Link>,
        round: u64,
        there: There,
        cancel: Arc<AtomicBool>,
        options: &SyncOptions,
    ) -> Outlet {
        Outlet {
            link: Arc::clone(link),
            runtime: Handle::current(),
            round,
            compress: options.compress,
            there,
            fingerprints: Arc::clone(&self.fingerprints),
            linker: Linker::default(),
            cancel,
            progress: Arc::clone(&options.progress),
            tally: Arc::default(),
        }
    }

    /// Walks the tree, learns what the target has, and decides what has to be read.
    async fn plan(
        &self,
        link: &Link,
        (rank, root): (&Rank<'_>, &Path),
        options: &SyncOptions,
        weaves: bool,
        memory: &mut Memory,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Plan, TransferError> {
        let tree = rank.tree();
        let remembered = memory.sealed.take();
        let may_share = rank.may_share() && remembered.is_none();
        let ours = memory.ours.clone();
        let survey = Survey {
            ours: ours.clone(),
            writers: options.writers.clone(),
            written: &options.always_rehash | &options.always_look,
            indexes: Arc::clone(&self.indexes),
            cancel: Arc::clone(cancel),
        };
        let path = root.to_owned();
        let walk = move || survey.walk(&path);
        let wishes = Wishes {
            rehash: options.always_rehash.clone(),
            in_place: weaves.then(|| Arc::clone(&options.in_place)),
            writers: options.writers.clone(),
        };
        let decide = move |surveyed, sealed| {
            let plan = plan::plan(surveyed, sealed, ours, &wishes)?;
            let sizes = may_share.then(|| Sizes::of(&plan));
            Ok((plan, sizes))
        };
        let is_asked = remembered.is_none() && options.origin == Origin::Ask;
        let ((mut plan, sizes), has_seeds) = if is_asked {
            // The walk and the target's answer take their time together.
            let (surveyed, sealed) = tokio::join!(off(walk), sealed(link, tree, options.limit));
            let (surveyed, (sealed, has_seeds)) = (surveyed?, sealed?);
            (
                off(move || decide(surveyed, Some(sealed))).await?,
                has_seeds,
            )
        } else {
            // On one thread: clients may be waiting.
            (off(move || decide(walk()?, remembered)).await?, false)
        };
        let has_others = match sizes {
            Some(sizes) => rank.wait(sizes).await,
            None => false,
        };
        let sizes = plan.new_sizes();
        if (has_seeds || has_others) && !sizes.is_empty() {
            let seeds = seeds(link, tree, &sizes, options.limit).await?;
            plan.add_seeds(&seeds);
        }
        if !plan.replaced.is_empty() {
            let cuts = cuts(link, tree, &plan.replaced, options.limit).await?;
            plan.add_cuts(&cuts);
        }
        Ok(plan)
    }

    /// Announces the round, and gives its number.
    async fn begin(
        &self,
        link: &Link,
        number: u64,
        tree: &TreeName,
        options: &SyncOptions,
        plan: &mut Plan,
    ) -> Result<u64, TransferError> {
        let mut last = self.rounds.lock().await;
        *last += 1;
        let ask = Ask::Begin {
            round: *last,
            tree: tree.clone(),
            base: plan.origin.take().map_or(Base::Empty, Base::Known),
            steps: std::mem::take(&mut plan.steps),
            replaced: plan.replaced.iter().map(|replaced| replaced.old).collect(),
            is_durable: options.durability == Durability::Synced,
        };
        link.tell(Topic::Ask, number, &encoded(&ask)?).await?;
        Ok(*last)
    }
}

/// What else the target has of files of these sizes.
async fn seeds(
    link: &Link,
    tree: &TreeName,
    sizes: &Vec<u64>,
    limit: Duration,
) -> Result<Vec<Vec<Digest>>, TransferError> {
    let ask = Ask::Seeds {
        tree: tree.clone(),
        sizes: Packed::of(sizes)?,
    };
    match request(link, &ask, "what else the target has", limit).await? {
        Answer::Seeds(list) => off(move || Ok(list.open()?)).await,
        _ => Err(PeerError::Vocabulary.into()),
    }
}

/// What the target's old content of these files is cut into.
async fn cuts(
    link: &Link,
    tree: &TreeName,
    replaced: &[Replaced],
    limit: Duration,
) -> Result<Vec<Vec<Cut>>, TransferError> {
    let files: Vec<u32> = replaced.iter().map(|replaced| replaced.old).collect();
    let ask = Ask::Cuts {
        tree: tree.clone(),
        files: Packed::of(&files)?,
    };
    match request(link, &ask, "what old files consist of", limit).await? {
        Answer::Cuts(list) => off(move || Ok(list.open()?)).await,
        _ => Err(PeerError::Vocabulary.into()),
    }
}

/// What the target holds, and whether to ask for seeds.
async fn sealed(
    link: &Link,
    tree: &TreeName,
    limit: Duration,
) -> Result<(Sealed, bool), TransferError> {
    let ask = Ask::Have { tree: tree.clone() };
    match request(link, &ask, "what the target has", limit).await? {
        Answer::Have {
            list,
            root,
            has_seeds,
        } => {
            let unpacked = off(move || {
                let listing: Listing = list.open()?;
                if listing.entries.len() != listing.digests.len() {
                    return Err(ManifestError::Garbled.into());
                }
                Ok(Manifest {
                    entries: listing.entries,
                    digests: listing.digests.into_iter().map(Arc::new).collect(),
                })
            });
            let sealed = Sealed {
                manifest: Arc::new(unpacked.await?),
                root,
            };
            Ok((sealed, has_seeds))
        }
        _ => Err(PeerError::Vocabulary.into()),
    }
}
