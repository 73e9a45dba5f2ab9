//! Everything between a bare machine and the parts of a world: packages, CRIU, root file systems, a database.

use rustix::process::geteuid;

use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{LabError, Result};
use crate::lab::folders::Folders;
use crate::lab::link::Link;
use crate::lab::world::{Parts, wordpress_volume};
use crate::lab::{criu, packages, rootfs};
use crate::progress::Progress;

/// Whether the world must be able to checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoints {
    /// A CRIU that works here is needed.
    Wanted,
    /// Containers are only stopped and started.
    NotWanted,
}

/// Installs and makes what is missing, and gives the parts of a world.
///
/// # Errors
/// [`LabError::NotRoot`], [`LabError::NoCriu`], or whatever could not be installed or made.
pub fn parts(
    app: App,
    link: Link,
    checkpoints: Checkpoints,
    folders: &Folders,
    progress: &Progress,
) -> Result<Parts> {
    root()?;
    let _lock = folders.lock("install")?;
    packages::install(packages::WORLD, progress)?;
    let criu = match checkpoints {
        Checkpoints::Wanted => {
            let criu = criu::find(folders, progress)?;
            progress.say(format!(
                "{} can checkpoint here ({})",
                criu::version(&criu),
                criu.display()
            ));
            Some(criu)
        }
        Checkpoints::NotWanted => None,
    };
    let images = rootfs::images(app, folders, progress)?;
    let volumes = match app {
        App::Wordpress => vec![(
            ContainerKind::Db,
            wordpress_volume(&images, folders, progress)?,
        )],
        App::Counter | App::Counters => Vec::new(),
    };
    Ok(Parts {
        app,
        images,
        volumes,
        criu,
        arguments: Vec::new(),
        schema: None,
        link,
    })
}

/// Refuses to go on without root, in plain words.
///
/// # Errors
/// [`LabError::NotRoot`].
pub fn root() -> Result<()> {
    if geteuid().is_root() {
        Ok(())
    } else {
        Err(LabError::NotRoot)
    }
}
