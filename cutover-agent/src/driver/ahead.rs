//! What the target does of a restore before everything has arrived that is to be restored. Nothing is lost when it does
//! none of it.

use std::time::Duration;

use cutover_protocol::id::HopId;
use cutover_protocol::wire::Request;

use super::Driver;
use super::trees::Trees;

/// Asks the target to go ahead.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    pub(super) trees: Trees,
    hop: HopId,
    limit: Duration,
}

impl Driver {
    pub(super) fn ahead(&self) -> Ahead {
        Ahead {
            trees: self.trees(),
            hop: self.header.hop.clone(),
            limit: self.step_max(),
        }
    }
}

impl Ahead {
    /// As far as it goes before anything has arrived. What went further is given up: trees change again.
    pub(super) async fn begin(&self) {
        let request = Request::BeginRestore {
            hop: self.hop.clone(),
            containers: self.trees.containers.clone(),
            timeout_ms: self.limit_ms(),
        };
        self.order(&request).await;
    }

    /// As far as it goes without images: the trees have arrived.
    pub(super) async fn ready(&self) {
        let request = Request::ReadyRestore {
            hop: self.hop.clone(),
            timeout_ms: self.limit_ms(),
        };
        self.order(&request).await;
    }

    async fn order(&self, request: &Request) {
        if let Err(error) = self.trees.link.order(request, self.limit).await {
            tracing::info!(%error, "the target restores later");
        }
    }

    fn limit_ms(&self) -> u64 {
        u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX)
    }
}
