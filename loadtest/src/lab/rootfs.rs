//! The containers' root file systems and the prepared database: made once from the Debian mirror, then cached.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::command::Shell;
use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::packages;
use crate::progress::Progress;

/// The Debian release inside the containers; the paths of PHP below belong to it.
const SUITE: &str = "bookworm";
/// Packages of the database container.
const DB_PACKAGES: &str = "mariadb-server";
/// Packages of the web container.
const WEB_PACKAGES: &str = "wordpress,php-fpm,php-mysql,php-cli,nginx-light";
/// Longest one root file system may take, in seconds.
const MAKE_S: u64 = 900;
/// Grows when the making itself changes, so that older caches are not used.
const LAYOUT: &str = "layout 1";

/// Our own files in the web container: path, content, mode.
const WEB_FILES: &[(&str, &str, u32)] = &[
    (
        "etc/nginx/nginx.conf",
        include_str!("../../assets/wordpress/nginx.conf"),
        0o644,
    ),
    (
        "etc/php/8.2/fpm/pool.d/www.conf",
        include_str!("../../assets/wordpress/fpm.conf"),
        0o644,
    ),
    (
        "etc/wordpress/config-default.php",
        include_str!("../../assets/wordpress/config-default.php"),
        0o644,
    ),
    (
        "usr/share/wordpress/add.php",
        include_str!("../../assets/wordpress/add.php"),
        0o644,
    ),
    (
        "persist.php",
        include_str!("../../assets/wordpress/persist.php"),
        0o644,
    ),
    (
        "start.sh",
        include_str!("../../assets/wordpress/start.sh"),
        0o755,
    ),
];

/// The tables of the lab, made once in the prepared database.
pub const SCHEMA: &str = include_str!("../../assets/wordpress/schema.sql");

/// Removes what the keeper of connections left while the database was prepared: its rows are evidence of one run.
pub const SWEEP: &str = "TRUNCATE wordpress.lab_persist; TRUNCATE wordpress.lab_transaction";

/// The read-only lower layers of an application's containers, by kind.
#[derive(Debug, Clone)]
pub struct Images {
    /// Each container's root file system.
    pub layers: Vec<(ContainerKind, PathBuf)>,
}

/// Everything that the prepared database depends on, as text.
#[must_use]
pub fn recipe() -> String {
    let files: String = WEB_FILES
        .iter()
        .map(|(path, text, mode)| format!("{path} {mode:o}\n{text}"))
        .collect();
    format!(
        "{LAYOUT} {SUITE} {DB_PACKAGES} {WEB_PACKAGES}\n{SCHEMA}\n{SWEEP}\n{}\n{files}",
        ContainerKind::Db.args().join(" ")
    )
}

/// Makes, or finds in the cache, what `app` needs.
///
/// # Errors
/// When a package or a root file system cannot be made.
pub fn images(app: App, folders: &Folders, progress: &Progress) -> Result<Images> {
    match app {
        App::Wordpress => wordpress(folders, progress),
        App::Counter | App::Counters => {
            let layer = counter(folders)?;
            let layers = app.containers().iter();
            Ok(Images {
                layers: layers.map(|kind| (*kind, layer.clone())).collect(),
            })
        }
    }
}

fn wordpress(folders: &Folders, progress: &Progress) -> Result<Images> {
    let web_recipe: String = WEB_FILES
        .iter()
        .map(|(path, text, mode)| format!("{path} {mode:o}\n{text}"))
        .collect();
    let web_recipe = format!("{LAYOUT} {SUITE} {WEB_PACKAGES} {web_recipe}");
    let db_recipe = format!("{LAYOUT} {SUITE} {DB_PACKAGES}");
    // Both at once: each mostly waits for the mirror and for maintainer scripts.
    let (db, web) = thread::scope(|scope| {
        let db = scope.spawn(|| {
            folders.cached("image-db", &db_recipe, |part| {
                debian(part, DB_PACKAGES, "MariaDB", progress)
            })
        });
        let web = folders.cached("image-web", &web_recipe, |part| {
            debian(part, WEB_PACKAGES, "WordPress, PHP and nginx", progress)?;
            write_files(part)
        });
        (join(db), web)
    });
    Ok(Images {
        layers: vec![(ContainerKind::Db, db?), (ContainerKind::Web, web?)],
    })
}

fn join<T>(handle: thread::ScopedJoinHandle<'_, T>) -> T {
    match handle.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn debian(part: &Path, include: &str, what: &str, progress: &Progress) -> Result<()> {
    packages::install(packages::IMAGES, progress)?;
    progress.say(format!("making the root file system of {what} from the Debian mirror (about a minute, cached afterwards)"));
    // mmdebstrap wants to make the folder itself, or find it empty.
    fs::remove_dir_all(part).on("remove", part)?;
    // It mounts /dev/shm and more of this machine below the folder. In a mount namespace of its own they go with it when
    // it is killed; left behind, whoever removes the unfinished folder would empty them.
    Shell::new("unshare")
        .args(["--mount", "mmdebstrap"])
        .args(["--variant=minbase", &format!("--include={include}")])
        .args(
            ["doc", "locale", "man"]
                .map(|folder| format!("--dpkgopt=path-exclude=/usr/share/{folder}/*")),
        )
        .arg(SUITE)
        .arg(part)
        .args(packages::mirror())
        .within(Duration::from_secs(MAKE_S))
        .run()?;
    let run = part.join("run/mysqld");
    if include == DB_PACKAGES {
        fs::create_dir_all(&run).on("create", &run)?;
    }
    progress.say(format!("made the root file system of {what}"));
    Ok(())
}

fn write_files(root: &Path) -> Result<()> {
    for (name, text, mode) in WEB_FILES {
        let path = root.join(name);
        // A symlink of the image would lead out of it: replace whatever is there.
        if path.is_symlink() {
            fs::remove_file(&path).on("remove", &path)?;
        }
        fs::write(&path, text).on("write", &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).on("change", &path)?;
    }
    Ok(())
}

/// The counter's root file system: this very program and the libraries it is linked with.
fn counter(folders: &Folders) -> Result<PathBuf> {
    let program = &folders.program;
    let bytes = fs::read(program).on("read", program)?;
    let stamp = blake3::hash(&bytes).to_hex().to_string();
    folders.cached("image-counter", &stamp, |part| {
        for folder in ["proc", "sys", "dev", "data", "tmp", "run"] {
            let path = part.join(folder);
            fs::create_dir_all(&path).on("create", &path)?;
        }
        fs::copy(program, part.join("lab")).on("copy", program)?;
        for library in libraries(program)? {
            let to = part.join(library.strip_prefix("/").unwrap_or(&library));
            let folder = to.parent().unwrap_or(part);
            fs::create_dir_all(folder).on("create", folder)?;
            fs::copy(&library, &to).on("copy", &library)?;
        }
        Ok(())
    })
}

fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let printed = Shell::new("ldd").arg(program).run()?;
    Ok(printed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .filter(|path| path.is_file())
        .collect())
}
