//! The engine `criu`: memory, processes and connections move. See [`crate::criu::hook`] for how a dump and a
//! restore are parked.

use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::id::ContainerName;
use tokio::process::Child;

use super::{Dump, EngineError, Host};
use crate::cgroup::Cgroup;
use crate::config::Container;
use crate::criu::hook::ParkAt;
use crate::criu::park::{Park, Waiting, Word};
use crate::criu::{cure, log, start, stats};
use crate::fence::{self, Fence};
use crate::runtime::runc::{ImageFolders, Parking};

/// The folder of the final dump below a container's images.
pub(super) const FINAL: &str = "final";

/// The working folder of a restore.
pub(super) const RESTORE: &str = "restore";

/// CRIU's log, in the working folder of a restore; the runtime names it.
const RESTORE_LOG: &str = "restore.log";

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

/// A dump that has begun, and waits for the word to freeze its container; or a restore, for there to be something to
/// restore. Dropped, it goes on as it was told last, and is dismissed or killed by its name.
#[derive(Debug)]
pub struct Begun {
    at: ParkAt,
    runtime: Child,
    waiting: Waiting,
}

pub(super) async fn begin(
    host: &Host,
    name: &ContainerName,
    dump: Dump,
    limit: Duration,
) -> Result<Begun, EngineError> {
    dismiss(host, name, limit).await?;
    let container = host.container(name)?;
    let park = host.park(name);
    let waiting = park.prepare(ParkAt::Dump, &container.network_namespace, None)?;
    let images = host.config.images(name).join(FINAL);
    let work = host.work(name).join(FINAL);
    fresh(&images);
    let parent = parent_of(dump.rounds + 1);
    let folders = ImageFolders {
        images: &images,
        work: &work,
        parent: parent.as_deref(),
    };
    let parking = Parking {
        configuration: &park.criu_configuration(),
        stand_in: None,
    };
    let runtime = host
        .runc
        .checkpoint(name.as_str(), folders, dump.page_server, parking)?;
    let mut begun = Begun {
        at: ParkAt::Dump,
        runtime,
        waiting,
    };
    until(host, name, &mut begun, Stop::Parked, limit).await?;
    Ok(begun)
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
        return Err(begun.waiting.witness().not_parked().into());
    }
    Ok(())
}

pub(super) async fn written(
    host: &Host,
    name: &ContainerName,
    begun: &mut Begun,
    limit: Duration,
) -> Result<(), EngineError> {
    until(host, name, begun, Stop::Done, limit).await
}

pub(super) async fn checkpoint(
    host: &Host,
    name: &ContainerName,
    mut begun: Begun,
    limit: Duration,
) -> Result<(), EngineError> {
    until(host, name, &mut begun, Stop::Parked, limit).await
}

/// How far CRIU is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// It has done its work, and is about to be parked.
    Done,
    /// It is parked: it takes the word.
    Parked,
}

/// Waits until CRIU is there, or for the runtime to end without it, or for the limit.
async fn until(
    host: &Host,
    name: &ContainerName,
    begun: &mut Begun,
    stop: Stop,
    limit: Duration,
) -> Result<(), EngineError> {
    let Begun {
        at,
        runtime,
        waiting,
    } = begun;
    let (verb, folder) = match at {
        ParkAt::Dump => ("checkpoint", FINAL),
        ParkAt::Restore => ("restore", RESTORE),
    };
    let work = host.work(name).join(folder);
    let witness = waiting.witness();
    let there = async {
        match stop {
            Stop::Done => waiting.done().await,
            Stop::Parked => waiting.parked().await,
        }
    };
    tokio::select! {
        // The hook is asked first: a runtime that ends at once may have parked and been killed since.
        biased;
        there = there => there.map_err(EngineError::from),
        ended = runtime.wait() => {
            let judged = match ended {
                Ok(status) => host.runc.judge(status, verb, name.as_str(), &work),
                Err(source) => return Err(spawn_error(host, source)),
            };
            judged?;
            // Success without the hook: CRIU ignored our configuration and went on by itself.
            Err(witness.not_parked().into())
        }
        () = tokio::time::sleep(limit) => Err(EngineError::TimedOut {
            verb,
            container: name.clone(),
            seconds: limit.as_secs(),
        }),
    }
}

