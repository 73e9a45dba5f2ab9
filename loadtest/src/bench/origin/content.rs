//! Bytes without end to send as bodies, kept in memory that sockets take without a copy.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create, sendfile};
use rustix::io::Errno;

/// Size of the piece that is sent over and over, in bytes: small enough to stay in a processor's cache.
const PIECE_BYTES: u64 = 1 << 20;

/// The bytes.
#[derive(Debug)]
pub struct Content {
    file: File,
}

impl Content {
    /// Makes them.
    ///
    /// # Errors
    /// When the kernel gives no memory file.
    pub fn new() -> Result<Self, Errno> {
        let file = memfd_create("content", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, PIECE_BYTES)?;
        Ok(Self { file: file.into() })
    }

    /// Sends what the kernel takes of the next `left` bytes, at least one.
    ///
    /// # Errors
    /// As sendfile(2); `WouldBlock` when the socket takes nothing now.
    pub fn send(&self, socket: impl AsFd, left: u64) -> io::Result<usize> {
        let mut offset = 0;
        let count = usize::try_from(left.min(PIECE_BYTES)).unwrap_or(usize::MAX);
        Ok(sendfile(socket, &self.file, Some(&mut offset), count)?)
    }
}
