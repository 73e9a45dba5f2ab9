//! WireGuard in the kernel: a device of the kind `wireguard`, set up over generic netlink (linux/wireguard.h). Where
//! the kernel has none, [`is_in_kernel`] says so and `userspace.rs` does the same work.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};

use boringtun::x25519::{PublicKey, StaticSecret};
use cutover_protocol::tunnel::Key;
use ipnet::IpNet;

use super::netlink::{DUMP, Message, Nest, Socket, as_u64, attribute, attributes};
use super::network::{Network, octets};
use super::{Counters, KEEPALIVE_S};

// linux/genetlink.h
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

// linux/wireguard.h
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;
const DEVICE_NAME: u16 = 2;
const DEVICE_PRIVATE_KEY: u16 = 3;
const DEVICE_FLAGS: u16 = 5;
const DEVICE_PORT: u16 = 6;
const DEVICE_PEERS: u16 = 8;
const REPLACE_PEERS: u32 = 1;
const PEER_KEY: u16 = 1;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_KEEPALIVE: u16 = 5;
const PEER_LAST_HANDSHAKE: u16 = 6;
const PEER_RECEIVED: u16 = 7;
const PEER_SENT: u16 = 8;
const PEER_ALLOWED: u16 = 9;
const REPLACE_ALLOWED: u32 = 2;
const UPDATE_ONLY: u32 = 4;
const ALLOWED_FAMILY: u16 = 1;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_BITS: u16 = 3;

/// The other end, as a device knows it.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) key: Key,
    /// Where it is; none until it has spoken.
    pub(super) endpoint: Option<SocketAddr>,
    /// Who may send from there, and is sent to there.
    pub(super) allowed: BTreeSet<IpNet>,
}

/// A fresh secret.
pub(super) fn new_secret() -> io::Result<Key> {
    let mut secret = [0; 32];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut secret)
        .map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(Key(secret))
}

/// The public half of a secret.
pub(super) fn public(secret: &Key) -> Key {
    Key(PublicKey::from(&StaticSecret::from(secret.0)).to_bytes())
}

