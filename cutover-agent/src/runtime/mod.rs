//! Container runtimes.

pub mod runc;
