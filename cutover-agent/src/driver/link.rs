//! The driver's connection to the target's agent: opened when first needed, opened again when it broke.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cutover_protocol::hop::Link as Measured;
use cutover_protocol::id::HopId;
use cutover_protocol::pattern::NamePattern;
use cutover_protocol::plan::{Compress, RawPlan};
use cutover_protocol::wire::{Request, Response};

use crate::config::{Config, IMAGES_TREE};
use crate::memory::PageSource;
use crate::open_files::OpenFiles;
use crate::peer::{self, Answering, Part, PeerTimeouts, Priority, Session};
use crate::tls::{ClientTls, TlsPaths};
use crate::transfer::{Progress, SyncOptions, TreeName};
use crate::tunnel::Tunnel;

/// A target that does not take a connection within this is treated as gone; clients may be held meanwhile.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// A target that gives no sign of life for this long is gone.
const DEAD_AFTER: Duration = Duration::from_secs(3);

/// What the measurement of the link sends: enough for TCP to open its windows at 1 Gbit/s and 20 ms.
const MEASURE_BYTES: u64 = 16 << 20;

/// How long the measurement may take: 16 MiB over 3 Mbit/s, with room.
const MEASURE_MAX: Duration = Duration::from_secs(90);

/// One tree on its way; the output is the bytes that crossed the link.
pub(super) type SyncJob = Pin<Box<dyn Future<Output = Result<u64, String>> + Send>>;

/// A lazily opened session.
#[derive(Debug)]
pub(super) struct Link {
    target: String,
    streams: u16,
    resume_within: Duration,
    compress: Compress,
    in_place: Arc<[NamePattern]>,
    bytes_per_second_max: Option<u64>,
    tls: TlsPaths,
    /// The tunnel of a hop, which connections go through while it is there.
    tunnel: Option<(Arc<Tunnel>, HopId)>,
    session: tokio::sync::Mutex<Option<Arc<Session>>>,
    priority: Mutex<Priority>,
    moving: Mutex<Vec<Arc<Progress>>>,
    pages: Mutex<Option<Arc<PageSource>>>,
}

impl Link {
    pub(super) fn new(config: &Config, settings: &RawPlan) -> Self {
        // The plan's check bounds it to 32.
        let streams = u16::try_from(settings.streams).unwrap_or(1);
        Self {
            resume_within: Duration::from_millis(settings.reconnect_ms_max),
            compress: settings.compress,
            in_place: settings.in_place.clone().into(),
            bytes_per_second_max: settings
                .bandwidth_mbit_max
                .map(|mbit| u64::from(mbit) * 1_000_000 / 8),
            ..Self::to(config, settings.target.clone(), streams)
        }
    }

    /// A link to an agent that no plan names.
    pub(super) fn to(config: &Config, target: String, streams: u16) -> Self {
        Self {
            target,
            streams,
            resume_within: Duration::ZERO,
            compress: Compress::default(),
            in_place: Arc::default(),
            bytes_per_second_max: None,
            tls: config.peer.tls.clone(),
            tunnel: None,
            session: tokio::sync::Mutex::new(None),
            priority: Mutex::default(),
            moving: Mutex::new(Vec::new()),
            pages: Mutex::new(None),
        }
    }

    /// The same link, through the tunnel of a hop wherever there is one.
    pub(super) fn through(self, tunnel: Arc<Tunnel>, hop: HopId) -> Self {
        Self {
            tunnel: Some((tunnel, hop)),
            ..self
        }
    }

    /// The target's own address, outside of any tunnel.
    pub(super) async fn outer(&self) -> Result<SocketAddr, String> {
        let found = tokio::net::lookup_host(&self.target).await.ok();
        found.and_then(|mut found| found.next()).ok_or_else(|| {
            format!(
                "`target` is {:?}, which is no address:port that can be found",
                self.target
            )
        })
    }

    async fn session(&self) -> Result<Arc<Session>, String> {
        let mut slot = self.session.lock().await;
        if let Some(session) = slot.as_ref() {
            // Rounds that are under way do the same, and wait for each other.
            if session.revive().await.is_ok() {
                session.set_priority(self.priority());
                return Ok(Arc::clone(session));
            }
        }
        *slot = None;
        let session = Arc::new(self.connect().await?);
        session.limit_bandwidth(self.bytes_per_second_max);
        session.set_priority(self.priority());
        *slot = Some(Arc::clone(&session));
        Ok(session)
    }

