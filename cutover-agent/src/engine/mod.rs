//! How containers are stopped at the source and started at the target. Both engines offer the same verbs:
//! `freeze` and `checkpoint`, `thaw`, `retire` at the source; `build`, `run`, `kill` at the target. Every verb is idempotent,
//! and `thaw`, `retire` and `kill` are also right after a crash at any point.

mod criu;
mod overlay;
mod restart;

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;

use cutover_protocol::id::ContainerName;
use cutover_protocol::plan::Engine;

use crate::cgroup::CgroupError;
use crate::config::{Config, Container};
use crate::criu::park::{Park, ParkError};
use crate::fence::{self, FenceError};
use crate::runtime::runc::{Runc, RuntimeError};

pub use criu::{Begun, pre_dump};

/// Something an engine tried on a container did not work.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The plan names a container this site does not configure.
    #[error(
        "this site knows no container {0}: add a [[container]] with this name to its configuration"
    )]
    UnknownContainer(ContainerName),
    /// The container does not run.
    #[error("the container {0} does not run here: start it, then hop")]
    NotRunning(ContainerName),
    /// A runtime call failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// CRIU could not be parked.
    #[error(transparent)]
    Park(#[from] ParkError),
    /// The fence could not be moved.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The cgroup could not be moved.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The root file system could not be mounted.
    #[error("cannot mount the root file system of {container} on {path}: {source}")]
    Mount {
        /// The container.
        container: ContainerName,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Dump or restore took too long.
    #[error("{verb} of {container} did not end within {seconds} s")]
    TimedOut {
        /// What was under way.
        verb: &'static str,
        /// The container.
        container: ContainerName,
        /// How long we waited.
        seconds: u64,
    },
    /// CRIU dumped everything again although it was given a parent.
    #[error("the memory round of {0} ignored the round before it: its images are not a chain")]
    NoParent(ContainerName),
    /// A blocking call was lost.
    #[error("a helper thread failed: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// What a final dump builds on, and where its pages go.
#[derive(Debug, Clone, Copy)]
pub struct Dump {
    /// Memory rounds whose images it continues.
    pub rounds: u32,
    /// Who takes the pages.
    pub page_server: SocketAddrV4,
}

/// A container that stands at the target and has not run.
#[derive(Debug)]
pub enum Built {
    /// CRIU has built it and parks before the first instruction.
    Parked(Box<Begun>),
    /// The runtime created it.
    Created,
}

/// One site's containers and the tools to move them.
#[derive(Debug, Clone)]
pub struct Host {
    /// The site's configuration.
    pub config: Config,
    /// Its runtime.
    pub runc: Runc,
}

impl Host {
    /// The host a configuration describes.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let runc = Runc::new(&config.runtime);
        Self { config, runc }
    }

    /// The container of this name.
    ///
    /// # Errors
    /// [`EngineError::UnknownContainer`].
    pub fn container(&self, name: &ContainerName) -> Result<&Container, EngineError> {
        self.config
            .container(name)
            .ok_or_else(|| EngineError::UnknownContainer(name.clone()))
    }

    /// Where logs of the current hop's calls for a container go.
    #[must_use]
    pub fn work(&self, name: &ContainerName) -> PathBuf {
        self.config.state_dir.join("work").join(name.as_str())
    }

    /// Where the images of a container's final dump are.
    #[must_use]
    pub fn final_images(&self, name: &ContainerName) -> PathBuf {
        self.config.images(name).join(criu::FINAL)
    }

    /// CRIU's own time for a container's restore, from where it was asked for it to where it is parked, in milliseconds.
    #[must_use]
    pub fn restore_ms(&self, built: &Built) -> Option<u64> {
        match built {
            Built::Parked(begun) => Some(begun.criu_ms()),
            Built::Created => None,
        }
    }

    /// The first process of a container whose dump is parked.
    #[must_use]
    pub fn frozen_init(&self, name: &ContainerName) -> Option<u32> {
        self.park(name).frozen().map(|frozen| frozen.init_pid)
    }

    fn park(&self, name: &ContainerName) -> Park {
        Park::new(&self.config.state_dir, name.as_str())
    }

    /// Begins the dump of a running container, which runs on until [`Self::checkpoint`].
    ///
    /// # Errors
    /// [`EngineError`]; [`Self::dismiss`] then lets go of what has begun.
    pub async fn begin(
        &self,
        name: &ContainerName,
        dump: Dump,
        limit: Duration,
    ) -> Result<Begun, EngineError> {
        criu::begin(self, name, dump, limit).await
    }

    /// Lets go of a dump that has begun and frozen nothing; nothing happens when there is none.
    ///
    /// # Errors
    /// [`EngineError`]; it may be called again.
    pub async fn dismiss(&self, name: &ContainerName, limit: Duration) -> Result<(), EngineError> {
        criu::dismiss(self, name, limit).await
    }

    /// Freezes and fences a container whose dump has begun, and lets the dump go on.
    ///
    /// # Errors
    /// [`EngineError`]; [`Self::thaw`] then puts everything back.
    pub async fn freeze(
        &self,
        name: &ContainerName,
        begun: &Begun,
        limit: Duration,
    ) -> Result<(), EngineError> {
        criu::freeze(self, name, begun, limit).await
    }

    /// Waits until the dump of a frozen container is parked: its images are written, and it stays stopped until it is
    /// thawed or retired. Returns CRIU's own time since it was frozen, in milliseconds.
    ///
    /// # Errors
    /// [`EngineError`]; [`Self::thaw`] then puts everything back.
    pub async fn checkpoint(
        &self,
        name: &ContainerName,
        begun: Begun,
        limit: Duration,
    ) -> Result<u64, EngineError> {
        criu::checkpoint(self, name, begun, limit).await
    }

    /// Stops a container cleanly, for the engine `restart`; nothing of it runs any more.
    ///
    /// # Errors
    /// [`EngineError`]; [`Self::thaw`] then starts it again.
    pub async fn stop(&self, name: &ContainerName, limit: Duration) -> Result<(), EngineError> {
        restart::stop(self, name, limit).await
    }

    /// Lets a checkpointed container run again at the source, wherever the checkpoint stood.
    ///
    /// # Errors
    /// [`EngineError`]; it may be called again.
    pub async fn thaw(
        &self,
        engine: Engine,
        name: &ContainerName,
        limit: Duration,
    ) -> Result<(), EngineError> {
        match engine {
            Engine::Criu => criu::thaw(self, name, limit).await,
            Engine::Restart => restart::thaw(self, name).await,
        }
    }

    /// Ends a checkpointed container at the source for good. Its fence stays.
    ///
    /// # Errors
    /// [`EngineError`]; it may be called again.
    pub async fn retire(
        &self,
        engine: Engine,
        name: &ContainerName,
        limit: Duration,
    ) -> Result<(), EngineError> {
        match engine {
            Engine::Criu => criu::retire(self, name, limit).await?,
            Engine::Restart => self.runc.delete(name.as_str(), &self.work(name)).await?,
        }
        // A hop back writes into the upper layer, which must not happen under a mount.
        overlay::unmount(self.container(name)?)
    }

    /// Begins to restore a container that has not arrived, as far as that goes; [`Self::build`] does the rest. What has
    /// `begun` before is given up: its root file system is not as it will be.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is lost then, [`Self::build`] does all of it.
    pub async fn begin_restore(
        &self,
        name: &ContainerName,
        begun: Option<Begun>,
        limit: Duration,
    ) -> Result<Begun, EngineError> {
        criu::begin_restore(self, self.container(name)?, begun, limit).await
    }

    /// Goes on with a restore whose trees have arrived, and of its images only those that were there before the dump.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is lost then, [`Self::build`] does all of it.
    pub async fn ready_restore(
        &self,
        name: &ContainerName,
        begun: &mut Begun,
        limit: Duration,
    ) -> Result<(), EngineError> {
        criu::ready_restore(self, self.container(name)?, begun, limit).await
    }

    /// Builds a container at the target without running any of its code, from what has `begun` where something has. Its
    /// fence must be shut.
    ///
    /// # Errors
    /// [`EngineError`]; [`Self::kill`] then takes everything down.
    pub async fn build(
        &self,
        engine: Engine,
        name: &ContainerName,
        begun: Option<Begun>,
        limit: Duration,
    ) -> Result<Built, EngineError> {
        let container = self.container(name)?;
        match engine {
            Engine::Criu => criu::build(self, container, begun, limit)
                .await
                .map(|begun| Built::Parked(Box::new(begun))),
            Engine::Restart => {
                overlay::mount(container)?;
                let work = self.work(name);
                self.runc
                    .create(name.as_str(), &container.bundle, &work)
                    .await?;
                Ok(Built::Created)
            }
        }
    }

    /// Runs a built container.
    ///
    /// # Errors
    /// [`EngineError`].
    pub async fn run(
        &self,
        built: Built,
        name: &ContainerName,
        limit: Duration,
    ) -> Result<(), EngineError> {
        match built {
            Built::Parked(begun) => criu::run(self, *begun, name, limit).await,
            Built::Created => Ok(self.runc.start(name.as_str(), &self.work(name)).await?),
        }
    }

    /// Takes down whatever was built of a container at the target: tasks, mounts, packet filters.
    ///
    /// # Errors
    /// [`EngineError`]; it may be called again.
    pub async fn kill(&self, name: &ContainerName, limit: Duration) -> Result<(), EngineError> {
        let container = self.container(name)?.clone();
        criu::kill(self, &container, limit).await?;
        overlay::unmount(&container)?;
        self.fence(name, fence::Fence::Lifted).await
    }

    /// Moves the fence of a container.
    ///
    /// # Errors
    /// [`EngineError`].
    pub async fn fence(
        &self,
        name: &ContainerName,
        fence: fence::Fence,
    ) -> Result<(), EngineError> {
        let namespace = self.container(name)?.network_namespace.clone();
        Ok(tokio::task::spawn_blocking(move || fence::set(&namespace, fence)).await??)
    }
}