/// Whether this kernel has WireGuard; loads its module where that is allowed.
pub(super) fn is_in_kernel(network: &mut Network) -> io::Result<bool> {
    const TRIAL: &str = "hopgate-trial";
    match network.make_device(TRIAL, "wireguard", None) {
        Ok(()) => network.delete_device(TRIAL).map(|()| true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives an existing device its key, port and only peer.
pub(super) fn set_up(device: &str, secret: &Key, port: u16, peer: &Peer) -> io::Result<()> {
    let message = Message::new(0, 0, &head(SET_DEVICE))
        .put_text(DEVICE_NAME, device)
        .put(DEVICE_PRIVATE_KEY, &secret.0)
        .put_u32(DEVICE_FLAGS, REPLACE_PEERS)
        .put(DEVICE_PORT, &port.to_ne_bytes())
        .nest(
            DEVICE_PEERS,
            &Nest::default().nest(0, &peer_nest(peer, REPLACE_ALLOWED)),
        );
    order(message)
}

/// Changes who may send and is sent to through the peer.
pub(super) fn allow(device: &str, peer: &Peer) -> io::Result<()> {
    let nest = peer_nest(peer, REPLACE_ALLOWED | UPDATE_ONLY);
    let message = Message::new(0, 0, &head(SET_DEVICE))
        .put_text(DEVICE_NAME, device)
        .nest(DEVICE_PEERS, &Nest::default().nest(0, &nest));
    order(message)
}

/// What the device counted, its port, and where its peer was last seen.
pub(super) fn read(device: &str) -> io::Result<(Counters, u16, Option<SocketAddr>)> {
    let mut socket = Socket::open(libc::NETLINK_GENERIC)?;
    let kind = family(&mut socket)?;
    // A dump, although of one device: the kernel offers nothing else.
    let message = Message::new(kind, DUMP, &head(GET_DEVICE)).put_text(DEVICE_NAME, device);
    let (mut counters, mut port, mut endpoint) = (Counters::default(), 0, None);
    for answer in socket.ask(&message)? {
        let Some(body) = answer.get(4..) else {
            continue;
        };
        if let Some(value) = attribute(body, DEVICE_PORT) {
            port = value
                .get(..2)
                .and_then(|two| two.try_into().ok())
                .map_or(0, u16::from_ne_bytes);
        }
        for (_, peer) in attribute(body, DEVICE_PEERS)
            .into_iter()
            .flat_map(attributes)
        {
            counters.bytes_sent += attribute(peer, PEER_SENT).and_then(as_u64).unwrap_or(0);
            counters.bytes_received += attribute(peer, PEER_RECEIVED).and_then(as_u64).unwrap_or(0);
            // Seconds since 1970, by the wall clock; zero before the first one.
            let last = attribute(peer, PEER_LAST_HANDSHAKE)
                .and_then(as_u64)
                .filter(|last| *last > 0);
            let now_s = crate::preflight::now_ms() / 1000;
            counters.handshake_age_s = last.map(|last| now_s.saturating_sub(last));
            endpoint = attribute(peer, PEER_ENDPOINT).and_then(socket_address);
        }
    }
    Ok((counters, port, endpoint))
}

fn order(message: Message) -> io::Result<()> {
    let mut socket = Socket::open(libc::NETLINK_GENERIC)?;
    let kind = family(&mut socket)?;
    socket.order(&message.of_kind(kind))
}

fn family(socket: &mut Socket) -> io::Result<u16> {
    let message = Message::new(CONTROL, 0, &head(GET_FAMILY)).put_text(FAMILY_NAME, "wireguard");
    let answers = socket.ask(&message)?;
    let id = answers
        .first()
        .and_then(|answer| attribute(answer.get(4..)?, FAMILY_ID));
    id.and_then(|id| Some(u16::from_ne_bytes(id.get(..2)?.try_into().ok()?)))
        .ok_or_else(|| ErrorKind::Unsupported.into())
}

fn head(command: u8) -> [u8; 4] {
    [command, 1, 0, 0]
}

fn peer_nest(peer: &Peer, flags: u32) -> Nest {
    let mut nest = Nest::default()
        .put(PEER_KEY, &peer.key.0)
        .put(PEER_FLAGS, &flags.to_ne_bytes())
        .put(PEER_KEEPALIVE, &KEEPALIVE_S.to_ne_bytes());
    if let Some(endpoint) = peer.endpoint {
        nest = nest.put(PEER_ENDPOINT, &encode(endpoint));
    }
    let mut all = Nest::default();
    for net in &peer.allowed {
        let family = if net.addr().is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let one = Nest::default()
            .put(ALLOWED_FAMILY, &(family as u16).to_ne_bytes())
            .put(ALLOWED_ADDRESS, &octets(net.addr()))
            .put(ALLOWED_BITS, &[net.prefix_len()]);
        all = all.nest(0, &one);
    }
    nest.nest(PEER_ALLOWED, &all)
}

/// A `sockaddr_in` or `sockaddr_in6`.
fn encode(address: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut bytes = (family as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&address.port().to_be_bytes());
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend_from_slice(&v4.ip().octets());
            bytes.resize(16, 0);
        }
        SocketAddr::V6(v6) => {
            bytes.extend_from_slice(&v6.flowinfo().to_be_bytes());
            bytes.extend_from_slice(&v6.ip().octets());
            bytes.extend_from_slice(&v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let address: IpAddr = match family {
        libc::AF_INET => <[u8; 4]>::try_from(bytes.get(4..8)?).ok()?.into(),
        libc::AF_INET6 => <[u8; 16]>::try_from(bytes.get(8..24)?).ok()?.into(),
        _ => return None,
    };
    Some((address, port).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_were_written() {
        for text in ["192.0.2.1:51820", "[2001:db8::1]:443"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(socket_address(&encode(address)), Some(address));
        }
        assert_eq!(socket_address(&[0, 0, 0]), None);
    }

    #[test]
    fn keys_are_curve25519() {
        // RFC 7748, section 6.1: Alice's keys.
        let secret = Key([
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ]);
        assert_eq!(public(&secret).0[..4], [0x85, 0x20, 0xf0, 0x09]);
        assert_ne!(new_secret().unwrap(), new_secret().unwrap());
    }
}
