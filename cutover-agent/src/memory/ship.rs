//! The source's end: gives each page its slot, and sends those the target lacks.

use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cutover_protocol::plan::Compress;
use tokio::runtime::Handle;

use super::MemoryError;
use super::carrier::Carrier;
use super::digest::{DigestKey, PAGE_BYTES, PageDigest, is_zero};
use super::known::{Known, Place};
use super::lanes::OwnLane;
use super::layout::Layout;
use super::parent::Parent;
use super::runs::{Runs, Slot, ZERO};
use super::server::frames::{FLAG_PARENT, FLAG_PRESENT};
use super::server::{self, Listener, Sink, Uncorked};
use super::wire::{
    Draft, FRAME_DATA_MAX, FRAME_PAGES_MAX, ImageId, PageAsk, PagesHead, Piece, Region, Seal,
};
use crate::peer::{Channel, PeerError, Session, encode_on};
use crate::transfer::{Codec, Packer};

/// What a session knows about the pages of one hop.
#[derive(Debug)]
pub(crate) struct PageSource {
    carrier: Carrier,
    runtime: Handle,
    key: DigestKey,
    zero: PageDigest,
    compress: Compress,
    known: Mutex<Known>,
}

/// What was done, of one container or of all; counters only grow.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Pages looked at.
    pub(crate) pages: AtomicU64,
    /// Pages the target lacked.
    pub(crate) pages_new: AtomicU64,
    /// Bytes handed to the streams, packed, with heads and pieces.
    pub(crate) bytes_wire: AtomicU64,
}

impl PageSource {
    /// Opens the target's store with a fresh key.
    ///
    /// # Errors
    /// When the target has no room, or the session is lost.
    pub(crate) async fn open(
        session: &Arc<Session>,
        compress: Compress,
        limit: Duration,
    ) -> Result<Self, MemoryError> {
        let mut secret = [0; 32];
        rustls::crypto::aws_lc_rs::default_provider()
            .secure_random
            .fill(&mut secret)
            .map_err(|_| PeerError::Lost {
                reason: "the system has no random numbers".into(),
            })?;
        let key = DigestKey::new(secret);
        let source = Self {
            carrier: Carrier::new(session),
            runtime: Handle::current(),
            key,
            zero: key.digest(&[0; PAGE_BYTES]),
            compress,
            known: Mutex::new(Known::new()),
        };
        source
            .carrier
            .ask(&PageAsk::Open { key }, "opening the page store", limit)
            .await?;
        Ok(source)
    }

    /// Waits until the target has every page that was sent. Nobody may send meanwhile.
    ///
    /// # Errors
    /// When a page was damaged or had no room, the time is over, or the session is lost.
    pub(crate) async fn settle(&self, limit: Duration) -> Result<(), MemoryError> {
        let end = self.lock().end();
        let what = "the target to have every page";
        self.carrier
            .ask(&PageAsk::Settle { end }, what, limit)
            .await?;
        self.carrier.forget_frames();
        Ok(())
    }

    /// Waits until the images of a container are as a round saw them. Nobody may tell the next one meanwhile.
    ///
    /// # Errors
    /// When a page was damaged or had no room, the time is over, or the session is lost.
    pub(crate) async fn drafted(&self, draft: Draft, limit: Duration) -> Result<(), MemoryError> {
        let container = draft.container.clone();
        let what = "the images of a round";
        self.carrier
            .ask(&PageAsk::Drafted(draft), what, limit)
            .await?;
        self.carrier.forget(&container);
        Ok(())
    }

