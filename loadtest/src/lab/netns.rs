//! The lab's network: three namespaces for clients and sites, one per container and site, and the links between.
//!
//! Containers have the same address and MAC at both sites, because their connections to each other move with them;
//! and one address per site besides, by which the proxy reaches a chosen side.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::Shell;
use crate::lab::app::ContainerKind;
use crate::lab::error::{OnFile, Result};

/// Both sites by name, in the order source, target.
pub const SITES: [&str; 2] = ["source", "target"];
/// Room for a tunnel's headers, the same on both sides from the start.
const MTU: &str = "1420";

/// The names of one run's namespaces.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// The number of the run.
    pub number: u32,
}

impl Names {
    /// The name of a namespace: `hg3-edge`.
    #[must_use]
    pub fn name(self, part: &str) -> String {
        format!("hg{}-{part}", self.number)
    }

    /// Where the namespace is pinned.
    #[must_use]
    pub fn path(self, part: &str) -> PathBuf {
        Path::new("/run/netns").join(self.name(part))
    }

    /// The parts of all namespaces for these containers, the edge first: claiming the run's number made it already.
    #[must_use]
    pub fn parts(containers: &[ContainerKind]) -> Vec<String> {
        let mut parts = vec!["edge".to_owned(), "source".to_owned(), "target".to_owned()];
        parts.extend(SITES.iter().flat_map(|site| {
            containers
                .iter()
                .map(move |kind| format!("{site}-{}", kind.name()))
        }));
        parts
    }
}

/// Runs `work` on a thread that lives in the network namespace pinned at `namespace`.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let pinned = File::open(namespace).on("open", namespace)?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(pinned.as_fd(), Some(LinkNameSpaceType::Network))
                .map(|()| work())
        });
        match inside.join() {
            Ok(outcome) => outcome.on("enter", namespace),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Makes all namespaces and links. `batches` is a folder for the command files handed to `ip`.
///
/// # Errors
/// When `ip` refuses something or a kernel setting cannot be written.
pub fn build(names: Names, containers: &[ContainerKind], batches: &Path) -> Result<()> {
    fs::create_dir_all("/run/netns").on("create", Path::new("/run/netns"))?;
    batch(batches, None, &root_lines(names, containers))?;
    let mut work: Vec<(String, Vec<String>)> = vec![("edge".to_owned(), edge_lines())];
    for (index, site) in SITES.iter().enumerate() {
        work.push(((*site).to_owned(), site_lines(index, containers)));
        for kind in containers {
            work.push((
                format!("{site}-{}", kind.name()),
                container_lines(index, *kind),
            ));
        }
    }
    for (part, lines) in work {
        batch(batches, Some(&names.name(&part)), &lines)?;
    }
    for part in ["edge", "source", "target"] {
        let path = names.path(part);
        // The second is what docs/operating.md asks of a site: the frozen transfer follows a pause of its streams.
        for (name, value) in [("ip_forward", "1"), ("tcp_slow_start_after_idle", "0")] {
            let setting = Path::new("/proc/sys/net/ipv4").join(name);
            within(&path, || fs::write(&setting, value))?.on("write", &setting)?;
        }
    }
    Ok(())
}

fn batch(folder: &Path, namespace: Option<&str>, lines: &[String]) -> Result<()> {
    let file = folder.join(format!("ip-{}", namespace.unwrap_or("root")));
    fs::write(&file, lines.join("\n") + "\n").on("write", &file)?;
    let mut ip = Shell::new("ip");
    if let Some(namespace) = namespace {
        ip = ip.args(["-n", namespace]);
    }
    ip.arg("-batch").arg(&file).run()?;
    Ok(())
}

fn root_lines(names: Names, containers: &[ContainerKind]) -> Vec<String> {
    let mut lines: Vec<String> = Names::parts(containers)
        .iter()
        .skip(1)
        .map(|part| format!("netns add {}", names.name(part)))
        .collect();
    let mut pair = |a: &str, a_link: &str, b: &str, b_link: &str, more: &str| {
        let (a, b) = (names.name(a), names.name(b));
        lines.push(format!("link add {a_link} netns {a} mtu {MTU} type veth peer name {b_link} netns {b} mtu {MTU}{more}"));
    };
    // The wide-area link carries ordinary frames; only the containers leave room for a tunnel.
    pair("source", "wan", "target", "wan", "");
    for site in SITES {
        pair("edge", &format!("to-{site}"), site, "to-edge", "");
        for kind in containers {
            let more = format!(" address {}", mac(kind.host()));
            pair(
                site,
                &format!("v-{}", kind.name()),
                &format!("{site}-{}", kind.name()),
                "eth0",
                &more,
            );
        }
    }
    lines
}

fn edge_lines() -> Vec<String> {
    to_lines(&[
        "link set lo up",
        "addr add 192.0.2.5/30 dev to-source",
        "addr add 192.0.2.9/30 dev to-target",
        "link set to-source up",
        "link set to-target up",
        // The containers' own addresses, as a client knows them that is still sent to the source.
        "route add 10.44.0.0/24 via 192.0.2.6",
        "route add 10.45.1.0/24 via 192.0.2.6",
        "route add 10.45.2.0/24 via 192.0.2.10",
    ])
}

fn site_lines(index: usize, containers: &[ContainerKind]) -> Vec<String> {
    let site = index + 1;
    let edge = if index == 0 {
        "192.0.2.6/30"
    } else {
        "192.0.2.10/30"
    };
    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("addr add 192.0.2.{site}/30 dev wan"),
        "link set wan mtu 1500".to_owned(),
        "link set wan up".to_owned(),
        format!("addr add {edge} dev to-edge"),
        "link set to-edge up".to_owned(),
        format!("link add br0 address {} type bridge", mac(1)),
        format!("link set br0 mtu {MTU}"),
        "addr add 10.44.0.1/24 dev br0".to_owned(),
        format!("addr add 10.45.{site}.1/24 dev br0"),
        "link set br0 up".to_owned(),
    ];
    for kind in containers {
        lines.push(format!("link set v-{} master br0", kind.name()));
        lines.push(format!("link set v-{} up", kind.name()));
        lines.extend(neighbours(&[kind.host()], site, "br0"));
    }
    lines
}

