//! The words between the `cutover-agent` command line and the serving agent: one JSON object a line, over a unix
//! socket that only its owner may open. One command a connection; the answer is lines until the last.

use std::path::{Path, PathBuf};

use cutover_protocol::hop::{Phase, Stall};
use cutover_protocol::id::{HopId, Site};
use cutover_protocol::plan::RawPlan;
use cutover_protocol::tunnel::Fare;
use cutover_protocol::wire::{Finding, TreeFacts};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::names::OldDoor;
use crate::report::{Progress, Report};
use crate::sockets;
use crate::target::Standing;

/// One command to the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Check both sides; change nothing.
    Preflight {
        /// The plan as written.
        plan: RawPlan,
    },
    /// Hop, and tell how it goes.
    Hop {
        /// The plan as written.
        plan: RawPlan,
        /// Fail on purpose after this phase has done its work.
        fail_at: Option<Phase>,
    },
    /// What goes on.
    Status,
    /// Undo the hop that is under way.
    Abort,
    /// Take up what a dead agent left.
    Recover,
    /// Close the old door after a hop: take the tunnel down, so that late clients at the source find nothing.
    Retire {
        /// Also when somebody may still come.
        anyway: bool,
    },
}

/// One line of an answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// More lines follow.
    Progress(Progress),
    /// The last line of a hop or a recovery.
    Report(Box<Report>),
    /// The only line of a preflight.
    Preflight(Checked),
    /// The only line of a status.
    Status(Box<Status>),
    /// It is done; nothing more to say.
    Done {
        /// One sentence.
        message: String,
    },
    /// It was refused or failed.
    Error {
        /// One sentence that says what to do.
        message: String,
    },
}

/// What a preflight found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checked {
    /// Everything found, both sides.
    pub findings: Vec<Finding>,
    /// What would be moved.
    pub trees: Vec<TreeFacts>,
    /// The predicted stall in milliseconds.
    pub stall_ms_predicted: u64,
    /// What it is made of.
    pub stall: Stall,
    /// Memory rounds that would be made at most; 0 means one full dump while frozen.
    pub rounds_max: u32,
}

/// What an agent does and knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Which side it is.
    pub site: Site,
    /// The hop it drives, if any.
    pub hop: Option<HopId>,
    /// Where that hop stands.
    pub phase: Option<Phase>,
    /// What moves right now, as [`Progress::Moving`].
    #[serde(default)]
    pub moving: Option<Progress>,
    /// The hop it is the target of, if any.
    pub standing: Option<Standing>,
    /// A hop waits for `recover`.
    pub unfinished: bool,
    /// The tunnel, while there is one.
    #[serde(default)]
    pub tunnel: Option<Fare>,
    /// Who still comes by the source after a commit.
    #[serde(default)]
    pub old_door: Option<OldDoor>,
    /// What the last hop still owes at the target.
    pub owed: Vec<String>,
}

/// The agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers.
    #[error(
        "no agent answers at {path}: {source}; start `cutover-agent serve`, or name its socket with --control"
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection ended in the middle.
    #[error(
        "the agent at {path} went away before it answered; `cutover-agent status` and `recover` tell more"
    )]
    Cut {
        /// The socket.
        path: PathBuf,
    },
    /// It said something else.
    #[error("the agent's answer makes no sense: {0}")]
    Nonsense(#[from] serde_json::Error),
}

/// Gives a command and hands each line to `on_line`; returns the last one.
///
/// # Errors
/// [`ControlError`]; the agent's own errors come as [`Line::Error`].
pub async fn ask(
    path: &Path,
    command: &Command,
    mut on_line: impl FnMut(&Line),
) -> Result<Line, ControlError> {
    let unreachable = |source| ControlError::Unreachable {
        path: path.to_owned(),
        source,
    };
    let stream = sockets::dial(path).map_err(unreachable)?;
    let (read, mut write) = stream.into_split();
    let mut text = serde_json::to_vec(command)?;
    text.push(b'\n');
    write.write_all(&text).await.map_err(unreachable)?;
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(text)) = lines.next_line().await {
        let line: Line = serde_json::from_str(&text)?;
        on_line(&line);
        if !matches!(line, Line::Progress(_)) {
            return Ok(line);
        }
    }
    Err(ControlError::Cut {
        path: path.to_owned(),
    })
}
