//! One check of one server: connects as requests do, asks what the configuration says, and judges the answer.
//!
//! Never longer than the check's timeout, never more than the bytes it has to see, and no state between two checks.

use std::borrow::Cow;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use super::{http, mysql};
use crate::config::{Check, HttpCheck, UpstreamConfig, UpstreamProtocol};
use crate::stream::Stream;
use crate::upstream::address::Endpoint;
use crate::upstream::connect::connect;
use crate::upstream::server::Core;

/// Why a check was bad.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Connection(#[source] io::Error),
    /// It ended too early.
    #[error("the server closed the connection without an answer")]
    Closed,
    /// Not in time.
    #[error("no answer within {0} ms")]
    TimedOut(u128),
    /// An answer with another status.
    #[error("status {0}")]
    Status(u16),
    /// The body is without what it should contain.
    #[error("status {0}, but the body lacks the expected text")]
    Body(u16),
    /// Not HTTP.
    #[error("the answer is not HTTP")]
    NotHttp,
    /// HTTP/2 failed.
    #[error("HTTP/2: {0}")]
    Http2(#[source] h2::Error),
    /// Not a database.
    #[error("the greeting is not that of MySQL or MariaDB")]
    NotMysql,
    /// A database that refuses.
    #[error("error {code}: {message}")]
    Mysql {
        /// As the database counts them.
        code: u16,
        /// As the database says it.
        message: String,
    },
}

/// A connection that a check uses.
pub(super) trait Wire: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Wire for T {}

/// Checks once; says what was found when that was good, and leaves the connection to be closed.
///
/// # Cancel safety
/// Dropping the future drops the connection.
pub(super) async fn probe(
    config: &UpstreamConfig,
    check: &Check,
    server: &Core,
    limit: Duration,
) -> (Result<String, CheckError>, Option<Stream>) {
    let mut stream = match connect(server, None, limit).await {
        Ok(stream) => stream,
        Err(error) => return (Err(CheckError::Connect(error)), None),
    };
    let endpoint = server.endpoint();
    let found = match (check, config.protocol) {
        (Check::Tcp, _) => Ok("connected".to_owned()),
        (Check::Mysql { user }, _) => mysql::greet(&mut stream, user.as_deref()).await,
        (Check::Http(check), UpstreamProtocol::Http1) => {
            http::ask_http1(&mut stream, check, &host(check, endpoint)).await
        }
        (Check::Http(check), UpstreamProtocol::Http2) => {
            let found = http::ask_http2(stream, check, &host(check, endpoint)).await;
            return (found, None);
        }
    };
    (found, Some(stream))
}

fn host<'h>(check: &'h HttpCheck, endpoint: &Endpoint) -> Cow<'h, str> {
    match (&check.host, endpoint) {
        (Some(host), _) => Cow::Borrowed(host),
        (None, Endpoint::Tcp(address)) => Cow::Owned(address.to_string()),
        (None, Endpoint::Unix(_)) => Cow::Borrowed("localhost"),
    }
}

pub(super) async fn send(stream: &mut impl Wire, bytes: &[u8]) -> Result<(), CheckError> {
    let sent = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    sent.await.map_err(CheckError::Connection)
}
