//! What a group does with its servers, seen from a worker. Time is an argument: nothing here waits.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_protocol::hold::ServerState;

use super::address::Address;
use super::directory::Directory;
use super::eject::Outcome;
use super::group::{Group, PickKey, Place};
use super::moment::Moment;
use super::server::Picked;
use crate::config::{
    Balance, Check, EjectConfig, HashBy, HealthConfig, ServerConfig, StickyConfig, UpstreamConfig,
};

fn server(address: &str) -> ServerConfig {
    ServerConfig {
        address: Address::parse(address).unwrap(),
        weight: 1,
        backup: false,
    }
}

/// A group of servers at `a:1`, `a:2` and so on, with these weights.
fn config(weights: &[u32]) -> UpstreamConfig {
    let servers = weights
        .iter()
        .enumerate()
        .map(|(index, weight)| ServerConfig {
            weight: *weight,
            ..server(&format!("10.0.0.{}:80", index + 1))
        });
    UpstreamConfig {
        name: "web".to_owned(),
        servers: servers.collect(),
        ..UpstreamConfig::of_one(Address::parse("10.0.0.1:80").unwrap())
    }
}

fn group(config: UpstreamConfig) -> Group {
    Group::new(config, 2, 1, None).unwrap()
}

fn health(initially_up: bool) -> HealthConfig {
    HealthConfig {
        check: Check::Tcp,
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        rise: 1,
        fall: 1,
        initially_up,
    }
}

fn eject() -> EjectConfig {
    EjectConfig {
        connect_errors: 3,
        server_errors: 5,
        error_percent: 50,
        window: Duration::from_secs(10),
        window_requests_min: 20,
        ejected_first: Duration::from_secs(10),
        ejected_max: Duration::from_secs(60),
        share_percent_max: 50,
    }
}

fn key(now: Instant) -> PickKey<'static> {
    PickKey {
        worker: 0,
        now,
        client: None,
        hashed: None,
        sticky: None,
    }
}

/// The last number of the address.
fn name(picked: &Picked) -> usize {
    let text = picked.endpoint().to_string();
    let host = text.split(':').next().unwrap();
    host.rsplit('.').next().unwrap().parse().unwrap()
}

/// How often each server is picked, when every request ends at once.
fn counts(group: &Group, picks: usize, now: Instant) -> Vec<usize> {
    let mut counts = vec![0; group.members().list.len()];
    for _ in 0..picks {
        counts[name(&group.pick(&key(now), &[]).unwrap()) - 1] += 1;
    }
    counts
}

#[test]
fn a_plain_server_is_always_usable_and_counts_what_is_active() {
    let directory = Directory::new(&[], [Address::parse("10.0.0.1:80").unwrap()], 2, None).unwrap();
    let group = directory.group("10.0.0.1:80").unwrap();
    let now = Instant::now();
    let first = group.pick(&key(now), &[]).unwrap();
    for _ in 0..100 {
        let picked = group.pick(&key(now), &[]).unwrap();
        group.report(&picked, Outcome::Unreachable, || now);
    }
    let counts = group.members().list[0].server.counts();
    assert_eq!(
        (counts.active, counts.requests, counts.connect_errors),
        (1, 101, 100)
    );
    assert!(group.pick(&key(now), &[first.id()]).is_none());
    drop(first);
    assert_eq!(group.members().list[0].server.active(), 0);
}

#[test]
fn weights_are_shares() {
    let group = group(config(&[3, 2, 1]));
    assert_eq!(counts(&group, 600, Instant::now()), [300, 200, 100]);
}

#[test]
fn a_server_without_weight_gets_nothing_new() {
    let group = group(config(&[1, 0]));
    assert_eq!(counts(&group, 10, Instant::now()), [10, 0]);
}

#[test]
fn workers_begin_with_different_servers() {
    let group = group(config(&[1, 1]));
    let now = Instant::now();
    let first = |worker| name(&group.pick(&PickKey { worker, ..key(now) }, &[]).unwrap());
    assert_ne!(first(0), first(1));
}

