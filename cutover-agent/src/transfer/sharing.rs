//! Which tree of a session goes first where several have files in common: containers that are made of the same application
//! often have it each in a volume of its own. What one tree has brought to the target the others find there
//! ([`super::seeds`]), so a tree that lacks mostly what another one is bringing waits until that one is there. All of them
//! share one link, so nothing is lost by it while the link is full.
//!
//! Sizes of files are all that is compared: whether the contents are equal the target's digests say. No tree ever waits for
//! one that was planned later, so they never wait in a circle.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;

use super::plan::Plan;
use super::{Origin, SyncOptions, TreeName, Writers};

/// Less than this in common is rather sent twice than waited for: even 10 Mbit/s carry it in a second.
const COMMON_BYTES_MIN: u64 = 1 << 20;

/// The trees of a session whose first rounds are under way, in the order in which they were planned.
#[derive(Debug, Default)]
pub(super) struct Ranks(Mutex<Standings>);

/// A tree's place among them, for as long as its round is tried. When it is dropped nobody waits for the tree any more.
#[derive(Debug)]
pub(super) struct Rank<'a> {
    ranks: &'a Ranks,
    tree: &'a TreeName,
    /// Whether it waits, and others wait for it. Images are like nothing else, and while all is frozen nobody waits.
    may_share: bool,
    /// Its number, and where it is told that the tree is sealed. Kept when the round is done again: who waits for the tree
    /// goes on waiting.
    place: OnceLock<(u64, watch::Sender<bool>)>,
}

/// The files of a tree, by their sizes.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// Of all files.
    has: HashSet<u64>,
    /// Bytes in files of each size that the target lacks.
    lacks: HashMap<u64, u64>,
}

#[derive(Debug, Default)]
struct Standings {
    last: u64,
    underway: BTreeMap<u64, Bringing>,
    /// Trees of which the target has had a round.
    sealed: HashSet<TreeName>,
}

/// A tree that is on its way.
#[derive(Debug, Clone)]
struct Bringing {
    tree: TreeName,
    sizes: Arc<HashSet<u64>>,
    /// Closed when the round is over, whichever way.
    is_sealed: watch::Receiver<bool>,
}

impl Sizes {
    /// What a plan says of its tree.
    pub(super) fn of(plan: &Plan) -> Self {
        let mut lacks = HashMap::new();
        for size in plan.new_file_sizes() {
            *lacks.entry(size).or_default() += size;
        }
        Self {
            has: plan.file_sizes().collect(),
            lacks,
        }
    }

    /// Bytes that are lacked and may be in files of these sizes.
    fn common(&self, sizes: &HashSet<u64>) -> u64 {
        let lacks = self.lacks.iter();
        let common = lacks.filter(|(size, _)| sizes.contains(size));
        common.map(|(_, bytes)| bytes).sum()
    }

    /// Whether files of these sizes may be at least half of what is lacked.
    fn is_mostly_in(&self, sizes: &HashSet<u64>) -> bool {
        let (common, all) = (self.common(sizes), self.lacks.values().sum::<u64>());
        common >= COMMON_BYTES_MIN && common >= all / 2
    }
}

