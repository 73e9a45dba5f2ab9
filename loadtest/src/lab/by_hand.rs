//! A world for trying things by hand: it stands until ENTER or a signal.

use std::io::{BufRead, IsTerminal};
use std::thread;
use std::time::Duration;

use crate::interrupt;
use crate::lab::app::App;
use crate::lab::error::Result;
use crate::lab::folders::Folders;
use crate::lab::link::Link;
use crate::lab::netns::SITES;
use crate::lab::setup;
use crate::lab::world::World;
use crate::progress::Progress;

/// Longest a world stands by itself: a forgotten one is gone after a day.
const STANDS: Duration = Duration::from_secs(86_400);

/// Builds the world, says where everything is, and takes it down when told to.
///
/// # Errors
/// Whatever could not be made.
pub fn world(app: App, link: Link, progress: &Progress) -> Result<()> {
    let folders = Folders::find()?;
    let parts = setup::parts(app, link, setup::Checkpoints::Wanted, &folders, progress)?;
    let mut world = World::build(&parts, &folders, progress)?;
    describe(&world, progress);
    let (sender, ended) = std::sync::mpsc::sync_channel::<()>(1);
    if std::io::stdin().is_terminal() {
        thread::spawn(move || {
            let _ = std::io::stdin().lock().read_line(&mut String::new());
            drop(sender);
        });
        progress.say("press ENTER to take it down");
        interrupt::wait_until(STANDS, || {
            matches!(
                ended.try_recv(),
                Err(std::sync::mpsc::TryRecvError::Disconnected)
            )
        });
    } else {
        progress.say("send SIGTERM to take it down");
        interrupt::wait_until(STANDS, || !world.stands());
        drop(sender);
    }
    progress.say("taking it down");
    Ok(())
}

fn describe(world: &World, progress: &Progress) {
    let run = world.run.path.display();
    progress.say(world.measured.to_string());
    progress.say(format!("run directory {run}"));
    for part in ["edge", "source", "target"] {
        progress.say(format!(
            "namespace of {part}: {}",
            world.run.names.path(part).display()
        ));
    }
    for (index, site) in SITES.iter().enumerate() {
        for kind in world.app.containers() {
            progress.say(format!(
                "container {} at {site}: {}",
                kind.name(),
                kind.address_at(index)
            ));
        }
    }
    progress.say(format!(
        "ids are posted to http://{}{}",
        world.app.service().address_at(0),
        world.app.add_path()
    ));
}
