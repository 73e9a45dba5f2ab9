//! The target's side of a hop: it does what the source's agent asks and never decides. What it built stays parked
//! or fenced until it is told otherwise, also across a restart of this agent.

mod ahead;
mod fences;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::id::{ContainerName, HopId};
use cutover_protocol::plan::{Engine, Probe};
use cutover_protocol::tunnel::Offer;
use cutover_protocol::wire::{Request, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::cgroup::Brisk;
use crate::config::Config;
use crate::durable;
use crate::engine::{Begun, Built, EngineError, Host};
use crate::fence::Fence;
use crate::memory::PageStore;
use crate::tunnel::{self, Tunnel, TunnelError};
use crate::{preflight, probe};
use fences::Fences;

/// How long taking down one container may take.
const KILL_MAX: Duration = Duration::from_secs(15);

/// How far a hop has come at this target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Files arrive, containers are built; nothing runs.
    #[serde(alias = "built")]
    Staging,
    /// Containers run behind the fence.
    Fenced,
    /// The target serves.
    Serving,
}

/// What this target remembers of the current hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The hop.
    pub hop: HopId,
    /// Its containers in dependency order.
    pub containers: Vec<ContainerName>,
    /// How far it has come.
    pub stage: Stage,
}

/// The target agent.
#[derive(Debug)]
pub struct Target {
    host: Host,
    pages: Arc<PageStore>,
    tunnel: Arc<Tunnel>,
    standing: Mutex<Option<Standing>>,
    /// Restores of the current hop that have begun and wait for what there is to restore.
    begun: Mutex<BTreeMap<ContainerName, Begun>>,
    /// From then on until all is restored.
    brisk: Mutex<Option<Brisk>>,
    /// What was built for the current hop and has not run. Lost with the agent: the source then takes the hop back.
    built: Mutex<BTreeMap<ContainerName, Built>>,
    fences: Arc<Fences>,
}

/// The target could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// An engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A probe failed.
    #[error("{0}")]
    Probe(String),
    /// The tunnel failed.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The standing could not be kept.
    #[error("cannot keep the state of the hop in {path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another hop, or none, is current.
    #[error("this target knows no hop {0}: it was taken down or never begun; start a new hop")]
    UnknownHop(HopId),
    /// The register went to a target that runs nothing: somebody committed by hand.
    #[error(
        "hop {0} has nothing running at the target, yet the register says that it serves; release the service to the source (docs/operating.md)"
    )]
    NotVerified(HopId),
    /// This agent was restarted since it built the container.
    #[error("{0} was not built by this agent: it was restarted meanwhile; hop again")]
    NotBuilt(ContainerName),
    /// The target owns the service.
    #[error("the containers of hop {0} serve here: they are not taken down")]
    Serving(HopId),
    /// Something already runs under a name of the plan.
    #[error(
        "the container {0} already exists at this target: delete it (runc delete), or take it out of the plan"
    )]
    Exists(ContainerName),
}

impl Target {
    /// The target of a configuration, with what it remembers from before a restart.
    ///
    /// # Errors
    /// When the remembered standing cannot be read: deleting it would forget what is parked here.
    pub fn new(config: Config, tunnel: Arc<Tunnel>) -> Result<Self, TargetError> {
        let path = standing_path(&config);
        let standing =
            durable::read_json(&path).map_err(|source| TargetError::State { path, source })?;
        let pages = Arc::new(PageStore::new(config.state_dir.join("pages")));
        Ok(Self {
            host: Host::new(config),
            pages,
            tunnel,
            standing: Mutex::new(standing),
            begun: Mutex::default(),
            brisk: Mutex::default(),
            built: Mutex::default(),
            fences: Arc::default(),
        })
    }

    /// Where pages of memory go.
    #[must_use]
    pub fn pages(&self) -> Arc<PageStore> {
        Arc::clone(&self.pages)
    }

    /// What this target remembers of the current hop.
    pub async fn standing(&self) -> Option<Standing> {
        self.standing.lock().await.clone()
    }

    /// Answers one request; a failure becomes a sentence for the source.
    pub async fn answer(&self, request: Request) -> Response {
        match self.act(request).await {
            Ok(response) => response,
            Err(error) => Response::Failed {
                message: format!("target: {error}"),
            },
        }
    }

