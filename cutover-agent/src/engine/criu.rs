//! The engine `criu`: memory, processes and connections move. See [`crate::criu::shim`] for how a dump and a
//! restore are parked.

use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::id::ContainerName;
use tokio::process::Child;

use super::{Dump, EngineError, Host, overlay};
use crate::cgroup::Cgroup;
use crate::config::Container;
use crate::criu::park::{Park, Waiting, Word};
use crate::criu::shim::{ParkAt, Parked, Stop};
use crate::criu::{cure, stats};
use crate::fence::{self, Fence};
use crate::runtime::runc::{ImageFolders, Parking, RuntimeError};

/// The folder of the final dump below a container's images.
pub(super) const FINAL: &str = "final";

/// The working folder of a restore.
pub(super) const RESTORE: &str = "restore";

/// Poll interval for kernel state that has no event: a ptrace detach, an emptied cgroup.
const POLL: Duration = Duration::from_millis(2);

/// Sends one memory round of a running container to a page server, and what CRIU needs for the next one to
/// `images/<round>`.
///
/// # Errors
/// [`EngineError`]; the container runs on.
pub async fn pre_dump(
    host: &Host,
    name: &ContainerName,
    round: u32,
    page_server: SocketAddrV4,
    limit: Duration,
) -> Result<(), EngineError> {
    let images = host.config.images(name).join(round.to_string());
    let work = host.work(name).join(round.to_string());
    fresh(&images);
    let parent = parent_of(round);
    let folders = ImageFolders {
        images: &images,
        work: &work,
        parent: parent.as_deref(),
    };
    let pre_dump = host
        .runc
        .pre_dump(name.as_str(), folders, page_server, limit);
    pre_dump.await?;
    let stats = stats::read(&work)
        .or_else(|| stats::read(&images))
        .unwrap_or_default();
    if parent.is_some() && stats.pages_skipped_parent == 0 && stats.pages_scanned > 0 {
        return Err(EngineError::NoParent(name.clone()));
    }
    Ok(())
}

/// Images of a round name the round before it by a relative path; the first has none.
fn parent_of(round: u32) -> Option<PathBuf> {
    (round > 1).then(|| PathBuf::from(format!("../{}", round - 1)))
}

/// An image folder must not hold files of an earlier try: CRIU would mix them.
fn fresh(images: &Path) {
    let _ = std::fs::remove_dir_all(images);
    let _ = std::fs::create_dir_all(images);
}

/// A dump or a restore that has begun, and waits for the word. Dropped, it goes on as it was told last, and is dismissed
/// or killed by its name.
#[derive(Debug)]
pub struct Begun {
    at: ParkAt,
    runtime: Child,
    waiting: Waiting,
    parked: Parked,
}

impl Begun {
    /// Starts the runtime, and waits until its CRIU is parked for the first time.
    async fn start(
        host: &Host,
        name: &ContainerName,
        at: ParkAt,
        start: impl FnOnce(&Parking) -> Result<Child, RuntimeError>,
        limit: Duration,
    ) -> Result<Self, EngineError> {
        let (container, park) = (host.container(name)?, host.park(name));
        let root = match at {
            ParkAt::Dump => None,
            ParkAt::Restore => cgroup_root(container),
        };
        let waiting = park.prepare(&host.config.runtime.criu, root.as_deref())?;
        let parking = Parking {
            configuration: park.criu_configuration(),
            programs: park.programs(),
            shim: park.shim(at, &container.network_namespace),
        };
        let mut runtime = start(&parking)?;
        let parked = until_parked(host, name, (at, &mut runtime, &waiting), limit).await?;
        Ok(Self {
            at,
            runtime,
            waiting,
            parked,
        })
    }

    /// Lets CRIU go on to where it is parked next; `false` when it is parked no more.
    async fn go_on(
        &mut self,
        host: &Host,
        name: &ContainerName,
        limit: Duration,
    ) -> Result<bool, EngineError> {
        if !host.park(name).tell(Word::Go, limit).await? {
            return Ok(false);
        }
        self.until_parked(host, name, limit).await?;
        Ok(true)
    }

    async fn until_parked(
        &mut self,
        host: &Host,
        name: &ContainerName,
        limit: Duration,
    ) -> Result<(), EngineError> {
        let criu = (self.at, &mut self.runtime, &self.waiting);
        self.parked = until_parked(host, name, criu, limit).await?;
        Ok(())
    }

    /// CRIU's own time between the last two places where it was parked, in milliseconds.
    pub(super) const fn criu_ms(&self) -> u64 {
        self.parked.criu_ms
    }
}

