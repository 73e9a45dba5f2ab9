//! Groups of servers behind a service: who gets a request, and who gets none.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Instant;

use cutover_protocol::hold::{ServerState, ServerStatus};
use cutover_protocol::id::Site;

use crate::tls::{self, Authority};
use crate::world::{Message, Nobody, Origin, PATIENCE, Peer, Plan, Stage, World};

/// A service whose source is a group of these servers, with one worker so that turns are exact.
pub(crate) fn group(servers: &[String], more: &str) -> Plan {
    groups(servers, &[Nobody::new().address().to_string()], more)
}

fn groups(source: &[String], target: &[String], more: &str) -> Plan {
    let list = |servers: &[String]| {
        let servers = servers.iter().map(|server| match server.split_once(' ') {
            Some((address, rest)) => format!("{{ address = \"{address}\", {rest} }}"),
            None => format!("{{ address = \"{server}\" }}"),
        });
        servers.collect::<Vec<_>>().join(", ")
    };
    let anywhere = Nobody::new().address();
    let plan = Plan::new(anywhere, anywhere).named("source", "target");
    let mut plan = plan.table(&format!(
        "[[upstream]]\nname = \"source\"\nservers = [{}]\n{more}\n[[upstream]]\nname = \"target\"\nservers = [{}]\n{more}",
        list(source),
        list(target)
    ));
    plan.workers = 1;
    plan
}

pub(crate) fn addresses(origins: &[&Origin]) -> Vec<String> {
    origins
        .iter()
        .map(|origin| origin.address().to_string())
        .collect()
}

/// How often each origin answered so many requests of one client.
fn answers(world: &World, count: usize) -> BTreeMap<String, usize> {
    let mut client = world.client();
    let mut names = BTreeMap::new();
    for _ in 0..count {
        let answer = client.get("/").message();
        assert_eq!(answer.status(), 200, "{answer:?}");
        let name = answer.body.split(' ').next().unwrap().to_owned();
        *names.entry(name).or_default() += 1;
    }
    names
}

fn shares(of: &[(&str, usize)]) -> BTreeMap<String, usize> {
    of.iter()
        .map(|(name, count)| ((*name).to_owned(), *count))
        .collect()
}

/// The servers of a site, as soon as they are as wanted.
pub(crate) fn until_servers(world: &World, site: Site, wanted: impl Fn(&[ServerStatus]) -> bool) {
    let mut control = world.control();
    let begun = Instant::now();
    loop {
        let mut servers = control.status().servers;
        servers.retain(|server| server.site == site);
        if wanted(&servers) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "never so: {servers:?}");
    }
}

fn states(servers: &[ServerStatus]) -> Vec<ServerState> {
    servers.iter().map(|server| server.state).collect()
}

#[test]
fn servers_of_a_group_share_requests_by_their_weights() {
    let (one, two) = (Origin::new("one"), Origin::new("two"));
    let servers = [
        format!("{} weight = 3", one.address()),
        two.address().to_string(),
    ];
    let world = group(&servers, "").start();
    assert_eq!(answers(&world, 40), shares(&[("one", 30), ("two", 10)]));
    // Connections are kept, each for its own server.
    assert_eq!((one.connections(), two.connections()), (1, 1));
}

#[test]
fn a_server_that_cannot_be_reached_makes_way_for_the_next() {
    let (dead, one) = (Nobody::new(), Origin::new("one"));
    let servers = [dead.address().to_string(), one.address().to_string()];
    let world = group(&servers, "").start();
    let mut client = world.client();
    for _ in 0..4 {
        assert_eq!(client.post("/", "x").message().body, "one POST / x");
    }
    assert_eq!(one.seen().len(), 4);
    until_servers(&world, Site::Source, |servers| {
        (servers[0].connect_errors, servers[1].requests) == (2, 4)
    });
}

#[test]
fn nobody_reachable_is_a_bad_gateway_after_three_tries() {
    let dead: Vec<Nobody> = (0..5).map(|_| Nobody::new()).collect();
    let servers: Vec<String> = dead.iter().map(|dead| dead.address().to_string()).collect();
    let world = group(&servers, "").start();
    assert_eq!(world.client().get("/").message().status(), 502);
    until_servers(&world, Site::Source, |servers| {
        servers
            .iter()
            .map(|server| server.connect_errors)
            .sum::<u64>()
            == 3
    });
}

