//! A plan: what is to hop, where to, and within which bounds. [`RawPlan`] is what an operator writes; [`Plan`]
//! is what has been checked. Sites keep the paths; a plan only names containers, so the same plan serves both.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::door::Redirect;
use crate::id::{ContainerName, ServiceName};
use crate::pattern::NamePattern;
use crate::schedule::Schedule;
use crate::tunnel::{self, address};

/// How a container is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Checkpoint and restore with CRIU: memory and connections move with the container.
    #[default]
    Criu,
    /// Stop cleanly, move the files, start: for hosts without CRIU and applications that keep all state on disk.
    Restart,
}

impl Engine {
    /// The word used in plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Criu => "criu",
            Self::Restart => "restart",
        }
    }
}

/// Whether and how bytes are packed before they cross the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As strongly as the link leaves time for, by measured speeds; not at all where that would be slower.
    #[default]
    Auto,
    /// Always zstd, at a level that the link leaves time for.
    Zstd,
    /// Always LZ4: little processor time, little gain.
    Lz4,
    /// Never, for links that are faster than packing or that pack themselves.
    Off,
}

/// How it is known which pages changed, so that only those cross while clients wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// `SoftDirty` where the kernel tracks dirty pages, otherwise `Content`.
    #[default]
    Auto,
    /// The kernel marks written pages; CRIU dumps them in rounds.
    SoftDirty,
    /// Pages are read and hashed while the container runs, and known by their content.
    Content,
    /// No rounds: everything crosses while clients wait.
    None,
}

/// How memory is tracked in one hop: a [`Memory`] that was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// By the kernel.
    SoftDirty,
    /// By content.
    Content,
    /// Not at all.
    #[default]
    None,
}

impl Memory {
    /// What it means on a kernel that tracks dirty pages, or does not.
    #[must_use]
    pub const fn settle(self, kernel_tracks: bool) -> Tracking {
        match self {
            Self::Auto if kernel_tracks => Tracking::SoftDirty,
            Self::Auto | Self::Content => Tracking::Content,
            Self::SoftDirty => Tracking::SoftDirty,
            Self::None => Tracking::None,
        }
    }
}

impl Tracking {
    /// The word used in plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::Content => "content",
            Self::None => "none",
        }
    }
}

/// A plan as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPlan {
    /// Services to hold, in this order; they are released in reverse.
    pub services: Vec<ServiceName>,
    /// The target agent's peer address, `address:port`.
    pub target: String,
    /// How containers are moved.
    #[serde(default)]
    pub engine: Engine,
    /// How changed memory is found; matters with the engine `criu` only.
    #[serde(default)]
    pub memory: Memory,
    /// In which order the memory of several containers uses the link.
    #[serde(default)]
    pub schedule: Schedule,
    /// What carries the bytes between the sites.
    #[serde(default)]
    pub tunnel: tunnel::Kind,
    /// Where the inside addresses of the tunnel's ends come from; neither site may use it otherwise.
    #[serde(default = "default_tunnel_network")]
    pub tunnel_network: IpNet,
    /// How names are turned to the target after the commit.
    #[serde(default)]
    pub redirect: Redirect,
    /// How long a step of that takes, in seconds.
    #[serde(default = "default_redirect_step_s")]
    pub redirect_step_s: u64,
    /// Parallel data connections, 1 to 32.
    #[serde(default = "default_streams")]
    pub streams: u32,
    /// Whether and how bytes are packed before they cross the link.
    #[serde(default)]
    pub compress: Compress,
    /// What all data connections together may send, in Mbit/s, also while clients are held; no limit without it.
    #[serde(default)]
    pub bandwidth_mbit_max: Option<u32>,
    /// Names of files whose bytes keep their places when they change, as those of databases do. Of any other file that is
    /// written anew, pieces that are still in it somewhere do not cross again.
    #[serde(default = "NamePattern::databases")]
    pub in_place: Vec<NamePattern>,
    /// How long a connection to the target that broke is tried to be made again, in milliseconds; what was under way
    /// then goes on from what has arrived. 0 for not at all.
    #[serde(default = "default_reconnect_ms_max")]
    pub reconnect_ms_max: u64,
    /// Memory rounds at most; 0 means none.
    #[serde(default = "default_rounds_max")]
    pub rounds_max: u32,
    /// How far containers may be slowed down when they write faster than the link carries, in percent of the processor
    /// time they use; 0 means never.
    #[serde(default)]
    pub throttle_percent_max: u8,
    /// How long a hold lasts when this agent dies, in milliseconds.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
    /// How long requests in flight may take to drain, those of all services together, in milliseconds.
    #[serde(default = "default_drain_ms_max")]
    pub drain_ms_max: u64,
    /// The stall to stay within, in milliseconds; guides the number of rounds, and preflight warns past it.
    #[serde(default = "default_stall_ms_max")]
    pub stall_ms_max: u64,
    /// How long any one step may take while clients are held, in milliseconds.
    #[serde(default = "default_step_ms_max")]
    pub step_ms_max: u64,
    /// The containers that hop together.
    #[serde(rename = "container")]
    pub containers: Vec<PlannedContainer>,
    /// What must answer at the target before the commit.
    #[serde(rename = "probe", default)]
    pub probes: Vec<Probe>,
}

