//! The engine `restart`: stop cleanly, move the files, start. A stopped container cannot lose memory it has
//! written to disk, and starting it again is the whole rollback.

use std::time::Duration;

use cutover_protocol::id::ContainerName;

use super::{EngineError, Host};
use crate::fence::Fence;

/// Poll interval while a container shuts down.
const POLL: Duration = Duration::from_millis(10);

/// Fences, then sends SIGTERM and waits until the container has ended.
pub(super) async fn stop(
    host: &Host,
    name: &ContainerName,
    limit: Duration,
) -> Result<(), EngineError> {
    let Some(state) = host.runc.state(name.as_str()).await? else {
        return Err(EngineError::NotRunning(name.clone()));
    };
    if state.status != "stopped" {
        host.runc
            .signal(name.as_str(), "TERM", &host.work(name))
            .await?;
    }
    let deadline = tokio::time::Instant::now() + limit;
    while host
        .runc
        .state(name.as_str())
        .await?
        .is_some_and(|state| state.status != "stopped")
    {
        if tokio::time::Instant::now() > deadline {
            return Err(EngineError::TimedOut {
                verb: "stop",
                container: name.clone(),
                seconds: limit.as_secs(),
            });
        }
        tokio::time::sleep(POLL).await;
    }
    host.fence(name, Fence::Loopback).await
}

/// Starts the container again if it has ended. One that still runs is left alone.
pub(super) async fn thaw(host: &Host, name: &ContainerName) -> Result<(), EngineError> {
    let container = host.container(name)?;
    let work = host.work(name);
    let status = host
        .runc
        .state(name.as_str())
        .await?
        .map(|state| state.status);
    match status.as_deref() {
        Some("running" | "paused") => {}
        Some("created") => host.runc.start(name.as_str(), &work).await?,
        _ => {
            host.runc.delete(name.as_str(), &work).await?;
            host.runc
                .create(name.as_str(), &container.bundle, &work)
                .await?;
            host.runc.start(name.as_str(), &work).await?;
        }
    }
    host.fence(name, Fence::Lifted).await
}
