//! The process between a runtime and its CRIU: it passes on what they say, and parks CRIU by not answering it.
//!
//! CRIU notifies its runtime of the steps of its work, and waits for each answer as long as it takes. At `post-dump`
//! everything is written and the tasks are stopped; at `post-restore` they are built and have not run. A good answer lets
//! CRIU go on (kill the source, run the target), any other makes it roll back, and so does the end of this process. So
//! this process *is* the resource that the agent holds. It outlives a killed agent, and the next agent finds its socket.
//!
//! If CRIU is killed while parked, its tasks would wake; so the cgroup is frozen and the network fenced before anything is
//! told to the agent.
//!
//! A dump is parked once before, at `pre-dump`: CRIU has found out what the kernel can do, the container still runs, and
//! clients need not wait for it, nor for the start of the tool that fences the network. Given the word there, the cgroup is
//! frozen; the fence is shut by the time that CRIU asks for the network to be locked, before it looks at it
//! (`network-lock`). CRIU's own freezer looks once whether the cgroup is frozen, and then only every
//! 100 ms (`wait_freezer_state_change` in seize.c). Finding it frozen, CRIU thaws it when it holds the tasks, and freezes
//! it again when it lets them go alive; whoever gives a veto thaws it after that.
//!
//! A restore is parked twice before. The first thing runc does with CRIU is to ask for its version (`checkCriuVersion` in
//! criu_linux.go), and it looks at the root file system only after that; so that question waits for the trees. Then it
//! mounts, starts CRIU, moves it to the container's cgroup, and asks it to restore; so that request waits for the images.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::rpc::{self, Kind, Message};
use crate::cgroup::Cgroup;
use crate::fence::{self, Fence, FenceError, Ready};
use crate::sockets;

/// Where CRIU's stand-in finds this process, in its park folder.
pub(super) const SHIM_SOCKET: &str = "shim.sock";
/// Where a parked CRIU takes its word, in the same folder.
pub(super) const PARK_SOCKET: &str = "park.sock";
/// CRIU is parked so often at most, but for runtimes that ask for the version more than once.
const STOPS: usize = 3;
/// The agent's listening socket, in the same folder: it is told there that CRIU is parked.
pub(super) const AGENT_SOCKET: &str = "agent.sock";
/// What was frozen, read by whoever has to thaw without this process.
pub(super) const FROZEN_FILE: &str = "frozen.json";
/// The same before it is frozen.
const NOTED_FILE: &str = "to-freeze.json";
/// Why CRIU was refused, for the agent's message.
pub(super) const ERROR_FILE: &str = "refusal";

/// Which end of a hop is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ParkAt {
    /// A dump, at the source.
    Dump,
    /// A restore, at the target.
    Restore,
}

impl ParkAt {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Dump => "dump",
            Self::Restore => "restore",
        }
    }
}

/// Where CRIU is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stop {
    /// A dump that has begun and frozen nothing.
    Begun,
    /// A dump whose images are written and whose tasks are stopped.
    Dumped,
    /// A restore that has looked at nothing.
    Asked,
    /// A restore that lacks nothing but its images.
    Ready,
    /// A restore whose tasks are built and have not run.
    Restored,
}

/// What the agent is told, a JSON line.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Parked {
    pub stop: Stop,
    /// For how long CRIU has gone on since it was parked before, in milliseconds.
    pub criu_ms: u64,
}

/// What was frozen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Frozen {
    pub cgroup: Cgroup,
    pub init_pid: u32,
}

/// The entry point of the hidden `shim` command: runs a runtime and ends as it does. `folder` is the park folder.
#[must_use]
pub fn run(folder: &Path, at: ParkAt, network_namespace: &Path, runtime: &[OsString]) -> ExitCode {
    begin(folder, at, network_namespace, runtime).unwrap_or_else(|error| {
        note(folder, &error);
        ExitCode::FAILURE
    })
}

