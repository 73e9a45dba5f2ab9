//! HTTP/2 to upstreams: connections that many requests share, and one request on one of them.
//!
//! A [`Session`] is an upstream connection like any other to the gate: counted from before its first packet until
//! the upstream has closed its end too. It takes no new request once its pool has let go of it, and ends with the
//! last one it has.

mod exchange;
mod message;
mod session;

pub(crate) use exchange::{Http2Exchange, Received};
pub(crate) use session::{Session, Slot};
