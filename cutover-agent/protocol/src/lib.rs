//! What a hop *is*: identifiers, the hop machine, hold commands and the words two agents exchange.
//!
//! This crate is pure: it knows no sockets, no files, no clock and no runtime. Whatever it needs from the
//! world arrives as an argument, so every rule in it can be tested as a table or a property. CI checks that
//! it depends on nothing that could do input or output.

pub mod door;
pub mod hold;
pub mod hop;
pub mod id;
pub mod pattern;
pub mod plan;
pub mod schedule;
pub mod tunnel;
pub mod wire;
