//! What the packets of a session say of their priority, as seen on the wire. The loopback of a network namespace of our
//! own is looked at, which needs root; without it these tests say so and prove nothing.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cutover_agent::peer::{self, PeerTimeouts, Priority, Session};
use socket2::{Domain, Protocol, Socket, Type};

use crate::cable::{Cable, Cut};
use crate::tunnel::{Site, is_root};
use crate::world::{LIMIT, TIMEOUTS, World};

/// What a round of these tests moves. Few enough for the kernel to keep them until they are looked at, and many beside
/// what the control connection has to say.
const FILE_BYTES: usize = 32 << 10;
/// The most that everything but the bulk may take meanwhile, the greeting of a stream that is late included.
const REST_BYTES: usize = FILE_BYTES / 2;

/// The byte of a header that carries Lower Effort, without the two bits of congestion.
const LOWER_EFFORT: u8 = 0x04;
const CLASS: u8 = 0xfc;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// Sees every packet of a network namespace.
struct Tap(Socket);

impl Tap {
    fn new() -> Self {
        // Its protocol is in the order of the wire (packet(7)).
        let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(all)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// Bytes that went to a port since the last look, by whether they were marked. Each crosses the loopback twice for a
    /// tap: when it leaves and when it arrives.
    fn seen(&mut self, port: u16) -> Seen {
        let (mut seen, mut packet) = (Seen::default(), [0; 128]);
        while let Ok(bytes) = self.0.read(&mut packet) {
            let Some((class, bytes)) = to_port(&packet[..bytes], port) else {
                continue;
            };
            match class & CLASS {
                LOWER_EFFORT => seen.marked += bytes,
                0 => seen.unmarked += bytes,
                other => panic!("a packet of the class {other:#x}"),
            }
        }
        seen
    }
}

#[derive(Debug, Default)]
struct Seen {
    marked: usize,
    unmarked: usize,
}

/// The traffic class of a packet and what it carries, headers of TCP included, if it goes to this port.
fn to_port(packet: &[u8], port: u16) -> Option<(u8, usize)> {
    let number = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (class, header, bytes) = match packet.first()? >> 4 {
        4 => (packet[1], IPV4_HEADER, number(2)? - IPV4_HEADER as u16),
        // The class lies across two bytes.
        6 => ((number(0)? >> 4) as u8, IPV6_HEADER, number(4)?),
        _ => return None,
    };
    (number(header + 2)? == port).then_some((class, usize::from(bytes)))
}

/// A target behind a cable, and a session with one stream.
struct Link {
    world: World,
    cable: Cable,
    session: Session,
    tap: Tap,
    rounds: u8,
}

impl Link {
    async fn new(host: IpAddr) -> Self {
        let world = World::at(host, tempfile::tempdir().unwrap()).await;
        let cable = Cable::to(world.addr).await;
        let timeouts = PeerTimeouts {
            resume_within: LIMIT,
            ..TIMEOUTS
        };
        let session = peer::connect(cable.addr, world.tls(), timeouts, 1).await;
        Self {
            session: session.unwrap(),
            world,
            cable,
            tap: Tap::new(),
            rounds: 0,
        }
    }

    /// Moves a file that nothing can compress, and tells what was seen of that.
    async fn round(&mut self) -> Seen {
        self.rounds += 1;
        // Connects anew where the connections were cut.
        self.world.sync(&self.session).await.unwrap();
        let mut noise = vec![0; FILE_BYTES];
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&[self.rounds])
            .finalize_xof()
            .fill(&mut noise);
        fs::write(self.world.here().join("noise"), noise).unwrap();
        self.tap.seen(self.cable.addr.port());
        self.world.sync(&self.session).await.unwrap();
        self.tap.seen(self.cable.addr.port())
    }

    async fn assert_is_marked(&mut self, when: &str) {
        let seen = self.round().await;
        let is_so = seen.marked >= FILE_BYTES && seen.unmarked <= REST_BYTES;
        assert!(is_so, "{when}: {seen:?}");
    }

    async fn assert_is_not_marked(&mut self, when: &str) {
        let seen = self.round().await;
        let is_so = seen.marked == 0 && seen.unmarked >= FILE_BYTES;
        assert!(is_so, "{when}: {seen:?}");
    }

    /// Cuts the cable, and mends it.
    async fn cut(&self) {
        self.cable.breaks(Cut::Closed, &self.session).await;
    }
}

fn bulk_says_what_it_is(host: IpAddr) {
    if !is_root() {
        return;
    }
    let site = Site::new();
    site.ip(&["link set lo up"]);
    site.run(async move {
        let mut link = Link::new(host).await;
        link.assert_is_marked("at first").await;
        link.cut().await;
        link.assert_is_marked("on a stream that was opened anew")
            .await;
        link.session.set_priority(Priority::Urgent);
        link.assert_is_not_marked("when it was urgent").await;
        link.cut().await;
        link.assert_is_not_marked("on an urgent stream that was opened anew")
            .await;
        link.session.set_priority(Priority::Background);
        link.assert_is_marked("in the background again").await;
    });
}

#[test]
fn bulk_says_that_it_is_lower_effort_until_it_is_urgent_over_ipv4() {
    bulk_says_what_it_is(Ipv4Addr::LOCALHOST.into());
}

#[test]
fn bulk_says_that_it_is_lower_effort_until_it_is_urgent_over_ipv6() {
    bulk_says_what_it_is(Ipv6Addr::LOCALHOST.into());
}
