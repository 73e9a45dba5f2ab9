//! When a route applies: by host, path, method and header fields. All that are named must be true.
//!
//! Everything is compiled once; asking allocates nothing. A host is compared without its port, without a dot at its
//! end, and without case.

use regex::Regex;

use crate::http::fields::Fields;

/// What a route's rules look at.
#[derive(Clone, Copy)]
pub(crate) struct RequestView<'r> {
    pub(crate) method: &'r str,
    /// Without port; see [`bare_host`].
    pub(crate) host: &'r [u8],
    pub(crate) path: &'r super::Path<'r>,
    pub(crate) fields: &'r dyn Fields,
}

/// A host without port and final dot: `Example.org:80` and `example.org.` are `example.org`, apart from case.
pub(crate) fn bare_host(authority: &[u8]) -> &[u8] {
    let end = match authority {
        [b'[', ..] => authority
            .iter()
            .position(|byte| *byte == b']')
            .map(|at| at + 1),
        _ => authority.iter().position(|byte| *byte == b':'),
    };
    let host = &authority[..end.unwrap_or(authority.len())];
    host.strip_suffix(b".").unwrap_or(host)
}

/// All conditions of a route; an empty list or `None` asks for nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Condition {
    pub(crate) hosts: Vec<HostPattern>,
    pub(crate) path: Option<PathPattern>,
    pub(crate) methods: Vec<String>,
    pub(crate) fields: Vec<FieldPattern>,
    /// Names in a TLS greeting; of raw services, whose routes have nothing else.
    pub(crate) sni: Vec<HostPattern>,
    /// Places that a CONNECT may ask for; a route with any is for nothing else.
    pub(crate) connect: Vec<PlacePattern>,
}

impl Condition {
    /// Whether a request with this reading of its path fulfils all of it.
    pub(crate) fn is_met(&self, request: &RequestView<'_>, path: &str) -> bool {
        self.connect.is_empty()
            && self.fits_host(request.host)
            && (self.methods.is_empty()
                || self.methods.iter().any(|method| method == request.method))
            && self.path.as_ref().is_none_or(|pattern| pattern.fits(path))
            && self
                .fields
                .iter()
                .all(|pattern| pattern.fits(request.fields))
    }

    fn fits_host(&self, host: &[u8]) -> bool {
        self.hosts.is_empty() || self.hosts.iter().any(|pattern| pattern.fits(host))
    }
}

/// Which hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostPattern {
    /// This one.
    Exact(String),
    /// All below it, at any depth, and not itself; begins with the dot.
    Below(String),
}

impl HostPattern {
    /// Reads `example.org` or `*.example.org`; `None` for anything that no Host field can be.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, below) = match text.strip_prefix('*') {
            Some(rest) => (rest.strip_prefix('.')?, true),
            None => (text, false),
        };
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_name =
            !name.starts_with('.') && !name.ends_with('.') && name.bytes().all(is_allowed);
        let is_ipv6 = name
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok());
        if name.is_empty() || !(is_name || (is_ipv6 && !below)) {
            return None;
        }
        let name = name.to_ascii_lowercase();
        Some(if below {
            Self::Below(format!(".{name}"))
        } else {
            Self::Exact(name)
        })
    }

    /// Whether a bare host is meant.
    pub(crate) fn fits(&self, host: &[u8]) -> bool {
        match self {
            Self::Exact(name) => host.eq_ignore_ascii_case(name.as_bytes()),
            Self::Below(suffix) => {
                let start = host.len().checked_sub(suffix.len());
                start.is_some_and(|start| {
                    start > 0 && host[start..].eq_ignore_ascii_case(suffix.as_bytes())
                })
            }
        }
    }
}

/// A host and a port, as a CONNECT names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place<'p> {
    /// Without final dot; in brackets if it is an IPv6 address.
    pub(crate) host: &'p str,
    pub(crate) port: u16,
}

impl<'p> Place<'p> {
    /// Reads `example.org:443`; `None` without a host, or without a port that is one.
    pub(crate) fn parse(text: &'p str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let plain = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| plain && *port > 0)?;
        let bare = std::str::from_utf8(bare_host(host.as_bytes())).ok()?;
        // What looks like a second port is none.
        let is_whole = host.strip_suffix('.').unwrap_or(host) == bare;
        (!bare.is_empty() && is_whole).then_some(Self { host: bare, port })
    }
}

/// Which places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlacePattern {
    host: HostPattern,
    port: u16,
}

impl PlacePattern {
    /// Reads `example.org:443` or `*.example.org:443`; `None` for anything else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let Place { host, port } = Place::parse(text)?;
        let host = HostPattern::parse(host)?;
        Some(Self { host, port })
    }

    /// Whether this place is meant.
    pub(crate) fn fits(&self, place: Place<'_>) -> bool {
        self.port == place.port && self.host.fits(place.host.as_bytes())
    }
}

