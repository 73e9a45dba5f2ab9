//! One of the two origins, from the lab's side.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use crate::bench::hold::origin::{Addresses, Options};
use crate::bench::hold::plan::Seen;
use crate::command::Shell;
use crate::lab::error::{LabError, Result};
use crate::lab::process::Process;

/// Longest an origin may take to listen, in seconds.
const READY_S: u64 = 20;
/// Longest wait for an answer of it, in seconds.
const ANSWER_S: u64 = 60;

/// One running origin; it ends with the value.
#[derive(Debug)]
pub struct Origin {
    _process: Process,
    /// Where it listens.
    pub addresses: Addresses,
}

impl Origin {
    /// Starts it.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(name: &str, options: Options, lab: &Path, folder: &Path) -> Result<Self> {
        let shell = Shell::new(lab)
            .args(["hold-origin", "--spoil", options.spoil.as_str()])
            .args(["--workers", &options.workers.to_string()])
            .args(["--work-us", &options.work_us.to_string()]);
        let mut process = Process::start(name, &shell, folder)?;
        let log = folder.join(format!("{name}.log"));
        let mut found = None;
        process.wait_ready(Duration::from_secs(READY_S), || {
            let text = fs::read_to_string(&log).ok();
            found = text.and_then(|text| Addresses::read(&text));
            found.is_some()
        })?;
        let addresses = found.ok_or_else(|| LabError::Output {
            program: "an origin",
            what: "no addresses".into(),
        })?;
        Ok(Self {
            _process: process,
            addresses,
        })
    }

    fn ask(&self, question: &str) -> Result<String> {
        let asked = || {
            let stream = TcpStream::connect(self.addresses.desk)?;
            stream.set_read_timeout(Some(Duration::from_secs(ANSWER_S)))?;
            let mut stream = BufReader::new(stream);
            writeln!(stream.get_mut(), "{question}")?;
            let mut answer = String::new();
            stream.read_line(&mut answer)?;
            Ok(answer)
        };
        asked().map_err(|error: std::io::Error| LabError::Differs {
            what: format!("an origin asked for \"{question}\" gave no answer: {error}"),
        })
    }

    /// What it has executed so far.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn seen(&self) -> Result<Seen> {
        let said = self.ask("report")?;
        serde_json::from_str(&said).map_err(|error| LabError::Output {
            program: "an origin",
            what: error.to_string(),
        })
    }

    /// Counts its peak from now on.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn count_anew(&self) -> Result<()> {
        self.ask("count anew").map(drop)
    }

    /// From now on it says that it is well.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn become_ready(&self) -> Result<()> {
        self.ask("ready").map(drop)
    }
}
