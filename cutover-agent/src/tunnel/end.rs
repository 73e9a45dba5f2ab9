//! One end of a tunnel on this host: its device, its addresses and what is led through it. It does what it is told;
//! who is told what and when is the business of the hop.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use cutover_protocol::id::HopId;
use cutover_protocol::tunnel::address::Pair;
use cutover_protocol::tunnel::flip::{self, Moved, Routes};
use cutover_protocol::tunnel::{Carrier, Key, Kind};
use serde::{Deserialize, Serialize};

use super::network::{MAIN, Network};
use super::wireguard::{self, Peer};
use super::{Counters, ipsec, userspace};

/// The table with the ways back to carried peers; consulted for packets of moved containers only.
const TABLE: u32 = 7443;
/// The priority of the rules that consult it: before the main table's 32766.
const PRIORITY: u32 = 7443;

/// Everything that makes an end, kept so that an agent that was restarted can make it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Made {
    pub(super) hop: HopId,
    pub(super) kind: Kind,
    pub(super) end: flip::End,
    pub(super) carrier: Carrier,
    pub(super) secret: Key,
    pub(super) peer_key: Key,
    /// Our UDP port.
    pub(super) port: u16,
    /// The outer address of the other end.
    pub(super) outer: IpAddr,
    /// Where the other end was last known to listen.
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) addresses: Pair,
    /// Port of the target's agent at its inside address.
    pub(super) agent: u16,
    pub(super) mtu: u16,
    /// charon's control socket, for IPsec.
    pub(super) charon: PathBuf,
    /// Addresses that the containers have at the target; known at the source only.
    pub(super) known: BTreeSet<IpAddr>,
    /// What moves with the hop, as far as it is known.
    pub(super) moved: Moved,
    pub(super) flip: Flip,
}

/// Whether addresses have moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Flip {
    /// The source serves, as far as this end knows.
    Ahead,
    /// What moved is led through the tunnel.
    Done,
}

impl Made {
    pub(super) const fn own(&self) -> IpAddr {
        match self.end {
            flip::End::Source => self.addresses.source,
            flip::End::Target => self.addresses.target,
        }
    }

    pub(super) const fn peer(&self) -> IpAddr {
        match self.end {
            flip::End::Source => self.addresses.target,
            flip::End::Target => self.addresses.source,
        }
    }

    /// Our devices' names differ, so that both ends may be on one host.
    pub(super) const fn device(&self) -> &'static str {
        match (self.kind, self.carrier, self.end) {
            (Kind::Ipsec, Carrier::User, _) => ipsec::USER_DEVICE,
            (_, _, flip::End::Source) => "hopgate-source",
            (_, _, flip::End::Target) => "hopgate-target",
        }
    }

    /// Whether the device comes and goes with this end.
    const fn owns_device(&self) -> bool {
        !matches!((self.kind, self.carrier), (Kind::Ipsec, Carrier::User))
    }

    fn wanted(&self) -> Routes {
        match self.flip {
            Flip::Ahead => flip::flipped(self.end, self.peer(), &Moved::default()),
            Flip::Done => flip::flipped(self.end, self.peer(), &self.moved),
        }
    }

    fn wireguard_peer(&self, routes: &Routes) -> Peer {
        Peer {
            key: self.peer_key,
            endpoint: self.endpoint,
            allowed: routes.allowed.clone(),
        }
    }
}

/// An open end.
#[derive(Debug)]
pub(super) struct End {
    pub(super) made: Made,
    device: Device,
    index: u32,
    routes: Routes,
    /// Devices on which we answer for moved addresses.
    answered: BTreeMap<IpAddr, u32>,
}

#[derive(Debug)]
enum Device {
    /// In the kernel; it outlives the agent.
    Kernel,
    /// In this process.
    User(userspace::Device),
    /// charon's connection, wherever its packets are sealed.
    Ipsec,
}

impl End {
    /// Makes the end, in this thread's network namespace. A device of the kernel that an earlier life of this agent
    /// left is taken over with its keys; anything else of its name is replaced.
    pub(super) fn open(mut made: Made, adopt: Adopt) -> io::Result<Self> {
        let mut network = Network::open()?;
        let name = made.device();
        let routes = made.wanted();
        let outlived = adopt == Adopt::Yes
            && made.carrier == Carrier::Kernel
            && network.device(name)?.is_some();
        let device = match made.kind {
            Kind::Wireguard if outlived => Device::Kernel,
            Kind::Ipsec if outlived => Device::Ipsec,
            Kind::None | Kind::Wireguard | Kind::Ipsec => {
                if made.owns_device() {
                    network.delete_device(name)?;
                }
                make(&mut made, &mut network, &routes)?
            }
        };
        let index = network
            .device(name)?
            .ok_or_else(|| io::Error::other(format!("the device {name} is gone")))?;
        let (own, peer) = (made.own(), made.peer());
        let mut end = Self {
            made,
            device,
            index,
            routes: Routes::default(),
            answered: BTreeMap::new(),
        };
        network.add_address(index, own)?;
        network.bring_up(index, end.made.mtu)?;
        network.lead(peer, index, MAIN)?;
        if let Device::Kernel = end.device {
            let (_, port, _) = wireguard::read(name)?;
            end.made.port = port;
        }
        end.apply(routes)?;
        if let (Device::Ipsec, false) = (&end.device, outlived) {
            ipsec::begin(&end.made)?;
        }
        Ok(end)
    }