fn container_lines(index: usize, kind: ContainerKind) -> Vec<String> {
    let (site, host) = (index + 1, kind.host());
    let mut lines = vec![
        "link set lo up".to_owned(),
        "link set eth0 up".to_owned(),
        format!("addr add 10.44.0.{host}/24 dev eth0"),
        format!("addr add 10.45.{site}.{host}/24 dev eth0"),
        "route add default via 10.44.0.1".to_owned(),
    ];
    let containers = ContainerKind::ALL.map(ContainerKind::host);
    let others: Vec<u8> = [1]
        .into_iter()
        .chain(containers)
        .filter(|other| *other != host)
        .collect();
    lines.extend(neighbours(&others, site, "eth0"));
    lines
}

/// Neighbour entries that never expire: a frozen or fenced container must not become a failed ARP lookup.
fn neighbours(hosts: &[u8], site: usize, link: &str) -> Vec<String> {
    let entry = |net: String, host: u8| {
        format!(
            "neigh replace {net}.{host} lladdr {} dev {link} nud permanent",
            mac(host)
        )
    };
    hosts
        .iter()
        .flat_map(|host| {
            [
                entry("10.44.0".to_owned(), *host),
                entry(format!("10.45.{site}"), *host),
            ]
        })
        .collect()
}

fn mac(host: u8) -> String {
    format!("02:00:0a:2c:00:{host:02x}")
}

fn to_lines(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| (*line).to_owned()).collect()
}

/// Removes the namespaces of a run; those that are gone already are no error.
pub fn remove(names: Names) {
    let prefix = format!("hg{}-", names.number);
    let Ok(pinned) = fs::read_dir("/run/netns") else {
        return;
    };
    for entry in pinned.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) {
            let _ = Shell::new("ip").args(["netns", "del", &name]).run();
        }
    }
}

/// Processes that live in any network namespace of this run: only the lab's own can.
#[must_use]
pub fn processes(names: Names) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt;
    let prefix = format!("hg{}-", names.number);
    let pinned = fs::read_dir("/run/netns").map(|entries| {
        let ours = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        ours.filter_map(|entry| fs::metadata(entry.path()).ok())
            .map(|meta| (meta.dev(), meta.ino()))
            .collect::<Vec<_>>()
    });
    let pinned = pinned.unwrap_or_default();
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = all
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|meta| pinned.contains(&(meta.dev(), meta.ino())))
    })
    .collect()
}
