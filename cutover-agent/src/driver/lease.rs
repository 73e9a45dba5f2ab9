//! Keeps holds alive while a hop goes on. When the agent dies, nobody renews, and the gate aborts by itself.

use std::time::Duration;

use cutover_protocol::hold::Command;
use cutover_protocol::id::{Epoch, ServiceName};
use tokio::task::JoinHandle;

use crate::proxy::Proxy;

/// Renewals while it lives; dropping it ends them.
#[derive(Debug)]
pub(super) struct Lease {
    task: JoinHandle<()>,
}

impl Lease {
    /// Renews each service's hold three times a lease.
    pub(super) fn keep(proxy: Proxy, holds: Vec<(ServiceName, Epoch)>, lease_ms: u64) -> Self {
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(lease_ms / 3));
            loop {
                ticks.tick().await;
                for (service, epoch) in &holds {
                    let command = Command::Renew {
                        service: service.clone(),
                        epoch: *epoch,
                        lease_ms,
                    };
                    // A lost lease is seen by the commit; until then another try may still renew it.
                    if let Err(error) = proxy.command(&command).await {
                        tracing::warn!(%service, "the hold could not be renewed: {error}");
                    }
                }
            }
        });
        Self { task }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}
