//! Both ends on loopback, with real certificates and sockets, and a CRIU that is a few lines of this file.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cutover_protocol::plan::Compress;
use cutover_protocol::schedule::Schedule;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::lanes::{Lanes, Turns};
use super::server::frames::HEADER_BYTES;
use super::ship::DumpServer;
use super::wire::Seal;
use super::*;
use crate::peer::{self, Handler, PeerTimeouts, Session};
use crate::pki;
use crate::tls::{ClientTls, ServerTls, TlsPaths};

/// Generous: only a hang runs into it.
const LIMIT: Duration = Duration::from_secs(60);
const TIMEOUTS: PeerTimeouts = PeerTimeouts {
    connect: Duration::from_secs(10),
    dead_after: Duration::from_secs(5),
    resume_within: Duration::from_secs(20),
};

struct Keeper(Arc<PageStore>);

impl Handler for Keeper {
    type Request = String;
    type Response = String;

    async fn handle(&self, request: String) -> String {
        request
    }

    fn pages(&self) -> Option<Arc<PageStore>> {
        Some(Arc::clone(&self.0))
    }
}

/// What a session runs through; cut, it breaks every connection, and lets new ones through at once.
#[derive(Clone)]
struct Cable {
    addr: SocketAddr,
    cuts: watch::Sender<u32>,
}

impl Cable {
    async fn to(target: SocketAddr, tasks: &mut JoinSet<Result<Infallible, PeerError>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cable = Self {
            addr: listener.local_addr().unwrap(),
            cuts: watch::Sender::new(0),
        };
        let cuts = cable.cuts.clone();
        tasks.spawn(async move {
            let mut strands = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut cut = cuts.subscribe();
                strands.spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    let both = tokio::io::copy_bidirectional(&mut near, &mut far);
                    tokio::select! { _ = both => {}, _ = cut.changed() => {} }
                });
            }
        });
        cable
    }

    fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

struct World {
    folder: tempfile::TempDir,
    cable: Cable,
    store: Arc<PageStore>,
    session: Arc<Session>,
    source: Arc<PageSource>,
    _tasks: JoinSet<Result<Infallible, PeerError>>,
}

fn identity(folder: &std::path::Path, role: &str) -> TlsPaths {
    TlsPaths {
        ca: folder.join("ca.pem"),
        certificate: folder.join(format!("{role}.pem")),
        key: folder.join(format!("{role}.key")),
    }
}

impl World {
    async fn new(compress: Compress) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tls = folder.path().join("tls");
        pki::create(&tls).unwrap();
        let store = Arc::new(PageStore::new(folder.path().join("store")));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr: SocketAddr = listener.local_addr().unwrap();
        let server = ServerTls::load(&identity(&tls, "target"), "source").unwrap();
        let keeper = Arc::new(Keeper(Arc::clone(&store)));
        let mut tasks = JoinSet::new();
        let no_trees = Arc::new(|_: &crate::transfer::TreeName| None);
        tasks.spawn(peer::serve(listener, server, TIMEOUTS, keeper, no_trees));
        let client = ClientTls::load(&identity(&tls, "source"), "target").unwrap();
        let cable = Cable::to(addr, &mut tasks).await;
        let session = peer::connect(cable.addr, client, TIMEOUTS, 4).await;
        let session = Arc::new(session.unwrap());
        let source = PageSource::open(&session, compress, LIMIT).await.unwrap();
        Self {
            folder,
            cable,
            store,
            session,
            source: Arc::new(source),
            _tasks: tasks,
        }
    }

    /// Dumps images of one container; gives what was counted and what came of it.
    async fn dump(&self, images: Vec<Image>) -> (Arc<Tally>, Result<(), MemoryError>) {
        self.dump_and(images, |_| ()).await
    }

    /// The same, and calls `after` with the number of each image that was sent.
    async fn dump_and(
        &self,
        images: Vec<Image>,
        after: impl Fn(usize) + Send + 'static,
    ) -> (Arc<Tally>, Result<(), MemoryError>) {
        let (server, _given_up) = DumpServer::bind().unwrap();
        let addr = server.addr();
        let criu = std::thread::spawn(move || criu_and(addr, &images, after));
        let tally = Arc::<Tally>::default();
        let shipper = self.shipper(&tally);
        let served = tokio::task::spawn_blocking(move || {
            server.serve(shipper, Layout::new("db", 1), Arc::default(), LIMIT)
        });
        let seal = served.await.unwrap().unwrap();
        assert_eq!(criu.join().unwrap(), 0);
        (tally, self.source.seal(seal, LIMIT).await)
    }

    /// Ships pages of one container that is alone on the link.
    fn shipper(&self, tally: &Arc<Tally>) -> Shipper {
        let lanes = Lanes::new((Schedule::Gang, Turns::Always), vec![("db".to_owned(), 1)]);
        Shipper::new(Arc::clone(&self.source), Arc::clone(tally), lanes.enter(0))
    }

    fn placed(&self) -> PathBuf {
        let images = self.folder.path().join("images");
        std::fs::create_dir_all(&images).unwrap();
        self.store.place(&"db".parse().unwrap(), &images).unwrap();
        images
    }
}

