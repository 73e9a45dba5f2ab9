//! The corpus of smuggling and desync cases. Each row of the files in `tests/smuggling` is sent, byte for byte,
//! through a real proxy to a recording origin: it is refused with the one right status, closed upon, and nothing of
//! it has reached the origin; or it arrives as exactly the requests the row names, in bytes that a strict reader
//! accepts. There is no third outcome.

mod case;
mod frames;
mod reading;
mod recorder;
mod streams;

use std::fs;
use std::io::{Read as _, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;

use self::case::Case;
use self::reading::{Kind, Read};
use self::recorder::{Recorder, Seen};
use crate::world::{Nobody, PATIENCE, Plan};

const FILES: [&str; 7] = [
    "lengths.toml",
    "codings.toml",
    "chunks.toml",
    "lines.toml",
    "targets.toml",
    "connections.toml",
    "answers.toml",
];

#[test]
fn two_lengths_are_refused_or_read_once() {
    all("lengths.toml");
}

#[test]
fn transfer_codings_are_refused_or_read_once() {
    all("codings.toml");
}

#[test]
fn chunks_are_refused_or_read_once() {
    all("chunks.toml");
}

#[test]
fn lines_and_fields_are_refused_or_read_once() {
    all("lines.toml");
}

#[test]
fn targets_and_hosts_are_refused_or_read_once() {
    all("targets.toml");
}

#[test]
fn connections_that_go_on_or_change_are_read_once() {
    all("connections.toml");
}

#[test]
fn answers_are_believed_once() {
    all("answers.toml");
}

/// For `fuzz/run.sh`.
#[test]
#[ignore = "writes files below fuzz/"]
fn the_rows_become_seeds_of_the_fuzz_targets() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let corpus = workspace.join("fuzz/corpus");
    let write = |target: &str, number: usize, bytes: &[u8]| {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("seed-{number}")), bytes).unwrap();
    };
    let cases: Vec<Case> = FILES.iter().flat_map(|file| case::load(file)).collect();
    for (number, case) in cases.iter().enumerate() {
        let sent = case.send().concat();
        write("request_head", number, &sent);
        if let Some(end) = sent.windows(4).position(|window| window == b"\r\n\r\n") {
            write(
                "chunks",
                number,
                &[b"\x00\x05\x0a\x0f", &sent[end + 4..]].concat(),
            );
        }
        write("response_head", number, &case.answers().concat());
    }
    let files = ["", "invalid"].map(|folder| workspace.join("configs/proxy").join(folder));
    let files = files
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    for (number, file) in files.map(|file| file.unwrap().path()).enumerate() {
        if file.is_file() {
            write("config", number, &fs::read(file).unwrap());
        }
    }
    write(
        "command",
        0,
        br#"{"command":"hold","service":"web","epoch":1,"lease_ms":2,"drain_ms_max":3}"#,
    );
    write("route_path", 0, b"/a/%2e%2e/b//c;d/%7E%2541");
    let parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    write("trace_parent", 0, parent);
    let headers: [&[u8]; 4] = [
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1234 80\r\nGET",
        b"PROXY UNKNOWN\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x19\xc0\0\x02\x07\xc6\x33\x64\x01\x04\xd2\0\x50\xe7\0\x0acdn-loop:a",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc6\x33\x64\x01\x04\xd2\0\x50GET",
    ];
    for (number, header) in headers.iter().enumerate() {
        write("proxy_protocol", number, header);
    }
    let hello = b"\x16\x03\x01\0\x3c\x01\0\0\x38\x03\x03abcdefghijklmnopqrstuvwxyz012345\0\0\x02\x13\x01\x01\0\0\x0d\0\0\0\x09\0\x07\0\0\x04a.bc";
    write("client_hello", 0, hello);
    let list = b"\x01:method\0POST\xff:scheme\0https\xff:authority\0h\xff:path\0/\xffcontent-length\x003\xffte\0trailers";
    write("header_list", 0, list);
}

/// Whether a row came out as it says, and why not.
type Outcome = Result<(), String>;

fn all(file: &str) {
    let cases = case::load(file);
    report(
        file,
        cases
            .iter()
            .map(|case| (&case.name[..], &case.source[..], run(case))),
    );
}

/// Names all rows that went wrong, not only the first.
fn report<'r>(file: &str, rows: impl Iterator<Item = (&'r str, &'r str, Outcome)>) {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (name, source, outcome) in rows {
        assert!(!source.is_empty(), "{name} has no source");
        count += 1;
        if let Err(why) = outcome {
            wrong.push(format!("{name}\n  {}", why.replace('\n', "\n  ")));
        }
    }
    let failed = wrong.len();
    assert!(
        failed == 0,
        "{failed} of {count} rows of {file}:\n\n{}",
        wrong.join("\n\n")
    );
}

