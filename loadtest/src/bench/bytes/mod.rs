//! `cargo lab bench bytes`: how fast trees cross an emulated link, beside rsync and iperf3 on the same link in the same
//! run. It never gives a rival less than it gives Hopgate: one source, one link, targets of their own, and every copy is
//! compared byte by byte afterwards.
//!
//! Entry points are [`run::run`] for the bench, [`agent::source`] and [`agent::target`] for the two ends of Hopgate's
//! own copies, which are processes of their own with the agent's library in them.

pub mod agent;
pub mod case;
pub mod database;
pub mod report;
pub mod rivals;
pub mod run;
pub mod set;
pub mod stage;
pub mod tree;
