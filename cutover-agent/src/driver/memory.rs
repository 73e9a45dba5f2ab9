//! How the memory of a hop's containers moves: rounds while they run, the dump while they are frozen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cutover_protocol::hop::Link as Measured;
use cutover_protocol::id::ContainerName;
use cutover_protocol::plan::Engine;
use cutover_protocol::schedule::Schedule;
use tokio::task::JoinHandle;

use super::Driver;
use super::act::{PROGRESS_EVERY, UNHELD_MAX};
use crate::cgroup::Cgroup;
use crate::engine::{EngineError, Host, pre_dump};
use crate::memory::{
    Draft, DumpServer, GiveUp, Lanes, Layout, MemoryError, Moved, OwnLane, PageSource, Parent,
    Part, Shipper, Tally, Turns, read_container, resident_bytes, spread_percent,
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
        self.until_drafted().await?;
        let cancel = Cancel::default();
        let pids = self.look_at_memory().await?;
        let lanes = self.lanes((self.schedule(), Turns::WhileBusy));
        let mut dumps = tokio::task::JoinSet::new();
        for (index, (name, pids)) in self.containers().into_iter().zip(pids).enumerate() {
            let (host, parent) = (self.host.clone(), self.parent(&name));
            let (source, lane, cancel) = (Arc::clone(&pages), lanes.enter(index), cancel.flag());
            dumps.spawn(async move {
                let (server, given_up) = DumpServer::bind().map_err(|error| error.to_string())?;
                let addr = server.addr();
                let layout = Layout::new(name.as_str(), round);
                let serving = tokio::task::spawn_blocking(move || {
                    take_round(server, (source, lane), (layout, parent), (&pids, &cancel))
                });
                let dumping = pre_dump(&host, &name, round, addr, UNHELD_MAX);
                let (taken, ()) = served(&name, dumping, serving, given_up).await?;
                Ok::<_, String>((name, taken))
            });
        }
        let dumping = async {
            let (mut parents, mut drafts) = (BTreeMap::new(), Vec::new());
            let (mut dirty, mut bytes) = (0, 0);
            while let Some(result) = dumps.join_next().await {
                let (name, taken) = result.map_err(|error| error.to_string())??;
                parents.insert(name, Arc::new(taken.seen));
                drafts.push(taken.draft);
                dirty += taken.pages;
                bytes += taken.bytes;
            }
            let settled = pages.settle(UNHELD_MAX).await;
            settled.map_err(|error| error.to_string())?;
            Ok::<_, String>((parents, drafts, dirty, bytes))
        };
        let (parents, drafts, dirty, bytes) = self.telling(&lanes, dumping).await?;
        self.parents = parents;
        for draft in drafts {
            let pages = Arc::clone(&pages);
            let drafting = async move { pages.drafted(draft, UNHELD_MAX).await };
            self.drafts.spawn(drafting);
        }
        self.note_round(&lanes);
        let images = self.join(self.trees().all_images(UNHELD_MAX)).await?;
        Ok((dirty, bytes + images))
    }

    /// What the last of CRIU's own rounds saw of a container.
    pub(super) fn parent(&self, name: &ContainerName) -> Arc<Parent> {
        self.parents.get(name).cloned().unwrap_or_default()
    }

    /// Waits until the target's images are as the last round saw them.
    pub(super) async fn until_drafted(&mut self) -> Result<(), String> {
        while let Some(drafted) = self.drafts.join_next().await {
            drafted
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// One round by content: every container's memory is read, and what the target lacks is sent; pages and bytes.
    pub(super) async fn content_round(&mut self) -> Result<(u64, u64), String> {
        let pages = self.link.pages()?;
        let tally = Arc::<Tally>::default();
        let cancel = Cancel::default();
        let pids = self.look_at_memory().await?;
        let lanes = self.lanes((self.schedule(), Turns::WhileBusy));
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

    /// Lanes for what comes next: in the plan's order where everything moves, and as `later` says after a round.
    pub(super) fn lanes(&self, later: (Schedule, Turns)) -> Arc<Lanes> {
        let order = if self.hop.rounds().is_empty() {
            (self.schedule(), Turns::Always)
        } else {
            later
        };
        Lanes::new(order, self.resident.clone())
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
    pub(super) async fn look_at_memory(&mut self) -> Result<Vec<Vec<u32>>, String> {
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
    pub(super) async fn telling<T>(&self, lanes: &Arc<Lanes>, work: impl Future<Output = T>) -> T {
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
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
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
    draft: Draft,
    /// Pages that were written to since the round before, as far as known.
    pages: u64,
    bytes: u64,
}

/// Takes the pages of such a round, and then reads what it leaves out. Blocks its thread.
fn take_round(
    server: DumpServer,
    (source, lane): (Arc<PageSource>, OwnLane),
    (layout, parent): (Layout, Arc<Parent>),
    (pids, cancel): (&[u32], &AtomicBool),
) -> Result<Taken, MemoryError> {
    let tally = Arc::<Tally>::default();
    let shipper = Shipper::new(source, Arc::clone(&tally), lane);
    let (seen, draft, shipper) = server.serve_round(shipper, layout, parent, UNHELD_MAX)?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (dirty, new) = (count(&tally.pages), count(&tally.pages_new));
    read_container(shipper, pids, Part::Shared, cancel)?;
    Ok(Taken {
        seen,
        draft,
        pages: dirty + count(&tally.pages_new) - new,
        bytes: count(&tally.bytes_wire),
    })
}

/// Waits for the server that takes the pages of a dump, and for the dump.
pub(super) async fn served<T, D>(
    name: &ContainerName,
    dumping: impl Future<Output = Result<D, EngineError>>,
    serving: JoinHandle<Result<T, MemoryError>>,
    given_up: GiveUp,
) -> Result<(T, D), String> {
    let dumped = dumping.await;
    drop(given_up);
    match dumped {
        // A failed dump may leave CRIU connected until it is vetoed: its server is not waited for.
        Err(error) if !serving.is_finished() => Err(error.to_string()),
        Err(error) => match serving.await {
            Ok(Err(cause)) => Err(format!("{error}: {cause}")),
            _ => Err(error.to_string()),
        },
        Ok(dumped) => serving
            .await
            .map_err(|error| error.to_string())?
            .map(|taken| (taken, dumped))
            .map_err(|error| format!("the memory of {name}: {error}")),
    }
}
