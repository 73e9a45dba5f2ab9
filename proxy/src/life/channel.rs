//! The channel between two processes of one upgrade: whole messages in JSON, with open files beside them
//! (`SCM_RIGHTS`), over a pair of `SOCK_SEQPACKET` unix sockets.
//!
//! The order, old process on the left; nothing is changed for clients before `Serving`:
//!
//! ```text
//!                            ◄── handover    a line on the control socket; the channel's end comes with the answer
//!   Offer, Sockets …,        ──►             lock of the state folder, control socket, listening sockets,
//!   Succession …                             a way back for packets of QUIC connections that stay in the old process
//!                            ◄── Ready       everything is made; which sockets it does not want
//!   Yours                    ──►             from here the register is the new one's
//!                            ◄── Serving     clients are being accepted
//!   Farewell                 ──►             the supervisor knows; the old one finishes what it has and ends
//!                            ◄── Gate …      while the old one is there: what gates and registers are now
//! ```
//!
//! Either end may say `No` with a reason instead, up to `Serving`. A channel that closes means that the process at
//! its other end is gone.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use cutover_protocol::hold::Gate;
use cutover_protocol::id::{Register, ServiceName};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::listen::bound::{Keeper, Place};

/// Version of these messages.
pub(crate) const VERSION: u32 = 1;
/// Open files beside one message; the kernel's bound is 253.
pub(crate) const FILES_MAX: usize = 128;
/// Longest message, below what the kernel lets a unix socket send (net.core.wmem_default, 208 KiB).
const MESSAGE_BYTES_MAX: usize = 200 * 1024;

/// What the two processes say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Message {
    /// With the lock of the state folder and the control socket, in this order.
    Offer {
        version: u32,
        state_dir: PathBuf,
        /// Messages with sockets that follow.
        parts: usize,
    },
    /// With some sockets of one place.
    Sockets { place: Place, keeper: Keeper },
    /// With the way back to the old process for packets of its connections at one place.
    Succession {
        place: Place,
        /// The old process' mark in connection ids.
        generation: u16,
    },
    /// Nothing is missing.
    Ready {
        /// Places that the new configuration does not have.
        unused: Vec<Place>,
        /// Whose gates it will tell of: no other that holds is handed over.
        #[serde(default)]
        gates: Vec<ServiceName>,
    },
    /// Begin.
    Yours,
    /// Begun.
    Serving,
    /// The supervisor has been told.
    Farewell,
    /// One gate of the new process: the old one does the same with those it holds.
    Gate {
        service: ServiceName,
        gate: Gate,
        register: Register,
    },
    /// It comes to nothing.
    No { why: String },
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(end: OwnedFd) -> Self {
        Self(end)
    }
}

impl Channel {
    /// Both ends of a new one.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(ours), theirs))
    }

    /// In this thread's reactor.
    pub(crate) fn watch(self) -> io::Result<AsyncFd<Self>> {
        rustix::io::ioctl_fionbio(&self.0, true)?;
        let both = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: the descriptor of a Channel is an OwnedFd, which names the same open file until it is dropped.
        Ok(unsafe { AsyncFd::register_with_interest(self, both) }?)
    }

    /// Longest wait of a blocking end.
    pub(crate) fn set_limit(&self, limit: Duration) -> io::Result<()> {
        let socket = socket2::SockRef::from(&self.0);
        socket.set_read_timeout(Some(limit))?;
        socket.set_write_timeout(Some(limit))
    }

    pub(crate) fn send(&self, message: &Message, files: &[OwnedFd]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        send_with_files(&self.0, &bytes, files)?;
        Ok(())
    }

    /// The next message. `UnexpectedEof` when the other end is closed.
    pub(crate) fn receive(&self) -> io::Result<(Message, Vec<OwnedFd>)> {
        let mut room = vec![0; MESSAGE_BYTES_MAX];
        let (count, files) = receive_with_files(&self.0, &mut room)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(&room[..count])?, files))
    }
}

/// Sends bytes on a unix socket, and open files beside them. Returns how many bytes went.
pub(crate) fn send_with_files(
    socket: &impl AsFd,
    bytes: &[u8],
    files: &[OwnedFd],
) -> io::Result<usize> {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL;
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, flags)?;
    Ok(sent)
}

/// The reverse of [`send_with_files`].
pub(crate) fn receive_with_files(
    socket: &impl AsFd,
    room: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(room)], &mut beside, flags)?;
    let mut files = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(given) = message {
            files.extend(given);
        }
    }
    let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    if received.flags.intersects(cut) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((received.bytes, files))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_beside_a_message_is_the_same_open_file_at_the_other_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from(theirs);
        let (mut here, there) = UnixStream::pair().unwrap();
        ours.send(&Message::Yours, &[there.into()]).unwrap();
        let (message, mut files) = theirs.receive().unwrap();
        assert_eq!((message, files.len()), (Message::Yours, 1));
        let mut there = UnixStream::from(files.remove(0));
        here.write_all(b"x").unwrap();
        let mut byte = [0];
        there.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_closed_end_is_noticed() {
        let (ours, theirs) = Channel::pair().unwrap();
        drop(theirs);
        let error = ours.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
