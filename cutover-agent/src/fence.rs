//! The fence: packet filters in a container's own network namespace, so that nothing gets in or out.
//!
//! A frozen application looks alive: the kernel goes on accepting connections into its backlog, and all of them
//! would run when it thaws. So the source is fenced before it is released from the freeze in either direction,
//! and the target before its first task exists. One nftables table in the `inet` family covers IPv4 and IPv6;
//! it is replaced and removed in one transaction.

use std::path::Path;
use std::process::{Command, Stdio};

use std::io::Write;

const TABLE: &str = "hopgate_fence";

/// How far a fence is shut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nothing but loopback passes.
    Shut,
    /// Neighbours on the container's own subnets pass too: containers of one site reach each other and can be
    /// probed, nothing routed gets in or out.
    Inside,
}

/// A fence could not be set or lifted.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The tool is missing or cannot run.
    #[error("cannot run nsenter and nft: {0}; install util-linux and nftables")]
    Spawn(std::io::Error),
    /// The rules were refused.
    #[error("nft refused the fence in {namespace}: {message}")]
    Refused {
        /// The network namespace.
        namespace: String,
        /// What nft said.
        message: String,
    },
}

/// Sets a fence, replacing any earlier one of ours.
///
/// # Errors
/// [`FenceError`]; the earlier fence then stands unchanged.
pub fn set(namespace: &Path, fence: Fence) -> Result<(), FenceError> {
    // Priority -400 comes before connection tracking and before CRIU's own lock.
    let (input, output) = match fence {
        Fence::Shut => (String::new(), String::new()),
        Fence::Inside => neighbours(namespace)?,
    };
    nft(
        namespace,
        &format!(
            "table inet {TABLE} {{}}\n\
             delete table inet {TABLE}\n\
             table inet {TABLE} {{\n\
               chain in {{ type filter hook input priority -400; policy drop; iif lo accept; {input} }}\n\
               chain out {{ type filter hook output priority -400; policy drop; oif lo accept; {output} }}\n\
             }}\n"
        ),
    )
}

/// Lifts our fence; succeeds when there is none, or no such namespace any more.
///
/// # Errors
/// [`FenceError`].
pub fn lift(namespace: &Path) -> Result<(), FenceError> {
    if !namespace.exists() {
        return Ok(());
    }
    nft(
        namespace,
        &format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\n"),
    )
}

/// Rules that accept the directly connected subnets of a namespace.
fn neighbours(namespace: &Path) -> Result<(String, String), FenceError> {
    let output = in_namespace(namespace)
        .args(["ip", "-o", "route", "show", "scope", "link"])
        .stdin(Stdio::null())
        .output()
        .map_err(FenceError::Spawn)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let subnets: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    if subnets.is_empty() {
        return Ok((String::new(), String::new()));
    }
    let set = subnets.join(", ");
    Ok((
        format!("ip saddr {{ {set} }} accept;"),
        format!("ip daddr {{ {set} }} accept;"),
    ))
}

/// A command that will run its arguments in a network namespace.
pub(crate) fn in_namespace(namespace: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display()));
    command
}

fn nft(namespace: &Path, rules: &str) -> Result<(), FenceError> {
    let mut child = in_namespace(namespace)
        .args(["nft", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(FenceError::Spawn)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(rules.as_bytes())
            .map_err(FenceError::Spawn)?;
    }
    let output = child.wait_with_output().map_err(FenceError::Spawn)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr)
        .lines()
        .next()
        .unwrap_or("no message")
        .to_owned();
    Err(FenceError::Refused {
        namespace: namespace.display().to_string(),
        message,
    })
}
