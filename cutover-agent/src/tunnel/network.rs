//! Links, addresses, routes and neighbours of one network namespace, over netlink. Every change may be repeated, and
//! taking away what is not there is no error. Which changes are made is decided elsewhere.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;

use ipnet::IpNet;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::netlink::{CREATE, DUMP, EXCLUSIVE, Message, Nest, REPLACE, Socket, as_u32, attribute};

// linux/rtnetlink.h
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;

// linux/if_link.h, linux/if_addr.h
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const LINK_INFO: u16 = 18;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const ADDRESS_ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const IFF_UP: u32 = 1;

// Attributes of routes and rules (linux/rtnetlink.h, linux/fib_rules.h).
const ROUTE_DESTINATION: u16 = 1;
const ROUTE_OUT: u16 = 4;
const ROUTE_TABLE: u16 = 15;
const RULE_SOURCE: u16 = 2;
const RULE_PRIORITY: u16 = 6;
const RULE_TABLE: u16 = 15;
/// `RTPROT_STATIC`: not the kernel's own.
const STATIC: u8 = 4;
/// `RT_SCOPE_LINK`: the destination is on the device itself.
const SCOPE_LINK: u8 = 253;
const UNICAST: u8 = 1;
/// `RT_TABLE_MAIN`.
pub(super) const MAIN: u32 = 254;
/// `RTM_F_CLONED`: a cached route, not a configured one.
const CLONED: u32 = 0x200;

/// `NTF_PROXY`: answer for this address.
const ANSWER_FOR: u8 = 8;
const NEIGHBOUR_ADDRESS: u16 = 1;
/// `NUD_PERMANENT`.
const PERMANENT: u16 = 0x80;

/// Runs `work` in the network namespace pinned at `namespace`, on a thread of its own.
pub(crate) fn within<T: Send>(
    namespace: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let pinned = File::open(namespace)?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(pinned.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        });
        inside
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The network of the namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Network(Socket);

/// An address of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) device: u32,
    pub(super) net: IpNet,
}

impl Network {
    pub(super) fn open() -> io::Result<Self> {
        Socket::open(libc::NETLINK_ROUTE).map(Self)
    }

    /// The number of a device, if there is one of that name.
    pub(super) fn device(&mut self, name: &str) -> io::Result<Option<u32>> {
        let message = Message::new(GET_LINK, 0, &link_head(0, 0, 0)).put_text(LINK_NAME, name);
        match self.0.ask(&message) {
            Ok(answers) => Ok(answers
                .first()
                .and_then(|link| link.get(4..8))
                .and_then(as_u32)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a device of a kind that has a driver in the kernel; `data` are attributes of that kind.
    pub(super) fn make_device(
        &mut self,
        name: &str,
        kind: &str,
        data: Option<&Nest>,
    ) -> io::Result<()> {
        let mut info = Nest::default().put(INFO_KIND, kind.as_bytes());
        if let Some(data) = data {
            info = info.nest(INFO_DATA, data);
        }
        let message = Message::new(NEW_LINK, CREATE | EXCLUSIVE, &link_head(0, 0, 0))
            .put_text(LINK_NAME, name)
            .nest(LINK_INFO, &info);
        self.0.order(&message)
    }

    pub(super) fn delete_device(&mut self, name: &str) -> io::Result<()> {
        match self.device(name)? {
            Some(device) => gone_is_fine(self.0.order(&Message::new(
                DELETE_LINK,
                0,
                &link_head(device, 0, 0),
            ))),
            None => Ok(()),
        }
    }

    /// Sets a device's MTU and brings it up.
    pub(super) fn bring_up(&mut self, device: u32, mtu: u16) -> io::Result<()> {
        let message = Message::new(NEW_LINK, 0, &link_head(device, IFF_UP, IFF_UP))
            .put_u32(LINK_MTU, u32::from(mtu));
        self.0.order(&message)
    }

    /// Gives a device an address that stands alone.
    pub(super) fn add_address(&mut self, device: u32, address: IpAddr) -> io::Result<()> {
        let (family, bits) = family(address);
        let mut head = vec![family, bits, 0, 0];
        head.extend_from_slice(&device.to_ne_bytes());
        let bytes = octets(address);
        let message = Message::new(NEW_ADDRESS, CREATE | REPLACE, &head)
            .put(ADDRESS_LOCAL, &bytes)
            .put(ADDRESS_ADDRESS, &bytes);
        self.0.order(&message)
    }

    pub(super) fn remove_address(&mut self, device: u32, address: IpAddr) -> io::Result<()> {
        let (family, bits) = family(address);
        let mut head = vec![family, bits, 0, 0];
        head.extend_from_slice(&device.to_ne_bytes());
        let message = Message::new(DELETE_ADDRESS, 0, &head).put(ADDRESS_LOCAL, &octets(address));
        gone_is_fine(self.0.order(&message))
    }

    /// All addresses of this namespace.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<Held>> {
        let answers = self.0.ask(&Message::new(GET_ADDRESS, DUMP, &[0; 8]))?;
        let held = answers.iter().filter_map(|answer| {
            let attributes = answer.get(8..)?;
            let value = attribute(attributes, ADDRESS_LOCAL)
                .or_else(|| attribute(attributes, ADDRESS_ADDRESS))?;
            Some(Held {
                device: answer.get(4..8).and_then(as_u32)?,
                net: IpNet::new(address(value)?, *answer.get(1)?).ok()?,
            })
        });
        Ok(held.collect())
    }

    /// Destinations of the main table's routes.
    pub(super) fn routes(&mut self) -> io::Result<Vec<IpNet>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut head = [0; 12];
            head[0] = family as u8;
            for answer in self.0.ask(&Message::new(GET_ROUTE, DUMP, &head))? {
                let (Some(fixed), Some(attributes)) = (answer.get(..12), answer.get(12..)) else {
                    continue;
                };
                let cached = fixed
                    .get(8..12)
                    .and_then(as_u32)
                    .is_some_and(|flags| flags & CLONED != 0);
                if cached || u32::from(fixed[4]) != MAIN {
                    continue;
                }
                let destination = attribute(attributes, ROUTE_DESTINATION).and_then(address);
                all.extend(destination.and_then(|address| IpNet::new(address, fixed[1]).ok()));
            }
        }
        Ok(all)
    }

