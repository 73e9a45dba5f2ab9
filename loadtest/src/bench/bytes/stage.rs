//! The stage of one link: two sites joined by it, a source tree, a folder a system at the target, and their certificates.
//! It owns everything it made; dropping it leaves the machine as it was.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use cutover_agent::pki;

use crate::bench::bytes::case::LinkCase;
use crate::command::Shell;
use crate::lab::app::ContainerKind;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::link;
use crate::lab::netns::{self, within};
use crate::lab::process::Process;
use crate::lab::run_dir::RunDir;
use crate::progress::Progress;

/// The target's address on the link.
pub const TARGET: &str = "192.0.2.2";
/// The source's end of the link has this name.
const WIRE: &str = "wan";
/// Longest a server may take to listen, in seconds.
const LISTEN_S: u64 = 10;

/// A stage.
#[derive(Debug)]
pub struct Stage {
    /// How the link is emulated here.
    pub emulation: &'static str,
    // Dropped in this order: processes first, then the run with all that is left in it.
    delays: Vec<Process>,
    /// The run directory, a tmpfs.
    pub run: RunDir,
}

impl Stage {
    /// Builds both sites and shapes the link between them.
    ///
    /// # Errors
    /// What could not be made, by name.
    pub fn build(link: &LinkCase, folders: &Folders, progress: &Progress) -> Result<Self> {
        let run = RunDir::claim(folders, progress)?;
        // The database's namespaces are there for the set of MariaDB.
        netns::build(run.names, &[ContainerKind::Db], &run.path)?;
        let (emulation, programs) = link::shape(link.link, run.names, &folders.program)?;
        let mut stage = Self {
            emulation,
            delays: Vec::new(),
            run,
        };
        for (site, shell) in &programs {
            let mut delay = Process::start(&format!("delay-{site}"), shell, &stage.run.path)?;
            link::wait_for_delay(&mut delay)?;
            stage.delays.push(delay);
        }
        let tls = stage.tls();
        pki::create(&tls).map_err(|error| LabError::Output {
            program: "the maker of certificates",
            what: error.to_string(),
        })?;
        Ok(stage)
    }

    /// Where the certificates are.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        self.run.path.join("tls")
    }

    /// The tree at the source; MariaDB's is its container's volume.
    #[must_use]
    pub fn source_tree(&self) -> PathBuf {
        self.run.path.join("source/volumes/db")
    }

    /// The tree of one system at the target.
    #[must_use]
    pub fn target_tree(&self, system: &str) -> PathBuf {
        self.run.path.join("target/trees").join(system)
    }

    /// Empties all trees.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn clear(&self) -> Result<()> {
        for folder in [self.source_tree(), self.run.path.join("target/trees")] {
            if folder.exists() {
                fs::remove_dir_all(&folder).on("remove", &folder)?;
            }
            fs::create_dir_all(&folder).on("create", &folder)?;
        }
        Ok(())
    }

    /// `shell`, to be run at a site.
    #[must_use]
    pub fn at(&self, site: &str, shell: Shell) -> Shell {
        shell.inside(&self.run.names.path(site))
    }

    /// Starts a server at the target and waits until it listens at `port`.
    ///
    /// # Errors
    /// When it ends or does not listen in time.
    pub fn serve(&self, name: &str, shell: Shell, port: u16) -> Result<Process> {
        let mut process = Process::start(name, &self.at("target", shell), &self.run.path)?;
        let table = format!("/proc/{}/net/tcp", process.pid());
        let wanted = format!(":{port:04X} 00000000:0000 0A");
        process.wait_ready(Duration::from_secs(LISTEN_S), || {
            fs::read_to_string(&table).is_ok_and(|table| table.contains(&wanted))
        })?;
        Ok(process)
    }

    /// Bytes that left the source over the link so far, headers and repetitions included.
    ///
    /// # Errors
    /// When the namespace cannot be entered or its counters not be read.
    pub fn sent(&self) -> Result<u64> {
        let table = Path::new("/proc/thread-self/net/dev");
        let text = within(&self.run.names.path("source"), || fs::read_to_string(table))?;
        let text = text.on("read", table)?;
        counter(&text).ok_or_else(|| LabError::Output {
            program: "the kernel",
            what: format!("no counters of {WIRE} in {}", table.display()),
        })
    }

    /// Where a server of ours listens.
    #[must_use]
    pub fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 2], port))
    }

    /// Waits until what is still on its way has arrived, so that copies do not disturb each other.
    pub fn settle() {
        thread::sleep(Duration::from_millis(300));
    }
}

/// Bytes sent, the ninth number of an interface (proc_net_dev(5)).
fn counter(table: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == WIRE).then_some(numbers)
    })?;
    line.split_whitespace().nth(8)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_of_sent_bytes_is_found() {
        let table = "Inter-|   Receive |  Transmit\n    lo: 1 1 0 0 0 0 0 0 2 2 0 0 0 0 0 0\n   wan: 10 1 0 0 0 0 0 0 4711 12 0 0 0 0 0 0\n";
        assert_eq!(counter(table), Some(4711));
        assert_eq!(counter("lo: 1"), None);
    }
}
