//! The configuration of one agent: raw as written, then checked. Every relative path is taken relative to the
//! folder of the file that names it. Unknown keys are refused with the nearest known one.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cutover_protocol::id::{ContainerName, Site};
use cutover_protocol::plan::{Plan, PlanError, RawPlan};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::names::Name;
use crate::names::cloud::Cloud;
use crate::peer::Folder;
use crate::tls::TlsPaths;

/// Name of the tree that holds a container's memory images; no configured tree may take it.
pub const IMAGES_TREE: &str = "images";

/// The checked configuration of one agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which side of a hop this agent is.
    pub site: Site,
    /// Journal, images and what is parked live here.
    pub state_dir: PathBuf,
    /// Unix socket for commands.
    pub control: PathBuf,
    /// The other agents' door.
    pub peer: Peer,
    /// How tunnels are made here.
    pub tunnel: TunnelSettings,
    /// Where clients are told to find the services.
    pub dns: Option<Dns>,
    /// The proxy's control socket; a source cannot hop without one.
    pub proxy_control: Option<PathBuf>,
    /// How containers are run here.
    pub runtime: Runtime,
    /// The containers this site knows.
    pub containers: Vec<Container>,
}

/// Where peers connect, and who we are to them.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Who we are, and whom we trust.
    pub tls: TlsPaths,
}

/// How tunnels are made at this site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TunnelSettings {
    /// UDP port of WireGuard here; 0 lets the system choose.
    pub port: u16,
    /// charon's control socket, for IPsec.
    pub vici: PathBuf,
    /// Addresses that go on reaching the containers through this site after a hop, besides those whose connections
    /// are open at the freeze: the proxy's, and of containers that stay.
    pub carried: BTreeSet<IpAddr>,
}

impl Default for TunnelSettings {
    fn default() -> Self {
        Self {
            // The one everybody's firewalls know.
            port: 51_820,
            // Where Debian's charon-systemd and charon have it.
            vici: "/run/charon.vici".into(),
            carried: BTreeSet::new(),
        }
    }
}

/// Who keeps the zones, and the names to turn.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "RawDns")]
pub struct Dns {
    /// Who is asked to change them.
    pub keeper: Keeper,
    /// The file with the secret: for a name server as base64, for a cloud as the cloud gives it out.
    pub key_file: PathBuf,
    /// For how long resolvers may remember names around a hop, in seconds.
    pub ttl_moving_s: u32,
    /// The names, in the order in which they are turned one by one.
    pub names: Vec<Name>,
}

/// Who is asked to change a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// A name server that takes updates by RFC 2136.
    Rfc2136 {
        /// The primary server of the zones.
        server: SocketAddr,
        /// The name of the TSIG key, of HMAC-SHA-256.
        key_name: String,
    },
    /// A cloud, by its own interface.
    Cloud {
        /// Which.
        cloud: Cloud,
        /// Where it is asked, if not at its usual address.
        endpoint: Option<String>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDns {
    cloud: Option<Cloud>,
    endpoint: Option<String>,
    server: Option<SocketAddr>,
    key_name: Option<String>,
    key_file: PathBuf,
    #[serde(default = "default_ttl_moving_s")]
    ttl_moving_s: u32,
    #[serde(rename = "name", default)]
    names: Vec<Name>,
}

impl TryFrom<RawDns> for Dns {
    type Error = &'static str;

    fn try_from(raw: RawDns) -> Result<Self, Self::Error> {
        let keeper = match (raw.cloud, raw.server, raw.key_name) {
            (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
                return Err(
                    "a zone is kept by a `cloud` or by a `server` with its `key_name`: leave one out",
                );
            }
            (Some(cloud), None, None) => {
                if raw.endpoint.is_some() && cloud != Cloud::Route53 {
                    return Err("only cloud = \"route53\" can be asked at another `endpoint`");
                }
                Keeper::Cloud {
                    cloud,
                    endpoint: raw.endpoint,
                }
            }
            (None, Some(server), Some(key_name)) if raw.endpoint.is_none() => {
                Keeper::Rfc2136 { server, key_name }
            }
            (None, Some(_), Some(_)) => {
                return Err("an `endpoint` is a cloud's: say which `cloud`, or leave it out");
            }
            _ => {
                return Err(
                    "say who keeps the zones: `server` and `key_name` of a name server that takes updates, or a `cloud`",
                );
            }
        };
        Ok(Self {
            keeper,
            key_file: raw.key_file,
            ttl_moving_s: raw.ttl_moving_s,
            names: raw.names,
        })
    }
}

const fn default_ttl_moving_s() -> u32 {
    30
}

/// The container runtime and CRIU.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// The `runc` binary.
    pub runc: PathBuf,
    /// The `criu` binary; its folder is put first in runc's `PATH`, which is how runc finds it.
    pub criu: PathBuf,
    /// `runc --root`.
    pub root: PathBuf,
}

