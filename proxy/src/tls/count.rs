//! How the handshakes of a profile ended, for metrics.

use std::fmt::{self, Write};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// One counter for each way a handshake may end.
#[derive(Debug, Default)]
pub(crate) struct Handshakes([AtomicU64; 5]);

/// How a handshake ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Full,
    Resumed,
    /// The two could not agree, or the client is not trusted, or it does not trust us.
    Refused,
    /// The client took too long.
    Slow,
    /// The client left.
    Left,
}

impl End {
    const ALL: [Self; 5] = [
        Self::Full,
        Self::Resumed,
        Self::Refused,
        Self::Slow,
        Self::Left,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Resumed => "resumed",
            Self::Refused => "refused",
            Self::Slow => "slow",
            Self::Left => "left",
        }
    }
}

impl Handshakes {
    /// Counts one that came about.
    pub(crate) fn succeeded(&self, resumed: bool) {
        self.add(if resumed { End::Resumed } else { End::Full });
    }

    /// Counts one that did not.
    pub(crate) fn failed(&self, error: &io::Error) {
        self.add(match error.kind() {
            io::ErrorKind::InvalidData => End::Refused,
            io::ErrorKind::TimedOut => End::Slow,
            _ => End::Left,
        });
    }

    fn add(&self, end: End) {
        self.0[end as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes the counters of all profiles.
pub(crate) fn write_metrics<'p>(
    out: &mut String,
    profiles: impl Iterator<Item = (&'p str, &'p Handshakes)>,
) -> fmt::Result {
    const NAME: &str = "hopgate_tls_handshakes_total";
    let mut is_first = true;
    for (profile, handshakes) in profiles {
        if std::mem::take(&mut is_first) {
            writeln!(
                out,
                "# HELP {NAME} TLS handshakes with clients, by how they ended.\n# TYPE {NAME} counter"
            )?;
        }
        for end in End::ALL {
            let count = handshakes.0[end as usize].load(Ordering::Relaxed);
            let end = end.name();
            writeln!(out, "{NAME}{{profile={profile:?},end=\"{end}\"}} {count}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_is_counted_under_its_own_name() {
        let handshakes = Handshakes::default();
        handshakes.succeeded(false);
        handshakes.succeeded(true);
        for kind in [
            io::ErrorKind::InvalidData,
            io::ErrorKind::TimedOut,
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::ConnectionReset,
        ] {
            handshakes.failed(&kind.into());
        }
        let mut out = String::new();
        write_metrics(&mut out, [("public", &handshakes)].into_iter()).unwrap();
        for line in [
            "hopgate_tls_handshakes_total{profile=\"public\",end=\"full\"} 1",
            "hopgate_tls_handshakes_total{profile=\"public\",end=\"resumed\"} 1",
            "hopgate_tls_handshakes_total{profile=\"public\",end=\"refused\"} 1",
            "hopgate_tls_handshakes_total{profile=\"public\",end=\"slow\"} 1",
            "hopgate_tls_handshakes_total{profile=\"public\",end=\"left\"} 2",
        ] {
            assert!(out.lines().any(|written| written == line), "{out}");
        }
    }
}