#[test]
fn the_least_busy_server_is_picked_also_when_another_worker_keeps_it_busy() {
    let group = group(UpstreamConfig {
        balance: Balance::LeastConnections,
        ..config(&[1, 1])
    });
    let now = Instant::now();
    let elsewhere = PickKey {
        worker: 1,
        ..key(now)
    };
    let mut held: Vec<Picked> = Vec::new();
    for _ in 0..10 {
        held.push(group.pick(&elsewhere, &[]).unwrap());
    }
    held.retain(|picked| name(picked) == 1);
    assert_eq!(held.len(), 5);
    for _ in 0..5 {
        let picked = group.pick(&key(now), &[]).unwrap();
        assert_eq!(name(&picked), 2);
        held.push(picked);
    }
}

#[test]
fn two_choices_of_two_servers_take_the_idle_one() {
    let group = group(UpstreamConfig {
        balance: Balance::TwoChoices,
        ..config(&[1, 1])
    });
    let now = Instant::now();
    let busy = group.pick(&key(now), &[]).unwrap();
    for _ in 0..50 {
        assert_ne!(group.pick(&key(now), &[]).unwrap().id(), busy.id());
    }
}

#[test]
fn the_same_key_finds_the_same_server_and_moves_only_when_that_one_leaves() {
    let group = group(UpstreamConfig {
        balance: Balance::Hash(HashBy::Address),
        ..config(&[1; 5])
    });
    let now = Instant::now();
    let pick = |client: u32, tried: &[_]| {
        let client = Some(IpAddr::from(client.to_be_bytes()));
        group.pick(&PickKey { client, ..key(now) }, tried).unwrap()
    };
    let gone = pick(0, &[]).id();
    let mut moved = 0;
    for client in 0..1000 {
        let (before, after) = (pick(client, &[]), pick(client, &[gone]));
        assert_eq!(pick(client, &[]).id(), before.id());
        if before.id() == gone {
            moved += 1;
        } else {
            assert_eq!(after.id(), before.id());
        }
    }
    assert!((150..250).contains(&moved), "{moved}");
}

#[test]
fn neighbours_in_a_network_of_ipv6_share_a_server_and_a_key_goes_before_the_address() {
    let group = group(UpstreamConfig {
        balance: Balance::Hash(HashBy::Header("x-tenant".to_owned())),
        ..config(&[1; 50])
    });
    let now = Instant::now();
    let pick = |client: &str, hashed: Option<&'static [u8]>| {
        let client = Some(client.parse().unwrap());
        let key = PickKey {
            client,
            hashed,
            ..key(now)
        };
        group.pick(&key, &[]).unwrap().id()
    };
    assert_eq!(pick("fd00::1", None), pick("fd00::2:3:4", None));
    assert_eq!(pick("10.0.0.1", Some(b"a")), pick("fd00::1", Some(b"a")));
    let servers: std::collections::HashSet<_> = [b"a", b"b", b"c", b"d"]
        .map(|key| pick("10.0.0.1", Some(key)))
        .into();
    assert!(servers.len() > 1);
}

#[test]
fn a_backup_serves_only_while_no_other_can() {
    let mut config = config(&[1, 1, 1]);
    config.servers[2].backup = true;
    config.health = Some(health(true));
    let group = group(config);
    let now = Instant::now();
    assert_eq!(counts(&group, 10, now), [5, 5, 0]);
    let set = |index: usize, up| {
        group.members().list[index]
            .server
            .set_up(up, Moment::of(now))
    };
    set(0, false);
    assert_eq!(counts(&group, 10, now), [0, 10, 0]);
    set(1, false);
    assert_eq!(counts(&group, 10, now), [0, 0, 10]);
    set(2, false);
    assert!(group.pick(&key(now), &[]).is_none());
    set(0, true);
    assert_eq!(counts(&group, 10, now), [10, 0, 0]);
}

#[test]
fn a_backup_is_tried_after_every_other_was() {
    let mut config = config(&[1, 1, 1]);
    config.servers[0].backup = true;
    let group = group(config);
    let now = Instant::now();
    let mut tried = Vec::new();
    let mut order = Vec::new();
    while let Some(picked) = group.pick(&key(now), &tried) {
        tried.push(picked.id());
        order.push(name(&picked));
    }
    assert_eq!(order, [2, 3, 1]);
}

