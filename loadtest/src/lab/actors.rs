//! The product's processes in a world: one proxy at the edge, one agent at each site, and the commands given to them.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use crate::command::{CommandError, Shell, kill_group};
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::netns::SITES;
use crate::lab::process::Process;
use crate::lab::watch;
use crate::lab::world::World;

/// Longest a process may take until it listens, in seconds; a guest is slow.
const READY_S: u64 = 60;
/// Lines of a hop's output that may wait to be read.
const LINES_MAX: usize = 1024;

/// The running proxy and agents.
#[derive(Debug)]
pub struct Actors {
    /// The agents of source and target.
    pub agents: [Process; 2],
    /// The proxy.
    pub proxy: Process,
    run: PathBuf,
    agent: PathBuf,
}

impl Actors {
    /// Makes the certificates and starts all three; returns once each listens.
    ///
    /// # Errors
    /// When one ends by itself or does not listen in time.
    pub fn start(world: &World, folders: &Folders) -> Result<Self> {
        let run = world.run.path.clone();
        // Copies of its own: a build that replaces the programs meanwhile must not replace them in this world.
        for name in ["hopgate-proxy", "cutover-agent"] {
            let from = folders.binaries.join(name);
            std::fs::copy(&from, run.join("bin").join(name)).on("copy", &from)?;
        }
        let agent = run.join("bin/cutover-agent");
        Shell::new(&agent)
            .args(["pki", "--dir"])
            .arg(run.join("tls"))
            .run()?;
        let mut proxy = start_proxy(world)?;
        let socket = run.join("proxy.sock");
        proxy.wait_ready(Duration::from_secs(READY_S), || {
            watch::status(&socket).is_some()
        })?;
        let agents = [
            start_agent(world, &agent, 0)?,
            start_agent(world, &agent, 1)?,
        ];
        let mut actors = Self {
            agents,
            proxy,
            run,
            agent,
        };
        actors.wait_for_agent(0)?;
        actors.wait_for_agent(1)?;
        Ok(actors)
    }

    fn wait_for_agent(&mut self, site: usize) -> Result<()> {
        let socket = self.socket(site);
        self.agents[site].wait_ready(Duration::from_secs(READY_S), || {
            UnixStream::connect(&socket).is_ok()
        })
    }

    fn socket(&self, site: usize) -> PathBuf {
        self.run.join(format!("{}.sock", SITES[site]))
    }

    /// Starts the agent of a site again, after it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_agent(&mut self, world: &World, site: usize) -> Result<()> {
        self.agents[site] = start_agent(world, &self.agent, site)?;
        self.wait_for_agent(site)
    }

    /// Kills the agent of a site and starts it again, with the configuration as it is now.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn renew_agent(&mut self, world: &World, site: usize) -> Result<()> {
        self.agents[site].kill();
        self.restart_agent(world, site)?;
        // Its socket is there before its port is: only an answer tells that both are.
        self.command(site, &["status"]).run()?;
        Ok(())
    }

    /// A command to the agent of a site, ready to be run.
    #[must_use]
    pub fn command(&self, site: usize, words: &[&str]) -> Shell {
        Shell::new(&self.agent)
            .arg("--control")
            .arg(self.socket(site))
            .args(words)
    }

    /// Tells the agent of a site to settle what an earlier life left unfinished, and gives what it said.
    ///
    /// # Errors
    /// When it cannot.
    pub fn recover(&self, site: usize) -> Result<String> {
        Ok(self.command(site, &["recover"]).run()?)
    }

    /// Gives the command to hop.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn hop(&self, report: &Path, fail_at: Option<&str>) -> Result<HopCommand> {
        let shell = self.command(0, &["hop"]).arg(self.run.join("plan.toml"));
        let mut shell = shell.arg("--json").arg(report);
        if let Some(phase) = fail_at {
            shell = shell.args(["--fail-at", phase]);
        }
        HopCommand::start(&shell, &self.run)
    }
}

fn start_proxy(world: &World) -> Result<Process> {
    let run = &world.run.path;
    let shell = Shell::new(run.join("bin/hopgate-proxy"))
        .args(["run", "--config"])
        .arg(run.join("proxy.toml"));
    Process::start("proxy", &shell.inside(&world.run.names.path("edge")), run)
}

fn start_agent(world: &World, agent: &Path, site: usize) -> Result<Process> {
    let (run, name) = (&world.run.path, SITES[site]);
    let shell = Shell::new(agent)
        .args(["serve", "--config"])
        .arg(run.join(format!("{name}.toml")));
    Process::start(
        &format!("agent-{name}"),
        &shell.inside(&world.run.names.path(name)),
        run,
    )
}

/// A hop that was ordered; its lines arrive as its phases end.
#[derive(Debug)]
pub struct HopCommand {
    child: Child,
    lines: Receiver<String>,
}

impl HopCommand {
    fn start(shell: &Shell, run: &Path) -> Result<Self> {
        let log = run.join("hop.log");
        let errors = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .on("create", &log)?;
        let mut command = shell.prepare();
        command.stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(|source| CommandError::Start {
            line: shell.line(),
            source,
        })?;
        let (sender, lines) = sync_channel(LINES_MAX);
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(output)
                    .lines()
                    .map_while(std::io::Result::ok)
                {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, lines })
    }

    /// Waits for its end, handing each line to `line` and calling `meanwhile` every few milliseconds until then.
    /// `meanwhile` may end the waiting by answering false. Gives the exit code, or nothing when it was cut short.
    ///
    /// # Errors
    /// When it does not end within `limit`, or the lab is interrupted.
    pub fn wait(
        mut self,
        limit: Duration,
        mut line: impl FnMut(&str),
        mut meanwhile: impl FnMut() -> bool,
    ) -> Result<Option<i32>> {
        let (mut code, mut cut) = (None, false);
        let ended = interrupt::wait_until(limit, || {
            self.lines.try_iter().for_each(|text| line(&text));
            code = self
                .child
                .try_wait()
                .ok()
                .flatten()
                .map(|status| status.code().unwrap_or(-1));
            cut = code.is_none() && !meanwhile();
            code.is_some() || cut
        });
        // What it printed last is still on its way through the reader.
        while let Ok(text) = self
            .lines
            .recv_timeout(Duration::from_millis(if code.is_some() { 500 } else { 0 }))
        {
            line(&text);
        }
        if code.is_none() {
            kill_group(&mut self.child);
        }
        match (ended, interrupt::requested()) {
            (true, _) => Ok(code),
            (false, true) => Err(LabError::Interrupted),
            (false, false) => Err(LabError::NotInTime {
                what: "the end of the hop".into(),
                seconds: limit.as_secs(),
                hint: String::new(),
            }),
        }
    }
}
