//! A real MariaDB behind the raw TCP service: the server speaks first, answers are large, and many talk at once.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::stage::{CLIENT_S, Service, Stage, free_port};
use super::{differs, same};
use crate::command::Shell;
use crate::lab::error::{OnFile, Result};
use crate::lab::process::Process;

/// Longest the database may take to make its tables and to start, in seconds.
const START_S: u64 = 60;
/// Clients at once.
const CLIENTS: usize = 12;

/// Makes an empty database and starts it with one user.
pub(super) fn start(folder: &Path) -> Result<(Process, u16)> {
    let data = folder.join("data");
    let datadir = format!("--datadir={}", data.display());
    Shell::new("mariadb-install-db")
        .args([
            "--no-defaults",
            &datadir,
            "--user=root",
            "--auth-root-authentication-method=normal",
        ])
        .args(["--skip-test-db", "--skip-name-resolve"])
        .within(Duration::from_secs(START_S))
        .run()?;
    let first = folder.join("first.sql");
    // One statement a line is how such a file is read.
    let user = "CREATE DATABASE lab;
CREATE USER 'lab'@'%' IDENTIFIED BY 'secret';
GRANT ALL ON lab.* TO 'lab'@'%';
";
    fs::write(&first, user).on("write", &first)?;
    let port = free_port(folder)?;
    let shell = Shell::new("mariadbd")
        .args([
            "--no-defaults",
            &datadir,
            "--user=root",
            "--bind-address=127.0.0.1",
        ])
        .arg(format!("--port={port}"))
        .arg(format!("--socket={}", folder.join("db.sock").display()))
        .arg(format!("--init-file={}", first.display()))
        .args([
            "--skip-name-resolve",
            "--innodb-use-native-aio=0",
            "--max-allowed-packet=64M",
        ]);
    let mut process = Process::start("mariadbd", &shell, folder)?;
    process.wait_ready(Duration::from_secs(START_S), || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
    })?;
    Ok((process, port))
}

pub(super) fn talk(stage: &mut Stage) -> Result<()> {
    let ask = |sql: &str| {
        Shell::new("mariadb")
            .args([
                "--no-defaults",
                "--host=127.0.0.1",
                "--user=lab",
                "--password=secret",
                "--batch",
            ])
            .args(["--skip-column-names", "--max-allowed-packet=64M", "lab"])
            .arg(format!("--port={}", stage.clear(Service::Database)))
            .args(["--execute", sql])
            .within(Duration::from_secs(CLIENT_S))
    };
    let rows = "CREATE TABLE t (id INT PRIMARY KEY, word VARCHAR(40)); \
                INSERT INTO t SELECT seq, CONCAT('word-', seq) FROM seq_1_to_50000; \
                SELECT COUNT(*), SUM(id), MAX(word) FROM t; \
                UPDATE t SET word = 'changed' WHERE id % 2 = 0; SELECT ROW_COUNT();";
    stage.says(
        "50,000 rows written and counted",
        &ask(rows),
        "50000\t1250025000\tword-9999\n25000\n",
    )?;

    let mut expected = String::new();
    for id in 1..=50_000 {
        let word = if id % 2 == 0 {
            "changed".to_owned()
        } else {
            format!("word-{id}")
        };
        // Writing into a string cannot fail.
        let _ = writeln!(expected, "{id}\t{word}");
    }
    let all = ask("SELECT id, word FROM t ORDER BY id").run()?;
    same(
        "all rows",
        "the same",
        if all == expected {
            "the same"
        } else {
            "others"
        },
    )?;

    let large = ask("SELECT REPEAT('0123456789', 2000000)").run()?;
    same(
        "a large value",
        &format!("{} bytes", 20_000_001),
        &format!("{} bytes", large.len()),
    )?;
    let upload = format!("SELECT MD5('{}')", "x".repeat(100_000));
    stage.says(
        "a long question",
        &ask(&upload),
        "d5816f35916d1d9482fb0f1ec201101d\n",
    )?;

    let transaction = "START TRANSACTION; DELETE FROM t; SELECT COUNT(*) FROM t; ROLLBACK; SELECT COUNT(*) FROM t;";
    stage.says("a transaction taken back", &ask(transaction), "0\n50000\n")?;
    let wrong = ask("SELECT nothing FROM nowhere").end()?;
    if wrong.code != Some(1) || !wrong.err.contains("ERROR 1146 (42S02)") {
        return Err(differs("a wrong question", "ERROR 1146", &wrong.err));
    }
    at_once(
        &(0..CLIENTS)
            .map(|number| ask(&format!("SELECT SLEEP(0.2), {number}, COUNT(*) FROM t")))
            .collect::<Vec<_>>(),
    )
}

/// All clients together; each gets its own answer.
fn at_once(clients: &[Shell]) -> Result<()> {
    let answers = thread::scope(|scope| {
        let running: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(|| client.run()))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Ok("panicked".to_owned())))
            .collect::<Vec<_>>()
    });
    for (number, answer) in answers.into_iter().enumerate() {
        same(
            "one of many clients",
            &format!("0\t{number}\t50000\n"),
            &answer?,
        )?;
    }
    Ok(())
}
