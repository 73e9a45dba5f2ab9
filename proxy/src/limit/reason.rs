//! Why clients are refused, and how often: one counter a reason, in metrics as `hopgate_refused_total`.
//!
//! A reason is for whoever reads a graph; whoever was refused reads the error's own words. Nothing is refused
//! without being counted here.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a request or a connection was refused by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// More requests than its rate allows.
    Rate,
    /// More connections from one address than allowed.
    AddressConnections,
    /// The proxy is short of memory.
    Memory,
    /// A body longer than allowed.
    BodyBytes,
    /// A body that came too slowly, or not at all.
    BodySlow,
    /// A body that cannot be understood.
    Body,
    /// A head longer than allowed.
    HeadBytes,
    /// A head with too many fields.
    HeadFields,
    /// A head that came too slowly.
    HeadSlow,
    /// A head that cannot be understood, or could be in two ways.
    Head,
    /// A path that could be read in two ways.
    Path,
    /// A TLS client of a raw service asks for a name that is not served.
    ServerName,
    /// A client of HTTP/2 or 3 that resets, or goes on with a head, without end; its connection is ended.
    Flood,
    /// More streams at once on a connection of HTTP/2 than allowed.
    Streams,
    /// A client of HTTP/2 or 3 that breaks the rules of frames; its connection is ended.
    Protocol,
    /// More handshakes of QUIC under way than allowed.
    Handshakes,
    /// A balancer that must say for whom it comes, and does not.
    ProxyProtocol,
    /// Too many are held.
    HeldFull,
    /// Too many of one address are held.
    HeldOfAddress,
    /// Held for too long.
    HeldTooLong,
    /// Held until its client had no use for an answer any more.
    OutOfTime,
    /// In flight when a drain had taken as long as it may.
    Cut,
    /// A request that has passed this proxy before.
    Loop,
    /// The proxy is going away.
    Shutdown,
}

impl Reason {
    /// All of them, in the order of their declaration.
    pub(crate) const ALL: [Self; 24] = [
        Self::Rate,
        Self::AddressConnections,
        Self::Memory,
        Self::BodyBytes,
        Self::BodySlow,
        Self::Body,
        Self::HeadBytes,
        Self::HeadFields,
        Self::HeadSlow,
        Self::Head,
        Self::Path,
        Self::ServerName,
        Self::Flood,
        Self::Streams,
        Self::Protocol,
        Self::Handshakes,
        Self::ProxyProtocol,
        Self::HeldFull,
        Self::HeldOfAddress,
        Self::HeldTooLong,
        Self::OutOfTime,
        Self::Cut,
        Self::Loop,
        Self::Shutdown,
    ];

    /// Its label in metrics.
    #[must_use]
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::AddressConnections => "address_connections",
            Self::Memory => "memory",
            Self::BodyBytes => "body_bytes",
            Self::BodySlow => "body_slow",
            Self::Body => "body",
            Self::HeadBytes => "head_bytes",
            Self::HeadFields => "head_fields",
            Self::HeadSlow => "head_slow",
            Self::Head => "head",
            Self::Path => "path",
            Self::ServerName => "server_name",
            Self::Flood => "flood",
            Self::Streams => "streams",
            Self::Protocol => "protocol",
            Self::Handshakes => "handshakes",
            Self::ProxyProtocol => "proxy_protocol",
            Self::HeldFull => "held_full",
            Self::HeldOfAddress => "held_of_address",
            Self::HeldTooLong => "held_too_long",
            Self::OutOfTime => "out_of_time",
            Self::Cut => "cut",
            Self::Loop => "loop",
            Self::Shutdown => "shutdown",
        }
    }
}

/// One counter a reason.
#[derive(Debug, Default)]
pub(crate) struct Refusals([AtomicU64; Reason::ALL.len()]);

impl Refusals {
    /// Counts one.
    pub(crate) fn count(&self, reason: Reason) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many so far.
    pub(crate) fn total(&self, reason: Reason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_and_a_label_of_its_own() {
        let refusals = Refusals::default();
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            refusals.count(reason);
        }
        assert!(
            Reason::ALL
                .iter()
                .all(|reason| refusals.total(*reason) == 1)
        );
        let mut labels = Reason::ALL.map(Reason::label);
        labels.sort_unstable();
        assert!(
            labels.windows(2).all(|pair| pair[0] != pair[1]),
            "{labels:?}"
        );
    }
}
