//! A snapshot: everything that one reading of the configuration stands for. It never changes; a reload makes the
//! next one from it and swaps it in, so whoever looks sees one configuration, whole.
//!
//! What must survive a reload is shared by both snapshots: services with their gates, registers and held, and
//! listening sockets with their queues. Making a snapshot changes nothing for clients; it can fail, and is then as
//! if it had never been tried.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use cutover_protocol::id::ServiceName;

use crate::access_log::AccessLog;
use crate::config::{
    Config, ListenAddress, LogConfig, LogTarget, ServiceConfig, TlsConfig, TracesConfig,
    UpstreamRef,
};
use crate::control::events::Events;
use crate::life::inherited::Inherited;
use crate::limit::Guards;
use crate::listen::bound::{Asker, Bound, Kind, Place};
use crate::listen::port::Settings;
use crate::listen::quic::QuicListener;
use crate::listen::quic::secrets::Secrets;
use crate::proxy::StartError;
use crate::service::{Service, StateDir};
use crate::tls::TlsError;
use crate::tls::profile::Profile;
use crate::traces::Traces;
use crate::upstream::{Directory, Sites};

/// The snapshot in force.
pub(crate) type Shared = Arc<ArcSwap<Snapshot>>;

/// One configuration, in use.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// How many configurations there have been, this one included.
    pub(crate) generation: u64,
    pub(crate) config: Config,
    /// In the order of the configuration.
    pub(crate) services: Vec<Serving>,
    /// Whom services and routes go to.
    pub(crate) directory: Directory,
    pub(crate) metrics: Option<Arc<Bound>>,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) traces: Option<Traces>,
    pub(crate) guards: Guards,
    /// TLS profiles, in the order of the configuration.
    pub(crate) profiles: Vec<Arc<Profile>>,
    /// Services that are no longer configured. While connections of one are left, a service of that name is the
    /// same one: two gates for one name could let through what the other holds.
    gone: Vec<Weak<Service>>,
}

/// A service, how it is configured, and its sockets in the order of its listeners.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) service: Arc<Service>,
    pub(crate) config: ServiceConfig,
    pub(crate) sites: Sites,
    /// Those of routes that have servers of their own, by the route's name.
    pub(crate) route_sites: BTreeMap<String, Sites>,
    pub(crate) listeners: Vec<Arc<Bound>>,
    /// The HTTP/3 sides of those that have one, in the same order.
    pub(crate) quic: Vec<Option<Arc<QuicListener>>>,
}

/// What outlives every snapshot.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) state: StateDir,
    pub(crate) logs: Logs,
    pub(crate) guards: Guards,
    pub(crate) events: Events,
}

/// The threads that write access logs and send spans; each ends with the last snapshot that names it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Logs(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Logs {
    pub(crate) fn add(&self, thread: JoinHandle<()>) {
        let mut threads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// All that may still write.
    pub(crate) fn take(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Snapshot {
    /// Takes what is new, keeps what stays.
    ///
    /// # Errors
    /// Something that the configuration names cannot be had.
    pub(crate) fn make(
        config: Config,
        before: Option<&Self>,
        ground: &Ground,
        inherited: &mut Inherited,
    ) -> Result<Self, StartError> {
        let mut sockets = Sockets {
            before,
            inherited,
            workers: config.workers,
            opened: Vec::new(),
        };
        let profiles = load_profiles(&config, before)?;
        let mut listeners = Vec::new();
        for service in &config.services {
            let bound = sockets.of_service(service)?;
            let quic = sockets.quic_of(service, &bound, &config.state_dir)?;
            listeners.push((bound, quic));
        }
        let metrics = config.metrics.map(|address| {
            let asker = Asker {
                service: None,
                turn: 0,
            };
            let address = ListenAddress::Tcp(address);
            sockets.find(Place::new(Kind::Stream, &address, asker), 1)
        });
        let metrics = metrics.transpose()?;
        let access_log = open_log(config.access_log.as_ref(), before, &ground.logs)?;
        let traces = open_traces(config.traces.as_ref(), before, &ground.logs)?;
        let directory = directory(&config, before).map_err(StartError::Tls)?;
        let mut services = Vec::new();
        for (config_of, (listeners, quic)) in config.services.iter().zip(listeners) {
            let known = before.and_then(|before| before.known(&config_of.name));
            let service = match known {
                Some(service) => service,
                None => {
                    let (name, events) = (&config_of.name, ground.events.clone());
                    Arc::new(Service::open(name, &config, &ground.state, events)?)
                }
            };
            services.push(Serving {
                service,
                sites: sites_of(&directory, config_of)?,
                route_sites: route_sites_of(&directory, config_of)?,
                config: config_of.clone(),
                listeners,
                quic,
            });
        }
        let mut snapshot = Self {
            generation: before.map_or(1, |before| before.generation + 1),
            config,
            services,
            directory,
            metrics,
            access_log,
            traces,
            guards: ground.guards.clone(),
            profiles,
            gone: Vec::new(),
        };
        snapshot.gone = before.map_or_else(Vec::new, |before| before.leaves_behind(&snapshot));
        Ok(snapshot)
    }

    /// A service by its name.
    pub(crate) fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.serving(name).map(|serving| &serving.service)
    }

    /// The same with its configuration and sockets.
    pub(crate) fn serving(&self, name: &ServiceName) -> Option<&Serving> {
        let mut services = self.services.iter();
        services.find(|serving| serving.service.name() == name)
    }

    /// A TLS profile by its name.
    pub(crate) fn profile(&self, name: Option<&str>) -> Option<Arc<Profile>> {
        let mut profiles = self.profiles.iter();
        let named = profiles.find(|profile| name == Some(profile.name()));
        named.map(Arc::clone)
    }

    /// Every set of sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &Arc<Bound>> {
        let services = self.services.iter();
        let listeners = services.flat_map(|serving| &serving.listeners);
        let quic = self.quic().map(|(_, listener)| &listener.bound);
        listeners.chain(quic).chain(&self.metrics)
    }

    /// Every listener's HTTP/3 side, with its service.
    pub(crate) fn quic(&self) -> impl Iterator<Item = (&ServiceName, &Arc<QuicListener>)> {
        self.services.iter().flat_map(|serving| {
            let name = serving.service.name();
            serving.quic.iter().flatten().map(move |quic| (name, quic))
        })
    }

    /// Whether anything listens there.
    pub(crate) fn has(&self, place: &Place) -> bool {
        self.sockets().any(|bound| bound.place == *place)
    }

    fn unchanged_profile(&self, config: &TlsConfig) -> Option<Arc<Profile>> {
        let unchanged = self.config.tls.contains(config);
        unchanged
            .then(|| self.profile(Some(&config.name)))
            .flatten()
    }

    fn known(&self, name: &ServiceName) -> Option<Arc<Service>> {
        let gone = || {
            let mut gone = self.gone.iter().filter_map(Weak::upgrade);
            gone.find(|service| service.name() == name)
        };
        self.service(name).map(Arc::clone).or_else(gone)
    }

    /// What of this snapshot is not in the next.
    fn leaves_behind(&self, next: &Self) -> Vec<Weak<Service>> {
        let here = self.services.iter();
        let here = here.map(|serving| Arc::downgrade(&serving.service));
        let all = here.chain(self.gone.iter().cloned());
        let left = |service: &Weak<Service>| {
            let service = service.upgrade();
            service.is_some_and(|service| next.service(service.name()).is_none())
        };
        all.filter(left).collect()
    }
}

