//! The budget of the held, tier by tier: who is held, who waits unread, who waits in the kernel, who is refused, and
//! that all of them are served in the end.

use std::time::Duration;

use cutover_protocol::hold::{ServiceStatus, Tier};
use cutover_protocol::id::Site;
use hopgate_proxy::config::Config;

use crate::client2::Client2;
use crate::holding::balanced;
use crate::world::{Origin, PATIENCE, Peer, Plan, World, web};

/// A world whose service may hold as much as `limits` say, with a place for scrapes.
fn world(source: &Origin, target: &Origin, limits: &str, service: &str) -> World {
    let plan = Plan::new(source.address(), target.address()).limits(limits);
    let plan = plan
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .service(service);
    plan.start()
}

fn two_origins() -> (Origin, Origin) {
    (Origin::new("source"), Origin::new("target"))
}

fn tier(status: &ServiceStatus) -> Tier {
    status.budget.unwrap().tier
}

fn metric(world: &World, name: &str) -> u64 {
    let text = world.metrics();
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .unwrap()
}

/// Whether nothing has come of a request for a moment: all that can be seen from outside of one who waits. A false
/// alarm is not possible, a fault may go unseen on a slow machine.
fn waits(peer: &Peer) -> bool {
    let socket = peer.socket();
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let waits = socket.peek(&mut [0]).is_err();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    waits
}

fn clients(world: &World, count: usize) -> Vec<Peer> {
    (0..count).map(|_| world.client()).collect()
}

/// Connected, and answered once, so that the next request is not the first.
fn kept(world: &World) -> Peer {
    let mut client = world.client();
    assert_eq!(client.get("/before").message().status(), 200);
    client
}

fn park(world: &World, clients: &mut [Peer]) {
    for (number, client) in clients.iter_mut().enumerate() {
        client.get(&format!("/held/{number}"));
        world.until_held(number as u64 + 1);
    }
}

#[test]
fn with_most_of_the_budget_used_kept_clients_wait_unread_and_are_served_after_the_held() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 10", "");
    let mut unread = kept(&world);
    world.hold();
    let mut held = clients(&world, 8);
    park(&world, &mut held[..7]);
    assert_eq!(tier(&world.status()), Tier::Park);
    held[7].get("/held/7");
    world.until_held(8);
    assert_eq!(tier(&world.status()), Tier::StopReading);
    assert_eq!(metric(&world, "hopgate_budget_tier{service=\"web\"}"), 1);
    unread.post("/unread", "body");
    assert!(waits(&unread));
    assert_eq!(world.status().held_now, 8);
    // Who comes anew has his first request held.
    let mut newcomer = world.client();
    newcomer.get("/newcomer");
    world.until_held(9);
    assert_eq!(tier(&world.status()), Tier::StopAccepting);
    world.move_to(Site::Target);
    for (number, client) in held.iter_mut().enumerate() {
        let answer = client.message();
        assert_eq!(answer.body, format!("target GET /held/{number}"));
    }
    assert_eq!(newcomer.message().body, "target GET /newcomer");
    assert_eq!(unread.message().body, "target POST /unread body");
    let status = world.until(|status| tier(status) == Tier::Park);
    assert_eq!(status.evicted, 0);
    balanced(&world);
}

#[test]
fn with_nearly_all_of_it_used_clients_wait_in_the_kernel_and_a_reopening_lets_them_in() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 10", "");
    world.hold();
    let mut held = clients(&world, 9);
    park(&world, &mut held);
    assert_eq!(tier(&world.status()), Tier::StopAccepting);
    let mut queued = clients(&world, 5);
    for client in &mut queued {
        client.get("/queued");
    }
    assert!(queued.iter().all(waits));
    assert_eq!(world.status().held_now, 9);
    // The control socket and scrapes are none of the service's listeners.
    assert_eq!(tier(&world.control().status()), Tier::StopAccepting);
    let entered = "hopgate_budget_tier_entered_total{service=\"web\",tier=\"stop_accepting\"}";
    assert_eq!(metric(&world, entered), 1);
    world.reopen();
    for client in held.iter_mut().chain(&mut queued) {
        assert_eq!(client.message().status(), 200);
    }
    assert_eq!((source.seen().len(), target.seen().len()), (14, 0));
    assert_eq!(world.status().evicted, 0);
    balanced(&world);
}

#[test]
fn only_with_all_of_it_used_is_anybody_refused() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 2\nretry_after_s = 7", "");
    // Accepted before it was full, they have their first requests read.
    let mut early = clients(&world, 4);
    for client in &mut early {
        client.send("GET /early HTTP/1.1\r\n");
    }
    world.hold();
    for (held, client) in early[..2].iter_mut().enumerate() {
        client.send("Host: h\r\n\r\n");
        world.until_held(held as u64 + 1);
    }
    assert_eq!(tier(&world.status()), Tier::Refuse);
    early[2].send("Host: h\r\n\r\n");
    let answer = early[2].message();
    assert_eq!(
        (answer.status(), answer.field("Retry-After")),
        (503, Some("7"))
    );
    let refused = "hopgate_refused_total{service=\"web\",reason=\"held_full\"}";
    assert_eq!(metric(&world, refused), 1);
    assert_eq!(world.status().evicted, 1);
    world.move_to(Site::Target);
    for client in &mut early[..2] {
        assert_eq!(client.message().status(), 200);
    }
    balanced(&world);
}

