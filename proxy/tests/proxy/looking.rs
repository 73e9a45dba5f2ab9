//! What can be seen while things happen: who is held, what a hold would cost, what goes on, who commanded it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use cutover_protocol::hold::{Command, Gate};
use cutover_protocol::id::{Epoch, Register, Site};
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::seen::{Event, Forecast, Happening, HeldTable, Look, Seen};

use crate::holding::two_sites;
use crate::process::{Running, run, text};
use crate::world::{Control, Origin, Peer, Plan, Stage, World, done, hold, web};

fn client_of(world: &World) -> ControlClient {
    ControlClient::connect(&world.folder.path().join("control.sock")).unwrap()
}

fn held(world: &World) -> HeldTable {
    match client_of(world)
        .look(&Look::Held { service: None })
        .unwrap()
    {
        Seen::Held { mut services } => services.remove(0),
        other => panic!("{other:?}"),
    }
}

fn forecast(control: &mut ControlClient, duration_ms: u64) -> Forecast {
    let service = web();
    let seen = control.look(&Look::Forecast {
        service,
        duration_ms,
    });
    match seen.unwrap() {
        Seen::Forecast(forecast) => *forecast,
        other => panic!("{other:?}"),
    }
}

fn watch(world: &World) -> ControlClient {
    let mut control = client_of(world);
    assert_eq!(control.look(&Look::Watch).unwrap(), Seen::Watching);
    control
}

/// What happens next, without the numbers in between.
fn next(watcher: &mut ControlClient) -> Happening {
    loop {
        let Event { at_ms, what } = watcher.next_event().unwrap().unwrap();
        assert!(at_ms > 1_600_000_000_000);
        if !matches!(what, Happening::Counts { .. }) {
            return what;
        }
    }
}

#[test]
fn the_held_are_shown_by_age_route_and_address() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .service("[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"")
        .start();
    world.hold();
    let mut clients: Vec<Peer> = (0..30).map(|_| world.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let path = if number < 5 { "/api" } else { "/page" };
        client.post(&format!("{path}/{number}"), "x");
        world.until_held(number as u64 + 1);
    }
    let table = held(&world);
    assert_eq!((table.held_now, table.addresses), (30, 1));
    // Bounded, whoever is held.
    assert_eq!((table.oldest.len(), table.newest.len()), (20, 20));
    let first = &table.oldest[0];
    assert_eq!(
        (first.what.as_str(), first.route.as_deref()),
        ("POST /api/0", Some("api"))
    );
    let address = clients[0].socket().local_addr().unwrap();
    assert_eq!(first.client, address.to_string());
    assert_eq!(table.newest[0].what, "POST /page/29");
    assert_eq!(table.newest[0].route, None);
    let shares = |shares: &[hopgate_proxy::control::seen::Share]| {
        let pairs = shares.iter().map(|share| (share.name.clone(), share.count));
        pairs.collect::<Vec<_>>()
    };
    assert_eq!(
        shares(&table.by_route),
        [("-".to_owned(), 25), ("api".to_owned(), 5)]
    );
    assert_eq!(shares(&table.by_address), [("127.0.0.1".to_owned(), 30)]);

    let output = run(&world.folder, &["ctl", "--socket", "control.sock", "held"]);
    let said = text(&output.stdout);
    assert!(
        said.starts_with("web: 30 held, from 1 addresses\n"),
        "{said}"
    );
    assert!(said.contains("POST /api/0  route api\n"), "{said}");
    // Whoever leaves is gone from the table, too.
    clients.truncate(3);
    world.until_held(3);
    assert_eq!(held(&world).held_now, 3);
    world.reopen();
    clients.iter_mut().for_each(|client| drop(client.message()));
    assert_eq!(held(&world).held_now, 0);
}

#[test]
fn a_raw_connection_that_is_held_is_shown_as_such() {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address()).tcp().start();
    world.hold();
    let _client = world.client();
    world.until_held(1);
    assert_eq!(held(&world).oldest[0].what, "tcp");
}

