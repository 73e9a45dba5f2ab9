//! Just enough netlink: a request with attributes, its acknowledgement, and the messages of a dump. It knows the form
//! (linux/netlink.h), not the meaning; `network.rs` and `wireguard.rs` do. Nothing here waits for the network: the
//! kernel answers within the call.

use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x1 | 0x4;
/// `NLM_F_ROOT | NLM_F_MATCH`: all there are.
pub(super) const DUMP: u16 = 0x300;
/// `NLM_F_CREATE`.
pub(super) const CREATE: u16 = 0x400;
/// `NLM_F_EXCL`: only when there is none.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_REPLACE`.
pub(super) const REPLACE: u16 = 0x100;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its type.
const TYPE_MASK: u16 = 0x3fff;

const HEADER: usize = 16;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// The kernel never fills more of a datagram in a dump than this.
const RECEIVE_BYTES: usize = 64 << 10;

/// A message being built: its fixed part, then attributes.
#[derive(Debug)]
pub(super) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self {
            kind,
            flags,
            body: fixed.to_vec(),
        }
    }

    /// The same message of another kind: families of generic netlink are numbered at run time.
    pub(super) fn of_kind(self, kind: u16) -> Self {
        Self { kind, ..self }
    }

    /// Adds an attribute.
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        put(&mut self.body, kind, value);
        self
    }

    pub(super) fn put_u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Adds a text with its closing zero.
    pub(super) fn put_text(self, kind: u16, text: &str) -> Self {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.put(kind, &value)
    }

    pub(super) fn nest(self, kind: u16, inner: &Nest) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let bytes = HEADER + self.body.len();
        let mut message = Vec::with_capacity(bytes);
        // Ours are a few hundred bytes.
        message.extend_from_slice(&(bytes as u32).to_ne_bytes());
        message.extend_from_slice(&self.kind.to_ne_bytes());
        message.extend_from_slice(&(REQUEST | self.flags).to_ne_bytes());
        message.extend_from_slice(&sequence.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(&self.body);
        message
    }
}

/// Attributes inside an attribute.
#[derive(Debug, Default)]
pub(super) struct Nest(Vec<u8>);

impl Nest {
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        put(&mut self.0, kind, value);
        self
    }

    pub(super) fn nest(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }
}

fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let bytes = 4 + value.len();
    body.extend_from_slice(&(bytes as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The attributes in some bytes, as pairs of type and value; whatever is cut short ends the list.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of one attribute.
pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

pub(super) fn as_u32(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

pub(super) fn as_u64(value: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(value.get(..8)?.try_into().ok()?))
}

/// A socket to the kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one; `protocol` is `NETLINK_ROUTE` or `NETLINK_GENERIC`.
    pub(super) fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            )
        };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: just opened, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request and gives the bodies of all messages that answer it, until the acknowledgement.
    pub(super) fn ask(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let bytes = message.encode(self.sequence);
        // SAFETY: the pointer and the length are those of `bytes`.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(Error::last_os_error());
        }
        let mut answers = Vec::new();
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            // SAFETY: the pointer and the length are those of `buffer`.
            let read = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            let read = usize::try_from(read).map_err(|_| Error::last_os_error())?;
            if collect(&buffer[..read], self.sequence, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// Sends a request whose answer is only that it is done.
    pub(super) fn order(&mut self, message: &Message) -> io::Result<()> {
        self.ask(message).map(drop)
    }
}

/// Takes the messages of one datagram; true when the answer is complete.
fn collect(datagram: &[u8], sequence: u32, answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    let mut rest = datagram;
    while let (Some(length), Some(kind), Some(number)) = (
        rest.get(..4).and_then(as_u32),
        rest.get(4..6)
            .and_then(|two| two.try_into().ok().map(u16::from_ne_bytes)),
        rest.get(8..12).and_then(as_u32),
    ) {
        let length = length as usize;
        let Some(body) = rest.get(HEADER..length) else {
            return Err(Error::new(
                ErrorKind::InvalidData,
                "the kernel's answer is cut short",
            ));
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        if number != sequence {
            continue;
        }
        match kind {
            DONE => return Ok(true),
            ERROR => {
                let code = body.get(..4).and_then(as_u32).unwrap_or(0) as i32;
                return if code == 0 {
                    Ok(true)
                } else {
                    Err(Error::from_raw_os_error(-code))
                };
            }
            _ => answers.push(body.to_vec()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_again() {
        let inner = Nest::default().put(7, b"abc");
        let message = Message::new(16, 0, &[0; 4])
            .put_text(1, "wg0")
            .put_u32(4, 1420)
            .nest(18, &inner);
        let bytes = message.encode(1);
        let attributes = &bytes[HEADER + 4..];
        assert_eq!(attribute(attributes, 1), Some(&b"wg0\0"[..]));
        assert_eq!(attribute(attributes, 4).and_then(as_u32), Some(1420));
        assert_eq!(
            attribute(attributes, 18).and_then(|nest| attribute(nest, 7)),
            Some(&b"abc"[..])
        );
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_cut_list_ends_without_a_panic() {
        let bytes = Nest::default().put(1, b"12345").0;
        for end in 0..bytes.len() {
            let _ = attributes(&bytes[..end]).count();
        }
    }

    #[test]
    fn the_kernel_answers_a_dump() {
        let mut socket = Socket::open(libc::NETLINK_ROUTE).unwrap();
        let links = socket.ask(&Message::new(18, DUMP, &[0; 16])).unwrap();
        assert!(
            links
                .iter()
                .any(|link| attribute(&link[16..], 3) == Some(&b"lo\0"[..]))
        );
    }
}