#[test]
fn a_backup_serves_only_while_nobody_else_can() {
    let (late, backup) = (Nobody::new(), Origin::new("backup"));
    let servers = [
        late.address().to_string(),
        format!("{} backup = true", backup.address()),
    ];
    let checks = "[upstream.health]\ncheck = \"tcp\"\ninterval_ms = 10\nrise = 1\nfall = 1";
    let world = group(&servers, checks).start();
    assert_eq!(answers(&world, 4), shares(&[("backup", 4)]));
    until_servers(&world, Site::Source, |servers| {
        states(servers)[0] == ServerState::Down
    });
    let _late = late.becomes("late");
    until_servers(&world, Site::Source, |servers| {
        states(servers)[0] == ServerState::Up
    });
    assert_eq!(answers(&world, 4), shares(&[("late", 4)]));
}

#[test]
fn without_a_server_that_is_up_the_answer_is_503_and_says_when_to_come_back() {
    let dead = Nobody::new();
    let checks = "[upstream.health]\ncheck = \"tcp\"\ninitial = \"down\"";
    let world = group(&[dead.address().to_string()], checks).start();
    let answer = world.client().get("/").message();
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.field("Retry-After"), Some("5"));
    assert_eq!(
        answer.body,
        "Service Unavailable: no server of the upstream is up\n"
    );
}

fn cookie_of(answer: &Message) -> String {
    let set = answer.field("Set-Cookie").unwrap();
    let (pair, attributes) = set.split_once("; ").unwrap();
    assert_eq!(attributes, "Path=/; HttpOnly; SameSite=Lax");
    pair.to_owned()
}

#[test]
fn a_client_with_its_cookie_comes_back_to_its_server() {
    let (one, two) = (Origin::new("one"), Origin::new("two"));
    let servers = addresses(&[&one, &two]);
    let world = group(&servers, "sticky_cookie = \"hopgate\"").start();
    let mut client = world.client();
    let first = client.get("/").message();
    let cookie = cookie_of(&first);
    assert!(cookie.starts_with("hopgate="));
    let name = first.body.split(' ').next().unwrap();
    for _ in 0..5 {
        let request = format!("GET / HTTP/1.1\r\nHost: h\r\nCookie: a=b; {cookie}\r\n\r\n");
        let answer = client.send(request).message();
        assert!(answer.body.starts_with(name), "{answer:?}");
        assert_eq!(answer.field("Set-Cookie"), None);
    }
    let other = client
        .send("GET / HTTP/1.1\r\nHost: h\r\nCookie: hopgate=0123\r\n\r\n")
        .message();
    assert!(!cookie_of(&other).ends_with("0123"));
}

#[test]
fn the_same_header_leads_to_the_same_server() {
    let origins = [Origin::new("one"), Origin::new("two"), Origin::new("three")];
    let servers = addresses(&origins.iter().collect::<Vec<_>>());
    let world = group(
        &servers,
        "balance = \"hash\"\nhash_by = \"header:X-Tenant\"",
    )
    .start();
    let mut client = world.client();
    let mut used = BTreeMap::new();
    for tenant in (0..40).chain(0..40) {
        let request = format!("GET / HTTP/1.1\r\nHost: h\r\nx-tenant: {tenant}\r\n\r\n");
        let body = client.send(request).message().body;
        let before = used.insert(tenant, body.clone());
        assert!(before.is_none_or(|before| before == body));
    }
    let servers: std::collections::BTreeSet<_> = used.into_values().collect();
    assert_eq!(servers.len(), 3);
}

