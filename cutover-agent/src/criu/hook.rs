//! What runs inside CRIU: the action script that parks a dump at `post-dump` and a restore at `post-restore`.
//!
//! At `post-dump` everything is written and the tasks are stopped; at `post-restore` they are built and have not
//! run. Exit code 0 lets CRIU go on (kill the source, run the target), anything else makes it roll back. CRIU
//! waits for the script as long as it takes, so the process *is* the resource that the agent holds.
//!
//! If CRIU is killed while parked, its tasks would wake; so the cgroup is frozen and the network fenced before
//! anything is told to the agent. The hook outlives a killed agent, and the next agent finds its socket.
//!
//! The script says with the shell's own means when CRIU is done, so that the agent goes on while the hook starts; what
//! matters for life and death waits for the hook.
//!
//! A dump is parked once before, at `pre-dump`: CRIU has found out what the kernel can do, the container still runs, and
//! clients need not wait for it, nor for the start of the tool that fences the network. Given the word there, the hook
//! freezes the cgroup and shuts the fence. CRIU's own freezer looks once whether the cgroup is frozen, and then only every
//! 100 ms (`wait_freezer_state_change` in seize.c). Finding it frozen, CRIU thaws it when it holds the tasks, and freezes
//! it again when it lets them go alive; whoever gives a veto thaws it after that.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::fence::{self, Fence, Ready};
use crate::sockets;

/// The hook's own listening socket, in its park folder.
pub(super) const PARK_SOCKET: &str = "park.sock";
/// The agent's listening socket, in the same folder: the hook reports there.
pub(super) const AGENT_SOCKET: &str = "agent.sock";
/// Where the script says that CRIU has done its work, in the same folder.
pub(super) const DONE_PIPE: &str = "done";
/// What the hook is to do, written by the agent before it starts the runtime.
pub(super) const SPEC_FILE: &str = "hook.json";
/// What the hook froze, read by whoever has to thaw without it.
pub(super) const FROZEN_FILE: &str = "frozen.json";
/// Why the hook refused, for the agent's message.
pub(super) const ERROR_FILE: &str = "hook-error";

/// Which end of a hop a hook parks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParkAt {
    /// At `post-dump`, at the source.
    Dump,
    /// At `post-restore`, at the target.
    Restore,
}

impl ParkAt {
    /// The steps of CRIU that the hook has to do with, as a pattern of the shell.
    pub(super) const fn actions(self) -> &'static str {
        match self {
            Self::Dump => "pre-dump|post-dump|network-unlock",
            Self::Restore => "post-restore",
        }
    }

    /// The step at which CRIU has done what it is parked for.
    pub(super) const fn done(self) -> &'static str {
        match self {
            Self::Dump => "post-dump",
            Self::Restore => "post-restore",
        }
    }
}

/// The hook's orders.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Spec {
    pub at: ParkAt,
    pub network_namespace: PathBuf,
}

/// What the hook froze.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Frozen {
    pub cgroup: Cgroup,
    pub init_pid: u32,
}

/// The entry point of the hidden `hook` command. `folder` is the park folder.
#[must_use]
pub fn run(folder: &Path) -> ExitCode {
    let action = std::env::var("CRTOOLS_SCRIPT_ACTION").unwrap_or_default();
    match act(folder, &action) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // The agent reads the file; CRIU's log gets the same line.
            let _ = std::fs::write(folder.join(ERROR_FILE), error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn act(folder: &Path, action: &str) -> std::io::Result<bool> {
    let spec: Spec = serde_json::from_slice(&std::fs::read(folder.join(SPEC_FILE))?)?;
    match (action, spec.at) {
        ("pre-dump", ParkAt::Dump) => {
            let fence = Ready::new(&spec.network_namespace, Fence::Shut);
            let fence = fence.map_err(std::io::Error::other)?;
            let released = park(folder)?;
            if released {
                std::thread::scope(|threads| {
                    let fencing = threads.spawn(|| fence.map_or(Ok(()), Ready::apply));
                    freeze(folder)?;
                    match fencing.join() {
                        Ok(fenced) => fenced.map_err(std::io::Error::other),
                        Err(_) => Err(std::io::Error::other("the fence was not set")),
                    }
                })?;
            }
            Ok(released)
        }
        ("post-dump", ParkAt::Dump) => {
            let criu = rustix::process::getppid();
            let frozen = freeze(folder)?;
            let released = park(folder)?;
            // Under CRIU's hands the tasks stay stopped, and a dump that goes on would hang on a frozen v1 cgroup.
            // Without CRIU nothing but the freeze stops them: the agent cures them first.
            if rustix::process::getppid() == criu {
                frozen.cgroup.thaw().map_err(std::io::Error::other)?;
            }
            Ok(released)
        }
        // A dump that failed or was vetoed: what was frozen is about to run on.
        ("network-unlock", ParkAt::Dump) if folder.join(FROZEN_FILE).exists() => {
            let set = fence::set(&spec.network_namespace, Fence::Loopback);
            set.map_err(std::io::Error::other).map(|()| true)
        }
        ("post-restore", ParkAt::Restore) => park(folder),
        _ => Ok(true),
    }
}

/// The first process of the container that CRIU dumps.
fn init_pid() -> std::io::Result<u32> {
    let named = std::env::var("CRTOOLS_INIT_PID").ok();
    named.and_then(|pid| pid.parse().ok()).ok_or_else(|| {
        std::io::Error::other("CRIU did not say which process it dumps (CRTOOLS_INIT_PID)")
    })
}

fn freeze(folder: &Path) -> std::io::Result<Frozen> {
    let init_pid = init_pid()?;
    let cgroup = Cgroup::of(init_pid).map_err(std::io::Error::other)?;
    let frozen = Frozen { cgroup, init_pid };
    std::fs::write(folder.join(FROZEN_FILE), serde_json::to_vec(&frozen)?)?;
    frozen.cgroup.freeze().map_err(std::io::Error::other)?;
    Ok(frozen)
}

/// Waits for the word: `go` or `veto`. Connections come and go; only a word ends the wait.
pub(super) fn park(folder: &Path) -> std::io::Result<bool> {
    let listener = sockets::bind(&folder.join(PARK_SOCKET))?;
    // Kept open until the process ends, so that the agent sees the end of the hook as the end of this stream.
    // An agent that has died meanwhile finds the socket above.
    let agent = sockets::connect(&folder.join(AGENT_SOCKET)).and_then(|mut stream| {
        stream.write_all(b"parked\n")?;
        Ok(stream)
    });
    let word = loop {
        let (stream, _) = listener.accept()?;
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
    // Deliberately leaked: both streams close when the process ends, after the thaw above us.
    std::mem::forget((agent, word.1));
    let _ = std::fs::remove_file(folder.join(PARK_SOCKET));
    Ok(word.0)
}