fn spawn_error(host: &Host, source: std::io::Error) -> EngineError {
    crate::runtime::runc::RuntimeError::Spawn {
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
        // The hook or CRIU may have died without taking back what they did. Each step is harmless when they did.
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

/// Waits until no debugger (CRIU) holds any task of a container. A dump that an earlier agent began may park only
/// now, so its hook is given the word whenever it appears.
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

/// Starts the runtime of a restore, up to where it asks CRIU for its version.
pub(super) async fn begin_restore(
    host: &Host,
    container: &Container,
    limit: Duration,
) -> Result<Begun, EngineError> {
    start_restore(host, container, StandIn::Wanted, limit).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StandIn {
    Wanted,
    None,
}

/// Starts a restore and waits until it is parked in CRIU's stand-in where that is wanted, else until it is done.
async fn start_restore(
    host: &Host,
    container: &Container,
    stand_in: StandIn,
    limit: Duration,
) -> Result<Begun, EngineError> {
    let (name, park) = (&container.name, host.park(&container.name));
    if park.tell(Word::Veto, limit).await? {
        // Begun by an earlier agent.
        host.runc.delete(name.as_str(), &host.work(name)).await?;
    }
    let cgroup_root = cgroup_root(container);
    let waiting = park.prepare(
        ParkAt::Restore,
        &container.network_namespace,
        cgroup_root.as_deref(),
    )?;
    let stand_in = match stand_in {
        StandIn::Wanted => Some(park.stand_in(&host.config.runtime.criu)?),
        StandIn::None => None,
    };
    let (images, work) = (host.final_images(name), host.work(name).join(RESTORE));
    // When it is made tells when CRIU was ready: there may be one of an earlier hop.
    let _ = std::fs::remove_file(work.join(RESTORE_LOG));
    let folders = ImageFolders {
        images: &images,
        work: &work,
        parent: None,
    };
    let parking = Parking {
        configuration: &park.criu_configuration(),
        stand_in: stand_in.as_deref(),
    };
    let runtime = host
        .runc
        .restore(name.as_str(), &container.bundle, folders, parking)?;
    let mut begun = Begun {
        at: ParkAt::Restore,
        runtime,
        waiting,
    };
    let stop = match stand_in {
        Some(_) => Stop::Parked,
        None => Stop::Done,
    };
    until(host, name, &mut begun, stop, limit).await?;
    Ok(begun)
}

/// Restores a container whose root file system is mounted, up to where CRIU is about to be parked at its end.
pub(super) async fn build(
    host: &Host,
    container: &Container,
    begun: Option<Begun>,
    limit: Duration,
) -> Result<Begun, EngineError> {
    let name = &container.name;
    if let Some(mut begun) = begun {
        if host.park(name).tell(Word::Go, limit).await? {
            until(host, name, &mut begun, Stop::Done, limit).await?;
            return Ok(begun);
        }
        // It has died since.
        host.runc.delete(name.as_str(), &host.work(name)).await?;
    }
    start_restore(host, container, StandIn::None, limit).await
}

/// See [`Host::restore_ms`].
pub(super) fn restore_ms(host: &Host, name: &ContainerName, begun: &Begun) -> Option<u64> {
    let path = host.work(name).join(RESTORE).join(RESTORE_LOG);
    let criu = begun.waiting.criu();
    let start = criu.and_then(|criu| start::ms_before_log(criu, &path));
    Some(start.unwrap_or(0) + log::restore_ms(&path)?)
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
    mut begun: Begun,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    until(host, name, &mut begun, Stop::Parked, limit).await?;
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
