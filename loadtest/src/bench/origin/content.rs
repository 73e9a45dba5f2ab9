//! Bytes without end to send as bodies.
//!
//! They are copied into the socket from a piece small enough to stay in the processor's cache. That costs less than
//! sendfile(2) of a memory file, whose pages of 4 KiB each become a piece of their own for everybody on the way.

use std::io;
use std::os::fd::AsFd;

use rustix::net::{SendFlags, send};

/// Size of the piece that is sent over and over, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// The bytes.
#[derive(Debug)]
pub struct Content {
    bytes: Vec<u8>,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            bytes: vec![b'x'; PIECE_BYTES],
        }
    }
}

impl Content {
    /// Sends what the kernel takes of the next `left` bytes, at least one.
    ///
    /// # Errors
    /// As send(2); `WouldBlock` when the socket takes nothing now.
    pub fn send(&self, socket: impl AsFd, left: u64) -> io::Result<usize> {
        let count = usize::try_from(left).unwrap_or(usize::MAX);
        let count = count.min(self.bytes.len());
        Ok(send(socket, &self.bytes[..count], SendFlags::empty())?)
    }
}
