//! The source's end of a round: walk, compare, read, send, seal.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::collect::{Collector, Outlet};
use super::wire::{
    Answer, Ask, Base, Codec, DATA_BYTES_MAX, DataHead, Fault, Listing, Packed, Space,
};
use super::{
    Durability, Measured, Origin, SyncOptions, SyncReport, TransferError, TreeName, Writers,
};
use crate::files::blocks::{self, Digest};
use crate::files::content::{self, Calm};
use crate::files::manifest::{self, Manifest};
use crate::files::walk::{self, Stamp, Walked};
use crate::files::{FilesError, Kind, ManifestError, Root};
use crate::peer::message::{Message, Topic};
use crate::peer::{Link, PeerError, Session, encode};

/// Threads that read, hash and pack. Two keep a link of several Gbit/s busy, and leave the rest to the containers.
const READERS: usize = 2;
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

/// What is remembered of a tree between rounds.
#[derive(Debug, Default)]
struct Memory {
    /// What the target sealed; absent before the first round and after a failed one.
    sealed: Option<Sealed>,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
}

#[derive(Debug)]
struct Sealed {
    manifest: Manifest,
    root: Digest,
    /// Whether the stamps are those of this manifest's files.
    is_ours: bool,
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

/// A round as planned from the walk.
struct Plan {
    root: Root,
    walked: Walked,
    wanted: Vec<usize>,
    /// Digests that need no reading, per entry.
    kept: Vec<Option<Arc<Vec<Digest>>>>,
    /// What the target has, per entry.
    base: Vec<Option<Arc<Vec<Digest>>>>,
    steps: Packed,
}

impl Sender {
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
        let (path, walking) = (root.to_owned(), Arc::clone(&cancel));
        let walk = off(move || walk_tree(&path, &walking));
        // The walk and the target's answer take their time together.
        let (walked, sealed) = tokio::join!(walk, self.sealed(tree, options, memory.sealed.take()));
        let ((root, walked), sealed) = (walked?, sealed?);
        let base = sealed
            .as_ref()
            .map_or(Base::Empty, |sealed| Base::Known(sealed.root));
        let (stamps, scanned_ns) = (std::mem::take(&mut memory.stamps), memory.scanned_ns);
        let rehash = options.always_rehash.clone();
        let plan = off(move || {
            let is_same = |index: usize, at: usize, walked: &Walked| {
                let stamp = &walked.stamps[index];
                let known = stamps.get(at).copied().flatten();
                known.is_some_and(|known| known.is_same(stamp) && known.is_settled(scanned_ns))
                    && !rehash.contains(&(stamp.device, stamp.inode))
            };
            plan(root, walked, sealed.unwrap_or_default(), is_same)
        })
        .await?;
        let total = plan
            .wanted
            .iter()
            .map(|at| plan.walked.entries[*at].size())
            .sum();
        options.progress.total.fetch_add(total, Ordering::Relaxed);
        let is_durable = options.durability == Durability::Synced;
        let (number, list_bytes) = (self.link.number(), plan.steps.length());
        let booking = self.link.expect(number);
        let Plan {
            root,
            walked,
            wanted,
            kept,
            base: has,
            steps,
        } = plan;
        let mut last = self.rounds.lock().await;
        *last += 1;
        underway.round = *last;
        let begin = encoded(&Ask::Begin {
            round: *last,
            tree: tree.clone(),
            base,
            steps,
            is_durable,
        })?;
        self.link.tell(Topic::Ask, number, &begin).await?;
        drop(last);
        let outlet = self.outlet(underway.round, has, cancel, options);
        let calm = if options.writers == Writers::Frozen {
            Calm::Frozen
        } else {
            Calm::Live
        };
        let reading = off(move || read(root, walked, &wanted, kept, calm, outlet));
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
        let seal = Ask::Seal {
            round: underway.round,
            frames: read.frames,
            root: read.hash,
        };
        self.link
            .tell(Topic::Ask, self.link.number(), &encoded(&seal)?)
            .await?;
        understood(&answering.await?)?;
        underway.is_over = true;
        let report = read.report(total, list_bytes);
        *memory = Memory {
            sealed: Some(Sealed {
                manifest: read.manifest,
                root: read.hash,
                is_ours: true,
            }),
            stamps: read.stamps,
            scanned_ns: read.scanned_ns,
        };
        Ok(report)
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

fn walk_tree(path: &Path, cancel: &AtomicBool) -> Result<(Root, Walked), TransferError> {
    let root = Root::open(path).map_err(|errno| FilesError::read(path.to_owned(), errno))?;
    let walked = walk::walk(&root, cancel)?;
    Ok((root, walked))
}

impl Default for Sealed {
    fn default() -> Self {
        Self {
            manifest: Manifest::default(),
            root: Digest::UNKNOWN,
            is_ours: false,
        }
    }
}

/// Decides what has to be read: everything but files of an earlier round of ours that have not changed since.
fn plan(
    root: Root,
    walked: Walked,
    sealed: Sealed,
    is_same: impl Fn(usize, usize, &Walked) -> bool,
) -> Result<Plan, TransferError> {
    let steps = Packed::of(&manifest::difference(
        &sealed.manifest.entries,
        &walked.entries,
    ))?;
    let (mut wanted, mut kept, mut base) = (Vec::new(), Vec::new(), Vec::new());
    for (index, entry) in walked.entries.iter().enumerate() {
        let at = match entry.kind {
            Kind::File { .. } => sealed.manifest.find(&entry.path),
            _ => None,
        };
        let known = at.filter(|at| matches!(sealed.manifest.entries[*at].kind, Kind::File { .. }));
        let has = known.map(|at| Arc::clone(&sealed.manifest.digests[at]));
        let reuse = known
            .filter(|at| sealed.is_ours && is_same(index, *at, &walked))
            .and_then(|_| has.clone());
        let reuse = reuse.filter(|digests| digests.len() as u64 == blocks::count(entry.size()));
        if reuse.is_none() && matches!(entry.kind, Kind::File { .. }) {
            wanted.push(index);
        }
        kept.push(reuse);
        base.push(has);
    }
    Ok(Plan {
        root,
        walked,
        wanted,
        kept,
        base,
        steps,
    })
}

/// A round whose frames are all handed to the streams.
struct ReadRound {
    manifest: Manifest,
    hash: Digest,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
    frames: u64,
    bytes_data: u64,
    bytes_wire: u64,
}

fn read(
    root: Root,
    walked: Walked,
    wanted: &[usize],
    kept: Vec<Option<Arc<Vec<Digest>>>>,
    calm: Calm,
    outlet: Outlet,
) -> Result<ReadRound, TransferError> {
    let collectors = (0..READERS).map(|_| Collector::new(&outlet)).collect();
    let contents = content::read(&root, &walked, wanted, calm, collectors, &outlet.cancel)?;
    let mut digests: Vec<Arc<Vec<Digest>>> =
        kept.into_iter().map(Option::unwrap_or_default).collect();
    for (entry, found) in wanted.iter().zip(contents.digests) {
        digests[*entry] = Arc::new(found);
    }
    let mut stamps: Vec<_> = walked.stamps.into_iter().map(Some).collect();
    for entry in contents.unsteady {
        stamps[entry] = None;
    }
    let manifest = Manifest {
        entries: walked.entries,
        digests,
    };
    Ok(ReadRound {
        hash: manifest.root(),
        manifest,
        stamps,
        scanned_ns: walked.started_ns,
        frames: outlet.frames.into_inner(),
        bytes_data: outlet.bytes_data.into_inner(),
        bytes_wire: outlet.bytes_wire.into_inner(),
    })
}

impl ReadRound {
    fn report(&self, bytes_read: u64, list_bytes: u64) -> SyncReport {
        SyncReport {
            bytes_data: self.bytes_data,
            bytes_wire: self.bytes_wire + list_bytes,
            bytes_read,
            bytes_tree: self.manifest.bytes(),
            files: self.manifest.files(),
            took: Duration::ZERO,
        }
    }
}
