//! The held streams of one connection. They have no tasks of their own: the connection's task looks after them, and
//! makes a stream a task when its request is called or its client takes it back.
//!
//! Of a body nothing is asked for. What the client sends before it knows that it has to wait, a window at most, would
//! keep the buffers it was read into; it is copied out of them, and the client gets no credit for it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;

use super::{Shared, to_io, to_io_reason};
use crate::http::mux::Waited;
use crate::http::mux::active::Running;
use crate::http::mux::held::HeldRequest;
use crate::service::roll::{KeeperEntry, Keeps, View};

/// A stream that is held.
pub(super) struct HeldStream {
    pub(super) request: HeldRequest,
    pub(super) respond: SendResponse<Bytes>,
    pub(super) receive: RecvStream,
    /// What came of the body.
    pub(super) early: Vec<u8>,
    pub(super) running: Running,
}

/// Those of one connection, in the order of their arrival.
#[derive(Default)]
pub(super) struct HeldStreams {
    streams: Rc<Streams>,
    entry: Option<KeeperEntry>,
}

#[derive(Default)]
struct Streams(RefCell<VecDeque<Box<HeldStream>>>);

impl HeldStreams {
    /// One more.
    pub(super) fn add(&mut self, shared: &Shared, stream: HeldStream) {
        self.entry.get_or_insert_with(|| {
            let streams: Rc<dyn Keeps> = Rc::<Streams>::clone(&self.streams);
            shared.port.roll.enter_keeper(Rc::downgrade(&streams))
        });
        self.streams.0.borrow_mut().push_back(Box::new(stream));
    }

    /// The first that is held no longer. While nothing was read of the connection, `news` is false, and no stream was
    /// taken back.
    pub(super) fn poll_over(
        &self,
        news: bool,
        context: &mut Context<'_>,
    ) -> Poll<(Box<HeldStream>, Waited)> {
        let mut streams = self.streams.0.borrow_mut();
        for index in 0..streams.len() {
            if let Poll::Ready(waited) = streams[index].poll_over(news, context)
                && let Some(stream) = streams.remove(index)
            {
                return Poll::Ready((stream, waited));
            }
        }
        Poll::Pending
    }

    /// Any of them, when the connection has ended.
    pub(super) fn take(&self) -> Option<Box<HeldStream>> {
        self.streams.0.borrow_mut().pop_front()
    }
}

impl HeldStream {
    fn poll_over(&mut self, news: bool, context: &mut Context<'_>) -> Poll<Waited> {
        if let Poll::Ready(waited) = self.request.poll_called(context) {
            return Poll::Ready(waited);
        }
        if !news {
            return Poll::Pending;
        }
        // The end of a body, and its failure, are found again by whoever reads on.
        while let Poll::Ready(Some(Ok(data))) = self.receive.poll_data(context) {
            self.early.reserve_exact(data.len());
            self.early.extend_from_slice(&data);
            self.request.grew(data.len());
        }
        self.respond.poll_reset(context).map(|reset| {
            Waited::Left(match reset {
                Ok(reason) => to_io_reason(reason).into(),
                Err(error) => to_io(error),
            })
        })
    }
}

impl Keeps for Streams {
    fn show(&self, to: &mut dyn FnMut(View<'_>)) {
        for stream in self.0.borrow().iter() {
            to(stream.request.view());
        }
    }
}
