//! The proxy as its users meet it: a real one on real loopback sockets, between scripted clients and origins.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod configuration;
mod deciding;
mod forwarding;
mod holding;
mod refusals;
mod restart;
mod smuggling;
mod world;
