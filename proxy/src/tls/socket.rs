//! The socket below a TLS session: TCP or unix, non-blocking, known to the runtime.
//!
//! Reads and writes tell the runtime when they came short: a stream socket that gave or took less than was asked is
//! drained or full, and the call that would only say so is saved.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll};

use rustix::net::{RecvFlags, Shutdown};
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

/// A connected stream socket.
#[derive(Debug)]
pub(crate) enum Socket {
    /// Over the network.
    Tcp(TcpStream),
    /// To a process of this machine.
    Unix(UnixStream),
}

impl Socket {
    /// Reads what is there. A short read marks the socket as drained, so that the next attempt costs no call.
    pub(crate) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut count = 0;
        let attempt = self.try_io(Interest::READABLE, || {
            count = rustix::net::recv(self, &mut *into, RecvFlags::DONTWAIT)?.0;
            // A unix socket may also stop short between two messages with credentials.
            let drained = matches!(self, Self::Tcp(_)) && (1..into.len()).contains(&count);
            if drained {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        });
        match attempt {
            Err(_) if count > 0 => Ok(count),
            Err(error) => Err(error),
            Ok(()) => Ok(count),
        }
    }

    /// Reads what is there at this moment, whether or not the runtime has heard of it.
    pub(crate) fn read_now(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self, into, RecvFlags::DONTWAIT)?.0)
    }

    /// Whether there are bytes to read at this moment.
    pub(crate) fn has_unread(&self) -> bool {
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(rustix::net::recv(self, &mut [0; 1][..], peek), Ok((1.., _)))
    }

    /// Writes as much as the kernel takes in one call. A short write marks the socket as full.
    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let whole: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut count = 0;
        let attempt = self.try_io(Interest::WRITABLE, || {
            count = match slices {
                [one] => rustix::io::write(self, one)?,
                many => rustix::io::writev(self, many)?,
            };
            if (1..whole).contains(&count) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        });
        match attempt {
            Err(_) if count > 0 => Ok(count),
            Err(error) => Err(error),
            Ok(()) => Ok(count),
        }
    }

    fn try_io(
        &self,
        interest: Interest,
        operation: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.try_io(interest, operation),
            Self::Unix(stream) => stream.try_io(interest, operation),
        }
    }

    /// Waits until the socket is ready in one of the directions.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        match self {
            Self::Tcp(stream) => stream.ready(interest).await,
            Self::Unix(stream) => stream.ready(interest).await,
        }
    }

    /// The same for code that polls.
    pub(crate) fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(context),
            Self::Unix(stream) => stream.poll_read_ready(context),
        }
    }

    /// The same for the other direction.
    pub(crate) fn poll_write_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_write_ready(context),
            Self::Unix(stream) => stream.poll_write_ready(context),
        }
    }

    /// Tells the peer's kernel that nothing more will come.
    pub(crate) fn shut_write(&self) {
        // A peer that is gone already needs no telling.
        rustix::net::shutdown(self, Shutdown::Write).ok();
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}