#[test]
fn a_watcher_hears_of_commands_gates_and_leases_in_their_order() {
    let (world, _source, _target) = two_sites();
    let mut watcher = watch(&world);
    done(world.control().say(&hold(Epoch(1), 60_000, 20_000)));
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let Happening::Command {
        uid,
        pid,
        comm,
        command,
        outcome,
    } = next(&mut watcher)
    else {
        panic!()
    };
    assert_eq!(
        (uid, pid),
        (Some(rustix::process::getuid().as_raw()), Some(own))
    );
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(comm.unwrap(), name.trim_end());
    assert!(
        command.starts_with("{\"command\":\"hold\",\"service\":\"web\",\"epoch\":1"),
        "{command}"
    );
    assert_eq!(outcome, "begun");
    let gate = |gate, epoch, owner| Happening::Gate {
        service: web(),
        gate,
        register: Register {
            epoch: Epoch(epoch),
            owner,
        },
    };
    assert_eq!(next(&mut watcher), gate(Gate::Holding, 1, Site::Source));
    assert!(
        matches!(next(&mut watcher), Happening::Command { outcome, .. } if outcome == "done, epoch 1")
    );
    done(world.control().say(&Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    }));
    assert_eq!(next(&mut watcher), gate(Gate::Holding, 2, Site::Target));
    assert!(matches!(next(&mut watcher), Happening::Command { .. }));
    // The hold is let run out.
    done(world.control().say(&Command::Renew {
        service: web(),
        epoch: Epoch(1),
        lease_ms: 1,
    }));
    assert!(matches!(next(&mut watcher), Happening::Command { .. }));
    let ran_out = next(&mut watcher);
    let Happening::LeaseRanOut { service, register } = ran_out else {
        panic!("{ran_out:?}")
    };
    assert_eq!((service, register.epoch), (web(), Epoch(2)));
    assert_eq!(next(&mut watcher), gate(Gate::Open, 2, Site::Target));
}

#[test]
fn a_watcher_hears_of_the_held_by_their_numbers() {
    let (world, _source, _target) = two_sites();
    world.hold();
    let mut watcher = watch(&world);
    let mut client = world.client();
    client.get("/held");
    loop {
        let event = watcher.next_event().unwrap().unwrap();
        if let Happening::Counts {
            held_now: 1, held, ..
        } = event.what
        {
            assert_eq!(held, 1);
            break;
        }
    }
}

#[test]
fn a_watcher_that_does_not_read_slows_nobody_and_is_told_what_it_missed() {
    let (world, _source, _target) = two_sites();
    let mut watcher = watch(&world);
    let mut talker = UnixStream::connect(world.folder.path().join("control.sock")).unwrap();
    let mut answers = BufReader::new(talker.try_clone().unwrap());
    let mut line = String::new();
    for _ in 0..4000 {
        talker.write_all(b"nonsense\n").unwrap();
        line.clear();
        answers.read_line(&mut line).unwrap();
    }
    world.hold();
    world.reopen();
    let (mut told, mut missed) = (0, 0);
    loop {
        match next(&mut watcher) {
            Happening::Missed { count } => missed += count,
            Happening::Gate {
                gate: Gate::Open, ..
            } => break,
            _ => told += 1,
        }
    }
    assert!(missed > 0 && told > 100, "{missed} missed, {told} told");
}

#[test]
fn a_dry_run_counts_who_would_be_held_and_changes_nothing() {
    let (source, target) = (Stage::new(), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("held_max = 1")
        .start();
    let mut long = world.client();
    long.get("/long");
    let mut answering = source.accept();
    answering.head();
    let quick = thread::spawn(move || {
        // Both clients' connections, until the proxy closes them.
        let serve = |mut upstream: Peer| {
            thread::spawn(move || {
                while !upstream.is_closed() {
                    upstream.message();
                    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
            })
        };
        [source.accept(), source.accept()].map(serve)
    });
    let mut clients = [world.client(), world.client()];
    let over = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let over = &over;
        for client in &mut clients {
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(client.get("/quick").message().status(), 200);
                }
            });
        }
        let seen = forecast(&mut client_of(&world), 300);
        over.store(true, Ordering::Relaxed);
        seen
    });
    assert!(seen.arrived > 10, "{seen:?}");
    // Each client would wait for its first answer.
    assert_eq!((seen.held, seen.connections), (2, 2), "{seen:?}");
    assert!(seen.head_bytes > 100 && seen.head_bytes < 2000, "{seen:?}");
    assert_eq!(seen.by_address[0].count, 2);
    let limit = &seen.limits[0];
    assert_eq!(
        (limit.limit.as_str(), limit.most, limit.wanted),
        ("held_max", 1, 2)
    );
    assert_eq!((seen.limits.len(), seen.undrained_count), (1, 1));
    assert_eq!(seen.undrained[0].what, "GET /long");
    let status = world.status();
    assert_eq!(
        (status.gate, status.held, status.register.epoch),
        (Gate::Open, 0, Epoch(1))
    );
    answering.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(long.message().status(), 200);
    drop((clients, long, world));
    quick.join().unwrap();
}