    /// Has the target complete the images of a container.
    ///
    /// # Errors
    /// When they are not what was dumped, the time is over, or the session is lost.
    pub(crate) async fn seal(&self, seal: Seal, limit: Duration) -> Result<(), MemoryError> {
        let container = seal.container.clone();
        self.carrier
            .ask(&PageAsk::Seal(seal), "the images of memory", limit)
            .await?;
        self.carrier.forget(&container);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread's pages on their way.
pub(crate) struct Shipper {
    source: Arc<PageSource>,
    tally: Arc<Tally>,
    lane: OwnLane,
    runs: Runs,
    digests: Vec<u8>,
    bytes: Vec<u8>,
    packer: Packer,
    places: Vec<(Slot, PageDigest)>,
}

impl Shipper {
    pub(crate) fn new(source: Arc<PageSource>, tally: Arc<Tally>, lane: OwnLane) -> Self {
        let packer = Packer::new(source.compress);
        Self {
            source,
            tally,
            lane,
            runs: Runs::default(),
            digests: Vec::new(),
            bytes: Vec::with_capacity(FRAME_DATA_MAX),
            packer,
            places: Vec::with_capacity(FRAME_PAGES_MAX),
        }
    }

    /// Takes whole pages, and gives where each lies at the target. What is new is on its way or waits for [`Self::flush`].
    ///
    /// # Errors
    /// When the session is lost, or there are too many different pages.
    pub(crate) fn take(&mut self, pages: &[u8]) -> Result<&[(Slot, PageDigest)], MemoryError> {
        self.places.clear();
        // Hashed without the lock; looked up in one go with it.
        for page in pages.chunks_exact(PAGE_BYTES) {
            let place = if is_zero(page) {
                (ZERO, self.source.zero)
            } else {
                (Slot::MAX, self.source.key.digest(page))
            };
            self.places.push(place);
        }
        let mut fresh = Vec::new();
        {
            let mut known = self.source.lock();
            for (index, (slot, digest)) in self.places.iter_mut().enumerate() {
                if *slot == ZERO {
                    continue;
                }
                *slot = match known.place(*digest).ok_or(MemoryError::Full)? {
                    Place::Known(slot) => slot,
                    Place::New(slot) => {
                        fresh.push(index);
                        slot
                    }
                };
            }
        }
        self.tally
            .pages
            .fetch_add(self.places.len() as u64, Ordering::Relaxed);
        self.tally
            .pages_new
            .fetch_add(fresh.len() as u64, Ordering::Relaxed);
        for index in fresh {
            let (slot, digest) = self.places[index];
            self.runs.push(slot);
            self.digests.extend_from_slice(&digest.0);
            self.bytes
                .extend_from_slice(&pages[index * PAGE_BYTES..][..PAGE_BYTES]);
            if self.bytes.len() >= FRAME_DATA_MAX {
                self.flush()?;
            }
        }
        self.lane.count(pages.len() as u64);
        Ok(&self.places)
    }

    /// Counts pages that nobody needs to look at.
    fn pass(&self, pages: usize) {
        self.lane.count((pages * PAGE_BYTES) as u64);
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// When the session is lost.
    pub(crate) fn flush(&mut self) -> Result<(), MemoryError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let link = self.source.carrier.link();
        let wire = (&link.gauge, link.look());
        let packed = self.packer.pack(&self.bytes, wire, None);
        let (codec, body) = match &packed {
            Some((codec, packed, _)) => (*codec, packed.as_slice()),
            None => (Codec::Plain, self.bytes.as_slice()),
        };
        let runs = self.runs.take();
        let head = PagesHead {
            runs: runs.clone(),
            digests: std::mem::take(&mut self.digests),
            codec,
        };
        // Far below the bound on frames; see FRAME_PAGES_MAX.
        let frame = encode_on(Channel::Pages, &head, body).map_err(|_| PeerError::Vocabulary)?;
        self.bytes.clear();
        self.tally
            .bytes_wire
            .fetch_add(frame.len() as u64, Ordering::Relaxed);
        let (carrier, runtime) = (&self.source.carrier, &self.source.runtime);
        let is_idle = || carrier.link().look().idle > 0;
        self.lane.send(is_idle, || {
            runtime.block_on(async {
                carrier.send(runs, frame).await?;
                carrier.narrow().await
            })
        })
    }

    fn tell(&self, piece: Option<Piece>) -> Result<(), MemoryError> {
        let Some(piece) = piece else { return Ok(()) };
        let told = self.source.carrier.tell(piece);
        let bytes = self.source.runtime.block_on(told)?;
        self.tally.bytes_wire.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// A page server that waits for one container's dump.
#[derive(Debug)]
pub(crate) struct DumpServer {
    listener: Listener,
    is_given_up: Arc<AtomicBool>,
}

/// Ends the waiting of a [`DumpServer`] when dropped.
#[derive(Debug)]
pub(crate) struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl DumpServer {
    /// Listens.
    ///
    /// # Errors
    /// When there is no loopback.
    pub(crate) fn bind() -> Result<(Self, GiveUp), MemoryError> {
        let is_given_up = Arc::<AtomicBool>::default();
        let server = Self {
            listener: Listener::bind()?,
            is_given_up: Arc::clone(&is_given_up),
        };
        Ok((server, GiveUp(is_given_up)))
    }

    /// Where CRIU is to connect.
    pub(crate) const fn addr(&self) -> SocketAddrV4 {
        self.listener.addr()
    }

    /// Takes the final dump; gives the seal that completes its images at the target. `parent` is what the last
    /// round saw. Blocks its thread.
    ///
    /// # Errors
    /// When CRIU breaks off or the session is lost; CRIU then rolls its dump back.
    pub(crate) fn serve(
        self,
        shipper: Shipper,
        layout: Layout,
        parent: Arc<Parent>,
        limit: Duration,
    ) -> Result<Seal, MemoryError> {
        let mut sink = PageSink::new(shipper, layout, parent, None);
        self.serve_into(&mut sink, limit)?;
        Ok(sink.layout.seal())
    }

    /// Takes a round; gives what it saw, what the target's images become by it, and the shipper back. Otherwise as
    /// [`Self::serve`].
    ///
    /// # Errors
    /// When CRIU breaks off or the session is lost; the container runs on.
    pub(crate) fn serve_round(
        self,
        shipper: Shipper,
        layout: Layout,
        parent: Arc<Parent>,
        limit: Duration,
    ) -> Result<(Parent, Draft, Shipper), MemoryError> {
        let mut sink = PageSink::new(shipper, layout, parent, Some(Parent::default()));
        self.serve_into(&mut sink, limit)?;
        let seen = sink.seen.unwrap_or_default();
        Ok((seen, sink.layout.draft(), sink.shipper))
    }

    fn serve_into(self, sink: &mut impl Sink, limit: Duration) -> Result<(), MemoryError> {
        let stream = self
            .listener
            .accept(limit, || self.is_given_up.load(Ordering::Relaxed))?;
        let says = Uncorked::new(&stream).map_err(MemoryError::Dump)?;
        server::serve(says, &mut &stream, sink)
    }
}

/// Pages of a round or of the final dump: shipped if new, and their places told.
struct PageSink {
    shipper: Shipper,
    parent: Arc<Parent>,
    layout: Layout,
    /// What a round saw, for the next one.
    seen: Option<Parent>,
    /// Where the next pages lie.
    next: (ImageId, u64),
}

impl PageSink {
    const fn new(
        shipper: Shipper,
        layout: Layout,
        parent: Arc<Parent>,
        seen: Option<Parent>,
    ) -> Self {
        Self {
            shipper,
            parent,
            layout,
            seen,
            next: (ImageId::Process(0), 0),
        }
    }
}

impl Sink for PageSink {
    fn has_parent(&self, image: ImageId) -> bool {
        self.parent.has(image)
    }

    fn open(&mut self, image: ImageId) -> Result<(), MemoryError> {
        let piece = self.layout.open(image)?;
        self.shipper.tell(piece)
    }

    fn region(&mut self, image: ImageId, mut region: Region) -> Result<(), MemoryError> {
        let left_out = self.parent.left_out(image, region)?;
        if left_out.is_some() {
            // The images at the target have no parent.
            region.flags = region.flags & !FLAG_PARENT | FLAG_PRESENT;
        }
        let piece = self.layout.region(image, region)?;
        self.shipper.tell(piece)?;
        self.next = (image, region.address);
        let pages = left_out.unwrap_or_default();
        self.shipper.pass(pages.len());
        if let Some(seen) = &mut self.seen {
            seen.add(image, region.address, &pages);
        }
        for (slot, digest) in pages {
            let piece = self.layout.page(slot, digest);
            self.shipper.tell(piece)?;
        }
        Ok(())
    }

    fn pages(&mut self, bytes: &[u8]) -> Result<(), MemoryError> {
        let pages = self.shipper.take(bytes)?;
        let mut pieces = Vec::new();
        for (slot, digest) in pages {
            pieces.extend(self.layout.page(*slot, *digest));
        }
        if let Some(seen) = &mut self.seen {
            seen.add(self.next.0, self.next.1, pages);
            self.next.1 += bytes.len() as u64;
        }
        for piece in pieces {
            self.shipper.tell(Some(piece))?;
        }
        Ok(())
    }

    /// What there is can cross and be put together while CRIU is busy with its dump: behind the last page of all it has
    /// much to do, and clients wait.
    fn pause(&mut self) -> Result<(), MemoryError> {
        if self.seen.is_none() && self.shipper.source.carrier.has_room() {
            return self.close();
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), MemoryError> {
        self.shipper.flush()?;
        let piece = self.layout.cut();
        self.shipper.tell(piece)
    }
}