#[test]
fn a_server_that_answers_with_errors_is_spared_requests() {
    let (ill, well) = (Stage::new(), Origin::new("well"));
    let servers = [ill.address().to_string(), well.address().to_string()];
    let world = group(&servers, "[upstream.eject]\nserver_errors = 2").start();
    let mut client = world.client();
    for turn in 0..2 {
        client.get("/");
        let mut upstream = ill.accept();
        upstream.message();
        upstream.send("HTTP/1.1 500 Ill\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        assert_eq!(client.message().status(), 500);
        if turn == 0 {
            assert_eq!(client.get("/").message().body, "well GET /");
        }
    }
    assert_eq!(answers(&world, 6), shares(&[("well", 6)]));
    until_servers(&world, Site::Source, |servers| {
        states(servers) == [ServerState::Ejected, ServerState::Up] && servers[0].server_errors == 2
    });
}

#[test]
fn a_route_with_servers_of_its_own_goes_there_at_each_site() {
    let names = ["web", "api", "web-target", "api-target"];
    let origins = names.map(Origin::new);
    let servers: Vec<String> = origins
        .iter()
        .map(|origin| origin.address().to_string())
        .collect();
    let mut plan = groups(&servers[..1], &servers[2..3], "");
    plan = plan.table(&format!(
        "[[upstream]]\nname = \"api\"\nservers = [{{ address = \"{}\" }}]",
        servers[1]
    ));
    let route = format!(
        "[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\nsource = \"api\"\ntarget = \"{}\"",
        servers[3]
    );
    let world = plan.service(&route).start();
    let mut client = world.client();
    assert_eq!(client.get("/a").message().body, "web GET /a");
    assert_eq!(client.get("/api/a").message().body, "api GET /api/a");
    world.hold();
    world.move_to(Site::Target);
    assert_eq!(client.get("/api/a").message().body, "api-target GET /api/a");
    assert_eq!(client.get("/a").message().body, "web-target GET /a");
    until_servers(&world, Site::Target, |servers| {
        let requests = servers
            .iter()
            .map(|server| (server.group.as_str(), server.requests));
        requests.eq([
            ("target", 1),
            (origins[3].address().to_string().as_str(), 1),
        ])
    });
}

#[test]
fn a_name_is_resolved_before_the_first_request_is_answered() {
    let origin = Origin::new("one");
    let port = origin.address().port();
    // Where the name stands for ::1, too, nobody listens there, and the next server is tried.
    let world = group(&[format!("localhost:{port}")], "").start();
    assert_eq!(answers(&world, 4), shares(&[("one", 4)]));
}

#[test]
fn a_name_that_cannot_be_resolved_is_503() {
    let plan = group(&["nobody.invalid:80".to_owned()], "");
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolver = format!(
        "[resolver]\nnameservers = [\"{}\"]\ntimeout_ms_max = 1",
        nobody.local_addr().unwrap()
    );
    let world = plan.table(&resolver).start();
    assert_eq!(world.client().get("/").message().status(), 503);
}

#[test]
fn a_unix_socket_serves_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let origin = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")
            .unwrap();
    });
    let world = group(&[format!("unix:{}", path.display())], "").start();
    assert_eq!(world.client().get("/").message().body, "here");
    origin.join().unwrap();
}

#[test]
fn a_server_behind_the_proxy_protocol_is_told_of_each_client_on_a_connection_of_its_own() {
    let stage = Stage::new();
    let world = group(&[stage.address().to_string()], "proxy_protocol = \"v1\"").start();
    for _ in 0..2 {
        let mut client = world.client();
        let from = client.socket().local_addr().unwrap().port();
        client.get("/");
        let mut upstream = stage.accept();
        let to = world.address().port();
        assert_eq!(
            upstream.line(),
            format!("PROXY TCP4 127.0.0.1 127.0.0.1 {from} {to}")
        );
        assert_eq!(upstream.message().first_line, "GET / HTTP/1.1");
        upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        assert_eq!(client.message().body, "ok");
        assert!(upstream.is_closed());
    }
}

#[test]
fn a_raw_server_is_told_of_its_client_by_version_2() {
    let stage = Stage::new();
    let world = group(&[stage.address().to_string()], "proxy_protocol = \"v2\"")
        .tcp()
        .start();
    let mut client = world.client();
    client.send("hello");
    let mut upstream = stage.accept();
    let header = upstream.bytes(28);
    assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!(header[16..24], [127, 0, 0, 1, 127, 0, 0, 1]);
    let from = client.socket().local_addr().unwrap().port();
    let ports = [from.to_be_bytes(), world.address().port().to_be_bytes()];
    assert_eq!(header[24..], ports.concat());
    assert_eq!(upstream.bytes(5), b"hello");
}

#[test]
fn raw_connections_are_balanced_and_passed_on_too() {
    let (dead, one, two) = (Nobody::new(), Origin::new("one"), Origin::new("two"));
    let servers = [
        dead.address().to_string(),
        one.address().to_string(),
        two.address().to_string(),
    ];
    let world = group(&servers, "").tcp().start();
    for _ in 0..6 {
        assert_eq!(world.client().get("/").message().status(), 200);
    }
    assert_eq!(one.seen().len() + two.seen().len(), 6);
    assert!(one.seen().len() >= 2 && two.seen().len() >= 2);
}

#[test]
fn while_a_gate_holds_its_servers_are_not_checked() {
    let origin = Origin::new("one");
    let checks = "[upstream.health]\ncheck = \"http\"\ninterval_ms = 10";
    let world = group(&addresses(&[&origin]), checks).start();
    until_servers(&world, Site::Source, |servers| servers[0].check.is_some());
    let held = world.hold();
    assert_eq!(held.upstream_connections, 0);
    let before = origin.connections();
    // A check a moment ago is the last; later ones would have shown.
    until_servers(&world, Site::Source, |servers| {
        servers[0].check.as_ref().unwrap().age_ms > 100
    });
    assert_eq!(origin.connections(), before);
    world.reopen();
    until_servers(&world, Site::Source, |servers| {
        servers[0].check.as_ref().unwrap().age_ms < 50
    });
    assert!(origin.connections() > before);
}

