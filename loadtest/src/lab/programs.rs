//! Builds the programs that the lab runs, and knows where they are.

use std::path::PathBuf;
use std::time::Duration;

use crate::command::Shell;
use crate::lab::error::Result;
use crate::lab::folders::Folders;
use crate::progress::Progress;

/// The most that a build of both programs with everything they are made of may take.
const BUILD_S: u64 = 1800;

/// What both programs need of the workspace. The lab itself is among them, or cargo would choose other features for the
/// crates they share and build those in turn at every run; for the same reason the lab depends on both libraries.
const PACKAGES: [&str; 6] = [
    "-p",
    "hopgate-proxy",
    "-p",
    "cutover-agent",
    "-p",
    "loadtest",
];

/// Builds the proxy and the agent beside the lab's own program, unless they are there and there is no cargo to build with.
///
/// # Errors
/// When they do not compile.
pub fn build(folders: &Folders, progress: &Progress) -> Result<()> {
    let manifest = folders.workspace.join("Cargo.toml");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let is_built = ["hopgate-proxy", "cutover-agent"]
        .iter()
        .all(|name| folders.binaries.join(name).is_file());
    let has_cargo = || {
        Shell::new(&cargo)
            .path(&path)
            .args(["--version"])
            .succeeds()
    };
    if !manifest.is_file() || (is_built && !has_cargo()) {
        return Ok(());
    }
    progress.now("building hopgate-proxy and cutover-agent");
    Shell::new(&cargo)
        .path(&path)
        .args(["build", "--release", "--quiet", "--bins"])
        .args(PACKAGES)
        .arg("--manifest-path")
        .arg(&manifest)
        .within(Duration::from_secs(BUILD_S))
        .run()?;
    Ok(())
}

/// Builds as [`build`] does, and gives the proxy's path.
///
/// # Errors
/// When it does not compile.
pub fn proxy(folders: &Folders, progress: &Progress) -> Result<PathBuf> {
    build(folders, progress)?;
    Ok(folders.binaries.join("hopgate-proxy"))
}