#[test]
fn a_client_that_leaves_unread_frees_its_connection_and_reaches_nobody() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 1\nconnections_max = 3", "");
    let mut unread = [kept(&world), kept(&world)];
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    for client in &mut unread {
        client.post("/unread", &"x".repeat(100_000));
        assert!(waits(client));
    }
    drop(unread);
    world.move_to(Site::Target);
    assert_eq!(held.message().body, "target GET /held");
    // Both have left room for others.
    let mut others = [kept(&world), kept(&world)];
    assert_eq!(others[0].get("/other").message().status(), 200);
    let seen = target.seen();
    assert!(seen.iter().all(|line| !line.contains("unread")), "{seen:?}");
    balanced(&world);
}

#[test]
fn who_waits_unread_for_too_long_is_refused_as_the_held_are() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 1\nhold_ms_max = 300", "");
    let mut unread = kept(&world);
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    unread.get("/unread");
    assert_eq!(held.message().status(), 503);
    assert_eq!(unread.message().status(), 503);
    assert_eq!(world.status().evicted, 2);
    assert_eq!(tier(&world.status()), Tier::Park);
    world.reopen();
    assert_eq!(unread.get("/again").message().status(), 200);
    balanced(&world);
}

#[test]
fn bytes_are_counted_and_bound_what_is_held() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_bytes_max = 20000", "");
    world.hold();
    let mut clients = clients(&world, 4);
    clients[0].get("/a");
    world.until_held(1);
    let one = world.status().budget.unwrap();
    assert_eq!(one.held_bytes_max, 20_000);
    assert!((4_000..6_000).contains(&one.held_bytes), "{one:?}");
    // A head of ten thousand bytes takes that much more.
    let long = "x".repeat(10_000);
    clients[1].send(format!(
        "GET /b HTTP/1.1\r\nHost: h\r\nX-Long: {long}\r\n\r\n"
    ));
    world.until_held(2);
    let two = world.status().budget.unwrap();
    assert!(two.held_bytes > one.held_bytes + 14_000, "{two:?}");
    assert!(two.tier >= Tier::StopAccepting, "{two:?}");
    assert_eq!(
        metric(&world, "hopgate_held_bytes{service=\"web\"}"),
        two.held_bytes
    );
    world.reopen();
    assert_eq!(clients[0].message().status(), 200);
    assert_eq!(clients[1].message().status(), 200);
    world.until(|status| status.budget.unwrap().held_bytes == 0);
}

#[test]
fn an_address_holds_its_share_and_a_trusted_peer_as_much_as_it_wants() {
    for (service, answers) in [("", true), ("trusted_from = \"127.0.0.1\"", false)] {
        let (source, target) = two_origins();
        let world = world(&source, &target, "held_per_address_max = 2", service);
        world.hold();
        let mut clients = clients(&world, 3);
        park(&world, &mut clients[..2]);
        clients[2].get("/third");
        if answers {
            assert_eq!(clients[2].message().status(), 503);
            let refused = "hopgate_refused_total{service=\"web\",reason=\"held_of_address\"}";
            assert_eq!(metric(&world, refused), 1);
            // One who leaves makes room for another.
            clients.remove(0);
            world.until_held(1);
            clients[1].get("/again");
            world.until_held(2);
        } else {
            world.until_held(3);
        }
        world.reopen();
        balanced(&world);
    }
}

#[test]
fn a_route_may_yield_what_is_left_of_the_budget_to_others() {
    let (source, target) = two_origins();
    let route =
        "[[service.route]]\nname = \"images\"\npath_prefix = \"/images\"\nwhen_full = \"refuse\"";
    let world = world(&source, &target, "held_max = 10", route);
    world.hold();
    let mut clients = clients(&world, 10);
    park(&world, &mut clients[..8]);
    clients[8].get("/images/1");
    assert_eq!(clients[8].message().status(), 503);
    clients[9].get("/orders");
    world.until_held(9);
    world.reopen();
    assert_eq!(clients[9].message().body, "source GET /orders");
    balanced(&world);
}

