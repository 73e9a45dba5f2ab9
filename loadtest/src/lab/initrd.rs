//! The guest's kernel and its first user space: busybox, a handful of modules and a script, in an archive made here.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::{SYSTEM_PATH, Shell, resolve};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::progress::Progress;

/// What must be loaded before the host's files can be reached; everything else is loaded from there.
const MODULES: &[&str] = &["virtio_pci", "9p", "9pnet_virtio", "overlay"];
/// The first process.
const INIT: &str = include_str!("../../assets/guest/init.sh");

/// An unpacked Debian kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The image to boot.
    pub image: PathBuf,
    /// The folder of its modules, to be seen as `/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Downloads and unpacks Debian's full kernel (the cloud one has no 9p), or finds it in the cache.
///
/// # Errors
/// When the mirror has none or it cannot be unpacked.
pub fn kernel(folders: &Folders, progress: &Progress) -> Result<Kernel> {
    let known = newest_kernel();
    let package = match known {
        Some(package) => package,
        None => {
            Shell::new("apt-get")
                .args(["-q", "update"])
                .within(Duration::from_secs(300))
                .run()?;
            newest_kernel().ok_or(LabError::Guest {
                why: "the mirror has no linux-image-*-amd64".into(),
            })?
        }
    };
    let made = folders.cached("kernel", &package, |part| {
        progress.say(format!("downloading {package} for the guest"));
        // apt-get downloads into its working directory.
        let script =
            "cd \"$1\" && apt-get -q download \"$2\" && dpkg-deb -x ./*.deb . && rm ./*.deb";
        let shell = Shell::new("sh")
            .args(["-c", script, "sh"])
            .arg(part)
            .arg(&package);
        shell.within(Duration::from_secs(600)).run()?;
        // Debian 13 unpacks modules below usr, Debian 12 beside it.
        let modules = modules_folder(part)?;
        let release = modules.file_name().unwrap_or_default();
        let base = if modules.starts_with(part.join("usr")) {
            part.join("usr")
        } else {
            part.to_owned()
        };
        Shell::new("depmod")
            .arg("-b")
            .arg(base)
            .arg(release)
            .run()?;
        Ok(())
    })?;
    let boot = made.join("boot");
    let image = fs::read_dir(&boot)
        .on("read", &boot)?
        .flatten()
        .map(|entry| entry.path());
    let image = image.into_iter().find(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    });
    let image = image.ok_or(LabError::Guest {
        why: format!("{package} has no kernel image"),
    })?;
    Ok(Kernel {
        image,
        modules: modules_folder(&made)?,
    })
}

fn modules_folder(root: &Path) -> Result<PathBuf> {
    let places = [root.join("lib/modules"), root.join("usr/lib/modules")];
    let found = places
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flatten()
        .flatten()
        .next();
    found.map(|entry| entry.path()).ok_or(LabError::Guest {
        why: "the kernel package has no modules".into(),
    })
}

/// The newest full kernel of the 6.1 series if the mirror has it, otherwise of any.
fn newest_kernel() -> Option<String> {
    let listed = Shell::new("apt-cache")
        .args(["pkgnames", "linux-image-"])
        .run()
        .ok()?;
    let plain = |name: &&str| {
        let version = name
            .strip_prefix("linux-image-")
            .and_then(|rest| rest.strip_suffix("-amd64"));
        version.is_some_and(|version| {
            version
                .bytes()
                .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-'))
        })
    };
    let numbers = |name: &&str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    let names: Vec<&str> = listed.lines().filter(plain).collect();
    let of_6_1 = names
        .iter()
        .filter(|name| name.starts_with("linux-image-6.1."))
        .copied()
        .max_by_key(numbers);
    of_6_1
        .or_else(|| names.iter().copied().max_by_key(numbers))
        .map(str::to_owned)
}

/// Writes the guest's initial archive.
///
/// # Errors
/// When a module is missing or the archive cannot be written.
pub fn make(folders: &Folders, kernel: &Kernel) -> Result<PathBuf> {
    let mut archive = Archive::default();
    for folder in ["bin", "proc", "sys", "dev", "modules"] {
        archive.add(folder, 0o040_755, &[]);
    }
    archive.add("init", 0o100_755, INIT.as_bytes());
    let busybox = PathBuf::from(resolve("busybox".as_ref(), SYSTEM_PATH.as_ref()));
    archive.add(
        "bin/busybox",
        0o100_755,
        &fs::read(&busybox).on("read", &busybox)?,
    );
    let mut order = String::new();
    for path in modules(kernel)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .trim_end_matches(".xz")
            .to_owned();
        archive.add(&format!("modules/{name}"), 0o100_644, &read_module(&path)?);
        order.push_str(&name);
        order.push('\n');
    }
    archive.add("modules/order", 0o100_644, order.as_bytes());
    let path = folders
        .lab
        .join(format!("initrd-{}.cpio", std::process::id()));
    fs::write(&path, archive.finish()).on("write", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).on("change", &path)?;
    Ok(path)
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|end| end != "xz") {
        return fs::read(path).on("read", path);
    }
    let mut command = Shell::new("xz").args(["-dc"]).arg(path).prepare();
    let output = command.output().on("unpack", path)?;
    Ok(output.stdout)
}

/// The wanted modules with everything they depend on, in the order they must be loaded in.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let table = kernel.modules.join("modules.dep");
    let text = fs::read_to_string(&table).on("read", &table)?;
    let short = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or(path);
        name.split(".ko").next().unwrap_or(name).replace('-', "_")
    };
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let needs: HashMap<String, (&str, Vec<&str>)> = lines
        .map(|(path, needs)| (short(path), (path, needs.split_whitespace().collect())))
        .collect();
    let mut order: Vec<&str> = Vec::new();
    for name in MODULES {
        // What is built into the kernel has no line here.
        let Some((path, needed)) = needs.get(*name) else {
            continue;
        };
        // modules.dep lists the nearest first; loading starts at the other end.
        for module in needed.iter().rev().chain(std::iter::once(path)) {
            if !order.contains(module) {
                order.push(module);
            }
        }
    }
    Ok(order
        .into_iter()
        .map(|path| kernel.modules.join(path))
        .collect())
}

/// A cpio archive in the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = 1;
        // inode, mode, uid, gid, links, time, size, four device numbers, length of the name, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_aligned_and_ends_with_its_trailer() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        // 6 + 13 * 8 bytes of head, the name with its zero, to a multiple of four.
        assert_eq!(&bytes[112..117], b"12345");
        assert!(bytes.windows(10).any(|part| part == b"TRAILER!!!"));
    }
}
