//! What the source's agent asks of the target's, and what it is told. Only the source drives; the target keeps
//! no opinion of its own: what it built stays parked or fenced until it is told otherwise.

use serde::{Deserialize, Serialize};

use crate::id::{ContainerName, HopId};
use crate::plan::{Engine, Probe};
use crate::tunnel::flip::Moved;
use crate::tunnel::{Answer, Offer};

/// One request to the target's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Look at the target and compare; changes nothing.
    Inspect(Inspect),
    /// This hop is about to stage files. Whatever an earlier hop left unfinished is taken down first.
    Begin {
        /// The hop.
        hop: HopId,
        /// The containers that will come, in dependency order.
        containers: Vec<ContainerName>,
    },
    /// Begin to restore the containers, as far as that goes before anything of the last transfer has arrived. What went
    /// further before is given up. Nothing is lost when it fails.
    BeginRestore {
        /// The hop.
        hop: HopId,
        /// The containers in dependency order.
        containers: Vec<ContainerName>,
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// The trees of the last transfer have arrived: go on with what has begun as far as that goes without images. Nothing
    /// is lost when it fails.
    ReadyRestore {
        /// The hop.
        hop: HopId,
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Build every container; leave each parked before its first instruction.
    Restore {
        /// The hop.
        hop: HopId,
        /// The containers in dependency order.
        containers: Vec<ContainerName>,
        /// How they were moved.
        engine: Engine,
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Run what was built, behind the fence, and probe it.
    Verify {
        /// The hop.
        hop: HopId,
        /// What must answer.
        probes: Vec<Probe>,
        /// How long it may take, in milliseconds.
        timeout_ms: u64,
    },
    /// The register says that the target owns the service: lift the fence.
    Unfence {
        /// The hop.
        hop: HopId,
    },
    /// Kill whatever this hop built.
    Kill {
        /// The hop.
        hop: HopId,
    },
    /// Delete what was staged for this hop.
    Drop {
        /// The hop.
        hop: HopId,
        /// Whose trees.
        containers: Vec<ContainerName>,
    },
    /// The hop is over and the target serves: delete the images, keep the files.
    Finish {
        /// The hop.
        hop: HopId,
    },
    /// Make the target's end of a tunnel. An end of an earlier hop that was not committed is closed first.
    OpenTunnel(Offer),
    /// Packets of so many bytes pass the tunnel: use that.
    FitTunnel {
        /// The hop.
        hop: HopId,
        /// The largest packet, in bytes.
        mtu: u16,
    },
    /// Close the target's end of this hop's tunnel.
    CloseTunnel {
        /// The hop.
        hop: HopId,
    },
    /// Lead what the moved containers send to carried peers into the tunnel, before the fence is lifted.
    ReturnThrough {
        /// The hop.
        hop: HopId,
        /// What moves.
        moved: Moved,
    },
}

/// What preflight wants to know of the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspect {
    /// The containers that would come.
    pub containers: Vec<ContainerName>,
    /// How they would be moved.
    pub engine: Engine,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// It is done, or was already.
    Done,
    /// Answer to [`Request::Inspect`].
    Inspected(Box<Inspected>),
    /// Answer to [`Request::Verify`]: one sentence a probe.
    Verified(Vec<String>),
    /// Answer to [`Request::OpenTunnel`].
    Tunnel(Answer),
    /// It failed; what was begun has been taken back as far as it could be.
    Failed {
        /// One line for a person.
        message: String,
    },
    /// Answer to [`Request::Restore`].
    Restored {
        /// CRIU's own time for the container that took longest, in milliseconds; 0 with another engine.
        restore_ms: u64,
    },
}

/// What one side is and has. Both sides fill it; preflight compares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Inspected {
    /// `uname -r`.
    pub kernel: String,
    /// `uname -m`.
    pub machine: String,
    /// Feature words of the first processor, as the kernel lists them.
    pub cpu_flags: Vec<String>,
    /// CRIU's version, when it runs.
    pub criu: Option<String>,
    /// The runtime's version.
    pub runtime: Option<String>,
    /// CRIU can track dirty pages here.
    pub tracks_dirty_pages: bool,
    /// Wall clock, milliseconds since 1970.
    pub clock_ms: u64,
    /// One entry a container and tree.
    pub trees: Vec<TreeFacts>,
    /// What makes a hop impossible or risky on this side.
    pub findings: Vec<Finding>,
}

/// One tree of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeFacts {
    /// `container/tree`.
    pub name: String,
    /// Bytes of file content in it now.
    pub bytes: u64,
    /// Bytes free on its file system.
    pub free_bytes: u64,
    /// Identifies the file system, so that free bytes shared by several trees are counted once.
    pub device: u64,
}

/// Something preflight found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether the hop may go on.
    pub severity: Severity,
    /// One line: what, on what, and what to do.
    pub message: String,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// The hop may be slower or riskier than expected.
    Warning,
    /// The hop would fail.
    Refusal,
}
