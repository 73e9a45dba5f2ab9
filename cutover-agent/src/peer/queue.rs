//! A bounded queue with many writers and many readers: whichever stream has room takes the next frame.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Semaphore;

/// The queue; closing it wakes everybody, and what was queued is dropped.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    capacity: usize,
    room: Semaphore,
    filled: Semaphore,
    /// Readers that wait for an item.
    idle: AtomicUsize,
    items: Mutex<VecDeque<T>>,
}

impl<T> Queue<T> {
    /// An empty queue for at most `capacity` items.
    pub(crate) fn bounded(capacity: usize) -> Self {
        Self {
            capacity,
            room: Semaphore::new(capacity),
            filled: Semaphore::new(0),
            idle: AtomicUsize::new(0),
            items: Mutex::new(VecDeque::new()),
        }
    }

    /// Waits for room and appends; `false` when the queue is closed.
    ///
    /// # Cancel safety
    /// Dropped while waiting, the item is not queued.
    pub(crate) async fn push(&self, item: impl Into<T>) -> bool {
        let Ok(permit) = self.room.acquire().await else {
            return false;
        };
        permit.forget();
        self.items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(item.into());
        self.filled.add_permits(1);
        true
    }

    /// Waits for an item and takes it; `None` when the queue is closed.
    ///
    /// # Cancel safety
    /// Dropped while waiting, nothing is lost.
    pub(crate) async fn pop(&self) -> Option<T> {
        let waiting = Idle::of(&self.idle);
        self.filled.acquire().await.ok()?.forget();
        drop(waiting);
        let item = self
            .items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        self.room.add_permits(1);
        item
    }

    /// How many readers wait for an item right now.
    pub(crate) fn idle(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    /// Whether at least half of what the queue can hold waits in it.
    pub(crate) fn is_backlog(&self) -> bool {
        self.room.available_permits() <= self.capacity / 2
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

/// Counts a reader as idle while it lives.
struct Idle<'a>(&'a AtomicUsize);

impl<'a> Idle<'a> {
    fn of(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