pub(super) async fn begin(
    host: &Host,
    name: &ContainerName,
    dump: Dump,
    limit: Duration,
) -> Result<Begun, EngineError> {
    dismiss(host, name, limit).await?;
    let images = host.config.images(name).join(FINAL);
    let work = host.work(name).join(FINAL);
    fresh(&images);
    let parent = parent_of(dump.rounds + 1);
    let folders = ImageFolders {
        images: &images,
        work: &work,
        parent: parent.as_deref(),
    };
    let start = |parking: &Parking| {
        let runc = &host.runc;
        runc.checkpoint(name.as_str(), folders, dump.page_server, parking)
    };
    Begun::start(host, name, ParkAt::Dump, start, limit).await
}

/// Lets go of a dump that has begun and frozen nothing, if there is one; its container runs on.
pub(super) async fn dismiss(
    host: &Host,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    let park = host.park(name);
    if park.frozen().is_none() {
        park.tell(Word::Veto, limit).await?;
    }
    Ok(())
}

pub(super) async fn freeze(
    host: &Host,
    name: &ContainerName,
    begun: &Begun,
    limit: Duration,
) -> Result<(), EngineError> {
    if !host.park(name).tell(Word::Go, limit).await? {
        return Err(begun.waiting.not_parked().into());
    }
    Ok(())
}

pub(super) async fn checkpoint(
    host: &Host,
    name: &ContainerName,
    mut begun: Begun,
    limit: Duration,
) -> Result<u64, EngineError> {
    begun.until_parked(host, name, limit).await?;
    Ok(begun.criu_ms())
}

/// Waits until CRIU is parked, or for the runtime to end without it, or for the limit.
async fn until_parked(
    host: &Host,
    name: &ContainerName,
    (at, runtime, waiting): (ParkAt, &mut Child, &Waiting),
    limit: Duration,
) -> Result<Parked, EngineError> {
    let (verb, folder) = match at {
        ParkAt::Dump => ("checkpoint", FINAL),
        ParkAt::Restore => ("restore", RESTORE),
    };
    let work = host.work(name).join(folder);
    tokio::select! {
        // CRIU is asked first: a runtime that ends at once may have been parked and killed since.
        biased;
        parked = waiting.parked() => Ok(parked?),
        ended = runtime.wait() => {
            let status = ended.map_err(|source| spawn_error(host, source))?;
            if waiting.refusal().is_none() {
                host.runc.judge(status, verb, name.as_str(), &work)?;
            }
            // We know best why we refused. Success without us: the runtime found another CRIU.
            Err(waiting.not_parked().into())
        }
        () = tokio::time::sleep(limit) => Err(EngineError::TimedOut {
            verb,
            container: name.clone(),
            seconds: limit.as_secs(),
        }),
    }
}

fn spawn_error(host: &Host, source: std::io::Error) -> EngineError {
    RuntimeError::Spawn {
        program: host.config.runtime.runc.clone(),
        source,
    }
    .into()
}

pub(super) async fn thaw(
    host: &Host,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    let container = host.container(name)?.clone();
    let park = host.park(name);
    park.tell(Word::Veto, limit).await?;
    if let Some(state) = host.runc.state(name.as_str()).await?
        && state.pid != 0
    {
        let cgroup = Cgroup::of(state.pid)?;
        until_untraced("thaw", name, &cgroup, (&park, Word::Veto), limit).await?;
    }
    if let Some(frozen) = park.frozen() {
        // Our shim or CRIU may have died without taking back what they did. Each step is harmless when they did.
        let namespace = container.network_namespace.clone();
        tokio::task::spawn_blocking(move || {
            let _ = cure::leave_repair_mode(&frozen.cgroup.pids());
            fence::set(&namespace, Fence::Loopback)?;
            Ok::<_, EngineError>(frozen.cgroup.thaw()?)
        })
        .await??;
    }
    host.fence(name, Fence::Lifted).await?;
    Ok(park.clear()?)
}

