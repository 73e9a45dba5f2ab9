//! The agent's end of a parked CRIU: prepare the folder, wait until it is parked, give it the word.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::shim::{AGENT_SOCKET, ERROR_FILE, FROZEN_FILE, Frozen, PARK_SOCKET, ParkAt, Parked};
use super::stand_in;
use crate::sockets;

/// Something about a park folder went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ParkError {
    /// A file of the park folder could not be used.
    #[error("cannot use {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The runtime ended, or was refused, before CRIU was parked.
    #[error("CRIU was not parked for {container}{reason}")]
    NotParked {
        /// The container's folder.
        container: String,
        /// What it left behind, with a leading colon.
        reason: String,
    },
    /// The word was taken, but not carried out.
    #[error(
        "CRIU of {container} was given the word {word:?}, which was not carried out within {seconds} s"
    )]
    Stuck {
        /// The container's folder.
        container: String,
        /// What it was told.
        word: &'static str,
        /// How long we waited.
        seconds: u64,
    },
}

/// What a parked CRIU is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Go on: kill the dumped source, run the restored target.
    Go,
    /// Roll back: thaw the source, kill the target.
    Veto,
}

impl Word {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Go => "go",
            Self::Veto => "veto",
        }
    }
}

/// The folder through which the agent, and what stands between one container's runtime and CRIU, meet.
#[derive(Debug, Clone)]
pub struct Park {
    folder: PathBuf,
}

/// The agent's ears, open from before the runtime starts until CRIU is told for the last time.
#[derive(Debug)]
pub(crate) struct Waiting {
    listener: UnixListener,
    container: String,
    error_file: PathBuf,
}

impl Park {
    /// The park of a container below an agent's state folder.
    #[must_use]
    pub fn new(state_dir: &Path, container: &str) -> Self {
        Self {
            folder: state_dir.join("park").join(container),
        }
    }

