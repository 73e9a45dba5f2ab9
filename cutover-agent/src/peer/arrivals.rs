//! What has arrived whole in a session, for requests that wait for it.

use std::collections::HashMap;
use std::future::Future;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::transfer::TreeName;

/// Something that arrives whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Part {
    /// A round of a tree, sealed.
    Tree(TreeName),
    /// The images of a container's memory, sealed.
    Memory(String),
}

/// How often each part has arrived in one session.
#[derive(Debug, Default)]
pub(crate) struct Arrivals(watch::Sender<HashMap<Part, u64>>);

impl Arrivals {
    /// Counts a part that has arrived.
    pub(crate) fn note(&self, part: Part) {
        self.0
            .send_modify(|seen| *seen.entry(part).or_default() += 1);
    }

    /// Waits until each of these parts has arrived once more than by the time of this call.
    pub(crate) fn after(&self, parts: &[Part]) -> impl Future<Output = ()> + Send + use<> {
        let mut seen = self.0.subscribe();
        let count = |seen: &HashMap<Part, u64>, part: &Part| seen.get(part).copied().unwrap_or(0);
        let wanted: Vec<(Part, u64)> = {
            let now = seen.borrow();
            let next = |part: &Part| (part.clone(), count(&now, part) + 1);
            parts.iter().map(next).collect()
        };
        async move {
            let is_there = |seen: &HashMap<Part, u64>| {
                wanted
                    .iter()
                    .all(|(part, times)| count(seen, part) >= *times)
            };
            if seen.wait_for(is_there).await.is_err() {
                // The session is over, and with it whoever waits.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn only_what_arrives_from_now_on_counts() {
        let arrivals = Arrivals::default();
        let tree = Part::Tree(TreeName::new("db/volume").unwrap());
        let memory = Part::Memory("db".to_owned());
        arrivals.note(tree.clone());
        let mut waiting = pin!(arrivals.after(&[tree.clone(), memory.clone()]));
        let mut is_over = async || {
            poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_ready())).await
        };
        assert!(!is_over().await);
        arrivals.note(memory);
        assert!(!is_over().await);
        arrivals.note(tree);
        assert!(is_over().await);
    }
}
