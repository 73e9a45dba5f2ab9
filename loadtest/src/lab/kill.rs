//! Sudden death while the source is frozen: of an agent, or of CRIU itself.

use std::fmt;
use std::fs;
use std::path::Path;

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::actors::Actors;
use crate::lab::error::Result;
use crate::lab::netns;
use crate::lab::world::World;
use crate::progress::Progress;

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Victim {
    /// The agent that drives the hop.
    SourceAgent,
    /// The agent that receives it.
    TargetAgent,
    /// The CRIU that holds the frozen source.
    Criu,
    /// The process that keeps that CRIU parked.
    Shim,
}

impl fmt::Display for Victim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::SourceAgent => "source agent",
            Self::TargetAgent => "target agent",
            Self::Criu => "CRIU process",
            Self::Shim => "shim of a dump",
        })
    }
}

/// Kills the victim as a power failure would.
pub fn strike(victim: Victim, world: &World, actors: &mut Actors, progress: &Progress) {
    progress.say(format!("the source is frozen: kill -9 of the {victim}"));
    match victim {
        Victim::SourceAgent => actors.agents[0].kill(),
        Victim::TargetAgent => actors.agents[1].kill(),
        Victim::Criu => kill_all(criu_of(world)),
        Victim::Shim => kill_all(shims_of(world)),
    }
}

fn kill_all(pids: Vec<Pid>) {
    for pid in pids {
        // It may have ended meanwhile.
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn criu_of(world: &World) -> Vec<Pid> {
    processes(world, |pid| {
        let line = read(pid, "cmdline");
        read(pid, "comm").starts_with(b"criu") || line.windows(5).any(|part| part == b"/criu")
    })
}

fn shims_of(world: &World) -> Vec<Pid> {
    processes(world, |pid| {
        let line = read(pid, "cmdline");
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"shim") && words.any(|word| word == b"dump")
    })
}

fn read(pid: i32, name: &str) -> Vec<u8> {
    fs::read(Path::new("/proc").join(pid.to_string()).join(name)).unwrap_or_default()
}

/// Only processes of this run: another lab's are none of our business.
fn processes(world: &World, is_wanted: impl Fn(i32) -> bool) -> Vec<Pid> {
    let ours = netns::processes(world.run.names)
        .into_iter()
        .filter(|pid| is_wanted(*pid));
    ours.filter_map(Pid::from_raw).collect()
}

/// Starts a killed agent again and has both agents settle what is unfinished.
///
/// # Errors
/// When an agent does not come up again.
pub fn recover(
    victim: Victim,
    world: &World,
    actors: &mut Actors,
    progress: &Progress,
) -> Result<()> {
    match victim {
        Victim::SourceAgent => actors.restart_agent(world, 0)?,
        Victim::TargetAgent => actors.restart_agent(world, 1)?,
        Victim::Criu | Victim::Shim => {}
    }
    for site in [1, 0] {
        match actors.recover(site) {
            Ok(said) => progress.say(format!(
                "recover at the {}: {}",
                netns::SITES[site],
                said.trim()
            )),
            Err(error) => progress.say(format!(
                "recover at the {} failed: {error}",
                netns::SITES[site]
            )),
        }
    }
    Ok(())
}
