//! What a case plays on: one proxy, the two origins, and where each of them listens. It lives in a folder of its own,
//! and all of it ends with the value.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::bench::hold::control::Control;
use crate::bench::hold::crowd::Crowd;
use crate::bench::hold::origin::Options;
use crate::bench::hold::plan::{Group, Kind};
use crate::bench::hold::site::Origin;
use crate::bench::template;
use crate::bench::usage::resident_bytes;
use crate::command::Shell;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::process::Process;

/// Longest the proxy may take until it answers, in seconds.
const READY_S: u64 = 20;

/// Where a run finds and leaves things.
#[derive(Debug, Clone)]
pub struct Place {
    /// The checkout and the lab's cache.
    pub folders: Folders,
    /// Configurations and logs of this run, and the certificate.
    pub run: PathBuf,
    /// The program `hopgate-proxy`.
    pub hopgate: PathBuf,
}

/// What a case sets of the proxy's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Knobs {
    /// Requests that the owner may have at once during a release.
    pub window_max: usize,
    /// How long a client may be idle.
    pub client_idle_ms_max: u64,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            window_max: 1024,
            client_idle_ms_max: 300_000,
        }
    }
}

/// Where the proxy listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listens {
    /// HTTP/1 in clear.
    pub clear: SocketAddr,
    /// HTTP/1 and 2 over TLS, and HTTP/3.
    pub tls: SocketAddr,
    /// Raw TCP.
    pub raw: SocketAddr,
}

impl Listens {
    /// Where clients of this kind connect.
    #[must_use]
    pub const fn of(&self, kind: Kind) -> SocketAddr {
        match kind {
            Kind::Clear | Kind::Websocket => self.clear,
            Kind::Tls | Kind::H2 | Kind::H3 => self.tls,
            Kind::Tcp => self.raw,
        }
    }
}

/// Everything that runs.
#[derive(Debug)]
pub struct Stage {
    proxy: Process,
    /// Its control socket.
    pub control: Control,
    /// Who owns at first.
    pub source: Origin,
    /// Where the service goes.
    pub target: Origin,
    /// Where clients connect.
    pub listens: Listens,
    /// Its folder.
    pub folder: PathBuf,
    lab: PathBuf,
    clients: u32,
}

/// The origins and the written configuration, before the proxy runs.
#[derive(Debug)]
pub struct Backdrop {
    /// Who owns at first.
    pub source: Origin,
    /// Where the service goes.
    pub target: Origin,
    /// The proxy's configuration.
    pub config: PathBuf,
    /// The folder of it all.
    pub folder: PathBuf,
}

impl Backdrop {
    /// Starts the origins, and writes the configuration of a proxy that is to listen there.
    ///
    /// # Errors
    /// When an origin does not come up, or files cannot be written.
    pub fn set(
        name: &str,
        place: &Place,
        origin: Options,
        knobs: Knobs,
        listens: Listens,
    ) -> Result<Self> {
        let folder = place.run.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).on("remove", &folder)?;
        }
        fs::create_dir_all(&folder).on("create", &folder)?;
        let lab = &place.folders.program;
        let source = Origin::start("source", origin, lab, &folder)?;
        let target = Origin::start("target", origin, lab, &folder)?;
        let template = place.folders.workspace.join("configs/lab/bench/hold.toml");
        let config = folder.join("proxy.toml");
        let values = [
            ("folder", folder.display().to_string()),
            ("run", place.run.display().to_string()),
            ("window_max", knobs.window_max.to_string()),
            ("client_idle_ms_max", knobs.client_idle_ms_max.to_string()),
            ("listen_clear", listens.clear.to_string()),
            ("listen_tls", listens.tls.to_string()),
            ("listen_raw", listens.raw.to_string()),
            ("source_http", source.addresses.http.to_string()),
            ("source_raw", source.addresses.raw.to_string()),
            ("target_http", target.addresses.http.to_string()),
            ("target_raw", target.addresses.raw.to_string()),
        ];
        let values = values
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        template::write(&template, &config, &values)?;
        Ok(Self {
            source,
            target,
            config,
            folder,
        })
    }
}

impl Stage {
    /// Starts everything.
    ///
    /// # Errors
    /// When something does not come up; its last lines are part of the message.
    pub fn start(name: &str, place: &Place, origin: Options, knobs: Knobs) -> Result<Self> {
        let listens = free(&place.run)?;
        let backdrop = Backdrop::set(name, place, origin, knobs, listens)?;
        let shell = Shell::new(&place.hopgate)
            .args(["run", "--config"])
            .arg(&backdrop.config);
        Self::with(&shell, backdrop, listens, place)
    }

    /// The same with a proxy that is started by `shell`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn with(
        shell: &Shell,
        backdrop: Backdrop,
        listens: Listens,
        place: &Place,
    ) -> Result<Self> {
        let mut proxy = Process::start("proxy", shell, &backdrop.folder)?;
        let control = Control::new(&backdrop.folder.join("control.sock"));
        proxy.wait_ready(Duration::from_secs(READY_S), || control.answers())?;
        Ok(Self {
            proxy,
            control,
            source: backdrop.source,
            target: backdrop.target,
            listens,
            folder: backdrop.folder,
            lab: place.folders.program.clone(),
            clients: 0,
        })
    }

    /// Starts clients; all that ever played on this stage have ids of their own.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn crowd(&mut self, groups: &[Group], processes_min: usize) -> Result<Crowd> {
        let crowd = Crowd::start(groups, processes_min, self.clients, &self.lab, &self.folder)?;
        self.clients += crowd.len();
        Ok(crowd)
    }

    /// Resident memory of the proxy, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(&[self.proxy.pid()])
    }

    /// Whether the proxy still runs; no case may end it.
    ///
    /// # Errors
    /// When it has ended, with its last lines.
    pub fn lives(&mut self) -> Result<()> {
        if self.proxy.lives() {
            return Ok(());
        }
        Err(LabError::Ended {
            name: "hopgate-proxy".to_owned(),
            status: "during a case".to_owned(),
            said: self.proxy.said(),
        })
    }

    /// The process of the proxy, for who kills it.
    pub const fn proxy(&mut self) -> &mut Process {
        &mut self.proxy
    }
}

/// Addresses that were free a moment ago.
fn free(run: &Path) -> Result<Listens> {
    let bind = || TcpListener::bind("127.0.0.1:0").on("choose a port for", run);
    // All three at once, so that they differ.
    let listeners = [bind()?, bind()?, bind()?];
    let address = |index: usize| {
        let listener: &TcpListener = &listeners[index];
        listener.local_addr().on("choose a port for", run)
    };
    Ok(Listens {
        clear: address(0)?,
        tls: address(1)?,
        raw: address(2)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lab_knows_every_word_of_the_templates() {
        const HOPGATE: [&str; 11] = [
            "folder",
            "run",
            "window_max",
            "client_idle_ms_max",
            "listen_clear",
            "listen_tls",
            "listen_raw",
            "source_http",
            "source_raw",
            "target_http",
            "target_raw",
        ];
        const PUBLISHED: [&str; 5] = ["folder", "listen", "source", "target", "holding"];
        let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/lab/bench");
        for (name, words) in [
            ("hold.toml", HOPGATE.as_slice()),
            ("hold-published.cfg", &PUBLISHED),
        ] {
            let text = fs::read_to_string(templates.join(name)).unwrap();
            let values: Vec<(&str, &str)> = words.iter().map(|word| (*word, "value")).collect();
            let filled = template::fill(&text, &values);
            assert!(filled.is_ok_and(|text| !text.contains("{{")), "{name}");
        }
    }
}
