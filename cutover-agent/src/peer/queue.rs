//! A bounded queue with many writers and many readers: whichever stream has room takes the next frame.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Semaphore;

/// The queue; closing it wakes everybody, and what was queued is dropped.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    room: Semaphore,
    filled: Semaphore,
    items: Mutex<VecDeque<T>>,
}

impl<T> Queue<T> {
    /// An empty queue for at most `capacity` items.
    pub(crate) fn bounded(capacity: usize) -> Self {
        Self {
            room: Semaphore::new(capacity),
            filled: Semaphore::new(0),
            items: Mutex::new(VecDeque::new()),
        }
    }

    /// Waits for room and appends; `false` when the queue is closed.
    ///
    /// # Cancel safety
    /// Dropped while waiting, the item is not queued.
    pub(crate) async fn push(&self, item: T) -> bool {
        let Ok(permit) = self.room.acquire().await else {
            return false;
        };
        permit.forget();
        self.items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(item);
        self.filled.add_permits(1);
        true
    }

    /// Waits for an item and takes it; `None` when the queue is closed.
    ///
    /// # Cancel safety
    /// Dropped while waiting, nothing is lost.
    pub(crate) async fn pop(&self) -> Option<T> {
        self.filled.acquire().await.ok()?.forget();
        let item = self
            .items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        self.room.add_permits(1);
        item
    }

    /// Ends the queue for everybody.
    pub(crate) fn close(&self) {
        self.room.close();
        self.filled.close();
        self.items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}