impl Ranks {
    /// Has a tree take part; it has no place before it [waits](Rank::wait).
    pub(super) fn enter<'a>(&'a self, tree: &'a TreeName, options: &SyncOptions) -> Rank<'a> {
        Rank {
            ranks: self,
            tree,
            may_share: options.origin == Origin::Ask && options.writers == Writers::Running,
            place: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Standings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rank<'_> {
    /// Whose it is.
    pub(super) const fn tree(&self) -> &TreeName {
        self.tree
    }

    /// Whether to [wait](Self::wait) for other trees at all.
    pub(super) const fn may_share(&self) -> bool {
        self.may_share
    }

    /// Waits while a tree that was planned before this one brings most of what this one lacks, and says whether the target
    /// has got any other tree. One that fails is not waited for, nor one that is given up.
    ///
    /// # Cancel safety
    /// Safe; the place is kept until the rank is dropped.
    pub(super) async fn wait(&self, mut sizes: Sizes) -> bool {
        for mut other in self.line_up(std::mem::take(&mut sizes.has)) {
            if !sizes.is_mostly_in(&other.sizes) {
                continue;
            }
            tracing::debug!(tree = %self.tree, other = %other.tree, "waits for files that both may have");
            let sealing = other.is_sealed.wait_for(|is_sealed| *is_sealed);
            if sealing.await.is_ok() {
                sizes.lacks.retain(|size, _| !other.sizes.contains(size));
            }
        }
        let standings = self.ranks.lock();
        standings.sealed.iter().any(|other| other != self.tree)
    }

    /// Takes a place behind all others, unless it has one; gives those that are before it.
    fn line_up(&self, has: HashSet<u64>) -> Vec<Bringing> {
        let mut standings = self.ranks.lock();
        let (number, _) = self.place.get_or_init(|| {
            let (tell, is_sealed) = watch::channel(false);
            standings.last += 1;
            let number = standings.last;
            let bringing = Bringing {
                tree: self.tree.clone(),
                sizes: Arc::new(has),
                is_sealed,
            };
            standings.underway.insert(number, bringing);
            (number, tell)
        });
        let earlier = standings.underway.range(..*number);
        earlier.map(|(_, other)| other.clone()).collect()
    }

    /// Tells those who wait that the target has the tree.
    pub(super) fn seal(&self) {
        if !self.may_share {
            return;
        }
        self.ranks.lock().sealed.insert(self.tree.clone());
        if let Some((_, tell)) = self.place.get() {
            tell.send_replace(true);
        }
    }
}

impl Drop for Rank<'_> {
    fn drop(&mut self) {
        if let Some((number, _)) = self.place.get() {
            self.ranks.lock().underway.remove(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn tree(name: &str) -> TreeName {
        TreeName::new(name).unwrap()
    }

    fn live() -> SyncOptions {
        SyncOptions::live(Duration::from_secs(1))
    }

    /// A tree with one file of each size, of which the target has none.
    fn new(sizes: &[u64]) -> Sizes {
        Sizes {
            has: sizes.iter().copied().collect(),
            lacks: sizes.iter().map(|size| (*size, *size)).collect(),
        }
    }

    async fn is_over(mut waiting: std::pin::Pin<&mut impl Future<Output = bool>>) -> Option<bool> {
        poll_fn(|context| {
            Poll::Ready(match waiting.as_mut().poll(context) {
                Poll::Ready(has_others) => Some(has_others),
                Poll::Pending => None,
            })
        })
        .await
    }

    #[tokio::test]
    async fn a_tree_waits_for_the_first_that_brings_most_of_it_and_for_none_after_it() {
        let (ranks, names) = (Ranks::default(), ["a/x", "b/x", "c/x"].map(tree));
        let [first, second, third] = names.each_ref().map(|name| ranks.enter(name, &live()));
        let has = || new(&[2 * MIB, 3 * MIB]);
        assert!(!first.wait(has()).await);
        let (mut one, mut other) = (pin!(second.wait(has())), pin!(third.wait(has())));
        assert_eq!(is_over(one.as_mut()).await, None);
        assert_eq!(is_over(other.as_mut()).await, None);
        // Done again, it is still before them.
        assert!(!first.wait(has()).await);
        first.seal();
        assert_eq!(is_over(other.as_mut()).await, Some(true));
        assert_eq!(is_over(one.as_mut()).await, Some(true));
    }

    #[tokio::test]
    async fn a_tree_that_fails_or_is_given_up_is_waited_for_no_longer() {
        let (ranks, names) = (Ranks::default(), ["a/x", "b/x", "c/x"].map(tree));
        let [first, second, third] = names.each_ref().map(|name| ranks.enter(name, &live()));
        let has = || new(&[2 * MIB]);
        assert!(!first.wait(has()).await);
        let (mut one, mut other) = (Box::pin(second.wait(has())), pin!(third.wait(has())));
        assert_eq!(is_over(one.as_mut()).await, None);
        assert_eq!(is_over(other.as_mut()).await, None);
        drop(first);
        assert_eq!(is_over(other.as_mut()).await, None, "the second is next");
        assert_eq!(is_over(one.as_mut()).await, Some(false));
        drop(one);
        drop(second);
        assert_eq!(is_over(other.as_mut()).await, Some(false));
        assert!(ranks.lock().underway.len() == 1);
    }

    #[tokio::test]
    async fn little_in_common_is_not_waited_for() {
        let (ranks, names) = (Ranks::default(), ["a/x", "b/x", "c/x"].map(tree));
        let [first, second, third] = names.each_ref().map(|name| ranks.enter(name, &live()));
        assert!(!first.wait(new(&[MIB - 1, 2 * MIB])).await);
        assert!(!second.wait(new(&[MIB - 1])).await, "few bytes");
        assert!(
            !third.wait(new(&[2 * MIB, 3 * MIB])).await,
            "less than half"
        );
    }

    #[tokio::test]
    async fn what_one_has_brought_is_not_waited_for_again() {
        let (ranks, names) = (Ranks::default(), ["a/x", "b/x", "c/x"].map(tree));
        let [first, second, third] = names.each_ref().map(|name| ranks.enter(name, &live()));
        assert!(!first.wait(new(&[4 * MIB, 5 * MIB])).await);
        assert!(!second.wait(new(&[3 * MIB, 5 * MIB, 6 * MIB])).await);
        let mut waiting = pin!(third.wait(new(&[4 * MIB, 5 * MIB])));
        assert_eq!(is_over(waiting.as_mut()).await, None);
        first.seal();
        drop(first);
        assert_eq!(is_over(waiting.as_mut()).await, Some(true));
    }

    #[tokio::test]
    async fn images_are_like_nothing_else_and_nobody_waits_while_all_is_frozen() {
        let (ranks, name) = (Ranks::default(), tree("a/images"));
        let limit = Duration::from_secs(1);
        let frozen = SyncOptions::frozen(limit, HashSet::new());
        for options in [SyncOptions::images(limit), frozen] {
            let rank = ranks.enter(&name, &options);
            assert!(!rank.may_share());
            rank.seal();
        }
        assert!(!ranks.enter(&tree("b/x"), &live()).wait(new(&[])).await);
    }
}
