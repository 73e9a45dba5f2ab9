//! The benchmark: HAProxy, nginx and Hopgate in one run, one after the other in each round, each on the same core.
//!
//! Entry points are [`run::run`] for `cargo lab bench proxy`, [`soak::run`] for `cargo lab bench soak` and
//! [`bytes::run::run`] for `cargo lab bench bytes` and [`freeze::run`] for `cargo lab bench freeze`. It never handicaps a
//! peer: what is set for one proxy is set for all, and every setting lies below `configs/lab/bench`.

pub mod bytes;
pub mod case;
pub mod certificate;
pub mod client;
pub mod cores;
pub mod figures;
pub mod freeze;
pub mod hold;
pub mod http2;
pub mod measure;
pub mod origin;
pub mod peer;
pub mod plan;
pub mod report;
pub mod run;
pub mod soak;
pub mod template;
pub mod tools;
pub mod usage;
pub mod verdict;