#[test]
fn a_dry_run_from_the_command_line_says_what_would_not_suffice() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let world = Plan::new(source.address(), target.address())
        .limits("hold_ms_max = 50")
        .start();
    let ctl = |arguments: &[&str]| {
        let socket = ["ctl", "--socket", "control.sock"];
        run(&world.folder, &[&socket, arguments].concat())
    };
    let output = ctl(&["hold", "web", "--dry-run", "60ms"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let expected = "web: a hold of 0.06 s, had it begun 0.06 s ago:\n  \
                    0 arrived by 0 connections; 0 would be held, with 0 bytes of heads\n  with all they keep 0 bytes: there is room for them\n  \
                    hold_ms_max = 50 would not suffice: 60 wanted\n";
    assert_eq!(text(&output.stdout), expected);
    let output = ctl(&["hold", "web", "--dry-run", "10ms", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        text(&output.stdout).contains("\"answer\":\"forecast\""),
        "{output:?}"
    );
    assert_eq!(
        ctl(&["hold", "shop", "--dry-run", "1s"]).status.code(),
        Some(1)
    );
    assert_eq!(world.status().gate, Gate::Open);
}

#[test]
fn one_service_is_watched_by_one_dry_run_at_a_time() {
    let (world, _source, _target) = two_sites();
    let over = AtomicBool::new(false);
    let ask = |duration_ms| {
        let look = Look::Forecast {
            service: web(),
            duration_ms,
        };
        client_of(&world).look(&look).unwrap()
    };
    let refused = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                ask(50);
            }
        });
        loop {
            if let Seen::Refused { message } = ask(1) {
                over.store(true, Ordering::Relaxed);
                break message;
            }
        }
    });
    assert_eq!(
        refused,
        "somebody watches web already; wait for that to end"
    );
}

#[test]
fn every_command_leaves_a_line_with_who_gave_it_and_what_came_of_it() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    let folder = tempfile::tempdir().unwrap();
    Plan::new(source.address(), target.address()).write(&folder);
    let mut running = Running::start(&folder);
    let mut control = Control::connect(&folder);
    control.hold(Epoch(1));
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    let who = format!(
        "uid=Some({}) pid=Some({}) comm=\"{}\"",
        rustix::process::getuid().as_raw(),
        std::process::id(),
        name.trim_end()
    );
    let begun = running.until_said("audit");
    assert!(
        begun.contains(&who) && begun.contains("outcome=\"begun\""),
        "{begun}"
    );
    let ended = running.until_said("audit");
    assert!(
        ended.contains(&who) && ended.contains("outcome=\"done, epoch 1\""),
        "{ended}"
    );
    control.say(&Command::Commit {
        service: web(),
        epoch: Epoch(7),
        to: Site::Target,
    });
    let refused = running.until_said("audit");
    let why = "outcome=\"refused: the register is at epoch 1 with owner source, not at epoch 7";
    assert!(refused.contains(&who) && refused.contains(why), "{refused}");
    let output = run(&folder, &["ctl", "--socket", "control.sock", "reload"]);
    assert_eq!(output.status.code(), Some(0));
    let reload = running.until_said("audit");
    assert!(reload.contains("comm=\"hopgate-proxy\""), "{reload}");
}
