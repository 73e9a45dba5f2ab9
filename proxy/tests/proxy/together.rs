//! Several services as one: held from the outside in, released from the inside out, all of them or none. And holds
//! that are somebody's.

use std::process::Output;
use std::thread;

use cutover_protocol::hold::{
    Answer, Claim, Command, Expected, Gate, Order, Refusal, ServiceStatus,
};
use cutover_protocol::id::{Epoch, Register, ServiceName, Site};

use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::seen::{Happening, Look, Seen};

use crate::process::{run, text};
use crate::world::{Control, Nobody, Origin, Peer, Plan, Stage, World, done, hold, web};

fn db() -> ServiceName {
    "db".parse().unwrap()
}

/// A web server and a database behind one proxy. The database is played by the test.
struct Shop {
    world: World,
    source: Origin,
    target: Origin,
    source_db: Stage,
    target_db: Stage,
}

impl Shop {
    fn open() -> Self {
        let (source, target) = (Origin::new("source"), Origin::new("target"));
        let (source_db, target_db) = (Stage::new(), Stage::new());
        let service = format!(
            "[[service]]\nname = \"db\"\nlisten = \"127.0.0.1:0\"\nprotocol = \"tcp\"\nsource = \"{}\"\ntarget = \"{}\"",
            source_db.address(),
            target_db.address()
        );
        let plan = Plan::new(source.address(), target.address());
        Self {
            world: plan.service(&service).start(),
            source,
            target,
            source_db,
            target_db,
        }
    }

    fn db_client(&self) -> Peer {
        Peer::connect(self.world.proxy().address("db").unwrap())
    }

    fn db_status(&self) -> ServiceStatus {
        self.world.proxy().status(&db()).unwrap()
    }

    fn epochs(&self) -> Vec<Expected> {
        [self.world.status(), self.db_status()].map(expect).into()
    }

    fn hold_all(&self, drain_ms_max: u64) -> Command {
        Command::HoldAll {
            services: self.epochs(),
            lease_ms: 60_000,
            drain_ms_max,
        }
    }

    fn gates(&self) -> [Gate; 2] {
        [self.world.status().gate, self.db_status().gate]
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        let socket = ["ctl", "--socket", "control.sock"];
        run(&self.world.folder, &[&socket, arguments].concat())
    }
}

fn expect(status: ServiceStatus) -> Expected {
    Expected {
        service: status.service,
        epoch: status.register.epoch,
    }
}

