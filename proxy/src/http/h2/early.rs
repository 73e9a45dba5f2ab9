//! A stream of which some bytes were read before it was known what they are, and whose frames are overheard on their
//! way out.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::overheard::Overheard;
use super::sips::{SIP_BYTES, Sips, Thirst};
use crate::buffer::Buffer;
use crate::stream::Stream;

/// First what was read early, then the stream.
pub(super) struct Early {
    stream: Stream,
    early: Buffer,
    overheard: Overheard,
    sips: Sips,
}

impl Early {
    pub(super) const fn new(
        stream: Stream,
        early: Buffer,
        overheard: Overheard,
        sips: Sips,
    ) -> Self {
        Self {
            stream,
            early,
            overheard,
            sips,
        }
    }

    fn poll_sip(
        &mut self,
        context: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = room.remaining().min(SIP_BYTES);
        let mut sip = ReadBuf::new(room.initialize_unfilled_to(most));
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut sip))?;
        let count = sip.filled().len();
        room.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Early {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            match self.sips.thirst() {
                Thirst::Endless => ready!(Pin::new(&mut self.stream).poll_read(context, room))?,
                Thirst::Sip => ready!(self.poll_sip(context, room))?,
                Thirst::Quenched => return Poll::Pending,
            }
            self.sips.read();
            return Poll::Ready(Ok(()));
        }
        let count = self.early.filled().len().min(room.remaining());
        room.put_slice(&self.early.filled()[..count]);
        self.early.consume(count);
        if self.early.is_empty() {
            // Not needed again.
            self.early = Buffer::default();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Early {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.overheard.sent(&bytes[..count.min(bytes.len())]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices))?;
        let mut left = count;
        for slice in slices {
            let sent = left.min(slice.len());
            self.overheard.sent(&slice[..sent]);
            left -= sent;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
