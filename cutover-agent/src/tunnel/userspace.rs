//! WireGuard in this process, for kernels without it: packets from a TUN device are sealed and sent over UDP, and the
//! other way round. The protocol itself is boringtun's; one thread a device moves the bytes, in batches, and never
//! touches anything else of the agent. The device lives as long as this value.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use cutover_protocol::tunnel::Key;
use ipnet::IpNet;
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::wireguard::Peer;
use super::{Counters, KEEPALIVE_S, tun};

/// How often WireGuard's clocks are looked at; its own are counted in seconds.
const TICK: Duration = Duration::from_millis(250);
/// Packets taken from the device before the other direction has its turn.
const PACKETS_AT_ONCE: usize = 64;
/// The largest packet a device hands out, and the largest datagram.
const PACKET_BYTES: usize = 65_535;
/// WireGuard adds 32 bytes to a packet, and its greeting takes 148.
const SEALED_MORE: usize = 148;
/// Bytes that may wait in each direction of the UDP socket: what 800 Mbit/s bring in 40 ms.
const SOCKET_BYTES: i32 = 4 << 20;
/// No handshake yet.
const NEVER: u64 = u64::MAX;

/// A running device.
#[derive(Debug)]
pub(super) struct Device {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    pub(super) port: u16,
}

#[derive(Debug)]
struct Shared {
    allowed: Mutex<Arc<[IpNet]>>,
    endpoint: Mutex<Option<SocketAddr>>,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    handshake_age_s: AtomicU64,
}

impl Device {
    /// Makes a device named `name` in this thread's network namespace and starts moving packets. `port` 0 lets the
    /// system choose one.
    pub(super) fn open(
        name: &str,
        secret: &Key,
        port: u16,
        peer: &Peer,
        is_ipv4: bool,
    ) -> io::Result<Self> {
        let any: IpAddr = if is_ipv4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, port))?;
        enlarge(&socket);
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let port = socket.local_addr()?.port();
        let shared = Arc::new(Shared {
            allowed: Mutex::new(peer.allowed.iter().copied().collect()),
            endpoint: Mutex::new(peer.endpoint),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            handshake_age_s: AtomicU64::new(NEVER),
        });
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        // The index only tells several peers of one socket apart.
        let tunn = Tunn::new(
            StaticSecret::from(secret.0),
            PublicKey::from(peer.key.0),
            None,
            Some(KEEPALIVE_S),
            0,
            None,
        );
        let pump = Pump {
            tun: tun::open(name)?,
            socket,
            state,
            tunn,
            shared: Arc::clone(&shared),
            stop: Arc::clone(&stop),
            sealed: vec![0; PACKET_BYTES + SEALED_MORE],
            opened: vec![0; PACKET_BYTES + SEALED_MORE],
            batch: Batch::default(),
        };
        let thread = std::thread::Builder::new()
            .name("tunnel".to_owned())
            .spawn(move || pump.run())?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
            port,
        })
    }

    /// Changes who may send and is sent to through the peer.
    pub(super) fn allow(&self, allowed: &BTreeSet<IpNet>) {
        *lock(&self.shared.allowed) = allowed.iter().copied().collect();
    }

    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        *lock(&self.shared.endpoint)
    }

    pub(super) fn counters(&self) -> Counters {
        let age = self.shared.handshake_age_s.load(Ordering::Relaxed);
        Counters {
            bytes_sent: self.shared.bytes_sent.load(Ordering::Relaxed),
            bytes_received: self.shared.bytes_received.load(Ordering::Relaxed),
            handshake_age_s: (age != NEVER).then_some(age),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Eight bytes always fit an event counter that is read only here.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Larger buffers than the system's limit where we are privileged, otherwise as large as it lets us have.
fn enlarge(socket: &UdpSocket) {
    use std::os::fd::AsRawFd;
    for (forced, usual) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        let set = |option| {
            let (bytes, size) = (SOCKET_BYTES, size_of::<i32>() as libc::socklen_t);
            let value = (&raw const bytes).cast();
            // SAFETY: the pointer and the size are those of a local of that type.
            unsafe {
                libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, size) == 0
            }
        };
        // A smaller buffer only costs speed.
        let _ = set(forced) || set(usual);
    }
}

