//! What each side says of itself before a hop, and what follows from comparing the two. A finding that would make
//! the hop fail is a refusal; each names its cure.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use cutover_protocol::id::Site;
use cutover_protocol::plan::Engine;
use cutover_protocol::wire::{Finding, Inspect, Inspected, Severity, TreeFacts};

use crate::cgroup::Cgroup;
use crate::config::{Container, IMAGES_TREE};
use crate::criu::features;
use crate::engine::Host;
use crate::peer::slows_down_after_idle;

/// Clocks further apart than this confuse applications: time is not virtualised.
const CLOCK_SKEW_MS_MAX: u64 = 500;

/// What the target needs beyond the bytes it is sent: logs, state, file system overhead.
const SPARE_BYTES: u64 = 64 << 20;

/// Looks at this side. Never fails: what cannot be found out becomes a finding.
pub async fn inspect(host: &Host, inspect: &Inspect, site: Site) -> Inspected {
    let system = rustix::system::uname();
    let mut facts = Inspected {
        kernel: system.release().to_string_lossy().into_owned(),
        machine: system.machine().to_string_lossy().into_owned(),
        cpu_flags: cpu_flags(),
        clock_ms: now_ms(),
        ..Inspected::default()
    };
    if slows_down_after_idle() == Some(true) {
        facts.findings.push(Finding {
            severity: Severity::Note,
            message: "TCP starts slowly again after a pause, which costs the frozen transfer some round trips: sysctl net.ipv4.tcp_slow_start_after_idle=0".to_owned(),
        });
    }
    match host.runc.version().await {
        Ok(version) => facts.runtime = Some(version),
        Err(error) => facts.findings.push(refusal(error.to_string())),
    }
    if inspect.engine == Engine::Criu {
        if features::are_remembered(Path::new("/run")) == Some(false) {
            facts.findings.push(Finding {
                severity: Severity::Note,
                message: "/run is no tmpfs, so CRIU finds out at every start what this kernel can do, and clients wait some 40 ms more for a restore: mount a tmpfs there".to_owned(),
            });
        }
        match features::version(&host.config.runtime.criu).await {
            Ok(version) => {
                facts.criu = Some(version);
                facts.tracks_dirty_pages =
                    features::tracks_dirty_pages(&host.config.runtime.criu).await;
            }
            Err(message) => facts.findings.push(refusal(format!(
                "{message}; install CRIU, set `runtime.criu`, or plan with engine = \"restart\""
            ))),
        }
    }
    for name in &inspect.containers {
        match host.container(name) {
            Ok(container) => {
                inspect_container(host, container, inspect.engine, site, &mut facts).await
            }
            Err(error) => facts.findings.push(refusal(error.to_string())),
        }
    }
    facts
}

async fn inspect_container(
    host: &Host,
    container: &Container,
    engine: Engine,
    site: Site,
    facts: &mut Inspected,
) {
    let name = &container.name;
    if !container.bundle.join("config.json").exists() {
        facts.findings.push(refusal(format!(
            "the bundle {} of {name} has no config.json: point `bundle` at an OCI bundle",
            container.bundle.display()
        )));
    }
    if !container.network_namespace.exists() {
        facts.findings.push(refusal(format!(
            "the network namespace {} of {name} does not exist: create it and name it in config.json too",
            container.network_namespace.display()
        )));
    }
    for tree in &container.trees {
        // Only the source's trees are worth the walk: the target's will be replaced.
        facts.trees.push(tree_facts(
            &format!("{name}/{}", tree.name),
            &tree.path,
            site == Site::Source,
        ));
    }
    facts.trees.push(tree_facts(
        &format!("{name}/{IMAGES_TREE}"),
        &host.config.images(name),
        false,
    ));
    let state = host.runc.state(name.as_str()).await.ok().flatten();
    match (site, state) {
        (Site::Source, Some(state)) if state.status == "running" => {
            if engine == Engine::Criu {
                facts.findings.extend(undumpable(name.as_str(), state.pid));
            }
            let memory = resident_bytes(state.pid);
            if let Some(images) = facts.trees.last_mut() {
                images.bytes = memory;
            }
        }
        (Site::Source, _) => {
            facts.findings.push(refusal(format!(
                "the container {name} does not run here: start it, then hop"
            )));
        }
        (Site::Target, Some(state)) => facts.findings.push(refusal(format!(
            "the container {name} already exists at the target ({}): delete it (runc delete)",
            state.status
        ))),
        (Site::Target, None) => {}
    }
}

/// Compares both sides; the source's and the target's own findings come first.
#[must_use]
pub fn compare(source: &Inspected, target: &Inspected, round_trip_ms: u64) -> Vec<Finding> {
    let mut findings: Vec<Finding> = source
        .findings
        .iter()
        .map(|finding| prefixed("source", finding))
        .chain(
            target
                .findings
                .iter()
                .map(|finding| prefixed("target", finding)),
        )
        .collect();
    if source.machine != target.machine {
        findings.push(refusal(format!(
            "the source is {} and the target is {}: memory cannot move between them; use engine = \"restart\"",
            source.machine, target.machine
        )));
    }
    let missing: Vec<&str> = source
        .cpu_flags
        .iter()
        .filter(|flag| !target.cpu_flags.contains(flag))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        findings.push(Finding {
            severity: Severity::Warning,
            message: format!(
                "the target's processor lacks {}: programs that chose these at start may die there with SIGILL",
                missing.join(" ")
            ),
        });
    }
    let skew = source
        .clock_ms
        .abs_diff(target.clock_ms)
        .saturating_sub(round_trip_ms);
    if skew > CLOCK_SKEW_MS_MAX {
        findings.push(Finding {
            severity: Severity::Warning,
            message: format!(
                "the clocks are {skew} ms apart: synchronise them (chrony), time is not virtualised"
            ),
        });
    }
    findings.extend(space(source, target));
    findings
}

