//! The target's root file system: an overlay of the image it already has and the upper layer that was copied.
//! It is mounted only after the last delta has been sealed, since an overlay must not change under its mount.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::EngineError;
use crate::config::Container;

/// Makes the folder on which a container's overlay will be mounted, if it has one: a runtime that starts before that looks
/// whether there is a folder.
pub(super) fn prepare(container: &Container) -> Result<(), EngineError> {
    let rootfs = container.bundle.join("rootfs");
    if container.overlay.is_none() {
        return Ok(());
    }
    fs::create_dir_all(&rootfs).map_err(|source| EngineError::Mount {
        container: container.name.clone(),
        path: rootfs.clone(),
        source,
    })
}

/// Mounts a container's overlay on its bundle's `rootfs`, if it has one and it is not mounted yet.
pub(super) fn mount(container: &Container) -> Result<(), EngineError> {
    let Some(overlay) = &container.overlay else {
        return Ok(());
    };
    let rootfs = container.bundle.join("rootfs");
    let failed = |source: std::io::Error| EngineError::Mount {
        container: container.name.clone(),
        path: rootfs.clone(),
        source,
    };
    if is_mounted(&rootfs) {
        return Ok(());
    }
    // The work folder must be empty of what an earlier mount left.
    match fs::remove_dir_all(&overlay.work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    for folder in [&overlay.upper, &overlay.work, &rootfs] {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        overlay.lower.display(),
        overlay.upper.display(),
        overlay.work.display()
    );
    let options = std::ffi::CString::new(options).map_err(|error| failed(error.into()))?;
    rustix::mount::mount(
        "overlay",
        &rootfs,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .map_err(|error| failed(error.into()))
}

/// Unmounts it; succeeds when it is not mounted.
pub(super) fn unmount(container: &Container) -> Result<(), EngineError> {
    let rootfs = container.bundle.join("rootfs");
    if container.overlay.is_none() || !is_mounted(&rootfs) {
        return Ok(());
    }
    rustix::mount::unmount(&rootfs, UnmountFlags::DETACH).map_err(|error| EngineError::Mount {
        container: container.name.clone(),
        path: rootfs.clone(),
        source: error.into(),
    })
}

/// A mount point is on another file system than its parent folder.
fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    match (device(path), path.parent().and_then(device)) {
        (Some(own), Some(parent)) => own != parent,
        _ => false,
    }
}
