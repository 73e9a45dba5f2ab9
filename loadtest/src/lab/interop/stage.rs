//! What the cases play on: one proxy, the servers behind it, and where each of them listens. It lives in a folder of
//! its own, and all of it ends with the value.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::{Times, database, same};
use crate::bench::certificate;
use crate::command::Shell;
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::process::Process;
use crate::progress::Progress;

/// Longest a program may take until it listens, in seconds.
const READY_S: u64 = 30;
/// Longest it may take to end, in seconds.
const TERM_S: u64 = 5;
/// Longest one client may take, in seconds.
pub(super) const CLIENT_S: u64 = 60;

/// A service of the proxy, by what is behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    /// Sends back what it is sent.
    Echo,
    /// Answers fast.
    Fast,
    /// Speaks WebSocket.
    Chat,
    /// Answers calls of gRPC: HTTP/2 upstream as well.
    Greeter,
    /// A real database.
    Database,
}

const SERVICES: [Service; 5] = [
    Service::Echo,
    Service::Fast,
    Service::Chat,
    Service::Greeter,
    Service::Database,
];

impl Service {
    const fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Fast => "fast",
            Self::Chat => "chat",
            Self::Greeter => "greeter",
            Self::Database => "database",
        }
    }

    const fn protocol(self) -> &'static str {
        match self {
            Self::Database => "tcp",
            Self::Echo | Self::Fast | Self::Chat | Self::Greeter => "http",
        }
    }
}

#[derive(Debug)]
struct Place {
    service: Service,
    behind: u16,
    clear: u16,
    tls: u16,
}

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) proxy: Process,
    pub(super) folder: PathBuf,
    pub(super) times: Times,
    pub(super) progress: Progress,
    environment: PathBuf,
    assets: PathBuf,
    places: Vec<Place>,
    _behind: Vec<Process>,
    /// Who serves after upgrades.
    pub(super) successor: Successor,
    /// The last field is dropped last.
    _gone: Gone,
}

impl Stage {
    pub(super) fn start(
        hopgate: &Path,
        environment: PathBuf,
        times: Times,
        folders: &Folders,
        progress: &Progress,
    ) -> Result<Self> {
        let folder = folders.lab.join(format!("interop-{}", std::process::id()));
        fs::create_dir_all(&folder).on("create", &folder)?;
        let gone = Gone(folder.clone());
        certificate::write(&folder)?;
        let assets = folders.workspace.join("loadtest/assets/interop");
        let (mut behind, mut places) = (Vec::new(), Vec::new());
        for service in SERVICES {
            let (process, port) = match service {
                Service::Echo => script("origin", &environment, &assets, &folder)?,
                Service::Chat => script("chat", &environment, &assets, &folder)?,
                Service::Greeter => script("greeter", &environment, &assets, &folder)?,
                Service::Fast => fast(&folders.program, &folder)?,
                Service::Database => database::start(&folder)?,
            };
            behind.push(process);
            places.push(Place {
                service,
                behind: port,
                clear: free_port(&folder)?,
                tls: free_port(&folder)?,
            });
        }
        let config = folder.join("proxy.toml");
        fs::write(&config, configuration(&places)).on("write", &config)?;
        let program = folder.join("hopgate-proxy");
        fs::copy(hopgate, &program).on("copy", hopgate)?;
        let shell = Shell::new(&program).args(["run", "--config"]).arg(&config);
        let mut proxy = Process::start("proxy", &shell, &folder)?;
        let socket = folder.join("control.sock");
        proxy.wait_ready(Duration::from_secs(READY_S), || {
            UnixStream::connect(&socket).is_ok()
        })?;
        Ok(Self {
            proxy,
            folder,
            times,
            progress: progress.clone(),
            environment,
            assets,
            places,
            _behind: behind,
            successor: Successor(None),
            _gone: gone,
        })
    }

    pub(super) fn clear(&self, service: Service) -> u16 {
        self.place(service).map_or(0, |place| place.clear)
    }

    pub(super) fn tls(&self, service: Service) -> u16 {
        self.place(service).map_or(0, |place| place.tls)
    }

    fn place(&self, service: Service) -> Option<&Place> {
        self.places.iter().find(|place| place.service == service)
    }

    /// The certificate that clients have to trust.
    pub(super) fn ca(&self) -> PathBuf {
        self.folder.join("chain.pem")
    }