fn begin(
    folder: &Path,
    at: ParkAt,
    network_namespace: &Path,
    runtime: &[OsString],
) -> io::Result<ExitCode> {
    // Held by its descriptor: a folder that was given up, and made anew for the next hop, is none of ours.
    let held = File::open(folder)?;
    let folder = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
    let listener = sockets::bind(&folder.join(SHIM_SOCKET))?;
    let mut shim = Shim {
        parkings: Parking::ahead(&folder)?,
        folder,
        at,
        network_namespace: network_namespace.to_owned(),
        going_since: Instant::now(),
        went_on: Duration::ZERO,
        init_pid: None,
        frozen: None,
        fencing: None,
    };
    let mut runtime = start(runtime)?;
    let busy = Arc::<Mutex<()>>::default();
    let attending = Arc::clone(&busy);
    std::thread::spawn(move || {
        loop {
            let came = listener.accept();
            let _busy = attending.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = came.and_then(|(stand_in, _)| shim.attend(&stand_in)) {
                note(&shim.folder, &error);
            }
        }
    });
    let status = runtime.wait()?;
    // A CRIU that is parked stays so, whatever became of its runtime.
    let _idle = busy.lock().unwrap_or_else(PoisonError::into_inner);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Leaves a reason for the agent. Nobody listens any more when even that cannot be written.
fn note(folder: &Path, error: &io::Error) {
    let _ = std::fs::write(folder.join(ERROR_FILE), error.to_string());
}

fn start(runtime: &[OsString]) -> io::Result<Child> {
    let [program, arguments @ ..] = runtime else {
        return Err(io::Error::other("there is no runtime to run"));
    };
    let spawned = Command::new(program).args(arguments).spawn();
    spawned.map_err(|error| cannot_run(Path::new(program), &error))
}

/// Names a program that could not be started.
pub(super) fn cannot_run(program: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("cannot run {}: {error}", program.display()))
}

/// What is between one runtime and the CRIUs that it starts, one after the other.
#[derive(Debug)]
struct Shim {
    folder: PathBuf,
    /// Made when nobody waits for it.
    parkings: Vec<Parking>,
    at: ParkAt,
    network_namespace: PathBuf,
    /// When CRIU was let go on last where it was parked.
    going_since: Instant,
    /// For how long it had gone on since then when it was heard of last.
    went_on: Duration,
    /// The first process of what is dumped, as the runtime named it.
    init_pid: Option<u32>,
    frozen: Option<Frozen>,
    /// Shuts the fence, until it is waited for.
    fencing: Option<JoinHandle<Result<(), FenceError>>>,
}

/// What was done at a step, and what is left to do at the word.
#[derive(Debug)]
enum Prepared {
    /// CRIU is not parked there.
    Nothing,
    /// To stop the container, with the fence that was made ready.
    Stop(Parking, Frozen, Option<Ready>),
    /// To let go of the container.
    Thaw(Parking, Frozen),
    /// No more than to go on.
    Run(Parking),
}

/// Where the word is given.
#[derive(Debug)]
struct Parking {
    path: PathBuf,
    listener: UnixListener,
}

/// Both ends of one CRIU.
#[derive(Debug)]
struct Ends {
    runtime: OwnedFd,
    criu: OwnedFd,
    /// CRIU's process.
    process: OwnedFd,
}

/// A word that CRIU was given. The agent waits for the end of the stream: it has been carried out then.
#[derive(Debug)]
struct Given {
    goes_on: bool,
    stream: UnixStream,
}

