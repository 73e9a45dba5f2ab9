//! The tasks that look after a directory's groups: they resolve names and check servers, on the control thread.
//!
//! Workers never wait for any of this. What was found stays with the servers when the tasks end, so that a reload
//! goes on where it was.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::directory::Directory;
use super::group::Group;
use super::health;
use super::resolve::{self, Resolver};
use crate::config::ResolverConfig;
use crate::service::Gate;

/// The tasks of one directory. Dropped, it ends them.
#[derive(Debug)]
pub(crate) struct Care {
    _tasks: JoinSet<()>,
}

impl Care {
    /// Begins to look after all groups; must be called inside the control thread's local set. `gates_of` names the
    /// gates of the services that a group serves.
    pub(crate) fn begin(
        directory: &Directory,
        config: &ResolverConfig,
        gates_of: impl Fn(&Arc<Group>) -> Vec<Arc<Gate>>,
    ) -> Self {
        let mut tasks = JoinSet::new();
        for group in directory.groups() {
            tasks.spawn_local(health::watch(Arc::clone(group), gates_of(group)));
        }
        let names = named(directory);
        match resolver(&names, config) {
            Some(resolver) => {
                for (group, entry) in names {
                    tasks.spawn_local(resolve::keep(Arc::clone(&resolver), group, entry));
                }
            }
            // Nobody need wait for what will not come.
            None => names.iter().for_each(|(group, _)| group.note_resolved()),
        }
        Self { _tasks: tasks }
    }
}

/// Every entry of every group that has to be resolved.
fn named(directory: &Directory) -> Vec<(Arc<Group>, usize)> {
    let mut names = Vec::new();
    for group in directory.groups() {
        for (entry, server) in group.config().servers.iter().enumerate() {
            if server.address.endpoint().is_none() {
                names.push((Arc::clone(group), entry));
            }
        }
    }
    names
}

fn resolver(names: &[(Arc<Group>, usize)], config: &ResolverConfig) -> Option<Arc<Resolver>> {
    if names.is_empty() {
        return None;
    }
    match Resolver::new(config) {
        Ok(resolver) => Some(Arc::new(resolver)),
        Err(error) => {
            tracing::error!(
                "no name of a server can be resolved: {error}; check /etc/resolv.conf, or name servers in [resolver]"
            );
            None
        }
    }
}