fn run(case: &Case) -> Outcome {
    let recorder = Recorder::new(case.answers());
    let mut plan = Plan::new(recorder.address(), Nobody::new().address());
    plan.workers = 1;
    let mut world = plan.start();
    let mut client = Client::connect(TcpStream::connect(world.address()).unwrap(), case);
    let talked = client.talk(case);
    drop(client);
    world.proxy.take().unwrap().stop(PATIENCE);
    let seen = recorder.finish();
    let broken_off = case.broken_off.as_deref();
    talked.and_then(|()| compare(&case.forwarded(), broken_off, case.connections, &seen))
}

/// The origin's view against the row's.
fn compare(
    forwarded: &Vec<String>,
    broken_off: Option<&str>,
    connections: Option<usize>,
    seen: &Seen,
) -> Outcome {
    let texts = |reads: &[Read]| reads.iter().map(Read::text).collect::<Vec<_>>();
    same("wrong at the origin", &Vec::new(), &seen.wrong)?;
    same("forwarded", forwarded, &texts(&seen.requests))?;
    let begun: Vec<String> = broken_off
        .iter()
        .map(|text| text.trim_end().to_owned())
        .collect();
    same("broken off", &begun, &texts(&seen.broken_off))?;
    let least = usize::from(!forwarded.is_empty() || broken_off.is_some());
    // Behind a request that was broken off comes the next one on a connection of its own.
    let least = least.max(begun.len() + usize::from(!forwarded.is_empty()));
    same(
        "connections",
        &connections.unwrap_or(least),
        &seen.connections,
    )
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: &T, found: &T) -> Outcome {
    if expected == found {
        Ok(())
    } else {
        Err(format!("{what}:\nexpected {expected:#?}\nfound {found:#?}"))
    }
}

/// The client of one row, reading as strictly as the origin.
struct Client {
    stream: TcpStream,
    bytes: Vec<u8>,
    ended: bool,
    /// For each final answer to come, whether it answers HEAD.
    to_head: Vec<bool>,
    answers: Vec<Read>,
}

impl Client {
    fn connect(stream: TcpStream, case: &Case) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let to_head = case
            .forwarded()
            .iter()
            .map(|text| text.starts_with("HEAD "))
            .collect();
        Self {
            stream,
            bytes: Vec::new(),
            ended: false,
            to_head,
            answers: Vec::new(),
        }
    }

    fn talk(&mut self, case: &Case) -> Outcome {
        for (number, part) in case.send().iter().enumerate() {
            if self.answers.len() < number {
                self.answer()?;
            }
            // A proxy that has refused may have closed already; what it answered is still to be read.
            let _ = self.stream.write_all(part);
        }
        let received = case.received();
        while self.answers.len() < received.len() {
            self.answer()?;
        }
        let texts: Vec<String> = self.answers.iter().map(Read::text).collect();
        same("received", &received, &texts)?;
        if let Some(status) = case.refused {
            let refusal = self.answer()?;
            same("refused", &status, &refusal.status())?;
            same(
                "Connection of the refusal",
                &Some("close"),
                &refusal.field("Connection"),
            )?;
        }
        let last = self.answers.last();
        let closes = last.is_some_and(|last| last.field("Connection") == Some("close"));
        if !closes && case.cut.is_none() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        self.ends(case)
    }

    /// Reads on until one more answer is whole.
    fn answer(&mut self) -> Result<Read, String> {
        loop {
            let read = self.begun()?;
            if read.is_whole {
                self.bytes.drain(..read.used);
                self.answers.push(read.clone());
                return Ok(read);
            }
            if self.ended {
                return Err(format!(
                    "the connection ended in the answer {:?}",
                    read.text()
                ));
            }
            self.more()?;
        }
    }

    fn begun(&self) -> Result<Read, String> {
        let answered = self
            .answers
            .iter()
            .filter(|answer| answer.is_final())
            .count();
        let to_head = self.to_head.get(answered).copied().unwrap_or(false);
        reading::read(&self.bytes, Kind::Answer { to_head }, self.ended)
    }

    fn more(&mut self) -> Outcome {
        let mut block = [0; 4096];
        match self.stream.read(&mut block) {
            Ok(0) => self.ended = true,
            Ok(count) => self.bytes.extend_from_slice(&block[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => self.ended = true,
            Err(error) => return Err(format!("waiting for an answer or the close: {error}")),
        }
        Ok(())
    }

    /// Nothing but what the row allows may come before the close.
    fn ends(&mut self, case: &Case) -> Outcome {
        while !self.ended {
            self.more()?;
        }
        let rest = if self.bytes.is_empty() {
            None
        } else {
            Some(self.begun()?.text())
        };
        let cut = case.cut.as_ref().map(|text| text.trim_end().to_owned());
        same("at the end", &cut, &rest)
    }
}