impl Shim {
    /// Stands between the runtime and a CRIU until either ends.
    fn attend(&mut self, stand_in: &UnixStream) -> io::Result<()> {
        let process = Pid::from_raw(rpc::maker(stand_in)?.cast_signed())
            .ok_or_else(|| io::Error::other("CRIU has no process"))?;
        let process = pidfd_open(process, PidfdFlags::empty())?;
        let runtime = rpc::receive_descriptor(stand_in)?;
        let (criu, theirs) = rpc::pair()?;
        rpc::send_with(stand_in, b"x", &[theirs.as_fd()])?;
        drop(theirs);
        let ends = Ends {
            runtime,
            criu,
            process,
        };
        let passed = self.pass(&ends);
        // Nothing of ours moves the fence after this.
        let _ = self.fenced();
        // Whoever is gone has been waited for by nobody.
        passed.or_else(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error),
        })
    }

    /// Passes on requests, notifications and answers.
    fn pass(&mut self, ends: &Ends) -> io::Result<()> {
        while let Some(mut request) = rpc::receive(&ends.runtime)? {
            let kind = request.kind();
            let _folders = match kind {
                Kind::Dump | Kind::Restore => request.adopt_folders(rpc::maker(&ends.runtime)?)?,
                _ => Vec::new(),
            };
            self.init_pid = request.init_pid().or(self.init_pid);
            let given = match (self.at, kind) {
                (ParkAt::Restore, Kind::Version) => Some(self.park(Stop::Asked)?.word()?),
                (ParkAt::Restore, Kind::Restore) => Some(self.park(Stop::Ready)?.word()?),
                _ => None,
            };
            if given.as_ref().is_some_and(|given| !given.goes_on) {
                return Ok(());
            }
            self.going_since = Instant::now();
            rpc::send(&ends.criu, &request)?;
            drop(given);
            if !self.pass_answer(ends)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Passes on what CRIU says until it has answered a request; `false` when one of the two has ended.
    fn pass_answer(&mut self, ends: &Ends) -> io::Result<bool> {
        loop {
            let Some(said) = rpc::receive(&ends.criu)? else {
                return Ok(false);
            };
            self.went_on = self.going_since.elapsed();
            let Some(step) = said.step() else {
                rpc::send(&ends.runtime, &said)?;
                return Ok(true);
            };
            let prepared = self.prepare(&step);
            rpc::send(&ends.runtime, &said)?;
            let Some(answer) = rpc::receive(&ends.runtime)? else {
                return Ok(false);
            };
            let given = match prepared.and_then(|prepared| self.finish(prepared, ends)) {
                Ok(given) => given,
                Err(error) => {
                    note(&self.folder, &error);
                    rpc::send(&ends.criu, &Message::refusal())?;
                    continue;
                }
            };
            if given.is_some() {
                self.going_since = Instant::now();
            }
            let refused = given.as_ref().is_some_and(|given| !given.goes_on);
            let refusal = Message::refusal();
            rpc::send(&ends.criu, if refused { &refusal } else { &answer })?;
            // The agent is told by its end.
            drop(given);
        }
    }

    /// Does what is to be done at a step of CRIU's work before it is parked, and before the runtime hears of it: the agent
    /// goes on meanwhile.
    fn prepare(&mut self, step: &str) -> io::Result<Prepared> {
        match (step, self.at) {
            ("pre-dump", ParkAt::Dump) => {
                let namespace = &self.network_namespace;
                // The tool's first rules in a namespace take the kernel longer than all others.
                fence::set(namespace, Fence::Lifted).map_err(io::Error::other)?;
                let fence = Ready::new(namespace, Fence::Shut).map_err(io::Error::other)?;
                let to_freeze = self.to_freeze()?;
                Ok(Prepared::Stop(self.park(Stop::Begun)?, to_freeze, fence))
            }
            ("network-lock", ParkAt::Dump) => {
                let waiting = Instant::now();
                self.fenced()?;
                // That was not CRIU's own time.
                self.going_since += waiting.elapsed();
                Ok(Prepared::Nothing)
            }
            ("post-dump", ParkAt::Dump) => {
                if self.fencing.is_some() {
                    return Err(io::Error::other(
                        "CRIU did not ask for its network to be locked",
                    ));
                }
                let frozen = self.frozen.clone();
                let frozen = frozen.ok_or_else(|| io::Error::other("nothing was frozen"))?;
                // CRIU has thawed it, and holds the tasks.
                frozen.cgroup.freeze().map_err(io::Error::other)?;
                Ok(Prepared::Thaw(self.park(Stop::Dumped)?, frozen))
            }
            // A dump that failed or was vetoed: what was frozen is about to run on.
            ("network-unlock", ParkAt::Dump) if self.frozen.is_some() => {
                // Whatever became of it.
                let _ = self.fenced();
                fence::set(&self.network_namespace, Fence::Loopback).map_err(io::Error::other)?;
                Ok(Prepared::Nothing)
            }
            ("post-restore", ParkAt::Restore) => Ok(Prepared::Run(self.park(Stop::Restored)?)),
            _ => Ok(Prepared::Nothing),
        }
    }

    /// Waits for the word where CRIU is parked, and does what it says.
    fn finish(&mut self, prepared: Prepared, ends: &Ends) -> io::Result<Option<Given>> {
        match prepared {
            Prepared::Nothing => Ok(None),
            Prepared::Stop(parking, to_freeze, fence) => {
                let given = parking.word()?;
                if given.goes_on {
                    self.stop(to_freeze, fence, given.stream.try_clone()?)?;
                }
                Ok(Some(given))
            }
            Prepared::Thaw(parking, frozen) => {
                let given = parking.word()?;
                // Under CRIU's hands the tasks stay stopped, and a dump that goes on would hang on a frozen v1 cgroup.
                // Without CRIU nothing but the freeze stops them: the agent cures them first.
                if ends.is_criu_there() {
                    frozen.cgroup.thaw().map_err(io::Error::other)?;
                }
                Ok(Some(given))
            }
            Prepared::Run(parking) => parking.word().map(Some),
        }
    }

    /// What is to be frozen, noted where only its name has to be changed when it is.
    fn to_freeze(&self) -> io::Result<Frozen> {
        let init_pid = self
            .init_pid
            .ok_or_else(|| io::Error::other("the runtime did not say which process is dumped"))?;
        let cgroup = Cgroup::of(init_pid).map_err(io::Error::other)?;
        let frozen = Frozen { cgroup, init_pid };
        std::fs::write(self.folder.join(NOTED_FILE), serde_json::to_vec(&frozen)?)?;
        Ok(frozen)
    }

    /// Freezes a container and begins to shut its fence: CRIU looks at connections only after it has asked for the network
    /// to be locked. The `agent` is told when both is done.
    fn stop(
        &mut self,
        to_freeze: Frozen,
        fence: Option<Ready>,
        agent: UnixStream,
    ) -> io::Result<()> {
        let frozen = self.frozen.insert(to_freeze);
        std::fs::rename(self.folder.join(NOTED_FILE), self.folder.join(FROZEN_FILE))?;
        self.fencing = Some(std::thread::spawn(move || {
            let shut = fence.map_or(Ok(()), Ready::apply);
            drop(agent);
            shut
        }));
        frozen.cgroup.freeze().map_err(io::Error::other)
    }

    /// Waits until a fence that is being shut is so.
    fn fenced(&mut self) -> io::Result<()> {
        match self.fencing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(fenced)) => fenced.map_err(io::Error::other),
            Some(Err(_)) => Err(io::Error::other("the fence was not set")),
        }
    }

    /// Opens the socket at which the word is given, and tells the agent.
    fn park(&mut self, stop: Stop) -> io::Result<Parking> {
        let path = self.folder.join(PARK_SOCKET);
        let parking = match self.parkings.pop() {
            Some(ahead) => ahead.at(path)?,
            None => Parking::at_once(path)?,
        };
        let parked = Parked {
            stop,
            criu_ms: self.went_on.as_millis() as u64,
        };
        // An agent that has died meanwhile finds the socket above.
        let _ = sockets::connect(&self.folder.join(AGENT_SOCKET)).and_then(|mut agent| {
            let mut line = serde_json::to_vec(&parked)?;
            line.push(b'\n');
            agent.write_all(&line)
        });
        Ok(parking)
    }
}

