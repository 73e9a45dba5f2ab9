//! Certificates ordered from an authority, by the real proxy, proved over its real listeners.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use hopgate_proxy::Proxy;
use hopgate_proxy::config::Config;

use crate::authority::Ca;
use crate::tls::{Authority, Browser};
use crate::world::{Origin, PATIENCE, World};

/// A proxy that orders a certificate for site.example into `shared`: listeners in clear and with TLS.
fn start(shared: &Path, ca: &Ca, challenge: &str, origin: &Origin) -> World {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), ca.authority.pem()).unwrap();
    let (address, url, shared) = (origin.address(), &ca.url, shared.display());
    let text = format!(
        "state_dir = \"state\"\ncontrol = \"control.sock\"\nworkers = 1\n[[tls]]\nname = \"public\"\n[tls.acme]\n\
         directory = \"{url}\"\nca = \"ca.pem\"\nnames = [\"site.example\", \"www.site.example\"]\n\
         folder = \"{shared}\"\nchallenges = [\"{challenge}\"]\ncontact = [\"mailto:admin@site.example\"]\n\
         [[service]]\nname = \"web\"\nsource = \"{address}\"\ntarget = \"{address}\"\n\
         [[service.listen]]\naddress = \"127.0.0.1:0\"\n[[service.listen]]\naddress = \"127.0.0.1:0\"\ntls = \"public\"\n"
    );
    let path = folder.path().join("proxy.toml");
    std::fs::write(&path, text).unwrap();
    let proxy = Proxy::start(&Config::load(&path).unwrap()).unwrap();
    World {
        proxy: Some(proxy),
        folder,
    }
}

fn places(world: &World) -> (SocketAddr, SocketAddr) {
    let addresses = world.proxy().addresses("web");
    (addresses[0].unwrap(), addresses[1].unwrap())
}

fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !wanted() {
        assert!(begun.elapsed() < PATIENCE, "never so: {what}");
        std::thread::yield_now();
    }
}

/// Waits until the proxy shows a certificate of the authority.
fn until_served(world: &World, authority: &Authority) {
    let browser = Browser::trusting(authority);
    for host in ["site.example", "www.site.example"] {
        until(host, || browser.visit(places(world).1, host).is_ok());
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_certificate_is_ordered_and_served_with_either_proof_also_while_the_gate_holds() {
    for challenge in ["http-01", "tls-alpn-01"] {
        let (ca, shared) = (Ca::new(), tempfile::tempdir().unwrap());
        let origin = Origin::new("source");
        let world = start(shared.path(), &ca, challenge, &origin);
        ca.until_asked();
        world.hold();
        let (http, https) = places(&world);
        ca.finds(http, https);
        until("a certificate", || {
            shared.path().join("site.example.pem").exists()
        });
        world.reopen();
        until_served(&world, &ca.authority);
        assert_eq!(ca.count(), (1, 1), "{challenge}");
        // No answer is left, nor the lease; and nothing of it went to the origin.
        until("given back", || {
            names(shared.path()) == ["account.json", "challenges", "site.example.pem"]
        });
        assert_eq!(
            names(&shared.path().join("challenges")),
            Vec::<String>::new()
        );
        assert!(
            origin.seen().iter().all(|request| request == "GET /"),
            "{:?}",
            origin.seen()
        );
    }
}

#[test]
fn of_two_proxies_with_one_folder_one_orders_the_other_proves_and_both_serve() {
    for challenge in ["http-01", "tls-alpn-01"] {
        let (ca, shared) = (Ca::new(), tempfile::tempdir().unwrap());
        let origin = Origin::new("source");
        let orders = start(shared.path(), &ca, challenge, &origin);
        ca.until_asked();
        let proves = start(shared.path(), &ca, challenge, &origin);
        let (http, https) = places(&proves);
        ca.finds(http, https);
        until_served(&orders, &ca.authority);
        until_served(&proves, &ca.authority);
        assert_eq!(ca.count(), (1, 1), "{challenge}");
    }
}

#[test]
fn a_certificate_near_its_end_is_replaced_with_the_same_account_and_a_fresh_one_is_left_alone() {
    let (ca, shared) = (Ca::new(), tempfile::tempdir().unwrap());
    let origin = Origin::new("source");
    let ordered = shared.path().join("site.example.pem");
    let serve = || {
        let world = start(shared.path(), &ca, "http-01", &origin);
        let (http, https) = places(&world);
        ca.finds(http, https);
        until_served(&world, &ca.authority);
        world
    };
    drop(serve());
    let first = std::fs::read(&ordered).unwrap();
    drop(serve());
    assert_eq!(std::fs::read(&ordered).unwrap(), first);
    assert_eq!(ca.count(), (1, 1));
    let day = Duration::from_secs(24 * 3600);
    let (chain, key) =
        ca.authority
            .signs_until(&["site.example", "www.site.example"], 80 * day, 10 * day);
    std::fs::write(&ordered, chain.clone() + &key).unwrap();
    let _world = serve();
    until("a new one", || {
        !std::fs::read_to_string(&ordered)
            .unwrap()
            .starts_with(&chain)
    });
    assert_eq!(ca.count(), (1, 2));
}

#[test]
fn a_refused_proof_changes_nothing_and_leaves_nothing_behind() {
    let (ca, shared) = (Ca::new(), tempfile::tempdir().unwrap());
    let (origin, elsewhere) = (Origin::new("source"), Origin::new("elsewhere"));
    let world = start(shared.path(), &ca, "http-01", &origin);
    ca.until_asked();
    assert!(!names(&shared.path().join("challenges")).is_empty());
    ca.finds(elsewhere.address(), elsewhere.address());
    until("given up", || {
        names(shared.path()) == ["account.json", "challenges"]
    });
    assert_eq!(
        names(&shared.path().join("challenges")),
        Vec::<String>::new()
    );
    let browser = Browser::trusting(&ca.authority);
    let refused = browser
        .visit(places(&world).1, "site.example")
        .err()
        .unwrap();
    assert!(refused.contains("alert"), "{refused}");
    assert_eq!(ca.count(), (1, 1));
}
