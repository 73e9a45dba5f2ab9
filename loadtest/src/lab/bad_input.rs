//! Everything an operator can get wrong, tried on a real world: each gets one clear line and an exit code that is not
//! 0, and leaves the source serving as before. The last case is a hop that commits: nothing was broken on the way.

mod stage;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::command::Ended;
use crate::interrupt::{self, wait_until};
use crate::lab::app::App;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::link::Link;
use crate::lab::setup::{self, Checkpoints};
use crate::lab::{netns, programs};
use crate::progress::Progress;
use stage::Stage;

/// Longest an agent may take to say what it found at its start, in seconds.
const SAID_S: u64 = 30;
/// A disk of the target that preflight must refuse, in MiB: less than the counter's memory.
const DISK_TOO_SMALL_MIB: u32 = 16;
/// A disk of the target that preflight lets pass, in MiB: the counter's memory, what preflight spares, and some more.
const DISK_JUST_ENOUGH_MIB: u32 = 224;
/// Bytes of a line that no command needs: more than a control socket reads.
const GARBAGE_BYTES: usize = 3 << 20;

/// Longest a write of garbage may wait for its reader.
const WRITE_MAX: Option<Duration> = Some(Duration::from_secs(10));

/// One thing that goes wrong.
type Case = (&'static str, fn(&mut Stage) -> Result<()>);

/// All of them, in order; the last two leave the world to a hop that commits.
const CASES: &[Case] = &[
    ("a missing file", missing_files),
    ("an unknown key", unknown_keys),
    ("a wrong type", wrong_types),
    ("a container neither site knows", unknown_container),
    ("a service the proxy does not know", unknown_service),
    (
        "a target with another authority's certificate",
        wrong_certificate,
    ),
    ("a target whose agent does not run", target_is_down),
    ("a full disk at the target", full_disk),
    (
        "a disk at the target that fills up during the hop",
        disk_fills_up,
    ),
    (
        "a second hop, and an abort, while one is under way",
        two_hops_and_abort,
    ),
    ("garbage on every socket", garbage),
    ("a damaged journal, moved away, then a hop", damaged_journal),
];

/// Tries all of it in one world.
///
/// # Errors
/// [`LabError::NoCriu`] where a hop cannot be checked out; [`LabError::Differs`] for the first case that went
/// differently.
pub fn run(folders: &Folders, progress: &Progress) -> Result<()> {
    programs::build(folders, progress)?;
    let parts = setup::parts(
        App::Counter,
        Link::None,
        Checkpoints::Wanted,
        folders,
        progress,
    )?;
    let mut stage = Stage::set(&parts, folders, progress)?;
    for (name, case) in CASES {
        if interrupt::requested() {
            return Err(LabError::Interrupted);
        }
        progress.say(name);
        case(&mut stage).map_err(|error| match error {
            LabError::Interrupted => LabError::Interrupted,
            other => LabError::Differs {
                what: format!("{name}: {other}"),
            },
        })?;
    }
    Ok(())
}

fn missing_files(stage: &mut Stage) -> Result<()> {
    stage.refused(&stage.hop("no-such-plan.toml"), "name an existing file")?;
    stage.refused(
        &stage
            .proxy(&["check", "--config"])
            .arg(stage.path("no-such-proxy.toml")),
        "no-such-proxy.toml",
    )?;
    stage.refused(
        &stage
            .agent(&["check", "--config"])
            .arg(stage.path("no-such-agent.toml")),
        "name an existing file",
    )?;
    stage.is_untouched()
}

fn unknown_keys(stage: &mut Stage) -> Result<()> {
    stage.write_from("plan.toml", "bad-plan.toml", "lease_ms", "leese_ms")?;
    stage.refused(&stage.hop("bad-plan.toml"), "leese_ms")?;
    stage.write_from("proxy.toml", "bad-proxy.toml", "state_dir", "stat_dir")?;
    stage.refused(
        &stage
            .proxy(&["check", "--config"])
            .arg(stage.path("bad-proxy.toml")),
        "stat_dir",
    )?;
    stage.write_from("source.toml", "bad-agent.toml", "state_dir", "stat_dir")?;
    stage.refused(
        &stage
            .agent(&["serve", "--config"])
            .arg(stage.path("bad-agent.toml")),
        "stat_dir",
    )?;
    stage.is_untouched()
}

fn wrong_types(stage: &mut Stage) -> Result<()> {
    stage.write_from(
        "plan.toml",
        "bad-plan.toml",
        "streams = 8",
        "streams = \"four\"",
    )?;
    stage.refused(&stage.hop("bad-plan.toml"), "streams")?;
    stage.write_from(
        "plan.toml",
        "bad-plan.toml",
        "streams = 8",
        "streams = 4000",
    )?;
    stage.refused(&stage.hop("bad-plan.toml"), "must be 1 to 32")?;
    stage.write_from("proxy.toml", "bad-proxy.toml", "\"0.0.0.0:8080\"", "8080")?;
    stage.refused(
        &stage
            .proxy(&["check", "--config"])
            .arg(stage.path("bad-proxy.toml")),
        "listen",
    )?;
    stage.is_untouched()
}

fn unknown_container(stage: &mut Stage) -> Result<()> {
    stage.write_from(
        "plan.toml",
        "bad-plan.toml",
        "\"counter\"\n\n[[probe]]",
        "\"nobody\"\n\n[[probe]]",
    )?;
    stage.refused(
        &stage.hop("bad-plan.toml"),
        "a probe names the container counter, which the plan does not contain",
    )?;
    // A plan that holds together, about a container that is not configured.
    let probe = "\n\n[[container]]\nname = \"nobody\"\n\n[[probe]]";
    stage.write_from("plan.toml", "bad-plan.toml", "\n\n[[probe]]", probe)?;
    stage.refused(&stage.hop("bad-plan.toml"), "nobody")?;
    stage.is_untouched()
}

fn unknown_service(stage: &mut Stage) -> Result<()> {
    stage.write_from(
        "plan.toml",
        "bad-plan.toml",
        "[\"counter\"]",
        "[\"counter\", \"shop\"]",
    )?;
    stage.refused(&stage.hop("bad-plan.toml"), "shop")?;
    stage.refused(
        &stage
            .proxy(&["ctl", "--socket"])
            .arg(stage.path("proxy.sock"))
            .args(["hold", "shop"]),
        "shop",
    )?;
    stage.is_untouched()
}

fn wrong_certificate(stage: &mut Stage) -> Result<()> {
    stage
        .agent(&["pki", "--dir"])
        .arg(stage.path("tls-other"))
        .run()?;
    let right = stage.write_from("target.toml", "target.toml", "\"tls/", "\"tls-other/")?;
    stage.actors.renew_agent(&stage.world, 1)?;
    stage.refused(&stage.hop("plan.toml"), "both sites need the same ca.pem")?;
    stage.refused(
        &stage.agent(&["preflight"]).arg(stage.path("plan.toml")),
        "both sites need the same ca.pem",
    )?;
    stage.write("target.toml", &right)?;
    stage.actors.renew_agent(&stage.world, 1)?;
    stage.is_untouched()
}

fn target_is_down(stage: &mut Stage) -> Result<()> {
    stage.actors.agents[1].kill();
    stage.refused(&stage.hop("plan.toml"), "is the agent running there")?;
    stage.refused(
        &stage.agent(&["preflight"]).arg(stage.path("plan.toml")),
        "is the agent running there",
    )?;
    stage.actors.renew_agent(&stage.world, 1)?;
    stage.is_untouched()
}

fn full_disk(stage: &mut Stage) -> Result<()> {
    let disk = Disk::mount(stage.path("target/state/images"), DISK_TOO_SMALL_MIB)?;
    let figures = "the target has 16 MiB free for counter/images, but";
    stage.refused(&stage.hop("plan.toml"), figures)?;
    stage.refused(
        &stage.agent(&["preflight"]).arg(stage.path("plan.toml")),
        "free some space there",
    )?;
    stage.is_untouched()?;
    drop(disk);
    Ok(())
}

/// A client that does not finish keeps the drain, and so the hop, where it is: time to fill the disk.
fn disk_fills_up(stage: &mut Stage) -> Result<()> {
    let disk = Disk::mount(stage.path("target/state/images"), DISK_JUST_ENOUGH_MIB)?;
    let mut slow = Some(stage.slow_post("slow-disk")?);
    let ended = stage.hop_with(|line, stage| {
        if let Some(slow) = slow.take_if(|_| line == "Hold ...") {
            disk.fill()?;
            stage.finish(slow)?;
        }
        Ok(())
    })?;
    stage.is_refusal(&ended, "no space left at the target for")?;
    stage.is_undone()?;
    drop(disk);
    Ok(())
}

/// The client keeps the drain where it is until the hop is over: the abort meets it before its commit.
fn two_hops_and_abort(stage: &mut Stage) -> Result<()> {
    let slow = stage.slow_post("slow-abort")?;
    let mut abort: Option<JoinHandle<_>> = None;
    let ended = stage.hop_with(|line, stage| {
        if line == "Hold ..." && abort.is_none() {
            stage.refused(
                &stage.hop("plan.toml"),
                "is under way: wait for it, or `cutover-agent abort`",
            )?;
            let shell = stage.agent(&["abort"]);
            abort = Some(thread::spawn(move || shell.end()));
        }
        Ok(())
    })?;
    stage.is_refusal(&ended, "undone: the source serves; an operator asked")?;
    let aborted = abort.and_then(|thread| thread.join().ok()).transpose()?;
    match aborted {
        Some(Ended {
            code: Some(0), out, ..
        }) => stage.progress.say(format!("  abort: {}", out.trim())),
        other => return Err(stage.differs(format!("abort ended with {other:?}"))),
    }
    stage.finish(slow)?;
    stage.refused(&stage.agent(&["abort"]), "no hop is under way here")?;
    stage.is_undone()
}

fn garbage(stage: &mut Stage) -> Result<()> {
    // One endless line: a socket that answers every line would wait for us to read what it says.
    let byte = |at: usize| u8::try_from(at * 7919 % 240).unwrap_or(0) + 11;
    let noise: Vec<u8> = (0..GARBAGE_BYTES).map(byte).collect();
    for socket in ["source.sock", "target.sock", "proxy.sock"] {
        for bytes in [
            &noise[..],
            b"\xff\xfe\n",
            b"{\"command\":\"dance\"}\n",
            b"\n",
            b"",
        ] {
            let path = stage.path(socket);
            let mut stream = UnixStream::connect(&path).on("open", &path)?;
            stream.set_write_timeout(WRITE_MAX).on("limit", &path)?;
            // Whoever is spoken to like that may hang up in the middle.
            let _ = stream.write_all(bytes);
        }
    }
    let source = stage.world.run.names.path("source");
    let peer = netns::within(&source, || {
        for bytes in [&noise[..], b"GET / HTTP/1.1\r\n\r\n", b""] {
            let mut stream = TcpStream::connect(stage::TARGET_PEER)?;
            stream.set_write_timeout(WRITE_MAX)?;
            let _ = stream.write_all(bytes);
        }
        // One that says nothing and stays, until the last case is over.
        TcpStream::connect(stage::TARGET_PEER)
    })?;
    stage.silent = Some(peer.on("connect to", &source)?);
    stage.is_untouched()
}

fn damaged_journal(stage: &mut Stage) -> Result<()> {
    let journal = stage.path("source/state/journal/current.jsonl");
    stage.actors.agents[0].kill();
    fs::write(
        &journal,
        b"{\"hop\":\"hop-1\",\xff\xfe\x00\n{\"at_ms\":1}\n",
    )
    .on("write", &journal)?;
    stage.actors.renew_agent(&stage.world, 0)?;
    let mut said = String::new();
    wait_until(Duration::from_secs(SAID_S), || {
        said = stage.actors.agents[0].said();
        said.contains("is damaged")
    });
    if !said.contains("line 1 of the journal") || !said.contains("then move the file away") {
        return Err(stage.differs(format!("at its start the agent said: {said}")));
    }
    stage.refused(&stage.hop("plan.toml"), "run `cutover-agent recover` first")?;
    stage.refused(&stage.agent(&["recover"]), "then move the file away")?;
    let away = stage.path("damaged.jsonl");
    fs::rename(&journal, &away).on("move", &journal)?;
    stage.is_untouched()?;
    let ended = stage.hop_with(|_, _| Ok(()))?;
    if ended.code != Some(0) {
        return Err(stage.differs(format!("the hop after all of it ended with {ended:?}")));
    }
    stage.progress.say(format!(
        "  {}",
        ended.out.lines().last().unwrap_or_default()
    ));
    stage.is_at_target()
}

/// A small file system, mounted where the target keeps memory images; dropping it takes it away.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, mib: u32) -> Result<Self> {
        fs::create_dir_all(&at).on("create", &at)?;
        let options = std::ffi::CString::new(format!("size={mib}m,mode=0700")).unwrap_or_default();
        mount(
            "tmpfs",
            &at,
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .on("mount", &at)?;
        Ok(Self(at))
    }

    /// Writes until nothing more fits.
    fn fill(&self) -> Result<()> {
        let path = self.0.join("filler");
        let mut file = fs::File::create(&path).on("create", &path)?;
        let block = vec![1; 1 << 16];
        while file.write_all(&block).is_ok() {}
        while file.write_all(&[1]).is_ok() {}
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What still uses it goes on with what it has; the run's own end would take it away too.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}
