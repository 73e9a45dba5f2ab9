//! Where the lab finds its parts and keeps what it made: everything below the build's own `target` folder.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::lab::error::{OnFile, Result};

/// The folders of one checkout.
#[derive(Debug, Clone)]
pub struct Folders {
    /// The root of the workspace: `configs/` is below it.
    pub workspace: PathBuf,
    /// Cache and run directories: `target/lab`.
    pub lab: PathBuf,
    /// The lab's own program.
    pub program: PathBuf,
    /// Where `hopgate-proxy` and `cutover-agent` are, beside the lab itself.
    pub binaries: PathBuf,
}

impl Folders {
    /// Finds them from the place of the running program, and makes the cache folder.
    ///
    /// # Errors
    /// When the program's own path cannot be read or the folder cannot be made.
    pub fn find() -> Result<Self> {
        let program = std::env::current_exe().on("find", Path::new("/proc/self/exe"))?;
        let binaries = program.parent().unwrap_or(Path::new("/")).to_owned();
        let target = binaries.parent().unwrap_or(Path::new("/")).to_owned();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap_or(Path::new("/"))
            .to_owned();
        let lab = target.join("lab");
        fs::create_dir_all(&lab).on("create", &lab)?;
        // The kernel's list of mounts, by which runs are taken down, has no links in its paths.
        let lab = fs::canonicalize(&lab).on("find", &lab)?;
        Ok(Self {
            workspace,
            lab,
            program,
            binaries,
        })
    }

    /// Takes the lock `name`, waiting for another lab that holds it: `install` covers packages and the cache,
    /// `runs` the taking of a number.
    ///
    /// # Errors
    /// When the lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.lab.join(format!("{name}.lock"));
        let file = File::create(&path).on("create", &path)?;
        flock(file.as_fd(), FlockOperation::LockExclusive).on("lock", &path)?;
        Ok(file)
    }

    /// The cached product `name` of the recipe with this `recipe` text, made by `make` in a `.part` folder first:
    /// an interrupted making never leaves half a product behind. Products of older recipes are removed.
    ///
    /// # Errors
    /// Whatever `make` fails with, and failing file operations.
    pub fn cached(
        &self,
        name: &str,
        recipe: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let stamp = &blake3::hash(recipe.as_bytes()).to_hex()[..12];
        let path = self.lab.join(format!("{name}-{stamp}"));
        if path.exists() {
            return Ok(path);
        }
        self.forget(name)?;
        let part = self.lab.join(format!("{name}-{stamp}.part"));
        fs::create_dir_all(&part).on("create", &part)?;
        make(&part)?;
        fs::rename(&part, &path).on("rename", &part)?;
        Ok(path)
    }

    fn forget(&self, name: &str) -> Result<()> {
        let prefix = format!("{name}-");
        // Another lab's containers may stand on an older product: what is mounted stays.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for entry in fs::read_dir(&self.lab).on("read", &self.lab)?.flatten() {
            let path = entry.path();
            let in_use = mounts.contains(&*path.to_string_lossy());
            if entry.file_name().to_string_lossy().starts_with(&prefix) && !in_use {
                fs::remove_dir_all(&path).on("remove", &path)?;
            }
        }
        Ok(())
    }
}