    fn priority(&self) -> Priority {
        *self.priority.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how much what crosses from now on matters beside other traffic.
    pub(super) fn set_priority(&self, priority: Priority) {
        *self.priority.lock().unwrap_or_else(PoisonError::into_inner) = priority;
        // Whoever is opening it or taking it up again gives it the priority then.
        if let Ok(slot) = self.session.try_lock()
            && let Some(session) = &*slot
        {
            session.set_priority(priority);
        }
    }

    /// Connects through the tunnel, and past it when nobody answers there: what is to be undone must be.
    async fn connect(&self) -> Result<Session, String> {
        let tls = ClientTls::load(&self.tls, "target").map_err(|error| error.to_string())?;
        let inside = match &self.tunnel {
            Some((tunnel, hop)) => tunnel.way(hop).await,
            None => None,
        };
        if let Some(inside) = inside {
            let timeouts = PeerTimeouts {
                connect: CONNECT_MAX / 2,
                dead_after: DEAD_AFTER,
                resume_within: self.resume_within,
            };
            match peer::connect(inside, tls.clone(), timeouts, self.streams).await {
                Ok(session) => return Ok(session),
                Err(error) => {
                    tracing::warn!("the tunnel leads nowhere now, going past it: {error}")
                }
            }
        }
        let timeouts = PeerTimeouts {
            connect: CONNECT_MAX,
            dead_after: DEAD_AFTER,
            resume_within: self.resume_within,
        };
        peer::connect(self.outer().await?, tls, timeouts, self.streams)
            .await
            .map_err(|error| error.to_string())
    }

    /// Asks the target's agent; its own failure becomes ours.
    pub(super) async fn call(
        &self,
        request: &Request,
        limit: Duration,
    ) -> Result<Response, String> {
        let session = self.session().await?;
        let response = session
            .call(request, limit)
            .await
            .map_err(|error| error.to_string())?;
        unless_failed(response)
    }

    /// Asks for what the target does once these parts have arrived, counted from now.
    pub(super) async fn call_after(
        &self,
        parts: &[Part],
        request: &Request,
        limit: Duration,
    ) -> Result<Answering<Response>, String> {
        let session = self.session().await?;
        let asked = session.call_after(parts, request, limit).await;
        asked.map_err(|error| error.to_string())
    }

    /// Asks for something that is just done.
    pub(super) async fn order(&self, request: &Request, limit: Duration) -> Result<(), String> {
        match self.call(request, limit).await? {
            Response::Done => Ok(()),
            other => Err(format!("the target answered nonsense: {other:?}")),
        }
    }

    pub(super) async fn measure(&self) -> Result<Measured, String> {
        let session = self.session().await?;
        let measured = session
            .measure(MEASURE_BYTES, MEASURE_MAX)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Measured {
            rtt_ms: measured.round_trip.as_secs_f64() * 1e3,
            bytes_per_second: measured.bytes_per_second,
        })
    }

    /// Opens the target's page store.
    pub(super) async fn open_pages(&self, limit: Duration) -> Result<(), String> {
        let session = self.session().await?;
        let opened = PageSource::open(&session, self.compress, limit)
            .await
            .map_err(|error| error.to_string())?;
        *self.pages.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(opened));
        Ok(())
    }

    /// The pages of this hop, once its store was opened.
    pub(super) fn pages(&self) -> Result<Arc<PageSource>, String> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages
            .clone()
            .ok_or_else(|| "the target's page store was not opened".to_owned())
    }

    /// One round of one tree. `open` is what the containers have open.
    pub(super) fn sync(
        self: &Arc<Self>,
        tree: String,
        root: PathBuf,
        frozen: bool,
        open: OpenFiles,
        limit: Duration,
    ) -> SyncJob {
        let link = Arc::clone(self);
        Box::pin(async move {
            let session = link.session().await?;
            let device = std::fs::metadata(&root)
                .map(|metadata| metadata.dev())
                .unwrap_or(0);
            let here = |inodes: HashSet<u64>| inodes.into_iter().map(|inode| (device, inode));
            let mut options = if tree.ends_with(&format!("/{IMAGES_TREE}")) {
                SyncOptions::images(limit)
            } else if frozen {
                SyncOptions {
                    always_look: here(open.mapped).collect(),
                    ..SyncOptions::frozen(limit, here(open.written).collect())
                }
            } else {
                SyncOptions::live(limit)
            };
            options.compress = link.compress;
            options.in_place = Arc::clone(&link.in_place);
            options.progress = link.new_progress();
            let name = TreeName::new(&tree).map_err(|error| error.to_string())?;
            let report = session
                .sync(&name, &root, options)
                .await
                .map_err(|error| format!("{tree}: {error}"))?;
            tracing::debug!(
                %tree, looked = report.looked, bytes_wire = report.bytes_wire, bytes_data = report.bytes_data, bytes_read = report.bytes_read,
                took = ?report.took, "synced"
            );
            Ok(report.bytes_wire)
        })
    }

    fn new_progress(&self) -> Arc<Progress> {
        let progress = Arc::<Progress>::default();
        let mut moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the driver and finished rounds hold the others: forget those nobody counts on any more.
        moving.retain(|known| Arc::strong_count(known) > 1);
        moving.push(Arc::clone(&progress));
        progress
    }

    /// Bytes done and bytes known of all running rounds.
    pub(super) fn progress(&self) -> (u64, u64) {
        let moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        moving.iter().fold((0, 0), |(done, total), one| {
            (done + one.bytes_done(), total + one.bytes_total())
        })
    }

    /// Closes the session, if one is open; the next one takes the way there is then.
    pub(super) async fn close(&self) {
        *self.session.lock().await = None;
    }
}

/// The target's own failure is ours.
pub(super) fn unless_failed(response: Response) -> Result<Response, String> {
    match response {
        Response::Failed { message } => Err(message),
        other => Ok(other),
    }
}
