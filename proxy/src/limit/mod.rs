//! Limits on what clients may ask for: how often, how many, how much, how slowly, and with how much of our memory.
//!
//! Everything here is told the time and decides; nothing here reads a clock, sleeps or answers. What was refused is
//! counted by its reason. A limit that is not configured must not cost a lock or an allocation.

pub(crate) mod address;
pub(crate) mod connections;
pub(crate) mod intake;
pub(crate) mod memory;
pub(crate) mod pace;
pub(crate) mod rate;
pub(crate) mod reason;

pub(crate) use reason::{Reason, Refusals};

use std::sync::Arc;

use crate::ledger::Ledger;

/// What all workers share to keep the limits of the whole proxy, and its ledger. It outlives every configuration.
#[derive(Debug, Clone)]
pub(crate) struct Guards {
    pub(crate) connections: Arc<connections::AddressConnections>,
    pub(crate) memory: Arc<memory::Memory>,
    pub(crate) ledger: Ledger,
}

impl Guards {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self {
            connections: connections::AddressConnections::new(),
            memory: Arc::default(),
            ledger,
        }
    }
}
