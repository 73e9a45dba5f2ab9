//! The name a TLS client asks for, read without taking a byte off the connection: raw services that pass TLS through
//! choose an upstream by it. The handshake itself is between the client and that upstream.

use std::io;

use rustls::server::Acceptor;

use crate::stream::{Look, Socket};

/// Longest ClientHello we look at: one record (RFC 8446, section 5.1) and its header.
const HELLO_BYTES_MAX: usize = 16 * 1024 + 5;

/// What a client begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// A ClientHello for this name, in lower case.
    Named(String),
    /// A ClientHello that names nobody.
    Nameless,
    /// Something else.
    Foreign,
}

impl Greeting {
    /// The name, if there is one.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Nameless | Self::Foreign => None,
        }
    }
}

/// Reads how a client begins.
///
/// # Errors
/// What the socket says.
///
/// # Cancel safety
/// Yes: nothing is taken off the connection.
pub(crate) async fn look(socket: &Socket) -> io::Result<Greeting> {
    let mut room = vec![0; HELLO_BYTES_MAX];
    socket.look(&mut room, parse).await
}

/// What the bytes so far say.
pub(crate) fn parse(bytes: &[u8]) -> Look<Greeting> {
    let mut acceptor = Acceptor::default();
    let mut unread = bytes;
    while !unread.is_empty() {
        // From memory: it takes what it has room for, and fails on what is no TLS.
        match acceptor.read_tls(&mut unread) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Look::Seen(Greeting::Foreign),
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let name = hello.server_name().map(str::to_ascii_lowercase);
                return Look::Seen(name.map_or(Greeting::Nameless, Greeting::Named));
            }
            Err(_) => return Look::Seen(Greeting::Foreign),
        }
    }
    if bytes.len() < HELLO_BYTES_MAX {
        Look::Further
    } else {
        Look::Seen(Greeting::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn hello(name: &'static str) -> Vec<u8> {
        let config = ClientConfig::builder()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_name_is_read_once_the_hello_is_whole_and_not_before() {
        let bytes = hello("DB.example.org");
        for cut in 0..bytes.len() {
            assert!(
                matches!(parse(&bytes[..cut]), Look::Further),
                "cut at {cut}"
            );
        }
        assert!(
            matches!(parse(&bytes), Look::Seen(Greeting::Named(name)) if name == "db.example.org")
        );
    }

    #[test]
    fn a_hello_without_a_name_is_told_from_what_is_no_hello() {
        assert!(matches!(
            parse(&hello("192.0.2.7")),
            Look::Seen(Greeting::Nameless)
        ));
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"SSH-2.0-OpenSSH_9.2\r\n",
            &[0x16, 3, 1, 0xff, 0xff],
        ] {
            assert!(
                matches!(parse(bytes), Look::Seen(Greeting::Foreign)),
                "{bytes:?}"
            );
        }
    }
}