/// Whether each file system at the target holds what its trees will need, memory images included.
fn space(source: &Inspected, target: &Inspected) -> Vec<Finding> {
    let mut devices: Vec<u64> = target.trees.iter().map(|tree| tree.device).collect();
    devices.sort_unstable();
    devices.dedup();
    devices
        .into_iter()
        .filter_map(|device| {
            let trees: Vec<&TreeFacts> = target.trees.iter().filter(|tree| tree.device == device).collect();
            let free = trees.iter().map(|tree| tree.free_bytes).min().unwrap_or(0);
            let needed: u64 = trees
                .iter()
                .filter_map(|tree| source.trees.iter().find(|known| known.name == tree.name))
                .map(|tree| tree.bytes)
                .sum::<u64>()
                + SPARE_BYTES;
            let names: Vec<&str> = trees.iter().map(|tree| tree.name.as_str()).collect();
            (needed > free).then(|| {
                refusal(format!(
                    "the target has {} MiB free for {}, but {} MiB are needed: free some space there",
                    free >> 20,
                    names.join(", "),
                    needed >> 20
                ))
            })
        })
        .collect()
}

fn prefixed(site: &str, finding: &Finding) -> Finding {
    Finding {
        severity: finding.severity,
        message: format!("{site}: {}", finding.message),
    }
}

const fn refusal(message: String) -> Finding {
    Finding {
        severity: Severity::Refusal,
        message,
    }
}

/// Wall clock in milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
}

fn cpu_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"));
    line.and_then(|line| line.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn tree_facts(name: &str, path: &Path, walk: bool) -> TreeFacts {
    // A folder that does not exist yet will be made on the file system of its nearest ancestor.
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let free_bytes =
        rustix::fs::statvfs(existing).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let device = std::fs::metadata(existing).map_or(0, |metadata| metadata.dev());
    TreeFacts {
        name: name.to_owned(),
        bytes: if walk { tree_bytes(path) } else { 0 },
        free_bytes,
        device,
    }
}

fn tree_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => tree_bytes(&entry.path()),
            // Blocks, not length: holes do not need space.
            Ok(metadata) if metadata.is_file() => metadata.blocks() * 512,
            _ => 0,
        })
        .sum()
}

/// Resident memory of a container, an upper bound for its images.
fn resident_bytes(init_pid: u32) -> u64 {
    let pids = Cgroup::of(init_pid)
        .map(|cgroup| cgroup.pids())
        .unwrap_or_default();
    pids.iter().map(|pid| resident_pages(*pid) * 4096).sum()
}

fn resident_pages(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(0)
}

/// What CRIU is known to refuse, found by looking at every open file of every process.
fn undumpable(container: &str, init_pid: u32) -> Vec<Finding> {
    let pids = Cgroup::of(init_pid)
        .map(|cgroup| cgroup.pids())
        .unwrap_or_default();
    let mut findings = Vec::new();
    for pid in pids {
        let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            if let Some(cure) = cure_for(&target.to_string_lossy()) {
                findings.push(refusal(format!(
                    "{} (process {pid} of {container}) has {} open, which CRIU cannot dump: {cure}",
                    program.trim(),
                    target.display()
                )));
                break;
            }
        }
    }
    findings
}

fn cure_for(target: &str) -> Option<&'static str> {
    if target.contains("[io_uring]") {
        Some("turn io_uring off (MariaDB: innodb_use_native_aio=0)")
    } else if target.starts_with("/dev/pts/") || target == "/dev/tty" {
        Some("start the container detached, with its standard streams on /dev/null")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(bytes: u64, free_bytes: u64) -> Inspected {
        Inspected {
            machine: "x86_64".to_owned(),
            trees: vec![TreeFacts {
                name: "db/volume".to_owned(),
                bytes,
                free_bytes,
                device: 1,
            }],
            ..Inspected::default()
        }
    }

    #[test]
    fn a_full_disk_at_the_target_is_refused_with_figures() {
        let findings = compare(&side(1 << 30, 0), &side(0, 512 << 20), 0);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].severity, Severity::Refusal);
        assert_eq!(
            findings[0].message,
            "the target has 512 MiB free for db/volume, but 1088 MiB are needed: free some space there"
        );
    }

    #[test]
    fn a_processor_without_a_feature_is_warned_about() {
        let mut source = side(0, 0);
        let mut target = side(0, u64::MAX);
        source.cpu_flags = vec!["sse2".to_owned(), "avx2".to_owned()];
        target.cpu_flags = vec!["sse2".to_owned()];
        let findings = compare(&source, &target, 0);
        assert_eq!(findings.len(), 1);
        assert!(
            findings[0]
                .message
                .starts_with("the target's processor lacks avx2:")
        );
    }

    #[test]
    fn the_round_trip_is_not_taken_for_clock_skew() {
        let mut source = side(0, 0);
        let target = side(0, u64::MAX);
        source.clock_ms = 600;
        assert_eq!(compare(&source, &target, 200), Vec::new());
        assert_eq!(compare(&source, &target, 0).len(), 1);
    }

    #[test]
    fn io_uring_is_refused_with_its_cure() {
        assert!(
            cure_for("anon_inode:[io_uring]")
                .is_some_and(|cure| cure.contains("innodb_use_native_aio=0"))
        );
        assert_eq!(cure_for("anon_inode:[eventpoll]"), None);
    }
}
