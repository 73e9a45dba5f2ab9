//! The hold: nothing lost, nothing doubled, nobody overtaken, and every counter adds up.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use cutover_protocol::hold::{Answer, Gate};
use cutover_protocol::id::{Epoch, Site};

use crate::world::{Nobody, Origin, PATIENCE, Peer, Plan, Stage, World, done, hold};

pub(crate) fn two_sites() -> (World, Origin, Origin) {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address()).start();
    (world, source, target)
}

pub(crate) fn balanced(world: &World) {
    let status = world.status();
    assert_eq!(
        status.held,
        status.released + status.gave_up + status.evicted + status.held_now,
        "{status:?}"
    );
}

#[test]
fn a_held_post_reaches_only_the_target() {
    let (world, source, target) = two_sites();
    let mut client = world.client();
    assert_eq!(client.get("/before").message().body, "source GET /before");
    world.hold();
    client.post("/held", "once");
    world.until_held(1);
    assert_eq!(target.seen(), Vec::<String>::new());
    world.move_to(Site::Target);
    assert_eq!(client.message().body, "target POST /held once");
    assert_eq!(source.seen(), ["GET /before"]);
    assert_eq!(target.seen(), ["POST /held once"]);
    balanced(&world);
}

#[test]
fn a_body_that_comes_while_held_arrives_whole() {
    let (world, _source, target) = two_sites();
    world.hold();
    let mut client = world.client();
    client.send("POST /late HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\n");
    world.until_held(1);
    let mut sender = client.socket().try_clone().unwrap();
    let sending =
        thread::spawn(move || std::io::Write::write_all(&mut sender, &[b'x'; 200_000]).unwrap());
    world.move_to(Site::Target);
    assert_eq!(
        client.message().body.len(),
        "target POST /late ".len() + 200_000
    );
    sending.join().unwrap();
    assert_eq!(target.seen().len(), 1);
}

#[test]
fn the_held_are_released_in_their_order() {
    let (world, _source, _target) = two_sites();
    world.hold();
    let mut clients: Vec<Peer> = (0..40).map(|_| world.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.get(&format!("/{number}"));
        world.until_held(number as u64 + 1);
    }
    world.move_to(Site::Target);
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.message().body, format!("target GET /{number}"));
    }
    balanced(&world);
    assert_eq!(world.until(|status| status.gate == Gate::Open).released, 40);
}

#[test]
fn the_first_goes_alone_and_the_others_follow_its_answer() {
    let (source, target) = (Origin::new("source"), Stage::new());
    let world = Plan::new(source.address(), target.address())
        .table("[release]\nwindow_first = 2")
        .start();
    world.hold();
    let mut clients: Vec<Peer> = (0..3).map(|_| world.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.get(&format!("/{number}"));
        world.until_held(number as u64 + 1);
    }
    world.move_to(Site::Target);
    let mut canary = target.accept();
    assert_eq!(canary.message().first_line, "GET /0 HTTP/1.1");
    let mut newcomer = world.client();
    newcomer.get("/new");
    world.until_held(3);
    assert!(target.is_deserted());
    canary.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert_eq!(clients[0].message().status(), 200);
    let mut pair = [target.accept(), target.accept()].map(|mut upstream| {
        let line = upstream.message().first_line;
        (line, upstream)
    });
    pair.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(
        pair.each_ref().map(|(line, _)| line.as_str()),
        ["GET /1 HTTP/1.1", "GET /2 HTTP/1.1"]
    );
    assert_eq!(world.status().held_now, 1, "the newcomer overtook somebody");
    for (_, upstream) in &mut pair {
        upstream.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    }
    assert_eq!(target.accept().message().first_line, "GET /new HTTP/1.1");
    world.until(|status| status.gate == Gate::Open && status.held_now == 0);
    balanced(&world);
}

#[test]
fn a_client_that_leaves_frees_its_slot_also_with_its_body_unread() {
    let (world, source, target) = two_sites();
    world.hold();
    let mut plain = world.client();
    plain.get("/plain");
    let mut unread = world.client();
    unread.send(format!(
        "POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 60000\r\n\r\n{}",
        "x".repeat(60_000)
    ));
    let mut half_closed = world.client();
    half_closed
        .get("/half")
        .socket()
        .shutdown(Shutdown::Write)
        .unwrap();
    world.until(|status| status.held == 3 && status.held_now == 2);
    drop(unread);
    world.until_held(1);
    drop(plain);
    world.until_held(0);
    assert_eq!(world.status().gave_up, 3);
    world.move_to(Site::Target);
    assert_eq!((source.seen(), target.seen()), (vec![], vec![]));
    balanced(&world);
}

