//! The agent's end of a parked CRIU: prepare the folder, wait for the hook, give it the word.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};

use super::hook::{
    AGENT_SOCKET, DONE_PIPE, ERROR_FILE, FROZEN_FILE, Frozen, PARK_SOCKET, ParkAt, SPEC_FILE, Spec,
};
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
    /// The hook said something else than that it is parked.
    #[error("the hook of {container} ended without parking{reason}")]
    NotParked {
        /// The container's folder.
        container: String,
        /// What it left behind, with a leading colon.
        reason: String,
    },
    /// The hook took the word but did not end.
    #[error("the hook of {container} took the word {word:?} and did not end within {seconds} s")]
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

/// The folder through which one container's hook and the agent meet.
#[derive(Debug, Clone)]
pub struct Park {
    folder: PathBuf,
}

/// The agent's ears, open from before the runtime starts until the hook has reported.
#[derive(Debug)]
pub struct Waiting {
    /// Where the script says that CRIU is done, before it starts the hook.
    done: pipe::Receiver,
    listener: UnixListener,
    /// The process that called the script.
    criu: Option<u32>,
    /// A hook that came while the script's word was waited for.
    hook: Option<UnixStream>,
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

    /// Makes the folder ready for a new dump or restore and listens for its hook. `cgroup_root` is where a restore
    /// puts the tasks, in the unified hierarchy.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn prepare(
        &self,
        at: ParkAt,
        network_namespace: &Path,
        cgroup_root: Option<&str>,
    ) -> Result<Waiting, ParkError> {
        self.clear()?;
        self.make(|folder| std::fs::create_dir_all(folder))?;
        let spec = Spec {
            at,
            network_namespace: network_namespace.to_owned(),
        };
        let spec = serde_json::to_vec(&spec).map_err(std::io::Error::other);
        self.make(|folder| std::fs::write(folder.join(SPEC_FILE), spec?))?;
        self.make(|folder| write_script(folder, at, cgroup_root))?;
        let path = self.folder.join(DONE_PIPE);
        let done = make_pipe(&path).map_err(|source| ParkError::File { path, source })?;
        let path = self.folder.join(AGENT_SOCKET);
        let listener = sockets::listen(&path).map_err(|source| ParkError::File { path, source })?;
        Ok(Waiting {
            done,
            listener,
            criu: None,
            hook: None,
            container: self.name(),
            error_file: self.folder.join(ERROR_FILE),
        })
    }

    /// Puts our own program in the place of the CRIU at `criu`, for a runtime that searches the returned folder first. It
    /// parks here, and is called once.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn stand_in(&self, criu: &Path) -> Result<PathBuf, ParkError> {
        let folder = self.folder.join(stand_in::FOLDER);
        let write = || {
            std::fs::create_dir_all(&folder)?;
            let agent = std::env::current_exe()?;
            let (agent, park, criu) = (quote(&agent), quote(&self.folder), quote(criu));
            let line = format!("exec {agent} stand-in --folder {park} --criu {criu} -- \"$@\"");
            write_program(&folder.join(stand_in::PROGRAM), &line)
        };
        self.make(|_| write())?;
        Ok(folder)
    }

    /// The CRIU configuration file that names our hook.
    #[must_use]
    pub fn criu_configuration(&self) -> PathBuf {
        self.folder.join("criu.conf")
    }

    /// What the hook froze, when it got that far.
    #[must_use]
    pub(crate) fn frozen(&self) -> Option<Frozen> {
        serde_json::from_slice(&std::fs::read(self.folder.join(FROZEN_FILE)).ok()?).ok()
    }

    /// Gives the word and waits until the hook has ended. `Ok(false)` when no hook was parked.
    ///
    /// # Errors
    /// When a hook took the word and did not end in time.
    pub async fn tell(&self, word: Word, limit: Duration) -> Result<bool, ParkError> {
        let path = self.folder.join(PARK_SOCKET);
        let Ok(mut stream) = sockets::dial(&path) else {
            return Ok(false);
        };
        let told = async {
            stream
                .write_all(format!("{}\n", word.as_str()).as_bytes())
                .await?;
            // The hook keeps the stream open until it has ended.
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await
        };
        match tokio::time::timeout(limit, told).await {
            Ok(Ok(_)) => Ok(true),
            // A reset means that the hook has ended, too.
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
    /// Waits until CRIU has done its work and calls for the hook, which is not parked yet; some milliseconds pass until
    /// it is.
    ///
    /// # Errors
    /// When it can no longer be heard.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn done(&mut self) -> Result<(), ParkError> {
        let mut word = [0; WORD_BYTES];
        let heard = tokio::select! {
            // So short a word is written at once.
            read = self.done.read(&mut word) => read.map(|length| {
                self.criu = number(&word[..length]);
                None
            }),
            // It comes after the word, if that was said.
            came = self.listener.accept() => came.map(|(hook, _)| Some(hook)),
        };
        match heard {
            Ok(hook) => {
                self.hook = hook;
                Ok(())
            }
            Err(_) => Err(self.witness().not_parked()),
        }
    }

    /// CRIU's process, once it is [`Self::done`]; it is there until it is told to go on.
    pub(crate) const fn criu(&self) -> Option<u32> {
        self.criu
    }

    /// Waits until the hook says that it is parked; a dump's is so twice.
    ///
    /// # Errors
    /// When it ends without saying so.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: the hook stays parked and its own socket finds it.
    pub async fn parked(&mut self) -> Result<(), ParkError> {
        let read = async {
            let mut stream = match self.hook.take() {
                Some(stream) => stream,
                None => self.listener.accept().await?.0,
            };
            let mut word = [0; 7];
            stream.read_exact(&mut word).await?;
            Ok::<_, std::io::Error>(word)
        };
        match read.await {
            Ok(word) if &word == b"parked\n" => Ok(()),
            _ => Err(self.witness().not_parked()),
        }
    }

    /// What to say if the runtime ends before the hook reports; usable after the wait itself was given up.
    #[must_use]
    pub fn witness(&self) -> Witness {
        Witness {
            container: self.container.clone(),
            error_file: self.error_file.clone(),
        }
    }
}

