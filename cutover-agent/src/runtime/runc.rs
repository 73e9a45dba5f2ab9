//! runc, called as a program. Its standard streams are /dev/null, because a detached container inherits them and
//! CRIU cannot dump one that points outside the container; what it has to say goes to log files.

use std::ffi::OsString;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::{Child, Command};

use crate::config::Runtime;

/// How long a runtime call that does not move memory may take.
const CALL_MAX: Duration = Duration::from_secs(30);

/// A runtime call failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The program could not be started.
    #[error("cannot run {program}: {source}; install runc, or set `runtime.runc`")]
    Spawn {
        /// The runtime.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The program ended with an error.
    #[error("runc {verb} {container} failed: {message}")]
    Failed {
        /// The verb.
        verb: &'static str,
        /// The container.
        container: String,
        /// The lines of the logs that tell why.
        message: String,
    },
    /// The program did not end in time.
    #[error("runc {verb} {container} did not end within {seconds} s")]
    TimedOut {
        /// The verb.
        verb: &'static str,
        /// The container.
        container: String,
        /// How long we waited.
        seconds: u64,
    },
}

/// A runtime with its state folder.
#[derive(Debug, Clone)]
pub struct Runc {
    settings: Runtime,
}

/// What the runtime knows of a container.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ContainerState {
    /// `created`, `running`, `paused` or `stopped`.
    pub status: String,
    /// The container's first process; 0 when stopped.
    pub pid: u32,
}

/// Where one dump or restore keeps its images and its logs.
#[derive(Debug, Clone, Copy)]
pub struct ImageFolders<'a> {
    /// CRIU's images.
    pub images: &'a Path,
    /// CRIU's working folder with its log.
    pub work: &'a Path,
    /// The images of the round before, relative to `images` (an absolute path makes CRIU dump everything again,
    /// without a word).
    pub parent: Option<&'a Path>,
}

/// How CRIU is made to park.
#[derive(Debug, Clone)]
pub struct Parking {
    /// CRIU's configuration.
    pub configuration: PathBuf,
    /// A folder whose programs are found before CRIU.
    pub programs: PathBuf,
    /// The arguments of this program that run the runtime, whose call follows them.
    pub shim: Vec<OsString>,
}

impl Runc {
    /// The runtime of a configuration.
    #[must_use]
    pub fn new(settings: &Runtime) -> Self {
        Self {
            settings: settings.clone(),
        }
    }

