//! The lab: real applications in real containers on two sites that are network namespaces of one machine.

pub mod actors;
pub mod app;
pub mod bad_input;
pub mod by_hand;
pub mod container;
pub mod criu;
pub mod delay;
pub mod error;
pub mod evidence;
pub mod folders;
pub mod guest;
pub mod hop;
pub mod initrd;
pub mod kill;
pub mod link;
pub mod netns;
pub mod packages;
pub mod place;
pub mod process;
pub mod rootfs;
pub mod run_dir;
pub mod setup;
pub mod suite;
pub mod traffic;
pub mod watch;
pub mod world;
