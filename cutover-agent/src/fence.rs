//! The fence: packet filters in a container's own network namespace, so that nothing gets in or out.
//!
//! A frozen application looks alive: the kernel goes on accepting connections into its backlog, and all of them
//! would run when it thaws. So the source is fenced from the freeze until it is released from it in either direction,
//! and the target before its first task exists. That does what CRIU's own lock of the network is for, which is left out
//! (`network-lock skip`): its four calls of iptables take longer than all of ours.
//!
//! One nftables table in the `inet` family covers IPv4 and IPv6; it is replaced and removed in one transaction.

mod notice;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use notice::Notice;

const TABLE: &str = "hopgate_fence";

/// CRIU's mark on the packets it makes itself (`SOCCR_MARK` in its soccr.h).
const CRIU_PASSES: &str = "meta mark 0xc114 accept;";
const LOOPBACK_IN: &str = "iif lo accept; ";
const LOOPBACK_OUT: &str = "oif lo accept; ";

/// How far a fence is shut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nothing passes, not even within the container: what CRIU reads of one end of a connection must stay true until
    /// it has read the other. Only what CRIU itself sends to complete a closing connection does.
    Shut,
    /// Nothing but loopback passes: the container runs and is not reached.
    Loopback,
    /// Neighbours on the container's own subnets pass too: containers of one site reach each other and can be
    /// probed, nothing routed gets in or out.
    Inside,
    /// There is none.
    Lifted,
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

