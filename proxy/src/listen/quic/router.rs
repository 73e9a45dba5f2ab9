//! Who gets a datagram: one of the workers of this process, or the process before it.
//!
//! The kernel picks a worker's socket by the hash of both addresses. A client whose address changes (a NAT that
//! rebinds, a phone that leaves the house) is hashed anew and lands on any worker; its connection id still names
//! the one that knows it. Datagrams that landed elsewhere are handed over through bounded queues, one a worker.
//!
//! Why not a classic or extended BPF program on the group of sockets: it could pick the worker in the kernel, but
//! not another process that holds the very same sockets, which is what an upgrade needs; it depends on the order of
//! the sockets in their group, which changes when one closes; and the packets it would save us from handing over
//! are rare. One mechanism for both is simpler than two.
//!
//! A queue that is full loses datagrams, as the network does. Nothing here ever waits.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use quinn::udp::EcnCodepoint;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::connection_id::{Addressee, Generation, PlaceCodec};
use super::relay::{self, Outlet, Passed};

/// Datagrams that may wait for a worker: about a megabyte and a half.
const INBOX_DATAGRAMS_MAX: usize = 1024;

/// One datagram and what the kernel said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    /// Which of our addresses it was sent to.
    pub(crate) to: Option<IpAddr>,
    pub(crate) ecn: Option<EcnCodepoint>,
    pub(crate) contents: Bytes,
}

/// What is handed to a worker.
#[derive(Debug)]
pub(crate) enum Handed {
    /// A datagram of one of its connections.
    Datagram(Datagram),
    /// Look again whether the socket is to be read.
    #[allow(
        dead_code,
        reason = "for the upgrade of the binary, which is on its way"
    )]
    Wake,
}

/// A worker's end of its queue.
pub(crate) type Inbox = mpsc::Receiver<Handed>;

/// The queues of one listener's workers, and the way to the process before.
#[derive(Debug)]
pub(crate) struct Router {
    codec: Arc<PlaceCodec>,
    generation: Generation,
    workers: Vec<mpsc::Sender<Handed>>,
    predecessor: Option<Outlet>,
    /// Set while a successor reads the sockets that both of us hold.
    succeeded: AtomicBool,
    #[allow(
        dead_code,
        reason = "for the upgrade of the binary, which is on its way"
    )]
    inlets: mpsc::Sender<UnixDatagram>,
    pub(crate) counts: Counts,
}

/// What happened at one listener.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Connections now.
    pub(crate) connections: AtomicU64,
    /// Handshakes that did not end in a connection.
    pub(crate) handshakes_failed: AtomicU64,
    /// Clients that were asked to prove their address first.
    pub(crate) retried: AtomicU64,
    /// Connections refused for want of room, or because we stop.
    pub(crate) refused: AtomicU64,
    /// Datagrams handed to the worker they belong to.
    pub(crate) handed: AtomicU64,
    /// Datagrams passed on to the process before.
    pub(crate) passed: AtomicU64,
    /// Datagrams lost because somebody could not follow, or because they belong to nobody.
    pub(crate) lost: AtomicU64,
}

/// What becomes of a datagram that one worker has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It is that worker's own, or a new client's.
    Here,
    /// Somebody else has it now, or nobody.
    Gone,
}

/// Everything a successor needs of one listener, besides its sockets.
#[derive(Debug)]
pub(crate) struct Succession {
    /// The generation of the process that hands over.
    pub(crate) generation: Generation,
    /// Where it takes in the datagrams of its connections.
    pub(crate) outlet: OwnedFd,
}

/// A router, and what the workers need of it.
#[derive(Debug)]
pub(crate) struct Routed {
    pub(crate) router: Arc<Router>,
    pub(crate) inboxes: Vec<Inbox>,
    /// For one of the workers: sockets on which a successor passes on what is ours.
    pub(crate) inlets: mpsc::Receiver<UnixDatagram>,
}

