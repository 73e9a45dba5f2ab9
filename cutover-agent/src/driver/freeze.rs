//! The last move, while the containers are frozen. Everything goes as soon as it can be read: memory as CRIU dumps it, the
//! trees while CRIU dumps, each container's images behind its own dump; and the target restores when it has all of it,
//! without being asked once more.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cutover_protocol::id::ContainerName;
use cutover_protocol::plan::Engine;
use cutover_protocol::schedule::Schedule;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::Driver;
use super::ahead::Ahead;
use super::link::SyncJob;
use super::memory::{milliseconds, served};
use super::trees::{Trees, finish};
use crate::criu::remaps;
use crate::engine::{Begun, Dump, Host};
use crate::memory::{
    DumpServer, GiveUp, Lanes, Layout, MemoryError, PAGE_BYTES, PageSource, Parent, Shipper, Tally,
    Turns, spread_percent,
};
use crate::peer::Part;

/// What crossed the link of the frozen containers' files, in bytes.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct FilesMoved {
    pub(super) trees: u64,
    pub(super) images: u64,
}

/// The target completes the memory images of a container.
pub(super) type Sealing = JoinHandle<Result<(), MemoryError>>;

/// Waits until the images of every container are complete.
pub(super) async fn sealed(sealing: Vec<Sealing>) -> Result<(), String> {
    for one in sealing {
        one.await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The files of frozen containers on their way. Dropped, they are given up.
#[derive(Debug)]
pub(super) struct FrozenFiles(JoinSet<Result<FilesMoved, String>>);

impl FrozenFiles {
    /// Waits until all has arrived.
    pub(super) async fn arrived(mut self) -> Result<FilesMoved, String> {
        match self.0.join_next().await {
            Some(Ok(moved)) => moved,
            _ => Err("the files of the frozen containers were given up".to_owned()),
        }
    }
}

/// How far the dumps are, told by each of them.
#[derive(Debug, Clone)]
struct Stages {
    /// How many containers are frozen.
    frozen: watch::Sender<usize>,
    /// Whose images are written.
    written: mpsc::Sender<ContainerName>,
}

/// Waits for that many frozen containers.
async fn until_frozen(mut frozen: watch::Receiver<usize>, containers: usize) -> Result<(), String> {
    let all = frozen.wait_for(|count| *count == containers).await;
    all.map(drop)
        .map_err(|_| "not every container was frozen".to_owned())
}

async fn last_round(trees: &Trees, limit: Duration) -> Result<(Vec<SyncJob>, bool), String> {
    let trees = trees.clone();
    let looking = tokio::task::spawn_blocking(move || trees.frozen(limit));
    looking.await.map_err(|error| error.to_string())?
}

/// Makes the target's trees equal once all containers are frozen, and its images as they are written.
async fn move_files(
    ahead: Ahead,
    frozen: watch::Receiver<usize>,
    mut written: mpsc::Receiver<ContainerName>,
    limit: Duration,
) -> Result<FilesMoved, String> {
    let trees = &ahead.trees;
    until_frozen(frozen, trees.containers.len()).await?;
    let (round, writes_on) = last_round(trees, limit).await?;
    let mut settling = JoinSet::new();
    let going = ahead.clone();
    settling.spawn(async move {
        let moved = finish(round).await?;
        if !writes_on {
            going.ready().await;
        }
        Ok::<_, String>(moved)
    });
    let (mut images, mut last) = (JoinSet::new(), Vec::new());
    while let Some(name) = written.recv().await {
        // What was read of the trees may lack what the dump has put there, or what was still being written.
        if writes_on || remaps::made_names(&trees.host.final_images(&name)) {
            last.push(trees.images(&name, limit));
        } else {
            images.spawn(trees.images(&name, limit));
        }
    }
    let settled = match settling.join_next().await {
        Some(settled) => settled.map_err(|error| error.to_string())?,
        None => Ok(0),
    };
    let mut moved = FilesMoved::default();
    if last.is_empty() {
        moved.trees = settled?;
    } else {
        if !writes_on {
            // It has mounted what changes now.
            ahead.begin().await;
        }
        // A file that changed under the first round made it fail; this one sees it at rest.
        let (round, _) = last_round(trees, limit).await?;
        moved.trees = settled.unwrap_or(0) + finish(round).await?;
        // The target restores when it has these.
        moved.images = finish(last).await?;
    }
    while let Some(sent) = images.join_next().await {
        moved.images += sent.map_err(|error| error.to_string())??;
    }
    Ok(moved)
}

impl Driver {
    /// Begins the dump of every container, up to where it is frozen.
    pub(super) async fn begin_dumps(&mut self) -> Result<(), String> {
        if self.engine() != Engine::Criu {
            return Ok(());
        }
        self.until_drafted().await?;
        let (begun, ()) = tokio::join!(self.begun_dumps(), async { self.ahead().begin().await });
        self.begun = begun?;
        // The target's runtime reads one that ours has written by now, and all the others follow into the same folders.
        self.bytes += finish(self.trees().all_images(self.step_max())).await?;
        self.ask_to_restore().await
    }

    async fn begun_dumps(&self) -> Result<Vec<BegunDump>, String> {
        let rounds = u32::try_from(self.hop.rounds().len()).unwrap_or(u32::MAX);
        let limit = self.step_max();
        let mut dumps = JoinSet::new();
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
        self.restoring = None;
        for name in self.containers() {
            self.host
                .dismiss(&name, self.step_max())
                .await
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The final dump, whose pages go to the target as CRIU reads them, and the files beside them.
    pub(super) async fn dump(&mut self, limit: Duration) -> Result<(), String> {
        let pages = self.link.pages()?;
        let tally = Arc::<Tally>::default();
        if self.resident.is_empty() {
            self.look_at_memory().await?;
        }
        // After rounds little is left to send, all of it is waited for, and nothing is written meanwhile: turns would only
        // leave processors idle.
        let lanes = self.lanes((Schedule::Parallel, Turns::Always));
        let begun = std::mem::take(&mut self.begun);
        let (containers, frozen) = (begun.len(), watch::Sender::new(0));
        let (written, is_written) = mpsc::channel(containers.max(1));
        let mut files = JoinSet::new();
        files.spawn(move_files(
            self.ahead(),
            frozen.subscribe(),
            is_written,
            limit,
        ));
        let noting = {
            let frozen = frozen.subscribe();
            async {
                until_frozen(frozen, containers).await?;
                self.note_moving().await
            }
        };
        let stages = Stages { frozen, written };
        let mut dumps = JoinSet::new();
        for (index, begun) in begun.into_iter().enumerate() {
            let (host, stages) = (self.host.clone(), stages.clone());
            let shipper = Shipper::new(Arc::clone(&pages), Arc::clone(&tally), lanes.enter(index));
            let pages = Arc::clone(&pages);
            dumps.spawn(async move {
                let served = begun.serve(&host, (pages, shipper), &stages, limit).await;
                served.map(|(sealing, own_ms)| (index, sealing, own_ms))
            });
        }
        drop(stages);
        let dumping = async {
            let (mut sealing, mut own) = (Vec::new(), vec![0; containers]);
            while let Some(result) = dumps.join_next().await {
                let (index, one, own_ms) = result.map_err(|error| error.to_string())??;
                sealing.push(one);
                own[index] = own_ms;
            }
            Ok::<_, String>((sealing, own))
        };
        let ((sealing, own), ()) = tokio::try_join!(self.telling(&lanes, dumping), noting)?;
        (self.sealing, self.files) = (sealing, Some(FrozenFiles(files)));
        self.count_dump(&own, &lanes, &tally);
        Ok(())
    }

    /// `own` is CRIU's own time of each container, in milliseconds.
    fn count_dump(&mut self, own: &[u64], lanes: &Lanes, tally: &Tally) {
        let moved = lanes.moved();
        let own_ms = own.iter().zip(&moved).map(|(own, one)| {
            let waited_ms = milliseconds(one.waited);
            tracing::debug!(container = %one.container, own, waited_ms, "dumped");
            own.saturating_sub(waited_ms)
        });
        let own_ms = own_ms.max().unwrap_or(0);
        let bytes = tally.bytes_wire.load(Ordering::Relaxed);
        self.bytes += bytes;
        let memory = &mut self.report.memory;
        memory.dump_ms = own_ms;
        memory.freeze_spread_percent = Some(spread_percent(&moved));
        memory.freeze_bytes += bytes;
        memory.dumped_bytes += tally.pages.load(Ordering::Relaxed) * PAGE_BYTES as u64;
        memory.dirty_bytes += tally.pages_new.load(Ordering::Relaxed) * PAGE_BYTES as u64;
    }

    /// Asks the target to restore as soon as it has everything that is about to move: clients wait one round trip less than
    /// if it were asked then.
    pub(super) async fn ask_to_restore(&mut self) -> Result<(), String> {
        let (trees, is_dumped) = (self.trees(), self.engine() == Engine::Criu);
        let mut parts = trees.parts(is_dumped)?;
        if is_dumped {
            let names = trees.containers.iter();
            parts.extend(names.map(|name| Part::Memory(name.to_string())));
        }
        // It is asked before the hold, and answers after the transfer.
        let drain = Duration::from_millis(self.header.plan.settings().drain_ms_max);
        let (request, limit) = (self.restore_request(), drain + self.step_max() * 3);
        let asked = self.link.call_after(&parts, &request, limit).await;
        // It is asked again when everything has moved, over connections that are whole.
        self.restoring = asked
            .inspect_err(|error| tracing::debug!(%error, "the target is asked to restore later"))
            .ok();
        Ok(())
    }
}

/// A container's final dump that has begun, and who takes its pages.
#[derive(Debug)]
pub(super) struct BegunDump {
    name: ContainerName,
    dump: Begun,
    server: DumpServer,
    given_up: GiveUp,
    layout: Layout,
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
        let layout = Layout::new(name.as_str(), rounds.saturating_add(1));
        Ok(Self {
            dump: begun.map_err(|error| error.to_string())?,
            name,
            server,
            given_up,
            layout,
            parent,
        })
    }

    /// Freezes the container, takes its pages and has the target complete its images. Also returns CRIU's own time, in
    /// milliseconds.
    async fn serve(
        self,
        host: &Host,
        (pages, shipper): (Arc<PageSource>, Shipper),
        stages: &Stages,
        limit: Duration,
    ) -> Result<(Sealing, u64), String> {
        let (server, layout, parent) = (self.server, self.layout, self.parent);
        let runtime = Handle::current();
        let serving = tokio::task::spawn_blocking(move || {
            let seal = server.serve(shipper, layout, parent, limit)?;
            // At once, while CRIU completes its other images and these cross.
            let sealing = async move { pages.seal(seal, limit).await };
            Ok(runtime.spawn(sealing))
        });
        let (name, dump) = (&self.name, self.dump);
        let dumping = async {
            host.freeze(name, &dump, limit).await?;
            stages.frozen.send_modify(|count| *count += 1);
            let own_ms = host.checkpoint(name, dump, limit).await?;
            // Whoever listened has failed, and says so.
            let _ = stages.written.send(name.clone()).await;
            Ok(own_ms)
        };
        served(name, dumping, serving, self.given_up).await
    }
}
