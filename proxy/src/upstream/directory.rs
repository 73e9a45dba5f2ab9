//! All groups of one configuration, by name.
//!
//! A reload makes a new directory from the old one: servers that are still configured keep their state, their
//! counters and their identity, and with it the connections that workers have kept for them.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use super::address::Address;
use super::group::Group;
use super::sites::Sites;
use crate::config::{UpstreamConfig, UpstreamRef};
use crate::tls::TlsError;

/// All groups of one configuration.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    groups: Vec<Arc<Group>>,
}

impl Directory {
    /// The groups that are configured, and one for each plain address that a service names.
    ///
    /// # Errors
    /// Files for TLS cannot be used.
    pub(crate) fn new(
        upstreams: &[UpstreamConfig],
        plain: impl IntoIterator<Item = Address>,
        workers: usize,
        before: Option<&Self>,
    ) -> Result<Self, TlsError> {
        let mut directory = Self::default();
        let seed = RandomState::new();
        let of_one = plain.into_iter().map(UpstreamConfig::of_one);
        for config in upstreams.iter().cloned().chain(of_one) {
            if directory.group(&config.name).is_some() {
                continue;
            }
            let before = before.and_then(|before| before.group(&config.name));
            let seed = seed.hash_one(&config.name);
            let group = Group::new(config, workers, seed, before.map(Arc::as_ref))?;
            directory.groups.push(Arc::new(group));
        }
        Ok(directory)
    }

    /// A group by its name, or by its plain address.
    pub(crate) fn group(&self, name: &str) -> Option<&Arc<Group>> {
        self.groups.iter().find(|group| group.name() == name)
    }

    /// The groups of a service or a route.
    pub(crate) fn sites(&self, source: &UpstreamRef, target: &UpstreamRef) -> Option<Sites> {
        Some(Sites {
            source: Arc::clone(self.group(&source.name())?),
            target: Arc::clone(self.group(&target.name())?),
        })
    }

    /// In the order of the configuration.
    pub(crate) fn groups(&self) -> &[Arc<Group>] {
        &self.groups
    }
}