/// Sealed packets of one size, to be sent in one call; the last one may be shorter.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    segment: usize,
    count: usize,
    is_full: bool,
}

impl Batch {
    fn takes(&self, packet: usize, segments_max: usize) -> bool {
        self.count == 0
            || (!self.is_full
                && packet <= self.segment
                && self.count < segments_max
                && self.bytes.len() + packet <= PACKET_BYTES - 2 * SEALED_MORE)
    }

    fn add(&mut self, packet: &[u8]) {
        if self.count == 0 {
            self.segment = packet.len();
        }
        self.is_full = packet.len() < self.segment;
        self.bytes.extend_from_slice(packet);
        self.count += 1;
    }

    fn clear(&mut self) {
        self.bytes.clear();
        (self.segment, self.count, self.is_full) = (0, 0, false);
    }
}

/// Everything the thread owns.
struct Pump {
    tun: OwnedFd,
    socket: UdpSocket,
    state: UdpSocketState,
    tunn: Tunn,
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    sealed: Vec<u8>,
    opened: Vec<u8>,
    batch: Batch,
}

impl Pump {
    fn run(mut self) {
        let mut buffers = vec![vec![0_u8; PACKET_BYTES]; BATCH_SIZE];
        let mut packet = vec![0; PACKET_BYTES];
        self.greet(false);
        let mut tick = Instant::now() + TICK;
        loop {
            match self.wait(tick.saturating_duration_since(Instant::now())) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!("the tunnel stopped: {error}");
                    return;
                }
            }
            self.receive(&mut buffers);
            self.send(&mut packet);
            if Instant::now() >= tick {
                tick = Instant::now() + TICK;
                self.clocks();
            }
        }
    }

    /// Waits for packets or a clock; false when the device is to be closed.
    fn wait(&self, limit: Duration) -> io::Result<bool> {
        let stop = self.stop.as_fd();
        let mut ready = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::new(&self.tun, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::IN),
        ];
        let limit = rustix::event::Timespec::try_from(limit).ok();
        poll(&mut ready, limit.as_ref())?;
        Ok(!ready[0].revents().contains(PollFlags::IN))
    }

    fn greet(&mut self, force: bool) {
        let peer = *lock(&self.shared.endpoint);
        if let (TunnResult::WriteToNetwork(datagram), Some(peer)) = (
            self.tunn
                .format_handshake_initiation(&mut self.sealed, force),
            peer,
        ) {
            transmit(&self.state, &self.socket, peer, datagram, None);
        }
    }

    fn clocks(&mut self) {
        let peer = *lock(&self.shared.endpoint);
        match self.tunn.update_timers(&mut self.sealed) {
            TunnResult::WriteToNetwork(datagram) => {
                if let Some(peer) = peer {
                    transmit(&self.state, &self.socket, peer, datagram, None);
                }
            }
            // The other side was gone for longer than the protocol waits. We wait for as long as there is a tunnel.
            TunnResult::Err(WireGuardError::ConnectionExpired) => self.greet(true),
            _ => {}
        }
        let (age, sent, received, ..) = self.tunn.stats();
        let shared = &self.shared;
        shared.bytes_sent.store(sent as u64, Ordering::Relaxed);
        shared
            .bytes_received
            .store(received as u64, Ordering::Relaxed);
        shared
            .handshake_age_s
            .store(age.map_or(NEVER, |age| age.as_secs()), Ordering::Relaxed);
    }

    /// Seals what the device hands out.
    fn send(&mut self, packet: &mut [u8]) {
        let Some(peer) = *lock(&self.shared.endpoint) else {
            // Nowhere to send it: taken out and dropped, so that the device does not wake us again.
            while rustix::io::read(&self.tun, &mut *packet).is_ok() {}
            return;
        };
        let allowed = Arc::clone(&*lock(&self.shared.allowed));
        let segments_max = self.state.max_gso_segments();
        for _ in 0..PACKETS_AT_ONCE {
            let Ok(read) = rustix::io::read(&self.tun, &mut *packet) else {
                break;
            };
            let inner = &packet[..read];
            if !Tunn::dst_address(inner).is_some_and(|to| allows(&allowed, to)) {
                continue;
            }
            if let TunnResult::WriteToNetwork(sealed) =
                self.tunn.encapsulate(inner, &mut self.sealed)
            {
                if !self.batch.takes(sealed.len(), segments_max) {
                    flush(&mut self.batch, &self.state, &self.socket, peer);
                }
                self.batch.add(sealed);
            }
        }
        flush(&mut self.batch, &self.state, &self.socket, peer);
    }

    /// Opens what arrived.
    fn receive(&mut self, buffers: &mut [Vec<u8>]) {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let count = {
            let mut slices: Vec<IoSliceMut<'_>> = buffers
                .iter_mut()
                .map(|buffer| IoSliceMut::new(buffer))
                .collect();
            match self
                .state
                .recv(UdpSockRef::from(&self.socket), &mut slices, &mut metas)
            {
                Ok(count) => count,
                // Nothing there, or the news that an earlier datagram found nobody: the clocks see to that.
                Err(_) => return,
            }
        };
        let allowed = Arc::clone(&*lock(&self.shared.allowed));
        for (buffer, meta) in buffers.iter().zip(&metas).take(count) {
            let stride = meta.stride.max(1);
            for datagram in buffer[..meta.len].chunks(stride) {
                self.open_one(datagram, meta.addr, &allowed);
            }
        }
    }

    fn open_one(&mut self, datagram: &[u8], from: SocketAddr, allowed: &[IpNet]) {
        let mut datagram = datagram;
        loop {
            match self
                .tunn
                .decapsulate(Some(from.ip()), datagram, &mut self.opened)
            {
                TunnResult::WriteToTunnelV4(packet, sender) if allows(allowed, sender.into()) => {
                    // A device that takes no more drops, as any network does.
                    let _ = rustix::io::write(&self.tun, packet);
                }
                TunnResult::WriteToTunnelV6(packet, sender) if allows(allowed, sender.into()) => {
                    let _ = rustix::io::write(&self.tun, packet);
                }
                TunnResult::WriteToNetwork(answer) => {
                    transmit(&self.state, &self.socket, from, answer, None);
                    // Whatever waited for the handshake comes out one by one.
                    datagram = &[];
                    continue;
                }
                TunnResult::Err(_) => return,
                _ => {}
            }
            break;
        }
        // It was sealed with our peer's key: that is where the peer is now.
        let mut endpoint = lock(&self.shared.endpoint);
        if *endpoint != Some(from) {
            *endpoint = Some(from);
        }
    }
}

