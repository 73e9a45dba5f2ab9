//! Programs from Python's registry, in environments of their own below `target/lab`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::Shell;
use crate::lab::error::{OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::packages;
use crate::progress::Progress;

/// Longest the registry may take, in seconds.
const INSTALL_S: u64 = 300;

/// The Python program of the environment `name`, which is made when it is missing or the `list` of its packages has
/// changed.
///
/// # Errors
/// When the list cannot be read, or Python or its registry fails.
pub fn environment(
    name: &str,
    list: &Path,
    folders: &Folders,
    progress: &Progress,
) -> Result<PathBuf> {
    let recipe = fs::read_to_string(list).on("read", list)?;
    let made = folders.cached(name, &recipe, |part| {
        progress.now("installing programs from Python's registry");
        let make = Shell::new("python3")
            .args(["-m", "venv"])
            .arg(part)
            .within(Duration::from_secs(INSTALL_S));
        if !make.succeeds() {
            // Debian parts it from Python itself.
            packages::apt_install(&["python3-venv"])?;
            make.run()?;
        }
        Shell::new(part.join("bin/python"))
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--requirement",
            ])
            .arg(list)
            .within(Duration::from_secs(INSTALL_S))
            .run()?;
        Ok(())
    })?;
    Ok(made.join("bin/python"))
}
