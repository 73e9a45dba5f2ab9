//! quinn's settings, from ours.
//!
//! Where quinn's defaults do not suit a proxy that holds, they are replaced here and nowhere else: a client is
//! pinged long before its idle timeout (a held request is silence), windows and streams are those of HTTP/2, and
//! everything a client can make us keep before its handshake is over is bounded. Resumed clients send nothing
//! early (0-RTT): what can be replayed could be executed twice.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{EndpointConfig, IdleTimeout, ServerConfig, TransportConfig, VarInt};

use super::connection_id::{Place, PlacedIds};
use super::secrets::Secrets;
use crate::config::{Http2, Quic};

/// HTTP/3 needs three streams of a client's own (control and two of header compression); browsers open a few more
/// that mean nothing.
const UNI_STREAMS_MAX: u32 = 16;
/// A first flight is three packets with today's key exchanges; what comes beyond this before we look is lost.
const INCOMING_BYTES_MAX: u64 = 64 * 1024;
/// All first flights together, one worker.
const INCOMING_BYTES_TOTAL_MAX: u64 = 8 * 1024 * 1024;

/// A TLS profile that cannot be used: QUIC begins with AES-128-GCM, always.
#[derive(Debug, thiserror::Error)]
#[error("QUIC needs TLS 1.3 with AES-128-GCM, which this TLS profile leaves out")]
pub(crate) struct NoInitialSuite;

/// What one endpoint is told of itself.
pub(super) fn endpoint_config(secrets: &Secrets, place: Place) -> EndpointConfig {
    let resets = Arc::clone(&secrets.resets);
    let mut config = EndpointConfig::new(resets);
    let codec = Arc::clone(&secrets.codec);
    config.cid_generator(move || {
        Box::new(PlacedIds {
            codec: Arc::clone(&codec),
            place,
        })
    });
    config
}

/// What connections are told.
///
/// `tls` must offer `h3` and no early data.
///
/// # Errors
/// The TLS configuration cannot carry QUIC.
pub(crate) fn server_config(
    tls: &Arc<rustls::ServerConfig>,
    secrets: &Secrets,
    quic: &Quic,
    streams: &Http2,
) -> Result<ServerConfig, NoInitialSuite> {
    let crypto = QuicServerConfig::try_from(Arc::clone(tls)).map_err(|_| NoInitialSuite)?;
    let tokens = Arc::clone(&secrets.tokens);
    let mut config = ServerConfig::new(Arc::new(crypto), tokens);
    config
        .transport_config(Arc::new(transport(quic, streams)))
        .max_incoming(quic.handshakes_max)
        .incoming_buffer_size(INCOMING_BYTES_MAX)
        .incoming_buffer_size_total(INCOMING_BYTES_TOTAL_MAX);
    Ok(config)
}

fn transport(quic: &Quic, streams: &Http2) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::from(milliseconds(quic.idle_max))))
        .keep_alive_interval(Some(quic.keep_alive))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams.streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(UNI_STREAMS_MAX))
        .stream_receive_window(VarInt::from_u32(streams.stream_window_bytes))
        .receive_window(VarInt::from_u32(streams.connection_window_bytes))
        .send_window(quic.send_buffer_bytes_max)
        // Datagram frames are of no use to HTTP.
        .datagram_receive_buffer_size(None);
    transport
}

fn milliseconds(duration: Duration) -> VarInt {
    VarInt::from_u32(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX))
}
