//! Real tunnels between two network namespaces of this machine. They need root; without it these tests say so and
//! prove nothing.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use cutover_agent::config::TunnelSettings;
use cutover_agent::tunnel::Tunnel;
use cutover_protocol::id::HopId;
use cutover_protocol::tunnel::flip::Moved;
use cutover_protocol::tunnel::{Answer, Fare, Kind, address};

/// A busy machine takes its time; only a failure waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// A site: a network namespace with a runtime all of whose threads live in it.
pub(crate) struct Site {
    runtime: tokio::runtime::Handle,
    thread: i32,
    _end: SyncSender<()>,
    _keeper: JoinHandle<()>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let (tell, told) = sync_channel(1);
        let (end, ended): (SyncSender<()>, Receiver<()>) = sync_channel(1);
        let keeper = std::thread::spawn(move || {
            // SAFETY: no pointers; it concerns this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            // SAFETY: no pointers.
            let thread = unsafe { libc::gettid() };
            tell.send((runtime.handle().clone(), thread)).unwrap();
            let _ = ended.recv();
        });
        let (runtime, thread) = told.recv().unwrap();
        Self {
            runtime,
            thread,
            _end: end,
            _keeper: keeper,
        }
    }

    /// Runs something in the site's network.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let (tell, told) = sync_channel(1);
        self.runtime.spawn(async move {
            let _ = tell.send(work.await);
        });
        told.recv_timeout(LIMIT).unwrap()
    }

    pub(crate) fn ip(&self, lines: &[&str]) {
        for line in lines {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let done = self.run(async move { Command::new("ip").args(words).output().unwrap() });
            assert!(
                done.status.success(),
                "ip {line}: {}",
                String::from_utf8_lossy(&done.stderr)
            );
        }
    }
}

/// Two sites with a link of 1500 bytes between them, and both agents' tunnels.
struct World {
    sites: [Site; 2],
    tunnels: [Arc<Tunnel>; 2],
    folders: [tempfile::TempDir; 2],
    hop: HopId,
}

pub(crate) fn is_root() -> bool {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() } == 0;
    let ip = Command::new("ip").arg("-V").output().is_ok();
    if !(root && ip) {
        eprintln!("left out: network namespaces need root, and ip of iproute2");
    }
    root && ip
}

fn tunnel(folder: &Path) -> Arc<Tunnel> {
    let settings = TunnelSettings {
        port: 0,
        ..TunnelSettings::default()
    };
    Arc::new(Tunnel::new(folder, &settings, 7443))
}

impl World {
    fn new() -> Self {
        let sites = [Site::new(), Site::new()];
        let [source, target] = &sites;
        source.ip(&[
            "link set lo up",
            &format!(
                "link add wan type veth peer name wan netns {}",
                target.thread
            ),
            "addr add 192.0.2.1/30 dev wan",
            "link set wan up",
        ]);
        target.ip(&[
            "link set lo up",
            "addr add 192.0.2.2/30 dev wan",
            "link set wan up",
        ]);
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        Self {
            tunnels: [tunnel(folders[0].path()), tunnel(folders[1].path())],
            sites,
            folders,
            hop: "hop-1".parse().unwrap(),
        }
    }

    /// Raises the tunnel; gives what the target answered and the MTU that was found.
    fn raise(&self) -> (Answer, u16) {
        let target: IpAddr = [192, 0, 2, 2].into();
        let (near, far, hop) = (
            Arc::clone(&self.tunnels[0]),
            Arc::clone(&self.tunnels[1]),
            self.hop.clone(),
        );
        let offered = self.sites[0]
            .run(async move {
                near.offer(&hop, Kind::Wireguard, address::NETWORK, target)
                    .await
            })
            .unwrap();
        let offer = offered.offer.clone();
        let known = BTreeSet::from([IpAddr::from([10, 44, 0, 3])]);
        let answer = self.sites[1]
            .run(async move { far.answer(offer, known).await })
            .unwrap();
        let (near, told) = (Arc::clone(&self.tunnels[0]), answer.clone());
        let mtu = self.sites[0]
            .run(async move { near.accept(offered, &told, target).await })
            .unwrap();
        for site in [1, 0] {
            let (tunnel, hop) = (Arc::clone(&self.tunnels[site]), self.hop.clone());
            self.sites[site]
                .run(async move { tunnel.set_mtu(&hop, mtu).await })
                .unwrap();
        }
        (answer, mtu)
    }

    fn fare(&self, site: usize) -> Option<Fare> {
        let tunnel = Arc::clone(&self.tunnels[site]);
        self.sites[site].run(async move { tunnel.fare().await })
    }

