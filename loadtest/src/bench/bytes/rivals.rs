//! The programs Hopgate is compared with: rsync's daemon in clear text, and iperf3.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::bytes::stage::{Stage, TARGET};
use crate::command::{CommandError, Shell};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::packages::Need;
use crate::lab::process::Process;

/// What the comparison needs besides the lab.
pub const NEEDED: &[Need] = &[
    Need {
        program: "rsync",
        package: "rsync",
        why: "is what Hopgate's copies are compared with",
    },
    Need {
        program: "iperf3",
        package: "iperf3",
        why: "says what a link gives",
    },
];

const RSYNC_PORT: u16 = 7873;
const IPERF_PORT: u16 = 7201;
/// Longest one copy may take, in seconds.
const COPY_S: u64 = 1800;
/// rsync's exit code when files vanished while it ran: to be expected beside a writer.
const VANISHED: i32 = 24;
/// Room for iperf3's start and report beyond its measurement, in seconds.
const IPERF_EXTRA_S: u64 = 30;

/// How rsync is asked to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rsync {
    /// `rsync -a`
    Plain,
    /// `rsync -az`
    Compressed,
}

impl Rsync {
    /// As in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "rsync -a",
            Self::Compressed => "rsync -az",
        }
    }

    /// The name of its folder at the target, and of the daemon's module for it.
    #[must_use]
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Plain => "rsync-a",
            Self::Compressed => "rsync-az",
        }
    }

    const fn flags(self) -> &'static str {
        match self {
            Self::Plain => "-a",
            Self::Compressed => "-az",
        }
    }
}

/// Starts rsync's daemon at the target.
///
/// # Errors
/// When it does not come up.
pub fn daemon(stage: &Stage) -> Result<Process> {
    let file = stage.run.path.join("rsyncd.conf");
    let mut text =
        "use chroot = yes\nuid = 0\ngid = 0\nread only = no\nreverse lookup = no\n".to_owned();
    for system in [Rsync::Plain, Rsync::Compressed] {
        let (name, path) = (system.folder(), stage.target_tree(system.folder()));
        text += &format!("[{name}]\n    path = {}\n", path.display());
    }
    fs::write(&file, text).on("write", &file)?;
    let shell = Shell::new("rsync")
        .args(["--daemon", "--no-detach", "--address", TARGET])
        .arg(format!("--port={RSYNC_PORT}"))
        .arg(format!("--config={}", file.display()));
    stage.serve("rsyncd", shell, RSYNC_PORT)
}

/// Copies `tree` with rsync, and gives the seconds it took.
///
/// # Errors
/// When rsync fails.
pub fn rsync(stage: &Stage, system: Rsync, tree: &Path) -> Result<f64> {
    // Deletions as ours; holes are kept, as ours are: otherwise a sparse file would fill the target.
    let shell = Shell::new("rsync")
        .args([system.flags(), "--delete", "--sparse"])
        .arg(format!("{}/", tree.display()))
        .arg(format!(
            "rsync://{TARGET}:{RSYNC_PORT}/{}/",
            system.folder()
        ))
        .within(Duration::from_secs(COPY_S));
    let shell = stage.at("source", shell);
    let start = Instant::now();
    let ended = shell.end()?;
    let seconds = start.elapsed().as_secs_f64();
    match ended.code {
        Some(0 | VANISHED) => Ok(seconds),
        code => Err(LabError::Output {
            program: "rsync",
            what: format!("{code:?}: {}", ended.err.trim()),
        }),
    }
}

/// What iperf3 got through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flow {
    /// How long it sent.
    pub seconds: f64,
    /// What arrived.
    pub bytes: u64,
}

impl Flow {
    /// Bytes a second that arrived.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

/// Starts iperf3's server at the target.
///
/// # Errors
/// When it does not come up.
pub fn iperf_server(stage: &Stage) -> Result<Process> {
    let port = IPERF_PORT.to_string();
    let shell = Shell::new("iperf3").args(["-s", "-B", TARGET, "-p", &port]);
    stage.serve("iperf3", shell, IPERF_PORT)
}

/// Sends with so many streams from source to target for so long.
///
/// # Errors
/// When iperf3 fails or its report cannot be read.
pub fn iperf(stage: &Stage, streams: u32, length: Duration) -> Result<Flow> {
    let shell = Shell::new("iperf3")
        .args(["-J", "-c", TARGET, "-p", &IPERF_PORT.to_string()])
        .args(["-P", &streams.to_string()])
        .args(["-t", &length.as_secs().to_string()])
        .within(length + Duration::from_secs(IPERF_EXTRA_S));
    let printed = stage.at("source", shell).run();
    flow(&printed.map_err(|error: CommandError| LabError::from(error))?)
}

fn flow(printed: &str) -> Result<Flow> {
    let strange = |what: &str| LabError::Output {
        program: "iperf3",
        what: what.to_owned(),
    };
    let report: serde_json::Value =
        serde_json::from_str(printed).map_err(|error| strange(&error.to_string()))?;
    let sum = &report["end"]["sum_received"];
    match (sum["seconds"].as_f64(), sum["bytes"].as_u64()) {
        (Some(seconds), Some(bytes)) if seconds > 0.0 => Ok(Flow { seconds, bytes }),
        _ => Err(strange("no sum of received bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_read_from_a_report_and_a_strange_one_is_named() {
        let good = r#"{"end": {"sum_received": {"seconds": 2.0, "bytes": 1000}}}"#;
        assert_eq!(flow(good).unwrap().rate(), 500.0);
        let text = flow(r#"{"error": "unable to connect"}"#)
            .unwrap_err()
            .to_string();
        assert!(text.contains("no sum of received bytes"), "{text}");
    }
}
