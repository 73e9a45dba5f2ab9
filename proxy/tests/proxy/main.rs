//! The proxy as its users meet it: a real one on real loopback sockets, between scripted clients and origins.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod acme;
mod authority;
mod balancing;
mod client2;
mod client3;
mod configuration;
mod deadlines;
mod deciding;
mod draining;
mod endings;
mod forwarding;
mod front_checks;
mod hashing;
mod held_streams;
mod held_upgrade;
mod holding;
mod http2;
mod http2_upstream;
mod http3;
mod killed;
mod limits;
mod listening;
mod looking;
mod process;
mod racing;
mod refusals;
mod releasing;
mod reload;
mod restart;
mod routes;
mod seed;
mod server_names;
mod servers;
mod smuggling;
mod stage2;
mod streams;
mod supervisor;
mod timeouts;
mod tls;
mod together;
mod traces;
mod tunnels;
mod upgrade;
mod world;
