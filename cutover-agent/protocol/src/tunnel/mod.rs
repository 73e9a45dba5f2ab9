//! The tunnel between two sites: its kinds, and the words in which the two agents agree on one. The arithmetic is in
//! the files beside this one. Nothing here opens anything.
//!
//! ```text
//! source                                                target
//!   Offer  its key, the networks it uses       ──►        chooses addresses, makes its end
//!   makes its end                              ◄──        Answer  its key and port, both addresses, its MTU
//!   asks echoes of growing size through it     ◄─►        echoes
//!   Fit    the MTU that passed                 ──►        the same MTU
//! ```

pub mod address;
pub mod flip;
pub mod mtu;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::HopId;
use address::Pair;

/// What carries the bytes between the sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// No tunnel: the agents' own mutual TLS over the network as it is.
    #[default]
    None,
    /// WireGuard: in the kernel where it is there, otherwise in the agent.
    Wireguard,
    /// ESP in tunnel mode, keys by IKEv2, through strongSwan.
    Ipsec,
}

impl Kind {
    /// The word of plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Wireguard => "wireguard",
            Self::Ipsec => "ipsec",
        }
    }
}

/// Who does the work of a tunnel's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// The kernel.
    Kernel,
    /// A program: this agent for WireGuard, charon for IPsec.
    User,
}

/// A key as it crosses between the agents: a public key of WireGuard, or IPsec's key for both.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key(pub [u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // One of the kinds is a secret: none is ever written to a log.
        formatter.write_str("Key")
    }
}

/// What the source offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The hop. Its name also seeds the choice of addresses.
    pub hop: HopId,
    /// The kind.
    pub kind: Kind,
    /// Made for this hop.
    pub key: Key,
    /// Where addresses may come from.
    pub network: IpNet,
    /// Networks in use at the source: addresses and routes.
    pub taken: Vec<IpNet>,
    /// The source's own address towards the target, as it sees it.
    pub source: IpAddr,
}

/// What the target makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Made for this hop.
    pub key: Key,
    /// The target's UDP port of the tunnel.
    pub port: u16,
    /// Inside addresses of both ends.
    pub addresses: Pair,
    /// The largest packet that fits the target's link, in bytes.
    pub mtu: u16,
    /// Who carries there.
    pub carrier: Carrier,
    /// Port of the echo at the target's inside address.
    pub echo: u16,
    /// Port of the agent at the target's inside address.
    pub agent: u16,
    /// Addresses that the containers of the hop have at the target.
    pub known: BTreeSet<IpAddr>,
}

/// How an end of a tunnel fares, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fare {
    /// The hop it was made for.
    pub hop: HopId,
    /// The kind.
    pub kind: Kind,
    /// Who carries here.
    pub carrier: Carrier,
    /// Name of the network device.
    pub device: String,
    /// Our address inside.
    pub address: IpAddr,
    /// The other end's address inside.
    pub peer: IpAddr,
    /// The largest packet inside, in bytes.
    pub mtu: u16,
    /// Bytes sent into it.
    pub bytes_sent: u64,
    /// Bytes that came out of it.
    pub bytes_received: u64,
    /// Seconds since the last handshake; none when there was none yet.
    pub handshake_age_s: Option<u64>,
    /// Addresses of moved containers that are reached through it.
    pub forwarded: Vec<IpAddr>,
}
