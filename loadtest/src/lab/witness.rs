//! A client that stays: a database session from the edge by the containers' own address at the source, opened before
//! the hop, with a transaction that is open across it. It tells whether connections from outside go on.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use crate::command::{CommandError, Shell, kill_group};
use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::world::World;
use crate::report::Kept;

/// Longest an answer may take, in seconds: a connection that moved is noticed with TCP's next try only.
const ANSWER_S: u64 = 60;
/// Lines that may wait to be read.
const LINES_MAX: usize = 64;

/// The session.
#[derive(Debug)]
pub struct Witness {
    child: Child,
    statements: ChildStdin,
    lines: Receiver<String>,
    connection: String,
}

impl Witness {
    /// Connects, where the application has a database, and begins a transaction.
    ///
    /// # Errors
    /// When the database does not let it in.
    pub fn begin(world: &World) -> Result<Option<Self>> {
        if world.app != App::Wordpress {
            return Ok(None);
        }
        let shell = Shell::new("chroot")
            .arg(world.run.path.join("images").join(ContainerKind::Db.name()))
            .args([
                "mariadb",
                "--no-defaults",
                "--unbuffered",
                "-N",
                "-B",
                "--skip-reconnect",
            ])
            .args(["-h", "10.44.0.2", "-u", "wordpress", "-plab", "wordpress"]);
        let shell = shell.inside(&world.run.names.path("edge"));
        let log = world.run.path.join("witness.log");
        let mut command = shell.prepare();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).on("create", &log)?);
        let mut child = command.spawn().map_err(|source| CommandError::Start {
            line: shell.line(),
            source,
        })?;
        let (Some(statements), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("it has no standard streams"));
        };
        let (sender, lines) = sync_channel(LINES_MAX);
        thread::spawn(move || {
            for line in BufReader::new(output)
                .lines()
                .map_while(std::io::Result::ok)
            {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut witness = Self {
            child,
            statements,
            lines,
            connection: String::new(),
        };
        let begin = "CREATE TABLE IF NOT EXISTS lab_carried (moment VARCHAR(8)); TRUNCATE lab_carried; BEGIN; \
                     INSERT INTO lab_carried VALUES ('before'); SELECT CONNECTION_ID();";
        witness.connection = witness.ask(begin)?;
        Ok(Some(witness))
    }

    /// Goes on with the same transaction and commits it.
    #[must_use]
    pub fn end(mut self) -> Kept {
        let end = "INSERT INTO lab_carried VALUES ('after'); COMMIT; \
                   SELECT CONCAT(CONNECTION_ID(), ' ', COUNT(*), ' ', COUNT(DISTINCT moment)) FROM lab_carried;";
        match self.ask(end) {
            Ok(answer) if answer == format!("{} 2 2", self.connection) => Kept::Survived,
            _ => Kept::Broken,
        }
    }

    fn ask(&mut self, statements: &str) -> Result<String> {
        writeln!(self.statements, "{statements}").map_err(|error| failed(&error.to_string()))?;
        let answer = self.lines.recv_timeout(Duration::from_secs(ANSWER_S));
        answer.map_err(|_| failed("no answer"))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}

fn failed(why: &str) -> LabError {
    LabError::Http {
        what: "the database session that is held open across the hop".into(),
        why: why.to_owned(),
    }
}
