//! The keeper: one task a service, on the control thread, that acts when time passes: a lease runs out, a held
//! request grows too old, a limit on writes ends, a release's pause ends.

use std::sync::Arc;
use std::time::Instant;

use super::Service;

/// Runs for as long as the control thread does.
///
/// # Cancel safety
/// Every step is complete when it returns; the task may be dropped at any await.
pub(crate) async fn keep(service: Arc<Service>) {
    loop {
        let now = Instant::now();
        let lease = service.expire_lease(now);
        let writes = service.expire_write_limit(now);
        let held = service.gate.tend(now);
        let moved = service.gate.keeper.notified();
        match [lease, writes, held].into_iter().flatten().min() {
            Some(deadline) => {
                // Only whether either has happened matters.
                drop(tokio::time::timeout_at(deadline.into(), moved).await);
            }
            None => moved.await,
        }
    }
}
