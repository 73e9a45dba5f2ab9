//! A virtual machine for kernels on which CRIU cannot run: Debian's own kernel under QEMU's emulation, with the
//! host's root file system read-only over 9p and a tmpfs above it. No image is built: the same programs run inside.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::command::{CommandError, SYSTEM_PATH, Shell, kill_group};
use crate::interrupt;
use crate::lab::app::App;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::hop::{self, Again, Engine};
use crate::lab::initrd::{self, Kernel};
use crate::lab::link::Link;
use crate::lab::packages;
use crate::lab::place::{Wish, script};
use crate::lab::setup::{self, Checkpoints};
use crate::lab::world::copy;
use crate::progress::Progress;
use crate::report::Report;

/// Longest a guest may take, in seconds; its processor is about ten times slower.
const GUEST_S: u64 = 1200;
/// Memory of the guest, in MiB: everything it writes is in it.
const MEMORY_MB: &str = "6144";
/// The file with the result, in the folder shared with the host.
const RESULT: &str = "report.json";
/// Begins the line by which the guest says why it cannot go on.
const FAILED: &str = "HOPGATE-GUEST-FAILED";
/// Console lines that may wait to be shown.
const LINES_MAX: usize = 4096;
/// What CRIU, the links and the fences need and the kernel does not load by itself.
const MODULES: &str = "veth bridge tun unix_diag inet_diag tcp_diag udp_diag af_packet_diag netlink_diag nf_tables \
                       nft_compat iptable_filter ip6table_filter xt_mark sch_netem overlay wireguard esp4 xfrm_user xfrm_interface gcm";

/// What this program is to do inside a guest.
#[derive(Debug, Clone)]
pub struct Job {
    /// The application it needs.
    pub app: App,
    /// The link.
    pub link: Link,
    /// The words of its command line, but for the folder where the result goes.
    pub words: String,
}

impl Job {
    fn of(wish: &Wish) -> Self {
        Self {
            app: wish.app,
            link: wish.link,
            words: words(wish),
        }
    }
}

/// Runs the wish in a guest and brings its report back.
///
/// # Errors
/// As for [`result`].
pub fn run(wish: &Wish, folders: &Folders, progress: &Progress) -> Result<Report> {
    result(&Job::of(wish), folders, progress)
}

/// Does a job in a guest and brings its result back.
///
/// # Errors
/// [`LabError::Guest`] when it ends without one, or whatever could not be installed or made.
pub fn result<T: DeserializeOwned>(job: &Job, folders: &Folders, progress: &Progress) -> Result<T> {
    let kernel = prepare(job, folders, progress)?;
    let out = folders.lab.join(format!("guest-{}", std::process::id()));
    fs::create_dir_all(&out).on("create", &out)?;
    let initrd = initrd::make(folders, &kernel)?;
    let booted = boot(job, folders, &kernel, &initrd, &out, progress);
    let text = fs::read_to_string(out.join(RESULT)).unwrap_or_default();
    let logs = out.join(hop::LOGS);
    if logs.is_dir() {
        let kept = folders.lab.join(hop::LOGS);
        let _ = fs::remove_dir_all(&kept);
        fs::rename(&logs, &kept).on("keep", &logs)?;
    }
    for left in [fs::remove_dir_all(&out), fs::remove_file(&initrd)] {
        // Leftovers carry this process's number and are overwritten when it comes around again.
        let _ = left;
    }
    let last = booted?;
    serde_json::from_str(&text).map_err(|_| LabError::Guest {
        why: format!("its last line was: {last}"),
    })
}

/// Makes everything the guest needs on the host, where there is a network and a fast processor.
fn prepare(job: &Job, folders: &Folders, progress: &Progress) -> Result<Kernel> {
    setup::root()?;
    packages::install(packages::GUEST, progress)?;
    match setup::parts(job.app, job.link, Checkpoints::Wanted, folders, progress) {
        // That it cannot checkpoint here is why there is a guest.
        Err(LabError::NoCriu { .. }) => drop(setup::parts(
            job.app,
            job.link,
            Checkpoints::NotWanted,
            folders,
            progress,
        )?),
        made => drop(made?),
    }
    let _lock = folders.lock("install")?;
    initrd::kernel(folders, progress)
}

fn boot(
    job: &Job,
    folders: &Folders,
    kernel: &Kernel,
    initrd: &Path,
    out: &Path,
    progress: &Progress,
) -> Result<String> {
    let script = out.join("guest.sh");
    fs::write(&script, guest_script(job, folders, kernel, out)).on("write", &script)?;
    progress.say(format!("booting a guest with {}", kernel.image.display()));
    let shell = qemu(kernel, initrd, out);
    let mut command = shell.prepare();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|source| CommandError::Start {
        line: "qemu-system-x86_64".into(),
        source,
    })?;
    let lines = console(child.stdout.take(), child.stderr.take());
    let mut last = String::new();
    let ended = interrupt::wait_until(Duration::from_secs(GUEST_S), || {
        for line in lines.try_iter() {
            progress.say(format!("guest: {line}"));
            last = line;
        }
        matches!(child.try_wait(), Ok(Some(_))) || last.starts_with(FAILED)
    });
    kill_group(&mut child);
    match (ended, interrupt::requested()) {
        (true, _) => Ok(last),
        (false, true) => Err(LabError::Interrupted),
        (false, false) => Err(LabError::NotInTime {
            what: "the guest's end".into(),
            seconds: GUEST_S,
            hint: format!("; it last said: {last}"),
        }),
    }
}

