//! How the memory of a hop's containers moves: rounds while they run, the dump while they are frozen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cutover_protocol::hop::Link as Measured;
use cutover_protocol::id::ContainerName;
use cutover_protocol::plan::Engine;
use cutover_protocol::schedule::Schedule;
use cutover_protocol::wire::Request;
use tokio::task::JoinHandle;

use super::Driver;
use super::act::{PROGRESS_EVERY, UNHELD_MAX};
use crate::cgroup::Cgroup;
use crate::engine::{Begun, Dump, EngineError, Host, pre_dump};
use crate::memory::{
    DumpServer, GiveUp, Lanes, MemoryError, Moved, OwnLane, PAGE_BYTES, PageSource, Parent, Part,
    Seal, Shipper, Tally, read_container, resident_bytes, spread_percent,
};
use crate::report::{Moving, eta_seconds};

impl Driver {
    /// Opens the page store at the target, where memory moves.
    pub(super) async fn open_pages(&mut self, link: &Measured) -> Result<(), String> {
        self.report.memory.link = *link;
        if self.engine() != Engine::Criu {
            return Ok(());
        }
        self.link.open_pages(self.step_max()).await
    }

    /// One round of CRIU's own: what was written to since the last one is sent; pages and bytes.
    pub(super) async fn dirty_round(&mut self, round: u32) -> Result<(u64, u64), String> {
        let pages = self.link.pages()?;
        let cancel = Cancel::default();
        let pids = self.look_at_memory().await?;
        let lanes = Lanes::new(self.schedule(), self.resident.clone());
        let mut dumps = tokio::task::JoinSet::new();
        for (index, (name, pids)) in self.containers().into_iter().zip(pids).enumerate() {
            let (host, parent) = (self.host.clone(), self.parent(&name));
            let (source, lane, cancel) = (Arc::clone(&pages), lanes.enter(index), cancel.flag());
            dumps.spawn(async move {
                let (server, given_up) = DumpServer::bind().map_err(|error| error.to_string())?;
                let addr = server.addr();
                let serving = tokio::task::spawn_blocking(move || {
                    take_round(server, (source, lane), parent, (&pids, &cancel))
                });
                let dumping = pre_dump(&host, &name, round, addr, UNHELD_MAX);
                let taken = served(&name, dumping, serving, given_up).await?;
                Ok::<_, String>((name, taken))
            });
        }
        let dumping = async {
            let (mut parents, mut dirty, mut bytes) = (BTreeMap::new(), 0, 0);
            while let Some(result) = dumps.join_next().await {
                let (name, taken) = result.map_err(|error| error.to_string())??;
                parents.insert(name, Arc::new(taken.seen));
                dirty += taken.pages;
                bytes += taken.bytes;
            }
            let settled = pages.settle(UNHELD_MAX).await;
            settled.map_err(|error| error.to_string())?;
            Ok::<_, String>((parents, dirty, bytes))
        };
        let (parents, dirty, bytes) = self.telling(&lanes, dumping).await?;
        self.parents = parents;
        self.note_round(&lanes);
        let images = self.join(self.image_jobs(UNHELD_MAX)).await?;
        Ok((dirty, bytes + images))
    }

    /// What the last of CRIU's own rounds saw of a container.
    fn parent(&self, name: &ContainerName) -> Arc<Parent> {
        self.parents.get(name).cloned().unwrap_or_default()
    }