#[test]
fn after_a_release_requests_find_out_for_themselves_whether_a_server_is_up() {
    let (source, target) = (Origin::new("source"), Nobody::new());
    // The next check is an hour away.
    let checks = "[upstream.health]\ncheck = \"tcp\"\ninterval_ms = 3600000\nfall = 1\nrise = 5";
    let servers = (addresses(&[&source]), [target.address().to_string()]);
    let checks = format!("{checks}\ninitial = \"down\"");
    let world = groups(&servers.0, &servers.1, &checks).start();
    until_servers(&world, Site::Target, |servers| servers[0].check.is_some());
    world.hold();
    let mut client = world.client();
    client.get("/");
    world.until_held(1);
    let _target = target.becomes("target");
    world.move_to(Site::Target);
    assert_eq!(client.message().body, "target GET /");
    until_servers(&world, Site::Target, |servers| {
        states(servers) == [ServerState::Up]
    });
}

#[test]
fn servers_over_tls_serve_and_are_checked_under_the_name_of_their_group() {
    let authority = Authority::new();
    let origin = Origin::new("one");
    let inner = tls::start(
        tls::folder(&authority, &["app.internal"]),
        tls::ONE,
        origin.address(),
    );
    let checks =
        "[upstream.health]\ncheck = \"http\"\ninterval_ms = 10\ninitial = \"down\"\nrise = 1";
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, authority.pem()).unwrap();
    for (name, good) in [("app.internal", true), ("other.internal", false)] {
        let tls = format!(
            "[upstream.tls]\nname = \"{name}\"\nca = \"{}\"",
            ca.display()
        );
        let server = inner.address().to_string();
        let world = group(&[server], &format!("{checks}\n{tls}")).start();
        until_servers(&world, Site::Source, |servers| {
            servers[0]
                .check
                .as_ref()
                .is_some_and(|check| check.good == good)
        });
        let answer = world.client().get("/").message();
        if good {
            assert_eq!(answer.body, "one GET /");
        } else {
            assert_eq!(answer.status(), 503);
        }
    }
}

#[test]
fn servers_over_tls_are_spoken_to_in_http2() {
    let authority = Authority::new();
    let stage = Stage::new();
    let inner = tls::start(
        tls::folder(&authority, &["app.internal"]),
        tls::ONE,
        stage.address(),
    );
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, authority.pem()).unwrap();
    let tls = format!(
        "protocol = \"http2\"\n[upstream.tls]\nname = \"app.internal\"\nca = \"{}\"",
        ca.display()
    );
    let world = group(&[inner.address().to_string()], &tls).start();
    let (mut first, mut second) = (world.client(), world.client());
    first.get("/1");
    let mut upstreams = [stage.accept()].into_iter().collect::<Vec<_>>();
    second.get("/2");
    upstreams.push(stage.accept());
    // Two requests under way, on one connection.
    until_servers(&world, Site::Source, |servers| {
        servers[0].active == 2 && servers[0].connections == 1
    });
    for (upstream, body) in upstreams.iter_mut().zip(["one", "two"]) {
        upstream.message();
        upstream.send(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{body}"
        ));
    }
    assert_eq!(first.message().body, "one");
    assert_eq!(second.message().body, "two");
}

/// Whoever is asked first, and the other.
fn asked(stages: [Stage; 2]) -> (Peer, Stage) {
    for stage in &stages {
        stage.listener().set_nonblocking(true).unwrap();
    }
    let begun = Instant::now();
    let (asked, index) = loop {
        let mut places = stages.iter().enumerate();
        let found =
            places.find_map(|(index, stage)| Some((stage.listener().accept().ok()?.0, index)));
        match found {
            Some(found) => break found,
            None => assert!(begun.elapsed() < PATIENCE, "nobody is asked"),
        }
    };
    asked.set_nonblocking(false).unwrap();
    let [first, second] = stages;
    let other = if index == 0 { second } else { first };
    other.listener().set_nonblocking(false).unwrap();
    (Peer::of(asked), other)
}

#[test]
fn who_has_less_to_do_gets_the_next_request() {
    for balance in ["least_connections", "two_choices"] {
        let stages = [Stage::new(), Stage::new()];
        let servers = [
            stages[0].address().to_string(),
            stages[1].address().to_string(),
        ];
        let world = group(&servers, &format!("balance = \"{balance}\"")).start();
        let mut waits = world.client();
        waits.get("/long");
        let (mut busy, idle) = asked(stages);
        busy.message();
        let mut client = world.client();
        client.get("/0");
        let mut upstream = idle.accept();
        for turn in 1..6 {
            upstream.message();
            upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
            assert_eq!(client.message().status(), 204, "{balance}");
            client.get(&format!("/{turn}"));
        }
        upstream.message();
        busy.send("HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(waits.message().status(), 204);
    }
}
