//! Hopgate's two ends of a copy: processes with the agent's own library, told on standard input what to do.
//!
//! The source reads a word a line and answers with one line of JSON. It keeps its session between copies, as a hop does.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_agent::peer::{self, Folder, Handler, PeerTimeouts, Session};
use cutover_agent::tls::{ClientTls, ServerTls, TlsPaths};
use cutover_agent::transfer::{SyncOptions, TreeName};
use serde::{Deserialize, Serialize};

use crate::command::{CommandError, Shell, kill_group};
use crate::lab::error::{LabError, Result};

/// Longest one copy may take, in seconds: the slowest link with the largest set it is given.
const COPY_S: u64 = 1800;
/// As in a hop.
const TIMEOUTS: PeerTimeouts = PeerTimeouts {
    connect: Duration::from_secs(10),
    dead_after: Duration::from_secs(10),
    resume_within: Duration::from_secs(30),
};
/// Streams of a session, the default of a plan.
const STREAMS: u16 = 8;

/// What the source is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Connect, and copy beside running writers.
    First,
    /// Copy again, nobody writing.
    Frozen,
}

impl Word {
    const fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Frozen => "frozen",
        }
    }
}

/// What one copy took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Copied {
    /// From the word to the seal, connecting included.
    pub seconds: f64,
    /// Bytes of blocks that had to move.
    pub bytes_data: u64,
    /// What went wrong, if anything did.
    pub failure: Option<String>,
}

/// The target's end; serves until it is killed.
///
/// # Errors
/// When it cannot listen or has no certificates.
pub fn target(listen: SocketAddr, tls: &Path, tree: PathBuf) -> anyhow::Result<Infallible> {
    struct Deaf;
    impl Handler for Deaf {
        type Request = ();
        type Response = ();
        async fn handle(&self, (): ()) {}
    }
    let tls = ServerTls::load(&identity(tls, "target"), "source")?;
    let folder = Folder {
        path: tree,
        seeds: Vec::new(),
    };
    runtime()?.block_on(async move {
        let listener = tokio::net::TcpListener::bind(listen).await?;
        let trees = Arc::new(move |name: &TreeName| {
            (name.as_str() == "bench/tree").then(|| folder.clone())
        });
        Ok(peer::serve(listener, tls, TIMEOUTS, Arc::new(Deaf), trees).await?)
    })
}

/// The source's end; does what it reads until its input ends.
///
/// # Errors
/// When it has no certificates; a copy that fails is an answer.
pub fn source(connect: SocketAddr, tls: &Path, tree: &Path) -> anyhow::Result<()> {
    let tls = ClientTls::load(&identity(tls, "source"), "target")?;
    let runtime = runtime()?;
    let mut session = None;
    for line in std::io::stdin().lines() {
        let frozen = line?.trim() == Word::Frozen.as_str();
        let copied = runtime.block_on(copy(&mut session, connect, &tls, tree, frozen));
        println!("{}", serde_json::to_string(&copied)?);
    }
    Ok(())
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}

fn identity(folder: &Path, role: &str) -> TlsPaths {
    TlsPaths {
        ca: folder.join("ca.pem"),
        certificate: folder.join(format!("{role}.pem")),
        key: folder.join(format!("{role}.key")),
    }
}

async fn copy(
    session: &mut Option<Session>,
    connect: SocketAddr,
    tls: &ClientTls,
    tree: &Path,
    frozen: bool,
) -> Copied {
    let start = Instant::now();
    let copying = async {
        if session.is_none() {
            *session = Some(peer::connect(connect, tls.clone(), TIMEOUTS, STREAMS).await?);
        }
        let limit = Duration::from_secs(COPY_S);
        let options = if frozen {
            SyncOptions::frozen(limit, std::collections::HashSet::new())
        } else {
            SyncOptions::live(limit)
        };
        let name = TreeName::new("bench/tree")?;
        match session {
            Some(session) => Ok(session.sync(&name, tree, options).await?),
            None => anyhow::bail!("there is no session"),
        }
    };
    let outcome: anyhow::Result<_> = copying.await;
    let seconds = start.elapsed().as_secs_f64();
    match outcome {
        Ok(report) => Copied {
            seconds,
            bytes_data: report.bytes_data,
            failure: None,
        },
        Err(error) => Copied {
            seconds,
            failure: Some(error.to_string()),
            ..Copied::default()
        },
    }
}

/// The source's end as a child of the bench; dropping it ends it.
#[derive(Debug)]
pub struct Source {
    child: Child,
    words: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Source {
    /// Starts it; it connects only when it is told to copy.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(shell: &Shell) -> Result<Self> {
        let mut command = shell.prepare();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let start = |source| CommandError::Start {
            line: shell.line(),
            source,
        };
        let mut child = command.spawn().map_err(start)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(words), Some(answers)) => Ok(Self {
                child,
                words,
                answers: BufReader::new(answers),
            }),
            _ => Err(garbled("no pipes")),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it copy, and waits for the outcome; it gives up by itself.
    ///
    /// # Errors
    /// When it died, or failed to copy.
    pub fn tell(&mut self, word: Word) -> Result<Copied> {
        let mut line = String::new();
        let asked = writeln!(self.words, "{}", word.as_str())
            .and_then(|()| self.words.flush())
            .and_then(|()| self.answers.read_line(&mut line));
        let copied: Copied = match asked {
            Ok(1..) => serde_json::from_str(&line).map_err(|error| garbled(error.to_string()))?,
            _ => return Err(garbled("it ended")),
        };
        match copied.failure {
            None => Ok(copied),
            Some(what) => Err(LabError::Differs { what }),
        }
    }
}

fn garbled(what: impl Into<String>) -> LabError {
    LabError::Output {
        program: "the source's end of a copy",
        what: what.into(),
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}