    /// One round by content: every container's memory is read, and what the target lacks is sent; pages and bytes.
    pub(super) async fn content_round(&mut self) -> Result<(u64, u64), String> {
        let pages = self.link.pages()?;
        let tally = Arc::<Tally>::default();
        let cancel = Cancel::default();
        let pids = self.look_at_memory().await?;
        let lanes = Lanes::new(self.schedule(), self.resident.clone());
        let mut readers = tokio::task::JoinSet::new();
        for (index, pids) in pids.into_iter().enumerate() {
            let shipper = Shipper::new(Arc::clone(&pages), Arc::clone(&tally), lanes.enter(index));
            let cancel = cancel.flag();
            readers.spawn_blocking(move || read_container(shipper, &pids, Part::All, &cancel));
        }
        let reading = async {
            while let Some(result) = readers.join_next().await {
                result
                    .map_err(|error| error.to_string())?
                    .map_err(|error| error.to_string())?;
            }
            pages
                .settle(UNHELD_MAX)
                .await
                .map_err(|error| error.to_string())
        };
        self.telling(&lanes, reading).await?;
        self.note_round(&lanes);
        let bytes = tally.bytes_wire.load(Ordering::Relaxed);
        Ok((tally.pages_new.load(Ordering::Relaxed), bytes))
    }

    /// Remembers how the first round went, in which everything moves, now that all has arrived.
    fn note_round(&mut self, lanes: &Lanes) {
        let moved = lanes.moved();
        let memory = &mut self.report.memory;
        if memory.round_spread_percent.is_none() {
            memory.round_spread_percent = Some(spread_percent(&moved));
            memory.round_ms = milliseconds(lanes.elapsed());
        }
    }

    const fn schedule(&self) -> Schedule {
        self.header.plan.settings().schedule
    }

    /// The processes of each container; what they have in memory is remembered.
    async fn look_at_memory(&mut self) -> Result<Vec<Vec<u32>>, String> {
        let (mut sizes, mut all) = (Vec::new(), Vec::new());
        for name in self.containers() {
            let pids = pids(&self.host, &name).await?;
            sizes.push((name.to_string(), resident_bytes(&pids)));
            all.push(pids);
        }
        self.resident = sizes;
        Ok(all)
    }

