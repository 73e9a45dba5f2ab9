//! `[http2]`: how much of it a client may have, and how much of it is too much.

use std::time::Duration;

use toml::Table;

use super::table::{Problem, Section};

pub(super) const KEYS: &[&str] = &[
    "streams_max",
    "header_list_bytes_max",
    "stream_window_bytes",
    "connection_window_bytes",
    "frame_bytes_max",
    "send_buffer_bytes_max",
    "resets_pending_max",
    "resets_local_max",
    "resets_remembered_max",
    "upstream_ping_ms",
];

/// Bounds of one HTTP/2 connection.
#[derive(Debug, Clone)]
pub struct Http2 {
    /// Streams at once; the client is told, and one more is refused.
    pub streams_max: u32,
    /// Longest header list of a request, counted as RFC 9113 (section 6.5.2) does.
    pub header_list_bytes_max: u32,
    /// Bytes of one request's body that may come before we have passed any on.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection together.
    pub connection_window_bytes: u32,
    /// Longest frame a client may send.
    pub frame_bytes_max: u32,
    /// Bytes of one answer that may wait for the client to take them.
    pub send_buffer_bytes_max: usize,
    /// Streams that a client may reset before we have looked at them; one more ends the connection.
    pub resets_pending_max: usize,
    /// Streams that we may have to reset for a client's mistakes before that ends the connection.
    pub resets_local_max: usize,
    /// Streams we have reset and still expect frames of.
    pub resets_remembered_max: usize,
    /// How often an upstream with requests under way is asked for a sign of life, and how long it has to give it.
    pub upstream_ping: Duration,
}

/// Reads the table, or takes every default.
pub(super) fn http2(section: Option<Section<'_>>) -> Result<Http2, Problem> {
    let empty = Table::new();
    let section = match section {
        Some(section) => section,
        None => Section::open("[http2]".to_owned(), &empty, KEYS)?,
    };
    let number = |key, least: u32, most: u32, default: u32| -> Result<u32, Problem> {
        let number = section.whole(key, i64::from(least)..=i64::from(most))?;
        Ok(number
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(default))
    };
    let count = |key, most: u32, default: u32| -> Result<usize, Problem> {
        number(key, 1, most, default).map(|count| count as usize)
    };
    // Windows and frames: the ranges of RFC 9113, sections 6.5.2 and 6.9.1.
    Ok(Http2 {
        streams_max: number("streams_max", 1, 1 << 20, 128)?,
        header_list_bytes_max: number("header_list_bytes_max", 1024, 1 << 20, 32 * 1024)?,
        stream_window_bytes: number("stream_window_bytes", 1024, (1 << 31) - 1, 64 * 1024)?,
        connection_window_bytes: number("connection_window_bytes", 65_535, (1 << 31) - 1, 1 << 20)?,
        frame_bytes_max: number("frame_bytes_max", 16_384, (1 << 24) - 1, 16_384)?,
        send_buffer_bytes_max: count("send_buffer_bytes_max", 1 << 30, 64 * 1024)?,
        resets_pending_max: count("resets_pending_max", 1 << 20, 20)?,
        resets_local_max: count("resets_local_max", 1 << 20, 128)?,
        resets_remembered_max: count("resets_remembered_max", 1 << 20, 32)?,
        upstream_ping: Duration::from_millis(u64::from(number(
            "upstream_ping_ms",
            10,
            3_600_000,
            10_000,
        )?)),
    })
}
