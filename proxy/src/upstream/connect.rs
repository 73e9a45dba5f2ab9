//! The way to a server: the same for requests and for checks.

use std::io;

use super::address::Endpoint;
use crate::stream::{Socket, Stream};

/// Connects to a server.
///
/// # Cancel safety
/// Dropping the future drops the attempt.
pub(crate) async fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
    let socket = match endpoint {
        Endpoint::Tcp(address) => Socket::connect(*address).await,
        Endpoint::Unix(path) => Socket::connect_unix(path).await,
    };
    Ok(Stream::Plain(socket?))
}
