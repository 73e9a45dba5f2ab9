//! A group of servers that do the same work: picks one for a request, and learns how that went.
//!
//! Picking takes no lock and allocates nothing. The list of servers is swapped as a whole when names, weights or
//! the configuration change; a request that has picked a server keeps it to its end, also when it has left.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::address::Endpoint;
use super::balance::{self, Seat};
use super::connect::Way;
use super::eject::{self, Outcome, Window};
use super::moment::Moment;
use super::server::{Picked, Server, ServerId};
use super::sticky;
use crate::config::{Balance, EjectConfig, HashBy, ServerConfig, UpstreamConfig};
use crate::tls::TlsError;
use crate::tls::client::UpstreamTls;

/// Most servers of a group: a name that resolves to more is somebody's mistake, and choosing looks at each.
pub(super) const SERVERS_MAX: usize = 1024;

/// What a choice may depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PickKey<'k> {
    /// The worker that asks.
    pub(crate) worker: usize,
    /// The time now, or the request's arrival: tens of milliseconds do not matter.
    pub(crate) now: Instant,
    /// The client's address, unless it came through a unix socket.
    pub(crate) client: Option<IpAddr>,
    /// Value of the cookie or header that [`Group::hash_by`] names.
    pub(crate) hashed: Option<&'k [u8]>,
    /// Value of the cookie that [`Group::sticky_cookie`] names.
    pub(crate) sticky: Option<&'k [u8]>,
}

/// Servers that do the same work.
#[derive(Debug)]
pub(crate) struct Group {
    config: UpstreamConfig,
    members: ArcSwap<Members>,
    /// By entry of the configuration's `servers`.
    ways: Box<[Arc<Way>]>,
    /// Taken by whoever changes `members` or ejects one of them.
    changing: Mutex<()>,
    /// Counts changes of `members`.
    changed: watch::Sender<u64>,
    /// Names that nobody has tried to resolve yet.
    unresolved: watch::Sender<usize>,
    workers: usize,
    seed: u64,
}

/// The servers of a group at one time.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) list: Box<[Member]>,
    /// One a worker.
    seats: Box<[Seat]>,
}

/// A server and its part in a group.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) server: Arc<Server>,
    pub(super) weight: u32,
    pub(super) backup: bool,
    /// Which entry of the configuration's `servers` it comes from.
    pub(super) entry: usize,
}

/// A server as it is to be in a group; found in the configuration or behind a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) endpoint: Endpoint,
    pub(super) weight: u32,
    pub(super) backup: bool,
}

impl Group {
    /// A group with the servers that need no resolving; those of `before` go on being what they are. `seed` makes
    /// random choices differ between processes.
    pub(super) fn new(
        config: UpstreamConfig,
        workers: usize,
        seed: u64,
        before: Option<&Self>,
    ) -> Result<Self, TlsError> {
        let group = Self {
            ways: ways(&config)?,
            members: ArcSwap::from_pointee(Members::new(Vec::new(), workers, seed)),
            changing: Mutex::new(()),
            changed: watch::Sender::new(0),
            unresolved: watch::Sender::new(0),
            config,
            workers,
            seed,
        };
        let known = before
            .filter(|before| before.config.connects_like(&group.config))
            .map(|before| before.members.load_full());
        let mut list = Vec::new();
        for (entry, server) in group.config.servers.iter().enumerate() {
            let places = match (server.address.endpoint(), &known) {
                (Some(endpoint), _) => vec![Place {
                    endpoint,
                    weight: server.weight,
                    backup: server.backup,
                }],
                (None, Some(known)) => {
                    let same = before.and_then(|before| before.entry_of(&server.address));
                    same.map_or_else(Vec::new, |entry| known.places_of(entry))
                }
                (None, None) => Vec::new(),
            };
            group.settle(&mut list, entry, places, known.as_deref());
        }
        if group.config.health.is_none() {
            list.iter().for_each(|member| member.server.assume(true));
        }
        let is_empty = |(entry, _): &(usize, _)| list.iter().all(|member| member.entry != *entry);
        let servers = group.config.servers.iter().enumerate();
        let unresolved = servers.filter(is_empty).count();
        group.unresolved.send_replace(unresolved);
        group.swap(list);
        Ok(group)
    }

