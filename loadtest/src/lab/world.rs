//! One world: two sites and a client network with an application running at the source, ready for a hop.
//!
//! It owns everything it made; dropping it leaves the machine as it was.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::client::http::{Answer, fetch, request};
use crate::command::{SYSTEM_PATH, Shell, resolve};
use crate::interrupt::wait_until;
use crate::lab::app::{App, ContainerKind};
use crate::lab::container::Runtime;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::link::{self, Link, Measured};
use crate::lab::netns::{self, Names, SITES};
use crate::lab::process::Process;
use crate::lab::rootfs::{self, Images, SCHEMA, SWEEP};
use crate::lab::run_dir::RunDir;
use crate::progress::Progress;

/// The name clients call the application by; WordPress builds its links from it.
pub const HOST: &str = "hopgate.lab";
/// Longest an application may take to start, in seconds; a guest's processor is ten times slower.
const START_S: u64 = 240;
/// Longest one request of the lab itself may take, in seconds.
const REQUEST_S: u64 = 200;

/// What a world is made from.
#[derive(Debug)]
pub struct Parts {
    /// The application.
    pub app: App,
    /// The containers' root file systems.
    pub images: Images,
    /// Folders whose content becomes a container's volume at the source.
    pub volumes: Vec<(ContainerKind, PathBuf)>,
    /// The CRIU to use; none for a world that never checkpoints.
    pub criu: Option<PathBuf>,
    /// Arguments added to those of a container's first process.
    pub arguments: Vec<(ContainerKind, Vec<String>)>,
    /// Statements for the database before anything else uses it.
    pub schema: Option<&'static str>,
    /// The link between the sites.
    pub link: Link,
}

/// A world that stands.
#[derive(Debug)]
pub struct World {
    /// The application.
    pub app: App,
    /// Source and target.
    pub sites: [Runtime; 2],
    /// What the link gives.
    pub measured: Measured,
    // Dropped in this order: processes first, then the run with all that is left in it.
    delays: Vec<Process>,
    /// The run directory.
    pub run: RunDir,
}

impl World {
    /// Builds the world and starts the application at the source; returns once it answers.
    ///
    /// # Errors
    /// Whatever could not be made, by name.
    pub fn build(parts: &Parts, folders: &Folders, progress: &Progress) -> Result<Self> {
        let run = RunDir::claim(folders, progress)?;
        let (path, names, kinds) = (run.path.clone(), run.names, parts.app.containers());
        progress.now("building two sites and a client network");
        netns::build(names, kinds, &path)?;
        lay_out(parts, folders, &path, names)?;
        let sites = SITES.map(|site| Runtime::new(path.clone(), site, names));
        for kind in kinds {
            let more = parts.arguments.iter().find(|(whose, _)| whose == kind);
            let more = more.map_or(&[][..], |(_, arguments)| arguments);
            sites[0].prepare(*kind, more)?;
            sites[1].prepare(*kind, more)?;
            sites[0].mount(*kind)?;
        }
        for (kind, content) in &parts.volumes {
            copy(content, &sites[0].volume(*kind))?;
        }
        let (emulation, programs) = link::shape(parts.link, names, &folders.program)?;
        let start =
            |(site, shell): &(&str, Shell)| Process::start(&format!("delay-{site}"), shell, &path);
        let mut delays = programs.iter().map(start).collect::<Result<Vec<_>>>()?;
        for delay in &mut delays {
            link::wait_for_delay(delay)?;
        }
        progress.now("starting the application at the source and measuring the link");
        let (measured, started) = thread::scope(|scope| {
            let measured = scope.spawn(|| link::measure(parts.link, emulation, names));
            let started = start_application(parts, &sites[0], names);
            (measured.join(), started)
        });
        started?;
        let measured = measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(Self {
            app: parts.app,
            sites,
            measured,
            delays,
            run,
        })
    }

    /// Whether every process of the world itself (not the hop's) still runs.
    pub fn stands(&mut self) -> bool {
        self.delays.iter_mut().all(Process::lives)
    }

    /// One request of the lab itself to a container, by the address of one site (0 source, 1 target).
    ///
    /// # Errors
    /// When no complete answer comes.
    pub fn ask(
        &self,
        kind: ContainerKind,
        site: usize,
        path: &str,
        form: Option<&str>,
    ) -> Result<Answer> {
        ask(self.run.names, kind, site, path, form)
    }
}

fn ask(
    names: Names,
    kind: ContainerKind,
    site: usize,
    path: &str,
    form: Option<&str>,
) -> Result<Answer> {
    let address = kind.address_at(site);
    let failed = |why: String| LabError::Http {
        what: format!("{path} at {address}"),
        why,
    };
    let to: SocketAddr = address
        .parse()
        .map_err(|error: std::net::AddrParseError| failed(error.to_string()))?;
    let bytes = request(path, HOST, form);
    let answer = netns::within(&names.path("edge"), || {
        fetch(to, &bytes, Duration::from_secs(REQUEST_S))
    })?;
    answer.map_err(|error| failed(error.to_string()))
}

