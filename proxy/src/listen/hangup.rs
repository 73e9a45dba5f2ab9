//! Notices a held client that leaves, also when its unread body is still in the socket.
//!
//! The runtime's own readiness cannot tell: with bytes unread a socket is always readable. So each worker has one
//! more epoll that is asked for EPOLLRDHUP alone (EPOLLHUP and EPOLLERR always come along). It costs no file per
//! connection and nothing is read.
//!
//! A client that only shuts down its sending side after a complete request looks the same, and is treated as gone
//! while it is held.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// Events taken from the kernel at once.
const EVENTS_MAX: usize = 256;

/// One worker's watch over the clients it holds.
#[derive(Debug)]
pub(crate) struct HangupWatch {
    epoll: AsyncFd<OwnedFd>,
    watched: RefCell<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    slots: Vec<Option<oneshot::Sender<()>>>,
    free: Vec<usize>,
}

impl HangupWatch {
    /// Must be called inside the worker's runtime.
    pub(crate) fn new() -> io::Result<Rc<Self>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let epoll = super::watch(epoll)?;
        Ok(Rc::new(Self {
            epoll,
            watched: RefCell::default(),
        }))
    }

    /// Completes when the peer of this socket has closed its end or is gone.
    ///
    /// # Cancel safety
    /// Dropping the future ends the watch.
    pub(crate) async fn left(&self, socket: impl AsFd) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        let token = self.watched.borrow_mut().insert(sender);
        let watching = Watching {
            watch: self,
            socket: socket.as_fd(),
            token,
        };
        let data = EventData::new_u64(token as u64);
        epoll::add(
            &self.epoll,
            watching.socket,
            data,
            EventFlags::RDHUP | EventFlags::ONESHOT,
        )?;
        // The sender is dropped only by the watch itself, with the worker.
        drop(receiver.await);
        Ok(())
    }

    /// Passes the kernel's events on, for as long as the worker lives.
    pub(crate) async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS_MAX);
        loop {
            let mut ready = self.epoll.readable().await?;
            events.clear();
            let no_wait = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&no_wait),
            )?;
            if events.is_empty() {
                ready.clear_ready();
            }
            for event in &events {
                let token = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
                self.watched.borrow_mut().fire(token);
            }
        }
    }
}

impl Watched {
    fn insert(&mut self, sender: oneshot::Sender<()>) -> usize {
        match self.free.pop() {
            Some(token) => {
                self.slots[token] = Some(sender);
                token
            }
            None => {
                self.slots.push(Some(sender));
                self.slots.len() - 1
            }
        }
    }

    fn fire(&mut self, token: usize) {
        if let Some(sender) = self.slots.get_mut(token).and_then(Option::take) {
            // The watcher may have been dropped in this very moment.
            sender.send(()).ok();
        }
    }
}

/// Ends a watch when dropped; only then may its token be used again.
struct Watching<'w> {
    watch: &'w HangupWatch,
    socket: BorrowedFd<'w>,
    token: usize,
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        // It may never have been added.
        epoll::delete(&self.watch.epoll, self.socket).ok();
        let mut watched = self.watch.watched.borrow_mut();
        watched.slots[self.token] = None;
        watched.free.push(self.token);
    }
}
