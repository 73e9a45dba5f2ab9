//! The proxy as its users meet it: a real one on real loopback sockets, between scripted clients and origins.

mod configuration;
mod forwarding;
mod holding;
mod refusals;
mod restart;
mod world;
