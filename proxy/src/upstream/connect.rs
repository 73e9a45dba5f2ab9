//! The way to a server, from nothing to a connection that a request may use: the same for requests and for checks.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use super::address::{Address, Endpoint};
use super::server::Core;
use crate::config::ProxyVersion;
use crate::forwarded::Passed;
use crate::listen::proxy_protocol;
use crate::stream::{Socket, Stream};
use crate::tls::client::UpstreamTls;

/// What begins a connection on which no client stands behind us: version 1 with an unknown sender, version 2 with the
/// command LOCAL.
const NOBODY_V1: &[u8] = b"PROXY UNKNOWN\r\n";
const NOBODY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// How the servers of one entry of a group are spoken to.
#[derive(Debug)]
pub(crate) struct Way {
    /// As it is configured: servers behind a name are verified by that name.
    pub(super) address: Address,
    pub(super) tls: Option<UpstreamTls>,
    pub(super) proxy_protocol: Option<ProxyVersion>,
}

/// For whom a connection is made, for servers that want to know.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    pub(crate) client: SocketAddr,
    /// Where that client connected to, if that is known.
    pub(crate) listener: Option<SocketAddr>,
    /// The proxies that the connection has passed, ourselves included.
    pub(crate) passed: Passed,
}

/// Connects to a server, within `limit`.
///
/// # Errors
/// The server cannot be reached, is not who it should be, or the time is over; nothing of a request has left us.
///
/// # Cancel safety
/// Dropping the future drops the attempt.
pub(crate) async fn connect(
    server: &Core,
    sender: Option<&Sender>,
    limit: Duration,
) -> io::Result<Stream> {
    let way = server.way();
    let socket = match server.endpoint() {
        Endpoint::Tcp(address) => Socket::connect(*address).await,
        Endpoint::Unix(path) => Socket::connect_unix(path).await,
    };
    let mut stream = Stream::Plain(socket?);
    if let Some(version) = way.proxy_protocol {
        let header = match (sender, version) {
            (Some(sender), _) => {
                let Sender { passed, .. } = sender;
                proxy_protocol::header(version, sender.client, sender.listener, passed)
            }
            (None, ProxyVersion::V1) => NOBODY_V1.to_vec(),
            (None, ProxyVersion::V2) => NOBODY_V2.to_vec(),
        };
        stream.write_all(&header).await?;
    }
    match (&way.tls, stream) {
        // Boxed: a handshake is large, and a request that waits for a plain connection should not be.
        (Some(tls), Stream::Plain(socket)) => {
            Box::pin(tls.connect(socket, &way.address, limit)).await
        }
        (_, stream) => Ok(stream),
    }
}