fn all_done(answer: Answer) -> Vec<ServiceStatus> {
    match answer {
        Answer::DoneAll { services } => services,
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_services_at_different_epochs_are_held_and_released_by_one_command_each() {
    let shop = Shop::open();
    let mut control = shop.world.control();
    // The database has been through a hold that came to nothing.
    done(control.say(&Command::Abort {
        service: db(),
        epoch: Epoch(1),
    }));
    let held = all_done(control.say(&shop.hold_all(20_000)));
    let told: Vec<_> = held
        .iter()
        .map(|status| (status.gate, status.register.epoch))
        .collect();
    assert_eq!(told, [(Gate::Holding, Epoch(1)), (Gate::Holding, Epoch(2))]);
    let mut client = shop.world.client();
    client.post("/order", "one");
    let mut query = shop.db_client();
    query.send("query");
    shop.world.until_held(1);
    // Repeated, it holds on.
    all_done(control.say(&shop.hold_all(20_000)));

    let services = shop.epochs();
    let to = Site::Target;
    let committed = all_done(control.say(&Command::CommitAll { services, to }));
    assert!(committed.iter().all(|status| status.gate == Gate::Holding));
    let services = shop.epochs();
    let path = shop.world.folder.path().join("control.sock");
    let mut watcher = ControlClient::connect(&path).unwrap();
    assert_eq!(watcher.look(&Look::Watch).unwrap(), Seen::Watching);
    all_done(control.say(&Command::ReleaseAll { services, to }));
    // Whoever needs the other is let through last.
    let mut released = Vec::new();
    while released.len() < 2 {
        if let Happening::Gate { service, .. } = watcher.next_event().unwrap().unwrap().what
            && !released.contains(&service)
        {
            released.push(service);
        }
    }
    assert_eq!(released, [db(), web()]);
    assert_eq!(client.message().body, "target POST /order one");
    assert_eq!(shop.target_db.accept().bytes(5), b"query");
    assert!(shop.source_db.is_deserted() && shop.source.seen().is_empty());
    let owners = [shop.world.status(), shop.db_status()].map(|status| status.register);
    let at = |epoch| Register {
        epoch: Epoch(epoch),
        owner: Site::Target,
    };
    assert_eq!(owners, [at(2), at(3)]);
}

#[test]
fn the_inner_service_stays_open_until_the_outer_one_is_drained() {
    let stage = Stage::new();
    let inner = Stage::new();
    let service = format!(
        "[[service]]\nname = \"db\"\nlisten = \"127.0.0.1:0\"\nprotocol = \"tcp\"\nsource = \"{0}\"\ntarget = \"{0}\"",
        inner.address()
    );
    let world = Plan::new(stage.address(), stage.address())
        .service(&service)
        .start();
    let mut client = world.client();
    client.get("/page");
    let mut page = stage.accept();
    page.message();
    let mut control = world.control();
    let services = [web(), db()].map(|service| Expected {
        service,
        epoch: Epoch(1),
    });
    let command = Command::HoldAll {
        services: services.into(),
        lease_ms: 60_000,
        drain_ms_max: 60_000,
    };
    let holding = thread::spawn(move || control.say(&command));
    world.until(|status| status.gate == Gate::Draining);
    // The page still needs its database, over a connection that is new.
    let mut query = Peer::connect(world.proxy().address("db").unwrap());
    let mut served = inner.accept();
    query.send("select");
    assert_eq!(served.bytes(6), b"select");
    drop((query, served));
    page.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\npage");
    assert_eq!(client.message().body, "page");
    let held = all_done(holding.join().unwrap());
    assert!(held.iter().all(|status| status.gate == Gate::Holding));
}

#[test]
fn if_one_cannot_be_drained_those_already_held_are_reopened() {
    let shop = Shop::open();
    let session = shop.db_client();
    let _served = shop.source_db.accept();
    let mut control = shop.world.control();
    let command = shop.hold_all(200);
    let holding = thread::spawn(move || control.say(&command));
    shop.world.until(|status| status.gate == Gate::Holding);
    let mut client = shop.world.client();
    client.get("/meanwhile");
    let Answer::RefusedAll {
        service,
        reason,
        left,
        services,
        message,
    } = holding.join().unwrap()
    else {
        panic!()
    };
    assert_eq!((service, reason), (db(), Refusal::NotDrained));
    assert_eq!(message, "db did not drain within 200 ms, 1 still in flight");
    assert_eq!(left.len(), 1);
    let client_of_left = session.socket().local_addr().unwrap().to_string();
    assert_eq!(left[0].client, client_of_left);
    assert_eq!(services.len(), 2);
    assert_eq!(client.message().body, "source GET /meanwhile");
    assert_eq!(shop.gates(), [Gate::Open, Gate::Open]);
    let epochs = shop.epochs().into_iter().map(|expected| expected.epoch);
    assert_eq!(epochs.collect::<Vec<_>>(), [Epoch(2), Epoch(2)]);
}

#[test]
fn if_one_is_at_another_epoch_or_unknown_nothing_is_touched() {
    let shop = Shop::open();
    let mut control = shop.world.control();
    let mut services = shop.epochs();
    services[1].epoch = Epoch(7);
    let command = |services| Command::HoldAll {
        services,
        lease_ms: 60_000,
        drain_ms_max: 1000,
    };
    let refused = |answer| match answer {
        Answer::RefusedAll {
            service,
            reason,
            services,
            ..
        } => (service, reason, services.len()),
        other => panic!("{other:?}"),
    };
    let answer = control.say(&command(services));
    assert_eq!(refused(answer), (db(), Refusal::WrongEpoch, 2));
    let mut services = shop.epochs();
    services[1].service = "cache".parse().unwrap();
    let answer = control.say(&command(services));
    let cache = "cache".parse().unwrap();
    assert_eq!(refused(answer), (cache, Refusal::UnknownService, 1));
    for services in [Vec::new(), [shop.epochs(), shop.epochs()].concat()] {
        let answer = control.say(&command(services));
        let bad = |reason| reason == Refusal::BadCommand;
        assert!(
            matches!(answer, Answer::Refused { reason, .. } if bad(reason)),
            "{answer:?}"
        );
    }
    let services = shop.epochs();
    let to = Site::Target;
    let answer = control.say(&Command::CommitAll { services, to });
    assert_eq!(refused(answer), (web(), Refusal::NotHolding, 2));
    assert_eq!(shop.gates(), [Gate::Open, Gate::Open]);
    let epochs = shop.epochs().into_iter().map(|expected| expected.epoch);
    assert_eq!(epochs.collect::<Vec<_>>(), [Epoch(1), Epoch(1)]);
}

#[test]
fn a_service_that_was_held_before_stays_so_when_the_others_cannot_be() {
    let shop = Shop::open();
    shop.world.hold();
    let _session = shop.db_client();
    let _served = shop.source_db.accept();
    let answer = shop.world.control().say(&shop.hold_all(50));
    assert!(matches!(answer, Answer::RefusedAll { .. }), "{answer:?}");
    assert_eq!(shop.gates(), [Gate::Holding, Gate::Open]);
    assert_eq!(shop.world.status().register.epoch, Epoch(1));
}

#[test]
fn a_service_that_is_reopened_while_another_drains_ends_the_common_hold() {
    let shop = Shop::open();
    let session = shop.db_client();
    let served = shop.source_db.accept();
    let mut control = shop.world.control();
    let command = shop.hold_all(60_000);
    let holding = thread::spawn(move || control.say(&command));
    while shop.db_status().gate != Gate::Draining {
        thread::yield_now();
    }
    shop.world.reopen();
    drop((session, served));
    let Answer::RefusedAll {
        service, reason, ..
    } = holding.join().unwrap()
    else {
        panic!()
    };
    assert_eq!((service, reason), (web(), Refusal::NotHolding));
    assert_eq!(shop.gates(), [Gate::Open, Gate::Open]);
}

#[test]
fn a_person_holds_and_moves_two_services_from_the_command_line() {
    let shop = Shop::open();
    let session = shop.db_client();
    let served = shop.source_db.accept();
    let output = shop.ctl(&["hold", "web", "db", "--drain", "50ms"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(
        said.starts_with("refused because of db: db did not drain within 50 ms"),
        "{said}"
    );
    let said = text(&output.stdout);
    assert!(
        said.contains("tcp") && said.contains("web: open, epoch 2"),
        "{said}"
    );
    drop((session, served));

    let output = shop.ctl(&["hold", "web", "db", "--lease", "45s"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = text(&output.stdout);
    assert!(
        said.starts_with("web: holding, epoch 2, owner source, lease 4"),
        "{said}"
    );
    assert!(
        said.contains("\ndb: holding, epoch 2, owner source, lease 4"),
        "{said}"
    );
    let output = shop.ctl(&["reopen", "web", "db"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(shop.gates(), [Gate::Open, Gate::Open]);

    assert_eq!(shop.ctl(&["hold", "web", "db"]).status.code(), Some(0));
    let mut client = shop.world.client();
    client.get("/held");
    let output = shop.ctl(&["release", "web", "db", "--to", "target", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["answer"], "done_all");
    assert_eq!(said["services"][1]["register"]["owner"], "target");
    assert_eq!(client.message().body, "target GET /held");
    // What has been done already is done.
    let output = shop.ctl(&["release", "web", "db", "--to", "target"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(shop.target.seen(), ["GET /held"]);
}

#[test]
fn a_hold_of_a_hop_is_not_decided_behind_its_back() {
    let shop = Shop::open();
    let mut agent = shop.world.control();
    let claim = || Claim::Holder("hop-17".parse().unwrap());
    let order = |command| Order {
        claim: claim(),
        command,
    };
    let held = done(agent.order(&order(hold(Epoch(1), 60_000, 20_000))));
    assert_eq!(held.holder.unwrap().as_str(), "hop-17");
    let said = text(&shop.ctl(&["status", "web"]).stdout);
    assert!(
        said.starts_with("web: holding for hop-17, epoch 1, owner source, lease "),
        "{said}"
    );

    for refused in [
        shop.ctl(&["release", "web", "--to", "target"]),
        shop.ctl(&["release", "web", "--to", "source"]),
        shop.ctl(&["reopen", "web"]),
        shop.ctl(&["hold", "web", "--lease", "1s"]),
        shop.ctl(&["release", "web", "db", "--to", "target"]),
    ] {
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let said = text(&refused.stderr);
        // Of two services the other one is not held at all.
        let why = said
            .contains("hop-17 holds, and decides about this hold; let it end, or insist (--force)");
        assert!(why, "{said}");
    }
    // Nothing of all that has moved the register: the hop commits as if it were alone.
    let commit = Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    };
    done(agent.order(&order(commit)));
    let refused = shop.ctl(&["release", "web", "--to", "target"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let release = Command::Release {
        service: web(),
        epoch: Epoch(2),
        to: Site::Target,
    };
    let open = done(agent.order(&order(release)));
    assert_eq!((open.gate, open.holder), (Gate::Open, None));
}

#[test]
fn a_person_who_insists_decides_and_the_hop_is_told_who_was_first() {
    let shop = Shop::open();
    let mut agent = shop.world.control();
    let order = |command| Order {
        claim: Claim::Holder("hop-17".parse().unwrap()),
        command,
    };
    done(agent.order(&order(hold(Epoch(1), 60_000, 20_000))));
    let output = shop.ctl(&["reopen", "web", "--force"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let late = agent.order(&order(Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    }));
    let Answer::Refused {
        reason, register, ..
    } = late
    else {
        panic!("{late:?}")
    };
    assert_eq!(reason, Refusal::WrongEpoch);
    assert_eq!(register, Some(shop.world.status().register));
}

#[test]
fn the_holder_of_a_hold_survives_the_proxy() {
    let nobody = Nobody::new().address();
    let plan = || Plan::new(nobody, nobody);
    let mut world = plan().start();
    let order = Order {
        claim: Claim::Holder("hop-3".parse().unwrap()),
        command: hold(Epoch(1), 60_000, 1000),
    };
    done(world.control().order(&order));
    world.proxy.take();
    let world = plan().start_in(world.folder);
    assert_eq!(world.status().holder.unwrap().as_str(), "hop-3");
    let answer = Control::connect(&world.folder).say(&Command::Abort {
        service: web(),
        epoch: Epoch(1),
    });
    let by_other = |reason| reason == Refusal::HeldByOther;
    assert!(
        matches!(answer, Answer::Refused { reason, .. } if by_other(reason)),
        "{answer:?}"
    );
}
