//! Addresses as proxies write them into X-Forwarded-For and Forwarded, and as we write them ourselves.
//!
//! Nothing that is not an address becomes one: `unknown`, names and obfuscated identifiers are nobody's address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address as text. Small, as every connection has one: IPv4 has room in it.
#[derive(Debug, Clone)]
pub(crate) enum AddressText {
    /// At most 15 bytes.
    Short {
        bytes: [u8; 15],
        count: u8,
    },
    Long(Box<str>),
}

impl AddressText {
    /// IPv4 inside IPv6 is shown as IPv4.
    pub(crate) fn of(address: IpAddr) -> Self {
        let address = match address.to_canonical() {
            IpAddr::V4(address) => address,
            IpAddr::V6(address) => return Self::Long(address.to_string().into()),
        };
        let (mut bytes, mut count) = ([0; 15], 0);
        for octet in address.octets() {
            if count > 0 {
                bytes[count] = b'.';
                count += 1;
            }
            for (least, unit) in [(100, 100), (10, 10), (0, 1)] {
                if octet >= least {
                    bytes[count] = b'0' + octet / unit % 10;
                    count += 1;
                }
            }
        }
        Self::Short {
            bytes,
            count: u8::try_from(count).unwrap_or(0),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { bytes, count } => &bytes[..usize::from(*count)],
            Self::Long(text) => text.as_bytes(),
        }
    }
}

/// An address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
pub(super) fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text.trim_ascii()).ok()?;
    if let Some(rest) = text.strip_prefix('[') {
        let (address, after) = rest.split_once(']')?;
        let is_port = after.is_empty() || after.strip_prefix(':').is_some_and(is_port);
        return is_port.then(|| address.parse::<Ipv6Addr>().ok().map(IpAddr::V6))?;
    }
    match text.split_once(':') {
        Some((address, port)) if is_port(port) => address.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        _ => text.parse().ok(),
    }
}

/// Digits, or an obfuscated port (RFC 7239, section 6): nobody needs to know which.
fn is_port(port: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let digits = port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit());
    !port.is_empty() && (digits || (port.starts_with('_') && port.bytes().all(is_allowed)))
}

/// Hands over the `for` of each element of a Forwarded field, `None` for an element without an address in it.
pub(super) fn clients(value: &[u8], to: &mut dyn FnMut(Option<IpAddr>)) {
    for element in split_unquoted(value, b',') {
        if element.trim_ascii().is_empty() {
            continue;
        }
        let named = split_unquoted(element, b';').find_map(|pair| {
            let pair = pair.trim_ascii();
            let (name, value) = pair.split_at(pair.iter().position(|byte| *byte == b'=')?);
            name.eq_ignore_ascii_case(b"for").then(|| &value[1..])
        });
        to(named.and_then(|node| address(unquoted(node))));
    }
}

/// Addresses have no character that needs an escape, so a value with one is none.
fn unquoted(value: &[u8]) -> &[u8] {
    let inner = value.strip_prefix(b"\"");
    let inner = inner.and_then(|value| value.strip_suffix(b"\""));
    inner.unwrap_or(value)
}

/// Parts between separators that are not inside quotes.
fn split_unquoted(value: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    value.split(move |byte| {
        let is_escaped = std::mem::take(&mut escaped);
        match byte {
            _ if is_escaped => {}
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => return *byte == separator && !quoted,
        }
        false
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_ports() {
        for (text, read) in [
            ("192.0.2.1", Some("192.0.2.1")),
            (" 192.0.2.1:8080 ", Some("192.0.2.1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("[2001:db8::1]:443", Some("2001:db8::1")),
            ("[2001:db8::1]:_x", Some("2001:db8::1")),
            ("192.0.2.1:", None),
            ("192.0.2.1:80:80", None),
            ("192.0.2", None),
            ("[192.0.2.1]", None),
            ("[2001:db8::1", None),
            ("[2001:db8::1]x", None),
            ("unknown", None),
            ("_hidden", None),
            ("", None),
        ] {
            let expected = read.map(|address| address.parse::<IpAddr>().unwrap());
            assert_eq!(address(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn the_clients_of_a_forwarded_field_are_found() {
        let read = |value: &str| {
            let mut found = Vec::new();
            clients(value.as_bytes(), &mut |client| {
                found.push(client.map_or("-".to_owned(), |client| client.to_string()));
            });
            found.join(" ")
        };
        assert_eq!(
            read("for=192.0.2.43, for=198.51.100.17"),
            "192.0.2.43 198.51.100.17"
        );
        assert_eq!(
            read("For=\"[2001:db8:cafe::17]:4711\""),
            "2001:db8:cafe::17"
        );
        assert_eq!(
            read("proto=http;by=203.0.113.43; for=192.0.2.60"),
            "192.0.2.60"
        );
        assert_eq!(
            read("for=\"_a,b\";host=\"x;for=192.0.2.9\", for=192.0.2.1"),
            "- 192.0.2.1"
        );
        assert_eq!(read("for=unknown,,proto=https"), "- -");
        assert_eq!(read("for=\"192.0.2.1"), "-");
    }

    proptest! {
        #[test]
        fn no_field_makes_the_readers_panic(value in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = address(&value);
            clients(&value, &mut |_| {});
        }

        #[test]
        fn an_address_is_read_as_it_is_shown(v6: u128, v4: u32) {
            for ip in [IpAddr::from(Ipv6Addr::from(v6)), IpAddr::from(Ipv4Addr::from(v4))] {
                let shown = AddressText::of(ip);
                prop_assert_eq!(address(shown.as_bytes()), Some(ip.to_canonical()));
            }
        }
    }
}