    pub(super) fn set_mtu(&mut self, mtu: u16) -> io::Result<()> {
        self.made.mtu = mtu;
        Network::open()?.bring_up(self.index, mtu)
    }

    /// Leads what has moved through the tunnel. May be repeated.
    pub(super) fn flip(&mut self, moved: Moved) -> io::Result<()> {
        (self.made.moved, self.made.flip) = (moved, Flip::Done);
        self.apply(self.made.wanted())
    }

    fn apply(&mut self, wanted: Routes) -> io::Result<()> {
        if wanted.allowed != self.routes.allowed {
            match &self.device {
                Device::Kernel => {
                    // Without an endpoint: the device knows better than we do where its peer is now.
                    let peer = self.made.wireguard_peer(&wanted);
                    wireguard::allow(
                        self.made.device(),
                        &Peer {
                            endpoint: None,
                            ..peer
                        },
                    )?;
                }
                Device::User(device) => device.allow(&wanted.allowed),
                // Everything may pass: routes say what does.
                Device::Ipsec => {}
            }
        }
        let mut network = Network::open()?;
        for address in wanted.forward.difference(&self.routes.forward) {
            // Neighbours that stay at the source know the address on their own link.
            let before = network.device_towards(*address).ok().flatten();
            if let Some(before) = before.filter(|before| *before != self.index) {
                network.answer_for(*address, before)?;
                self.answered.insert(*address, before);
            }
            network.lead(*address, self.index, MAIN)?;
        }
        for (from, to) in wanted.back.difference(&self.routes.back) {
            network.lead(*to, self.index, TABLE)?;
            network.consult(*from, TABLE, PRIORITY)?;
        }
        self.routes = wanted;
        Ok(())
    }

    pub(super) fn counters(&self) -> io::Result<Counters> {
        match &self.device {
            Device::Kernel => wireguard::read(self.made.device()).map(|(counters, ..)| counters),
            Device::User(device) => Ok(device.counters()),
            Device::Ipsec => ipsec::counters(&self.made),
        }
    }

    /// What there is to know of this end, with the peer where it is now.
    pub(super) fn remember(&self) -> Made {
        let endpoint = match &self.device {
            Device::Kernel => wireguard::read(self.made.device())
                .ok()
                .and_then(|(.., endpoint)| endpoint),
            Device::User(device) => device.endpoint(),
            Device::Ipsec => None,
        };
        Made {
            endpoint: endpoint.or(self.made.endpoint),
            ..self.made.clone()
        }
    }

    /// Takes everything back.
    pub(super) fn close(self) -> io::Result<()> {
        let mut network = Network::open()?;
        for (from, to) in &self.routes.back {
            network.consult_no_more(*from, TABLE, PRIORITY)?;
            network.lead_no_more(*to, self.index, TABLE)?;
        }
        for (address, device) in &self.answered {
            network.answer_no_more(*address, *device)?;
        }
        if let Device::Ipsec = self.device {
            ipsec::take_down(&self.made)?;
        }
        if self.made.owns_device() {
            // Addresses and routes of the main table go with it.
            return network.delete_device(self.made.device());
        }
        for address in self.routes.forward.iter().chain([&self.made.peer()]) {
            network.lead_no_more(*address, self.index, MAIN)?;
        }
        network.remove_address(self.index, self.made.own())
    }
}

/// Whether a device that is there already may be ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Adopt {
    /// After a restart of this agent.
    Yes,
    /// For a new hop.
    No,
}

fn make(made: &mut Made, network: &mut Network, routes: &Routes) -> io::Result<Device> {
    let (name, peer) = (made.device(), made.wireguard_peer(routes));
    match (made.kind, made.carrier) {
        (Kind::Ipsec, _) => {
            ipsec::set_up(made, network)?;
            Ok(Device::Ipsec)
        }
        (_, Carrier::Kernel) => {
            network.make_device(name, "wireguard", None)?;
            wireguard::set_up(name, &made.secret, made.port, &peer)?;
            Ok(Device::Kernel)
        }
        (_, Carrier::User) => {
            let device = userspace::Device::open(
                name,
                &made.secret,
                made.port,
                &peer,
                made.outer.is_ipv4(),
            )?;
            made.port = device.port;
            Ok(Device::User(device))
        }
    }
}