impl Serving {
    /// Everybody who may serve it, by a route or without one.
    pub(crate) fn all_sites(&self) -> impl Iterator<Item = &Sites> {
        std::iter::once(&self.sites).chain(self.route_sites.values())
    }

    /// What requests of this service go by.
    pub(crate) fn settings(&self, snapshot: &Snapshot) -> Settings {
        Settings {
            limits: snapshot.config.limits.clone(),
            quic: snapshot.config.quic.clone(),
            service: ServiceConfig {
                routes: self.config.routes.for_worker(),
                ..self.config.clone()
            },
            sites: Rc::new(self.sites.clone()),
            route_sites: self
                .route_sites
                .iter()
                .map(|(name, sites)| (name.clone(), Rc::new(sites.clone())))
                .collect(),
            access_log: snapshot.access_log.clone(),
            traces: snapshot.traces.clone(),
            guards: snapshot.guards.clone(),
            acme: snapshot.config.acme(),
        }
    }
}

/// All groups that are configured, and those of one server that services name by its address.
fn directory(config: &Config, before: Option<&Snapshot>) -> Result<Directory, TlsError> {
    let named = config.services.iter().flat_map(|service| {
        let routes = service.routes.with_servers();
        let of_routes = routes.flat_map(|(_, servers)| [&servers.source, &servers.target]);
        [&service.source, &service.target]
            .into_iter()
            .chain(of_routes)
    });
    let plain = named.filter_map(|named| match named {
        UpstreamRef::Plain(address) => Some(address.clone()),
        UpstreamRef::Group(_) => None,
    });
    let before = before.map(|before| &before.directory);
    Directory::new(&config.upstreams, plain, config.workers, before)
}

fn sites_of(directory: &Directory, service: &ServiceConfig) -> Result<Sites, StartError> {
    let sites = directory.sites(&service.source, &service.target);
    sites.ok_or_else(|| StartError::Upstream {
        service: service.name.clone(),
    })
}

fn route_sites_of(
    directory: &Directory,
    service: &ServiceConfig,
) -> Result<BTreeMap<String, Sites>, StartError> {
    let routes = service.routes.with_servers().map(|(name, servers)| {
        let sites = directory.sites(&servers.source, &servers.target);
        let missing = || StartError::Upstream {
            service: service.name.clone(),
        };
        Ok((name.to_owned(), sites.ok_or_else(missing)?))
    });
    routes.collect()
}

/// Finds or makes the sockets of one configuration.
struct Sockets<'s> {
    before: Option<&'s Snapshot>,
    inherited: &'s mut Inherited,
    workers: usize,
    opened: Vec<Arc<Bound>>,
}

