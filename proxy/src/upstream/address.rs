//! Where servers are: as an operator writes it, and as a connection needs it. Never resolves anything.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest path of a unix socket, in bytes: `sun_path` has 108, one of them for the zero at its end.
const UNIX_PATH_BYTES_MAX: usize = 107;
/// Longest name in DNS, in bytes, and longest label in it (RFC 1035, section 2.3.4).
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// What the configuration names as a server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `10.0.0.1:80` or `[fd00::1]:80`.
    Socket(SocketAddr),
    /// `unix:/run/app.sock`.
    Unix(PathBuf),
    /// `app.internal:80`: every A and AAAA record is a server.
    Name {
        /// Without a dot at its end unless one was written.
        name: String,
        /// Of every server behind the name.
        port: u16,
    },
    /// `srv:_http._tcp.app.internal`: every SRV record is a server, with its own port and weight.
    Service(String),
}

impl Address {
    /// What [`Address::parse`] accepts, for messages.
    pub const WANTED: &'static str = "an address such as 10.0.0.1:80, app.internal:80, srv:_http._tcp.app.internal or unix:/run/app.sock";

    /// Reads an address as written in a configuration; `None` when it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let usable = path.starts_with('/') && path.len() <= UNIX_PATH_BYTES_MAX;
            return (usable && !path.contains('\0')).then(|| Self::Unix(PathBuf::from(path)));
        }
        if let Some(name) = text.strip_prefix("srv:") {
            return is_name(name).then(|| Self::Service(name.to_owned()));
        }
        if let Ok(address) = text.parse() {
            return Some(Self::Socket(address));
        }
        let (name, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let name = is_name(name).then(|| name.to_owned())?;
        Some(Self::Name { name, port })
    }

    /// Where to connect, if no name has to be resolved for that.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        match self {
            Self::Socket(address) => Some(Endpoint::Tcp(*address)),
            Self::Unix(path) => Some(Endpoint::Unix(path.as_path().into())),
            Self::Name { .. } | Self::Service(_) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Name { name, port } => write!(f, "{name}:{port}"),
            Self::Service(name) => write!(f, "srv:{name}"),
        }
    }
}

/// Where one server accepts connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Over TCP.
    Tcp(SocketAddr),
    /// At a path.
    Unix(Arc<Path>),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A name for DNS. One that ends in a number is a mistyped address: no top-level domain is a number.
fn is_name(text: &str) -> bool {
    let labels = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        let letters = label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        letters && !label.is_empty() && label.len() <= LABEL_BYTES_MAX
    };
    let last = labels.rsplit('.').next().unwrap_or_default();
    let numeric = last.bytes().all(|byte| byte.is_ascii_digit());
    labels.len() <= NAME_BYTES_MAX && labels.split('.').all(label) && !numeric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_address_reads_and_prints_alike() {
        for text in [
            "10.0.0.1:80",
            "[fd00::1]:443",
            "unix:/run/app.sock",
            "app.internal:80",
            "app.internal.:80",
            "localhost:8080",
            "srv:_http._tcp.app.internal",
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!(address.to_string(), text);
            let literal = text.starts_with("unix") || text.parse::<SocketAddr>().is_ok();
            assert_eq!(
                address.endpoint().map(|endpoint| endpoint.to_string()),
                literal.then(|| text.to_owned())
            );
        }
    }

    #[test]
    fn what_looks_like_a_mistake_is_no_address() {
        for text in [
            "app.internal",
            "app.internal:0",
            "app.internal:65536",
            "10.0.0:80",
            "10.0.0.1.5:80",
            "10.0.0.300:80",
            "unix:app.sock",
            "unix:",
            "srv:",
            "srv:a b",
            "a..b:80",
            "https://app.internal:80",
            ":80",
            "",
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
        assert_eq!(Address::parse(&format!("{}:80", "a".repeat(64))), None);
        assert_eq!(Address::parse(&format!("unix:/{}", "a".repeat(107))), None);
    }
}
