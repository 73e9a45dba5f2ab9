//! The PROXY protocol, versions 1 and 2: who a connection really came from, told by the balancer in front of us,
//! and told by us to an upstream.
//!
//! A header is believed only from the senders a listener names, and from those it must come. It is looked at in the
//! kernel's buffer and taken off it whole, so that not one byte behind it is read here. Of what version 2 may add to the
//! addresses only the list of proxies that the connection has passed is read, and passed on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ppp::v2::{Builder, Command, Protocol, Version};
use ppp::{HeaderResult, v1, v2};

use super::client::Client;
use crate::config::ProxyVersion;
use crate::forwarded::{PASSED_TLV, Passed};
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

/// What a whole header says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) told: Told,
    /// The proxies that the connection has passed, as far as they have said so.
    pub(crate) passed: Passed,
    /// Bytes of the header itself.
    pub(crate) bytes: usize,
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
    let header = socket.look(&mut room, parse).await??;
    let mut left = header.bytes;
    while left > 0 {
        // Looked at before, so it is there.
        left -= socket.read_now(&mut room[..left])?.max(1).min(left);
    }
    let mut client = match header.told {
        Told::Address(address) => Client::new(address),
        Told::Nothing => sender,
    };
    client.passed = header.passed;
    Ok(client)
}

/// What the bytes so far say.
pub(crate) fn parse(bytes: &[u8]) -> Look<io::Result<Header>> {
    let said = match header_bytes(bytes) {
        Look::Further => return Look::Further,
        Look::Seen(None) => Err("this is no header"),
        Look::Seen(Some(count)) => said(&bytes[..count]),
    };
    Look::Seen(said.map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why)))
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

/// What a whole header says, or what is wrong with it.
fn said(header: &[u8]) -> Result<Header, &'static str> {
    let bytes = header.len();
    let (told, passed) = match HeaderResult::parse(header) {
        HeaderResult::V1(Ok(header)) => (told_by_v1(&header), Passed::default()),
        // Whoever speaks for itself has passed nobody, and what else it says is to be skipped (section 2.2).
        HeaderResult::V2(Ok(header)) if header.command == Command::Local => {
            (Told::Nothing, Passed::default())
        }
        HeaderResult::V2(Ok(header)) => (told_by_v2(&header), passed(&header)?),
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => return Err("this is no header"),
    };
    Ok(Header {
        told,
        passed,
        bytes,
    })
}

