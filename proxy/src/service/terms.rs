//! What a gate has to know of a request: plain values, whatever protocol it came by.

use std::net::SocketAddr;
use std::time::Instant;

use cutover_protocol::hold::AtCut;

use super::budget::WhenFull;
use super::queue::Eviction;
pub(crate) use crate::control::seen::EndsBy;

/// Who asks, as far as it makes a difference to a hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Asker {
    /// A client.
    #[default]
    Client,
    /// The application itself: what is in flight may be waiting for it.
    Application,
}

/// In which order the held of a service leave; by arrival within a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ReleaseClass {
    /// Before the others.
    First,
    /// Like most.
    #[default]
    Usual,
    /// After the others.
    Last,
}

/// What something takes of the budget while it is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    /// Bytes of memory, its head and what else was read of it included.
    pub(crate) bytes: u32,
    /// Whether it counts as one of its client's address.
    pub(crate) of_address: OfAddress,
    /// What becomes of it when there is little room left.
    pub(crate) when_full: WhenFull,
}

/// Whether somebody's address stands for one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum OfAddress {
    /// It stands for many, or for none.
    #[default]
    Many,
    /// It does.
    One,
}

/// On what terms something is held, drained and released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Its place among the held.
    pub(crate) arrival: Instant,
    /// At whose end of the connection it comes from.
    pub(crate) client: SocketAddr,
    pub(crate) asker: Asker,
    /// What becomes of it when a drain takes too long.
    pub(crate) at_cut: AtCut,
    /// Who leaves before it.
    pub(crate) class: ReleaseClass,
    /// What it takes of the budget.
    pub(crate) weight: Weight,
    /// When it is answered by us if that is earlier than by the service's bound.
    pub(crate) end: Option<End>,
}

/// The end of somebody's time among the held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) at: Instant,
    pub(crate) by: EndsBy,
}

impl End {
    /// What becomes of it then.
    pub(super) const fn why(&self) -> Eviction {
        match self.by {
            EndsBy::Limit => Eviction::TooOld,
            EndsBy::Deadline => Eviction::OutOfTime,
        }
    }
}

impl Terms {
    /// Of a client's request that is waited for.
    pub(crate) const fn plain(arrival: Instant, client: SocketAddr) -> Self {
        Self {
            arrival,
            client,
            asker: Asker::Client,
            at_cut: AtCut::Wait,
            class: ReleaseClass::Usual,
            end: None,
            weight: Weight {
                bytes: 0,
                of_address: OfAddress::Many,
                when_full: WhenFull::Wait,
            },
        }
    }
}