/// One container as this site keeps it.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name at both sites.
    pub name: ContainerName,
    /// The OCI bundle.
    pub bundle: PathBuf,
    /// The network namespace the bundle's `config.json` joins.
    pub network_namespace: PathBuf,
    /// Mounted on `bundle/rootfs` before the container is built here.
    pub overlay: Option<Overlay>,
    /// What must be the same at both sites.
    pub trees: Vec<Tree>,
}

/// An overlay file system.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// Read-only layer, the image.
    pub lower: PathBuf,
    /// What the container wrote.
    pub upper: PathBuf,
    /// Scratch space of the overlay, on the upper's file system.
    pub work: PathBuf,
}

/// One directory that hops with its container.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its name at both sites, unique within the container.
    pub name: String,
    /// Where it is here.
    pub path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    site: Site,
    state_dir: PathBuf,
    control: PathBuf,
    peer: RawPeer,
    #[serde(default)]
    tunnel: TunnelSettings,
    #[serde(default)]
    dns: Option<Dns>,
    #[serde(default)]
    proxy: Option<RawProxy>,
    #[serde(default)]
    runtime: RawRuntime,
    #[serde(rename = "container", default)]
    containers: Vec<RawContainer>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPeer {
    listen: SocketAddr,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProxy {
    control: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRuntime {
    runc: PathBuf,
    criu: PathBuf,
    root: PathBuf,
}

impl Default for RawRuntime {
    fn default() -> Self {
        Self {
            runc: "/usr/sbin/runc".into(),
            criu: "/usr/sbin/criu".into(),
            root: "/run/runc".into(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContainer {
    name: ContainerName,
    bundle: PathBuf,
    network_namespace: PathBuf,
    #[serde(default)]
    overlay: Option<RawOverlay>,
    #[serde(rename = "tree", default)]
    trees: Vec<RawTree>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOverlay {
    lower: PathBuf,
    upper: PathBuf,
    work: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTree {
    name: ContainerName,
    path: PathBuf,
}

/// Why a configuration or a plan was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}; name an existing file")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and cure, in one line.
        message: String,
    },
    /// The plan does not hold together.
    #[error("{path}: {source}")]
    Plan {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PlanError,
    },
    /// A container is named twice.
    #[error("{path}: the container {name} is configured twice: keep one")]
    Twice {
        /// The file.
        path: PathBuf,
        /// The container.
        name: ContainerName,
    },
    /// A tree's name is taken.
    #[error(
        "{path}: the container {container} has two trees named {tree:?}, or uses the reserved name {IMAGES_TREE:?}: rename one"
    )]
    TreeName {
        /// The file.
        path: PathBuf,
        /// The container.
        container: ContainerName,
        /// The name.
        tree: String,
    },
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`], each a sentence that names the file and what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = read_toml(path)?;
        let base = folder_of(path);
        let containers = check_containers(path, &base, raw.containers)?;
        Ok(Self {
            site: raw.site,
            state_dir: base.join(raw.state_dir),
            control: base.join(raw.control),
            peer: Peer {
                listen: raw.peer.listen,
                tls: TlsPaths {
                    ca: base.join(raw.peer.ca),
                    certificate: base.join(raw.peer.certificate),
                    key: base.join(raw.peer.key),
                },
            },
            tunnel: TunnelSettings {
                vici: base.join(&raw.tunnel.vici),
                ..raw.tunnel
            },
            dns: raw.dns.map(|dns| Dns {
                key_file: base.join(&dns.key_file),
                ..dns
            }),
            proxy_control: raw.proxy.map(|proxy| base.join(proxy.control)),
            runtime: Runtime {
                runc: base.join(raw.runtime.runc),
                criu: base.join(raw.runtime.criu),
                root: base.join(raw.runtime.root),
            },
            containers,
        })
    }

    /// The container of this name, if this site knows it.
    #[must_use]
    pub fn container(&self, name: &ContainerName) -> Option<&Container> {
        self.containers
            .iter()
            .find(|container| &container.name == name)
    }

    /// Where this site keeps the memory images of a container.
    #[must_use]
    pub fn images(&self, name: &ContainerName) -> PathBuf {
        self.state_dir.join("images").join(name.as_str())
    }

    /// The folder a tree name (`container/tree`) means here, and the layers of the container's image; `None` when this
    /// site knows no such tree.
    #[must_use]
    pub fn folder(&self, name: &str) -> Option<Folder> {
        let (container, tree) = name.split_once('/')?;
        let container = self
            .containers
            .iter()
            .find(|known| known.name.as_str() == container)?;
        if tree == IMAGES_TREE {
            return Some(Folder {
                path: self.images(&container.name),
                seeds: Vec::new(),
            });
        }
        let path = container
            .trees
            .iter()
            .find(|known| known.name == tree)
            .map(|known| known.path.clone())?;
        let layers = |overlay: &Overlay| {
            // As mount(8) writes several: one behind the other.
            let lower = overlay
                .lower
                .as_os_str()
                .as_bytes()
                .split(|byte| *byte == b':');
            lower.map(|path| OsStr::from_bytes(path).into()).collect()
        };
        let seeds = container.overlay.as_ref().map(layers).unwrap_or_default();
        Some(Folder { path, seeds })
    }
}

fn check_containers(
    path: &Path,
    base: &Path,
    raw: Vec<RawContainer>,
) -> Result<Vec<Container>, ConfigError> {
    let mut names = BTreeSet::new();
    let mut containers = Vec::with_capacity(raw.len());
    for container in raw {
        if !names.insert(container.name.clone()) {
            return Err(ConfigError::Twice {
                path: path.to_owned(),
                name: container.name,
            });
        }
        let mut trees: Vec<Tree> = Vec::with_capacity(container.trees.len());
        for tree in container.trees {
            let name = String::from(tree.name);
            if name == IMAGES_TREE || trees.iter().any(|known| known.name == name) {
                return Err(ConfigError::TreeName {
                    path: path.to_owned(),
                    container: container.name,
                    tree: name,
                });
            }
            trees.push(Tree {
                name,
                path: base.join(tree.path),
            });
        }
        containers.push(Container {
            name: container.name,
            bundle: base.join(container.bundle),
            network_namespace: base.join(container.network_namespace),
            overlay: container.overlay.map(|overlay| Overlay {
                lower: base.join(overlay.lower),
                upper: base.join(overlay.upper),
                work: base.join(overlay.work),
            }),
            trees,
        });
    }
    Ok(containers)
}

/// Reads and checks a plan.
///
/// # Errors
/// [`ConfigError`], each a sentence that names the file and what to do.
pub fn load_plan(path: &Path) -> Result<Plan, ConfigError> {
    let raw: RawPlan = read_toml(path)?;
    Plan::try_from(raw).map_err(|source| ConfigError::Plan {
        path: path.to_owned(),
        source,
    })
}

fn folder_of(path: &Path) -> PathBuf {
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // An absolute base keeps every path valid for the children we start, whatever their working directory.
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        message: explain(&text, &error),
    })
}

/// One line out of a TOML error: line number, key, what is wrong, and the nearest known key for an unknown one.
fn explain(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(0, |span| {
        text[..span.start.min(text.len())].matches('\n').count() + 1
    });
    let mut message = error
        .message()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    for width in ["u16", "u32", "u64"] {
        message = message.replace(&format!("expected {width}"), "expected a whole number");
    }
    let place = match (line, key_before(text, error)) {
        (0, _) => String::new(),
        (line, Some(key)) => format!("line {line}: `{key}`: "),
        (line, None) => format!("line {line}: "),
    };
    match nearest_key(&message) {
        Some(nearest) => format!("{place}{message}; did you mean `{nearest}`?"),
        None => format!("{place}{message}"),
    }
}

/// The key whose value the error points at, when both stand on one line.
fn key_before<'a>(text: &'a str, error: &toml::de::Error) -> Option<&'a str> {
    let before = text.get(..error.span()?.start)?;
    let line = before.rsplit('\n').next()?;
    let key = line.trim_end().strip_suffix('=')?.trim();
    (!key.is_empty()).then_some(key)
}

/// serde lists the known keys in its message, each between back quotes, the unknown one first.
fn nearest_key(message: &str) -> Option<&str> {
    let quoted: Vec<&str> = message
        .strip_prefix("unknown field")?
        .split('`')
        .skip(1)
        .step_by(2)
        .collect();
    let (unknown, known) = quoted.split_first()?;
    known
        .iter()
        .max_by(|a, b| strsim::jaro(unknown, a).total_cmp(&strsim::jaro(unknown, b)))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_error(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let message = load_plan(file.path()).unwrap_err().to_string();
        message.replace(&file.path().display().to_string(), "PLAN")
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        let text =
            "services = [\"web\"]\ntarget = \"x:1\"\nstream = 4\n[[container]]\nname = \"web\"\n";
        assert!(
            parse_error(text).starts_with("PLAN: line 3: unknown field `stream`, expected one of")
        );
        assert!(parse_error(text).ends_with("did you mean `streams`?"));
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_line_and_key() {
        let text = "services = [\"web\"]\ntarget = \"x:1\"\nstreams = \"four\"\n[[container]]\nname = \"web\"\n";
        assert_eq!(
            parse_error(text),
            "PLAN: line 3: `streams`: invalid type: string \"four\", expected a whole number"
        );
    }

    #[test]
    fn a_tree_is_found_with_the_layers_of_its_containers_image() {
        let mut config = Config::load(Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../configs/agent/target.toml"
        )))
        .unwrap();
        let container = &mut config.containers[0];
        container.overlay = Some(Overlay {
            lower: "/images/web/2:/images/web/1".into(),
            upper: "/srv/upper".into(),
            work: "/srv/work".into(),
        });
        let (name, tree) = (container.name.clone(), container.trees[0].clone());
        let folder = config.folder(&format!("{name}/{}", tree.name)).unwrap();
        assert_eq!(folder.path, tree.path);
        assert_eq!(
            folder.seeds,
            ["/images/web/2", "/images/web/1"].map(PathBuf::from)
        );
        let images = config.folder(&format!("{name}/{IMAGES_TREE}")).unwrap();
        assert_eq!(images.path, config.images(&name));
        assert!(images.seeds.is_empty());
        assert!(config.folder(&format!("{name}/nothing")).is_none());
        assert!(config.folder("nobody/volume").is_none());
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = Config::load(Path::new("/nowhere/agent.toml"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            message,
            "cannot read /nowhere/agent.toml: No such file or directory (os error 2); name an existing file"
        );
    }
}