    /// Tells how far each container has come while `work` goes on.
    async fn telling<T>(&self, lanes: &Arc<Lanes>, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {
                    let moved = lanes.moved();
                    let sum = |of: fn(&Moved) -> u64| moved.iter().map(of).sum();
                    let (done, total) = (sum(|one| one.done_bytes), sum(|one| one.total_bytes));
                    let elapsed = began.elapsed().as_secs_f64();
                    let shown = moved.iter().map(|one| shown(one, elapsed)).collect();
                    self.tell_moving(done, total, began, shown);
                }
            }
        }
    }

    /// Begins the dump of every container, up to where it is frozen.
    pub(super) async fn begin_dumps(&mut self) -> Result<(), String> {
        if self.engine() != Engine::Criu {
            return Ok(());
        }
        let (begun, ()) = tokio::join!(self.begun_dumps(), self.begin_restore());
        self.begun = begun?;
        Ok(())
    }

    /// Has the target start what takes its time before it can restore anything. It starts it later when that fails.
    async fn begin_restore(&self) {
        let limit = self.step_max();
        let request = Request::BeginRestore {
            hop: self.header.hop.clone(),
            containers: self.containers(),
            timeout_ms: self.step_ms(),
        };
        if let Err(error) = self.link.order(&request, limit).await {
            tracing::info!(%error, "the target begins to restore later");
        }
    }

    async fn begun_dumps(&self) -> Result<Vec<BegunDump>, String> {
        let rounds = u32::try_from(self.hop.rounds().len()).unwrap_or(u32::MAX);
        let limit = self.step_max();
        let mut dumps = tokio::task::JoinSet::new();
        for (index, name) in self.containers().into_iter().enumerate() {
            let (host, parent) = (self.host.clone(), self.parent(&name));
            dumps.spawn(async move {
                let begun = BegunDump::new(&host, name, (rounds, parent), limit).await;
                begun.map(|begun| (index, begun))
            });
        }
        let mut begun = Vec::new();
        while let Some(result) = dumps.join_next().await {
            begun.push(result.map_err(|error| error.to_string())??);
        }
        begun.sort_unstable_by_key(|(index, _)| *index);
        Ok(begun.into_iter().map(|(_, begun)| begun).collect())
    }

    /// Lets go of every dump that has begun and frozen nothing.
    pub(super) async fn dismiss_dumps(&mut self) -> Result<(), String> {
        self.begun.clear();
        for name in self.containers() {
            self.host
                .dismiss(&name, self.step_max())
                .await
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The final dump, whose pages go to the target as CRIU reads them.
    pub(super) async fn dump(&mut self, limit: Duration) -> Result<(), String> {
        let pages = self.link.pages()?;
        let tally = Arc::<Tally>::default();
        if self.resident.is_empty() {
            self.look_at_memory().await?;
        }
        // After rounds little is left to send, all of it is waited for, and nothing is written meanwhile: turns would only
        // leave processors idle.
        let schedule = if self.hop.rounds().is_empty() {
            self.schedule()
        } else {
            Schedule::Parallel
        };
        let lanes = Lanes::new(schedule, self.resident.clone());
        let mut dumps = tokio::task::JoinSet::new();
        for (index, begun) in std::mem::take(&mut self.begun).into_iter().enumerate() {
            let host = self.host.clone();
            let shipper = Shipper::new(Arc::clone(&pages), Arc::clone(&tally), lanes.enter(index));
            let pages = Arc::clone(&pages);
            dumps.spawn(async move { begun.serve(&host, (pages, shipper), limit).await });
        }
        let dumping = async {
            let mut seals = Vec::new();
            while let Some(result) = dumps.join_next().await {
                seals.push(result.map_err(|error| error.to_string())??);
            }
            Ok::<_, String>(seals)
        };
        self.seals = self.telling(&lanes, dumping).await?;
        let moved = lanes.moved();
        let own_ms = self
            .containers()
            .into_iter()
            .zip(&moved)
            .map(|(name, one)| {
                let dump_ms = self.host.dump_ms(&name).unwrap_or(0);
                dump_ms.saturating_sub(milliseconds(one.waited))
            });
        self.report.memory.dump_ms = own_ms.max().unwrap_or(0);
        self.report.memory.freeze_spread_percent = Some(spread_percent(&moved));
        let bytes = tally.bytes_wire.load(Ordering::Relaxed);
        self.bytes += bytes;
        self.report.memory.freeze_bytes += bytes;
        self.report.memory.dumped_bytes += tally.pages.load(Ordering::Relaxed) * PAGE_BYTES as u64;
        self.report.memory.dirty_bytes +=
            tally.pages_new.load(Ordering::Relaxed) * PAGE_BYTES as u64;
        Ok(())
    }

    /// Has the target complete the memory images of every container that was dumped to it.
    pub(super) async fn seal_memory(&self, limit: Duration) -> Result<(), String> {
        if self.seals.is_empty() {
            return Ok(());
        }
        let pages = self.link.pages()?;
        let mut seals = tokio::task::JoinSet::new();
        for seal in self.seals.clone() {
            let pages = Arc::clone(&pages);
            seals.spawn(async move { pages.seal(seal, limit).await });
        }
        while let Some(result) = seals.join_next().await {
            result
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn shown(moved: &Moved, elapsed: f64) -> Moving {
    Moving {
        container: moved.container.clone(),
        done_bytes: moved.done_bytes,
        total_bytes: moved.total_bytes,
        eta_seconds: eta_seconds(moved.done_bytes, moved.total_bytes, elapsed)
            .filter(|_| moved.took.is_none()),
    }
}

/// Tells reading threads to end when whoever waits for them is dropped.
#[derive(Default)]
struct Cancel(Arc<AtomicBool>);

impl Cancel {
    fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The processes of a running container.
pub(super) async fn pids(host: &Host, name: &ContainerName) -> Result<Vec<u32>, String> {
    let mut pids = cgroup(host, name).await?.pids();
    // In the order of their dump, so that pages which lie together there get slots together.
    pids.sort_unstable();
    Ok(pids)
}

/// The cgroup of a running container.
pub(super) async fn cgroup(host: &Host, name: &ContainerName) -> Result<Cgroup, String> {
    let state = host
        .runc
        .state(name.as_str())
        .await
        .map_err(|error| error.to_string())?;
    let Some(state) = state.filter(|state| state.pid != 0) else {
        return Err(format!("the container {name} does not run here any more"));
    };
    Cgroup::of(state.pid).map_err(|error| error.to_string())
}

/// What one of CRIU's own rounds brought of a container.
struct Taken {
    seen: Parent,
    /// Pages that were written to since the round before, as far as known.
    pages: u64,
    bytes: u64,
}

/// Takes the pages of such a round, and then reads what it leaves out. Blocks its thread.
fn take_round(
    server: DumpServer,
    (source, lane): (Arc<PageSource>, OwnLane),
    parent: Arc<Parent>,
    (pids, cancel): (&[u32], &AtomicBool),
) -> Result<Taken, MemoryError> {
    let tally = Arc::<Tally>::default();
    let shipper = Shipper::new(source, Arc::clone(&tally), lane);
    let (seen, shipper) = server.serve_round(shipper, parent, UNHELD_MAX)?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (dirty, new) = (count(&tally.pages), count(&tally.pages_new));
    read_container(shipper, pids, Part::Shared, cancel)?;
    Ok(Taken {
        seen,
        pages: dirty + count(&tally.pages_new) - new,
        bytes: count(&tally.bytes_wire),
    })
}

/// Waits for a dump, and for the server that takes its pages.
async fn served<T>(
    name: &ContainerName,
    dumping: impl Future<Output = Result<(), EngineError>>,
    serving: JoinHandle<Result<T, MemoryError>>,
    given_up: GiveUp,
) -> Result<T, String> {
    let dumped = dumping.await;
    drop(given_up);
    match dumped {
        // A failed dump may leave CRIU connected until it is vetoed: its server is not waited for.
        Err(error) if !serving.is_finished() => Err(error.to_string()),
        Err(error) => match serving.await {
            Ok(Err(cause)) => Err(format!("{error}: {cause}")),
            _ => Err(error.to_string()),
        },
        Ok(()) => serving
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("the memory of {name}: {error}")),
    }
}

/// Has the target complete the images while CRIU is busy with all that is not memory. The transfer asks for the same, and
/// finds it done, or says why it cannot be.
fn seal_early(pages: Arc<PageSource>, seal: Seal, limit: Duration) {
    tokio::spawn(async move {
        if let Err(error) = pages.seal(seal, limit).await {
            tracing::debug!(%error, "the images of memory were not completed early");
        }
    });
}

/// A container's final dump that has begun, and who takes its pages.
#[derive(Debug)]
pub(super) struct BegunDump {
    name: ContainerName,
    dump: Begun,
    server: DumpServer,
    given_up: GiveUp,
    /// What the last of CRIU's own rounds saw.
    parent: Arc<Parent>,
}

impl BegunDump {
    async fn new(
        host: &Host,
        name: ContainerName,
        (rounds, parent): (u32, Arc<Parent>),
        limit: Duration,
    ) -> Result<Self, String> {
        let (server, given_up) = DumpServer::bind().map_err(|error| error.to_string())?;
        let dump = Dump {
            rounds: if parent.is_empty() { 0 } else { rounds },
            page_server: server.addr(),
        };
        let begun = host.begin(&name, dump, limit).await;
        Ok(Self {
            dump: begun.map_err(|error| error.to_string())?,
            name,
            server,
            given_up,
            parent,
        })
    }

    /// Freezes the container, and takes its pages.
    async fn serve(
        self,
        host: &Host,
        (pages, shipper): (Arc<PageSource>, Shipper),
        limit: Duration,
    ) -> Result<Seal, String> {
        let (server, parent, container) = (self.server, self.parent, self.name.to_string());
        let serving = tokio::task::spawn_blocking(move || {
            let seal = server.serve(shipper, &container, parent, limit)?;
            seal_early(pages, seal.clone(), limit);
            Ok(seal)
        });
        let dumping = host.checkpoint(&self.name, self.dump, limit);
        served(&self.name, dumping, serving, self.given_up).await
    }
}