#[test]
fn a_checked_server_that_is_down_is_not_picked_even_alone() {
    let group = group(UpstreamConfig {
        health: Some(health(false)),
        ..config(&[1])
    });
    let now = Instant::now();
    assert!(group.pick(&key(now), &[]).is_none());
    group.members().list[0].server.set_up(true, Moment::of(now));
    assert!(group.pick(&key(now), &[]).is_some());
}

fn sticky() -> StickyConfig {
    StickyConfig {
        cookie: "hopgate".to_owned(),
        secret: String::new(),
    }
}

#[test]
fn a_cookie_leads_back_to_its_server_while_that_is_usable() {
    let group = group(UpstreamConfig {
        sticky: Some(sticky()),
        health: Some(health(true)),
        ..config(&[1, 1, 0])
    });
    let now = Instant::now();
    let first = group.pick(&key(now), &[]).unwrap();
    assert!(!first.sticks);
    let cookie = first.cookie().as_bytes().to_vec();
    let back = |cookie: &[u8]| {
        let key = PickKey {
            sticky: Some(cookie),
            ..key(now)
        };
        group.pick(&key, &[]).unwrap()
    };
    for _ in 0..10 {
        assert_eq!(back(&cookie).id(), first.id());
        assert!(back(&cookie).sticks);
    }
    assert!(!back(b"unknown").sticks);
    let members = group.members();
    // Without weight it takes no newcomers, but who sticks to it stays.
    let without_weight = &members.list[2].server;
    assert_eq!(
        back(without_weight.cookie().as_bytes()).id(),
        without_weight.id()
    );
    let mine = members
        .list
        .iter()
        .find(|member| member.server.id() == first.id());
    mine.unwrap().server.set_up(false, Moment::of(now));
    let other = back(&cookie);
    assert_ne!(other.id(), first.id());
    assert!(!other.sticks);
}

#[test]
fn a_server_that_comes_back_starts_slowly_and_has_its_share_at_the_end() {
    let group = group(UpstreamConfig {
        health: Some(health(true)),
        slow_start: Duration::from_secs(10),
        ..config(&[1, 1])
    });
    let start = Instant::now();
    assert_eq!(counts(&group, 100, start), [50, 50]);
    let back = &group.members().list[1].server;
    back.set_up(false, Moment::of(start));
    back.set_up(true, Moment::of(start));
    let share = |seconds| counts(&group, 1500, start + Duration::from_secs(seconds))[1];
    assert!(share(0) <= 1);
    // A tenth of the weight against a whole one is an eleventh of the requests.
    assert!((135..=138).contains(&share(1)));
    assert!((499..=501).contains(&share(5)));
    assert!((749..=751).contains(&share(10)));
    let state = |seconds| {
        back.state(
            Moment::of(start + Duration::from_secs(seconds)),
            group.slow_start(),
        )
    };
    assert_eq!(
        (state(9), state(10)),
        (ServerState::SlowStart, ServerState::Up)
    );
}

#[test]
fn a_server_that_fails_is_ejected_and_returns_by_itself() {
    let group = group(UpstreamConfig {
        eject: Some(eject()),
        ..config(&[1, 1])
    });
    let start = Instant::now();
    let fail = |now: Instant| {
        let picked = (0..2).filter_map(|_| group.pick(&key(now), &[]));
        let first = picked.into_iter().find(|picked| name(picked) == 1);
        if let Some(picked) = first {
            group.report(&picked, Outcome::Unreachable, || now);
        }
    };
    (0..3).for_each(|_| fail(start));
    assert_eq!(counts(&group, 10, start), [0, 10]);
    let server = Arc::clone(&group.members().list[0].server);
    assert_eq!(
        server.state(Moment::of(start), Duration::ZERO),
        ServerState::Ejected
    );
    let later = start + Duration::from_secs(10);
    assert_eq!(counts(&group, 10, later), [5, 5]);
    (0..3).for_each(|_| fail(later));
    assert_eq!(counts(&group, 10, later + Duration::from_secs(19)), [0, 10]);
    assert_eq!(counts(&group, 10, later + Duration::from_secs(20)), [5, 5]);
}

