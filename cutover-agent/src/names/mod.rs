//! Names: where clients are told to find a service. Before a hop their time to live is lowered, after its commit they
//! are turned to the target, in the plan's manner, and when the old door is closed they live as long as before. What is
//! wanted when is decided in `cutover_protocol::door`; this module makes it so, tries again, and remembers.
//!
//! A name server that does not answer never holds up a hop that has committed: the source forwards whoever comes.

pub mod cloud;
mod provider;
pub mod update;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use cutover_protocol::door::{self, Closing, Pointing, Redirect, Seen};
use cutover_protocol::id::{HopId, ServiceName, Site};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::config::{Config, Keeper};
use crate::durable;
use crate::preflight::now_ms;
use crate::proxy::Proxy;
use cloud::CloudZones;
pub use provider::{Provider, ProviderError, Rfc2136, Setting};

/// How often names are brought to where they should be, and the old door is looked at.
const PAUSE: Duration = Duration::from_secs(1);

/// Seconds for which resolvers are taken to remember names that are not ours to turn.
const TTL_UNKNOWN_S: u32 = 300;

/// One name of this site's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// The name that clients look up.
    pub name: String,
    /// The zone it is in.
    pub zone: String,
    /// For how long resolvers may remember it when there is no hop, in seconds.
    pub ttl_s: u32,
    /// Where clients find the source.
    pub source: Vec<IpAddr>,
    /// Where clients find the target.
    pub target: Vec<IpAddr>,
}

impl Name {
    fn addresses(&self, pointing: Pointing) -> Vec<IpAddr> {
        match pointing {
            Pointing::Source => self.source.clone(),
            Pointing::Target => self.target.clone(),
            Pointing::Both => self.source.iter().chain(&self.target).copied().collect(),
        }
    }
}

/// What is remembered of a hop's names, across restarts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Turning {
    hop: HopId,
    redirect: Redirect,
    step_s: u64,
    services: Vec<ServiceName>,
    /// Milliseconds since 1970; none before the commit.
    committed_at_ms: Option<u64>,
    /// Where each name points, as far as we have been told that it does.
    pointing: Vec<Pointing>,
}

/// The old door, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldDoor {
    /// The hop that made it the old one.
    pub hop: HopId,
    /// Requests that came by it since the commit.
    pub requests: u64,
    /// Requests under way by it now.
    pub now: u64,
    /// Seconds since somebody last came.
    pub quiet_s: u64,
    /// When it can be closed.
    pub closing: Closing,
    /// Each name, and where it points.
    pub names: Vec<(String, Pointing)>,
}

/// What the proxy has been seen to do since the commit.
#[derive(Debug, Clone, Copy, Default)]
struct Watched {
    base: Option<u64>,
    requests: u64,
    now: u64,
    last_ms: u64,
}

