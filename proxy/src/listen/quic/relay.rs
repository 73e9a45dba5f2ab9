//! Datagrams on their way from a process to the one before it, over a unix datagram socket.
//!
//! During an upgrade the new process reads the UDP sockets, and the old one goes on answering through its own
//! copies of them. What arrives for the old one's connections is passed on with everything the old one would have
//! learnt from the kernel: where it came from, the address it was sent to, its ECN mark. Like the network, this
//! way may lose datagrams: when the socket is full, it does.
//!
//! Layout: version (1), ECN mark, length of the client's address (4 or 16), that address, its port, length of our
//! own address (0, 4 or 16), that address, then the datagram.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use quinn::udp::EcnCodepoint;
use tokio::net::UnixDatagram;

use super::router::{Datagram, Router};

const VERSION: u8 = 1;
/// More than any UDP datagram and what goes with it.
const MESSAGE_BYTES_MAX: usize = 66 * 1024;

/// The sending end, in the new process.
#[derive(Debug)]
pub(crate) struct Outlet {
    socket: StdUnixDatagram,
    /// The old process has ended.
    broken: AtomicBool,
}

/// What became of a datagram that was to be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passed {
    /// On its way.
    On,
    /// Lost for want of room.
    Lost,
    /// Nobody is there any more.
    Nobody,
}

impl Outlet {
    /// Takes over the socket that the old process gave away.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = StdUnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            broken: AtomicBool::new(false),
        })
    }

    /// Passes one datagram on.
    pub(super) fn pass(&self, datagram: &Datagram) -> Passed {
        if self.broken.load(Ordering::Relaxed) {
            return Passed::Nobody;
        }
        match self.socket.send(&encode(datagram)) {
            Ok(_) => Passed::On,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Passed::Lost,
            Err(_) => {
                self.broken.store(true, Ordering::Relaxed);
                Passed::Nobody
            }
        }
    }
}

/// A connected pair: the inlet stays with the old process, the other end becomes the new one's [`Outlet`].
#[allow(
    dead_code,
    reason = "for the upgrade of the binary, which is on its way"
)]
pub(crate) fn pair() -> io::Result<(StdUnixDatagram, OwnedFd)> {
    let (inlet, outlet) = StdUnixDatagram::pair()?;
    inlet.set_nonblocking(true)?;
    Ok((inlet, outlet.into()))
}

/// Takes in what a successor passes on, until the successor is gone.
///
/// # Cancel safety
/// Yes; what was not taken in waits in the socket.
pub(crate) async fn receive(inlet: StdUnixDatagram, router: Arc<Router>) -> io::Result<()> {
    let inlet = UnixDatagram::from_std(inlet)?;
    let mut message = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let count = inlet.recv(&mut message).await?;
        if count == 0 {
            return Ok(());
        }
        if let Some(datagram) = decode(&message[..count]) {
            router.deliver(datagram);
        }
    }
}

fn encode(datagram: &Datagram) -> Vec<u8> {
    let mut message = Vec::with_capacity(datagram.contents.len() + 40);
    message.extend_from_slice(&[VERSION, datagram.ecn.map_or(0, |ecn| ecn as u8)]);
    encode_address(&mut message, Some(datagram.from.ip()));
    message.extend_from_slice(&datagram.from.port().to_be_bytes());
    encode_address(&mut message, datagram.to);
    message.extend_from_slice(&datagram.contents);
    message
}

fn encode_address(message: &mut Vec<u8>, address: Option<IpAddr>) {
    match address {
        None => message.push(0),
        Some(IpAddr::V4(address)) => {
            message.push(4);
            message.extend_from_slice(&address.octets());
        }
        Some(IpAddr::V6(address)) => {
            message.push(16);
            message.extend_from_slice(&address.octets());
        }
    }
}

fn decode(message: &[u8]) -> Option<Datagram> {
    let (&[version, ecn], rest) = message.split_first_chunk()?;
    if version != VERSION {
        return None;
    }
    let (from, rest) = decode_address(rest)?;
    let (&port, rest) = rest.split_first_chunk()?;
    let (to, contents) = decode_address(rest)?;
    Some(Datagram {
        from: SocketAddr::new(from?, u16::from_be_bytes(port)),
        to,
        ecn: EcnCodepoint::from_bits(ecn),
        contents: Bytes::copy_from_slice(contents),
    })
}

/// An address, or none, and what stands behind it.
fn decode_address(message: &[u8]) -> Option<(Option<IpAddr>, &[u8])> {
    let (length, rest) = message.split_first()?;
    match length {
        0 => Some((None, rest)),
        4 => {
            let (octets, rest) = rest.split_first_chunk::<4>()?;
            Some((Some(IpAddr::from(*octets)), rest))
        }
        16 => {
            let (octets, rest) = rest.split_first_chunk::<16>()?;
            Some((Some(IpAddr::from(*octets)), rest))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_datagram_arrives_with_everything_the_kernel_knew_of_it() {
        for (from, to, ecn) in [
            ("192.0.2.1:4433", None, None),
            (
                "[2001:db8::1]:1",
                Some("2001:db8::2"),
                Some(EcnCodepoint::Ce),
            ),
            ("10.0.0.1:65535", Some("10.0.0.2"), Some(EcnCodepoint::Ect0)),
        ] {
            let datagram = Datagram {
                from: from.parse().unwrap(),
                to: to.map(|to| to.parse().unwrap()),
                ecn,
                contents: Bytes::from_static(b"contents"),
            };
            assert_eq!(decode(&encode(&datagram)), Some(datagram));
        }
    }

    proptest! {
        #[test]
        fn no_message_is_too_strange_to_be_read(message: Vec<u8>) {
            decode(&message);
        }
    }
}