/// Files every run has: configurations, programs, images, pinned namespaces.
fn lay_out(parts: &Parts, folders: &Folders, run: &Path, names: Names) -> Result<()> {
    let configs = folders
        .workspace
        .join("configs/lab")
        .join(parts.app.as_str());
    for entry in fs::read_dir(&configs).on("read", &configs)?.flatten() {
        fs::copy(entry.path(), run.join(entry.file_name())).on("copy", &entry.path())?;
    }
    for folder in [
        "bin",
        "images",
        "netns",
        "tls",
        "source/runc",
        "target/runc",
        "source/state",
        "target/state",
    ] {
        let path = run.join(folder);
        fs::create_dir_all(&path).on("create", &path)?;
    }
    let link = |to: &Path, at: PathBuf| symlink(to, &at).on("link", &at);
    link(
        Path::new(&resolve("runc".as_ref(), SYSTEM_PATH.as_ref())),
        run.join("bin/runc"),
    )?;
    if let Some(criu) = &parts.criu {
        link(criu, run.join("bin/criu"))?;
    }
    for (kind, layer) in &parts.images.layers {
        link(layer, run.join("images").join(kind.name()))?;
        for site in SITES {
            let part = format!("{site}-{}", kind.name());
            link(&names.path(&part), run.join("netns").join(&part))?;
        }
    }
    Ok(())
}

fn start_application(parts: &Parts, source: &Runtime, names: Names) -> Result<()> {
    for kind in parts.app.containers() {
        source.start(*kind)?;
        let ready = || match kind {
            ContainerKind::Db => source
                .exec(
                    *kind,
                    &["mariadb-admin", "--socket=/run/mysqld/mysqld.sock", "ping"],
                )
                .is_ok(),
            // WordPress that is not installed yet sends readers to its installer: that is an answer as well.
            ContainerKind::Web
            | ContainerKind::Counter
            | ContainerKind::Counter2
            | ContainerKind::Counter3
            | ContainerKind::Counter4 => ask(names, *kind, 0, parts.app.page_path(), None)
                .is_ok_and(|answer| matches!(answer.status, 200 | 302)),
        };
        let mut stopped = false;
        let is_ready = wait_until(Duration::from_secs(START_S), || {
            stopped = source.pid(*kind).is_none();
            stopped || ready()
        });
        if stopped || !is_ready {
            let what = format!("container {} answering at the source", kind.name());
            let hint = if stopped {
                "; its first process ended"
            } else {
                ""
            };
            return Err(LabError::NotInTime {
                what,
                seconds: START_S,
                hint: hint.to_owned(),
            });
        }
        if let (ContainerKind::Db, Some(schema)) = (kind, parts.schema) {
            source.exec(
                *kind,
                &["mariadb", "--socket=/run/mysqld/mysqld.sock", "-e", schema],
            )?;
        }
    }
    Ok(())
}

fn sql(site: &Runtime, statements: &str) -> Result<()> {
    let args = [
        "mariadb",
        "--socket=/run/mysqld/mysqld.sock",
        "-e",
        statements,
    ];
    site.exec(ContainerKind::Db, &args).map(drop)
}

/// Copies the content of a folder with owners, modes, links and attributes.
///
/// # Errors
/// When `cp` fails.
pub fn copy(content: &Path, to: &Path) -> Result<()> {
    Shell::new("cp")
        .args(["-a", "--sparse=always", "-T"])
        .arg(content)
        .arg(to)
        .within(Duration::from_secs(300))
        .run()?;
    Ok(())
}

/// A database volume with WordPress installed in it, made once by running its own installer, then cached.
///
/// # Errors
/// When the installer does not succeed.
pub fn wordpress_volume(
    images: &Images,
    folders: &Folders,
    progress: &Progress,
) -> Result<PathBuf> {
    let made = folders.cached("volume-wordpress", &rootfs::recipe(), |part| {
        progress.say("installing WordPress once, in a world without a link (cached afterwards)");
        let db = images
            .layers
            .iter()
            .find(|(kind, _)| *kind == ContainerKind::Db);
        let empty = db.map(|(kind, layer)| (*kind, layer.join("var/lib/mysql")));
        let parts = Parts {
            app: App::Wordpress,
            images: images.clone(),
            volumes: empty.into_iter().collect(),
            criu: None,
            arguments: Vec::new(),
            schema: Some(SCHEMA),
            link: Link::None,
        };
        install_wordpress(&parts, folders, progress, part)
    })?;
    Ok(made.join("db"))
}

fn install_wordpress(
    parts: &Parts,
    folders: &Folders,
    progress: &Progress,
    part: &Path,
) -> Result<()> {
    let world = World::build(parts, folders, progress)?;
    let form = "weblog_title=Lab&user_name=admin&admin_password=lab&admin_password2=lab&pw_weak=1\
                &admin_email=lab%40hopgate.lab&Submit=Install&language=";
    let answer = world.ask(
        ContainerKind::Web,
        0,
        "/wp-admin/install.php?step=2",
        Some(form),
    )?;
    let text = String::from_utf8_lossy(&answer.body);
    if answer.status != 200 || !text.contains("Success!") {
        let why = format!("the installer answered {} without success", answer.status);
        return Err(LabError::Http {
            what: "installing WordPress".into(),
            why,
        });
    }
    let limit = Duration::from_secs(START_S);
    world.sites[0].stop(ContainerKind::Web, limit)?;
    sql(&world.sites[0], SWEEP)?;
    world.sites[0].stop(ContainerKind::Db, limit)?;
    copy(&world.sites[0].volume(ContainerKind::Db), &part.join("db"))
}
