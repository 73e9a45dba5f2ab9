//! Upstream groups: which server takes a request, and whether it may.
//!
//! Begin with `Group::pick`. A `Directory` holds all groups of a configuration by name; a service that names a
//! plain address gets a group of one. Workers pick without locks; everything that changes a group (checks, names,
//! ejections, a reload) happens elsewhere and is swapped in. Nothing here holds or releases requests: that is the
//! gate's, and a group of one site never knows of the other.

mod address;
mod balance;
mod care;
mod connect;
mod directory;
mod eject;
mod group;
pub(crate) mod health;
mod moment;
mod resolve;
mod server;
mod sites;
mod status;
mod sticky;
#[cfg(test)]
mod tests;

pub use address::{Address, Endpoint};
pub(crate) use care::Care;
pub(crate) use connect::{Sender, connect};
pub(crate) use directory::Directory;
pub(crate) use eject::Outcome;
pub(crate) use group::{Group, PickKey};
pub use server::ServerId;
pub(crate) use server::{OpenConnection, Picked};
pub(crate) use sites::{Chosen, Sites};
pub(crate) use status::write_metrics;