    /// The device that packets to an address leave by, as the routes are now.
    pub(super) fn device_towards(&mut self, to: IpAddr) -> io::Result<Option<u32>> {
        let (family, bits) = family(to);
        let mut head = [0; 12];
        (head[0], head[1]) = (family, bits);
        let message = Message::new(GET_ROUTE, 0, &head).put(ROUTE_DESTINATION, &octets(to));
        let answers = self.0.ask(&message)?;
        Ok(answers
            .first()
            .and_then(|answer| attribute(answer.get(12..)?, ROUTE_OUT))
            .and_then(as_u32))
    }

    /// Leads packets to `to` to a device, in a table.
    pub(super) fn lead(&mut self, to: IpAddr, device: u32, table: u32) -> io::Result<()> {
        self.0
            .order(&route(NEW_ROUTE, CREATE | REPLACE, to, device, table))
    }

    pub(super) fn lead_no_more(&mut self, to: IpAddr, device: u32, table: u32) -> io::Result<()> {
        gone_is_fine(self.0.order(&route(DELETE_ROUTE, 0, to, device, table)))
    }

    /// Lets packets from `from` look into `table` before the main one.
    pub(super) fn consult(&mut self, from: IpAddr, table: u32, priority: u32) -> io::Result<()> {
        match self
            .0
            .order(&rule(NEW_RULE, CREATE | EXCLUSIVE, from, table, priority))
        {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    pub(super) fn consult_no_more(
        &mut self,
        from: IpAddr,
        table: u32,
        priority: u32,
    ) -> io::Result<()> {
        gone_is_fine(self.0.order(&rule(DELETE_RULE, 0, from, table, priority)))
    }

    /// Answers neighbours on a device for an address that is elsewhere now.
    pub(super) fn answer_for(&mut self, address: IpAddr, device: u32) -> io::Result<()> {
        self.0
            .order(&neighbour(NEW_NEIGHBOUR, CREATE | REPLACE, address, device))
    }

    pub(super) fn answer_no_more(&mut self, address: IpAddr, device: u32) -> io::Result<()> {
        gone_is_fine(
            self.0
                .order(&neighbour(DELETE_NEIGHBOUR, 0, address, device)),
        )
    }
}

fn link_head(device: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut head = [0; 16];
    head[4..8].copy_from_slice(&device.to_ne_bytes());
    head[8..12].copy_from_slice(&flags.to_ne_bytes());
    head[12..16].copy_from_slice(&change.to_ne_bytes());
    head
}

fn route(kind: u16, flags: u16, to: IpAddr, device: u32, table: u32) -> Message {
    let (family, bits) = family(to);
    // The table's number is in its attribute: a byte is too small for ours.
    let scope = if kind == NEW_ROUTE && to.is_ipv4() {
        SCOPE_LINK
    } else {
        0
    };
    let head = [family, bits, 0, 0, 0, STATIC, scope, UNICAST, 0, 0, 0, 0];
    Message::new(kind, flags, &head)
        .put(ROUTE_DESTINATION, &octets(to))
        .put_u32(ROUTE_OUT, device)
        .put_u32(ROUTE_TABLE, table)
}

fn rule(kind: u16, flags: u16, from: IpAddr, table: u32, priority: u32) -> Message {
    let (family, bits) = family(from);
    // FR_ACT_TO_TBL is 1.
    let head = [family, 0, bits, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    Message::new(kind, flags, &head)
        .put(RULE_SOURCE, &octets(from))
        .put_u32(RULE_PRIORITY, priority)
        .put_u32(RULE_TABLE, table)
}

fn neighbour(kind: u16, flags: u16, address: IpAddr, device: u32) -> Message {
    let mut head = [0; 12];
    head[0] = family(address).0;
    head[4..8].copy_from_slice(&device.to_ne_bytes());
    head[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    head[10] = ANSWER_FOR;
    Message::new(kind, flags, &head).put(NEIGHBOUR_ADDRESS, &octets(address))
}

fn family(address: IpAddr) -> (u8, u8) {
    match address {
        IpAddr::V4(_) => (libc::AF_INET as u8, 32),
        IpAddr::V6(_) => (libc::AF_INET6 as u8, 128),
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

fn gone_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}
