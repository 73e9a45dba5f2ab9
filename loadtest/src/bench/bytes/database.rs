//! The set of MariaDB: a server in a container of the lab, filled once and cached, then written to while it is copied.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::bench::bytes::stage::Stage;
use crate::interrupt::wait_until;
use crate::lab::app::ContainerKind;
use crate::lab::container::Runtime;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::process::Process;
use crate::lab::world::copy;
use crate::progress::Progress;

/// Longest the server may take to answer, in seconds.
const START_S: u64 = 120;
/// Longest it may take to be filled, in seconds.
const FILL_S: u64 = 600;
/// Bytes one row takes in the table, keys and page headers included.
const ROW_BYTES: u64 = 2300;
/// Grows when the filling changes.
const LAYOUT: &str = "rows 1";
const SOCKET: &str = "--socket=/run/mysqld/mysqld.sock";

/// Rewrites rows all over a table of so many, about a thousand a second, until the server is gone. The client knows its
/// own word `DELIMITER` only at the beginning of a line.
fn writer(rows: u64) -> String {
    format!(
        "USE bytes;\nDELIMITER //\n\
         BEGIN NOT ATOMIC\n\
           WHILE TRUE DO\n\
             SET @id = 1 + FLOOR(RAND() * {rows});\n\
             UPDATE page SET body = CONCAT(RANDOM_BYTES(1000), REPEAT('text ', 200)) WHERE id = @id;\n\
             IF @id % 20 = 0 THEN DO SLEEP(0.02); END IF;\n\
           END WHILE;\n\
         END //\n"
    )
}

/// A running server at the source of a stage, and its writer.
#[derive(Debug)]
pub struct Database {
    site: Runtime,
    rows: u64,
    writer: Option<Process>,
}

impl Database {
    /// Starts a server on a copy of the cached directory of `bytes` bytes; `image` is its root file system.
    ///
    /// # Errors
    /// When it cannot be made or started.
    pub fn start(
        stage: &Stage,
        image: &Path,
        bytes: u64,
        folders: &Folders,
        progress: &Progress,
    ) -> Result<Self> {
        let recipe = format!("{LAYOUT} {bytes}");
        let name = format!("bytes-mariadb-{}", bytes >> 20);
        let filled = folders.cached(&name, &recipe, |part| {
            progress.say(format!(
                "filling a MariaDB of {} MiB (cached afterwards)",
                bytes >> 20
            ));
            fill(stage, image, bytes, part)
        })?;
        let site = serve(stage, image, &filled)?;
        Ok(Self {
            site,
            rows: bytes / ROW_BYTES,
            writer: None,
        })
    }

    /// Begins to write; writes go on until [`Self::freeze`].
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn write(&mut self, stage: &Stage) -> Result<()> {
        let statements = writer(self.rows);
        let shell = self
            .site
            .exec_shell(ContainerKind::Db, &["mariadb", SOCKET, "-e", &statements]);
        self.writer = Some(Process::start("writer", &shell, &stage.run.path)?);
        Ok(())
    }

    /// Stops every thread of the server where it is, as a freeze does.
    ///
    /// # Errors
    /// When the writer had ended before, or the server has.
    pub fn freeze(&mut self) -> Result<()> {
        if let Some(writer) = &mut self.writer
            && !writer.lives()
        {
            let said = writer.said();
            return Err(LabError::Output {
                program: "the writer to MariaDB",
                what: said,
            });
        }
        self.signal(Signal::STOP)
    }

    /// Lets the server and its writer go on.
    ///
    /// # Errors
    /// When the server has ended.
    pub fn thaw(&mut self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.site.pid(ContainerKind::Db).and_then(Pid::from_raw);
        if pid.is_some_and(|pid| kill_process(pid, signal).is_ok()) {
            return Ok(());
        }
        Err(LabError::Output {
            program: "MariaDB",
            what: "it has ended".to_owned(),
        })
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Some(pid) = self.site.pid(ContainerKind::Db).and_then(Pid::from_raw) {
            // Gone already is as good.
            let _ = kill_process(pid, Signal::KILL);
        }
        self.writer = None;
        self.site.delete(ContainerKind::Db);
        let _ = rustix::mount::unmount(
            ContainerKind::Db
                .bundle(self.site.folder(), "source")
                .join("rootfs"),
            rustix::mount::UnmountFlags::DETACH,
        );
    }
}

/// Starts a server on a copy of `directory`, and waits until it answers.
fn serve(stage: &Stage, image: &Path, directory: &Path) -> Result<Runtime> {
    let run = &stage.run.path;
    for folder in ["images", "source/runc"] {
        let path = run.join(folder);
        fs::create_dir_all(&path).on("create", &path)?;
    }
    let link = run.join("images/db");
    if !link.is_symlink() {
        symlink(image, &link).on("link", &link)?;
    }
    // The bundle of a server before this one, on the same stage.
    let bundle = ContainerKind::Db.bundle(run, "source");
    if bundle.exists() {
        fs::remove_dir_all(&bundle).on("remove", &bundle)?;
    }
    let site = Runtime::new(run.clone(), "source", stage.run.names);
    site.prepare(ContainerKind::Db, &[])?;
    site.mount(ContainerKind::Db)?;
    copy(directory, &site.volume(ContainerKind::Db))?;
    site.start(ContainerKind::Db)?;
    let ready = || {
        site.exec(ContainerKind::Db, &["mariadb-admin", SOCKET, "ping"])
            .is_ok()
    };
    if wait_until(Duration::from_secs(START_S), ready) {
        return Ok(site);
    }
    Err(LabError::NotInTime {
        what: "MariaDB answering".to_owned(),
        seconds: START_S,
        hint: String::new(),
    })
}

fn fill(stage: &Stage, image: &Path, bytes: u64, part: &Path) -> Result<()> {
    let empty: PathBuf = image.join("var/lib/mysql");
    let rows = bytes / ROW_BYTES;
    let database = Database {
        site: serve(stage, image, &empty)?,
        rows,
        writer: None,
    };
    let statements = format!(
        "CREATE DATABASE bytes; USE bytes; CREATE TABLE page (id INT PRIMARY KEY, body BLOB NOT NULL) ENGINE=InnoDB;
         INSERT INTO page SELECT seq, CONCAT(RANDOM_BYTES(1000), REPEAT('text ', 200)) FROM seq_1_to_{rows};"
    );
    let shell = database
        .site
        .exec_shell(ContainerKind::Db, &["mariadb", SOCKET, "-e", &statements]);
    shell.within(Duration::from_secs(FILL_S)).run()?;
    database
        .site
        .stop(ContainerKind::Db, Duration::from_secs(START_S))?;
    copy(&database.site.volume(ContainerKind::Db), part)?;
    drop(database);
    stage.clear()
}
