//! Keeps alive what a hop has at the proxy for as long as it goes on: holds, and limits on writes. When the agent dies,
//! nobody renews, and the gate ends it by itself.

use std::time::Duration;

use cutover_protocol::hold::Command;
use cutover_protocol::id::{Epoch, ServiceName};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::proxy::Proxy;

/// Renewals while it lives; dropping it ends them.
#[derive(Debug)]
pub(super) struct Lease {
    task: JoinHandle<()>,
    /// Dropped, it asks the task to end.
    goes_on: Option<oneshot::Sender<()>>,
}

impl Lease {
    /// Renews each service's hold three times a lease.
    pub(super) fn keep(proxy: Proxy, holds: Vec<(ServiceName, Epoch)>, lease_ms: u64) -> Self {
        let renew = |(service, epoch)| Command::Renew {
            service,
            epoch,
            lease_ms,
        };
        Self::repeat(proxy, holds.into_iter().map(renew).collect(), lease_ms)
    }

    /// Gives commands again, each of which has a lease of so long, three times a lease.
    pub(super) fn repeat(proxy: Proxy, commands: Vec<Command>, lease_ms: u64) -> Self {
        let (goes_on, mut over) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(lease_ms / 3));
            loop {
                tokio::select! {
                    biased;
                    _ = &mut over => return,
                    _ = ticks.tick() => {}
                }
                for command in &commands {
                    // A lost lease is seen by the commit; until then another try may still renew it.
                    if let Err(error) = proxy.command(command).await {
                        tracing::warn!(?command, "a lease could not be renewed: {error}");
                    }
                }
            }
        });
        Self {
            task,
            goes_on: Some(goes_on),
        }
    }

    /// Ends the renewals. None is on its way to the proxy any more when this returns.
    pub(super) async fn end(mut self) {
        self.goes_on = None;
        // It panics nowhere, and nobody else ends it.
        (&mut self.task).await.ok();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}
