//! The fences of a hop's containers at the target: moved all at once, and by tools that were started while nobody waited.

use cutover_protocol::id::{ContainerName, HopId};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::engine::{EngineError, Host};
use crate::fence::{Fence, FenceError, Ready};

/// Where the fences stand and what is ready to move them.
#[derive(Debug, Default)]
pub(super) struct Fences {
    /// The hop whose fences this agent has shut and not moved since.
    shut: Mutex<Option<HopId>>,
    next: Mutex<Option<Next>>,
}

/// A move that was begun while nobody waited for it.
#[derive(Debug)]
struct Next {
    containers: Vec<ContainerName>,
    to: Fence,
    moves: Moves,
}

impl Next {
    fn is(&self, containers: &[ContainerName], to: Fence) -> bool {
        self.to == to && self.containers == containers
    }
}

#[derive(Debug)]
enum Moves {
    /// Only to be made.
    Ready(Vec<Ready>),
    UnderWay(JoinSet<Result<(), FenceError>>),
}

impl Fences {
    /// Shuts the fences of a hop's containers, unless that has been done.
    pub(super) async fn shut(
        &self,
        host: &Host,
        hop: &HopId,
        containers: &[ContainerName],
    ) -> Result<(), EngineError> {
        if self.shut.lock().await.as_ref() != Some(hop) {
            self.set(host, containers, Fence::Shut).await?;
            *self.shut.lock().await = Some(hop.clone());
        }
        Ok(())
    }

    /// Makes the next move ready, unless that has been done. It is no harm when that fails: the move itself then says why.
    pub(super) async fn prepare(&self, host: &Host, containers: &[ContainerName], to: Fence) {
        if matches!(&*self.next.lock().await, Some(next) if next.is(containers, to)) {
            return;
        }
        let prepared = prepare(host, containers, to).await;
        let failed = |error: &EngineError| tracing::debug!(%error, "no fence was made ready");
        *self.next.lock().await = prepared.inspect_err(failed).ok();
    }

    /// Begins the move that was made ready, without waiting for its end.
    pub(super) async fn begin(&self) {
        if let Some(next) = &mut *self.next.lock().await
            && let Moves::Ready(tools) = &mut next.moves
        {
            *self.shut.lock().await = None;
            next.moves = Moves::UnderWay(apply(std::mem::take(tools)));
        }
    }

    /// Moves the fences of these containers.
    pub(super) async fn set(
        &self,
        host: &Host,
        containers: &[ContainerName],
        to: Fence,
    ) -> Result<(), EngineError> {
        let mut next = self.next.lock().await;
        *self.shut.lock().await = None;
        let begun = match next.take() {
            Some(begun) if begun.is(containers, to) => begun,
            other => {
                settle(other).await;
                prepare(host, containers, to).await?
            }
        };
        let mut moves = match begun.moves {
            Moves::Ready(tools) => apply(tools),
            Moves::UnderWay(moves) => moves,
        };
        while let Some(moved) = moves.join_next().await {
            moved??;
        }
        Ok(())
    }

    /// Forgets everything: somebody else moves these fences now.
    pub(super) async fn forget(&self) {
        *self.shut.lock().await = None;
        settle(self.next.lock().await.take()).await;
    }
}

/// Waits until what was begun has come to its end, whatever that is.
async fn settle(begun: Option<Next>) {
    if let Some(Next {
        moves: Moves::UnderWay(mut moves),
        ..
    }) = begun
    {
        while moves.join_next().await.is_some() {}
    }
}

fn apply(tools: Vec<Ready>) -> JoinSet<Result<(), FenceError>> {
    let mut moves = JoinSet::new();
    for tool in tools {
        moves.spawn_blocking(move || tool.apply());
    }
    moves
}

async fn prepare(
    host: &Host,
    containers: &[ContainerName],
    to: Fence,
) -> Result<Next, EngineError> {
    let mut starts = JoinSet::new();
    for name in containers {
        let namespace = host.container(name)?.network_namespace.clone();
        starts.spawn_blocking(move || Ready::new(&namespace, to));
    }
    let mut tools = Vec::new();
    while let Some(started) = starts.join_next().await {
        tools.extend(started??);
    }
    Ok(Next {
        containers: containers.to_vec(),
        to,
        moves: Moves::Ready(tools),
    })
}
