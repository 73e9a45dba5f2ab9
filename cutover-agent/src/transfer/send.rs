//! The source's end of a round: walk, compare, read, send, seal.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::collect::Outlet;
use super::plan::{self, Memory, Plan, Sealed};
use super::wire::{Answer, Ask, Base, Codec, DATA_BYTES_MAX, DataHead, Fault, Listing, Space};
use super::{
    Durability, Measured, Origin, SyncOptions, SyncReport, TransferError, TreeName, Writers,
};
use crate::files::blocks::Digest;
use crate::files::content::Calm;
use crate::files::manifest::Manifest;
use crate::files::{FilesError, ManifestError};
use crate::peer::message::{Message, Topic};
use crate::peer::{Link, PeerError, Session, encode};

/// Round trips looked at by a measurement.
const PINGS: u32 = 5;

/// What a session knows about the trees it sends.
#[derive(Debug)]
pub(crate) struct Sender {
    link: Arc<Link>,
    trees: Mutex<HashMap<TreeName, Arc<tokio::sync::Mutex<Memory>>>>,
    /// The last round's number; held while a round is announced, so that numbers arrive in order.
    rounds: tokio::sync::Mutex<u64>,
}

impl Sender {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            trees: Mutex::default(),
            rounds: tokio::sync::Mutex::new(0),
        }
    }

    fn memory(&self, tree: &TreeName) -> Arc<tokio::sync::Mutex<Memory>> {
        Arc::clone(
            self.trees
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(tree.clone())
                .or_default(),
        )
    }

    async fn ask(
        &self,
        ask: &Ask,
        what: &'static str,
        limit: Duration,
    ) -> Result<Answer, TransferError> {
        let message = self
            .link
            .ask(Topic::Ask, encoded(ask)?, what, limit)
            .await?;
        understood(&message)
    }
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
            let first = self.sender.round(tree, root, &options, &mut memory).await;
            let mut report = match first {
                // The target was restarted or its tree forgotten: ask, and do it once more.
                Err(TransferError::Target(Fault::StaleBase(_))) => {
                    self.sender.round(tree, root, &options, &mut memory).await
                }
                outcome => outcome,
            }?;
            report.took = start.elapsed();
            Ok(report)
        };
        let timed = tokio::time::timeout(limit, syncing).await;
        timed.map_err(|_| TransferError::Deadline {
            tree: tree.clone(),
            limit,
        })?
    }

    /// Forgets what the target holds of a tree, because something else has written there (a restored container).
    ///
    /// # Errors
    /// When the session is lost.
    pub async fn forget(&self, tree: &TreeName, limit: Duration) -> Result<(), TransferError> {
        self.sender.memory(tree).lock().await.sealed = None;
        self.sender
            .ask(
                &Ask::Forget { tree: tree.clone() },
                "forgetting a tree",
                limit,
            )
            .await
            .map(drop)
    }

    /// Removes everything in the target's tree.
    ///
    /// # Errors
    /// When the target cannot, or the session is lost.
    pub async fn drop_tree(&self, tree: &TreeName, limit: Duration) -> Result<(), TransferError> {
        self.sender.memory(tree).lock().await.sealed = None;
        self.sender
            .ask(&Ask::Drop { tree: tree.clone() }, "dropping a tree", limit)
            .await
            .map(drop)
    }

    /// How much room there is at the target for a tree; nothing is made by asking.
    ///
    /// # Errors
    /// When the target does not know the tree, or the session is lost.
    pub async fn space(&self, tree: &TreeName, limit: Duration) -> Result<Space, TransferError> {
        match self
            .sender
            .ask(&Ask::Space { tree: tree.clone() }, "free space", limit)
            .await?
        {
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
        match self
            .sender
            .ask(
                &Ask::Size { tree: tree.clone() },
                "the size of a tree",
                limit,
            )
            .await?
        {
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
        let link = &self.sender.link;
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
                pieces: Vec::new(),
            };
            let frame = encode(&head, &noise(DATA_BYTES_MAX)).map_err(|_| PeerError::Vocabulary)?;
            let start = Instant::now();
            for _ in 0..frames {
                if !link.frames.push(frame.clone()).await {
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
fn noise(bytes: usize) -> Vec<u8> {
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

impl Sender {
    /// One round. `memory` is left empty unless it ends well.
    async fn round(
        &self,
        tree: &TreeName,
        root: &Path,
        options: &SyncOptions,
        memory: &mut Memory,
    ) -> Result<SyncReport, TransferError> {
        let cancel = Arc::new(AtomicBool::new(false));
        let mut underway = Underway {
            link: &self.link,
            round: 0,
            cancel: Arc::clone(&cancel),
            is_over: false,
        };
        let mut plan = self.plan(tree, root, options, memory, &cancel).await?;
        let (bytes_read, list_bytes) = (plan.bytes(), plan.steps.length());
        let (progress, base) = (&options.progress, std::mem::take(&mut plan.base));
        progress.total.fetch_add(bytes_read, Ordering::Relaxed);
        let number = self.link.number();
        let booking = self.link.expect(number);
        underway.round = self.begin(number, tree, options, &mut plan).await?;
        let outlet = self.outlet(underway.round, base, cancel, options);
        let calm = match options.writers {
            Writers::Frozen => Calm::Frozen,
            Writers::Running => Calm::Live,
        };
        let reading = off(move || plan::read(plan, calm, outlet));
        let answering = self.link.answer(booking);
        tokio::pin!(reading, answering);
        let read = tokio::select! {
            read = &mut reading => read?,
            early = &mut answering => {
                // It can only be a refusal: nothing was sealed yet.
                understood(&early?)?;
                return Err(PeerError::Vocabulary.into());
            }
        };
        let seal = encoded(&read.seal(underway.round))?;
        self.link
            .tell(Topic::Ask, self.link.number(), &seal)
            .await?;
        understood(&answering.await?)?;
        underway.is_over = true;
        let report = read.report(bytes_read, list_bytes);
        *memory = read.into_memory();
        Ok(report)
    }

    /// Walks the tree, learns what the target has, and decides what has to be read.
    async fn plan(
        &self,
        tree: &TreeName,
        root: &Path,
        options: &SyncOptions,
        memory: &mut Memory,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Plan, TransferError> {
        let mut memory = std::mem::take(memory);
        let (path, walking) = (root.to_owned(), Arc::clone(cancel));
        let walk = off(move || plan::walk_tree(&path, &walking));
        // The walk and the target's answer take their time together.
        let sealed = self.sealed(tree, options, memory.sealed.take());
        let (walked, sealed) = tokio::join!(walk, sealed);
        let ((root, walked), sealed) = (walked?, sealed?);
        memory.sealed = sealed;
        let rehash = options.always_rehash.clone();
        off(move || plan::plan(root, walked, memory, &rehash)).await
    }

    /// Announces the round, and gives its number.
    async fn begin(
        &self,
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
            is_durable: options.durability == Durability::Synced,
        };
        self.link.tell(Topic::Ask, number, &encoded(&ask)?).await?;
        Ok(*last)
    }

    fn outlet(
        &self,
        round: u64,
        base: Vec<Option<Arc<Vec<Digest>>>>,
        cancel: Arc<AtomicBool>,
        options: &SyncOptions,
    ) -> Outlet {
        Outlet {
            link: Arc::clone(&self.link),
            runtime: Handle::current(),
            round,
            base,
            cancel,
            progress: Arc::clone(&options.progress),
            frames: AtomicU64::new(0),
            bytes_data: AtomicU64::new(0),
            bytes_wire: AtomicU64::new(0),
        }
    }

    /// What the target holds: as remembered, or as it says; `None` when it shall begin with nothing.
    async fn sealed(
        &self,
        tree: &TreeName,
        options: &SyncOptions,
        remembered: Option<Sealed>,
    ) -> Result<Option<Sealed>, TransferError> {
        if remembered.is_some() || options.origin == Origin::Nothing {
            return Ok(remembered);
        }
        match self
            .ask(
                &Ask::Have { tree: tree.clone() },
                "what the target has",
                options.limit,
            )
            .await?
        {
            Answer::Have { list, root } => {
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
                Ok(Some(Sealed {
                    manifest: unpacked.await?,
                    root,
                    is_ours: false,
                }))
            }
            _ => Err(PeerError::Vocabulary.into()),
        }
    }
}
