//! Two agents on loopback, for tests: real certificates, real sockets, trees in temporary folders.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cutover_agent::peer::{self, Folder, Handler, PeerError, PeerTimeouts, Session};
use cutover_agent::pki;
use cutover_agent::tls::{ClientTls, ServerTls, TlsPaths};
use cutover_agent::transfer::{SyncOptions, SyncReport, TransferError, TreeName};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Generous: only a hang runs into it.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const TIMEOUTS: PeerTimeouts = PeerTimeouts {
    connect: Duration::from_secs(10),
    dead_after: Duration::from_secs(5),
    resume_within: Duration::ZERO,
};

/// Answers with what it got, and counts.
#[derive(Default)]
pub(crate) struct Echo {
    pub(crate) ended: tokio::sync::Notify,
}

impl Handler for Echo {
    type Request = String;
    type Response = String;

    async fn handle(&self, request: String) -> String {
        format!("{request} indeed")
    }

    async fn peer_lost(&self) {
        self.ended.notify_one();
    }
}

/// A folder with certificates and trees, and a target that serves `db/volume` and `web/upper`, which have a layer; `data` of
/// `one`, `two` and `three`, which have none; and those of everybody `beside` the first, in its folder.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) addr: SocketAddr,
    pub(crate) handler: Arc<Echo>,
    tasks: JoinSet<()>,
}

pub(crate) fn identity(folder: &Path, role: &str) -> TlsPaths {
    TlsPaths {
        ca: folder.join("ca.pem"),
        certificate: folder.join(format!("{role}.pem")),
        key: folder.join(format!("{role}.key")),
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::within(tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn within(folder: tempfile::TempDir) -> Self {
        Self::at(Ipv4Addr::LOCALHOST.into(), folder).await
    }

    pub(crate) async fn at(host: IpAddr, folder: tempfile::TempDir) -> Self {
        pki::create(&folder.path().join("tls")).unwrap();
        for name in ["here", "layer"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let mut world = Self {
            addr: listener.local_addr().unwrap(),
            folder,
            handler: Arc::default(),
            tasks: JoinSet::new(),
        };
        world.start(listener);
        world
    }

    fn start(&mut self, listener: TcpListener) {
        let tls = ServerTls::load(
            &identity(&self.folder.path().join("tls"), "target"),
            "source",
        )
        .unwrap();
        let there = self.folder.path().join("there");
        let layer = self.folder.path().join("layer");
        let trees = move |tree: &TreeName| {
            let (place, seeds) = match tree.as_str() {
                "db/volume" | "web/upper" => (tree.as_str(), vec![layer.clone()]),
                "one/data" | "two/data" | "three/data" => (tree.as_str(), Vec::new()),
                name if name.starts_with("beside") => ("one/data", Vec::new()),
                _ => return None,
            };
            let path = there.join(place);
            Some(Folder { path, seeds })
        };
        let (handler, trees) = (Arc::clone(&self.handler), Arc::new(trees));
        self.tasks.spawn(async move {
            let Err(error) = peer::serve(listener, tls, TIMEOUTS, handler, trees).await;
            panic!("{error}");
        });
    }

    /// Stops the target as a crash would, and starts a new one at the same place.
    pub(crate) async fn restart(&mut self) {
        self.tasks.shutdown().await;
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.addr).unwrap();
        self.start(socket.listen(64).unwrap());
    }

    pub(crate) fn tls(&self) -> ClientTls {
        ClientTls::load(
            &identity(&self.folder.path().join("tls"), "source"),
            "target",
        )
        .unwrap()
    }

    pub(crate) async fn connect(&self) -> Session {
        self.try_connect(self.tls()).await.unwrap()
    }

    pub(crate) async fn try_connect(&self, tls: ClientTls) -> Result<Session, PeerError> {
        peer::connect(self.addr, tls, TIMEOUTS, 4).await
    }

    pub(crate) fn here(&self) -> PathBuf {
        self.folder.path().join("here")
    }

    pub(crate) fn there(&self) -> PathBuf {
        self.folder.path().join("there/db/volume")
    }

    pub(crate) async fn sync(&self, session: &Session) -> Result<SyncReport, TransferError> {
        session
            .sync(&volume(), &self.here(), SyncOptions::live(LIMIT))
            .await
    }
}

/// Bytes that nothing can compress, and no two blocks alike.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    noise
}

/// A round, after which both trees are equal.
pub(crate) async fn synced(world: &World, session: &Session, options: SyncOptions) -> SyncReport {
    let (tree, here) = (volume(), world.here());
    let report = session.sync(&tree, &here, options).await.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
    report
}

/// Something that is mounted, and unmounted at its end.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// `None` where that is not allowed.
    pub(crate) fn of(kind: &str, options: &str, at: PathBuf) -> Option<Self> {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", kind, kind, "-o", options]).arg(&at);
        let is_mounted = mount.status().is_ok_and(|status| status.success());
        is_mounted.then(|| Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        let _ = unmount.arg("-l").arg(&self.0).status();
    }
}

pub(crate) fn volume() -> TreeName {
    TreeName::new("db/volume").unwrap()
}

/// Everything about a tree that has to be equal, as text: one line per entry.
pub(crate) fn picture(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    draw(root, Path::new(""), &mut lines);
    lines.sort();
    lines
}

fn draw(root: &Path, relative: &Path, lines: &mut Vec<String>) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let path = root.join(relative);
    let meta = path.symlink_metadata().unwrap();
    if meta.file_type().is_socket() {
        return;
    }
    let content = if meta.is_file() {
        blake3::hash(&std::fs::read(&path).unwrap())
            .to_hex()
            .to_string()
    } else if meta.is_symlink() {
        std::fs::read_link(&path).unwrap().display().to_string()
    } else {
        String::new()
    };
    let links = if meta.is_dir() { 0 } else { meta.nlink() };
    let size = if meta.is_file() { meta.len() } else { 0 };
    let attributes: Vec<_> = xattr::list(&path)
        .map(|names| {
            names
                .map(|name| (name.clone(), xattr::get(&path, &name).unwrap()))
                .collect()
        })
        .unwrap_or_default();
    lines.push(format!(
        "{relative:?} mode={:o} owner={}:{} time={}.{} size={size} rdev={} links={links} {attributes:?} {content}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.rdev(),
    ));
    if meta.is_dir() {
        for entry in std::fs::read_dir(&path).unwrap() {
            draw(root, &relative.join(entry.unwrap().file_name()), lines);
        }
    }
}
