//! Runs other programs and says plainly what went wrong when one fails.
//!
//! Every program runs in a process group of its own with /dev/null as its input, so that a Ctrl-C meant for the
//! lab does not tear down half of a world before the lab can do it in order. It never waits without a limit and
//! gives up at once when the lab was interrupted.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::interrupt;

/// Where programs of the system are looked for; a user's PATH often lacks the `sbin` folders.
pub const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Longest a short administrative command may take, in seconds.
const SHORT_S: u64 = 60;
/// How often a running program is looked at, in milliseconds.
const POLL_MS: u64 = 5;
/// Output kept of a program, in bytes, from its end: enough for a database listing of a long run.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("cannot start `{line}`: is it installed?")]
    Start {
        /// The command line.
        line: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("`{line}` failed ({status}): {said}")]
    Failed {
        /// The command line.
        line: String,
        /// Its exit status.
        status: ExitStatus,
        /// The last lines it printed.
        said: String,
    },
    /// It took too long and was killed.
    #[error("`{line}` did not end within {seconds} s and was killed")]
    TimedOut {
        /// The command line.
        line: String,
        /// The limit.
        seconds: u64,
    },
    /// The lab was asked to stop while it ran.
    #[error("stopped while `{line}` was running")]
    Interrupted {
        /// The command line.
        line: String,
    },
}

/// How a program ended and what it printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; nothing when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// One command line to run.
#[derive(Debug, Clone)]
pub struct Shell {
    program: OsString,
    args: Vec<OsString>,
    path: OsString,
    env: Vec<(OsString, OsString)>,
    limit: Duration,
}

impl Shell {
    /// A program, looked for in the system's folders.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            path: SYSTEM_PATH.into(),
            env: Vec::new(),
            limit: Duration::from_secs(SHORT_S),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Looks for programs in `path` instead of the system's folders.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<OsStr>) -> Self {
        self.path = path.as_ref().to_owned();
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Allows it to run this long instead of a minute.
    #[must_use]
    pub const fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it in the network namespace pinned at `namespace` (by `nsenter`, which leaves no mounts behind).
    #[must_use]
    pub fn inside(mut self, namespace: &std::path::Path) -> Self {
        let mut args: Vec<OsString> =
            vec![format!("--net={}", namespace.display()).into(), "--".into()];
        args.push(std::mem::replace(&mut self.program, "nsenter".into()));
        args.append(&mut self.args);
        self.args = args;
        self
    }

    /// The command line as a person would type it.
    #[must_use]
    pub fn line(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args);
        words
            .map(|word| word.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The prepared process: own group, no input. Output goes where the caller says.
    #[must_use]
    pub fn prepare(&self) -> Command {
        // The program itself is looked for by execvp in *our* PATH, so it is resolved here.
        let mut command = Command::new(resolve(&self.program, &self.path));
        command
            .args(&self.args)
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .process_group(0);
        for name in of_our_package() {
            command.env_remove(name);
        }
        for (name, value) in &self.env {
            command.env(name, value);
        }
        command
    }

    /// Runs it to its end and gives its standard output.
    ///
    /// # Errors
    /// When it cannot start, fails, exceeds its limit, or the lab is interrupted.
    pub fn run(&self) -> Result<String, CommandError> {
        let (status, out, err) = self.finish()?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&out).into_owned());
        }
        let said = last_lines(if err.is_empty() { &out } else { &err });
        Err(CommandError::Failed {
            line: self.line(),
            status,
            said,
        })
    }

    /// Runs it and tells only whether it succeeded.
    #[must_use]
    pub fn succeeds(&self) -> bool {
        self.run().is_ok()
    }

    /// Runs it to its end, whatever its exit code, and gives all it printed.
    ///
    /// # Errors
    /// When it cannot start, exceeds its limit, or the lab is interrupted.
    pub fn end(&self) -> Result<Ended, CommandError> {
        let (status, out, err) = self.finish()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ended {
            code: status.code(),
            out: text(out),
            err: text(err),
        })
    }

    fn finish(&self) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), CommandError> {
        let mut command = self.prepare();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|source| CommandError::Start {
            line: self.line(),
            source,
        })?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        thread::scope(|scope| {
            let out = scope.spawn(|| read_all(out));
            let err = scope.spawn(|| read_all(err));
            let status = self.wait(&mut child)?;
            Ok((
                status,
                out.join().unwrap_or_default(),
                err.join().unwrap_or_default(),
            ))
        })
    }

    fn wait(&self, child: &mut Child) -> Result<ExitStatus, CommandError> {
        let deadline = Instant::now() + self.limit;
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return Ok(status);
            }
            let interrupted = interrupt::requested();
            if interrupted || Instant::now() >= deadline {
                kill_group(child);
                let line = self.line();
                return Err(if interrupted {
                    CommandError::Interrupted { line }
                } else {
                    CommandError::TimedOut {
                        line,
                        seconds: self.limit.as_secs(),
                    }
                });
            }
            thread::sleep(Duration::from_millis(POLL_MS));
        }
    }
}

/// The first executable called `program` in `path`, or `program` itself so that the start fails with its name.
#[must_use]
pub fn resolve(program: &OsStr, path: &OsStr) -> OsString {
    if program.as_encoded_bytes().contains(&b'/') {
        return program.to_owned();
    }
    let found = std::env::split_paths(path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file());
    found.map_or_else(|| program.to_owned(), Into::into)
}

/// Whether the system has `program`: a name looked for in the system's folders, or the path of a file.
#[must_use]
pub fn installed(program: &str) -> bool {
    if program.contains('/') {
        return std::path::Path::new(program).is_file();
    }
    resolve(program.as_ref(), SYSTEM_PATH.as_ref()) != *program
}

/// Ends a child that was started in a process group of its own, with everything it started in that group.
pub fn kill_group(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended meanwhile: nothing is left to kill then.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    let _ = child.wait();
}

fn read_all(stream: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // A broken pipe ends the output; what was read until then is what there is.
        let _ = stream.take(OUTPUT_BYTES_MAX as u64).read_to_end(&mut bytes);
    }
    bytes
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut lines: Vec<&str> = text
        .lines()
        .rev()
        .filter(|line| !line.trim().is_empty())
        .take(4)
        .collect();
    lines.reverse();
    lines.join(" | ")
}

/// What `cargo run` says of the lab's own package. A build script that looks at one of these (ring's does) would be run
/// anew, and all that depends on it, whenever the lab builds after somebody's own cargo, and the other way round.
fn of_our_package() -> impl Iterator<Item = OsString> {
    std::env::vars_os().map(|(name, _)| name).filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_what_it_said() {
        let error = Shell::new("sh")
            .args(["-c", "echo no such disk >&2; exit 3"])
            .run()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "`sh -c echo no such disk >&2; exit 3` failed (exit status: 3): no such disk"
        );
    }

    #[test]
    fn a_missing_program_asks_whether_it_is_installed() {
        let error = Shell::new("no-such-program-here").run().unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot start `no-such-program-here`: is it installed?"
        );
    }

    #[test]
    fn a_program_that_hangs_is_killed_at_its_limit() {
        let error = Shell::new("sleep")
            .arg("100")
            .within(Duration::from_millis(30))
            .run()
            .unwrap_err();
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
    }
}