#[test]
fn the_drain_waits_for_the_last_byte_of_the_answer() {
    let (source, target) = (Stage::new(), Origin::new("target"));
    let world = Plan::new(source.address(), target.address()).start();
    let mut client = world.client();
    client.get("/long");
    let mut upstream = source.accept();
    upstream.message();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot yet");
    assert_eq!(client.head().status(), 200);
    assert_eq!(client.bytes(7), b"not yet");

    let mut control = world.control();
    let Answer::NotDrained { service, left } = control.say(&hold(Epoch(1), 60_000, 1)) else {
        panic!()
    };
    assert_eq!((service.gate, service.in_flight), (Gate::Draining, 1));
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].what, "GET /long");
    assert_eq!(
        left[0].client,
        client.socket().local_addr().unwrap().to_string()
    );

    let drain = thread::spawn(move || done(control.say(&hold(Epoch(1), 60_000, 60_000))));
    upstream.send("ok");
    assert_eq!(client.bytes(2), b"ok");
    assert!(
        upstream.is_closed(),
        "a connection to the source survived the hold"
    );
    drop(upstream);
    let status = drain.join().unwrap();
    assert_eq!(
        (status.gate, status.in_flight, status.upstream_connections),
        (Gate::Holding, 0, 0)
    );
}

#[test]
fn idle_connections_to_the_source_are_closed_by_the_hold() {
    let (world, source, _target) = two_sites();
    for _ in 0..5 {
        world.client().get("/").message();
    }
    assert!(source.connections() > 0 && world.status().upstream_connections > 0);
    let status = world.hold();
    assert_eq!(
        (status.gate, status.upstream_connections),
        (Gate::Holding, 0)
    );
}

#[test]
fn an_upgraded_connection_is_in_flight() {
    let source = Stage::new();
    let world = Plan::new(source.address(), Nobody::new().address()).start();
    let mut client = world.client();
    client.send("GET /ws HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
    let mut upstream = source.accept();
    upstream.message();
    upstream.send(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    );
    assert_eq!(client.head().status(), 101);
    let mut control = world.control();
    assert!(matches!(
        control.say(&hold(Epoch(1), 60_000, 1)),
        Answer::NotDrained { .. }
    ));
    let drain = thread::spawn(move || done(control.say(&hold(Epoch(1), 60_000, 60_000))));
    drop((client, upstream));
    assert_eq!(drain.join().unwrap().gate, Gate::Holding);
}

#[test]
fn a_raw_connection_is_held_before_it_connects() {
    let (source, target) = (Stage::new(), Stage::new());
    let world = Plan::new(source.address(), target.address()).tcp().start();
    world.hold();
    let mut client = world.client();
    let leaves = world.client();
    world.until_held(2);
    drop(leaves);
    world.until_held(1);
    assert!(source.is_deserted());
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    upstream.send("greetings\n");
    assert_eq!(client.line(), "greetings");
    assert!(source.is_deserted());
    balanced(&world);
}

#[test]
fn a_target_that_does_not_accept_yet_sends_its_requests_back_to_the_held() {
    let (source, nobody) = (Origin::new("source"), Nobody::new());
    let world = Plan::new(source.address(), nobody.address()).start();
    world.hold();
    let mut clients: Vec<Peer> = (0..10).map(|_| world.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.post(&format!("/{number}"), "x");
        world.until_held(number as u64 + 1);
    }
    world.move_to(Site::Target);
    // More were held than clients are there: the canary has come back at least once.
    world.until(|status| status.held > 10 && status.gate == Gate::Releasing);
    let target = nobody.becomes("target");
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.message().body, format!("target POST /{number} x"));
    }
    assert_eq!(target.seen().len(), 10);
    assert_eq!(source.seen(), Vec::<String>::new());
    balanced(&world);
}

#[test]
fn a_target_that_fails_right_after_opening_sends_newcomers_back_to_the_held() {
    let (source, nobody) = (Origin::new("source"), Nobody::new());
    let world = Plan::new(source.address(), nobody.address()).start();
    world.hold();
    world.move_to(Site::Target);
    assert_eq!(world.status().gate, Gate::Open);
    let mut client = world.client();
    client.post("/early", "x");
    world.until(|status| status.gate == Gate::Releasing);
    let target = nobody.becomes("target");
    assert_eq!(client.message().body, "target POST /early x");
    assert_eq!(target.seen().len(), 1);
    balanced(&world);
}

