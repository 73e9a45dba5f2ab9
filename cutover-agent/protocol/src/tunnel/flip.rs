//! How addresses move: which routes each side has before and after a commit, and in which order they change.
//!
//! A moved container has the same address at both sites. Before the commit the source delivers to its own copy; after
//! it the source leads these addresses into the tunnel, and the target leads answers to *carried* peers (those whose
//! connections were open at the freeze) back into it. Everything else the target's copy sends goes its own way.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Addresses that live at both sites, and the peers of connections that were open at the freeze.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Of the moved containers.
    pub addresses: BTreeSet<IpAddr>,
    /// Of whoever talks to them from outside, or is talked to.
    pub carried: BTreeSet<IpAddr>,
}

impl Moved {
    /// What moves, from the addresses of the containers at each site and all peers of their open connections.
    /// Addresses that only one site has stay where they are, and so do the connections between containers.
    #[must_use]
    pub fn new(
        source: &BTreeSet<IpAddr>,
        target: &BTreeSet<IpAddr>,
        peers: &BTreeSet<IpAddr>,
    ) -> Self {
        let addresses: BTreeSet<IpAddr> = source.intersection(target).copied().collect();
        let carried = peers
            .iter()
            .filter(|peer| !source.contains(peer) && !peer.is_loopback())
            .copied()
            .collect();
        Self { addresses, carried }
    }
}

/// One side of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The side that is left.
    Source,
    /// The side that serves afterwards.
    Target,
}

/// What one end lets out of and leads into the tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    /// Senders and receivers at the other end: WireGuard's allowed addresses, IPsec's remote selectors.
    pub allowed: BTreeSet<IpNet>,
    /// Addresses whose packets, whoever sends them, go into the tunnel.
    pub forward: BTreeSet<IpAddr>,
    /// Packets from the first to the second go into the tunnel; others to the second do not.
    pub back: BTreeSet<(IpAddr, IpAddr)>,
}

/// What an end has once its flip is done; before it only the ends themselves talk.
#[must_use]
pub fn flipped(end: End, peer: IpAddr, moved: &Moved) -> Routes {
    let mut routes = Routes {
        allowed: BTreeSet::from([host(peer)]),
        ..Routes::default()
    };
    match end {
        End::Source => {
            routes
                .allowed
                .extend(moved.addresses.iter().copied().map(host));
            routes.forward.clone_from(&moved.addresses);
        }
        End::Target => {
            routes
                .allowed
                .extend(moved.carried.iter().copied().map(host));
            for from in &moved.addresses {
                let of_its_family = moved
                    .carried
                    .iter()
                    .filter(|to| to.is_ipv4() == from.is_ipv4());
                routes.back.extend(of_its_family.map(|to| (*from, *to)));
            }
        }
    }
    routes
}

/// The network of one address.
#[must_use]
pub fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// One step of a flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The target leads answers to carried peers into the tunnel.
    TargetReturns,
    /// The target's fence is lifted: its containers may speak.
    TargetSpeaks,
    /// The source leads the moved addresses into the tunnel.
    SourceForwards,
}

/// The order after a commit. An answer of the target must never take another way than its connection came by: some
/// router on that way would reset it. So the way back is there before anybody can speak; and nobody is led to the
/// target before it hears.
pub const AFTER_COMMIT: [Step; 3] = [
    Step::TargetReturns,
    Step::TargetSpeaks,
    Step::SourceForwards,
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses() -> impl Strategy<Value = BTreeSet<IpAddr>> {
        proptest::collection::btree_set(
            (0_u8..6).prop_map(|last| IpAddr::from([10, 44, 0, last])),
            0..6,
        )
    }

    proptest! {
        #[test]
        fn what_is_led_away_at_one_end_is_let_in_at_the_other(source in addresses(), target in addresses(), peers in addresses()) {
            let moved = Moved::new(&source, &target, &peers);
            let (near, far) = (IpAddr::from([169, 254, 64, 0]), IpAddr::from([169, 254, 64, 1]));
            let at_source = flipped(End::Source, far, &moved);
            let at_target = flipped(End::Target, near, &moved);
            for address in &at_source.forward {
                // The source lets in what the target's copy answers with.
                prop_assert!(at_source.allowed.contains(&host(*address)));
                // No circle: the target never leads a moved address back.
                prop_assert!(at_target.back.iter().all(|(_, to)| to != address));
                prop_assert!(target.contains(address) && source.contains(address));
            }
            for (from, to) in &at_target.back {
                prop_assert!(at_target.allowed.contains(&host(*to)));
                prop_assert!(at_source.forward.contains(from));
            }
        }
    }

    #[test]
    fn nobody_speaks_or_is_led_before_the_way_is_complete() {
        for done in 0..=AFTER_COMMIT.len() {
            let has = |step| AFTER_COMMIT[..done].contains(&step);
            assert!(!has(Step::TargetSpeaks) || has(Step::TargetReturns));
            assert!(!has(Step::SourceForwards) || has(Step::TargetSpeaks));
        }
    }

    #[test]
    fn connections_between_containers_are_nobodys_to_carry() {
        let both = BTreeSet::from([IpAddr::from([10, 44, 0, 2]), IpAddr::from([10, 44, 0, 3])]);
        let peers = BTreeSet::from([IpAddr::from([10, 44, 0, 2]), IpAddr::from([192, 0, 2, 5])]);
        let moved = Moved::new(&both, &both, &peers);
        assert_eq!(
            moved.carried,
            BTreeSet::from([IpAddr::from([192, 0, 2, 5])])
        );
    }
}