    /// Its name; a plain address if the configuration gave it none.
    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// As it was configured.
    pub(crate) const fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    /// What a key's `hashed` has to be taken from.
    pub(crate) const fn hash_by(&self) -> Option<&HashBy> {
        match &self.config.balance {
            Balance::Hash(by) => Some(by),
            _ => None,
        }
    }

    /// The cookie a key's `sticky` has to be taken from.
    pub(crate) fn sticky_cookie(&self) -> Option<&str> {
        self.config
            .sticky
            .as_ref()
            .map(|sticky| sticky.cookie.as_str())
    }

    /// Chooses a server, other than those `tried`. `None` when no server is usable.
    pub(crate) fn pick(&self, key: &PickKey<'_>, tried: &[ServerId]) -> Option<Picked> {
        let members = self.members.load();
        if let [only] = &*members.list {
            return self.pick_only(only, key, tried);
        }
        let now = Moment::of(key.now);
        let usable =
            |member: &Member| member.server.is_usable(now) && !tried.contains(&member.server.id());
        if let Some(value) = key.sticky
            && self.config.sticky.is_some()
        {
            let stuck = |member: &&Member| member.server.cookie().as_bytes() == value;
            if let Some(member) = members
                .list
                .iter()
                .find(stuck)
                .filter(|member| usable(member))
            {
                let mut picked = member.server.pick(key.worker);
                picked.sticks = true;
                return Some(picked);
            }
        }
        let weight_of = |backup: bool| {
            let members = &members;
            move |index: usize| {
                let member = &members.list[index];
                if member.backup == backup && usable(member) {
                    member
                        .server
                        .weight(member.weight, now, self.config.slow_start)
                } else {
                    0
                }
            }
        };
        let index = self
            .choose(&members, key, weight_of(false))
            .or_else(|| self.choose(&members, key, weight_of(true)))?;
        Some(members.list[index].server.pick(key.worker))
    }

    /// Chooses among servers that are not known to be usable: when nothing better is known than that they may be.
    pub(crate) fn pick_untested(&self, key: &PickKey<'_>, tried: &[ServerId]) -> Option<Picked> {
        let members = self.members.load();
        let weight = |index: usize| {
            let member = &members.list[index];
            u64::from(!tried.contains(&member.server.id()) && !member.backup)
        };
        let index = self.choose(&members, key, weight)?;
        let mut picked = members.list[index].server.pick(key.worker);
        picked.untested = true;
        Some(picked)
    }

    /// An untested server has answered.
    #[cold]
    fn trust(&self, id: ServerId, now: Moment) {
        let members = self.members.load();
        let mut list = members.list.iter();
        if let Some(member) = list.find(|member| member.server.id() == id) {
            let server = &member.server;
            server.checks().forget();
            server.eject(Moment::NEVER);
            if !server.is_up() {
                server.set_up(true, now);
                tracing::info!(group = self.name(), server = %server.endpoint(), "up: it answers");
            }
        }
    }

    /// Whether a server is among those that may be picked.
    pub(crate) fn has(&self, id: ServerId) -> bool {
        let members = self.members.load();
        members.list.iter().any(|member| member.server.id() == id)
    }

    /// Waits until every name has been looked up once. Returns at once in a group without names, or with servers.
    pub(crate) async fn first_resolved(&self) {
        let mut unresolved = self.unresolved.subscribe();
        // We hold the sender.
        drop(unresolved.wait_for(|count| *count == 0).await);
    }

    /// A name has been looked up for the first time.
    pub(super) fn note_resolved(&self) {
        self.unresolved
            .send_modify(|count| *count = count.saturating_sub(1));
    }

    /// A group of one: no choice to be made. Without checks it is usable whatever happened before.
    fn pick_only(&self, only: &Member, key: &PickKey<'_>, tried: &[ServerId]) -> Option<Picked> {
        let server = &only.server;
        let usable = self.config.health.is_none() || server.is_usable(Moment::of(key.now));
        if !usable || tried.contains(&server.id()) {
            return None;
        }
        let mut picked = server.pick(key.worker);
        picked.sticks = key
            .sticky
            .is_some_and(|value| value == server.cookie().as_bytes());
        Some(picked)
    }

