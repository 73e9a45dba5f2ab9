//! Names against a small DNS server on a real UDP socket.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::{Resolver, keep, refresh};
use crate::config::{ResolverConfig, ServerConfig, UpstreamConfig};
use crate::upstream::address::Address;
use crate::upstream::group::Group;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// By name and kind: times to live and data.
type Records = HashMap<(String, RecordType), Vec<(u32, RData)>>;

/// What the DNS server says. Nothing known: NXDOMAIN.
#[derive(Default)]
struct Zone {
    records: RefCell<Records>,
    /// Answers SERVFAIL to everything.
    broken: RefCell<bool>,
    /// Answers SERVFAIL to questions of this kind.
    broken_kind: RefCell<Option<RecordType>>,
    asked: Notify,
}

impl Zone {
    fn set(&self, name: &str, kind: RecordType, records: Vec<(u32, RData)>) {
        self.records
            .borrow_mut()
            .insert((name.to_owned(), kind), records);
    }

    fn set_v4(&self, name: &str, ttl: u32, addresses: &[[u8; 4]]) {
        let record =
            |address: &[u8; 4]| (ttl, RData::A(A::from(std::net::Ipv4Addr::from(*address))));
        self.set(name, RecordType::A, addresses.iter().map(record).collect());
    }

    fn answer(&self, bytes: &[u8]) -> Vec<u8> {
        let asked = Message::from_vec(bytes).unwrap();
        let query = asked.queries[0].clone();
        let mut message = Message::response(asked.metadata.id, OpCode::Query);
        message.add_query(query.clone());
        let kind = query.query_type();
        let name = query.name().to_ascii().trim_end_matches('.').to_owned();
        let records = self.records.borrow();
        let known = records.keys().any(|(known, _)| *known == name);
        if *self.broken.borrow() || *self.broken_kind.borrow() == Some(kind) {
            message.metadata.response_code = ResponseCode::ServFail;
        } else if !known {
            message.metadata.response_code = ResponseCode::NXDomain;
        }
        if message.metadata.response_code == ResponseCode::NoError {
            for (ttl, data) in records.get(&(name, kind)).into_iter().flatten() {
                let record = Record::from_rdata(query.name().clone(), *ttl, data.clone());
                message.add_answer(record);
            }
        }
        self.asked.notify_waiters();
        message.to_vec().unwrap()
    }
}

struct World {
    zone: Rc<Zone>,
    resolver: Arc<Resolver>,
    hosts: tempfile::NamedTempFile,
}

impl World {
    /// A DNS server, and a resolver that asks nobody else.
    async fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone = Rc::new(Zone::default());
        let server = Rc::clone(&zone);
        tokio::task::spawn_local(async move {
            let mut room = [0; 1500];
            loop {
                let (count, peer) = socket.recv_from(&mut room).await.unwrap();
                socket
                    .send_to(&server.answer(&room[..count]), peer)
                    .await
                    .unwrap();
            }
        });
        let config = ResolverConfig {
            nameservers: vec![address],
            timeout: PATIENCE,
            ttl_min: Duration::from_millis(100),
            ttl_max: Duration::from_secs(60),
        };
        let mut resolver = Resolver::new(&config).unwrap();
        let hosts = tempfile::NamedTempFile::new().unwrap();
        resolver.hosts_file = hosts.path().to_owned();
        Self {
            zone,
            resolver: Arc::new(resolver),
            hosts,
        }
    }

    async fn refresh(&self, group: &Group) -> Result<Duration, String> {
        let refreshed = refresh(&self.resolver, group, 0).await;
        refreshed.map_err(|error| error.to_string())
    }
}

fn group(address: &str) -> Group {
    let address = Address::parse(address).unwrap();
    Group::new(UpstreamConfig::of_one(address), 1, 0, None).unwrap()
}

/// Endpoint, weight and whether it stands by, of each server.
fn servers(group: &Group) -> Vec<(String, u32, bool)> {
    let members = group.members();
    let server = |member: &crate::upstream::group::Member| {
        (
            member.server.endpoint().to_string(),
            member.weight,
            member.backup,
        )
    };
    members.list.iter().map(server).collect()
}

