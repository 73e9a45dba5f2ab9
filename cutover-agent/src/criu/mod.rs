//! CRIU as this project uses it: run by the runtime, parked by our hook, cured when it dies.

pub mod cure;
pub mod features;
pub mod hook;
pub mod log;
pub mod park;
mod protobuf;
pub mod remaps;
pub mod stand_in;
pub(crate) mod start;
pub mod stats;
