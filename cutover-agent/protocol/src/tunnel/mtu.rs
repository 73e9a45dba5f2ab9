//! How large packets inside a tunnel may be: arithmetic first, then a search by echoes, because a path may carry less
//! than the link it begins with.

use std::net::IpAddr;

use super::Kind;

/// The least a tunnel must carry, in bytes: every IPv4 host takes as much (RFC 791).
pub const LEAST: u16 = 576;
/// The search ends when it knows the MTU to within this many bytes.
pub const STEP: u16 = 8;

/// An IPv4 header without options.
const IPV4: u16 = 20;
/// An IPv6 header.
const IPV6: u16 = 40;
/// A UDP header.
const UDP: u16 = 8;
/// WireGuard's data message: type and reserved 4, receiver 4, counter 8, tag 16 (its paper, section 5.4.6).
const WIREGUARD: u16 = 32;
/// ESP with AES-GCM (RFC 4303, RFC 4106): index 4, sequence 4, vector 8, check value 16.
const ESP: u16 = 32;
/// ESP's trailer: length of the padding and next header. With them the content is a multiple of four bytes.
const ESP_TRAILER: u16 = 2;
const ESP_ALIGN: u16 = 4;

/// The largest packet inside a tunnel whose outer packets are at most `link` bytes towards `peer`; nothing when that
/// is less than [`LEAST`].
#[must_use]
pub fn inside(kind: Kind, link: u16, peer: IpAddr) -> Option<u16> {
    let outer = if peer.is_ipv4() { IPV4 } else { IPV6 };
    let mtu = match kind {
        Kind::None => link,
        Kind::Wireguard => link.checked_sub(outer + UDP + WIREGUARD)?,
        // In UDP always counted (RFC 3948): a translator on the way may be noticed only later.
        Kind::Ipsec => {
            let room = link.checked_sub(outer + UDP + ESP)?;
            (room - room % ESP_ALIGN).checked_sub(ESP_TRAILER)?
        }
    };
    (mtu >= LEAST).then_some(mtu)
}

/// A search for the largest size that arrives, between [`LEAST`] and what arithmetic allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Search {
    /// Known to arrive; 0 before anything did.
    good: u16,
    /// Known or taken to be too large.
    bad: u16,
}

impl Search {
    /// A search up to `most` bytes.
    #[must_use]
    pub const fn new(most: u16) -> Self {
        Self {
            good: 0,
            bad: most.saturating_add(1),
        }
    }

    /// The size to try next; nothing when the search is over.
    #[must_use]
    pub const fn next(&self) -> Option<u16> {
        let most = self.bad - 1;
        if self.good == 0 {
            // The most first, as it is nearly always right; after that whatever must pass.
            return if most == 0 { None } else { Some(most) };
        }
        if self.bad - self.good <= STEP {
            None
        } else {
            Some(self.good + (self.bad - self.good) / 2)
        }
    }

    /// The least size, tried after the most did not arrive.
    #[must_use]
    pub const fn fallback(&self) -> Option<u16> {
        if self.good == 0 && self.bad > LEAST {
            Some(LEAST)
        } else {
            None
        }
    }

    /// Tells whether a size arrived.
    pub fn heard(&mut self, size: u16, arrived: bool) {
        if arrived {
            self.good = self.good.max(size);
            self.bad = self.bad.max(size.saturating_add(1));
        } else if size > self.good {
            self.bad = self.bad.min(size);
        }
    }

    /// The largest size known to arrive, if any did.
    #[must_use]
    pub const fn found(&self) -> Option<u16> {
        if self.good == 0 {
            None
        } else {
            Some(self.good)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    #[test]
    fn the_known_sizes_come_out() {
        assert_eq!(inside(Kind::Wireguard, 1500, V4), Some(1440));
        assert_eq!(inside(Kind::Wireguard, 1500, V6), Some(1420));
        assert_eq!(inside(Kind::Ipsec, 1500, V4), Some(1438));
        assert_eq!(inside(Kind::Ipsec, 1500, V6), Some(1418));
        assert_eq!(inside(Kind::None, 1500, V4), Some(1500));
        assert_eq!(inside(Kind::Wireguard, 600, V4), None);
    }

    /// The outer size of a packet of `inner` bytes.
    fn outer(kind: Kind, inner: u16, peer: IpAddr) -> u16 {
        let ip = if peer.is_ipv4() { 20 } else { 40 };
        match kind {
            Kind::None => inner,
            Kind::Wireguard => ip + 8 + 32 + inner,
            Kind::Ipsec => ip + 8 + 32 + (inner + 2).next_multiple_of(4),
        }
    }

    fn searched(limit: u16, most: u16) -> (Option<u16>, u32) {
        let (mut search, mut tries) = (Search::new(most), 0);
        while let Some(size) = search.next() {
            tries += 1;
            search.heard(size, size <= limit);
            if search.found().is_none() {
                let Some(least) = search.fallback() else {
                    break;
                };
                tries += 1;
                search.heard(least, least <= limit);
                if search.found().is_none() {
                    break;
                }
            }
        }
        (search.found(), tries)
    }

    proptest! {
        #[test]
        fn a_full_packet_fits_the_link_and_one_byte_more_does_not(link in 700_u16..9100, wireguard in any::<bool>(), v4 in any::<bool>()) {
            let kind = if wireguard { Kind::Wireguard } else { Kind::Ipsec };
            let peer = if v4 { V4 } else { V6 };
            let mtu = inside(kind, link, peer).unwrap();
            prop_assert!(outer(kind, mtu, peer) <= link);
            prop_assert!(outer(kind, mtu + 1, peer) > link);
        }

        #[test]
        fn a_search_finds_what_passes_to_within_a_step(limit in LEAST..9000, most in LEAST..9000) {
            let (found, tries) = searched(limit, most);
            let (found, truth) = (found.unwrap(), limit.min(most));
            prop_assert!(found <= truth && truth - found < STEP, "{found} of {truth}");
            prop_assert!(tries <= 14);
        }

        #[test]
        fn a_dead_path_is_found_out_at_once(most in LEAST..9000) {
            // The least is not tried twice.
            let tries = if most == LEAST { 1 } else { 2 };
            prop_assert_eq!(searched(0, most), (None, tries));
        }
    }
}
