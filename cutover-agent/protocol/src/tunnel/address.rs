//! Which addresses the two ends of a tunnel get: a pair that neither site uses, the same for the same hop.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// Where pairs come from by default. Link-local addresses never leave a link, so no site's routes hold them, and
/// clouds put their own tunnels' ends there too; these keep away from 169.254.169.254 and its like.
pub const NETWORK: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 64, 0), 18));

/// Pairs that are tried before a network counts as full.
const TRIES_MAX: u64 = 4096;

/// The inside addresses of both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The source's.
    pub source: IpAddr,
    /// The target's.
    pub target: IpAddr,
}

/// A free pair of neighbouring addresses of `network` (RFC 3021, RFC 6164), or nothing when it is full or too small.
/// `taken` is what both sites use; networks that contain all of `network` do not count, because a pair's own routes
/// come before theirs. The same `seed` leads to the same pair.
#[must_use]
pub fn choose(network: IpNet, seed: &str, taken: &[IpNet]) -> Option<Pair> {
    let free_bits = network.max_prefix_len().checked_sub(network.prefix_len())?;
    if free_bits == 0 {
        return None;
    }
    // 2^63 pairs are as good as all of them.
    let pairs = 1_u64 << (u32::from(free_bits) - 1).min(63);
    let first = hash(seed) % pairs;
    let inside: Vec<&IpNet> = taken.iter().filter(|net| !net.contains(&network)).collect();
    (0..pairs.min(TRIES_MAX))
        .map(|offset| pair(network, (first + offset) % pairs))
        .find(|pair| {
            !inside
                .iter()
                .any(|net| net.contains(&pair.source) || net.contains(&pair.target))
        })
}

fn pair(network: IpNet, number: u64) -> Pair {
    let at = |offset: u64| match network.network() {
        IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(
            // Below 2^32: the number is below the count of pairs of an IPv4 network.
            base.to_bits().wrapping_add((number * 2 + offset) as u32),
        )),
        IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(
            base.to_bits()
                .wrapping_add(u128::from(number) * 2 + u128::from(offset)),
        )),
    };
    Pair {
        source: at(0),
        target: at(1),
    }
}

/// FNV-1a (RFC 9923 names it): spreads the names of hops, and is the same in every build.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net() -> impl Strategy<Value = IpNet> {
        (any::<u32>(), 8_u8..=32).prop_map(|(bits, length)| {
            IpNet::new(IpAddr::V4(Ipv4Addr::from_bits(bits)), length)
                .unwrap()
                .trunc()
        })
    }

    fn near() -> impl Strategy<Value = IpNet> {
        (0_u32..1 << 14, 19_u8..=32).prop_map(|(low, length)| {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(169, 254, 64, 0).to_bits() + low);
            IpNet::new(IpAddr::V4(address), length).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn a_pair_is_of_the_network_and_used_by_neither_site(
            seed in "[a-z0-9-]{1,20}", network in net(), taken in proptest::collection::vec(prop_oneof![net(), near()], 0..30),
        ) {
            for network in [network, NETWORK] {
                let Some(pair) = choose(network, &seed, &taken) else { continue };
                prop_assert!(network.contains(&pair.source) && network.contains(&pair.target));
                prop_assert_ne!(pair.source, pair.target);
                for net in taken.iter().filter(|net| !net.contains(&network)) {
                    prop_assert!(!net.contains(&pair.source) && !net.contains(&pair.target));
                }
                prop_assert_eq!(choose(network, &seed, &taken), Some(pair));
            }
        }

        #[test]
        fn ipv6_networks_give_pairs_too(seed in "[a-z0-9-]{1,20}", bits in any::<u128>(), length in 8_u8..=127) {
            let network = IpNet::new(IpAddr::V6(Ipv6Addr::from_bits(bits)), length).unwrap().trunc();
            let pair = choose(network, &seed, &[]).unwrap();
            prop_assert!(network.contains(&pair.source) && network.contains(&pair.target));
        }
    }

    #[test]
    fn a_full_network_gives_nothing() {
        let network: IpNet = "10.0.0.0/30".parse().unwrap();
        let taken: Vec<IpNet> = vec![
            "10.0.0.1/32".parse().unwrap(),
            "10.0.0.2/32".parse().unwrap(),
        ];
        assert_eq!(choose(network, "hop-1", &taken), None);
    }

    #[test]
    fn a_route_to_everything_takes_nothing() {
        let taken: Vec<IpNet> = vec![
            "0.0.0.0/0".parse().unwrap(),
            "169.254.0.0/16".parse().unwrap(),
        ];
        assert!(choose(NETWORK, "hop-1", &taken).is_some());
    }
}