    async fn act(&self, request: Request) -> Result<Response, TargetError> {
        match request {
            Request::Inspect(inspect) => {
                let facts =
                    preflight::inspect(&self.host, &inspect, cutover_protocol::id::Site::Target)
                        .await;
                Ok(Response::Inspected(Box::new(facts)))
            }
            Request::Begin { hop, containers } => self.begin(hop, containers).await,
            Request::BeginRestore {
                hop,
                containers,
                timeout_ms,
            } => {
                self.begin_restore(&hop, containers, Duration::from_millis(timeout_ms))
                    .await
            }
            Request::ReadyRestore { hop, timeout_ms } => {
                self.ready_restore(&hop, Duration::from_millis(timeout_ms))
                    .await
            }
            Request::Restore {
                hop,
                containers,
                engine,
                timeout_ms,
            } => {
                self.restore(hop, containers, engine, Duration::from_millis(timeout_ms))
                    .await
            }
            Request::Verify {
                hop,
                probes,
                timeout_ms,
            } => {
                self.verify(&hop, &probes, Duration::from_millis(timeout_ms))
                    .await
            }
            Request::Unfence { hop } => self.unfence(&hop).await,
            Request::Kill { hop } => self.kill(&hop).await,
            Request::Drop { hop, containers } => self.drop_staged(&hop, &containers).await,
            Request::Finish { hop } => self.finish(&hop).await,
            Request::OpenTunnel(offer) => self.open_tunnel(offer).await,
            Request::FitTunnel { hop, mtu } => {
                self.tunnel.set_mtu(&hop, mtu).await?;
                Ok(Response::Done)
            }
            Request::CloseTunnel { hop } => {
                self.tunnel.close(&hop).await?;
                Ok(Response::Done)
            }
            Request::ReturnThrough { hop, moved } => {
                self.tunnel.flip(&hop, moved).await?;
                Ok(Response::Done)
            }
        }
    }

    async fn open_tunnel(&self, offer: Offer) -> Result<Response, TargetError> {
        let containers = {
            let standing = self.standing.lock().await;
            Self::check(&standing, &offer.hop)?.containers.clone()
        };
        let mut namespaces = Vec::with_capacity(containers.len());
        for name in &containers {
            namespaces.push(self.host.container(name)?.network_namespace.clone());
        }
        // A namespace that is made only with its container has no address yet: nothing of it can move.
        let known = tokio::task::spawn_blocking(move || {
            let known = namespaces
                .iter()
                .filter_map(|path| tunnel::addresses_in(path).ok());
            known.flatten().collect()
        });
        let known = known.await.map_err(EngineError::from)?;
        Ok(Response::Tunnel(self.tunnel.answer(offer, known).await?))
    }

    async fn begin(
        &self,
        hop: HopId,
        containers: Vec<ContainerName>,
    ) -> Result<Response, TargetError> {
        let mut standing = self.standing.lock().await;
        if let Some(old) = standing.as_ref()
            && old.stage != Stage::Serving
        {
            self.take_down(&old.containers).await?;
        }
        for name in &containers {
            self.host.container(name)?;
            if self
                .host
                .runc
                .state(name.as_str())
                .await
                .map_err(EngineError::from)?
                .is_some()
            {
                return Err(TargetError::Exists(name.clone()));
            }
        }
        let begun = Standing {
            hop,
            containers,
            stage: Stage::Staging,
        };
        self.keep(&mut standing, Some(begun.clone())).await?;
        // Now, while nobody waits.
        let (hop, containers) = (&begun.hop, &begun.containers);
        self.fences.shut(&self.host, hop, containers).await?;
        Ok(Response::Done)
    }

    async fn restore(
        &self,
        hop: HopId,
        containers: Vec<ContainerName>,
        engine: Engine,
        limit: Duration,
    ) -> Result<Response, TargetError> {
        let standing = self.standing.lock().await;
        Self::check(&standing, &hop)?;
        if self.built.lock().await.is_empty() {
            self.fences.shut(&self.host, &hop, &containers).await?;
            self.place_pages(&containers).await?;
            let (built, ()) = tokio::join!(
                self.build(engine, &containers, limit),
                self.fences.prepare(&self.host, &containers, Fence::Inside)
            );
            if built.is_err()
                && let Err(error) = self.take_down(&containers).await
            {
                // The source will ask for it once more.
                tracing::warn!(%error, "what could not be built was not taken down");
            }
            let (brisk, fences) = (self.brisk.lock().await.take(), Arc::clone(&self.fences));
            *self.built.lock().await = built?;
            // While the answer is on its way. Every fence is moved before the first task runs: a container may talk to a
            // later one at once.
            tokio::spawn(async move {
                drop(brisk);
                fences.begin().await;
            });
        }
        let built = self.built.lock().await;
        let own_ms = built
            .values()
            .filter_map(|built| self.host.restore_ms(built));
        Ok(Response::Restored {
            restore_ms: own_ms.max().unwrap_or(0),
        })
    }