#[test]
fn streams_wait_in_their_connection_which_goes_on() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 10", "");
    world.hold();
    let mut client = Client2::connect(world.address());
    let mut streams = Vec::new();
    for number in 0..20 {
        streams.push(client.get(&format!("/{number}")));
    }
    world.until(|status| tier(status) >= Tier::StopReading);
    // The answer comes behind all that was sent before it.
    client.ping();
    let status = world.status();
    assert!(status.held_now < 20 && status.evicted == 0, "{status:?}");
    // One that was not taken up leaves without a word.
    let last = streams.pop().unwrap();
    drop(last);
    client.ping();
    world.move_to(Site::Target);
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(client.answer(stream).body, format!("target GET /{number}"));
    }
    assert!(!target.seen().contains(&"GET /19".to_owned()));
    assert_eq!(world.status().evicted, 0);
    balanced(&world);
}

#[test]
fn streams_of_http3_wait_for_their_turn_too() {
    let (source, target) = two_origins();
    let plan = Plan::new(source.address(), target.address()).limits("held_max = 10");
    let world3 = plan.start_http3();
    let world = &world3.world;
    world.hold();
    let mut client = world3.client();
    let streams: Vec<_> = (0..20)
        .map(|number| client.get(&format!("/{number}")))
        .collect();
    world.until(|status| tier(status) >= Tier::StopReading);
    world.move_to(Site::Target);
    for stream in streams {
        assert_eq!(client.answer(stream).status, 200);
    }
    assert_eq!(target.seen().len(), 20);
    assert_eq!(world.status().evicted, 0);
    balanced(world);
}

#[test]
fn raw_connections_wait_in_the_kernel() {
    let (source, target) = two_origins();
    let plan = Plan::new(source.address(), target.address()).tcp();
    let world = plan.limits("held_max = 1").start();
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let mut queued = world.client();
    queued.get("/queued");
    assert!(waits(&queued));
    world.move_to(Site::Target);
    assert_eq!(held.message().body, "target GET /held");
    assert_eq!(queued.message().body, "target GET /queued");
    balanced(&world);
}

#[test]
fn a_listener_for_probes_goes_on_when_all_is_full() {
    let (source, target) = two_origins();
    let mut plan = Plan::new(source.address(), target.address()).limits("held_max = 1");
    plan.listener = Some(
        "address = \"127.0.0.1:0\"\n[[service.listen]]\naddress = \"127.0.0.1:0\"\nwhen_full = \"go_on\"",
    );
    let world = plan
        .service("[[service.front_check]]\npath = \"/health\"")
        .start();
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let addresses = world.proxy().addresses(web().as_str());
    let mut probe = Peer::connect(addresses[1].unwrap());
    assert_eq!(probe.get("/health").message().status(), 200);
    assert_eq!(probe.get("/health").message().status(), 200);
    let mut other = world.client();
    other.get("/other");
    assert!(waits(&other));
    world.reopen();
    assert_eq!(other.message().status(), 200);
    assert_eq!(held.message().status(), 200);
    balanced(&world);
}

#[test]
fn a_service_whose_probes_have_no_listener_of_their_own_keeps_its_door_open() {
    let (source, target) = two_origins();
    let checks = "[[service.front_check]]\npath = \"/health\"";
    let world = world(&source, &target, "held_max = 1", checks);
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let mut probe = world.client();
    assert_eq!(probe.get("/health").message().status(), 200);
    assert_eq!(world.client().get("/surplus").message().status(), 503);
    world.reopen();
    assert_eq!(held.message().status(), 200);
    balanced(&world);
}

#[test]
fn a_reload_that_changes_the_budget_lets_in_who_waited() {
    let (source, target) = two_origins();
    let world = world(&source, &target, "held_max = 1", "");
    world.hold();
    let mut held = world.client();
    held.get("/held");
    world.until_held(1);
    let mut queued = world.client();
    queued.get("/queued");
    assert!(waits(&queued));
    let path = world.folder.path().join("proxy.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("held_max = 1", "held_max = 100")).unwrap();
    let command = hopgate_proxy::control::words::ProcessCommand::Reload;
    world.control().process(&command);
    world.until_held(2);
    assert_eq!(world.status().budget.unwrap().held_max, 100);
    // And the other way round: who is held stays, and nobody else comes in.
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("held_max = 100", "held_max = 2")).unwrap();
    world.control().process(&command);
    assert_eq!(tier(&world.status()), Tier::Refuse);
    let mut late = world.client();
    late.get("/late");
    assert!(waits(&late));
    world.move_to(Site::Target);
    for client in [&mut held, &mut queued, &mut late] {
        assert_eq!(client.message().status(), 200);
    }
    balanced(&world);
}

#[test]
fn more_connections_than_files_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let address = "127.0.0.1:1".parse().unwrap();
    let path = Plan::new(address, address)
        .limits("connections_max = 10000000")
        .write(&folder);
    let open_files = hopgate_proxy::config::Machine::look().open_files;
    if open_files > 10_000_200 {
        return;
    }
    let error = Config::load(&path).unwrap_err();
    assert_eq!(
        error.problem.to_string(),
        format!(
            "\"connections_max\" in [limits] is 10000000, but this process may open only {open_files} files, and needs \
             200 for itself; raise the limit (LimitNOFILE=, ulimit -n), or leave the key out"
        )
    );
}
