//! A world with its actors, the orders given to them, and what must be true of them after each.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use cutover_protocol::hold::Gate;
use cutover_protocol::id::{Epoch, Site};
use serde_json::Value;

use crate::client::http::{fetch, parse, request};
use crate::command::{Ended, Shell};
use crate::interrupt::wait_until;
use crate::lab::actors::Actors;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::netns::{self, SITES};
use crate::lab::world::{HOST, Parts, World};
use crate::lab::{evidence, watch};
use crate::progress::Progress;

/// Where the target's agent listens for the source's; see `configs/lab/counter/target.toml`.
pub(super) const TARGET_PEER: &str = "192.0.2.2:7443";
/// The proxy, from the clients' network; see `configs/lab/counter/proxy.toml`.
const PROXY: ([u8; 4], u16) = ([127, 0, 0, 1], 8080);
/// Longest one refusal, one request or one hop may take, in seconds.
const LIMIT_S: u64 = 120;
/// Longest both sides may take to settle after a hop ended, in seconds.
const SETTLE_S: u64 = 30;

/// The world the cases play in.
pub(super) struct Stage {
    /// Before the world, whose end ends what is left of them.
    pub(super) actors: Actors,
    pub(super) world: World,
    pub(super) progress: Progress,
    /// A connection to the target's agent that never says anything.
    pub(super) silent: Option<TcpStream>,
    /// Of the proxy's register, as it must be.
    epoch: Cell<Epoch>,
    /// Every id that was acknowledged.
    ids: RefCell<Vec<String>>,
}

/// A post that lacks its last byte.
pub(super) struct Slow {
    id: String,
    last: u8,
    stream: TcpStream,
}

impl Stage {
    /// Builds the world and starts its actors; one id is stored before anything goes wrong.
    pub(super) fn set(parts: &Parts, folders: &Folders, progress: &Progress) -> Result<Self> {
        let world = World::build(parts, folders, progress)?;
        let actors = Actors::start(&world, folders)?;
        let status = watch::status(&world.run.path.join("proxy.sock"));
        let stage = Self {
            actors,
            epoch: Cell::new(status.map_or(Epoch::FIRST, |status| status.register.epoch)),
            world,
            progress: progress.clone(),
            silent: None,
            ids: RefCell::default(),
        };
        stage.is_untouched()?;
        Ok(stage)
    }