/// The agent cannot turn names.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The key is no key.
    #[error("{path} holds no secret in base64: `tsig-keygen` and `keymgr -t` make one")]
    Secret {
        /// The file.
        path: PathBuf,
    },
    /// A name is none.
    #[error("[dns]: {0}")]
    Name(#[from] update::UpdateError),
    /// The key is not this cloud's.
    #[error(transparent)]
    Cloud(#[from] cloud::KeyError),
}

/// This site's names.
#[derive(Debug)]
pub struct Names {
    path: PathBuf,
    names: Vec<Name>,
    ttl_moving_s: u32,
    provider: Option<Arc<dyn Provider>>,
    turning: Mutex<Option<Turning>>,
    watched: Mutex<Watched>,
}

impl Names {
    /// The names of a configuration, with what an earlier life of this agent remembered.
    ///
    /// # Errors
    /// [`NamesError`].
    pub fn load(config: &Config) -> Result<Self, NamesError> {
        let Some(dns) = &config.dns else {
            return Self::new(&config.state_dir, Vec::new(), TTL_UNKNOWN_S, None);
        };
        let path = &dns.key_file;
        let text = std::fs::read_to_string(path).map_err(|source| NamesError::Read {
            path: path.clone(),
            source,
        })?;
        let provider: Arc<dyn Provider> = match &dns.keeper {
            Keeper::Rfc2136 { server, key_name } => {
                let secret = base64::engine::general_purpose::STANDARD.decode(text.trim());
                let secret = secret.map_err(|_| NamesError::Secret { path: path.clone() })?;
                Arc::new(Rfc2136 {
                    server: *server,
                    key: update::TsigKey::new(key_name, secret)?,
                })
            }
            Keeper::Cloud { cloud, endpoint } => {
                Arc::new(CloudZones::new(*cloud, path, &text, endpoint.as_deref())?)
            }
        };
        Self::new(
            &config.state_dir,
            dns.names.clone(),
            dns.ttl_moving_s,
            Some(provider),
        )
    }

    /// Names with whoever keeps them.
    ///
    /// # Errors
    /// When what was remembered cannot be read.
    pub fn new(
        state_dir: &Path,
        names: Vec<Name>,
        ttl_moving_s: u32,
        provider: Option<Arc<dyn Provider>>,
    ) -> Result<Self, NamesError> {
        let path = state_dir.join("names.json");
        let turning = durable::read_json(&path).map_err(|source| NamesError::Read {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            names,
            ttl_moving_s,
            provider,
            turning: Mutex::new(turning),
            watched: Mutex::default(),
        })
    }

    /// Before a hop: names keep their addresses and live shortly.
    ///
    /// # Errors
    /// One line for a person.
    pub async fn prepare(
        &self,
        hop: &HopId,
        redirect: (Redirect, u64),
        services: Vec<ServiceName>,
    ) -> Result<(), String> {
        for name in &self.names {
            self.set(name, Pointing::Source, self.ttl_moving_s).await?;
        }
        let turning = Turning {
            hop: hop.clone(),
            redirect: redirect.0,
            step_s: redirect.1,
            services,
            committed_at_ms: None,
            pointing: vec![Pointing::Source; self.names.len()],
        };
        self.keep(&mut *self.turning.lock().await, Some(turning))
    }

    /// The hop was undone: names live as long as before.
    ///
    /// # Errors
    /// One line for a person; it may be tried again.
    pub async fn give_up(&self, hop: &HopId) -> Result<(), String> {
        let mut turning = self.turning.lock().await;
        if turning.as_ref().is_none_or(|turning| &turning.hop != hop) {
            return Ok(());
        }
        for name in &self.names {
            self.set(name, Pointing::Source, name.ttl_s).await?;
        }
        self.keep(&mut turning, None)
    }

    /// The hop has committed: names are turned from now on. May be repeated.
    ///
    /// # Errors
    /// When that cannot be remembered.
    pub async fn commit(&self, hop: &HopId) -> Result<(), String> {
        let mut turning = self.turning.lock().await;
        let Some(current) = turning.as_ref().filter(|turning| &turning.hop == hop) else {
            return Ok(());
        };
        let mut new = current.clone();
        new.committed_at_ms.get_or_insert_with(now_ms);
        self.keep(&mut turning, Some(new))
    }

    /// Brings names to where they should be and looks at the old door, for ever.
    pub async fn follow(&self, proxy: Option<&Path>) {
        let mut ticks = tokio::time::interval(PAUSE);
        let mut told = String::new();
        loop {
            ticks.tick().await;
            if let Err(message) = self.turn().await
                && message != told
            {
                tracing::warn!("names are not turned yet: {message}");
                told = message;
            }
            if let Some(proxy) = proxy {
                self.watch(proxy).await;
            }
        }
    }

    async fn turn(&self) -> Result<(), String> {
        let Some(turning) = self.turning.lock().await.clone() else {
            return Ok(());
        };
        let Some(since_s) = since_s(&turning) else {
            return Ok(());
        };
        for (index, name) in self.names.iter().enumerate() {
            let wanted = turning
                .redirect
                .pointing(index as u64, Some(since_s), turning.step_s);
            if turning.pointing.get(index) != Some(&wanted) {
                self.set(name, wanted, self.ttl_moving_s).await?;
                tracing::info!(name = name.name, pointing = ?wanted, "a name was turned");
                self.note(&turning.hop, index, wanted).await?;
            }
        }
        Ok(())
    }

    async fn note(&self, hop: &HopId, index: usize, pointing: Pointing) -> Result<(), String> {
        let mut turning = self.turning.lock().await;
        let Some(mut new) = turning.clone().filter(|turning| &turning.hop == hop) else {
            return Ok(());
        };
        new.pointing.resize(self.names.len(), Pointing::Source);
        new.pointing[index] = pointing;
        self.keep(&mut turning, Some(new))
    }

    async fn watch(&self, proxy: &Path) {
        let Some(turning) = self.turning.lock().await.clone() else {
            return;
        };
        if turning.committed_at_ms.is_none() {
            return;
        }
        let (mut requests, mut now) = (0, 0);
        for service in &turning.services {
            // A proxy that does not answer lets nobody in either.
            if let Ok(status) = Proxy::new(proxy).status(service).await {
                let at_target = status
                    .servers
                    .iter()
                    .filter(|server| server.site == Site::Target);
                requests += at_target.map(|server| server.requests).sum::<u64>();
                now += status.in_flight;
            }
        }
        let mut watched = self.watched.lock().await;
        // What came before we looked counts as having come just now.
        let base = *watched.base.get_or_insert(requests);
        let came = requests.saturating_sub(base);
        if came != watched.requests || now > 0 || watched.last_ms == 0 {
            watched.last_ms = now_ms();
        }
        (watched.requests, watched.now) = (came, now);
    }

    /// The old door, after a commit.
    pub async fn old_door(&self) -> Option<OldDoor> {
        let turning = self.turning.lock().await.clone()?;
        let since_s = since_s(&turning)?;
        let watched = *self.watched.lock().await;
        let quiet_s = match watched.last_ms {
            0 => 0,
            last => now_ms().saturating_sub(last) / 1000,
        };
        let seen = Seen {
            since_s,
            quiet_s,
            now: watched.now,
        };
        let turned_s = turning
            .redirect
            .turned_s(self.names.len() as u64, turning.step_s);
        let pointed = self.names.iter().map(|name| name.name.clone());
        Some(OldDoor {
            hop: turning.hop,
            requests: watched.requests,
            now: watched.now,
            quiet_s,
            closing: door::closing(seen, turned_s, u64::from(self.ttl_moving_s)),
            names: pointed.zip(turning.pointing).collect(),
        })
    }

    /// The old door is closed: names point to the target and live as long as before.
    ///
    /// # Errors
    /// One line for a person; it may be tried again.
    pub async fn retire(&self) -> Result<(), String> {
        let mut turning = self.turning.lock().await;
        if turning.is_some() {
            for name in &self.names {
                self.set(name, Pointing::Target, name.ttl_s).await?;
            }
            self.keep(&mut turning, None)?;
            *self.watched.lock().await = Watched::default();
        }
        Ok(())
    }

    async fn set(&self, name: &Name, pointing: Pointing, ttl_s: u32) -> Result<(), String> {
        let Some(provider) = &self.provider else {
            return Ok(());
        };
        let addresses = name.addresses(pointing);
        let change = update::Change {
            zone: &name.zone,
            name: &name.name,
            addresses: &addresses,
            ttl_s,
        };
        let set = provider.set(change).await;
        set.map_err(|error| format!("{}: {error}", name.name))
    }

    fn keep(&self, slot: &mut Option<Turning>, new: Option<Turning>) -> Result<(), String> {
        durable::write_json(&self.path, &new)
            .map_err(|error| format!("cannot keep {}: {error}", self.path.display()))?;
        *slot = new;
        Ok(())
    }
}

fn since_s(turning: &Turning) -> Option<u64> {
    let at_ms = turning.committed_at_ms?;
    Some(now_ms().saturating_sub(at_ms) / 1000)
}