/// An image's number as CRIU says it, and its pages in one region.
struct Image(u64, Vec<u8>);

/// Sends a dump as CRIU does; gives the answer to its close.
fn criu(addr: SocketAddrV4, images: &[Image]) -> i32 {
    criu_and(addr, images, |_| ())
}

fn criu_and(addr: SocketAddrV4, images: &[Image], after: impl Fn(usize)) -> i32 {
    let mut stream = TcpStream::connect(addr).unwrap();
    let header = |command, pages, image| header(command, pages, 1, image);
    for (number, Image(image, content)) in images.iter().enumerate() {
        stream.write_all(&header(4, 0, *image)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let pages = content.len() / PAGE_BYTES;
        if pages > 0 {
            stream
                .write_all(&header(6 | 4 << 16, pages, *image))
                .unwrap();
            stream.write_all(content).unwrap();
        }
        after(number);
    }
    stream.write_all(&header(0x1023, 0, 0)).unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    i32::from_ne_bytes(answer)
}

fn header(command: u32, pages: usize, first: u64, image: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&command.to_ne_bytes());
    bytes[8..16].copy_from_slice(&(pages as u64).to_ne_bytes());
    bytes[16..24].copy_from_slice(&(first * PAGE_BYTES as u64).to_ne_bytes());
    bytes[24..].copy_from_slice(&image.to_ne_bytes());
    bytes
}