    /// A file of the run.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.world.run.path.join(name)
    }

    /// A command to the source's agent.
    pub(super) fn agent(&self, words: &[&str]) -> Shell {
        self.actors.command(0, words)
    }

    /// The order to hop by a plan of the run.
    pub(super) fn hop(&self, plan: &str) -> Shell {
        self.agent(&["hop"]).arg(self.path(plan))
    }

    /// The proxy's own program.
    pub(super) fn proxy(&self, words: &[&str]) -> Shell {
        Shell::new(self.path("bin/hopgate-proxy")).args(words)
    }

    /// Writes a file of the run.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).on("write", &path)
    }

    /// Makes `to` from `from` with one thing replaced; gives what `from` was.
    pub(super) fn write_from(&self, from: &str, to: &str, old: &str, new: &str) -> Result<String> {
        let path = self.path(from);
        let text = fs::read_to_string(&path).on("read", &path)?;
        let changed = text.replace(old, new);
        if changed == text {
            return Err(self.differs(format!("{from} has no {old:?} to replace")));
        }
        self.write(to, &changed)?;
        Ok(text)
    }

    /// What to fail with when the product did something else.
    pub(super) fn differs(&self, what: impl Into<String>) -> LabError {
        LabError::Differs { what: what.into() }
    }

    /// Gives an order that must be refused, with `phrase` in its only line.
    pub(super) fn refused(&self, shell: &Shell, phrase: &str) -> Result<()> {
        let ended = shell.clone().within(Duration::from_secs(LIMIT_S)).end()?;
        self.is_refusal(&ended, phrase)
    }

    /// Whether an order ended with an exit code other than 0 and one concluding line that holds `phrase`.
    pub(super) fn is_refusal(&self, ended: &Ended, phrase: &str) -> Result<()> {
        let errors: Vec<&str> = ended
            .err
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let line = errors
            .last()
            .copied()
            .or(ended.out.lines().last())
            .unwrap_or_default();
        let code = ended.code.unwrap_or(-1);
        self.progress.say(format!("  exit {code}: {line}"));
        if code <= 0 || errors.len() > 1 || !line.contains(phrase) {
            return Err(self.differs(format!(
                "no single line with {phrase:?} and an exit code came, but {ended:?}"
            )));
        }
        Ok(())
    }

    /// Hops by the right plan, with `meanwhile` called for every line of its output.
    pub(super) fn hop_with(
        &self,
        mut meanwhile: impl FnMut(&str, &Self) -> Result<()>,
    ) -> Result<Ended> {
        let command = self.actors.hop(&self.path("hop.json"), None)?;
        let (mut out, mut done) = (String::new(), Ok(()));
        let line = |line: &str| {
            out += line;
            out.push('\n');
            if done.is_ok() {
                done = meanwhile(line, self);
            }
        };
        let code = command.wait(Duration::from_secs(LIMIT_S), line, || true)?;
        done?;
        Ok(Ended {
            code,
            out,
            err: String::new(),
        })
    }

    /// Posts an id through the proxy, except for the last byte.
    pub(super) fn slow_post(&self, id: &str) -> Result<Slow> {
        let mut bytes = request("/add", HOST, Some(&format!("id={id}")));
        let last = bytes.pop().unwrap_or_default();
        let edge = self.world.run.names.path("edge");
        let stream: std::io::Result<TcpStream> = netns::within(&edge, || {
            let mut stream = TcpStream::connect(SocketAddr::from(PROXY))?;
            stream.set_read_timeout(Some(Duration::from_secs(LIMIT_S)))?;
            stream.write_all(&bytes)?;
            Ok(stream)
        })?;
        let slow = Slow {
            id: id.to_owned(),
            last,
            stream: stream.on("post from", &edge)?,
        };
        let status = || watch::status(&self.path("proxy.sock"));
        if !wait_until(Duration::from_secs(SETTLE_S), || {
            status().is_some_and(|seen| seen.in_flight > 0)
        }) {
            return Err(self.differs("a request whose body is not complete is not in flight"));
        }
        Ok(slow)
    }

    /// Sends the last byte and reads the answer.
    pub(super) fn finish(&self, mut slow: Slow) -> Result<()> {
        let mut bytes = Vec::new();
        let answer = slow.stream.write_all(&[slow.last]).and_then(|()| {
            let mut buffer = [0; 4096];
            loop {
                let read = slow.stream.read(&mut buffer)?;
                bytes.extend_from_slice(&buffer[..read]);
                if let Some(answer) = parse(&bytes, read == 0).map_err(std::io::Error::other)? {
                    return Ok(answer.status);
                }
            }
        });
        match answer {
            Ok(201) => {
                self.ids.borrow_mut().push(slow.id);
                Ok(())
            }
            other => Err(self.differs(format!(
                "a slow request was not answered with 201, but {other:?}"
            ))),
        }
    }

    /// Posts an id through the proxy and reads all of them back; gives whether they are the acknowledged ones.
    fn serves(&self) -> Result<()> {
        let id = format!("id-{}", self.ids.borrow().len());
        let edge = self.world.run.names.path("edge");
        let ask = |path: &str, form: Option<&str>| {
            let bytes = request(path, HOST, form);
            netns::within(&edge, || {
                fetch(
                    SocketAddr::from(PROXY),
                    &bytes,
                    Duration::from_secs(LIMIT_S),
                )
            })?
            .map_err(|error| self.differs(format!("{path} through the proxy: {error}")))
        };
        let added = ask("/add", Some(&format!("id={id}")))?.status;
        self.ids.borrow_mut().push(id);
        let stored = String::from_utf8_lossy(&ask("/ids", None)?.body).into_owned();
        let stored: Vec<&str> = stored.lines().collect();
        if added != 201 || *self.ids.borrow() != stored {
            return Err(self.differs(format!(
                "the last id was answered with {added}; stored are {stored:?}, acknowledged {:?}",
                self.ids.borrow()
            )));
        }
        Ok(())
    }

    /// Whether everything is as before: the source serves every id, the gate is open at the epoch it had, the target
    /// has no container, and neither agent has anything left to do.
    pub(super) fn is_untouched(&self) -> Result<()> {
        self.settles(Site::Source)?;
        self.serves()?;
        let at_target = Shell::new(self.path("bin/runc"))
            .arg("--root")
            .arg(self.path("target/runc"));
        let left = at_target.args(["list", "--quiet"]).run()?;
        if !left.trim().is_empty() {
            return Err(self.differs(format!(
                "the target still has the container {}",
                left.trim()
            )));
        }
        self.is_whole(0)
    }

    /// Whether everything is as before a hop that held and was undone. Its undoing took the epoch the commit would
    /// have had, so that no late commit can win.
    pub(super) fn is_undone(&self) -> Result<()> {
        self.epoch.set(Epoch(self.epoch.get().0 + 1));
        self.is_untouched()
    }

    /// Whether a hop committed: the target serves every id.
    pub(super) fn is_at_target(&self) -> Result<()> {
        self.epoch.set(Epoch(self.epoch.get().0 + 1));
        self.settles(Site::Target)?;
        self.serves()?;
        self.is_whole(1)
    }

    fn is_whole(&self, site: usize) -> Result<()> {
        if evidence::running_at(&self.world) != [site] {
            return Err(self.differs(format!(
                "the counter does not run at the {} only",
                SITES[site]
            )));
        }
        match evidence::memory_intact(&self.world, site)? {
            Some(true) => Ok(()),
            _ => Err(self.differs("the counter's memory is damaged")),
        }
    }

    /// Waits until the gate is open to `owner` and the agents have nothing to do any more.
    fn settles(&self, owner: Site) -> Result<()> {
        let mut seen = String::new();
        let settled = wait_until(Duration::from_secs(SETTLE_S), || {
            let status = watch::status(&self.path("proxy.sock"));
            let busy: Vec<String> = (0..SITES.len())
                .filter_map(|site| self.busy(site))
                .collect();
            seen = format!("{status:?}; {busy:?}");
            let open = status.is_some_and(|status| {
                status.gate == Gate::Open
                    && status.register.owner == owner
                    && status.register.epoch == self.epoch.get()
            });
            open && busy.is_empty()
        });
        if settled {
            Ok(())
        } else {
            Err(self.differs(format!("not all is settled: {seen}")))
        }
    }

    /// What the agent of a site still has to do, in its own words; nothing when it is idle.
    fn busy(&self, site: usize) -> Option<String> {
        let said = match self.actors.command(site, &["status", "--json"]).run() {
            Ok(said) => said,
            Err(error) => return Some(error.to_string()),
        };
        let status: Value = serde_json::from_str(&said).unwrap_or_default();
        let idle = status["hop"].is_null()
            && status["unfinished"] == false
            && status["owed"].as_array().is_some_and(Vec::is_empty)
            // After a commit the target remembers that it serves.
            && (status["standing"].is_null() || status["standing"]["stage"] == "serving");
        (!idle).then_some(said)
    }
}