    fn choose(
        &self,
        members: &Members,
        key: &PickKey<'_>,
        weight: impl Fn(usize) -> u64,
    ) -> Option<usize> {
        let seat = &members.seats[key.worker % members.seats.len()];
        let active = |index: usize| members.list[index].server.active();
        match &self.config.balance {
            Balance::RoundRobin => balance::round_robin(seat, weight),
            Balance::LeastConnections => balance::least_connections(seat, weight, active),
            Balance::TwoChoices => balance::two_choices(seat, weight, active),
            Balance::Hash(_) => {
                let seed = |index: usize| members.list[index].server.hash_seed;
                balance::rendezvous(members.list.len(), key.hash(), weight, seed)
            }
        }
    }

    /// Learns how a request on a picked server ended; may eject it. Each pick is reported at most once.
    pub(crate) fn report(&self, picked: &Picked, outcome: Outcome, now: impl FnOnce() -> Instant) {
        picked.count(outcome);
        if picked.untested && matches!(outcome, Outcome::Answered(status) if status < 500) {
            self.trust(picked.id(), Moment::of(now()));
            return;
        }
        let Some(rule) = &self.config.eject else {
            return;
        };
        let now = Moment::of(now());
        let index = Window::index(now, rule.window);
        let failed = !matches!(outcome, Outcome::Answered(status) if status < 500);
        if rule.error_percent != 0 {
            picked.window().note(index, failed);
        }
        let row = picked.rows.note(outcome, rule);
        if failed {
            self.consider(picked.id(), row, index, rule, now);
        }
    }

    /// Something failed: ejects the server if that was once too often and the group can do without it.
    #[cold]
    fn consider(
        &self,
        id: ServerId,
        row: Option<eject::Cause>,
        index: u64,
        rule: &EjectConfig,
        now: Moment,
    ) {
        let members = self.members.load();
        let Some(member) = members.list.iter().find(|member| member.server.id() == id) else {
            return;
        };
        let server = &member.server;
        let Some(cause) = row.or_else(|| eject::share(server.window_sum(index), rule)) else {
            return;
        };
        let _changing = self.lock();
        let ejected = members
            .list
            .iter()
            .filter(|member| member.server.is_ejected(now))
            .count();
        if server.is_ejected(now) || ejected >= eject::allowed(members.list.len(), rule) {
            return;
        }
        let until = server.ejections().next(now, rule, cause);
        server.rows.clear();
        server.eject(until);
        let seconds = until.since(now).as_secs_f64();
        tracing::warn!(group = self.name(), server = %server.endpoint(), seconds, "ejected: {cause}");
    }

    /// Puts what was found for one entry of the configuration in the place of what was found before. A server that
    /// was there goes on being what it is; one that appears while others serve begins slowly.
    pub(super) fn replace(&self, entry: usize, places: Vec<Place>, now: Instant) {
        let _changing = self.lock();
        let members = self.members.load_full();
        if members.places_of(entry) == places {
            return;
        }
        let mut list: Vec<Member> = Vec::new();
        for other in 0..self.config.servers.len() {
            if other == entry {
                self.settle(&mut list, entry, places.clone(), Some(&members));
            } else {
                let kept = members.list.iter().filter(|member| member.entry == other);
                list.extend(kept.cloned());
            }
        }
        let was_there = |id| members.list.iter().any(|member| member.server.id() == id);
        if !members.list.is_empty() {
            for member in list.iter().filter(|member| !was_there(member.server.id())) {
                member.server.begin_slowly(Moment::of(now));
            }
        }
        self.swap(list);
    }

    /// Adds servers to a list: those already known, or new ones. An endpoint that is there twice counts once.
    fn settle(
        &self,
        list: &mut Vec<Member>,
        entry: usize,
        places: Vec<Place>,
        known: Option<&Members>,
    ) {
        for place in places {
            let there = list
                .iter()
                .any(|member| *member.server.endpoint() == place.endpoint);
            if there || list.len() >= SERVERS_MAX {
                continue;
            }
            let way = &self.ways[entry];
            let before = known.and_then(|known| known.find(&place.endpoint, way));
            let server = match before {
                Some(server) => {
                    server.set_way(Arc::clone(way));
                    server
                }
                None => Arc::new(self.new_server(place.endpoint, Arc::clone(way))),
            };
            list.push(Member {
                server,
                weight: place.weight,
                backup: place.backup,
                entry,
            });
        }
    }