fn addresses(group: &Group) -> Vec<String> {
    servers(group)
        .into_iter()
        .map(|(address, ..)| address)
        .collect()
}

async fn run(test: impl Future<Output = ()>) {
    let local = LocalSet::new();
    timeout(PATIENCE, local.run_until(test)).await.unwrap();
}

#[tokio::test]
async fn every_address_behind_a_name_is_a_server_and_a_change_is_followed() {
    run(async {
        let world = World::new().await;
        let group = group("app.internal:8080");
        world
            .zone
            .set_v4("app.internal", 7, &[[127, 0, 0, 2], [127, 0, 0, 1]]);
        assert_eq!(world.refresh(&group).await, Ok(Duration::from_secs(7)));
        assert_eq!(addresses(&group), ["127.0.0.1:8080", "127.0.0.2:8080"]);
        let first = group.members().list[0].server.id();
        world
            .zone
            .set_v4("app.internal", 7, &[[127, 0, 0, 3], [127, 0, 0, 1]]);
        world.refresh(&group).await.unwrap();
        assert_eq!(addresses(&group), ["127.0.0.1:8080", "127.0.0.3:8080"]);
        assert_eq!(group.members().list[0].server.id(), first);
    })
    .await;
}

#[tokio::test]
async fn a_time_to_live_is_kept_within_its_bounds() {
    run(async {
        let world = World::new().await;
        let group = group("app.internal:80");
        for (ttl, used) in [(0, 100), (5, 5_000), (3600, 60_000)] {
            world.zone.set_v4("app.internal", ttl, &[[127, 0, 0, 1]]);
            assert_eq!(world.refresh(&group).await, Ok(Duration::from_millis(used)));
        }
    })
    .await;
}

#[tokio::test]
async fn addresses_stay_while_nothing_better_is_known() {
    run(async {
        let world = World::new().await;
        let group = group("app.internal:80");
        assert_eq!(
            world.refresh(&group).await,
            Err("nothing stands behind it".to_owned())
        );
        world.zone.set_v4("app.internal", 1, &[[127, 0, 0, 1]]);
        world.refresh(&group).await.unwrap();
        *world.zone.broken.borrow_mut() = true;
        let error = world.refresh(&group).await.unwrap_err();
        assert!(error.contains("Server Failure"), "{error}");
        assert_eq!(addresses(&group), ["127.0.0.1:80"]);
        *world.zone.broken.borrow_mut() = false;
        world.zone.set_v4("app.internal", 1, &[]);
        assert_eq!(
            world.refresh(&group).await,
            Err("nothing stands behind it".to_owned())
        );
        assert_eq!(addresses(&group), ["127.0.0.1:80"]);
    })
    .await;
}

#[tokio::test]
async fn both_kinds_of_addresses_serve_and_one_that_is_never_answered_does_not_matter() {
    run(async {
        let world = World::new().await;
        let group = group("app.internal:80");
        world.zone.set_v4("app.internal", 9, &[[127, 0, 0, 1]]);
        *world.zone.broken_kind.borrow_mut() = Some(RecordType::AAAA);
        assert_eq!(world.refresh(&group).await, Ok(Duration::from_secs(9)));
        assert_eq!(addresses(&group), ["127.0.0.1:80"]);
        *world.zone.broken_kind.borrow_mut() = None;
        let local = RData::AAAA(AAAA::from(std::net::Ipv6Addr::LOCALHOST));
        world
            .zone
            .set("app.internal", RecordType::AAAA, vec![(3, local)]);
        assert_eq!(world.refresh(&group).await, Ok(Duration::from_secs(3)));
        let both = ["127.0.0.1:80", "[::1]:80"];
        assert_eq!(addresses(&group), both);
        // Now a server would be lost by believing the half.
        *world.zone.broken_kind.borrow_mut() = Some(RecordType::AAAA);
        assert!(
            world
                .refresh(&group)
                .await
                .unwrap_err()
                .contains("Server Failure")
        );
        assert_eq!(addresses(&group), both);
    })
    .await;
}

