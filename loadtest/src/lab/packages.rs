//! Installs the Debian packages the lab needs, only those that are missing, and says what each is for.

use std::time::Duration;

use crate::command::{Shell, installed};
use crate::lab::error::{LabError, Result};
use crate::progress::Progress;

/// Longest an installation may take, in seconds: a slow mirror and an emulated disk together.
const APT_S: u64 = 900;

/// A program, the package that has it, and why the lab wants it.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// The program looked for.
    pub program: &'static str,
    /// The Debian package.
    pub package: &'static str,
    /// What it is for.
    pub why: &'static str,
}

const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        program,
        package,
        why,
    }
}

/// Needed by every hop.
pub const WORLD: &[Need] = &[
    need("runc", "runc", "runs the containers"),
    need(
        "ip",
        "iproute2",
        "builds the two sites and the links between them",
    ),
    need(
        "iptables-nft",
        "iptables",
        "CRIU locks a frozen container's network with it",
    ),
    need("nft", "nftables", "the agents fence a site with it"),
    need(
        "nsenter",
        "util-linux",
        "starts programs in a site's network",
    ),
    need("mount", "mount", "mounts the containers' file systems"),
];

/// Needed to make the root file systems of WordPress and MariaDB, and to unpack a newer CRIU.
pub const IMAGES: &[Need] = &[
    need(
        "mmdebstrap",
        "mmdebstrap",
        "makes the containers' root file systems from the Debian mirror",
    ),
    need(
        "patchelf",
        "patchelf",
        "lets a privately unpacked CRIU find its own libraries",
    ),
];

/// Needed where the hop runs in a guest.
pub const GUEST: &[Need] = &[
    need("qemu-system-x86_64", "qemu-system-x86", "boots the guest"),
    need(
        "busybox",
        "busybox-static",
        "is the guest's first user space",
    ),
    need("depmod", "kmod", "finds the modules the guest needs"),
];

/// Needed for tunnels of IPsec.
pub const IPSEC: &[Need] = &[
    need(
        "charon-systemd",
        "charon-systemd",
        "exchanges keys and keeps the tunnel",
    ),
    need(
        "charon-systemd",
        "libcharon-extra-plugins",
        "does ESP where the kernel has none",
    ),
    need(
        "charon-systemd",
        "libstrongswan-standard-plugins",
        "has the ciphers",
    ),
];

/// Installs what is missing of `needs`.
///
/// # Errors
/// When something is missing on a system without apt-get, or apt-get fails.
pub fn install(needs: &[Need], progress: &Progress) -> Result<()> {
    let missing: Vec<&Need> = needs
        .iter()
        .filter(|need| !installed(need.program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if !installed("apt-get") {
        return Err(LabError::NoApt {
            missing: names.join(", "),
        });
    }
    for need in &missing {
        progress.say(format!("installing {}: {}", need.package, need.why));
    }
    apt_install(&names)
}

/// Installs packages by name without what they merely recommend; refreshes the package lists when it fails at first.
///
/// # Errors
/// When apt-get fails also after the lists were refreshed.
pub fn apt_install(names: &[&str]) -> Result<()> {
    let install = apt()
        .args(["install", "-y", "--no-install-recommends"])
        .args(names);
    if install.succeeds() {
        return Ok(());
    }
    apt().arg("update").run()?;
    install.run()?;
    Ok(())
}

fn apt() -> Shell {
    Shell::new("apt-get")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .within(Duration::from_secs(APT_S))
}

/// The Debian mirror this system installs from; nothing where it names none, and mmdebstrap then takes its own.
#[must_use]
pub fn mirror() -> Option<String> {
    let listed = || {
        Shell::new("apt-get")
            .args(["indextargets", "--format", "$(REPO_URI) $(LABEL)"])
            .run()
    };
    let mut known = listed().unwrap_or_default();
    if known.trim().is_empty() && apt().arg("update").succeeds() {
        known = listed().unwrap_or_default();
    }
    let debian = known.lines().find_map(|line| line.strip_suffix(" Debian"));
    debian.map(str::to_owned)
}
