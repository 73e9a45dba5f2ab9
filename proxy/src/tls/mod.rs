//! TLS on both sides of the proxy: what a listener shows its clients, how an upstream is verified, and the bytes
//! between a socket and a session.
//!
//! A session is made by rustls ([`handshake`]); once it stands, its keys move into [`session`], which is all that an
//! idle connection keeps. Nothing here decides what is forwarded, and nothing accepts an upstream unverified.

mod certificates;
pub(crate) mod client;
pub(crate) mod count;
mod files;
mod handshake;
pub(crate) mod profile;
mod record;
mod session;
pub(crate) mod stream;
mod tickets;
mod watch;

pub(crate) use certificates::{facts, subject};
pub use files::TlsError;
pub(crate) use session::SessionError;

#[cfg(test)]
mod tests;