const fn default_tunnel_network() -> IpNet {
    address::NETWORK
}
const fn default_redirect_step_s() -> u64 {
    60
}
const fn default_streams() -> u32 {
    8
}
const fn default_reconnect_ms_max() -> u64 {
    15_000
}
const fn default_rounds_max() -> u32 {
    4
}
const fn default_lease_ms() -> u64 {
    10_000
}
const fn default_drain_ms_max() -> u64 {
    5_000
}
const fn default_stall_ms_max() -> u64 {
    2_000
}
const fn default_step_ms_max() -> u64 {
    60_000
}

/// One container of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedContainer {
    /// Its name at both sites.
    pub name: ContainerName,
    /// Containers that must run before this one.
    #[serde(default)]
    pub after: Vec<ContainerName>,
}

/// One HTTP GET the target agent makes through the fence before the commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// The container it proves; named in the report.
    pub container: ContainerName,
    /// `http://address:port/path`, as the target site reaches the container.
    pub url: String,
    /// The status that counts as alive.
    #[serde(default = "default_status")]
    pub status: u16,
    /// How long the answer may take, tries included, in milliseconds.
    #[serde(default = "default_probe_ms")]
    pub timeout_ms: u64,
}

const fn default_status() -> u16 {
    200
}
const fn default_probe_ms() -> u64 {
    10_000
}

/// A plan that holds together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    raw: RawPlan,
    order: Vec<ContainerName>,
}

impl Plan {
    /// Everything the plan says.
    #[must_use]
    pub const fn settings(&self) -> &RawPlan {
        &self.raw
    }

    /// The containers so that each comes after all it depends on.
    #[must_use]
    pub fn order(&self) -> &[ContainerName] {
        &self.order
    }
}

/// Why a plan was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing to hold.
    #[error(
        "`services` is empty: name at least one service of the proxy, so that clients are held and not cut"
    )]
    NoService,
    /// A service named twice would be held twice.
    #[error("the service {0} is named twice in `services`: name each once")]
    ServiceTwice(ServiceName),
    /// Not an address.
    #[error(
        "`target` is {0:?}, but must be the target agent's peer address, as \"192.0.2.2:7443\" or \"host.example:7443\""
    )]
    Target(String),
    /// Nothing to move.
    #[error("the plan has no [[container]]: name at least one that both sites configure")]
    NoContainer,
    /// Named twice.
    #[error("the container {0} is named twice: name each once")]
    Twice(ContainerName),
    /// A dependency that is not part of the plan.
    #[error(
        "the container {container} comes after {after}, which the plan does not contain: add it or drop it from `after`"
    )]
    UnknownDependency {
        /// Who depends.
        container: ContainerName,
        /// On what.
        after: ContainerName,
    },
    /// A ring of dependencies.
    #[error("these containers wait for each other: {0}; break the ring in their `after`")]
    Cycle(String),
    /// A probe of nothing.
    #[error("a probe names the container {0}, which the plan does not contain")]
    UnknownProbe(ContainerName),
    /// A number out of bounds.
    #[error("`{key}` is {value}, but must be {allowed}")]
    OutOfBounds {
        /// Which setting.
        key: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// No two addresses in it.
    #[error(
        "`tunnel_network` is {0}, but must hold at least two addresses, as 169.254.64.0/18 does"
    )]
    TunnelNetwork(IpNet),
    /// A probe that cannot be made.
    #[error("the probe url {0:?} must look like http://address:port/path")]
    ProbeUrl(String),
}

