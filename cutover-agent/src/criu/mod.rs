//! CRIU as this project uses it: run by the runtime, parked by our shim between the two, cured when it dies.

pub mod cure;
pub mod features;
pub mod park;
pub(crate) mod protobuf;
pub mod remaps;
mod rpc;
pub mod shim;
pub mod stand_in;
pub mod stats;
