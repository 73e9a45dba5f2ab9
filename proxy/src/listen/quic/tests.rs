//! The demultiplexer on real sockets: who gets which datagram.

use std::future::poll_fn;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use quinn::udp::RecvMeta;
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::connection_id::Generation;
use super::connection_id::tests::{codec, short_packet};
use super::relay::Outlet;
use super::router::{Routed, Router, Succession};
use super::socket::Demultiplexer;
use super::take_in;

const PATIENCE: Duration = Duration::from_secs(20);
const OURS: u16 = 7;

/// The two workers of one process, each with a socket of its own so that a test decides who is asked first.
struct Process {
    router: Arc<Router>,
    workers: Vec<Demultiplexer>,
    addresses: Vec<SocketAddr>,
    /// Takes in what a successor passes on.
    _helpers: JoinSet<()>,
}

impl Process {
    fn new(generation: u16, predecessor: Option<Succession>) -> Self {
        let outlet = predecessor.map(|before| Outlet::new(before.outlet).unwrap());
        let sockets: Vec<_> = (0..2)
            .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
            .collect();
        let Routed {
            router,
            inboxes,
            inlets,
        } = Router::open(Arc::new(codec()), Generation(generation), 2, outlet);
        let addresses = sockets.iter().map(|socket| socket.local_addr().unwrap());
        let addresses = addresses.collect();
        let workers = sockets.into_iter().zip(inboxes).enumerate();
        let workers = workers.map(|(worker, (socket, inbox))| {
            let socket = TokioRuntime.wrap_udp_socket(socket).unwrap();
            Demultiplexer::new(vec![socket], worker, Arc::clone(&router), inbox).unwrap()
        });
        let workers = workers.collect();
        let mut helpers = JoinSet::new();
        helpers.spawn_local(take_in(inlets, Arc::clone(&router)));
        Self {
            router,
            workers,
            addresses,
            _helpers: helpers,
        }
    }

    /// Waits until this worker's endpoint is given something, while the other worker looks at its socket too.
    async fn received_by(&self, worker: usize) -> Received {
        let received = poll_fn(|context| {
            for (index, demultiplexer) in self.workers.iter().enumerate() {
                let mut bytes = vec![[0; 65_536]; 4];
                let mut buffers: Vec<_> = bytes
                    .iter_mut()
                    .map(|buffer| IoSliceMut::new(buffer))
                    .collect();
                let mut metas = [RecvMeta::default(); 4];
                while let Poll::Ready(count) =
                    demultiplexer.poll_recv(context, &mut buffers, &mut metas)
                {
                    let mut datagrams = Vec::new();
                    for (meta, buffer) in metas.iter().zip(&buffers).take(count.unwrap()) {
                        let each = buffer[..meta.len].chunks(meta.stride.max(1));
                        datagrams.extend(each.map(<[u8]>::to_vec));
                    }
                    if !datagrams.is_empty() {
                        assert_eq!(index, worker, "the wrong worker was given {datagrams:?}");
                        let from = metas[0].addr;
                        return Poll::Ready(Received { from, datagrams });
                    }
                }
            }
            Poll::Pending
        });
        timeout(PATIENCE, received).await.expect("nothing arrives")
    }
}

struct Received {
    from: SocketAddr,
    datagrams: Vec<Vec<u8>>,
}

