//! Raw services that choose servers by the name a TLS client asks for. Whoever ends that TLS gets the greeting byte
//! for byte; a hold comes before any connection, and whoever asks for a name of nobody is told so.

use std::io::Read;
use std::sync::Arc;

use cutover_protocol::id::Site;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::tls::{Authority, Browser, ONE, folder, start};
use crate::world::{Nobody, Origin, PATIENCE, Plan, Stage, World};

/// What a TLS client says first.
fn greeting(name: &str) -> Vec<u8> {
    let config = ClientConfig::builder()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn route(name: &str, sni: &str, source: &Stage, target: &Stage) -> String {
    format!(
        "[[service.route]]\nname = \"{name}\"\nsni = [{sni}]\nsource = \"{}\"\ntarget = \"{}\"\n",
        source.address(),
        target.address()
    )
}

fn world(default: &Stage, service: &str) -> World {
    Plan::new(default.address(), default.address())
        .tcp()
        .table("[metrics]\nlisten = \"127.0.0.1:0\"\n[access_log]\npath = \"access.log\"")
        .limits("client_head_ms_max = 2000")
        .service(service)
        .start()
}

fn refused(world: &World, reason: &str) -> String {
    let label = format!("hopgate_refused_total{{service=\"web\",reason=\"{reason}\"}} ");
    let metrics = world.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(&label));
    line.unwrap_or_else(|| panic!("{metrics}")).to_owned()
}

#[test]
fn a_greeting_goes_untouched_to_the_servers_of_its_name() {
    let (default, exact, below) = (Stage::new(), Stage::new(), Stage::new());
    let routes = [
        route("one", "\"db.example.org\"", &exact, &exact),
        route("many", "\"*.example.org\"", &below, &below),
    ];
    let mut world = world(&default, &routes.concat());
    for (name, stage) in [
        ("db.example.org", &exact),
        ("DB.Example.ORG", &exact),
        ("web.example.org", &below),
        ("a.b.example.org", &below),
        ("example.org", &default),
        ("db.example.org.evil.net", &default),
        ("192.0.2.1", &default),
    ] {
        let mut client = world.client();
        let bytes = greeting(name);
        client.send(&bytes);
        let mut upstream = stage.accept();
        assert_eq!(upstream.bytes(bytes.len()), bytes, "{name}");
        upstream.send("answer");
        assert_eq!(client.bytes(6), b"answer", "{name}");
    }
    // What is no TLS has no name.
    world.client().send("hello\n");
    assert_eq!(default.accept().bytes(6), b"hello\n");
    world.proxy.take().unwrap().stop(PATIENCE);
    let log = std::fs::read_to_string(world.folder.path().join("access.log")).unwrap();
    assert!(
        log.contains("request=\"tcp a.b.example.org\" status=200"),
        "{log}"
    );
}

#[test]
fn a_greeting_may_come_in_pieces() {
    let (default, database) = (Stage::new(), Stage::new());
    let routes = route("db", "\"db.example.org\"", &database, &database);
    let plan = Plan::new(default.address(), default.address());
    let world = Plan { workers: 1, ..plan }.tcp().service(&routes).start();
    let bytes = greeting("db.example.org");
    let mut client = world.client();
    for piece in bytes.chunks(bytes.len() / 3) {
        client.send(piece);
        // The only worker has looked at the piece when it serves somebody who came later.
        world.client().send("hello");
        assert_eq!(default.accept().bytes(5), b"hello");
    }
    assert_eq!(database.accept().bytes(bytes.len()), bytes);
}

