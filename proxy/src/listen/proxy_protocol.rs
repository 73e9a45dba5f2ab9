//! The PROXY protocol, versions 1 and 2: who a connection really came from, told by the balancer in front of us,
//! and told by us to an upstream.
//!
//! A header is believed only from the senders a listener names, and from those it must come. It is looked at in the
//! kernel's buffer and taken off it whole, so that not one byte behind it is read here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ppp::v2::{Builder, Command, Protocol, Version};
use ppp::{HeaderResult, v1, v2};

use super::client::Client;
use crate::config::ProxyVersion;
use crate::stream::{Look, Socket};

/// Longest header we read. Version 2 may carry details we do not use, and 536 bytes are what every sender may count
/// on (proxy-protocol.txt, section 2.2).
const HEADER_BYTES_MAX: usize = 536;
/// Longest line of version 1, CR and LF included (section 2.1).
const V1_BYTES_MAX: usize = 107;

/// What a header says of the client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// This is its address.
    Address(SocketAddr),
    /// Nothing: the sender speaks for itself, as health checks do, or does not know.
    Nothing,
}

/// Reads the header and returns the client it speaks of.
///
/// # Errors
/// `InvalidData` for anything that is not a header; otherwise what the socket says.
///
/// # Cancel safety
/// The connection must be closed after a drop.
pub(crate) async fn read(socket: &Socket, sender: Client) -> io::Result<Client> {
    let mut room = [0; HEADER_BYTES_MAX];
    let (told, count) = socket.look(&mut room, parse).await??;
    let mut left = count;
    while left > 0 {
        // Looked at before, so it is there.
        left -= socket.read_now(&mut room[..left])?.max(1).min(left);
    }
    Ok(match told {
        Told::Address(address) => Client::new(address),
        Told::Nothing => sender,
    })
}

/// What the bytes so far say, and how many of them are the header.
pub(crate) fn parse(bytes: &[u8]) -> Look<io::Result<(Told, usize)>> {
    let told = match header_bytes(bytes) {
        Look::Further => return Look::Further,
        Look::Seen(None) => None,
        Look::Seen(Some(count)) => told(&bytes[..count]).map(|told| (told, count)),
    };
    Look::Seen(told.ok_or_else(|| io::ErrorKind::InvalidData.into()))
}

/// Where the header ends; `None` where it cannot be one.
fn header_bytes(bytes: &[u8]) -> Look<Option<usize>> {
    const SIGNATURE: &[u8] = v2::PROTOCOL_PREFIX;
    const WORD: &[u8] = b"PROXY ";
    let begins_like = |known: &[u8]| bytes.starts_with(known) || known.starts_with(bytes);
    if begins_like(SIGNATURE) {
        let Some(count) = bytes.get(14..16) else {
            return Look::Further;
        };
        let count = 16 + usize::from(count[0]) * 256 + usize::from(count[1]);
        match count {
            ..=HEADER_BYTES_MAX if bytes.len() < count => Look::Further,
            ..=HEADER_BYTES_MAX => Look::Seen(Some(count)),
            _ => Look::Seen(None),
        }
    } else if begins_like(WORD) {
        let line = &bytes[..bytes.len().min(V1_BYTES_MAX)];
        match memchr::memmem::find(line, b"\r\n") {
            Some(end) => Look::Seen(Some(end + 2)),
            None if bytes.len() < V1_BYTES_MAX => Look::Further,
            None => Look::Seen(None),
        }
    } else {
        Look::Seen(None)
    }
}

/// What a whole header says.
fn told(header: &[u8]) -> Option<Told> {
    match HeaderResult::parse(header) {
        HeaderResult::V1(Ok(header)) => Some(told_by_v1(&header)),
        HeaderResult::V2(Ok(header)) => Some(told_by_v2(&header)),
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => None,
    }
}