/// Remembers where a hook would have left its reason.
#[derive(Debug, Clone)]
pub struct Witness {
    container: String,
    error_file: PathBuf,
}

impl Witness {
    /// The error for a runtime that ended although its hook never parked.
    #[must_use]
    pub fn not_parked(&self) -> ParkError {
        ParkError::NotParked {
            container: self.container.clone(),
            reason: hook_error(&self.error_file),
        }
    }
}

/// Room for the number of a process and the end of its line.
const WORD_BYTES: usize = 16;

fn number(word: &[u8]) -> Option<u32> {
    std::str::from_utf8(word).ok()?.trim().parse().ok()
}

fn hook_error(path: &Path) -> String {
    let mut text = String::new();
    match std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text)) {
        Ok(_) => format!(": {}", text.trim()),
        Err(_) => String::new(),
    }
}

/// Unlinked files that are still open travel inside the images up to this size; CRIU's own default is 1 MiB, which
/// a program replaced on disk while it runs exceeds.
const GHOST_BYTES_MAX: u64 = 256 << 20;

/// The script's name.
pub(super) const SCRIPT: &str = "hook.sh";

/// CRIU runs one path without arguments, so a short script carries the folder to our own binary.
fn write_script(folder: &Path, at: ParkAt, cgroup_root: Option<&str>) -> std::io::Result<()> {
    let program = std::env::current_exe()?;
    let script = folder.join(SCRIPT);
    // The shell answers the steps that are none of ours, and says what is urgent, with the number of CRIU's process: clients
    // wait while a program starts. A pipe that is opened for both reading and writing has no need of anybody at its other
    // end (fifo(7)).
    let text = format!(
        "case \"$CRTOOLS_SCRIPT_ACTION\" in\n{}) echo $PPID 1<>{};;\nesac\n\
         case \"$CRTOOLS_SCRIPT_ACTION\" in\n{}) exec {} hook --folder {};;\nesac",
        at.done(),
        quote(&folder.join(DONE_PIPE)),
        at.actions(),
        quote(&program),
        quote(folder)
    );
    write_program(&script, &text)?;
    let mut configuration = format!(
        "action-script {}\nghost-limit {GHOST_BYTES_MAX}\nlink-remap\nnetwork-lock skip\n",
        script.display()
    );
    if let Some(root) = cgroup_root {
        configuration.push_str(&format!("cgroup-root {root}\n"));
    }
    std::fs::write(folder.join("criu.conf"), configuration)
}

/// A pipe that stays open whoever closes its other end.
fn make_pipe(path: &Path) -> std::io::Result<pipe::Receiver> {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0)?;
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(path)
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
    use std::process::{Command, ExitStatus};

    use super::*;

    /// Runs CRIU's script as CRIU does. The hook that it starts is this test's program, which ends at once.
    fn script(park: &Park, action: &str) -> ExitStatus {
        let mut script = Command::new(park.folder.join(SCRIPT));
        script.env("CRTOOLS_SCRIPT_ACTION", action);
        script.stdout(std::process::Stdio::null());
        script.stderr(std::process::Stdio::null()).status().unwrap()
    }

    #[tokio::test]
    async fn the_script_says_when_criu_is_done_and_whether_or_not_anybody_listens() {
        let state = tempfile::tempdir().unwrap();
        let park = Park::new(state.path(), "it's a name");
        for (at, before, done) in [
            (ParkAt::Dump, "pre-dump", "post-dump"),
            (ParkAt::Restore, "setup-namespaces", "post-restore"),
        ] {
            let mut waiting = park.prepare(at, Path::new("/"), None).unwrap();
            script(&park, before);
            let mut word = [0];
            let early = waiting.done.try_read(&mut word).unwrap_err();
            assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock, "{before}");
            script(&park, done);
            waiting.done().await.unwrap();
            assert_eq!(waiting.criu(), Some(std::process::id()));
            drop(waiting);
            // The agent has died: whoever comes to say so goes on.
            script(&park, done);
        }
    }

    #[tokio::test]
    async fn a_hook_that_comes_without_a_word_is_heard_all_the_same_and_only_once() {
        let state = tempfile::tempdir().unwrap();
        let park = Park::new(state.path(), "db");
        let mut waiting = park.prepare(ParkAt::Restore, Path::new("/"), None).unwrap();
        let mut hook = sockets::connect(&park.folder.join(AGENT_SOCKET)).unwrap();
        waiting.done().await.unwrap();
        hook.write_all(b"parked\n").unwrap();
        waiting.parked().await.unwrap();
        assert!(waiting.hook.is_none());
        let mut other = sockets::connect(&park.folder.join(AGENT_SOCKET)).unwrap();
        other.write_all(b"failed\n").unwrap();
        waiting.parked().await.unwrap_err();
    }
}
