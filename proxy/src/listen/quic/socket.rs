//! One worker's UDP sockets as its endpoint sees it: only with datagrams that are the worker's own.
//!
//! One socket, as a rule; more where a process has fewer workers than the one it succeeds, for nobody may wait in a
//! queue that no one looks at. Sits between quinn's socket (which does batches, segmentation offload, ECN and path MTU) and quinn's endpoint.
//! Everything read is looked at once; what belongs elsewhere goes to the [`Router`], and what others have handed
//! over comes in from the worker's inbox. Never waits for anybody, never changes what it sends.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use super::router::{Datagram, Handed, Inbox, Router, Way};

/// One worker's sockets, which all have the same address.
#[derive(Debug)]
pub(crate) struct Demultiplexer {
    /// The first one sends.
    first: Arc<dyn AsyncUdpSocket>,
    others: Vec<Arc<dyn AsyncUdpSocket>>,
    worker: usize,
    router: Arc<Router>,
    /// Only the endpoint's driver reads it; the lock is never contended.
    inbox: Mutex<Inbox>,
    /// Socket and inbox take turns at being asked first, so that neither can starve the other.
    inbox_first: AtomicBool,
}

impl Demultiplexer {
    /// # Errors
    /// There is not one socket.
    pub(crate) fn new(
        sockets: Vec<Arc<dyn AsyncUdpSocket>>,
        worker: usize,
        router: Arc<Router>,
        inbox: Inbox,
    ) -> io::Result<Self> {
        let mut sockets = sockets.into_iter();
        Ok(Self {
            first: sockets.next().ok_or(io::ErrorKind::NotFound)?,
            others: sockets.collect(),
            worker,
            router,
            inbox: Mutex::new(inbox),
            inbox_first: AtomicBool::new(false),
        })
    }

    fn poll_inbox(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<usize> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        while let (Some(buffer), Some(meta)) = (buffers.get_mut(count), metas.get_mut(count)) {
            match inbox.poll_recv(context) {
                Poll::Ready(Some(Handed::Datagram(datagram))) => {
                    let contents = &datagram.contents;
                    let Some(room) = buffer.get_mut(..contents.len()) else {
                        continue;
                    };
                    room.copy_from_slice(contents);
                    *meta = RecvMeta {
                        addr: datagram.from,
                        len: contents.len(),
                        stride: contents.len(),
                        ecn: datagram.ecn,
                        dst_ip: datagram.to,
                    };
                    count += 1;
                }
                Poll::Ready(Some(Handed::Wake)) => {}
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        if count > 0 {
            Poll::Ready(count)
        } else {
            Poll::Pending
        }
    }

    fn poll_socket(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if self.router.is_succeeded() {
            // The successor reads now. Should it come to nothing, the inbox wakes us.
            return Poll::Pending;
        }
        for socket in self.others.iter().chain([&self.first]) {
            let read = socket.poll_recv(context, buffers, metas);
            if let Poll::Ready(Ok(count)) = read {
                for (buffer, meta) in buffers.iter_mut().zip(metas.iter_mut()).take(count) {
                    self.sort(buffer, meta);
                }
            }
            if read.is_ready() {
                return read;
            }
        }
        Poll::Pending
    }

    /// Leaves in the buffer what is ours. A buffer may hold several datagrams of one sender, all of one length but
    /// the last (generic receive offload); it may end up empty, which the endpoint skips.
    fn sort(&self, buffer: &mut [u8], meta: &mut RecvMeta) {
        let stride = meta.stride.max(1);
        let filled = &mut buffer[..meta.len];
        let is_foreign = |packet: &[u8]| self.router.is_foreign(packet, self.worker);
        if !filled.chunks(stride).any(is_foreign) {
            return;
        }
        let mut kept = 0;
        let mut at = 0;
        while at < meta.len {
            let end = (at + stride).min(meta.len);
            let stays = !self.router.is_foreign(&filled[at..end], self.worker)
                || self.router.hand(Datagram {
                    from: meta.addr,
                    to: meta.dst_ip,
                    ecn: meta.ecn,
                    contents: Bytes::copy_from_slice(&filled[at..end]),
                }) == Way::Here;
            if stays {
                filled.copy_within(at..end, kept);
                kept += end - at;
            }
            at = end;
        }
        meta.len = kept;
    }
}

impl AsyncUdpSocket for Demultiplexer {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.first).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.first.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let inbox_first = self.inbox_first.fetch_xor(true, Ordering::Relaxed);
        if inbox_first {
            if let Poll::Ready(count) = self.poll_inbox(context, buffers, metas) {
                return Poll::Ready(Ok(count));
            }
            return self.poll_socket(context, buffers, metas);
        }
        match self.poll_socket(context, buffers, metas) {
            Poll::Pending => self.poll_inbox(context, buffers, metas).map(Ok),
            ready => ready,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.first.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.first.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.first.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.first.may_fragment()
    }
}
