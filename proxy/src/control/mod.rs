//! The control socket: who commands the gates, by which words, and who did it.

pub mod client;
pub(crate) mod commands;
pub(crate) mod events;
mod look;
mod peer;
pub mod seen;
pub(crate) mod server;
mod together;
pub mod words;
