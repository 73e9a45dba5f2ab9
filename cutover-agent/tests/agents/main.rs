//! Two agents on loopback, with real certificates, sockets and trees.
#![allow(clippy::unwrap_used)] // a test that cannot build its world has nothing better to do

mod cable;
mod clouds;
mod linked;
mod names;
mod patched;
mod peer;
mod priority;
mod property;
mod repeats;
mod resume;
mod sharing;
mod speed;
mod transfer;
mod tunnel;
mod world;
mod woven;
