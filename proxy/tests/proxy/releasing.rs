//! The release: who of the held leaves when, and how many are at the owner at once.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cutover_protocol::hold::Gate;
use cutover_protocol::id::Site;

use crate::holding::balanced;
use crate::world::{Origin, Peer, Plan, Stage, World};

const DONE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A proxy whose target is played by the test, and which holds.
fn holding(release: &str, service: &str) -> (World, Stage) {
    let (source, target) = (Origin::new("source"), Stage::new());
    let world = Plan::new(source.address(), target.address())
        .table(&format!("[release]\n{release}"))
        .service(service)
        .start();
    world.hold();
    (world, target)
}

/// Clients that ask one after the other, each held before the next.
fn held(world: &World, requests: &[&str]) -> Vec<Peer> {
    let ask = |(index, request): (usize, &&str)| {
        let mut client = world.client();
        client.send(format!(
            "{request} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
        ));
        world.until_held(index as u64 + 1);
        client
    };
    requests.iter().enumerate().map(ask).collect()
}

/// What comes next at the target, answered.
fn next(target: &Stage) -> String {
    let mut upstream = target.accept();
    let line = upstream.message().first_line;
    upstream.send(DONE);
    line.trim_end_matches(" HTTP/1.1").to_owned()
}

#[test]
fn a_request_counts_as_under_way_until_the_last_byte_of_its_answer() {
    let (world, target) = holding("window_max = 1", "");
    let mut clients = held(&world, &["GET /long", "GET /next"]);
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nnot yet");
    assert_eq!(clients[0].head().status(), 200);
    assert_eq!(clients[0].bytes(7), b"not yet");
    assert!(target.is_deserted());
    assert_eq!(world.status().held_now, 1);
    upstream.send("ok");
    assert_eq!(next(&target), "GET /next");
    assert_eq!(clients[1].message().status(), 200);
    balanced(&world);
}

#[test]
fn a_long_poll_keeps_the_others_from_following_only_for_as_long_as_patience_lasts() {
    let (world, target) = holding("window_max = 1\npatience_ms = 50", "");
    let mut clients = held(&world, &["GET /poll", "GET /next"]);
    world.move_to(Site::Target);
    let mut polled = target.accept();
    assert_eq!(polled.message().first_line, "GET /poll HTTP/1.1");
    assert_eq!(next(&target), "GET /next");
    assert_eq!(clients[1].message().status(), 200);
    polled.send(DONE);
    assert_eq!(clients[0].message().status(), 200);
    world.until(|status| status.gate == Gate::Open);
    balanced(&world);
}

#[test]
fn nobody_waits_for_the_end_of_a_tunnel() {
    let (world, target) = holding("window_max = 1", "");
    let mut socket = world.client();
    socket.send("GET /ws HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
    world.until_held(1);
    let mut client = world.client();
    client.get("/next");
    world.until_held(2);
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    upstream.message();
    upstream.send(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    );
    assert_eq!(socket.head().status(), 101);
    assert_eq!(next(&target), "GET /next");
    assert_eq!(client.message().status(), 200);
    upstream.send("still here");
    assert_eq!(socket.bytes(10), b"still here");
}

#[test]
fn writes_leave_before_reads_and_newcomers_behind_all_of_them() {
    let (world, target) = holding(
        "window_max = 1",
        "[[service.route]]\nname = \"writes\"\nmethod = [\"POST\"]\nrelease_class = \"first\"\n\
         [[service.route]]\nname = \"reports\"\npath_prefix = \"/report\"\nrelease_class = \"last\"",
    );
    let asked = ["GET /report", "GET /0", "POST /1", "GET /2", "POST /3"];
    let clients = held(&world, &asked);
    world.move_to(Site::Target);
    let mut canary = target.accept();
    assert_eq!(canary.message().first_line, "POST /1 HTTP/1.1");
    let mut newcomer = world.client();
    newcomer.post("/new", "");
    world.until_held(5);
    canary.send(DONE);
    let order: Vec<String> = (0..5).map(|_| next(&target)).collect();
    let expected = ["POST /3", "GET /0", "GET /2", "GET /report", "POST /new"];
    assert_eq!(order, expected);
    for mut client in clients {
        assert_eq!(client.message().status(), 200);
    }
    assert_eq!(newcomer.message().status(), 200);
    balanced(&world);
}

#[test]
fn a_spread_release_takes_its_time() {
    const SPREAD: Duration = Duration::from_millis(200);
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[release]\nspread_ms = 200")
        .start();
    world.hold();
    let clients = held(&world, &["GET /0", "GET /1", "GET /2", "GET /3"]);
    let since = Instant::now();
    world.move_to(Site::Target);
    for mut client in clients {
        assert_eq!(client.message().status(), 200);
    }
    // The last of four leaves after three quarters of it.
    assert!(since.elapsed() >= SPREAD * 3 / 4, "{:?}", since.elapsed());
    world.until(|status| status.gate == Gate::Open);
    assert_eq!(target.seen().len(), 4);
}

/// An origin that works on one request at a time, two milliseconds long, and counts those that are there.
#[derive(Default)]
struct Overloaded {
    now: usize,
    /// How many were there when each of them came.
    seen: Vec<usize>,
}

fn overloaded() -> (SocketAddr, Arc<Mutex<Overloaded>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (desk, turn) = (
        Arc::<Mutex<Overloaded>>::default(),
        Arc::new(Mutex::new(())),
    );
    let counting = Arc::clone(&desk);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut peer, desk, turn) = (
                Peer::of(stream.unwrap()),
                Arc::clone(&counting),
                Arc::clone(&turn),
            );
            thread::spawn(move || {
                peer.socket().set_read_timeout(None).unwrap();
                while !peer.is_closed() {
                    peer.message();
                    {
                        let mut desk = desk.lock().unwrap();
                        desk.now += 1;
                        let now = desk.now;
                        desk.seen.push(now);
                    }
                    {
                        let _turn = turn.lock().unwrap();
                        // It is what the work takes, not a wait for anything.
                        thread::sleep(Duration::from_millis(2));
                    }
                    desk.lock().unwrap().now -= 1;
                    peer.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
            });
        }
    });
    (address, desk)
}

#[test]
fn an_origin_that_grows_slow_when_asked_for_much_is_asked_for_less_than_the_most() {
    // A round at the most takes 512 answers: enough for several, should the first ones tell little on a busy machine.
    const HELD: usize = 2_500;
    const WINDOW_MAX: usize = 128;
    let source = Origin::new("source");
    let (address, desk) = overloaded();
    let world = Plan::new(source.address(), address)
        .table(&format!("[release]\nwindow_max = {WINDOW_MAX}"))
        .start();
    world.hold();
    let mut clients: Vec<Peer> = (0..HELD).map(|_| world.client()).collect();
    for client in &mut clients {
        client.get("/");
    }
    world.until_held(HELD as u64);
    world.move_to(Site::Target);
    for client in &mut clients {
        assert_eq!(client.message().status(), 200);
    }
    let seen = desk.lock().unwrap().seen.clone();
    assert_eq!(seen.len(), HELD);
    assert!(seen.iter().max().unwrap() <= &WINDOW_MAX);
    let late = seen[HELD * 2 / 3..].iter().max().unwrap();
    assert!(*late <= WINDOW_MAX * 3 / 4, "{late} at once: {seen:?}");
    balanced(&world);
}
