//! A proxy under test: started from its template on a core of its own, ended with the value.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::geteuid;

use crate::bench::case::Setup;
use crate::bench::cores::{Cores, on_core};
use crate::bench::figures::Proxy;
use crate::bench::origin::Addresses;
use crate::bench::template;
use crate::bench::usage::{family, resident_bytes};
use crate::command::Shell;
use crate::lab::error::{OnFile, Result};
use crate::lab::process::Process;

/// Longest a proxy may take until it accepts a connection, in seconds.
const READY_S: u64 = 10;
/// Another program may take a port between our choice of it and the proxy's listening; then another is chosen.
const PORT_TRIALS: usize = 3;

/// Where a benchmark finds and leaves things.
#[derive(Debug, Clone)]
pub struct Place {
    /// The templates.
    pub templates: PathBuf,
    /// Configurations and logs of this run.
    pub run: PathBuf,
    /// The program `hopgate-proxy`.
    pub hopgate: PathBuf,
    /// The lab's own program.
    pub lab: PathBuf,
    /// Who runs where.
    pub cores: Cores,
}

/// One running proxy.
#[derive(Debug)]
pub struct Peer {
    process: Process,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Peer {
    /// Starts `proxy` for `setup` in front of `origin`.
    ///
    /// # Errors
    /// When it ends or does not listen; its last lines are part of the message.
    pub fn start(proxy: Proxy, setup: Setup, origin: Addresses, place: &Place) -> Result<Self> {
        let mut last = Self::try_start(proxy, setup, origin, place);
        for _ in 1..PORT_TRIALS {
            match &last {
                Err(error) if is_port_taken(&error.to_string()) => {}
                _ => break,
            }
            last = Self::try_start(proxy, setup, origin, place);
        }
        last
    }

    fn try_start(proxy: Proxy, setup: Setup, origin: Addresses, place: &Place) -> Result<Self> {
        let name = format!("{}-{}", proxy.as_str(), setup.as_str());
        let folder = place.run.join(&name);
        if folder.exists() {
            fs::remove_dir_all(&folder).on("remove", &folder)?;
        }
        fs::create_dir_all(&folder).on("create", &folder)?;
        let address = free_address().on("choose a port for", &folder)?;
        let file = format!("{name}.{}", extension(proxy));
        let config = folder.join(&file);
        let user = if geteuid().is_root() {
            "user root;"
        } else {
            ""
        };
        let origin = match setup {
            Setup::Tcp => origin.raw,
            Setup::Clear | Setup::Tls => origin.http,
        };
        // These names are all a template may use; a test fills every one of them in.
        let values = [
            ("listen", address.to_string()),
            ("origin", origin.to_string()),
            ("folder", folder.display().to_string()),
            ("run", place.run.display().to_string()),
            ("user", user.to_owned()),
        ];
        let values = values
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        template::write(&place.templates.join(&file), &config, &values)?;
        let shell = command(proxy, &config, &folder, place);
        let mut process = Process::start(proxy.as_str(), &shell, &folder)?;
        process.wait_ready(Duration::from_secs(READY_S), || {
            TcpStream::connect(address).is_ok()
        })?;
        Ok(Self { process, address })
    }

    /// The processes it consists of.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        family(self.process.pid())
    }

    /// Resident memory of all of them, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(&self.processes())
    }

    /// What it said last, if it has ended.
    pub fn death(&mut self) -> Option<String> {
        (!self.process.lives()).then(|| format!("it ended: {}", self.process.said()))
    }
}

fn command(proxy: Proxy, config: &Path, folder: &Path, place: &Place) -> Shell {
    let core = place.cores.proxy;
    match proxy {
        Proxy::Hopgate => on_core(core, &place.hopgate.display().to_string())
            .args(["run", "--config"])
            .arg(config),
        Proxy::Haproxy => on_core(core, "haproxy").args(["-db", "-f"]).arg(config),
        Proxy::Nginx => on_core(core, "nginx")
            .arg("-p")
            .arg(folder)
            .arg("-c")
            .arg(config),
    }
}

const fn extension(proxy: Proxy) -> &'static str {
    match proxy {
        Proxy::Hopgate => "toml",
        Proxy::Haproxy => "cfg",
        Proxy::Nginx => "conf",
    }
}

/// An address of this machine with a port that was free a moment ago.
fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn is_port_taken(message: &str) -> bool {
    let message = message.to_lowercase();
    message.contains("address already in use") || message.contains("cannot bind")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = ["listen", "origin", "folder", "run", "user"];

    #[test]
    fn every_proxy_has_a_template_for_every_setup_and_the_lab_knows_its_words() {
        let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/lab/bench");
        for proxy in Proxy::ALL {
            for setup in [Setup::Clear, Setup::Tls, Setup::Tcp] {
                let name = format!("{}-{}.{}", proxy.as_str(), setup.as_str(), extension(proxy));
                let text = fs::read_to_string(templates.join(&name)).unwrap();
                let filled = template::fill(&text, &NAMES.map(|name| (name, "value")));
                assert!(filled.is_ok_and(|text| !text.contains("{{")), "{name}");
            }
        }
    }

    #[test]
    fn a_port_that_was_taken_meanwhile_is_told_from_other_failures() {
        for said in [
            "bind() to 127.0.0.1:80 failed (98: Address already in use)",
            "cannot bind socket (Address already in use) for [127.0.0.1:80]",
        ] {
            assert!(is_port_taken(said), "{said}");
        }
        assert!(!is_port_taken("unknown key \"tls\""));
    }
}