    /// Listens at the target and connects from the source; both run in their own site.
    fn connect(&self, from: Option<IpAddr>, to: SocketAddr) -> (TcpStream, TcpStream) {
        let listener = self.sites[1].run(async move { TcpListener::bind(to).unwrap() });
        let near = self.sites[0].run(async move {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            if let Some(from) = from {
                socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
            }
            socket.connect_timeout(&to.into(), LIMIT).unwrap();
            TcpStream::from(socket)
        });
        let (far, _) = listener.accept().unwrap();
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.set_nodelay(true).unwrap();
        }
        (near, far)
    }
}

/// Sends so many bytes one way and reads them all at the other end.
fn carry(near: &TcpStream, far: &TcpStream, bytes: usize) {
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut near = near;
            near.write_all(&vec![7; bytes]).unwrap();
        });
        let (mut far, mut read) = (far, vec![0; bytes]);
        far.read_exact(&mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
    });
}

#[test]
fn a_tunnel_in_user_space_finds_its_mtu_and_carries_a_stream() {
    if !is_root() {
        return;
    }
    let world = World::new();
    let (answer, mtu) = world.raise();
    assert_eq!(mtu, 1440);
    let (near, far) = world.connect(None, (answer.addresses.target, 80).into());
    carry(&near, &far, 20 << 20);
    carry(&far, &near, 1 << 20);
    let told = std::iter::repeat_with(|| {
        std::thread::sleep(Duration::from_millis(50));
        world.fare(0).unwrap()
    })
    .find(|fare| fare.bytes_sent > 20 << 20)
    .unwrap();
    assert!(told.handshake_age_s.is_some_and(|age| age < 60), "{told:?}");
    assert_eq!(told.peer, answer.addresses.target);
}

#[test]
fn a_stream_goes_on_after_an_end_was_made_anew() {
    if !is_root() {
        return;
    }
    let mut world = World::new();
    let (answer, _) = world.raise();
    let (near, far) = world.connect(None, (answer.addresses.target, 80).into());
    carry(&near, &far, 1 << 20);
    // The target's agent dies, and with it its device; another one finds what it left.
    let folder = world.folders[1].path();
    let again = tunnel(folder);
    let old = std::mem::replace(&mut world.tunnels[1], Arc::clone(&again));
    let restored = world.sites[1].run(async move {
        drop(old);
        again.restore().await
    });
    restored.unwrap();
    carry(&near, &far, 1 << 20);
    carry(&far, &near, 1 << 20);
}

#[test]
fn an_address_moves_with_its_peer_and_nothing_else_does() {
    if !is_root() {
        return;
    }
    let world = World::new();
    world.raise();
    // The moved container's address at the target; at the source a client that had a connection with it.
    world.sites[1].ip(&["addr add 10.44.0.3/32 dev lo"]);
    world.sites[0].ip(&["addr add 10.9.9.9/32 dev lo"]);
    let (container, client): (IpAddr, IpAddr) = ([10, 44, 0, 3].into(), [10, 9, 9, 9].into());
    let moved = Moved {
        addresses: BTreeSet::from([container]),
        carried: BTreeSet::from([client]),
    };
    for site in [1, 0] {
        let (tunnel, hop, moved) = (
            Arc::clone(&world.tunnels[site]),
            world.hop.clone(),
            moved.clone(),
        );
        world.sites[site]
            .run(async move {
                tunnel.flip(&hop, moved.clone()).await?;
                // A flip that is told twice is one.
                tunnel.flip(&hop, moved).await
            })
            .unwrap();
    }
    let (near, far) = world.connect(Some(client), (container, 80).into());
    carry(&near, &far, 1 << 20);
    carry(&far, &near, 1 << 20);
    assert_eq!(far.peer_addr().unwrap().ip(), client);
    // Everybody else at the target goes to the client by other ways; here there is none.
    let led = world.sites[1].run(async {
        Command::new("ip")
            .args(["route", "get", "10.9.9.9"])
            .output()
            .unwrap()
    });
    assert!(!led.status.success());
}

#[test]
fn a_closed_tunnel_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let world = World::new();
    let before: Vec<String> = [0, 1].map(|site| state(&world.sites[site])).into();
    world.raise();
    for site in [0, 1] {
        let (tunnel, hop) = (Arc::clone(&world.tunnels[site]), world.hop.clone());
        world.sites[site]
            .run(async move {
                tunnel.close(&hop).await?;
                tunnel.close(&hop).await
            })
            .unwrap();
        assert_eq!(state(&world.sites[site]), before[site]);
        assert!(world.fare(site).is_none());
    }
}

/// Devices, addresses, routes and rules of a site.
fn state(site: &Site) -> String {
    site.run(async {
        let show = |words: &[&str]| {
            let output = Command::new("ip")
                .args(["-o", "-4"])
                .args(words)
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        // The kernel hears of a link that came up a moment later, and says so of the link's routes until then.
        let routes = show(&["route", "show", "table", "all"]).replace("linkdown ", "");
        show(&["addr"]) + &routes + &show(&["rule"])
    })
}