/// The list in one of the header's TLVs, all of which must be whole.
fn passed(header: &v2::Header<'_>) -> Result<Passed, &'static str> {
    let mut found = None;
    for tlv in header.tlvs() {
        let tlv = tlv.map_err(|_| "what follows its addresses is cut off")?;
        if tlv.kind != PASSED_TLV {
            continue;
        }
        let read = Passed::read(&tlv.value);
        let read = read.map_err(|_| "its list of proxies passed is malformed or too long")?;
        if read.is_some() && std::mem::replace(&mut found, read).is_some() {
            return Err("it has two lists of proxies passed");
        }
    }
    Ok(found.unwrap_or_default())
}

fn told_by_v1(header: &v1::Header<'_>) -> Told {
    match header.addresses {
        v1::Addresses::Unknown => Told::Nothing,
        v1::Addresses::Tcp4(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v1::Addresses::Tcp6(pair) => Told::Address((pair.source_address, pair.source_port).into()),
    }
}

fn told_by_v2(header: &v2::Header<'_>) -> Told {
    match header.addresses {
        v2::Addresses::IPv4(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v2::Addresses::IPv6(pair) => Told::Address((pair.source_address, pair.source_port).into()),
        v2::Addresses::Unspecified | v2::Addresses::Unix(_) => Told::Nothing,
    }
}

/// The header that tells an upstream of a client, and by version 2 which proxies it has passed. Both addresses are written
/// in one family, as the protocol wants.
pub(crate) fn header(
    version: ProxyVersion,
    client: SocketAddr,
    server: Option<SocketAddr>,
    passed: &Passed,
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
            let builder = Builder::with_addresses(version, Protocol::Stream, addresses);
            let builder = match passed.value() {
                Some(value) => builder.write_tlv(PASSED_TLV, &value),
                None => Ok(builder),
            };
            // Nothing of it is longer than the header may be.
            builder.and_then(Builder::build).unwrap_or_default()
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

    fn whole(bytes: &[u8]) -> Option<Header> {
        match parse(bytes) {
            Look::Seen(header) => Some(header.expect("a header")),
            Look::Further => None,
        }
    }

    fn seen(bytes: &[u8]) -> Option<(Told, usize)> {
        whole(bytes).map(|header| (header.told, header.bytes))
    }

    /// A header of version 2 with these bytes behind its addresses.
    fn with(more: &[u8]) -> Vec<u8> {
        let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
        bytes.extend(u16::try_from(12 + more.len()).unwrap().to_be_bytes());
        bytes.extend([192, 0, 2, 7, 10, 0, 0, 1, 0x9c, 0x40, 0, 80]);
        bytes.extend(more);
        bytes
    }

    fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len()).unwrap().to_be_bytes();
        [&[kind], &length[..], value].concat()
    }

    fn list(names: &str) -> Passed {
        let value = format!("cdn-loop:{names}");
        Passed::read(value.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn a_header_of_either_version_is_read_as_it_was_written_whatever_follows() {
        for (client, server) in [
            ("192.0.2.7:40000", "10.0.0.1:80"),
            ("[2001:db8::7]:40000", "[2001:db8::1]:443"),
        ] {
            let (client, server) = (client.parse().unwrap(), server.parse().unwrap());
            for version in [ProxyVersion::V1, ProxyVersion::V2] {
                let mut bytes = header(version, client, Some(server), &Passed::default());
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
            &Passed::default(),
        );
        assert_eq!(told, b"PROXY TCP6 ::ffff:192.0.2.7 2001:db8::1 1 2\r\n");
    }

    #[test]
    fn the_proxies_passed_are_read_as_they_were_written_beside_what_others_add() {
        let client = "[2001:db8::7]:40000".parse().unwrap();
        let passed = list("edge-a,edge-b");
        let bytes = header(ProxyVersion::V2, client, Some(client), &passed);
        for cut in 0..bytes.len() {
            assert_eq!(whole(&bytes[..cut]), None, "cut at {cut}");
        }
        let read = whole(&bytes).unwrap();
        assert_eq!(
            (read.told, read.passed),
            (Told::Address(client), passed.clone())
        );
        assert_eq!(
            header(ProxyVersion::V1, client, Some(client), &passed),
            header(ProxyVersion::V1, client, Some(client), &Passed::default())
        );
        let amid = [
            tlv(0xea, b"vpce"),
            tlv(PASSED_TLV, b"somebody's own"),
            tlv(PASSED_TLV, b"cdn-loop:edge-a,edge-b"),
            tlv(4, &[0; 9]),
        ];
        assert_eq!(whole(&with(&amid.concat())).unwrap().passed, passed);
        assert_eq!(whole(&with(&amid[0])).unwrap().passed, Passed::default());
    }

    #[test]
    fn the_longest_list_fits_in_a_header_that_everybody_reads() {
        let names: Vec<String> = (0..7).map(|_| "p".repeat(54)).collect();
        let passed = list(&names.join(","));
        let client = "[2001:db8::7]:40000".parse().unwrap();
        let bytes = header(ProxyVersion::V2, client, Some(client), &passed);
        assert!(bytes.len() > 400 && bytes.len() <= HEADER_BYTES_MAX);
        assert_eq!(whole(&bytes).unwrap().passed, passed);
    }

    #[test]
    fn a_broken_list_of_proxies_is_refused_and_whoever_speaks_for_itself_has_none() {
        let twice = [
            tlv(PASSED_TLV, b"cdn-loop:a"),
            tlv(PASSED_TLV, b"cdn-loop:b"),
        ];
        let long = format!("cdn-loop:{}", vec!["p".repeat(64); 7].join(","));
        for (more, why) in [
            (tlv(PASSED_TLV, b"cdn-loop:"), "malformed"),
            (tlv(PASSED_TLV, b"cdn-loop:a b"), "malformed"),
            (tlv(PASSED_TLV, long.as_bytes()), "too long"),
            (twice.concat(), "two lists"),
            (tlv(PASSED_TLV, b"cdn-loop:a")[..9].to_vec(), "cut off"),
            (vec![PASSED_TLV, 0], "cut off"),
        ] {
            let Look::Seen(Err(error)) = parse(&with(&more)) else {
                panic!("{more:?}")
            };
            assert!(error.to_string().contains(why), "{error}");
            let mut local = with(&more);
            local[12] = 0x20;
            let read = whole(&local).unwrap();
            assert_eq!((read.told, read.passed), (Told::Nothing, Passed::default()));
        }
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
