//! Reading the configuration anew while everything goes on: validated first, then swapped in whole.
//!
//! The steps are in the order of what can fail: the file, what must not change, what is being held, what the system
//! gives (sockets, files). Only then is the new snapshot put in force, and that cannot fail. Until then nothing has
//! changed for anybody.

use std::path::PathBuf;
use std::sync::Arc;

use cutover_protocol::id::{Register, ServiceName};

use super::Running;
use super::inherited::Inherited;
use super::supervisor;
use crate::config::{Config, ConfigError, ListenAddress};
use crate::control::words::{ProcessRefusal, Reloaded};

use crate::proxy::StartError;
use crate::service::{GateLimits, Mode};
use crate::snapshot::Snapshot;

/// Why the old configuration stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The file is not a configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It changes what a process cannot change.
    #[error(
        "{what} cannot change from {before} to {after} while the proxy runs; restart it, or leave {what} as it is"
    )]
    NeedsRestart {
        /// The key.
        what: &'static str,
        /// Its value now.
        before: String,
        /// Its value in the file.
        after: String,
    },
    /// It leaves out a service that must not go now.
    #[error("service {service} is not in the file, but its gate is not open (epoch {}, owner {}); let the hop end first", .register.epoch, .register.owner)]
    InHop {
        /// The service.
        service: ServiceName,
        /// Its register.
        register: Register,
    },
    /// The system does not give what it asks for.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl ReloadError {
    /// The class of it, for a program.
    #[must_use]
    pub const fn reason(&self) -> ProcessRefusal {
        match self {
            Self::Config(_) | Self::NeedsRestart { .. } => ProcessRefusal::Configuration,
            Self::InHop { .. } => ProcessRefusal::Busy,
            Self::Start(_) => ProcessRefusal::Failed,
        }
    }
}

impl Running {
    /// Reads the file again and goes by it, or says why not.
    ///
    /// # Cancel safety
    /// Once the new snapshot is in force it stays so; some workers may then hear of it only with the next reload.
    pub(crate) async fn reload(&self) -> Result<Reloaded, ReloadError> {
        let _turn = self.turn.lock().await;
        supervisor::reloading();
        let outcome = self.put_next_in_force();
        match &outcome {
            Ok((next, done)) => {
                self.tell_workers(next).await;
                self.facts.reloaded();
                tracing::info!(target: "audit", generation = done.generation, services_added = %list(&done.services_added), services_removed = %list(&done.services_removed), listeners_added = %list(&done.listeners_added), listeners_removed = %list(&done.listeners_removed), "reloaded");
            }
            Err(error) => {
                let why = super::chain(error);
                tracing::error!(target: "audit", "not reloaded, the configuration stays as it is: {why}");
                self.facts.refused(why);
            }
        }
        supervisor::ready(&self.shared.load());
        outcome.map(|(_, done)| done)
    }

    /// Everything but the workers. No await: no command can come between a check and what relies on it.
    fn put_next_in_force(&self) -> Result<(Arc<Snapshot>, Reloaded), ReloadError> {
        let before = self.shared.load_full();
        let config = Config::load(&before.config.file)?;
        check_fixed(&before.config, &config)?;
        check_removed(&before, &config)?;
        let nothing = &mut Inherited::default();
        let next = Snapshot::make(config, Some(&before), &self.ground, nothing)?;
        let next = Arc::new(next);
        let done = compare(&before, &next);
        self.shared.store(Arc::clone(&next));
        for serving in &next.services {
            let limits = GateLimits::of(&next.config, serving.service.name());
            serving.service.gate.limit(limits);
        }
        self.permits.set(next.config.limits.connections_max);
        self.tend(&next);
        remove_socket_files(&before, &next);
        Ok((next, done))
    }
}

/// What other processes, or the shape of this one, depend on.
fn check_fixed(before: &Config, after: &Config) -> Result<(), ReloadError> {
    let path = |path: &PathBuf| path.display().to_string();
    let fixed = [
        ("state_dir", path(&before.state_dir), path(&after.state_dir)),
        ("control", path(&before.control), path(&after.control)),
        (
            "workers",
            before.workers.to_string(),
            after.workers.to_string(),
        ),
    ];
    for (what, before, after) in fixed {
        if before != after {
            return Err(ReloadError::NeedsRestart {
                what,
                before,
                after,
            });
        }
    }
    Ok(())
}

/// A service whose gate is not open is in a hop: somebody counts on its register and its held.
fn check_removed(before: &Snapshot, config: &Config) -> Result<(), ReloadError> {
    for serving in &before.services {
        let service = &serving.service;
        let stays = config
            .services
            .iter()
            .any(|next| next.name == *service.name());
        let word = service.gate.word();
        if !stays && word.mode != Mode::Open {
            return Err(ReloadError::InHop {
                service: service.name().clone(),
                register: word.register,
            });
        }
    }
    Ok(())
}

fn compare(before: &Snapshot, next: &Snapshot) -> Reloaded {
    let services = |of: &Snapshot, without: &Snapshot| {
        let names = of.services.iter().map(|serving| serving.service.name());
        let only = names.filter(|name| without.service(name).is_none());
        only.cloned().collect()
    };
    let listeners = |of: &Snapshot, without: &Snapshot| {
        let only = of.sockets().filter(|bound| !without.has(&bound.place));
        only.map(|bound| bound.shown().to_string()).collect()
    };
    Reloaded {
        generation: next.generation,
        services_added: services(next, before),
        services_removed: services(before, next),
        listeners_added: listeners(next, before),
        listeners_removed: listeners(before, next),
    }
}

/// The file of a unix socket that is no longer served: who comes now is told that nobody is there.
fn remove_socket_files(before: &Snapshot, next: &Snapshot) {
    for bound in before.sockets() {
        if let ListenAddress::Unix(path) = &bound.place.address
            && !next.has(&bound.place)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!("cannot remove the socket {}: {error}", path.display());
        }
    }
}

fn list<T: ToString>(entries: &[T]) -> String {
    let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
    entries.join(",")
}
