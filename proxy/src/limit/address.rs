//! Whom a limit by address counts as one client: an IPv4 address, or the 64-bit network of an IPv6 address, because
//! a single IPv6 customer owns at least that and could use a new address for every request (RFC 6177).

use std::net::IpAddr;

/// One client, as limits see it. IPv4 inside IPv6 is the IPv4 client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AddressKey(u64);

/// The upper half of an IPv6 multicast address: no client has it, so IPv4 clients can.
const IPV4: u64 = 0xffff_ffff_0000_0000;

impl AddressKey {
    /// The client an address belongs to.
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(IPV4 | u64::from(address.to_bits())),
            IpAddr::V6(address) => Self((address.to_bits() >> 64) as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_is_one_client_and_an_ipv4_address_another() {
        let key = |text: &str| AddressKey::of(text.parse().unwrap());
        assert_eq!(key("2001:db8:0:1::1"), key("2001:db8:0:1:ffff::2"));
        assert_ne!(key("2001:db8:0:1::1"), key("2001:db8:0:2::1"));
        assert_eq!(key("::ffff:192.0.2.1"), key("192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert_ne!(key("0.0.0.1"), key("::1"));
    }
}