/// Waits until no debugger (CRIU) holds any task of a container. A dump that an earlier agent began may be parked only
/// now, so the word is given whenever it is.
async fn until_untraced(
    verb: &'static str,
    name: &ContainerName,
    cgroup: &Cgroup,
    late: (&Park, Word),
    limit: Duration,
) -> Result<(), EngineError> {
    let deadline = tokio::time::Instant::now() + limit;
    while cgroup.pids().into_iter().any(is_traced) {
        late.0.tell(late.1, limit).await?;
        if tokio::time::Instant::now() > deadline {
            return Err(EngineError::TimedOut {
                verb,
                container: name.clone(),
                seconds: limit.as_secs(),
            });
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn is_traced(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| {
        line.strip_prefix("TracerPid:")
            .is_some_and(|value| value.trim() != "0")
    })
}

pub(super) async fn retire(
    host: &Host,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    let park = host.park(name);
    park.tell(Word::Go, limit).await?;
    if let Some(frozen) = park.frozen() {
        // CRIU kills what it dumped. If CRIU died while parked, its tasks are left for us, frozen.
        until_untraced("retire", name, &frozen.cgroup, (&park, Word::Go), limit).await?;
        // The fence stays.
        tokio::task::spawn_blocking(move || frozen.cgroup.kill()).await??;
    }
    host.runc.delete(name.as_str(), &host.work(name)).await?;
    Ok(park.clear()?)
}

/// Starts a restore, up to where it is to look at the root file system. One that has begun before is given up.
pub(super) async fn begin_restore(
    host: &Host,
    container: &Container,
    before: Option<Begun>,
    limit: Duration,
) -> Result<Begun, EngineError> {
    let name = &container.name;
    let is_left = host.park(name).tell(Word::Veto, limit).await? || before.is_some();
    if let Some(mut before) = before {
        // What it has mounted goes with it.
        let _ = tokio::time::timeout(limit, before.runtime.wait()).await;
    }
    if is_left {
        host.runc.delete(name.as_str(), &host.work(name)).await?;
    }
    overlay::unmount(container)?;
    overlay::prepare(container)?;
    let (images, work) = (host.final_images(name), host.work(name).join(RESTORE));
    let folders = ImageFolders {
        images: &images,
        work: &work,
        parent: None,
    };
    let start = |parking: &Parking| {
        let runc = &host.runc;
        runc.restore(name.as_str(), &container.bundle, folders, parking)
    };
    Begun::start(host, name, ParkAt::Restore, start, limit).await
}

/// Mounts the root file system of a container and lets its restore go on as far as it does without images, but for the
/// one that the runtime wrote before anything was dumped and reads itself (`descriptors.json`).
pub(super) async fn ready_restore(
    host: &Host,
    container: &Container,
    begun: &mut Begun,
    limit: Duration,
) -> Result<(), EngineError> {
    if !reach(host, container, begun, Stop::Ready, limit).await? {
        return Err(begun.waiting.not_parked().into());
    }
    Ok(())
}

/// Restores a container, up to where its tasks are built.
pub(super) async fn build(
    host: &Host,
    container: &Container,
    begun: Option<Begun>,
    limit: Duration,
) -> Result<Begun, EngineError> {
    let before = match begun {
        Some(mut begun) => {
            if reach(host, container, &mut begun, Stop::Restored, limit).await? {
                return Ok(begun);
            }
            // It has died since.
            Some(begun)
        }
        None => None,
    };
    let mut begun = begin_restore(host, container, before, limit).await?;
    if !reach(host, container, &mut begun, Stop::Restored, limit).await? {
        return Err(begun.waiting.not_parked().into());
    }
    Ok(begun)
}

/// Lets a restore go on to a place where it is parked, with its root file system mounted; `false` when it is parked no more.
async fn reach(
    host: &Host,
    container: &Container,
    begun: &mut Begun,
    stop: Stop,
    limit: Duration,
) -> Result<bool, EngineError> {
    overlay::mount(container)?;
    while begun.parked.stop < stop {
        if !begun.go_on(host, &container.name, limit).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The cgroup of the bundle, where the unified hierarchy is the only one. There CRIU would put the tasks back where
/// they were at the source; under v1 runc tells it better.
fn cgroup_root(container: &Container) -> Option<String> {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return None;
    }
    let text = std::fs::read(container.bundle.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let path = config.get("linux")?.get("cgroupsPath")?.as_str()?;
    path.starts_with('/').then(|| path.to_owned())
}

pub(super) async fn run(
    host: &Host,
    begun: Begun,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    if !host.park(name).tell(Word::Go, limit).await? {
        return Err(EngineError::NotRunning(name.clone()));
    }
    // The runtime ends when CRIU has let the tasks run and detached from them.
    Ok(host
        .runc
        .finish(
            begun.runtime,
            "restore",
            name.as_str(),
            &host.work(name).join(RESTORE),
            limit,
        )
        .await?)
}

/// Takes down a restore wherever it stands, and a container of the engine `restart` as well.
pub(super) async fn kill(
    host: &Host,
    container: &Container,
    limit: Duration,
) -> Result<(), EngineError> {
    let name = &container.name;
    let park = host.park(name);
    park.tell(Word::Veto, limit).await?;
    let work = host.work(name);
    host.runc.delete(name.as_str(), &work).await?;
    tokio::task::spawn_blocking(move || cure::unmount_leftovers(&work.join(RESTORE))).await?;
    Ok(park.clear()?)
}