fn allows(allowed: &[IpNet], address: IpAddr) -> bool {
    allowed.iter().any(|net| net.contains(&address))
}

fn flush(batch: &mut Batch, state: &UdpSocketState, socket: &UdpSocket, peer: SocketAddr) {
    if batch.count > 0 {
        let segment = (batch.count > 1).then_some(batch.segment);
        transmit(state, socket, peer, &batch.bytes, segment);
    }
    batch.clear();
}

/// Sends, or drops: retransmission is the business of whoever is inside.
fn transmit(
    state: &UdpSocketState,
    socket: &UdpSocket,
    to: SocketAddr,
    contents: &[u8],
    segment: Option<usize>,
) {
    let transmit = Transmit {
        destination: to,
        ecn: None,
        contents,
        segment_size: segment,
        src_ip: None,
    };
    let mut tries = 0;
    while let Err(error) = state.try_send(UdpSockRef::from(socket), &transmit) {
        // The socket's buffer is full: its link is slower than we are. Waiting here slows down whoever sends.
        if error.kind() != ErrorKind::WouldBlock || tries == 4 {
            return;
        }
        tries += 1;
        let mut ready = [PollFd::new(socket, PollFlags::OUT)];
        let limit = rustix::event::Timespec::try_from(TICK / 8).ok();
        let _ = poll(&mut ready, limit.as_ref());
    }
}
