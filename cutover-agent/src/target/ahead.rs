//! What is done of a restore before everything has arrived that is to be restored.

use std::time::Duration;

use cutover_protocol::id::{ContainerName, HopId};
use cutover_protocol::wire::Response;
use tokio::task::JoinSet;

use super::{Target, TargetError};
use crate::cgroup::Brisk;
use crate::engine::{Begun, EngineError};
use crate::fence::Fence;

impl Target {
    /// Starts what takes its time whatever there is to restore.
    pub(super) async fn begin_restore(
        &self,
        hop: &HopId,
        containers: Vec<ContainerName>,
        limit: Duration,
    ) -> Result<Response, TargetError> {
        let standing = self.standing.lock().await;
        Self::check(&standing, hop)?;
        *self.brisk.lock().await = Brisk::begin(limit);
        let mut starts = JoinSet::new();
        for name in containers.iter().cloned() {
            let (host, before) = (self.host.clone(), self.begun.lock().await.remove(&name));
            starts.spawn(async move {
                let begun = host.begin_restore(&name, before, limit).await;
                begun.map(|begun| (name, begun))
            });
        }
        let outcome = self.remember(starts).await;
        self.fences
            .prepare(&self.host, &containers, Fence::Inside)
            .await;
        outcome
    }

    /// Lets what has begun go on, now that the trees are what they will be.
    pub(super) async fn ready_restore(
        &self,
        hop: &HopId,
        limit: Duration,
    ) -> Result<Response, TargetError> {
        let standing = self.standing.lock().await;
        Self::check(&standing, hop)?;
        let mut going = JoinSet::new();
        for (name, mut begun) in std::mem::take(&mut *self.begun.lock().await) {
            let host = self.host.clone();
            going.spawn(async move {
                let ready = host.ready_restore(&name, &mut begun, limit).await;
                ready.map(|()| (name, begun))
            });
        }
        self.remember(going).await
    }

    /// Remembers the restores that have come further, and forgets the others.
    async fn remember(
        &self,
        mut going: JoinSet<Result<(ContainerName, Begun), EngineError>>,
    ) -> Result<Response, TargetError> {
        let mut outcome = Ok(Response::Done);
        while let Some(gone) = going.join_next().await {
            match gone.map_err(EngineError::from)? {
                Ok((name, begun)) => drop(self.begun.lock().await.insert(name, begun)),
                Err(error) => outcome = Err(error.into()),
            }
        }
        outcome
    }
}
