//! The files of a hop's containers: trees and images, and what there is to be done to make the target's equal.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::id::ContainerName;

use super::link::{Link, SyncJob};
use crate::config::IMAGES_TREE;
use crate::engine::Host;
use crate::open_files::{self, OpenFiles};
use crate::peer::Part;
use crate::transfer::TreeName;

/// The trees and images of some containers, and the way to the target.
#[derive(Debug, Clone)]
pub(super) struct Trees {
    pub(super) host: Host,
    pub(super) link: Arc<Link>,
    pub(super) containers: Vec<ContainerName>,
}

impl Trees {
    /// A round of every tree beside running containers.
    pub(super) fn live(&self, limit: Duration) -> Result<Vec<SyncJob>, String> {
        self.round(None, limit)
    }

    /// A round of every tree while nothing runs; and whether something may be written all the same.
    pub(super) fn frozen(&self, limit: Duration) -> Result<(Vec<SyncJob>, bool), String> {
        // What any frozen container has open: trees may be shared. A stopped one has nothing.
        let inits = self.containers.iter();
        let open = open_files::of_containers(inits.filter_map(|name| self.host.frozen_init(name)));
        let writes_on = open.writes_on;
        Ok((self.round(Some(open), limit)?, writes_on))
    }

    fn round(&self, frozen: Option<OpenFiles>, limit: Duration) -> Result<Vec<SyncJob>, String> {
        let mut jobs = Vec::new();
        for name in &self.containers {
            for (tree, path) in self.of(name)? {
                jobs.push(self.link.sync(
                    format!("{name}/{tree}"),
                    path,
                    frozen.is_some(),
                    frozen.clone().unwrap_or_default(),
                    limit,
                ));
            }
        }
        Ok(jobs)
    }

    /// The images of a container.
    pub(super) fn images(&self, name: &ContainerName, limit: Duration) -> SyncJob {
        let (tree, path) = (
            format!("{name}/{IMAGES_TREE}"),
            self.host.config.images(name),
        );
        self.link
            .sync(tree, path, true, OpenFiles::default(), limit)
    }

    /// The images of every container.
    pub(super) fn all_images(&self, limit: Duration) -> Vec<SyncJob> {
        let names = self.containers.iter();
        names.map(|name| self.images(name, limit)).collect()
    }

    /// What has to arrive of the trees, and of the images where there are `with_images`.
    pub(super) fn parts(&self, with_images: bool) -> Result<Vec<Part>, String> {
        let mut parts = Vec::new();
        for name in &self.containers {
            let trees = self.of(name)?.into_iter().map(|(tree, _)| tree);
            for tree in trees.chain(with_images.then(|| IMAGES_TREE.to_owned())) {
                let tree = TreeName::new(&format!("{name}/{tree}"));
                parts.push(Part::Tree(tree.map_err(|error| error.to_string())?));
            }
        }
        Ok(parts)
    }

    fn of(&self, name: &ContainerName) -> Result<Vec<(String, PathBuf)>, String> {
        let container = self
            .host
            .container(name)
            .map_err(|error| error.to_string())?;
        let trees = container.trees.iter();
        Ok(trees
            .map(|tree| (tree.name.to_string(), tree.path.clone()))
            .collect())
    }
}

/// Does all of these at once; the bytes that crossed the link.
pub(super) async fn finish(jobs: Vec<SyncJob>) -> Result<u64, String> {
    let mut running = tokio::task::JoinSet::new();
    for job in jobs {
        running.spawn(job);
    }
    let mut bytes = 0;
    while let Some(result) = running.join_next().await {
        bytes += result.map_err(|error| error.to_string())??;
    }
    Ok(bytes)
}
