//! Hopgate's proxy: it forwards, holds and releases. It never decides who serves; a register does, and only
//! commands with the right epoch change it.
//!
//! Start with [`config::Config::load`] and [`Proxy::start`]; `docs/life-of-a-request.md` walks through the rest.

mod access_log;
mod acme;
mod buffer;
mod clock;
pub mod config;
pub mod control;
pub mod error;
mod forwarded;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod http;
pub mod ledger;
mod life;
mod limit;
mod listen;
mod metrics;
mod proxy;
mod route;
mod service;
mod snapshot;
mod stream;
mod tcp;
mod tls;
mod traces;
pub mod upstream;
mod worker;

pub use control::server::ControlError;
pub use life::reload::ReloadError;
pub use life::successor::SuccessionError;
pub use life::upgrade::UpgradeError;
pub use proxy::{Proxy, StartError, TakeOverError};
pub use service::StateError;
pub use tls::TlsError;
