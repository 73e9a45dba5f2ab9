//! strongSwan's charon at each site, for tunnels of IPsec. It gets a configuration of its own and no files of the host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::command::Shell;
use crate::lab::error::{OnFile, Result};
use crate::lab::netns::SITES;
use crate::lab::process::Process;
use crate::lab::world::World;

/// Debian's charon that stays in the foreground.
pub const PROGRAM: &str = "/usr/sbin/charon-systemd";
/// Longest it may take to listen.
const READY: Duration = Duration::from_secs(60);
/// What AES-GCM with ECDH and pre-shared keys needs.
const PLUGINS: &str =
    "random nonce openssl aes sha1 sha2 hmac gcm kdf kernel-netlink socket-default vici";

/// Starts charon at both sites; returns once each listens.
///
/// # Errors
/// When one does not start.
pub fn start(world: &World) -> Result<Vec<Process>> {
    SITES.iter().map(|site| start_at(world, site)).collect()
}

fn start_at(world: &World, site: &str) -> Result<Process> {
    let run = &world.run.path;
    let namespace = world.run.names.path(site);
    let configuration = run.join(format!("{site}-strongswan.conf"));
    let socket = run.join(format!("{site}.vici"));
    fs::write(&configuration, text(&socket, kernel_has_esp(&namespace)))
        .on("write", &configuration)?;
    let shell = Shell::new(PROGRAM)
        .env("STRONGSWAN_CONF", &configuration)
        .inside(&namespace);
    let mut charon = Process::start(&format!("charon-{site}"), &shell, run)?;
    charon.wait_ready(READY, || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    })?;
    Ok(charon)
}

/// Whether the kernel seals AES-GCM itself and has XFRM interfaces: one of each is made on trial.
fn kernel_has_esp(namespace: &Path) -> bool {
    let ip = |words: &[&str]| Shell::new("ip").args(words).inside(namespace).succeeds();
    let ends = [
        "src",
        "192.0.2.1",
        "dst",
        "192.0.2.2",
        "proto",
        "esp",
        "spi",
        "0x7443",
    ];
    let key = format!("0x{}", "5a".repeat(36));
    let mut add = vec!["xfrm", "state", "add"];
    add.extend(ends);
    add.extend(["mode", "tunnel", "aead", "rfc4106(gcm(aes))", &key, "128"]);
    let mut delete = vec!["xfrm", "state", "delete"];
    delete.extend(ends);
    let interface = ["type", "xfrm", "if_id", "1"];
    let seals = ip(&add) && ip(&delete);
    seals
        && ip(&[&["link", "add", "trial"][..], &interface].concat())
        && ip(&["link", "del", "trial"])
}

fn text(socket: &Path, in_kernel: bool) -> String {
    let user = if in_kernel { "" } else { "kernel-libipsec " };
    let socket = socket.display();
    format!(
        "charon-systemd {{\n\
           load = {user}{PLUGINS}\n\
           install_routes = no\n\
           routing_table_prio = 40000\n\
           install_virtual_ip = no\n\
           plugins {{ vici {{ socket = unix://{socket} }} }}\n\
           journal {{ default = -1 }}\n\
           filelog {{ stderr {{ default = 1 }} }}\n\
         }}\n"
    )
}