#[test]
fn a_name_of_nobody_is_refused_with_an_alert_and_anything_else_is_closed() {
    let (default, database) = (Stage::new(), Stage::new());
    let routes = route("db", "\"db.example.org\"", &database, &database);
    let world = world(&default, &format!("unknown_name = \"refuse\"\n{routes}"));
    for name in ["other.example.org", "192.0.2.1"] {
        let mut client = world.client();
        client.send(greeting(name));
        let mut said = Vec::new();
        client.socket().read_to_end(&mut said).unwrap();
        // A record with a fatal alert, unrecognized_name.
        assert_eq!(said, [21, 3, 3, 0, 2, 2, 112], "{name}");
    }
    let mut stranger = world.client();
    stranger.send("GET / HTTP/1.1\r\n\r\n");
    assert_eq!(stranger.rest(), "");
    assert_eq!(refused(&world, "server_name"), "3");
    assert!(default.is_deserted() && database.is_deserted());
    let browser = Browser::trusting(&Authority::new());
    let told = browser.visit(world.address(), "other.example.org").err();
    assert_eq!(told.unwrap(), "received fatal alert: UnrecognisedName");
    world.client().send(greeting("db.example.org"));
    database.accept();
}

#[test]
fn a_client_that_does_not_say_whom_it_wants_is_left_after_a_while() {
    let (default, database) = (Stage::new(), Stage::new());
    let routes = route("db", "\"db.example.org\"", &database, &database);
    let world = Plan::new(default.address(), default.address())
        .tcp()
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .limits("client_head_ms_max = 20")
        .service(&routes)
        .start();
    let mut silent = world.client();
    silent.send(&greeting("db.example.org")[..20]);
    assert!(silent.is_closed());
    assert_eq!(refused(&world, "head_slow"), "1");
    assert!(default.is_deserted() && database.is_deserted());
}

#[test]
fn a_held_greeting_reaches_only_the_target_of_its_route() {
    let (default, source, target) = (Stage::new(), Stage::new(), Stage::new());
    let routes = route("db", "\"db.example.org\"", &source, &target);
    let world = world(&default, &routes);
    world.hold();
    let mut stays = world.client();
    let bytes = greeting("db.example.org");
    stays.send(&bytes);
    world.until_held(1);
    let mut gives_up = world.client();
    gives_up.send(&bytes);
    world.until_held(2);
    drop(gives_up);
    world.until_held(1);
    world.move_to(Site::Target);
    let mut upstream = target.accept();
    assert_eq!(upstream.bytes(bytes.len()), bytes);
    upstream.send("ready");
    assert_eq!(stays.bytes(5), b"ready");
    assert!(source.is_deserted() && default.is_deserted());
    crate::holding::balanced(&world);
}

#[test]
fn a_browser_shakes_hands_with_whom_it_named_and_not_with_the_proxy() {
    let authority = Authority::new();
    let origin = Origin::new("inside");
    let inner = start(folder(&authority, &["site.example"]), ONE, origin.address());
    let nobody = Nobody::new();
    let route = format!(
        "[[service.route]]\nname = \"site\"\nsni = \"site.example\"\nsource = \"{0}\"\ntarget = \"{0}\"\n",
        inner.address()
    );
    let outer = Plan::new(nobody.address(), nobody.address())
        .tcp()
        .service(&route)
        .start();
    Browser::trusting(&authority)
        .visit(outer.address(), "site.example")
        .unwrap();
    assert_eq!(origin.seen(), ["GET /"]);
}

#[test]
fn where_the_proxy_ends_tls_the_name_chooses_as_well() {
    let authority = Authority::new();
    let (site, other) = (Origin::new("site"), Origin::new("other"));
    let folder = folder(&authority, &["site.example", "other.example"]);
    let route = format!(
        "[[service.route]]\nname = \"site\"\nsni = \"site.example\"\nsource = \"{0}\"\ntarget = \"{0}\"\n",
        site.address()
    );
    let plan = Plan::new(other.address(), other.address());
    let listener = Some("address = \"127.0.0.1:0\"\ntls = \"public\"");
    let world = Plan { listener, ..plan }
        .tcp()
        .table(&format!("[[tls]]\nname = \"public\"\n{ONE}"))
        .service(&route)
        .start_in(folder);
    let browser = Browser::trusting(&authority);
    browser.visit(world.address(), "site.example").unwrap();
    browser.visit(world.address(), "other.example").unwrap();
    assert_eq!((site.seen().len(), other.seen().len()), (1, 1));
}
