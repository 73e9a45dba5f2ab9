//! The harness that proves a hop: real applications under real load, and a verdict that compares, id by id, what
//! clients were told with what the serving side has stored.

pub mod bench;
pub mod client;
pub mod command;
pub mod counter;
pub mod interrupt;
pub mod lab;
pub mod progress;
pub mod record;
pub mod report;
pub mod socket;
pub mod verdict;