#[test]
fn a_share_of_errors_over_all_workers_ejects_even_between_good_answers() {
    let group = group(UpstreamConfig {
        eject: Some(eject()),
        ..config(&[1, 0])
    });
    let now = Instant::now();
    for request in 0..19 {
        let key = PickKey {
            worker: request % 2,
            ..key(now)
        };
        let picked = group.pick(&key, &[]).unwrap();
        let status = if request % 3 == 0 { 200 } else { 500 };
        group.report(&picked, Outcome::Answered(status), || now);
    }
    let picked = group.pick(&key(now), &[]).unwrap();
    group.report(&picked, Outcome::Broken, || now);
    assert!(group.pick(&key(now), &[]).is_none());
}

#[test]
fn at_most_half_of_the_servers_are_ejected() {
    let group = group(UpstreamConfig {
        eject: Some(eject()),
        ..config(&[1, 1, 1, 1])
    });
    let now = Instant::now();
    for _ in 0..100 {
        let picked = group.pick(&key(now), &[]).unwrap();
        group.report(&picked, Outcome::Unreachable, || now);
    }
    let members = group.members();
    let ejected = members
        .list
        .iter()
        .filter(|member| member.server.is_ejected(Moment::of(now)));
    assert_eq!(ejected.count(), 2);
}

#[test]
fn a_server_that_disappears_gets_nothing_new_while_its_requests_end() {
    let mut config = config(&[1]);
    config.servers.push(server("app.internal:80"));
    let group = group(config);
    let now = Instant::now();
    let found = |last: &[u8]| -> Vec<Place> {
        let address = |last: &u8| Address::parse(&format!("10.0.0.{last}:80")).unwrap();
        let places = last.iter().map(|last| Place {
            endpoint: address(last).endpoint().unwrap(),
            weight: 1,
            backup: false,
        });
        places.collect()
    };
    group.replace(1, found(&[2, 3]), now);
    assert_eq!(counts(&group, 30, now), [10, 10, 10]);
    let before = group.members();
    let leaving = group.pick(
        &key(now),
        &[before.list[0].server.id(), before.list[1].server.id()],
    );
    group.replace(1, found(&[2]), now);
    assert_eq!(counts(&group, 30, now), [15, 15]);
    assert_eq!(name(&leaving.unwrap()), 3);
    assert_eq!(
        group.members().list[1].server.id(),
        before.list[1].server.id()
    );
    // Twice the same endpoint is one server.
    group.replace(1, found(&[1]), now);
    assert_eq!(counts(&group, 30, now), [30]);
}

#[test]
fn a_reload_keeps_what_is_known_of_servers_that_stay() {
    let checked = UpstreamConfig {
        health: Some(health(true)),
        ..config(&[1, 1])
    };
    let before = Directory::new(std::slice::from_ref(&checked), [], 2, None).unwrap();
    let now = Instant::now();
    let old = before.group("web").unwrap();
    old.members().list[0].server.set_up(false, Moment::of(now));
    let mut more = checked.clone();
    more.servers.push(server("10.0.0.3:80"));
    more.servers[1].weight = 7;
    let after = Directory::new(std::slice::from_ref(&more), [], 2, Some(&before)).unwrap();
    let new = after.group("web").unwrap();
    let ids = |group: &Group| -> Vec<_> {
        let members = group.members();
        members
            .list
            .iter()
            .map(|member| member.server.id())
            .collect()
    };
    assert_eq!(ids(new)[..2], ids(old)[..]);
    assert!(!new.members().list[0].server.is_up());
    assert_eq!(counts(new, 80, now), [0, 70, 10]);
    // Connections of HTTP/1 are of no use to HTTP/2.
    let other = UpstreamConfig {
        protocol: crate::config::UpstreamProtocol::Http2,
        ..checked
    };
    let changed = Directory::new(&[other], [], 2, Some(&after)).unwrap();
    assert_ne!(ids(changed.group("web").unwrap()), ids(old));
}
