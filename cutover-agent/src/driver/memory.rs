//! How the memory of a hop's containers moves: rounds while they run, the dump while they are frozen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cutover_protocol::hop::Link as Measured;
use cutover_protocol::id::ContainerName;
use cutover_protocol::plan::{Engine, Tracking};
use cutover_protocol::schedule::Schedule;

use super::Driver;
use super::act::{PROGRESS_EVERY, UNHELD_MAX};
use crate::cgroup::Cgroup;
use crate::engine::{Begun, Dump, Host, pre_dump};
use crate::memory::{
    DumpServer, GiveUp, Lanes, Moved, OwnLane, PAGE_BYTES, PageSource, Seal, Tally, read_container,
    resident_bytes, spread_percent,
};
use crate::report::{Moving, eta_seconds};

impl Driver {
    /// Opens the page store at the target, where pages go there by content.
    pub(super) async fn open_pages(&mut self, link: &Measured) -> Result<(), String> {
        self.report.memory.link = *link;
        if self.engine() != Engine::Criu || self.header.tracking == Tracking::SoftDirty {
            return Ok(());
        }
        self.link.open_pages(self.step_max()).await
    }

    /// One round of CRIU's own, into images that are copied; pages and bytes.
    pub(super) async fn dirty_round(&mut self, round: u32) -> Result<(u64, u64), String> {
        let mut pages = 0;
        let mut rounds = tokio::task::JoinSet::new();
        for name in self.containers() {
            let host = self.host.clone();
            rounds.spawn(async move { pre_dump(&host, &name, round, UNHELD_MAX).await });
        }
        while let Some(result) = rounds.join_next().await {
            pages += result
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        let jobs = self.image_jobs(UNHELD_MAX);
        Ok((pages, self.join(jobs).await?))
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
            let (pages, tally, cancel) = (Arc::clone(&pages), Arc::clone(&tally), cancel.flag());
            let lane = lanes.enter(index);
            readers.spawn_blocking(move || read_container(&pages, &tally, lane, &pids, &cancel));
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
        let moved = lanes.moved();
        let memory = &mut self.report.memory;
        if memory.round_spread_percent.is_none() {
            memory.round_spread_percent = Some(spread_percent(&moved));
            memory.round_ms = moved
                .iter()
                .filter_map(|one| one.took)
                .map(milliseconds)
                .max()
                .unwrap_or(0);
        }
        let bytes = tally.bytes_wire.load(Ordering::Relaxed);
        Ok((tally.pages_new.load(Ordering::Relaxed), bytes))
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
        let rounds = match self.header.tracking {
            Tracking::SoftDirty => u32::try_from(self.hop.rounds().len()).unwrap_or(u32::MAX),
            Tracking::Content | Tracking::None => 0,
        };
        let has_server = self.header.tracking != Tracking::SoftDirty;
        let limit = self.step_max();
        let mut dumps = tokio::task::JoinSet::new();
        for (index, name) in self.containers().into_iter().enumerate() {
            let host = self.host.clone();
            dumps.spawn(async move {
                let begun = BegunDump::new(&host, name, (rounds, has_server), limit).await;
                begun.map(|begun| (index, begun))
            });
        }
        let mut begun = Vec::new();
        while let Some(result) = dumps.join_next().await {
            begun.push(result.map_err(|error| error.to_string())??);
        }
        begun.sort_unstable_by_key(|(index, _)| *index);
        self.begun = begun.into_iter().map(|(_, begun)| begun).collect();
        Ok(())
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

    /// The final dump into images at the source, which the transfer copies.
    pub(super) async fn dump_to_images(&mut self, limit: Duration) -> Result<(), String> {
        let mut dumps = tokio::task::JoinSet::new();
        for begun in std::mem::take(&mut self.begun) {
            let host = self.host.clone();
            dumps.spawn(async move { host.checkpoint(&begun.name, begun.dump, limit).await });
        }
        while let Some(result) = dumps.join_next().await {
            result
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        let containers = self.containers();
        let memory = &mut self.report.memory;
        for name in &containers {
            // Only what changed since the last round is written.
            let bytes = self.host.page_image_bytes(name);
            memory.dumped_bytes += bytes;
            memory.dirty_bytes += bytes;
            memory.dump_ms = memory.dump_ms.max(self.host.dump_ms(name).unwrap_or(0));
        }
        Ok(())
    }

    /// The final dump, whose pages go to the target as CRIU reads them.
    pub(super) async fn dump_to_target(&mut self, limit: Duration) -> Result<(), String> {
        let pages = self.link.pages()?;
        let tally = Arc::<Tally>::default();
        if self.resident.is_empty() {
            self.look_at_memory().await?;
        }
        let lanes = Lanes::new(self.schedule(), self.resident.clone());
        let mut dumps = tokio::task::JoinSet::new();
        for (index, begun) in std::mem::take(&mut self.begun).into_iter().enumerate() {
            let (host, pages, tally) = (self.host.clone(), Arc::clone(&pages), Arc::clone(&tally));
            let lane = lanes.enter(index);
            dumps.spawn(async move { begun.serve(&host, &pages, &tally, lane, limit).await });
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
    let state = host
        .runc
        .state(name.as_str())
        .await
        .map_err(|error| error.to_string())?;
    let Some(state) = state.filter(|state| state.pid != 0) else {
        return Err(format!("the container {name} does not run here any more"));
    };
    let mut pids = Cgroup::of(state.pid)
        .map_err(|error| error.to_string())?
        .pids();
    // In the order of their dump, so that pages which lie together there get slots together.
    pids.sort_unstable();
    Ok(pids)
}

/// A container's final dump that has begun, and where its pages will go.
#[derive(Debug)]
pub(super) struct BegunDump {
    name: ContainerName,
    dump: Begun,
    /// Takes the pages, where they go to the target as CRIU reads them.
    server: Option<(DumpServer, GiveUp)>,
}

impl BegunDump {
    async fn new(
        host: &Host,
        name: ContainerName,
        (rounds, has_server): (u32, bool),
        limit: Duration,
    ) -> Result<Self, String> {
        let server = has_server.then(DumpServer::bind).transpose();
        let server = server.map_err(|error| error.to_string())?;
        let page_server = server.as_ref().map(|(server, _)| server.addr());
        let dump = Dump {
            rounds,
            page_server,
        };
        let begun = host.begin(&name, dump, limit).await;
        Ok(Self {
            dump: begun.map_err(|error| error.to_string())?,
            name,
            server,
        })
    }

    /// Freezes the container, and takes its pages.
    async fn serve(
        self,
        host: &Host,
        pages: &Arc<PageSource>,
        tally: &Arc<Tally>,
        lane: OwnLane,
        limit: Duration,
    ) -> Result<Seal, String> {
        let name = self.name;
        let Some((server, given_up)) = self.server else {
            return Err(format!("the dump of {name} has no page server"));
        };
        let (source, container, counted) = (Arc::clone(pages), name.to_string(), Arc::clone(tally));
        let serving = tokio::task::spawn_blocking(move || {
            server.serve(&source, &container, &counted, lane, limit)
        });
        let dumped = host.checkpoint(&name, self.dump, limit).await;
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
}