impl Parking {
    /// So many as a hop needs, each where nobody looks for it yet.
    fn ahead(folder: &Path) -> io::Result<Vec<Self>> {
        let paths = (0..STOPS).map(|number| folder.join(format!("park-{number}.sock")));
        paths.map(Self::at_once).collect()
    }

    fn at_once(path: PathBuf) -> io::Result<Self> {
        let listener = sockets::bind(&path)?;
        Ok(Self { path, listener })
    }

    /// Puts it where the word is given.
    fn at(self, path: PathBuf) -> io::Result<Self> {
        std::fs::rename(self.path, &path)?;
        let listener = self.listener;
        Ok(Self { path, listener })
    }

    /// Waits for the word: `go` or `veto`. Connections come and go; only a word ends the wait.
    fn word(self) -> io::Result<Given> {
        let (goes_on, stream) = loop {
            let (stream, _) = self.listener.accept()?;
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).is_err() {
                continue;
            }
            match line.trim() {
                "go" => break (true, stream),
                "veto" => break (false, stream),
                _ => {}
            }
        };
        let _ = std::fs::remove_file(self.path);
        Ok(Given { goes_on, stream })
    }
}

impl Ends {
    fn is_criu_there(&self) -> bool {
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        let at_once = Timespec::try_from(Duration::ZERO).ok();
        poll(&mut ended, at_once.as_ref()) == Ok(0)
    }
}

#[cfg(test)]
mod tests;