/// Pages of noise, with a page of zeros and a repeated one among them.
fn memory(seed: &str, pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE_BYTES];
    let mut hasher = blake3::Hasher::new();
    hasher.update(seed.as_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    if pages > 4 {
        bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(0);
        bytes.copy_within(0..PAGE_BYTES, 3 * PAGE_BYTES);
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_arrives_byte_for_byte_packed_or_not() {
    for compress in [Compress::Off, Compress::Auto, Compress::Zstd, Compress::Lz4] {
        let world = World::new(compress).await;
        let (one, two) = (memory("one", 5000), memory("two", 3));
        let images = vec![
            Image(1 << 8 | 1, one.clone()),
            Image(7 << 8 | 2, two.clone()),
            Image(2 << 8 | 1, Vec::new()),
        ];
        let (tally, sealed) = world.dump(images).await;
        sealed.unwrap();
        assert_eq!(tally.pages.load(Ordering::Relaxed), 5003);
        assert_eq!(tally.pages_new.load(Ordering::Relaxed), 5001);
        let images = world.placed();
        let read = |name: &str| std::fs::read(images.join(name)).unwrap();
        assert!(read("pages-1.img") == one && read("pages-2.img") == two);
        assert!(read("pages-3.img").is_empty());
        assert_eq!(read("pagemap-1.img").len(), 8 + 6 + 4 + 8);
        assert_eq!(read("pagemap-2.img").len(), 8 + 6);
        assert!(images.join("pagemap-shmem-7.img").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_put_together_while_criu_is_busy_with_something_else() {
    let world = World::new(Compress::Auto).await;
    let content = memory("one", 700);
    let (image, wanted) = (
        store::assembled(&world.folder.path().join("store"), "db").join("pages-1.img"),
        content.clone(),
    );
    // CRIU has sent its last page, and does not say so before they are all there.
    let wait = move |_| {
        let deadline = std::time::Instant::now() + LIMIT;
        while !std::fs::read(&image).is_ok_and(|found| found == wanted) {
            assert!(
                std::time::Instant::now() < deadline,
                "nothing was put together"
            );
            std::thread::yield_now();
        }
    };
    let (_, sealed) = world.dump_and(vec![Image(1 << 8 | 1, content)], wait).await;
    sealed.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_goes_on_when_every_connection_breaks_twice() {
    let world = World::new(Compress::Off).await;
    let contents = ["one", "two", "three"].map(|seed| memory(seed, 6000));
    let images = (1..).zip(&contents);
    let images = images.map(|(pid, content)| Image(pid << 8 | 1, content.clone()));
    let cable = world.cable.clone();
    let cut = move |number| {
        if number < 2 {
            cable.cut();
        }
    };
    let (tally, sealed) = world.dump_and(images.collect(), cut).await;
    sealed.unwrap();
    assert_eq!(tally.pages.load(Ordering::Relaxed), 18_000);
    let images = world.placed();
    for (number, content) in (1..).zip(&contents) {
        assert!(std::fs::read(images.join(format!("pages-{number}.img"))).unwrap() == *content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_has_is_not_sent_again() {
    let world = World::new(Compress::Off).await;
    let mut content = memory("same", 4000);
    let (_, sealed) = world.dump(vec![Image(257, content.clone())]).await;
    sealed.unwrap();
    for page in [5, 900, 901, 3999] {
        content[page * PAGE_BYTES + 17] ^= 1;
    }
    // The second dump is another container's as far as the store is concerned: nothing but content counts.
    let (server, _given_up) = DumpServer::bind().unwrap();
    let addr = server.addr();
    let images = vec![Image(257, content.clone())];
    let criu = std::thread::spawn(move || criu(addr, &images));
    let tally = Arc::<Tally>::default();
    let shipper = world.shipper(&tally);
    let served = tokio::task::spawn_blocking(move || {
        server.serve(shipper, Layout::new("web", 1), Arc::default(), LIMIT)
    });
    let seal = served.await.unwrap().unwrap();
    criu.join().unwrap();
    world.source.seal(seal, LIMIT).await.unwrap();
    assert_eq!(tally.pages_new.load(Ordering::Relaxed), 4);
    let wire = tally.bytes_wire.load(Ordering::Relaxed);
    assert!(wire < 4 * 4096 + 1024, "{wire} bytes for four pages");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_from_a_running_process_is_not_dumped_again() {
    let world = World::new(Compress::Off).await;
    let content = memory("running", 2000);
    let tally = Arc::<Tally>::default();
    let shipper = world.shipper(&tally);
    let pids = [std::process::id()];
    assert!(resident_bytes(&pids) >= content.len() as u64);
    let read = tokio::task::spawn_blocking(move || {
        read_container(shipper, &pids, Part::All, &AtomicBool::new(false))
    });
    read.await.unwrap().unwrap();
    world.source.settle(LIMIT).await.unwrap();
    assert!(tally.pages.load(Ordering::Relaxed) >= 2000);
    // The buffer need not begin at a page, so it is the pages within it that are known.
    let start = content.as_ptr() as usize;
    let skipped = start.next_multiple_of(PAGE_BYTES) - start;
    let whole = (content.len() - skipped) / PAGE_BYTES * PAGE_BYTES;
    let image = Image(257, content[skipped..][..whole].to_vec());
    let (dumped, sealed) = world.dump(vec![image]).await;
    sealed.unwrap();
    assert_eq!(dumped.pages_new.load(Ordering::Relaxed), 0);
}

/// Sends a dump as CRIU does behind a round: of the image 257, only the pages in `changed` are there, the others are their
/// parent's. Gives every answer.
fn tracked(addr: SocketAddrV4, content: &[u8], changed: Range<usize>) -> Vec<u8> {
    let pages = content.len() / PAGE_BYTES;
    let mut says = Vec::new();
    says.extend(header(4, 0, 0, 257));
    says.extend(header(6 | 1 << 16, changed.start, 1, 257));
    let first = changed.start as u64 + 1;
    says.extend(header(6 | 4 << 16, changed.len(), first, 257));
    says.extend_from_slice(&content[bytes(&changed)]);
    let behind = changed.end as u64 + 1;
    says.extend(header(6 | 1 << 16, pages - changed.end, behind, 257));
    says.extend(header(0x1023, 0, 0, 0));
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(&says).unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    answers
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
}

impl World {
    /// Takes a round, which `criu` sends.
    async fn round<T: Send + 'static>(
        &self,
        number: u32,
        parent: Arc<Parent>,
        criu: impl FnOnce(SocketAddrV4) -> T + Send + 'static,
    ) -> (Arc<Parent>, Draft, T) {
        let (server, _given_up) = DumpServer::bind().unwrap();
        let addr = server.addr();
        let dumps = std::thread::spawn(move || criu(addr));
        let shipper = self.shipper(&Arc::default());
        let taken = tokio::task::spawn_blocking(move || {
            let layout = Layout::new("db", number);
            let (seen, draft, _) = server.serve_round(shipper, layout, parent, LIMIT)?;
            Ok::<_, MemoryError>((seen, draft))
        });
        let (seen, draft) = taken.await.unwrap().unwrap();
        (Arc::new(seen), draft, dumps.join().unwrap())
    }

    /// The same, and waits until the target's images are as it saw them.
    async fn drafted<T: Send + 'static>(
        &self,
        number: u32,
        parent: Arc<Parent>,
        criu: impl FnOnce(SocketAddrV4) -> T + Send + 'static,
    ) -> (Arc<Parent>, T) {
        let (seen, draft, answered) = self.round(number, parent, criu).await;
        self.source.drafted(draft, LIMIT).await.unwrap();
        (seen, answered)
    }

    /// The pages of the first image so far.
    fn image(&self) -> Vec<u8> {
        let folder = store::assembled(&self.folder.path().join("store"), "db");
        std::fs::read(folder.join("pages-1.img")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_not_changed_since_a_round_is_neither_read_nor_put_together_again() {
    let world = World::new(Compress::Off).await;
    let mut content = memory("tracked", 100);
    let images = vec![Image(257, content.clone())];
    let (first, answer) = world
        .drafted(1, Arc::default(), move |addr| criu(addr, &images))
        .await;
    assert_eq!(answer, 0);
    assert!(world.image() == content);

    // The page of zeros gets content, and another one loses it.
    content[bytes(&(0..4))].fill(5);
    content[bytes(&(2..3))].fill(0);
    let sent = content.clone();
    let (parent, answers) = world
        .drafted(2, first, move |addr| tracked(addr, &sent, 0..4))
        .await;
    assert_eq!(answers, [1, 0, 0, 0, 0]);
    assert!(world.image() == content);

    // Damaged behind the target's back, to see that the dump leaves it alone.
    let folder = store::assembled(&world.folder.path().join("store"), "db");
    std::fs::write(folder.join("pages-1.img"), vec![7; content.len()]).unwrap();
    content[bytes(&(40..42))].fill(9);
    let sent = content.clone();
    let (server, _given_up) = DumpServer::bind().unwrap();
    let addr = server.addr();
    let dumps = std::thread::spawn(move || tracked(addr, &sent, 40..42));
    let tally = Arc::<Tally>::default();
    let (shipper, layout) = (world.shipper(&tally), Layout::new("db", 3));
    let served = tokio::task::spawn_blocking(move || server.serve(shipper, layout, parent, LIMIT));
    let seal = served.await.unwrap().unwrap();
    assert_eq!(dumps.join().unwrap(), [1, 0, 0, 0, 0]);
    assert_eq!(tally.pages.load(Ordering::Relaxed), 2);
    world.source.seal(seal, LIMIT).await.unwrap();
    let image = std::fs::read(world.placed().join("pages-1.img")).unwrap();
    let mut wanted = vec![7; content.len()];
    wanted[bytes(&(40..42))].fill(9);
    assert!(image == wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_never_got_whole_is_not_built_upon() {
    let world = World::new(Compress::Off).await;
    let content = memory("half", 50);
    let images = vec![Image(257, content.clone())];
    let (first, _, _) = world
        .round(1, Arc::default(), move |addr| criu(addr, &images))
        .await;
    // What else might be there.
    let folder = store::assembled(&world.folder.path().join("store"), "db");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("pages-1.img"), vec![7; 80 * PAGE_BYTES]).unwrap();
    let sent = content.clone();
    world
        .drafted(2, first, move |addr| tracked(addr, &sent, 0..1))
        .await;
    assert!(world.image() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_follow_memory_that_grows_and_shrinks_from_round_to_round() {
    let world = World::new(Compress::Off).await;
    let contents = [("a", 60), ("b", 30), ("c", 90)].map(|(seed, pages)| memory(seed, pages));
    for (number, content) in (1..).zip(&contents) {
        let images = vec![Image(257, content.clone()), Image(513, content.clone())];
        // Nothing is known of a parent: all of it is new every time.
        world
            .drafted(number, Arc::default(), move |addr| criu(addr, &images))
            .await;
        assert!(world.image() == *content);
    }
    let last = [&vec![0; 3 * PAGE_BYTES][..], &contents[2]].concat();
    let (server, _given_up) = DumpServer::bind().unwrap();
    let (addr, images) = (server.addr(), vec![Image(257, last.clone())]);
    let dumps = std::thread::spawn(move || criu(addr, &images));
    let (shipper, layout) = (world.shipper(&Arc::default()), Layout::new("db", 4));
    let served =
        tokio::task::spawn_blocking(move || server.serve(shipper, layout, Arc::default(), LIMIT));
    let seal = served.await.unwrap().unwrap();
    assert_eq!(dumps.join().unwrap(), 0);
    world.source.seal(seal, LIMIT).await.unwrap();
    let images = world.placed();
    assert!(std::fs::read(images.join("pages-1.img")).unwrap() == last);
    // The second process has ended.
    assert!(!images.join("pages-2.img").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_with_a_missing_piece_or_another_root_are_not_completed() {
    let world = World::new(Compress::Off).await;
    let (server, _given_up) = DumpServer::bind().unwrap();
    let addr = server.addr();
    let criu = std::thread::spawn(move || criu(addr, &[Image(257, memory("x", 10))]));
    let shipper = world.shipper(&Arc::default());
    let served = tokio::task::spawn_blocking(move || {
        server.serve(shipper, Layout::new("db", 1), Arc::default(), LIMIT)
    });
    let seal = served.await.unwrap().unwrap();
    criu.join().unwrap();
    let refused = [
        Seal {
            root: [0; 32],
            ..seal.clone()
        },
        Seal {
            images: Vec::new(),
            ..seal.clone()
        },
        Seal {
            container: "web".to_owned(),
            pieces: 0,
            ..seal.clone()
        },
    ];
    for lie in refused {
        let sealed = world.source.seal(lie, LIMIT).await;
        let is_refused = matches!(sealed, Err(MemoryError::Target(PageFault::NotSealed(_))));
        assert!(is_refused, "{sealed:?}");
    }
    world.source.seal(seal.clone(), LIMIT).await.unwrap();
    // Once more, because the answer may be lost: what was restored from these images meanwhile stays as it is.
    let images = world.folder.path().join("store/images/db");
    assert!(std::fs::read_dir(&images).unwrap().next().is_some());
    std::fs::remove_dir_all(&images).unwrap();
    world.source.seal(seal, LIMIT).await.unwrap();
    assert!(!images.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_names_a_path_is_refused() {
    let world = World::new(Compress::Off).await;
    let seal = Seal {
        container: "../db".to_owned(),
        round: 1,
        pieces: 0,
        images: Vec::new(),
        root: [0; 32],
    };
    let refused = world.source.seal(seal, LIMIT).await;
    assert!(
        matches!(refused, Err(MemoryError::Target(PageFault::Garbled))),
        "{refused:?}"
    );
    assert!(world.session.is_alive());
}