    /// The first line of `runc --version`.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn version(&self) -> Result<String, RuntimeError> {
        let output = Command::new(&self.settings.runc)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|source| self.spawn_error(source))?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned())
    }

    /// What the runtime knows of a container; `None` when it knows none of that name.
    ///
    /// # Errors
    /// When the runtime does not run.
    pub async fn state(&self, container: &str) -> Result<Option<ContainerState>, RuntimeError> {
        let output = Command::new(&self.settings.runc)
            .arg("--root")
            .arg(&self.settings.root)
            .args(["state", container])
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|source| self.spawn_error(source))?;
        Ok(serde_json::from_slice(&output.stdout)
            .ok()
            .filter(|_| output.status.success()))
    }

    /// Sends one round of memory to a page server and lets the container run on.
    ///
    /// # Errors
    /// When the dump fails, or does not end within `limit`.
    pub async fn pre_dump(
        &self,
        container: &str,
        folders: ImageFolders<'_>,
        page_server: SocketAddrV4,
        limit: Duration,
    ) -> Result<(), RuntimeError> {
        let mut arguments: Vec<OsString> = vec!["checkpoint".into(), "--pre-dump".into()];
        arguments.extend(["--page-server".into(), page_server.to_string().into()]);
        push_folders(&mut arguments, folders);
        arguments.push(container.into());
        let child = self.spawn(&arguments, folders.work, None)?;
        self.finish(
            child,
            "checkpoint --pre-dump",
            container,
            folders.work,
            limit,
        )
        .await
    }

    /// Starts the final dump, in which CRIU parks. Pages go to the page server, and all else into the images.
    ///
    /// # Errors
    /// When the runtime does not start.
    pub fn checkpoint(
        &self,
        container: &str,
        folders: ImageFolders<'_>,
        page_server: SocketAddrV4,
        parking: &Parking,
    ) -> Result<Child, RuntimeError> {
        let mut arguments: Vec<OsString> = vec![
            "checkpoint".into(),
            "--tcp-established".into(),
            "--file-locks".into(),
        ];
        arguments.extend(["--page-server".into(), page_server.to_string().into()]);
        push_folders(&mut arguments, folders);
        arguments.push(container.into());
        self.spawn(&arguments, folders.work, Some(parking))
    }

    /// Starts a restore, in which CRIU parks.
    ///
    /// # Errors
    /// When the runtime does not start.
    pub fn restore(
        &self,
        container: &str,
        bundle: &Path,
        folders: ImageFolders<'_>,
        parking: &Parking,
    ) -> Result<Child, RuntimeError> {
        let mut arguments: Vec<OsString> = vec![
            "restore".into(),
            "--detach".into(),
            "--tcp-established".into(),
            "--file-locks".into(),
        ];
        arguments.extend(["--bundle".into(), bundle.into()]);
        push_folders(&mut arguments, folders);
        arguments.push(container.into());
        self.spawn(&arguments, folders.work, Some(parking))
    }

    /// Waits for a call started by [`Self::checkpoint`] or [`Self::restore`].
    ///
    /// # Errors
    /// When it fails, or does not end within `limit`.
    pub async fn finish(
        &self,
        mut child: Child,
        verb: &'static str,
        container: &str,
        work: &Path,
        limit: Duration,
    ) -> Result<(), RuntimeError> {
        match tokio::time::timeout(limit, child.wait()).await {
            Ok(Ok(status)) => self.judge(status, verb, container, work),
            Ok(Err(source)) => Err(self.spawn_error(source)),
            Err(_) => Err(RuntimeError::TimedOut {
                verb,
                container: container.to_owned(),
                seconds: limit.as_secs(),
            }),
        }
    }

    /// Turns an exit status into a result, with the lines of the logs that tell why.
    ///
    /// # Errors
    /// When the status is not success.
    pub fn judge(
        &self,
        status: ExitStatus,
        verb: &'static str,
        container: &str,
        work: &Path,
    ) -> Result<(), RuntimeError> {
        if status.success() {
            return Ok(());
        }
        let message = reason(work).unwrap_or_else(|| status.to_string());
        Err(RuntimeError::Failed {
            verb,
            container: container.to_owned(),
            message,
        })
    }

    /// Builds a container without starting its program.
    ///
    /// # Errors
    /// When it fails.
    pub async fn create(
        &self,
        container: &str,
        bundle: &Path,
        work: &Path,
    ) -> Result<(), RuntimeError> {
        let arguments = [
            "create".into(),
            "--bundle".into(),
            bundle.into(),
            container.into(),
        ];
        let child = self.spawn(&arguments, work, None)?;
        self.finish(child, "create", container, work, CALL_MAX)
            .await
    }

    /// Starts the program of a created container.
    ///
    /// # Errors
    /// When it fails.
    pub async fn start(&self, container: &str, work: &Path) -> Result<(), RuntimeError> {
        let child = self.spawn(&["start".into(), container.into()], work, None)?;
        self.finish(child, "start", container, work, CALL_MAX).await
    }

    /// Sends a signal to a container's first process.
    ///
    /// # Errors
    /// When it fails.
    pub async fn signal(
        &self,
        container: &str,
        signal: &str,
        work: &Path,
    ) -> Result<(), RuntimeError> {
        let child = self.spawn(
            &["kill".into(), container.into(), signal.into()],
            work,
            None,
        )?;
        self.finish(child, "kill", container, work, CALL_MAX).await
    }

    /// Kills what is left of a container and forgets it; succeeds when there is none.
    ///
    /// # Errors
    /// When it fails.
    pub async fn delete(&self, container: &str, work: &Path) -> Result<(), RuntimeError> {
        let child = self.spawn(
            &["delete".into(), "--force".into(), container.into()],
            work,
            None,
        )?;
        self.finish(child, "delete", container, work, CALL_MAX)
            .await
    }

    fn spawn(
        &self,
        arguments: &[OsString],
        work: &Path,
        parking: Option<&Parking>,
    ) -> Result<Child, RuntimeError> {
        std::fs::create_dir_all(work).map_err(|source| self.spawn_error(source))?;
        let mut command = match parking {
            Some(parking) => {
                let agent = std::env::current_exe().map_err(|source| self.spawn_error(source))?;
                let mut command = Command::new(agent);
                command.args(&parking.shim).arg(&self.settings.runc);
                command
            }
            None => Command::new(&self.settings.runc),
        };
        command
            .arg("--root")
            .arg(&self.settings.root)
            .arg("--log")
            .arg(work.join("runc.log"))
            .args(arguments);
        let programs = parking.map(|parking| parking.programs.as_path());
        command.env("PATH", self.search_path(programs));
        if let Some(parking) = parking {
            command.env("CRIU_CONFIG_FILE", &parking.configuration);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // A runtime call must outlive us: a killed agent leaves a parked dump, not half a one.
        command.process_group(0).kill_on_drop(false);
        command.spawn().map_err(|source| self.spawn_error(source))
    }

    fn search_path(&self, first: Option<&Path>) -> OsString {
        let mut path = OsString::new();
        for folder in first.into_iter().chain(self.settings.criu.parent()) {
            path.push(folder);
            path.push(":");
        }
        path.push(
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()),
        );
        path
    }

    fn spawn_error(&self, source: std::io::Error) -> RuntimeError {
        RuntimeError::Spawn {
            program: self.settings.runc.clone(),
            source,
        }
    }
}

fn push_folders(arguments: &mut Vec<OsString>, folders: ImageFolders<'_>) {
    arguments.extend([
        "--image-path".into(),
        folders.images.into(),
        "--work-path".into(),
        folders.work.into(),
    ]);
    if let Some(parent) = folders.parent {
        arguments.extend(["--parent-path".into(), parent.into()]);
    }
}

/// The first error lines of CRIU's log, else the last line of runc's.
fn reason(work: &Path) -> Option<String> {
    for log in ["dump.log", "restore.log"] {
        let text = std::fs::read_to_string(work.join(log)).unwrap_or_default();
        // The first line is a habit of restricted machines and never the cause.
        let errors: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("Error (") && !line.contains("RLIMIT_NOFILE"))
            .take(2)
            .collect();
        if !errors.is_empty() {
            return Some(format!(
                "{} (see {})",
                errors.join("; "),
                work.join(log).display()
            ));
        }
    }
    let text = std::fs::read_to_string(work.join("runc.log")).ok()?;
    text.lines()
        .rev()
        .find(|line| line.contains("level=error"))
        .map(str::to_owned)
}