    fn new_server(&self, endpoint: Endpoint, way: Arc<Way>) -> Server {
        let cookie = self
            .config
            .sticky
            .as_ref()
            .map_or_else(Box::default, |config| {
                sticky::value(&self.config.name, &config.secret, &endpoint)
            });
        let hash_seed = balance::stable_hash(endpoint.to_string().as_bytes());
        let server = Server::new(endpoint, way, cookie, hash_seed, self.workers);
        if let Some(health) = &self.config.health {
            server.assume(health.initially_up);
        }
        server
    }

    fn entry_of(&self, address: &super::Address) -> Option<usize> {
        let mut servers = self.config.servers.iter();
        servers.position(|server| server.address == *address)
    }

    fn swap(&self, list: Vec<Member>) {
        let members = Members::new(list, self.workers, self.seed);
        self.members.store(Arc::new(members));
        self.changed.send_modify(|count| *count += 1);
    }

    pub(super) fn members(&self) -> Arc<Members> {
        self.members.load_full()
    }

    /// Sees every later change of the list of servers.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) const fn slow_start(&self) -> Duration {
        self.config.slow_start
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the servers of each entry are spoken to.
fn ways(config: &UpstreamConfig) -> Result<Box<[Arc<Way>]>, TlsError> {
    let load = |tls| UpstreamTls::load(&config.name, tls, config.protocol);
    let tls = config.tls.as_ref().map(load).transpose()?;
    let of_entry = |server: &ServerConfig| {
        Arc::new(Way {
            address: server.address.clone(),
            tls: tls.clone(),
            proxy_protocol: config.proxy_protocol,
        })
    };
    Ok(config.servers.iter().map(of_entry).collect())
}

impl Members {
    fn new(list: Vec<Member>, workers: usize, seed: u64) -> Self {
        let seats = (0..workers.max(1)).map(|worker| {
            let seat = Seat::new(list.len(), balance::mix(seed ^ worker as u64));
            // Each worker begins at another server: else the first would get the first request of every worker.
            for _ in 0..worker % list.len().max(1) {
                balance::round_robin(&seat, |index| u64::from(!list[index].backup));
            }
            seat
        });
        Self {
            seats: seats.collect(),
            list: list.into(),
        }
    }

    /// The server at an endpoint, if connections to it are made for the same name.
    fn find(&self, endpoint: &Endpoint, way: &Way) -> Option<Arc<Server>> {
        let mut members = self.list.iter();
        let found = members.find(|member| {
            let server = &member.server;
            server.endpoint() == endpoint && server.way().address == way.address
        })?;
        Some(Arc::clone(&found.server))
    }

    pub(super) fn places_of(&self, entry: usize) -> Vec<Place> {
        let members = self.list.iter().filter(|member| member.entry == entry);
        members
            .map(|member| Place {
                endpoint: member.server.endpoint().clone(),
                weight: member.weight,
                backup: member.backup,
            })
            .collect()
    }
}

impl<'k> PickKey<'k> {
    /// The key of a request with this head, as it is sent to servers; empty for a raw connection. Looks into the head
    /// only where the group wants something of it.
    pub(crate) fn of(
        group: &Group,
        worker: usize,
        now: Instant,
        client: IpAddr,
        head: &'k [u8],
    ) -> Self {
        let cookie = |name: &str| {
            let mut headers = sticky::fields(head, "cookie");
            headers.find_map(|header| sticky::find(header, name))
        };
        Self {
            worker,
            now,
            client: Some(client),
            hashed: match group.hash_by() {
                None | Some(HashBy::Address) => None,
                Some(HashBy::Cookie(name)) => cookie(name),
                Some(HashBy::Header(name)) => sticky::fields(head, name).next(),
            },
            sticky: group.sticky_cookie().and_then(cookie),
        }
    }

    /// The cookie or header, or else the client's address. A client of IPv6 changes the lower half of its address
    /// as it likes; the upper half is its network.
    fn hash(&self) -> u64 {
        match (self.hashed, self.client) {
            (Some(value), _) => balance::stable_hash(value),
            (None, Some(IpAddr::V4(address))) => balance::stable_hash(&address.octets()),
            (None, Some(IpAddr::V6(address))) => balance::stable_hash(&address.octets()[..8]),
            (None, None) => 0,
        }
    }
}