impl TryFrom<RawPlan> for Plan {
    type Error = PlanError;

    fn try_from(raw: RawPlan) -> Result<Self, PlanError> {
        if raw.services.is_empty() {
            return Err(PlanError::NoService);
        }
        if raw.containers.is_empty() {
            return Err(PlanError::NoContainer);
        }
        if let Some(twice) = first_repeated(&raw.services) {
            return Err(PlanError::ServiceTwice(twice.clone()));
        }
        if !is_address(&raw.target) {
            return Err(PlanError::Target(raw.target));
        }
        check_bounds(&raw)?;
        if raw.tunnel_network.prefix_len() == raw.tunnel_network.max_prefix_len() {
            return Err(PlanError::TunnelNetwork(raw.tunnel_network));
        }
        let names = distinct_names(&raw.containers)?;
        for probe in &raw.probes {
            if !names.contains(&probe.container) {
                return Err(PlanError::UnknownProbe(probe.container.clone()));
            }
            if !probe.url.starts_with("http://") {
                return Err(PlanError::ProbeUrl(probe.url.clone()));
            }
        }
        let order = dependency_order(&raw.containers, &names)?;
        Ok(Self { raw, order })
    }
}

fn first_repeated(services: &[ServiceName]) -> Option<&ServiceName> {
    services
        .iter()
        .enumerate()
        .find(|(index, service)| services[..*index].contains(service))
        .map(|(_, service)| service)
}

