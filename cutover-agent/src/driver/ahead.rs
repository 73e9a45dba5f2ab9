//! What the target does of a restore before everything has arrived that is to be restored. Nothing is lost when it does
//! none of it.

use std::time::Duration;

use cutover_protocol::id::HopId;
use cutover_protocol::wire::{Request, Response};

use super::Driver;
use super::trees::Trees;
use crate::peer::Answering;

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
        if let Err(error) = self.trees.link.order(&request, self.limit).await {
            tracing::info!(%error, "the target begins to restore later");
        }
    }

    /// As far as it goes without images, once the trees have arrived, counted from when this returns.
    pub(super) async fn ready(&self) -> Option<Answering<Response>> {
        let request = Request::ReadyRestore {
            hop: self.hop.clone(),
            timeout_ms: self.limit_ms(),
        };
        let asked = async {
            let parts = self.trees.parts(false)?;
            let link = &self.trees.link;
            // It is asked before the trees move.
            link.call_after(&parts, &request, self.limit * 2).await
        };
        asked
            .await
            .inspect_err(|error: &String| tracing::debug!(%error, "the target restores later"))
            .ok()
    }

    fn limit_ms(&self) -> u64 {
        u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX)
    }
}
