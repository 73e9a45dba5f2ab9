//! Who is at the other end of a connection, as far as the proxy believes it.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;

use crate::config::DoorWhenFull;
use crate::forwarded::{AddressText, Passed};
use crate::tls;
use crate::tls::stream::Agreed;

/// How a client's requests reached us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// In clear.
    Http,
    /// Through TLS.
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
    /// What its listener does when the budget of the held is used.
    pub(crate) when_full: DoorWhenFull,
    /// The proxies it has passed on its way, as far as a balancer has told.
    pub(crate) passed: Passed,
    /// What its handshake told, if that is more than nothing.
    told: Option<Rc<Told>>,
    /// The address without its port, as it is forwarded.
    shown: AddressText,
}

/// What the handshake of a client told.
#[derive(Debug)]
struct Told {
    certificate_subject: Option<Box<str>>,
    alt_svc: Option<Rc<str>>,
}

impl Client {
    /// A client in clear.
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            scheme: Scheme::Http,
            when_full: DoorWhenFull::Stop,
            passed: Passed::default(),
            shown: AddressText::of(address.ip()),
            told: None,
        }
    }

    /// The client of a unix socket, which has no address.
    pub(crate) fn local() -> Self {
        Self::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// Notes what the handshake told, and where it may speak HTTP/3 instead, if it does not.
    pub(crate) fn came_through_tls(&mut self, agreed: &Agreed, alt_svc: Option<&Rc<str>>) {
        self.scheme = Scheme::Https;
        let certificate = agreed.certificate.as_ref();
        let subject = certificate.and_then(|der| tls::subject(der));
        if subject.is_some() || alt_svc.is_some() {
            self.told = Some(Rc::new(Told {
                certificate_subject: subject.map(Box::from),
                alt_svc: alt_svc.cloned(),
            }));
        }
    }

    /// Whom its certificate was issued to, where it had to show one.
    pub(crate) fn certificate_subject(&self) -> Option<&str> {
        self.told.as_ref()?.certificate_subject.as_deref()
    }

    /// Where it may speak HTTP/3 instead, if it does not.
    pub(crate) fn alt_svc(&self) -> Option<&Rc<str>> {
        self.told.as_ref()?.alt_svc.as_ref()
    }

    /// The address without its port; IPv4 inside IPv6 is shown as IPv4.
    pub(crate) fn shown_address(&self) -> &[u8] {
        self.shown.as_bytes()
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
