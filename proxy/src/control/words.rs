//! What a person may ask of the proxy as a process: facts, a reload, an upgrade. Gates have words of their own, in
//! `cutover_protocol::hold`, which agents speak too; both come by the same socket, a JSON line each way.

use std::net::SocketAddr;
use std::path::PathBuf;

use cutover_protocol::id::ServiceName;
use serde::{Deserialize, Serialize};

use crate::config::ListenAddress;
use crate::ledger::Entry;

/// Entries of the ledger that one answer has room for: each has at most 1.5 KiB, a line of the protocol 1 MiB.
pub const LEDGER_ENTRIES_MAX: usize = 500;

/// One thing asked of the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum ProcessCommand {
    /// Say what you are.
    Process,
    /// Tell the newest entries of the ledger of unknown outcomes.
    Ledger {
        /// How many, at most [`LEDGER_ENTRIES_MAX`].
        count: usize,
    },
    /// Read the configuration again and go by it.
    Reload,
    /// Start a new process in the place of this one.
    Upgrade {
        /// The program; the one that runs now, as it is on disk, if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        binary: Option<PathBuf>,
    },
    /// Said by the new process: hand everything over to me.
    Handover,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum ProcessAnswer {
    /// Answer to `process`.
    Process(Box<ProcessStatus>),
    /// Answer to `ledger`: the newest last.
    Ledger {
        /// What it has.
        entries: Vec<Entry>,
    },
    /// Answer to `reload`: the new configuration is in force.
    Reloaded(Reloaded),
    /// Answer to `upgrade`: another process serves now.
    Upgraded {
        /// Its number for the kernel.
        pid: u32,
    },
    /// Answer to `handover`; beside its first byte comes one end of the channel for everything else.
    HandingOver,
    /// Nothing was changed.
    Refused {
        /// Why, for a program.
        reason: ProcessRefusal,
        /// Why, for a person, and what to do.
        message: String,
    },
}

/// What a reload did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Of the configuration now in force; the first has number 1.
    pub generation: u64,
    /// Services that are new.
    pub services_added: Vec<ServiceName>,
    /// Services that are no longer served.
    pub services_removed: Vec<ServiceName>,
    /// Addresses that are new.
    pub listeners_added: Vec<String>,
    /// Addresses that no longer accept.
    pub listeners_removed: Vec<String>,
}

/// Why the process did not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessRefusal {
    /// The configuration cannot be used, or not without a restart.
    Configuration,
    /// A service is in a hop, or the process is doing something else.
    Busy,
    /// The system did not give what the configuration asks for.
    Failed,
    /// The line was not a command.
    BadCommand,
}

/// A proxy as a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Of the program.
    pub version: String,
    /// Its number for the kernel.
    pub pid: u32,
    /// Since its start, in milliseconds.
    pub uptime_ms: u64,
    /// Worker threads.
    pub workers: usize,
    /// The configuration's file.
    pub config: PathBuf,
    /// How many configurations there have been, the one in force included.
    pub generation: u64,
    /// Reloads that took effect.
    pub reloads_done: u64,
    /// Reloads that were refused.
    pub reloads_refused: u64,
    /// Why the last reload was refused, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_refusal: Option<String>,
    /// The process before the last upgrade, while it still finishes what it began; zero if its number is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<i32>,
    /// Where clients connect.
    pub listeners: Vec<ListenerStatus>,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Whose it is; `None` for metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// As it is configured.
    pub address: ListenAddress,
    /// Where it is, with the port the kernel chose; `None` for a unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<SocketAddr>,
}

impl ProcessCommand {
    /// Whether a line means the process and not a gate.
    pub(crate) fn is_meant_by(line: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Word {
            command: String,
        }
        const WORDS: [&str; 5] = ["process", "ledger", "reload", "upgrade", "handover"];
        serde_json::from_slice::<Word>(line)
            .is_ok_and(|word| WORDS.contains(&word.command.as_str()))
    }
}