    /// Builds every container; when one cannot be, the others have come to an end, too.
    async fn build(
        &self,
        engine: Engine,
        containers: &[ContainerName],
        limit: Duration,
    ) -> Result<BTreeMap<ContainerName, Built>, TargetError> {
        // Nothing runs yet, so the order of dependencies does not matter before `verify`.
        let mut builds = JoinSet::new();
        for name in containers.iter().cloned() {
            let (host, begun) = (self.host.clone(), self.begun.lock().await.remove(&name));
            builds.spawn(async move {
                host.build(engine, &name, begun, limit)
                    .await
                    .map(|built| (name, built))
            });
        }
        let mut outcomes = Vec::new();
        while let Some(built) = builds.join_next().await {
            outcomes.push(built.map_err(EngineError::from)?);
        }
        Ok(outcomes.into_iter().collect::<Result<_, _>>()?)
    }

    /// Puts the assembled page images beside the others.
    async fn place_pages(&self, containers: &[ContainerName]) -> Result<(), TargetError> {
        for name in containers {
            let images = self.host.final_images(name);
            let (pages, name) = (self.pages(), name.clone());
            let placed = tokio::task::spawn_blocking(move || {
                pages
                    .place(&name, &images)
                    .map_err(|source| TargetError::State {
                        path: images,
                        source,
                    })
            });
            placed.await.map_err(EngineError::from)??;
        }
        Ok(())
    }

    async fn clear_pages(&self) -> Result<(), TargetError> {
        let (pages, path) = (self.pages(), self.host.config.state_dir.join("pages"));
        let cleared = tokio::task::spawn_blocking(move || pages.clear());
        cleared
            .await
            .map_err(EngineError::from)?
            .map_err(|source| TargetError::State { path, source })
    }

    async fn verify(
        &self,
        hop: &HopId,
        probes: &[Probe],
        limit: Duration,
    ) -> Result<Response, TargetError> {
        let mut standing = self.standing.lock().await;
        let mut current = Self::check(&standing, hop)?.clone();
        current.stage = Stage::Fenced;
        let containers = current.containers.clone();
        self.fences
            .set(&self.host, &containers, Fence::Inside)
            .await?;
        // Whoever takes the hop down does not ask whether anything ran: only what follows needs to know it.
        let (ran, kept) = tokio::join!(
            self.run(&containers, limit),
            self.keep(&mut standing, Some(current))
        );
        ran?;
        kept?;
        // What the source's disks had, ours must have before the commit; meanwhile the probes are asked.
        let synced = self.sync_to_disk(&containers)?;
        self.fences
            .prepare(&self.host, &containers, Fence::Lifted)
            .await;
        let mut told = Vec::with_capacity(probes.len());
        for probe in probes {
            told.push(probe::ask(probe).await.map_err(TargetError::Probe)?);
        }
        synced.await.map_err(EngineError::from)??;
        Ok(Response::Verified(told))
    }

    /// Runs what was built. What CRIU restored goes on where it was, and does so all at once: a neighbour that is still
    /// locked would lose packets, and TCP wait before it sends them again. What starts anew starts in the order given.
    async fn run(&self, containers: &[ContainerName], limit: Duration) -> Result<(), TargetError> {
        let mut built = std::mem::take(&mut *self.built.lock().await);
        let mut runs = JoinSet::new();
        for name in containers {
            let one = built
                .remove(name)
                .ok_or_else(|| TargetError::NotBuilt(name.clone()))?;
            if matches!(one, Built::Created) {
                self.host.run(one, name, limit).await?;
            } else {
                let (host, name) = (self.host.clone(), name.clone());
                runs.spawn(async move { host.run(one, &name, limit).await });
            }
        }
        while let Some(ran) = runs.join_next().await {
            ran.map_err(EngineError::from)??;
        }
        Ok(())
    }

