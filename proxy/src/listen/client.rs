//! Who is at the other end of a connection, as far as the proxy believes it.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// How a client's requests reached us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// In clear.
    Http,
    /// Through TLS.
    #[expect(dead_code, reason = "TLS listeners are on their way")]
    Https,
}

impl Scheme {
    pub(crate) const fn name(self) -> &'static [u8] {
        match self {
            Self::Http => b"http",
            Self::Https => b"https",
        }
    }
}

/// The client of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// Its address; loopback with port zero where it came by a unix socket.
    pub(crate) address: SocketAddr,
    pub(crate) scheme: Scheme,
    /// The address without its port, as it is forwarded.
    shown: Shown,
}

/// The longest is an IPv6 address with an embedded IPv4 address: 45 bytes.
#[derive(Debug, Clone, Copy)]
struct Shown {
    bytes: [u8; 45],
    count: u8,
}

impl Client {
    /// A client in clear.
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            scheme: Scheme::Http,
            shown: Shown::of(address.ip()),
        }
    }

    /// The client of a unix socket, which has no address.
    pub(crate) fn local() -> Self {
        Self::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// The address without its port; IPv4 inside IPv6 is shown as IPv4.
    pub(crate) fn shown_address(&self) -> &[u8] {
        &self.shown.bytes[..usize::from(self.shown.count)]
    }
}

impl Shown {
    fn of(address: IpAddr) -> Self {
        let mut shown = Self {
            bytes: [0; 45],
            count: 0,
        };
        // The longest address fits.
        let _ = write!(shown, "{}", address.to_canonical());
        shown
    }
}

impl Write for Shown {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let start = usize::from(self.count);
        let room = self.bytes.get_mut(start..start + text.len());
        room.ok_or(std::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.count += u8::try_from(text.len()).unwrap_or(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_address_is_shown_whole() {
        for (address, shown) in [
            ("[::ffff:192.0.2.7]:1", "192.0.2.7"),
            (
                "[2001:db8:1111:2222:3333:4444:5555:6666]:65535",
                "2001:db8:1111:2222:3333:4444:5555:6666",
            ),
            ("127.0.0.1:80", "127.0.0.1"),
        ] {
            let client = Client::new(address.parse().unwrap());
            assert_eq!(client.shown_address(), shown.as_bytes());
        }
    }
}
