//! `[quic]`: bounds and times of HTTP/3 listeners.

use std::time::Duration;

use toml::Table;

use super::table::{Problem, Section};
use super::{ListenAddress, ListenConfig, Protocol};

/// Keys of `[quic]`.
pub(super) const KEYS: &[&str] = &[
    "idle_ms_max",
    "keep_alive_ms",
    "handshakes_max",
    "retry_from",
    "send_buffer_bytes_max",
    "alt_svc_ma_s",
];

/// Bounds and times of HTTP/3 listeners. Each has its TOML key's name, with the unit last.
#[derive(Debug, Clone)]
pub struct Quic {
    /// Silence of a client that does not even acknowledge our keep-alive.
    pub idle_max: Duration,
    /// Silence after which we ask for a sign of life; below half of `idle_max`.
    pub keep_alive: Duration,
    /// Handshakes under way per worker; one more is refused.
    pub handshakes_max: usize,
    /// From so many handshakes under way per worker on, new clients prove their address first (Retry).
    pub retry_from: usize,
    /// Bytes of all answers of one connection together that its client has not acknowledged.
    pub send_buffer_bytes_max: u64,
    /// How long clients may remember that we speak HTTP/3, in seconds; zero says nothing to them.
    pub alt_svc_ma_s: u32,
}

/// Reads the table, or takes every default.
pub(super) fn quic(section: Option<Section<'_>>) -> Result<Quic, Problem> {
    let empty = Table::new();
    let section = match section {
        Some(section) => section,
        None => Section::open("[quic]".to_owned(), &empty, KEYS)?,
    };
    let whole = |key, range, default: u32| -> Result<u32, Problem> {
        let number = section.whole(key, range)?;
        Ok(number
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(default))
    };
    let idle_ms = whole("idle_ms_max", 2_000..=600_000, 30_000)?;
    // Half of the idle time leaves room for a ping that is lost; routers forget a UDP flow after 30 s of silence,
    // some after 15 s.
    let keep_alive_most = (idle_ms / 2).min(15_000);
    let keep_alive_ms = whole(
        "keep_alive_ms",
        100..=i64::from(keep_alive_most),
        keep_alive_most.min(10_000),
    )?;
    let handshakes_max = whole("handshakes_max", 1..=65_536, 1_024)?;
    // What one connection may have under way: 80 Mbit/s at 100 ms.
    let send_buffer_bytes_max = whole("send_buffer_bytes_max", 65_536..=1 << 30, 1 << 20)?;
    let retry_from = whole("retry_from", 0..=65_536, 64)?;
    Ok(Quic {
        idle_max: Duration::from_millis(u64::from(idle_ms)),
        keep_alive: Duration::from_millis(u64::from(keep_alive_ms)),
        handshakes_max: usize::try_from(handshakes_max).unwrap_or(usize::MAX),
        retry_from: usize::try_from(retry_from).unwrap_or(usize::MAX),
        send_buffer_bytes_max: u64::from(send_buffer_bytes_max),
        alt_svc_ma_s: whole("alt_svc_ma_s", 0..=31_536_000, 86_400)?,
    })
}

/// Whether a listener speaks HTTP/3 as well.
pub(super) fn http3(
    listener: &Section<'_>,
    address: &ListenAddress,
    tls: Option<&str>,
) -> Result<bool, Problem> {
    if !listener.flag("http3")?.unwrap_or(false) {
        return Ok(false);
    }
    if tls.is_none() {
        listener.refuse_useless(&["http3"], "\"tls\"")?;
    }
    if matches!(address, ListenAddress::Unix(_)) {
        listener.refuse_useless(&["http3"], "an address and a port")?;
    }
    Ok(true)
}

/// Refuses HTTP/3 where the service does not speak HTTP.
pub(super) fn fits(
    service: &Section<'_>,
    protocol: Protocol,
    listen: &[ListenConfig],
) -> Result<(), Problem> {
    if protocol == Protocol::Http || !listen.iter().any(|listen| listen.http3) {
        return Ok(());
    }
    Err(Problem::Useless {
        place: service.place().to_owned(),
        key: "http3",
        needs: "protocol = \"http\"",
    })
}