fn in_runtime(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

#[test]
fn a_packet_that_lands_on_the_wrong_worker_reaches_the_right_one_with_its_sender() {
    in_runtime(async {
        let process = Process::new(OURS, None);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let packet = short_packet(&codec(), OURS, 1);
        client.send_to(&packet, process.addresses[0]).unwrap();
        let received = process.received_by(1).await;
        assert_eq!(received.datagrams, [packet]);
        assert_eq!(received.from, client.local_addr().unwrap());
        assert_eq!(process.router.counts.handed.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_packet_on_the_right_worker_and_a_first_packet_stay_where_they_are() {
    in_runtime(async {
        let process = Process::new(OURS, None);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = short_packet(&codec(), OURS, 1);
        client.send_to(&own, process.addresses[1]).unwrap();
        assert_eq!(process.received_by(1).await.datagrams, [own]);
        let first = [&[0xc0, 0, 0, 0, 1, 8][..], &[9; 1200]].concat();
        client.send_to(&first, process.addresses[0]).unwrap();
        assert_eq!(process.received_by(0).await.datagrams, [first]);
        assert_eq!(process.router.counts.handed.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn a_packet_for_nobody_is_dropped_and_counted() {
    in_runtime(async {
        let process = Process::new(OURS, None);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut stray = short_packet(&codec(), OURS, 0);
        // The check byte.
        stray[12] ^= 1;
        client.send_to(&stray, process.addresses[0]).unwrap();
        let own = short_packet(&codec(), OURS, 0);
        client.send_to(&own, process.addresses[0]).unwrap();
        assert_eq!(process.received_by(0).await.datagrams, [own]);
        assert_eq!(process.router.counts.lost.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn after_a_handover_each_process_gets_the_packets_of_its_own_generation() {
    in_runtime(async {
        let old = Process::new(OURS, None);
        let succession = old.router.hand_over().unwrap();
        old.router.let_go();
        assert_eq!(succession.generation, Generation(OURS));
        let new = Process::new(OURS + 1, Some(succession));
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        for worker in 0..2 {
            let of_old = short_packet(&codec(), OURS, worker);
            client.send_to(&of_old, new.addresses[0]).unwrap();
            let of_new = short_packet(&codec(), OURS + 1, worker);
            client.send_to(&of_new, new.addresses[0]).unwrap();
            let worker = usize::from(worker);
            assert_eq!(new.received_by(worker).await.datagrams, [of_new]);
            let received = old.received_by(worker).await;
            assert_eq!(received.datagrams, [of_old]);
            assert_eq!(received.from, client.local_addr().unwrap());
        }
        assert_eq!(new.router.counts.passed.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn a_process_in_the_middle_passes_on_what_belongs_to_the_one_before_it() {
    in_runtime(async {
        let first = Process::new(OURS, None);
        let second = Process::new(OURS + 1, Some(first.router.hand_over().unwrap()));
        let third = Process::new(OURS + 2, Some(second.router.hand_over().unwrap()));
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let packet = short_packet(&codec(), OURS, 1);
        client.send_to(&packet, third.addresses[1]).unwrap();
        let own = short_packet(&codec(), OURS + 2, 1);
        client.send_to(&own, third.addresses[1]).unwrap();
        assert_eq!(third.received_by(1).await.datagrams, [own]);
        assert_eq!(first.received_by(1).await.datagrams, [packet]);
    });
}

#[test]
fn a_process_whose_predecessor_has_ended_answers_for_it() {
    in_runtime(async {
        let old = Process::new(OURS, None);
        let succession = old.router.hand_over().unwrap();
        drop(old);
        let new = Process::new(OURS + 1, Some(succession));
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let packet = short_packet(&codec(), OURS, 1);
        client.send_to(&packet, new.addresses[0]).unwrap();
        assert_eq!(new.received_by(0).await.datagrams, [packet]);
    });
}

#[test]
fn a_process_that_has_handed_over_leaves_its_sockets_alone_until_it_takes_them_back() {
    in_runtime(async {
        let old = Process::new(OURS, None);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let succession = old.router.hand_over().unwrap();
        old.router.let_go();
        let packet = short_packet(&codec(), OURS, 0);
        client.send_to(&packet, old.addresses[0]).unwrap();
        // Passed on by a successor, and taken in although the socket has something too.
        let successor = Process::new(OURS + 1, Some(succession));
        let passed = short_packet(&codec(), OURS, 1);
        client.send_to(&passed, successor.addresses[0]).unwrap();
        let own = short_packet(&codec(), OURS + 1, 0);
        client.send_to(&own, successor.addresses[0]).unwrap();
        assert_eq!(successor.received_by(0).await.datagrams, [own]);
        assert_eq!(old.received_by(1).await.datagrams, [passed]);
        old.router.take_back();
        assert_eq!(old.received_by(0).await.datagrams, [packet]);
    });
}
