//! `cargo lab bench hold`: the exactly-once harness. Origins write down every id they execute, thousands of clients of
//! every protocol write down what they were told, the proxy holds them all through its control socket, the service is
//! moved to the other site and released. What came of each request, what it cost and how long it took is compared, and
//! set beside the published arrangement of HAProxy and a holding application.
//!
//! It never asks the proxy whether all went well.

pub mod case;
pub mod client;
pub mod clock;
pub mod control;
pub mod crash;
pub mod crowd;
pub mod idle;
pub mod judge;
pub mod leavers;
pub mod origin;
pub mod plan;
pub mod published;
pub mod report;
pub mod run;
pub mod scene;
pub mod site;
pub mod stage;