impl Sockets<'_> {
    fn of_service(&mut self, service: &ServiceConfig) -> Result<Vec<Arc<Bound>>, StartError> {
        let mut bound = Vec::new();
        for (turn, listen) in service.listen.iter().enumerate() {
            let asker = Asker {
                service: Some(service.name.clone()),
                turn,
            };
            let place = Place::new(Kind::Stream, &listen.address, asker);
            let failed = format!("service {}", service.name);
            bound.push(self.find_for(place, self.workers, failed)?);
        }
        Ok(bound)
    }

    /// A listener that goes on keeps its connections, and so its router; a new one is on the port of its TCP side,
    /// also where the kernel chose that.
    fn quic_of(
        &mut self,
        service: &ServiceConfig,
        bound: &[Arc<Bound>],
        state_dir: &Path,
    ) -> Result<Vec<Option<Arc<QuicListener>>>, StartError> {
        let mut quic = Vec::new();
        for (turn, (listen, tcp)) in service.listen.iter().zip(bound).enumerate() {
            if !listen.http3 {
                quic.push(None);
                continue;
            }
            let asker = Asker {
                service: Some(service.name.clone()),
                turn,
            };
            let place = Place::new(Kind::Datagram, &tcp.shown(), asker);
            let mut before = self.before.iter().flat_map(|before| before.quic());
            if let Some((_, known)) = before.find(|(_, quic)| quic.bound.place == place) {
                quic.push(Some(Arc::clone(known)));
                continue;
            }
            let what = format!("HTTP/3 of service {}", service.name);
            let failed = |source| StartError::Listen {
                address: listen.address.clone(),
                what: what.clone(),
                source,
            };
            let predecessor = self.inherited.take_succession(&place);
            let bound = self.find_for(place, self.workers, what.clone())?;
            let secrets = Secrets::open(state_dir)?;
            let listener = QuicListener::open(bound, self.workers, &secrets, predecessor);
            quic.push(Some(Arc::new(listener.map_err(failed)?)));
        }
        Ok(quic)
    }

    fn find(&mut self, place: Place, workers: usize) -> Result<Arc<Bound>, StartError> {
        self.find_for(place, workers, "metrics".to_owned())
    }

    fn find_for(
        &mut self,
        place: Place,
        workers: usize,
        what: String,
    ) -> Result<Arc<Bound>, StartError> {
        let mut before = self.before.iter().flat_map(|before| before.sockets());
        if let Some(bound) = before.find(|bound| bound.place == place) {
            return Ok(Arc::clone(bound));
        }
        let may_share = self.has_port_of(&place.address);
        let address = place.address.clone();
        let bound = match self.inherited.take(&place) {
            Some((keeper, sockets)) => Bound::inherit(place, keeper, sockets, workers),
            None => Bound::open(place, workers, may_share),
        };
        let bound = Arc::new(bound.map_err(|source| StartError::Listen {
            address,
            what,
            source,
        })?);
        self.opened.push(Arc::clone(&bound));
        Ok(bound)
    }

    /// A listener that moves from all addresses to one keeps its port while both are open.
    fn has_port_of(&self, address: &ListenAddress) -> bool {
        let ListenAddress::Tcp(wanted) = address else {
            return false;
        };
        let before = self.before.iter().flat_map(|before| before.sockets());
        let ports = before.filter_map(|bound| bound.address);
        ports.into_iter().any(|ours| ours.port() == wanted.port())
    }
}

/// A profile that is configured as before looks after its files by itself, and goes on knowing its tickets.
fn load_profiles(
    config: &Config,
    before: Option<&Snapshot>,
) -> Result<Vec<Arc<Profile>>, StartError> {
    let load = |config_of: &TlsConfig| {
        let known = before.and_then(|before| before.unchanged_profile(config_of));
        known.map_or_else(|| Profile::load(config_of).map_err(StartError::Tls), Ok)
    };
    config.tls.iter().map(load).collect()
}

/// A reload opens the log anew even where nothing changed: that is how logs are rotated.
fn open_log(
    config: Option<&LogConfig>,
    before: Option<&Snapshot>,
    logs: &Logs,
) -> Result<Option<AccessLog>, StartError> {
    let Some(config) = config else {
        return Ok(None);
    };
    let before = before.and_then(|before| before.access_log.as_ref());
    let (log, thread) =
        AccessLog::open(config, before).map_err(|source| StartError::AccessLog {
            path: match &config.target {
                LogTarget::Stdout => "stdout".into(),
                LogTarget::File(path) => path.clone(),
            },
            source,
        })?;
    logs.add(thread);
    Ok(Some(log))
}

fn open_traces(
    config: Option<&TracesConfig>,
    before: Option<&Snapshot>,
    logs: &Logs,
) -> Result<Option<Traces>, StartError> {
    let Some(config) = config else {
        return Ok(None);
    };
    let before = before.and_then(|before| before.traces.as_ref());
    let opened = Traces::open(config, before).map_err(|source| StartError::Traces {
        endpoint: config.endpoint.clone(),
        source,
    });
    let (traces, thread) = opened?;
    thread.into_iter().for_each(|thread| logs.add(thread));
    Ok(Some(traces))
}
