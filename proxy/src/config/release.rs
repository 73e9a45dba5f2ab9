//! `[release]`: how the held are let through.

use std::time::Duration;

use toml::Table;

use super::load::{milliseconds, optional_ms};
use super::table::{Problem, Section};

pub(super) const KEYS: &[&str] = &[
    "window_first",
    "window_max",
    "patience_ms",
    "spread_ms",
    "backoff_ms_first",
    "backoff_ms_max",
    "grace_ms",
];

/// How the held are let through: one canary, then as many at once as a window says that follows what the owner bears.
#[derive(Debug, Clone)]
pub struct Release {
    /// Requests let through at once right after the canary was answered.
    pub window_first: u32,
    /// Most that the window grows to.
    pub window_max: u32,
    /// A request that has been let through for so long without an end is no longer counted as being under way.
    pub patience: Duration,
    /// The time over which the held are spread evenly; zero for none.
    pub spread: Duration,
    /// First pause after a connect error; doubles with each further one.
    pub backoff_first: Duration,
    /// Longest such pause.
    pub backoff_max: Duration,
    /// How long after opening a connect error still sends the request back to the held.
    pub grace: Duration,
}

pub(super) fn release(section: Option<Section<'_>>) -> Result<Release, Problem> {
    let empty = Table::new();
    let section = match section {
        Some(section) => section,
        None => Section::open("[release]".to_owned(), &empty, KEYS)?,
    };
    let count = |key, default| -> Result<u32, Problem> {
        let number = section.whole(key, 1..=1_000_000)?;
        Ok(number
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(default))
    };
    Ok(Release {
        window_first: count("window_first", 8)?,
        window_max: count("window_max", 1024)?,
        patience: milliseconds(&section, "patience_ms", 10_000)?,
        spread: optional_ms(&section, "spread_ms")?.unwrap_or_default(),
        backoff_first: milliseconds(&section, "backoff_ms_first", 20)?,
        backoff_max: milliseconds(&section, "backoff_ms_max", 500)?,
        grace: milliseconds(&section, "grace_ms", 5_000)?,
    })
}