#[test]
fn one_more_than_may_be_held_is_refused_at_once() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("held_max = 1\nretry_after_s = 7")
        .service("when_full = \"refuse\"")
        .start();
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let answer = world.client().post("/surplus", "x").message();
    assert_eq!(
        (answer.status(), answer.field("Retry-After")),
        (503, Some("7"))
    );
    assert_eq!(world.status().evicted, 1);
    world.reopen();
    assert_eq!(held.message().body, "source GET /held");
    balanced(&world);
}

#[test]
fn a_request_held_for_too_long_is_refused() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("hold_ms_max = 50")
        .start();
    world.hold();
    let mut client = world.client();
    let answer = client.get("/old").message();
    assert_eq!(
        (answer.status(), answer.field("Retry-After")),
        (503, Some("5"))
    );
    world.reopen();
    assert_eq!(client.get("/again").message().body, "source GET /again");
    assert_eq!(source.seen(), ["GET /again"]);
    balanced(&world);
}

#[test]
fn a_shutdown_lets_what_is_in_flight_finish_and_refuses_the_held() {
    let source = Stage::new();
    let mut world = Plan::new(source.address(), Nobody::new().address()).start();
    let mut busy = world.client();
    busy.get("/busy");
    let mut upstream = source.accept();
    upstream.message();
    let mut control = world.control();
    assert!(matches!(
        control.say(&hold(Epoch(1), 60_000, 1)),
        Answer::NotDrained { .. }
    ));
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let mut idle = world.client();
    let proxy = world.proxy.take().unwrap();
    let stopping = thread::spawn(move || proxy.stop(std::time::Duration::from_millis(200)));
    assert!(idle.is_closed());
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone");
    let answer = busy.message();
    assert_eq!(
        (answer.body.as_str(), answer.field("Connection")),
        ("done", None)
    );
    let refused = held.message();
    assert_eq!(
        (refused.status(), refused.field("Connection")),
        (503, Some("close"))
    );
    stopping.join().unwrap();
}

#[test]
fn a_shutdown_without_work_ends_at_once_and_cuts_what_does_not_end() {
    let source = Stage::new();
    let mut world = Plan::new(source.address(), Nobody::new().address())
        .limits("linger_ms_max = 20")
        .start();
    let mut stuck = world.client();
    stuck.get("/stuck");
    let mut upstream = source.accept();
    upstream.message();
    world
        .proxy
        .take()
        .unwrap()
        .stop(std::time::Duration::from_millis(50));
    assert!(stuck.is_closed() && upstream.is_closed());

    let (mut world, _source, _target) = two_sites();
    world.client().get("/").message();
    world.proxy.take().unwrap().stop(PATIENCE * 100);
}

#[test]
fn the_counters_balance_in_every_scrape_while_clients_come_and_go() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .start();
    let metrics = world.proxy().metrics_address().unwrap();
    let scrape = || {
        let mut scraper = Peer::connect(metrics);
        scraper.send("GET /metrics HTTP/1.1\r\nHost: m\r\n\r\n");
        let text = scraper.message().body;
        let value = |name: &str| -> u64 {
            let line = text
                .lines()
                .find(|line| line.starts_with(&format!("{name}{{service=\"web\"}} ")));
            line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
        };
        let sum = [
            "hopgate_released_total",
            "hopgate_gave_up_total",
            "hopgate_evicted_total",
            "hopgate_held_now",
        ];
        assert_eq!(
            value("hopgate_held_total"),
            sum.iter().map(|name| value(name)).sum::<u64>(),
            "{text}"
        );
        (value("hopgate_held_total"), value("hopgate_epoch"))
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..4 {
            let (world, over) = (&world, &over);
            scope.spawn(move || {
                for round in 0.. {
                    let mut client = world.client();
                    client.post("/", &format!("{number}-{round}"));
                    // One in five leaves without waiting for its answer.
                    if round % 5 != number {
                        assert_eq!(client.message().status(), 200);
                    }
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        for _ in 0..10 {
            world.hold();
            world.until(|status| status.held_now > 0);
            scrape();
            let owner = world.status().register.owner;
            world.move_to(if owner == Site::Source {
                Site::Target
            } else {
                Site::Source
            });
            scrape();
        }
        over.store(true, Ordering::Relaxed);
    });
    let (held, epoch) = scrape();
    assert!(held >= 10 && epoch == 11);
    let mut all = [source.seen(), target.seen()].concat();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "a request was executed twice");
}