#[tokio::test]
async fn records_of_a_service_bring_ports_weights_and_those_that_stand_by() {
    run(async {
        let world = World::new().await;
        let srv = |priority, weight, port, target: &str| {
            let target = Name::from_ascii(target).unwrap();
            (30, RData::SRV(SRV::new(priority, weight, port, target)))
        };
        let records = vec![
            srv(10, 60, 8081, "one.internal."),
            srv(10, 0, 8082, "two.internal."),
            srv(20, 5, 8083, "two.internal."),
            srv(10, 1, 8084, "."),
        ];
        world
            .zone
            .set("_http._tcp.app.internal", RecordType::SRV, records);
        world.zone.set_v4("one.internal", 50, &[[127, 0, 0, 1]]);
        world.zone.set_v4("two.internal", 20, &[[127, 0, 0, 2]]);
        let group = group("srv:_http._tcp.app.internal");
        assert_eq!(world.refresh(&group).await, Ok(Duration::from_secs(20)));
        let wanted = [
            ("127.0.0.1:8081", 60, false),
            ("127.0.0.2:8082", 1, false),
            ("127.0.0.2:8083", 5, true),
        ];
        let wanted = wanted.map(|(address, weight, by)| (address.to_owned(), weight, by));
        assert_eq!(servers(&group), wanted);
        // One target that cannot be resolved leaves all as they are.
        world
            .zone
            .records
            .borrow_mut()
            .remove(&("one.internal".to_owned(), RecordType::A));
        *world.zone.broken_kind.borrow_mut() = Some(RecordType::A);
        assert!(
            world
                .refresh(&group)
                .await
                .unwrap_err()
                .contains("Server Failure")
        );
        assert_eq!(servers(&group), wanted);
    })
    .await;
}

#[tokio::test]
async fn the_file_of_hosts_goes_first_and_is_read_again_each_time() {
    run(async {
        let world = World::new().await;
        let group = group("app.internal:80");
        world.zone.set_v4("app.internal", 1, &[[127, 0, 0, 9]]);
        let write = |text: &str| std::fs::write(world.hosts.path(), text).unwrap();
        write("127.0.0.5 app.internal app\n");
        assert_eq!(world.refresh(&group).await, Ok(Duration::from_secs(10)));
        assert_eq!(addresses(&group), ["127.0.0.5:80"]);
        write("127.0.0.6 app.internal\n");
        world.refresh(&group).await.unwrap();
        assert_eq!(addresses(&group), ["127.0.0.6:80"]);
        write("");
        world.refresh(&group).await.unwrap();
        assert_eq!(addresses(&group), ["127.0.0.9:80"]);
    })
    .await;
}

#[tokio::test]
async fn a_name_is_asked_again_when_its_answer_has_run_out() {
    run(async {
        let world = World::new().await;
        let group = Arc::new(group("app.internal:80"));
        world.zone.set_v4("app.internal", 0, &[[127, 0, 0, 1]]);
        let mut changes = group.subscribe();
        let task =
            tokio::task::spawn_local(keep(Arc::clone(&world.resolver), Arc::clone(&group), 0));
        changes.changed().await.unwrap();
        assert_eq!(addresses(&group), ["127.0.0.1:80"]);
        *world.zone.broken.borrow_mut() = true;
        world.zone.asked.notified().await;
        world.zone.set_v4("app.internal", 0, &[[127, 0, 0, 2]]);
        *world.zone.broken.borrow_mut() = false;
        changes.changed().await.unwrap();
        assert_eq!(addresses(&group), ["127.0.0.2:80"]);
        task.abort();
    })
    .await;
}

#[test]
fn only_the_entry_that_was_resolved_changes() {
    let mut config = UpstreamConfig::of_one(Address::parse("10.0.0.1:80").unwrap());
    config.servers.push(ServerConfig {
        address: Address::parse("app.internal:80").unwrap(),
        weight: 3,
        backup: true,
    });
    let group = Group::new(config, 1, 0, None).unwrap();
    let place = super::Place {
        endpoint: Address::parse("10.0.0.2:80").unwrap().endpoint().unwrap(),
        weight: 3,
        backup: true,
    };
    group.replace(1, vec![place], std::time::Instant::now());
    let wanted = [("10.0.0.1:80", 1, false), ("10.0.0.2:80", 3, true)];
    assert_eq!(
        servers(&group),
        wanted.map(|(a, w, b)| (a.to_owned(), w, b))
    );
}