/// Moves a fence, replacing any earlier one of ours; succeeds when there is none to lift.
///
/// # Errors
/// [`FenceError`]; the earlier fence then stands unchanged.
pub fn set(namespace: &Path, fence: Fence) -> Result<(), FenceError> {
    match Ready::new(namespace, fence)? {
        Some(tool) => tool.apply(),
        None => Ok(()),
    }
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

/// The tool that moves a fence, started and waiting for its rules: its start takes longer than its work. Dropped, it ends
/// and changes nothing.
#[derive(Debug)]
pub struct Ready {
    /// Until the rules are given to it.
    tool: Option<Child>,
    /// Told by the kernel when the fence has moved; without it, the tool's end tells.
    notice: Option<Notice>,
    rules: String,
    namespace: PathBuf,
}

impl Ready {
    /// Starts the tool in a network namespace; `None` when there is nothing to lift, because the namespace is gone.
    ///
    /// # Errors
    /// [`FenceError::Spawn`].
    pub fn new(namespace: &Path, fence: Fence) -> Result<Option<Self>, FenceError> {
        if fence == Fence::Lifted && !namespace.exists() {
            return Ok(None);
        }
        let notice = Notice::subscribe(namespace, TABLE)
            .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell of fences"))
            .ok();
        let tool = in_namespace(namespace)
            .args(["nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(notice.as_ref().map_or_else(Stdio::null, Notice::kept))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(FenceError::Spawn)?;
        let mut ready = Self {
            tool: Some(tool),
            notice,
            rules: String::new(),
            namespace: namespace.to_owned(),
        };
        ready.rules = rules(namespace, fence)?;
        Ok(Some(ready))
    }

    /// Moves the fence. It has moved as soon as the kernel says so: the tool takes several times as long to end, because
    /// the kernel lets go of what was replaced before it closes the tool's socket.
    ///
    /// # Errors
    /// As [`set`].
    pub fn apply(mut self) -> Result<(), FenceError> {
        let Some(mut tool) = self.tool.take() else {
            return Ok(());
        };
        // A tool that ended before it read them says why.
        let written = match tool.stdin.take() {
            Some(mut stdin) => stdin.write_all(self.rules.as_bytes()),
            None => Ok(()),
        };
        let mut stderr = tool.stderr.take();
        if let (Some(notice), Some(stderr)) = (&self.notice, &stderr)
            && notice.comes_before_end_of(stderr)
        {
            std::thread::spawn(move || tool.wait());
            return Ok(());
        }
        self.judge(tool, stderr.as_mut())?;
        written.map_err(FenceError::Spawn)
    }

    /// What the tool made of the rules, by its end.
    fn judge(&self, mut tool: Child, stderr: Option<&mut ChildStderr>) -> Result<(), FenceError> {
        let mut message = String::new();
        if let Some(stderr) = stderr {
            stderr
                .read_to_string(&mut message)
                .map_err(FenceError::Spawn)?;
        }
        if !tool.wait().map_err(FenceError::Spawn)?.success() {
            return Err(FenceError::Refused {
                namespace: self.namespace.display().to_string(),
                message: message.lines().next().unwrap_or("no message").to_owned(),
            });
        }
        Ok(())
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(mut tool) = self.tool.take() {
            // It ends when there is nothing more to read.
            drop(tool.stdin.take());
            let _ = tool.wait();
        }
    }
}

fn rules(namespace: &Path, fence: Fence) -> Result<String, FenceError> {
    let (input, output) = match fence {
        Fence::Shut => (CRIU_PASSES.to_owned(), CRIU_PASSES.to_owned()),
        Fence::Loopback => (LOOPBACK_IN.to_owned(), LOOPBACK_OUT.to_owned()),
        Fence::Inside => {
            let (input, output) = neighbours(namespace)?;
            (
                LOOPBACK_IN.to_owned() + &input,
                LOOPBACK_OUT.to_owned() + &output,
            )
        }
        Fence::Lifted => {
            return Ok(format!(
                "table inet {TABLE} {{}}\ndelete table inet {TABLE}\n"
            ));
        }
    };
    // Priority -400 comes before connection tracking.
    Ok(format!(
        "table inet {TABLE} {{}}\n\
         delete table inet {TABLE}\n\
         table inet {TABLE} {{\n\
           chain in {{ type filter hook input priority -400; policy drop; {input} }}\n\
           chain out {{ type filter hook output priority -400; policy drop; {output} }}\n\
         }}\n"
    ))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Runs `test` with a network namespace of its own, in which a device has a subnet with neighbours. It needs root;
    /// without it nothing is proved.
    fn in_own_namespace(test: impl FnOnce(&Path) + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            eprintln!("network namespaces need root: nothing was tried");
            return;
        }
        let within = std::thread::spawn(|| {
            // SAFETY: no pointers; it concerns this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            // SAFETY: no pointers.
            let thread = unsafe { libc::gettid() };
            let namespace =
                PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()));
            for arguments in [
                "link set lo up",
                "link add site type veth peer name there",
                "addr add 192.0.2.9/24 dev site",
                "link set site up",
                "link set there up",
            ] {
                let status = Command::new("ip").args(arguments.split(' ')).status();
                assert!(status.unwrap().success(), "ip {arguments}");
            }
            test(&namespace);
        });
        within.join().unwrap();
    }

    /// Whether a packet can be sent from here; a filter on the way out refuses it at once.
    fn passes(to: &str) -> bool {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"anybody?", to).is_ok()
    }

    #[test]
    fn each_fence_lets_through_what_it_says() {
        in_own_namespace(|namespace| {
            let (own, neighbour) = ("127.0.0.1:9", "192.0.2.10:9");
            // From none, from each to the next, and once more.
            for (fence, expected) in [
                (Fence::Shut, (false, false)),
                (Fence::Loopback, (true, false)),
                (Fence::Inside, (true, true)),
                (Fence::Inside, (true, true)),
                (Fence::Shut, (false, false)),
                (Fence::Lifted, (true, true)),
                (Fence::Lifted, (true, true)),
            ] {
                set(namespace, fence).unwrap();
                assert_eq!((passes(own), passes(neighbour)), expected, "{fence:?}");
            }
        });
    }

    #[test]
    fn what_was_made_ready_changes_nothing_until_it_is_applied() {
        in_own_namespace(|namespace| {
            let ready = Ready::new(namespace, Fence::Shut).unwrap().unwrap();
            let dropped = Ready::new(namespace, Fence::Shut).unwrap();
            drop(dropped);
            assert!(passes("127.0.0.1:9"));
            ready.apply().unwrap();
            assert!(!passes("127.0.0.1:9"));
        });
    }

    #[test]
    fn a_namespace_that_is_gone_has_nothing_to_lift_and_cannot_be_shut() {
        let gone = Path::new("/run/netns/there-is-no-such-namespace");
        set(gone, Fence::Lifted).unwrap();
        let text = set(gone, Fence::Shut).unwrap_err().to_string();
        assert!(text.contains("there-is-no-such-namespace"), "{text}");
    }
}
