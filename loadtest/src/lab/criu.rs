//! Finds a CRIU that works on this kernel, by trying: a trial process is dumped and restored.
//!
//! `criu check` passes on kernels where a dump then fails (a vDSO it does not know, for one), so only a complete
//! dump and restore counts. Where the packaged CRIU fails, a newer one is unpacked privately with its libraries.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::command::{SYSTEM_PATH, Shell, installed, resolve};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::packages;
use crate::progress::Progress;

/// The Debian suite a newer CRIU is taken from, and the layout it is unpacked to.
const NEWER_RECIPE: &str = "criu from sid, layout 1";

/// The first version, major and minor, that takes its scripts from a configuration file also when runc drives it.
const PARKS_FROM: (u32, u32) = (3, 19);

/// Finds one that works.
///
/// # Errors
/// [`LabError::NoCriu`] when neither the packaged nor the newer one can dump and restore here.
pub fn find(folders: &Folders, progress: &Progress) -> Result<PathBuf> {
    if !installed("criu") {
        progress.say("installing criu: checkpoints and restores the containers");
        if let Err(error) = packages::apt_install(&["criu"]) {
            progress.say(format!("no packaged CRIU: {error}"));
        }
    }
    if installed("criu") {
        let packaged = PathBuf::from(resolve("criu".as_ref(), SYSTEM_PATH.as_ref()));
        let usable = recent(&packaged).and_then(|()| trial(&packaged, &folders.lab));
        match usable {
            Ok(()) => return Ok(packaged),
            Err(why) => progress.say(format!(
                "the packaged CRIU cannot run here ({why}); using a newer one"
            )),
        }
    }
    let newer = newer(folders, progress)?;
    match trial(&newer, &folders.lab) {
        Ok(()) => Ok(newer),
        Err(why) => Err(LabError::NoCriu { why }),
    }
}

/// Refuses versions before 3.19: those cannot be parked, because scripts of a configuration file fail when CRIU is
/// driven by runc.
fn recent(criu: &Path) -> std::result::Result<(), String> {
    let version = version(criu);
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= PARKS_FROM => Ok(()),
        _ => Err(format!("{version} is older than 3.19 and cannot be parked")),
    }
}

/// The first line of `criu --version`.
#[must_use]
pub fn version(criu: &Path) -> String {
    let printed = Shell::new(criu).arg("--version").run().unwrap_or_default();
    printed
        .lines()
        .next()
        .unwrap_or("CRIU")
        .trim()
        .replace("Version:", "CRIU")
}

fn newer(folders: &Folders, progress: &Progress) -> Result<PathBuf> {
    packages::install(packages::IMAGES, progress)?;
    let made = folders.cached("criu", NEWER_RECIPE, |part| {
        progress.say("unpacking a newer CRIU with its libraries, from Debian unstable");
        let root = part.join("root");
        Shell::new("mmdebstrap")
            .args([
                "--variant=extract",
                "--include=criu",
                "--aptopt=Acquire::Check-Valid-Until \"false\"",
                "sid",
            ])
            .arg(&root)
            .args(packages::mirror())
            .within(Duration::from_secs(600))
            .run()?;
        unpack(&root, part)
    })?;
    let criu = made.join("bin/criu");
    // The loader and library paths are absolute; they follow the folder wherever it ends up.
    let library = made.join("lib");
    let interpreter = library.join("ld-linux-x86-64.so.2");
    let known = Shell::new("patchelf")
        .arg("--print-interpreter")
        .arg(&criu)
        .run()?;
    if Path::new(known.trim()) != interpreter {
        let rpath = library.as_os_str();
        Shell::new("patchelf")
            .args(["--force-rpath", "--set-rpath"])
            .arg(rpath)
            .arg(&criu)
            .run()?;
        Shell::new("patchelf")
            .arg("--set-interpreter")
            .arg(&interpreter)
            .arg(&criu)
            .run()?;
    }
    Ok(criu)
}

fn unpack(root: &Path, part: &Path) -> Result<()> {
    let (bin, lib) = (part.join("bin"), part.join("lib"));
    fs::create_dir_all(&bin).on("create", &bin)?;
    fs::create_dir_all(&lib).on("create", &lib)?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    for entry in fs::read_dir(&libraries).on("read", &libraries)?.flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().contains(".so") {
            continue;
        }
        let to = lib.join(&name);
        match fs::read_link(entry.path()) {
            Ok(link) if name != "ld-linux-x86-64.so.2" => symlink(&link, &to).on("link", &to)?,
            _ if entry.path().is_file() => fs::copy(entry.path(), &to)
                .map(drop)
                .on("copy", &entry.path())?,
            _ => {}
        }
    }
    let from = root.join("usr/sbin/criu");
    fs::copy(&from, bin.join("criu")).on("copy", &from)?;
    fs::remove_dir_all(root).on("remove", root)
}

/// Dumps and restores a sleeping process. The error is CRIU's first one, as text for a person.
fn trial(criu: &Path, folder: &Path) -> std::result::Result<(), String> {
    let images = folder.join(format!("trial-{}", std::process::id()));
    let outcome = trial_in(criu, &images);
    // Images of a trial are worth nothing afterwards; a folder that stays is replaced by the next trial.
    let _ = fs::remove_dir_all(&images);
    outcome
}

fn trial_in(criu: &Path, images: &Path) -> std::result::Result<(), String> {
    let _ = fs::remove_dir_all(images);
    fs::create_dir_all(images).map_err(|error| error.to_string())?;
    let mut command = Command::new(resolve("setsid".as_ref(), SYSTEM_PATH.as_ref()));
    command
        .args(["sleep", "600"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/");
    // Not a group leader, so that setsid need not fork and the process keeps this pid.
    let mut child = command
        .arg0("setsid")
        .spawn()
        .map_err(|error| error.to_string())?;
    let slept = crate::interrupt::wait_until(Duration::from_secs(5), || {
        fs::read_to_string(format!("/proc/{}/comm", child.id()))
            .is_ok_and(|name| name.trim() == "sleep")
    });
    let pid = child.id().to_string();
    let dump = Shell::new(criu)
        .args(["dump", "-o", "dump.log", "-t", &pid, "-D"])
        .arg(images);
    let dumped = slept && dump.succeeds();
    if !dumped {
        let _ = child.kill();
    }
    // A dump kills its process; the zombie must be gone before the same pid can be restored.
    let _ = child.wait();
    if !dumped {
        return Err(first_error(&images.join("dump.log")));
    }
    let restore = Shell::new(criu)
        .args(["restore", "-d", "-o", "restore.log", "-D"])
        .arg(images);
    if !restore.succeeds() {
        return Err(first_error(&images.join("restore.log")));
    }
    if let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
    Ok(())
}

fn first_error(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let error = text
        .lines()
        .find(|line| line.contains("Error") && !line.contains("RLIMIT_NOFILE"));
    error
        .or(text.lines().last())
        .unwrap_or("it left no log")
        .trim()
        .to_owned()
}
