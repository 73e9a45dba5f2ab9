//! The agent on each side of a hop. The source's drives; the target's obeys; the register decides.

pub mod cgroup;
pub mod config;
mod connections;
pub mod control;
pub mod criu;
pub mod driver;
pub mod durable;
pub mod engine;
pub mod fence;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod lender;
pub mod memory;
pub mod names;
mod open_files;
pub mod peer;
pub mod pki;
pub mod preflight;
pub mod probe;
pub mod proxy;
pub mod report;
pub mod runtime;
pub mod serve;
pub mod sockets;
pub mod target;
pub mod tls;
pub mod transfer;
pub mod tunnel;