fn told_by_v1(header: &v1::Header<'_>) -> Told {
    match header.addresses {
        v1::Addresses::Unknown => Told::Nothing,
        v1::Addresses::Tcp4(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v1::Addresses::Tcp6(pair) => Told::Address((pair.source_address, pair.source_port).into()),
    }
}

fn told_by_v2(header: &v2::Header<'_>) -> Told {
    if header.command == Command::Local {
        return Told::Nothing;
    }
    match header.addresses {
        v2::Addresses::IPv4(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v2::Addresses::IPv6(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v2::Addresses::Unspecified | v2::Addresses::Unix(_) => Told::Nothing,
    }
}

/// The header that tells an upstream of a client. Both addresses are written in one family, as the protocol wants.
pub(crate) fn header(
    version: ProxyVersion,
    client: SocketAddr,
    server: Option<SocketAddr>,
) -> Vec<u8> {
    let (client, server) = same_family(client, server);
    match version {
        ProxyVersion::V1 => {
            let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
            let (from, to) = (client.ip(), server.ip());
            let (from_port, to_port) = (client.port(), server.port());
            format!("PROXY {family} {from} {to} {from_port} {to_port}\r\n").into_bytes()
        }
        ProxyVersion::V2 => {
            let addresses = v2::Addresses::from((client, server));
            let version = Version::Two | Command::Proxy;
            // Nothing of it is longer than the header may be.
            Builder::with_addresses(version, Protocol::Stream, addresses)
                .build()
                .unwrap_or_default()
        }
    }
}

fn same_family(client: SocketAddr, server: Option<SocketAddr>) -> (SocketAddr, SocketAddr) {
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let client = plain(client);
    let server = server.map_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), plain);
    if client.is_ipv4() == server.is_ipv4() {
        return (client, server);
    }
    let as_v6 = |address: SocketAddr| match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    (as_v6(client), as_v6(server))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(bytes: &[u8]) -> Option<(Told, usize)> {
        match parse(bytes) {
            Look::Seen(told) => Some(told.expect("a header")),
            Look::Further => None,
        }
    }

    #[test]
    fn a_header_of_either_version_is_read_as_it_was_written_whatever_follows() {
        for (client, server) in [
            ("192.0.2.7:40000", "10.0.0.1:80"),
            ("[2001:db8::7]:40000", "[2001:db8::1]:443"),
        ] {
            let (client, server) = (client.parse().unwrap(), server.parse().unwrap());
            for version in [ProxyVersion::V1, ProxyVersion::V2] {
                let mut bytes = header(version, client, Some(server));
                let count = bytes.len();
                for cut in 0..count {
                    assert_eq!(seen(&bytes[..cut]), None, "{version:?} cut at {cut}");
                }
                bytes.extend_from_slice(b"GET / HTTP/1.1\r\n");
                assert_eq!(seen(&bytes), Some((Told::Address(client), count)));
            }
        }
    }

    #[test]
    fn two_families_become_one() {
        let told = header(
            ProxyVersion::V1,
            "192.0.2.7:1".parse().unwrap(),
            Some("[2001:db8::1]:2".parse().unwrap()),
        );
        assert_eq!(told, b"PROXY TCP6 ::ffff:192.0.2.7 2001:db8::1 1 2\r\n");
    }

    #[test]
    fn a_sender_may_speak_for_itself() {
        assert_eq!(seen(b"PROXY UNKNOWN\r\n"), Some((Told::Nothing, 15)));
        let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
        assert_eq!(seen(local), Some((Told::Nothing, 16)));
    }

    #[test]
    fn what_is_no_header_is_refused_as_soon_as_that_is_clear() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n",
            b"PROXY TCP4 1.2.3.4\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0ctwelve bytes",
        ] {
            assert!(matches!(parse(bytes), Look::Seen(Err(_))), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_waited_for_past_the_longest_header(
            bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES_MAX..=HEADER_BYTES_MAX)
        ) {
            prop_assert!(matches!(parse(&bytes), Look::Seen(_)));
        }
    }
}