    /// A client of the assets.
    pub(super) fn python(&self, script: &str) -> Shell {
        Shell::new(&self.environment)
            .arg(self.assets.join(script))
            .within(Duration::from_secs(CLIENT_S))
    }

    /// Runs a client and compares all it says.
    pub(super) fn says(&self, what: &str, shell: &Shell, expected: &str) -> Result<()> {
        same(what, expected, &shell.run()?)?;
        self.progress.say(format!("  {what}"));
        Ok(())
    }

    /// A command to the proxy.
    pub(super) fn control(&self, verb: &str) -> Shell {
        Shell::new(self.folder.join("hopgate-proxy"))
            .args(["ctl", "--socket"])
            .arg(self.folder.join("control.sock"))
            .arg(verb)
    }

    /// Whether the proxy still runs; no case may end it.
    pub(super) fn lives(&mut self) -> Result<()> {
        if self.successor.0.is_some() {
            self.control("status").run()?;
            return Ok(());
        }
        if self.proxy.lives() {
            return Ok(());
        }
        Err(LabError::Ended {
            name: "hopgate-proxy".to_owned(),
            status: "during a case".to_owned(),
            said: self.proxy.said(),
        })
    }
}

/// A process that another one has started in its own place; it ends with the value.
#[derive(Debug)]
pub(super) struct Successor(pub(super) Option<i32>);

impl Drop for Successor {
    fn drop(&mut self) {
        let Some(pid) = self.0.and_then(Pid::from_raw) else {
            return;
        };
        let ended = || test_kill_process(pid).is_err();
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::TERM);
        if !interrupt::shielded(|| interrupt::wait_until(Duration::from_secs(TERM_S), ended)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A folder that goes with the value, and so after the processes that write there.
#[derive(Debug)]
struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        // Nobody misses what cannot be removed.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn configuration(places: &[Place]) -> String {
    let mut text =
        "state_dir = \"state\"\ncontrol = \"control.sock\"\n\n[[tls]]\nname = \"public\"\n\
                    certificates = [{ chain = \"chain.pem\", key = \"key.pem\" }]\n"
            .to_owned();
    for place in places {
        let (name, protocol, behind) =
            (place.service.name(), place.service.protocol(), place.behind);
        let (clear, tls) = (place.clear, place.tls);
        let http3 = match place.service {
            Service::Echo => "http3 = true\n",
            Service::Fast | Service::Chat | Service::Greeter | Service::Database => "",
        };
        let mut server = format!("127.0.0.1:{behind}");
        if place.service == Service::Greeter {
            let _ = write!(
                text,
                "\n[[upstream]]\nname = \"{name}\"\nprotocol = \"http2\"\nservers = [{{ address = \"{server}\" }}]\n"
            );
            server = name.to_owned();
        }
        // Writing into a string cannot fail.
        let _ = write!(
            text,
            "\n[[service]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nsource = \"{server}\"\n\
             target = \"{server}\"\n[[service.listen]]\naddress = \"127.0.0.1:{clear}\"\n\
             [[service.listen]]\naddress = \"127.0.0.1:{tls}\"\ntls = \"public\"\n{http3}"
        );
    }
    text
}

/// A port that was free a moment ago.
pub(super) fn free_port(folder: &Path) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).on("choose a port for", folder)?;
    Ok(listener
        .local_addr()
        .on("choose a port for", folder)?
        .port())
}

fn script(name: &str, python: &Path, assets: &Path, folder: &Path) -> Result<(Process, u16)> {
    let shell = Shell::new(python).arg(assets.join(format!("{name}.py")));
    listening(name, &shell, folder)
}

fn fast(lab: &Path, folder: &Path) -> Result<(Process, u16)> {
    listening("fast", &Shell::new(lab).arg("bench-origin"), folder)
}

/// Starts a server that says `listening`, and a port or an address, as its first line.
fn listening(name: &str, shell: &Shell, folder: &Path) -> Result<(Process, u16)> {
    let mut process = Process::start(name, shell, folder)?;
    let mut port = None;
    process.wait_ready(Duration::from_secs(READY_S), || {
        let said = fs::read_to_string(folder.join(format!("{name}.log"))).unwrap_or_default();
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix("listening "));
        let first = line.and_then(|line| line.split(' ').next());
        port = first.and_then(|first| first.rsplit(':').next()?.parse().ok());
        port.is_some()
    })?;
    Ok((process, port.unwrap_or(0)))
}
