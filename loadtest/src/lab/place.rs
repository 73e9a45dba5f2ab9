//! Where a hop runs: on this host where CRIU can, otherwise in a guest, otherwise here without checkpoints.

use clap::ValueEnum;
use cutover_protocol::hop::Phase;

use crate::lab::app::App;
use crate::lab::error::{LabError, Result};
use crate::lab::folders::Folders;
use crate::lab::hop::{self, Again, Engine, Script};
use crate::lab::kill::Victim;
use crate::lab::link::Link;
use crate::lab::setup::{self, Checkpoints};
use crate::lab::tunnel::Tunnel;
use crate::lab::writes::Writes;
use crate::lab::{guest, packages, programs};
use crate::progress::Progress;
use crate::report::Report;

/// Where a hop runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// On the host where CRIU can checkpoint, otherwise in a guest.
    Auto,
    /// On this machine.
    Host,
    /// In a virtual machine the lab boots.
    Guest,
}

/// What a run was asked for, before it is known where it can be done.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The application.
    pub app: App,
    /// How many clients.
    pub clients: usize,
    /// What their writes do to memory.
    pub writes: Writes,
    /// The engine.
    pub engine: Engine,
    /// The place.
    pub place: Place,
    /// The link.
    pub link: Link,
    /// The tunnel over it.
    pub tunnel: Tunnel,
    /// Phase made to fail.
    pub fault: Option<String>,
    /// Process killed while the source is frozen.
    pub kill: Option<Victim>,
    /// Phases that the link is cut in.
    pub cut: Vec<Phase>,
    /// Whether a second hop follows.
    pub again: Again,
}

/// Fulfils the wish at the best place there is.
///
/// # Errors
/// When the lab itself could not do its part.
pub fn run(wish: &Wish, folders: &Folders, progress: &Progress) -> Result<Report> {
    setup::root()?;
    programs::build(folders, progress)?;
    if wish.tunnel == Tunnel::Ipsec {
        packages::install(packages::IPSEC, progress)?;
    }
    match (wish.place, wish.engine) {
        (Place::Guest, _) => guest::run(wish, folders, progress),
        (Place::Host, _) | (Place::Auto, Engine::Restart) => {
            on_host(wish, wish.engine, folders, progress)
        }
        (Place::Auto, Engine::Criu) => match on_host(wish, Engine::Criu, folders, progress) {
            Err(LabError::NoCriu { why }) => {
                progress.say(format!(
                    "CRIU cannot checkpoint on this host ({why}): booting a guest"
                ));
                in_guest_or_without(wish, folders, progress)
            }
            other => other,
        },
    }
}

fn in_guest_or_without(wish: &Wish, folders: &Folders, progress: &Progress) -> Result<Report> {
    match guest::run(wish, folders, progress) {
        Err(LabError::Interrupted) => Err(LabError::Interrupted),
        Err(error) => {
            progress.say(format!(
                "no guest can do it either ({error}): the same hop with the engine restart"
            ));
            on_host(wish, Engine::Restart, folders, progress)
        }
        done => done,
    }
}

fn on_host(wish: &Wish, engine: Engine, folders: &Folders, progress: &Progress) -> Result<Report> {
    let checkpoints = match engine {
        Engine::Criu => Checkpoints::Wanted,
        Engine::Restart => Checkpoints::NotWanted,
    };
    let mut parts = setup::parts(wish.app, wish.link, checkpoints, folders, progress)?;
    parts.arguments = wish.writes.arguments(wish.app);
    hop::run(&script(wish, engine, "host"), &parts, folders, progress)
}

/// The script of a wish, at a place and with an engine that are settled.
#[must_use]
pub fn script(wish: &Wish, engine: Engine, place: &'static str) -> Script {
    Script {
        clients: wish.clients,
        writes: wish.writes,
        engine,
        place,
        tunnel: wish.tunnel,
        fault: wish.fault.clone(),
        kill: wish.kill,
        cut: wish.cut.clone(),
        again: wish.again,
    }
}
