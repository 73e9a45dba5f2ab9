//! What the serving side has stored, read straight from it: ids, the fate of its database connections, its memory.

use std::time::Duration;

use crate::interrupt::wait_until;
use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{LabError, Result};
use crate::lab::netns::SITES;
use crate::lab::world::World;
use crate::report::Kept;

/// Longest the open transaction may take to commit once it is told to, in seconds.
const COMMIT_S: u64 = 30;

/// The sites (0 source, 1 target) at which every container of the application runs.
#[must_use]
pub fn running_at(world: &World) -> Vec<usize> {
    let runs = |site: &usize| {
        let runtime = &world.sites[*site];
        world
            .app
            .containers()
            .iter()
            .all(|kind| runtime.status(*kind).as_deref() == Some("running"))
    };
    (0..SITES.len()).filter(runs).collect()
}

/// Every id stored at `site`, once for each time it is stored.
///
/// # Errors
/// When the application does not hand them out.
pub fn ids(world: &World, site: usize) -> Result<Vec<String>> {
    let text = match world.app {
        App::Wordpress => sql(world, site, "SELECT id FROM lab_ids")?,
        App::Counter | App::Counters => {
            let answer = world.ask(ContainerKind::Counter, site, "/ids", None)?;
            if answer.status != 200 {
                return Err(LabError::Http {
                    what: "the counter's ids".into(),
                    why: format!("status {}", answer.status),
                });
            }
            String::from_utf8_lossy(&answer.body).into_owned()
        }
    };
    Ok(text.lines().map(str::to_owned).collect())
}

/// Whether every byte of each counter's memory is right; nothing for other applications.
///
/// # Errors
/// When the counter does not answer.
pub fn memory_intact(world: &World, site: usize) -> Result<Option<bool>> {
    match world.app {
        App::Wordpress => Ok(None),
        App::Counter | App::Counters => {
            let mut intact = true;
            for kind in world.app.containers() {
                intact &= world.ask(*kind, site, "/check", None)?.status == 200;
            }
            Ok(Some(intact))
        }
    }
}

/// Has the web container commit the transaction it holds open, and looks whether its connections are the ones it
/// began with and no insert is missing.
///
/// # Errors
/// When the database cannot be asked.
pub fn connection(world: &World, site: usize) -> Result<Kept> {
    if world.app != App::Wordpress {
        return Ok(Kept::NotApplicable);
    }
    world.sites[site].exec(ContainerKind::Web, &["touch", "/run/commit"])?;
    let mut moments = String::new();
    let query = "SELECT COUNT(DISTINCT boot, connection), GROUP_CONCAT(moment ORDER BY moment DESC) FROM lab_transaction";
    let mut failed = None;
    wait_until(Duration::from_secs(COMMIT_S), || {
        match sql(world, site, query) {
            Ok(text) => {
                moments = text.trim().to_owned();
                moments.ends_with("after")
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }
    // One process, one connection, and sequence numbers without a gap up to the last.
    let query = "SELECT COUNT(DISTINCT boot, connection), MAX(sequence) = COUNT(*) AND COUNT(DISTINCT sequence) = COUNT(*) FROM lab_persist";
    let inserts = sql(world, site, query)?;
    let whole = moments == "1\tbefore,after" && inserts.trim() == "1\t1";
    Ok(if whole { Kept::Survived } else { Kept::Broken })
}

fn sql(world: &World, site: usize, query: &str) -> Result<String> {
    let args = [
        "mariadb",
        "--socket=/run/mysqld/mysqld.sock",
        "-N",
        "-B",
        "-e",
        query,
        "wordpress",
    ];
    world.sites[site].exec(ContainerKind::Db, &args)
}
