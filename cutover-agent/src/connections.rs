//! Reads the kernel's tables of TCP connections (`/proc/net/tcp`, `tcp6`): who is connected.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// States in which a connection may still carry data: established, and closed by the peer only
/// (include/net/tcp_states.h).
const CARRYING: [&str; 2] = ["01", "08"];

/// The other addresses of connections that may carry data; lines that are none are passed over.
pub(crate) fn peers(table: &str) -> impl Iterator<Item = IpAddr> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(2);
        let (remote, state) = (fields.next()?, fields.next()?);
        let (address, _port) = remote.split_once(':')?;
        CARRYING.contains(&state).then(|| parse(address)).flatten()
    })
}

/// An address as the kernel prints it: 32-bit words in the machine's order.
fn parse(text: &str) -> Option<IpAddr> {
    let word = |from: usize| {
        let digits = text.get(from..from + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (index, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(index * 8)?);
            }
            // A listener for both families shows its IPv4 peers in IPv6's form.
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {

    use super::*;

    #[test]
    fn only_connections_that_carry_data_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
                     0: 00000000:0CEA 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n   \
                     1: 02002C0A:0CEA 03002C0A:9C40 01 00000000:00000000 02:00000A 00000000 0 0 2\n   \
                     2: 02002C0A:0CEA 050200C0:9C41 08 00000000:00000000 02:00000A 00000000 0 0 3\n   \
                     3: 02002C0A:0CEA 070200C0:9C42 06 00000000:00000000 02:00000A 00000000 0 0 4\n";
        let found: Vec<IpAddr> = peers(table).collect();
        assert_eq!(
            found,
            [IpAddr::from([10, 44, 0, 3]), IpAddr::from([192, 0, 2, 5])]
        );
    }

    #[test]
    fn an_ipv4_peer_of_an_ipv6_listener_is_an_ipv4_address() {
        assert_eq!(
            parse("0000000000000000FFFF0000050200C0"),
            Some(IpAddr::from([192, 0, 2, 5]))
        );
        assert_eq!(
            parse("B80D0120000000000000000001000000"),
            Some("2001:db8::1".parse().unwrap())
        );
        assert_eq!(parse("0"), None);
    }
}