    /// Makes every tree of these containers durable, on a thread of its own.
    fn sync_to_disk(
        &self,
        containers: &[ContainerName],
    ) -> Result<tokio::task::JoinHandle<Result<(), TargetError>>, TargetError> {
        let mut folders = Vec::new();
        for name in containers {
            let trees = &self.host.container(name)?.trees;
            folders.extend(trees.iter().map(|tree| tree.path.clone()));
        }
        Ok(tokio::task::spawn_blocking(move || {
            folders.into_iter().try_for_each(|path| {
                durable::sync_file_system(&path)
                    .map_err(|source| TargetError::State { path, source })
            })
        }))
    }

    async fn unfence(&self, hop: &HopId) -> Result<Response, TargetError> {
        let mut standing = self.standing.lock().await;
        let mut current = Self::check(&standing, hop)?.clone();
        if !matches!(current.stage, Stage::Fenced | Stage::Serving) {
            return Err(TargetError::NotVerified(hop.clone()));
        }
        self.fences
            .set(&self.host, &current.containers, Fence::Lifted)
            .await?;
        current.stage = Stage::Serving;
        self.keep(&mut standing, Some(current)).await?;
        Ok(Response::Done)
    }

    async fn kill(&self, hop: &HopId) -> Result<Response, TargetError> {
        let mut standing = self.standing.lock().await;
        match standing.as_ref() {
            Some(current) if &current.hop == hop && current.stage == Stage::Serving => {
                return Err(TargetError::Serving(hop.clone()));
            }
            Some(current) if &current.hop == hop => {
                self.take_down(&current.containers).await?;
                let staged = Standing {
                    stage: Stage::Staging,
                    ..current.clone()
                };
                self.keep(&mut standing, Some(staged)).await?;
            }
            // Another hop has begun meanwhile and took ours down, or ours never began here.
            _ => {}
        }
        Ok(Response::Done)
    }

    async fn take_down(&self, containers: &[ContainerName]) -> Result<(), TargetError> {
        self.fences.forget().await;
        self.begun.lock().await.clear();
        self.brisk.lock().await.take();
        self.built.lock().await.clear();
        for name in containers.iter().rev() {
            self.host.kill(name, KILL_MAX).await?;
        }
        Ok(())
    }

    async fn drop_staged(
        &self,
        hop: &HopId,
        containers: &[ContainerName],
    ) -> Result<Response, TargetError> {
        let mut standing = self.standing.lock().await;
        match standing.as_ref() {
            Some(current) if &current.hop == hop && current.stage == Stage::Serving => {
                return Err(TargetError::Serving(hop.clone()));
            }
            Some(current) if &current.hop == hop => self.take_down(&current.containers).await?,
            // Whatever is staged now belongs to somebody else.
            _ => return Ok(Response::Done),
        }
        for name in containers {
            let container = self.host.container(name)?;
            let folders = container.trees.iter().map(|tree| tree.path.clone());
            for folder in folders.chain([self.host.config.images(name)]) {
                tokio::task::spawn_blocking(move || {
                    durable::empty_folder(&folder).map_err(|source| TargetError::State {
                        path: folder,
                        source,
                    })
                })
                .await
                .map_err(EngineError::from)??;
            }
        }
        self.clear_pages().await?;
        self.keep(&mut standing, None).await?;
        Ok(Response::Done)
    }

    async fn finish(&self, hop: &HopId) -> Result<Response, TargetError> {
        let standing = self.standing.lock().await;
        let current = Self::check(&standing, hop)?;
        for name in &current.containers {
            let images = self.host.config.images(name);
            tokio::task::spawn_blocking(move || {
                durable::empty_folder(&images).map_err(|source| TargetError::State {
                    path: images,
                    source,
                })
            })
            .await
            .map_err(EngineError::from)??;
        }
        self.clear_pages().await?;
        Ok(Response::Done)
    }

    fn check<'a>(standing: &'a Option<Standing>, hop: &HopId) -> Result<&'a Standing, TargetError> {
        standing
            .as_ref()
            .filter(|current| &current.hop == hop)
            .ok_or_else(|| TargetError::UnknownHop(hop.clone()))
    }

    async fn keep(
        &self,
        standing: &mut Option<Standing>,
        new: Option<Standing>,
    ) -> Result<(), TargetError> {
        let (path, written) = (standing_path(&self.host.config), new.clone());
        let writing = tokio::task::spawn_blocking(move || {
            durable::write_json(&path, &written)
                .map_err(|source| TargetError::State { path, source })
        });
        writing.await.map_err(EngineError::from)??;
        *standing = new;
        Ok(())
    }
}

fn standing_path(config: &Config) -> PathBuf {
    config.state_dir.join("target.json")
}