fn console(
    output: Option<impl std::io::Read + Send + 'static>,
    errors: Option<impl std::io::Read + Send + 'static>,
) -> Receiver<String> {
    let (sender, lines) = sync_channel(LINES_MAX);
    let errors_sender = sender.clone();
    let forward = |stream: Option<Box<dyn std::io::Read + Send>>,
                   sender: std::sync::mpsc::SyncSender<String>| {
        thread::spawn(move || {
            for line in stream
                .into_iter()
                .flat_map(|stream| BufReader::new(stream).split(b'\n'))
                .map_while(std::io::Result::ok)
            {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if !line.is_empty() && sender.send(line).is_err() {
                    break;
                }
            }
        });
    };
    forward(output.map(|stream| Box::new(stream) as _), sender);
    forward(errors.map(|stream| Box::new(stream) as _), errors_sender);
    lines
}

fn qemu(kernel: &Kernel, initrd: &Path, out: &Path) -> Shell {
    // Translated blocks are cached in 512 MiB: a database and a web server are a lot of code.
    let fixed = [
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi,tb-size=512",
        "-cpu",
        "Westmere",
        "-m",
        MEMORY_MB,
        "-smp",
        "2",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ];
    let share = |id: &str, path: &Path, more: &str| -> [OsString; 2] {
        let fsdev = format!(
            "local,id={id},path={},security_model=none{more}",
            path.display()
        );
        ["-fsdev".into(), fsdev.into()]
    };
    let line = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr hopgate_out={}",
        out.display()
    );
    Shell::new("qemu-system-x86_64")
        .args(fixed)
        .args(share(
            "root",
            Path::new("/"),
            ",readonly=on,multidevs=remap",
        ))
        .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"])
        .args(share("out", out, ""))
        .args(["-device", "virtio-9p-pci,fsdev=out,mount_tag=out"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &line])
}

/// What the guest does once it has moved into the host's files. The shell stays its first process: it collects
/// whatever the containers leave behind.
fn guest_script(job: &Job, folders: &Folders, kernel: &Kernel, out: &Path) -> String {
    let modules = kernel.modules.parent().unwrap_or(Path::new("/"));
    format!(
        "export PATH={SYSTEM_PATH} HOME=/root\n\
         ulimit -c 0\n\
         mkdir -p /lib/modules\n\
         mount --make-rprivate /\n\
         mount --bind {} /lib/modules\n\
         ip link set lo up\n\
         for module in {MODULES}; do modprobe $module; done\n\
         {} {} --out {}\n\
         sync\n\
         echo o > /proc/sysrq-trigger\n\
         sleep 30\n",
        quoted(&modules.display().to_string()),
        quoted(&folders.program.display().to_string()),
        job.words,
        quoted(&out.display().to_string()),
    )
}

/// A word for the shell.
#[must_use]
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The command line of the same wish inside the guest.
fn words(wish: &Wish) -> String {
    let word = |value: Option<clap::builder::PossibleValue>| {
        value
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    };
    let mut options = format!(
        "inside --app {} --clients {} --writes {} --engine {} --link {} --tunnel {}",
        wish.app.as_str(),
        wish.clients,
        word(wish.writes.to_possible_value()),
        wish.engine.as_str(),
        wish.link,
        wish.tunnel.as_str(),
    );
    for phase in &wish.cut {
        options.push_str(&format!(" --cut {phase}"));
    }
    if let Some(phase) = &wish.fault {
        options.push_str(&format!(" --fault '{phase}'"));
    }
    if let Some(victim) = wish.kill {
        options.push_str(&format!(" --kill {}", word(victim.to_possible_value())));
    }
    if wish.again == Again::Yes {
        options.push_str(" --then-hop-again");
    }
    options
}

/// The part that runs inside: the same hop, its report left on the shared folder.
///
/// # Errors
/// Whatever the hop's world could not do; it is printed on the guest's console as well.
pub fn inside(wish: &Wish, out: &Path, progress: &Progress) -> Result<()> {
    told(hop_inside(wish, out, progress))
}

/// Says on the guest's console why it cannot go on, if so.
///
/// # Errors
/// That very error.
pub fn told(outcome: Result<()>) -> Result<()> {
    outcome.inspect_err(|error| println!("{FAILED} {error}"))
}

/// Leaves a result on the folder shared with the host.
///
/// # Errors
/// When it cannot be written.
pub fn leave(result: &impl Serialize, out: &Path) -> Result<()> {
    let path = out.join(RESULT);
    let text = serde_json::to_string_pretty(result).unwrap_or_default();
    fs::write(&path, text).on("write", &path)
}

fn hop_inside(wish: &Wish, out: &Path, progress: &Progress) -> Result<()> {
    let folders = Folders::find()?;
    let checkpoints = if wish.engine == Engine::Criu {
        Checkpoints::Wanted
    } else {
        Checkpoints::NotWanted
    };
    let mut parts = setup::parts(wish.app, wish.link, checkpoints, &folders, progress)?;
    parts.arguments = wish.writes.arguments(wish.app);
    let outcome = hop::run(
        &script(wish, wish.engine, "guest"),
        &parts,
        &folders,
        progress,
    );
    if !outcome.as_ref().is_ok_and(Report::is_green) {
        // The guest's own folder goes with it; a hop that left no logs has its error.
        let _ = copy(&folders.lab.join(hop::LOGS), &out.join(hop::LOGS));
    }
    leave(&outcome?, out)
}