impl Router {
    /// For so many workers; `predecessor` is what the process before us has handed over, if there is one.
    pub(crate) fn open(
        codec: Arc<PlaceCodec>,
        generation: Generation,
        workers: usize,
        predecessor: Option<Outlet>,
    ) -> Routed {
        let queues = (0..workers).map(|_| mpsc::channel(INBOX_DATAGRAMS_MAX));
        let (workers, inboxes) = queues.unzip();
        let (inlets, inlets_taken) = mpsc::channel(1);
        let router = Self {
            codec,
            generation,
            workers,
            predecessor,
            succeeded: AtomicBool::new(false),
            inlets,
            counts: Counts::default(),
        };
        Routed {
            router: Arc::new(router),
            inboxes,
            inlets: inlets_taken,
        }
    }

    /// This process's generation.
    pub(crate) const fn generation(&self) -> Generation {
        self.generation
    }

    /// Gives a successor the way back to us. We go on reading the sockets until [`Router::let_go`].
    ///
    /// # Errors
    /// No socket is to be had, or a successor is already there. Nothing has changed then.
    pub(crate) fn hand_over(&self) -> std::io::Result<Succession> {
        let (inlet, outlet) = relay::pair()?;
        self.inlets
            .try_send(inlet)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::AlreadyExists))?;
        Ok(Succession {
            generation: self.generation,
            outlet,
        })
    }

    /// Stops reading the sockets, so that a successor can. What arrives between the two waits in the kernel.
    pub(crate) fn let_go(&self) {
        self.succeeded.store(true, Ordering::Release);
    }

    /// Reads the sockets again, after a successor that came to nothing.
    pub(crate) fn take_back(&self) {
        self.succeeded.store(false, Ordering::Release);
        for worker in &self.workers {
            // A full queue wakes its worker just as well.
            worker.try_send(Handed::Wake).ok();
        }
    }

    /// Whether a successor reads the sockets.
    pub(super) fn is_succeeded(&self) -> bool {
        self.succeeded.load(Ordering::Acquire)
    }

    /// Whether this packet is for somebody else than this worker.
    pub(super) fn is_foreign(&self, packet: &[u8], worker: usize) -> bool {
        match self.codec.addressee(packet) {
            Addressee::Anyone => false,
            Addressee::Nobody => true,
            Addressee::Place(place) if place.generation == self.generation => {
                usize::from(place.worker) != worker
            }
            Addressee::Place(_) => self.predecessor.is_some(),
        }
    }

    /// Hands a datagram to whom it belongs; [`Way::Here`] says that it is for whoever asks.
    pub(super) fn hand(&self, datagram: Datagram) -> Way {
        match self.codec.addressee(&datagram.contents) {
            Addressee::Anyone => Way::Here,
            Addressee::Nobody => {
                self.counts.lost.fetch_add(1, Ordering::Relaxed);
                Way::Gone
            }
            Addressee::Place(place) if place.generation == self.generation => {
                self.hand_to(usize::from(place.worker), datagram)
            }
            Addressee::Place(_) => self.pass_on(datagram),
        }
    }

    /// Takes in a datagram that a successor has passed on.
    pub(super) fn deliver(&self, datagram: Datagram) {
        if self.hand(datagram.clone()) == Way::Here {
            // An old connection of nobody: the first worker answers with a stateless reset.
            self.hand_to(0, datagram);
        }
    }

    fn hand_to(&self, worker: usize, datagram: Datagram) -> Way {
        let Some(inbox) = self.workers.get(worker) else {
            return Way::Here;
        };
        let counter = match inbox.try_send(Handed::Datagram(datagram)) {
            Ok(()) => &self.counts.handed,
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => &self.counts.lost,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Way::Gone
    }

    fn pass_on(&self, datagram: Datagram) -> Way {
        let passed = self
            .predecessor
            .as_ref()
            .map(|outlet| outlet.pass(&datagram));
        let counter = match passed {
            Some(Passed::On) => &self.counts.passed,
            Some(Passed::Lost) => &self.counts.lost,
            // Nobody will answer for it; we do, with a stateless reset.
            Some(Passed::Nobody) | None => return Way::Here,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Way::Gone
    }
}