/// Which paths.
#[derive(Debug, Clone)]
pub(crate) enum PathPattern {
    /// This one, and what is below it: `/api` is `/api` and `/api/x`, not `/apix`.
    Prefix(String),
    /// Those in which it finds something.
    Regex(Regex),
}

impl PathPattern {
    pub(crate) fn fits(&self, path: &str) -> bool {
        match self {
            Self::Prefix(prefix) => below(prefix, path).is_some(),
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

/// What is left of a path below a prefix, if it is below it: nothing, or something that begins with a slash, unless
/// the prefix ends with one.
pub(crate) fn below<'p>(prefix: &str, path: &'p str) -> Option<&'p str> {
    let rest = path.strip_prefix(prefix)?;
    let at_border = rest.is_empty() || rest.starts_with('/') || prefix.ends_with('/');
    at_border.then_some(rest)
}

/// Which header fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldPattern {
    pub(crate) name: String,
    pub(crate) wanted: Wanted,
}

/// What is asked of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// One of its values is exactly this.
    Value(Vec<u8>),
    /// It is there.
    Present,
    /// It is not there.
    Absent,
}

impl FieldPattern {
    fn fits(&self, fields: &dyn Fields) -> bool {
        let (mut present, mut equal) = (false, false);
        fields.visit(&self.name, &mut |value| {
            present = true;
            equal |= matches!(&self.wanted, Wanted::Value(wanted) if wanted == value);
        });
        match self.wanted {
            Wanted::Value(_) => equal,
            Wanted::Present => present,
            Wanted::Absent => !present,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_host_is_compared_without_port_case_and_final_dot() {
        for (authority, host) in [
            ("example.org", "example.org"),
            ("example.org:8080", "example.org"),
            ("example.org.", "example.org"),
            ("example.org.:80", "example.org"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("", ""),
        ] {
            assert_eq!(bare_host(authority.as_bytes()), host.as_bytes());
        }
    }

    #[test]
    fn a_star_stands_for_at_least_one_label() {
        let star = HostPattern::parse("*.Example.org").unwrap();
        for (host, fits) in [
            ("a.example.org", true),
            ("A.B.EXAMPLE.ORG", true),
            ("example.org", false),
            (".example.org", false),
            ("badexample.org", false),
            ("a.example.org.evil.net", false),
        ] {
            assert_eq!(star.fits(host.as_bytes()), fits, "{host}");
        }
        let exact = HostPattern::parse("Example.org").unwrap();
        assert!(exact.fits(b"EXAMPLE.org") && !exact.fits(b"a.example.org"));
    }

    #[test]
    fn what_no_host_can_be_is_no_pattern() {
        for text in [
            "", "*", "*.", "*x.org", "a.*.org", "a b", "a:80", "a/b", ".a", "a.", "[::1", "*.[::1]",
        ] {
            assert_eq!(HostPattern::parse(text), None, "{text}");
        }
        assert!(HostPattern::parse("[::1]").is_some_and(|pattern| pattern.fits(b"[::1]")));
    }

    #[test]
    fn a_place_is_a_host_and_a_port_and_both_have_to_fit() {
        let exact = PlacePattern::parse("db.example.org:5432").unwrap();
        let below = PlacePattern::parse("*.example.org:443").unwrap();
        let literal = PlacePattern::parse("[::1]:443").unwrap();
        for (place, fitting) in [
            ("db.example.org:5432", Some(&exact)),
            ("DB.EXAMPLE.ORG.:5432", Some(&exact)),
            ("db.example.org:443", Some(&below)),
            ("[::1]:443", Some(&literal)),
            ("[::1]:5432", None),
            ("example.org:443", None),
            ("db.example.org.evil.net:5432", None),
        ] {
            let place = Place::parse(place).unwrap();
            for pattern in [&exact, &below, &literal] {
                assert_eq!(pattern.fits(place), fitting == Some(pattern), "{place:?}");
            }
        }
        for text in [
            "", ":443", "a", "a:", "a:0", "a:65536", "a:+1", "a:1:2", "a: 1", "[::1]", "[::1]x:1",
            ".:1",
        ] {
            assert_eq!(Place::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_prefix_ends_at_the_border_of_a_segment() {
        for (prefix, path, rest) in [
            ("/api", "/api", Some("")),
            ("/api", "/api/x", Some("/x")),
            ("/api", "/apix", None),
            ("/api", "/ap", None),
            ("/api/", "/api/x", Some("x")),
            ("/api/", "/api", None),
            ("/", "/anything", Some("anything")),
            ("/", "*", None),
        ] {
            assert_eq!(below(prefix, path), rest, "{prefix} {path}");
        }
    }

    proptest! {
        #[test]
        fn what_matches_a_prefix_begins_with_its_segments(
            prefix in "(/[ab]{1,2}){1,3}", path in "(/[ab]{0,3}){1,4}"
        ) {
            let segments = |text: &str| text.split('/').map(str::to_owned).collect::<Vec<_>>();
            let expected = segments(&path).starts_with(&segments(&prefix));
            prop_assert_eq!(below(&prefix, &path).is_some(), expected);
        }
    }
}
