//! How many client connections there may be, as a number that a reload can change while connections last.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

/// The permits of all workers together.
#[derive(Debug)]
pub(crate) struct Permits {
    pub(crate) free: Arc<Semaphore>,
    /// How many there are, free or not.
    total: Arc<AtomicUsize>,
    /// Waits until enough connections have ended to have fewer.
    shrinking: Mutex<Option<AbortHandle>>,
}

impl Permits {
    pub(crate) fn new(total: usize) -> Self {
        let total = total.min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(total)),
            total: Arc::new(AtomicUsize::new(total)),
            shrinking: Mutex::new(None),
        }
    }

    /// More are there at once. Fewer: connections that are there stay, and no new one is accepted until enough of
    /// them have ended. Must be called within a local set.
    pub(crate) fn set(&self, wanted: usize) {
        let mut shrinking = self
            .shrinking
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = shrinking.take() {
            task.abort();
        }
        let wanted = wanted.min(Semaphore::MAX_PERMITS);
        let total = self.total.load(Ordering::Relaxed);
        if wanted >= total {
            self.free.add_permits(wanted - total);
            self.total.store(wanted, Ordering::Relaxed);
            return;
        }
        let surplus = u32::try_from(total - wanted).unwrap_or(u32::MAX);
        let (free, total) = (Arc::clone(&self.free), Arc::clone(&self.total));
        let task = tokio::task::spawn_local(async move {
            if let Ok(permits) = free.acquire_many(surplus).await {
                permits.forget();
                total.store(wanted, Ordering::Relaxed);
            }
        });
        *shrinking = Some(task.abort_handle());
    }
}