/// `host:port`; whether the host exists is found out when it is connected to.
fn is_address(target: &str) -> bool {
    target.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

fn check_bounds(raw: &RawPlan) -> Result<(), PlanError> {
    let bounds: [(
        &'static str,
        u64,
        std::ops::RangeInclusive<u64>,
        &'static str,
    ); 9] = [
        ("streams", u64::from(raw.streams), 1..=32, "1 to 32"),
        (
            "redirect_step_s",
            raw.redirect_step_s,
            0..=604_800,
            "0 to 604800 (a week)",
        ),
        (
            "bandwidth_mbit_max",
            u64::from(raw.bandwidth_mbit_max.unwrap_or(1)),
            1..=1_000_000,
            "1 to 1000000, or left out for no limit",
        ),
        ("rounds_max", u64::from(raw.rounds_max), 0..=64, "0 to 64"),
        (
            "reconnect_ms_max",
            raw.reconnect_ms_max,
            0..=3_600_000,
            "0 to 3600000",
        ),
        (
            "throttle_percent_max",
            u64::from(raw.throttle_percent_max),
            0..=95,
            "0 to 95",
        ),
        (
            "lease_ms",
            raw.lease_ms,
            1_000..=3_600_000,
            "1000 to 3600000 (one second to one hour)",
        ),
        (
            "drain_ms_max",
            raw.drain_ms_max,
            1..=3_600_000,
            "1 to 3600000",
        ),
        (
            "step_ms_max",
            raw.step_ms_max,
            1_000..=3_600_000,
            "1000 to 3600000",
        ),
    ];
    for (key, value, range, allowed) in bounds {
        if !range.contains(&value) {
            return Err(PlanError::OutOfBounds {
                key,
                value,
                allowed,
            });
        }
    }
    Ok(())
}

fn distinct_names(containers: &[PlannedContainer]) -> Result<BTreeSet<ContainerName>, PlanError> {
    let mut names = BTreeSet::new();
    for container in containers {
        if !names.insert(container.name.clone()) {
            return Err(PlanError::Twice(container.name.clone()));
        }
    }
    Ok(names)
}

/// Kahn's topological order; among those that are free the plan's own order decides.
fn dependency_order(
    containers: &[PlannedContainer],
    names: &BTreeSet<ContainerName>,
) -> Result<Vec<ContainerName>, PlanError> {
    for container in containers {
        if let Some(after) = container.after.iter().find(|after| !names.contains(after)) {
            return Err(PlanError::UnknownDependency {
                container: container.name.clone(),
                after: after.clone(),
            });
        }
    }
    let mut order: Vec<ContainerName> = Vec::with_capacity(containers.len());
    while order.len() < containers.len() {
        let free = containers.iter().find(|container| {
            !order.contains(&container.name)
                && container.after.iter().all(|after| order.contains(after))
        });
        match free {
            Some(container) => order.push(container.name.clone()),
            None => {
                let ring: Vec<&str> = containers
                    .iter()
                    .filter(|container| !order.contains(&container.name))
                    .map(|container| container.name.as_str())
                    .collect();
                return Err(PlanError::Cycle(ring.join(", ")));
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(containers: &[(&str, &[&str])]) -> RawPlan {
        let containers = containers
            .iter()
            .map(|(name, after)| PlannedContainer {
                name: name.parse().unwrap(),
                after: after.iter().map(|name| name.parse().unwrap()).collect(),
            })
            .collect();
        RawPlan {
            services: vec!["web".parse().unwrap()],
            target: "192.0.2.2:7443".to_owned(),
            engine: Engine::Criu,
            memory: Memory::Auto,
            schedule: Schedule::Gang,
            tunnel: tunnel::Kind::None,
            tunnel_network: address::NETWORK,
            redirect: Redirect::AtOnce,
            redirect_step_s: 60,
            streams: 4,
            compress: Compress::Auto,
            bandwidth_mbit_max: None,
            in_place: NamePattern::databases(),
            reconnect_ms_max: 15_000,
            rounds_max: 4,
            throttle_percent_max: 0,
            lease_ms: 10_000,
            drain_ms_max: 5_000,
            stall_ms_max: 2_000,
            step_ms_max: 60_000,
            containers,
            probes: Vec::new(),
        }
    }

    #[test]
    fn containers_come_after_all_they_depend_on() {
        let plan = Plan::try_from(plan(&[
            ("web", &["db", "cache"]),
            ("cache", &["db"]),
            ("db", &[]),
        ]))
        .unwrap();
        let order: Vec<&str> = plan.order().iter().map(ContainerName::as_str).collect();
        assert_eq!(order, ["db", "cache", "web"]);
    }

    #[test]
    fn without_dirty_tracking_pages_are_known_by_content_unless_the_plan_says_otherwise() {
        assert_eq!(Memory::Auto.settle(true), Tracking::SoftDirty);
        assert_eq!(Memory::Auto.settle(false), Tracking::Content);
        assert_eq!(Memory::Content.settle(true), Tracking::Content);
        assert_eq!(Memory::SoftDirty.settle(false), Tracking::SoftDirty);
        assert_eq!(Memory::None.settle(true), Tracking::None);
    }

    #[test]
    fn a_ring_of_dependencies_is_named() {
        let error = Plan::try_from(plan(&[("a", &["b"]), ("b", &["a"]), ("c", &[])])).unwrap_err();
        assert_eq!(error, PlanError::Cycle("a, b".to_owned()));
    }

    #[test]
    fn an_unknown_dependency_is_named() {
        let error = Plan::try_from(plan(&[("web", &["db"])])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the container web comes after db, which the plan does not contain: add it or drop it from `after`"
        );
    }

    #[test]
    fn a_number_out_of_bounds_is_named_with_what_is_allowed() {
        let mut raw = plan(&[("web", &[])]);
        raw.streams = 0;
        let error = Plan::try_from(raw).unwrap_err();
        assert_eq!(error.to_string(), "`streams` is 0, but must be 1 to 32");
    }
}