    /// Makes the folder ready for a new dump or restore by the CRIU at `criu`, and listens for it to be parked.
    /// `cgroup_root` is where a restore puts the tasks, in the unified hierarchy.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn prepare(
        &self,
        criu: &Path,
        cgroup_root: Option<&str>,
    ) -> Result<Waiting, ParkError> {
        self.clear()?;
        self.make(|folder| std::fs::create_dir_all(folder))?;
        self.make(|_| std::fs::write(self.criu_configuration(), configuration(cgroup_root)))?;
        self.make(|folder| write_stand_in(folder, criu))?;
        let path = self.folder.join(AGENT_SOCKET);
        let listener = sockets::listen(&path).map_err(|source| ParkError::File { path, source })?;
        Ok(Waiting {
            listener,
            container: self.name(),
            error_file: self.folder.join(ERROR_FILE),
        })
    }

    /// What is said to CRIU by a file: what its runtime does not ask for.
    pub(crate) fn criu_configuration(&self) -> PathBuf {
        self.folder.join("criu.conf")
    }

    /// A folder whose programs the runtime is to find before all others.
    pub(crate) fn programs(&self) -> PathBuf {
        self.folder.join(stand_in::FOLDER)
    }

    /// The arguments of ours that run a runtime, whose own follow them.
    pub(crate) fn shim(&self, at: ParkAt, network_namespace: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["shim".into(), "--folder".into()];
        arguments.extend([
            self.folder.clone().into(),
            "--at".into(),
            at.as_str().into(),
        ]);
        arguments.extend([
            "--network-namespace".into(),
            network_namespace.into(),
            "--".into(),
        ]);
        arguments
    }

    /// What was frozen, when it got that far.
    #[must_use]
    pub(crate) fn frozen(&self) -> Option<Frozen> {
        serde_json::from_slice(&std::fs::read(self.folder.join(FROZEN_FILE)).ok()?).ok()
    }

    /// Gives the word to a parked CRIU and waits until it has been carried out. `Ok(false)` when none was parked.
    ///
    /// # Errors
    /// When the word was taken, and not carried out in time.
    pub async fn tell(&self, word: Word, limit: Duration) -> Result<bool, ParkError> {
        let path = self.folder.join(PARK_SOCKET);
        let Ok(mut stream) = sockets::dial(&path) else {
            return Ok(false);
        };
        let told = async {
            stream
                .write_all(format!("{}\n", word.as_str()).as_bytes())
                .await?;
            // It stays open until then.
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await
        };
        match tokio::time::timeout(limit, told).await {
            Ok(Ok(_)) => Ok(true),
            // A reset means that whoever took it has ended, too.
            Ok(Err(_)) => Ok(true),
            Err(_) => Err(ParkError::Stuck {
                container: self.name(),
                word: word.as_str(),
                seconds: limit.as_secs(),
            }),
        }
    }

    /// Forgets the folder.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn clear(&self) -> Result<(), ParkError> {
        match std::fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ParkError::File {
                path: self.folder.clone(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    fn name(&self) -> String {
        self.folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    fn make(&self, write: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<(), ParkError> {
        write(&self.folder).map_err(|source| ParkError::File {
            path: self.folder.clone(),
            source,
        })
    }
}

impl Waiting {
    /// Waits until CRIU is parked; each is so several times.
    ///
    /// # Errors
    /// When it cannot be heard.
    ///
    /// # Cancel safety
    /// Dropping the future may lose the news, but not what it is of: CRIU stays parked, and its own socket finds it.
    pub(crate) async fn parked(&self) -> Result<Parked, ParkError> {
        let read = async {
            let (stream, _) = self.listener.accept().await?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).await?;
            serde_json::from_str(&line).map_err(std::io::Error::other)
        };
        read.await.map_err(|_| self.not_parked())
    }

    /// Whether CRIU was refused something, and why.
    pub(crate) fn refusal(&self) -> Option<String> {
        let text = std::fs::read_to_string(&self.error_file).ok()?;
        Some(text.trim().to_owned())
    }

    /// The error for a runtime that ended although CRIU was never parked.
    pub(crate) fn not_parked(&self) -> ParkError {
        let reason = self.refusal().map(|reason| format!(": {reason}"));
        ParkError::NotParked {
            container: self.container.clone(),
            reason: reason.unwrap_or_default(),
        }
    }
}

/// Unlinked files that are still open travel inside the images up to this size; CRIU's own default is 1 MiB, which
/// a program replaced on disk while it runs exceeds.
const GHOST_BYTES_MAX: u64 = 256 << 20;

fn configuration(cgroup_root: Option<&str>) -> String {
    let root = cgroup_root.map(|root| format!("cgroup-root {root}\n"));
    format!(
        "ghost-limit {GHOST_BYTES_MAX}\nlink-remap\nnetwork-lock skip\n{}",
        root.unwrap_or_default()
    )
}

/// Puts our own program in CRIU's place.
fn write_stand_in(folder: &Path, criu: &Path) -> std::io::Result<()> {
    let programs = folder.join(stand_in::FOLDER);
    std::fs::create_dir_all(&programs)?;
    let agent = std::env::current_exe()?;
    let (agent, folder, criu) = (quote(&agent), quote(folder), quote(criu));
    let line = format!("exec {agent} stand-in --folder {folder} --criu {criu} -- \"$@\"");
    write_program(&programs.join(stand_in::PROGRAM), &line)
}

/// Writes a program for the shell.
fn write_program(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    writeln!(file, "#!/bin/sh\n{text}")?;
    file.set_permissions(std::fs::Permissions::from_mode(0o700))
}

fn quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::shim::Stop;
    use super::*;

    #[tokio::test]
    async fn a_parked_criu_is_heard_of_and_anything_else_is_none() {
        let state = tempfile::tempdir().unwrap();
        let park = Park::new(state.path(), "db");
        let waiting = park.prepare(Path::new("/sbin/criu"), None).unwrap();
        let say = |line: &[u8]| {
            let mut agent = sockets::connect(&park.folder.join(AGENT_SOCKET)).unwrap();
            agent.write_all(line).unwrap();
        };
        say(b"{\"stop\":\"dumped\",\"criu_ms\":7}\n");
        let parked = waiting.parked().await.unwrap();
        assert_eq!((parked.stop, parked.criu_ms), (Stop::Dumped, 7));
        say(b"failed\n");
        std::fs::write(park.folder.join(ERROR_FILE), "no nft\n").unwrap();
        let error = waiting.parked().await.unwrap_err().to_string();
        assert!(error.contains("db: no nft"), "{error}");
        assert!(!park.tell(Word::Go, Duration::from_secs(9)).await.unwrap());
    }

    #[tokio::test]
    async fn the_stand_in_passes_on_what_it_was_called_with_in_a_folder_of_any_name() {
        let state = tempfile::tempdir().unwrap();
        let park = Park::new(state.path(), "it's a name");
        let _waiting = park
            .prepare(Path::new("/opt/c r/criu"), Some("/a"))
            .unwrap();
        // The program that is called is this test's, which lists what it was given as far as it knows it.
        let program = std::fs::read_to_string(park.programs().join("criu")).unwrap();
        let shown = program.replacen("exec", "printf '%s\\n'", 1);
        let output = Command::new("sh")
            .args(["-c", &shown, "criu", "swrk", "3"])
            .output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        let said: Vec<&str> = said.lines().skip(1).collect();
        let folder = park.folder.to_str().unwrap();
        let expected = [
            "stand-in",
            "--folder",
            folder,
            "--criu",
            "/opt/c r/criu",
            "--",
            "swrk",
            "3",
        ];
        assert_eq!(said, expected);
        let configuration = std::fs::read_to_string(park.criu_configuration()).unwrap();
        assert!(
            configuration.ends_with("\ncgroup-root /a\n"),
            "{configuration}"
        );
    }
}
