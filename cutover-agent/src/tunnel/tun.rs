//! A TUN device: packets that the kernel routes to it are read from a descriptor. It is gone when that is closed.

use std::fs::File;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, OwnedFd};

// linux/if_tun.h
const SET_INTERFACE: libc::c_ulong = 0x4004_54ca;
const IFF_TUN: i16 = 1;
const IFF_NO_PI: i16 = 0x1000;
/// A name and its closing zero.
const NAME_BYTES: usize = 16;

/// `struct ifreq`, with the one member of its union that is used here.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: i16,
    rest: [u8; 22],
}

/// Makes the device in this thread's network namespace; reads and writes of the descriptor never wait.
pub(super) fn open(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = Request {
        name: [0; NAME_BYTES],
        flags: IFF_TUN | IFF_NO_PI,
        rest: [0; 22],
    };
    let bytes = name.as_bytes();
    if bytes.len() >= NAME_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the kernel reads and writes one `ifreq` (40 bytes on 64 bit), which `Request` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), SET_INTERFACE, &raw mut request) } < 0 {
        return Err(Error::last_os_error());
    }
    let fd = OwnedFd::from(file);
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK)?;
    Ok(fd)
}
