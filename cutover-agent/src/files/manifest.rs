//! What a tree is, entry by entry, in one canonical order: the thing both sites hash and compare.
//!
//! The order is component by component, so a directory comes before everything in it. A manifest from a peer is
//! checked before anything is done with it: no entry may leave the tree or sit inside anything but a directory.

use std::cmp::Ordering;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::blocks::{self, Digest};

/// The most blocks one tree may have: 64 GiB of logical size, 128 MiB of digests.
pub const TREE_BLOCKS_MAX: u64 = 1 << 22;

/// Entries that are hashed together.
const RUN_ENTRIES: usize = 4096;
/// Bytes given to the hash function at once: it does several chunks of 1 KiB side by side.
const HASHED_AT_ONCE: usize = 64 << 10;
/// Threads that hash a list of entries.
const ROOT_THREADS_MAX: usize = 8;

/// The longest relative path, in bytes; the kernel's PATH_MAX.
pub const PATH_BYTES_MAX: usize = 4095;

/// What kind of thing an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A directory; the first entry, with the empty path, is the root itself.
    Directory,
    /// A regular file of so many bytes.
    File {
        /// Its length in bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points; kept as it is, never followed.
        to: Vec<u8>,
    },
    /// Another name of a file that comes earlier in the order.
    HardLink {
        /// The first name's path.
        to: Vec<u8>,
    },
    /// A character device; 0/0 is overlayfs' mark for a deleted file.
    CharacterDevice {
        /// The device number as the kernel encodes it.
        number: u64,
    },
    /// A block device.
    BlockDevice {
        /// The device number as the kernel encodes it.
        number: u64,
    },
    /// A named pipe.
    Fifo,
}

/// Extended attributes by name, sorted.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// One entry of a tree, without its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The path relative to the root, as bytes.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Extended attributes by name (POSIX ACLs and overlayfs' marks are among them).
    pub attributes: Attributes,
}

impl Entry {
    /// The file's length in bytes; 0 for everything else.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size } => size,
            _ => 0,
        }
    }
}

/// A tree: its entries and, for files, the digest of each block.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    /// In canonical order. Shared between rounds while an entry does not change.
    pub entries: Vec<Arc<Entry>>,
    /// As many as entries; empty for whatever is not a file. Shared between rounds while a file does not change.
    pub digests: Vec<Arc<Vec<Digest>>>,
}

/// Why a peer's manifest is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// A path that could leave the tree, or is none.
    #[error("the peer named the path {0:?}, which is not allowed in a tree: nothing was written")]
    Path(String),
    /// Entries out of order, doubled, or inside something that is not a directory.
    #[error("the peer's list of files is out of order at {0:?}: nothing was written")]
    Order(String),
    /// A hard link to something that is not an earlier file.
    #[error("the peer's hard link {0:?} leads to no earlier file: nothing was written")]
    Link(String),
    /// More data than digests can be kept for.
    #[error("the tree has more than {} GiB of logical size in {TREE_BLOCKS_MAX} blocks: split it into several trees", TREE_BLOCKS_MAX >> 16)]
    TooLarge,
    /// The list could not be decoded, or refers to entries that do not exist.
    #[error("the peer's list of files cannot be read")]
    Garbled,
}

/// Compares two paths component by component: as bytes, with `/` before all others, since it ends a component.
#[must_use]
pub fn order(left: &[u8], right: &[u8]) -> Ordering {
    let rank = |byte: u8| if byte == b'/' { 0 } else { u16::from(byte) + 1 };
    match left.iter().zip(right).position(|(one, other)| one != other) {
        Some(at) => rank(left[at]).cmp(&rank(right[at])),
        None => left.len().cmp(&right.len()),
    }
}

/// Which entry of an older tree has the path of which of a newer one: found in one pass over both.
pub(crate) struct Pairing {
    /// For each new entry, the old one.
    olds: Vec<Option<u32>>,
    /// Old entries that no new one has the path of, in their order.
    gone: Vec<u32>,
}

impl Pairing {
    /// Pairs two lists in canonical order, each shorter than `u32::MAX`.
    pub(crate) fn of(old: &[Arc<Entry>], new: &[Arc<Entry>]) -> Self {
        let mut olds = Vec::with_capacity(new.len());
        let mut gone = Vec::new();
        let mut at = 0;
        for entry in new {
            let mut found = None;
            while let Some(known) = old.get(at) {
                let compared = if Arc::ptr_eq(known, entry) {
                    Ordering::Equal
                } else {
                    order(&known.path, &entry.path)
                };
                match compared {
                    Ordering::Less => gone.push(at as u32),
                    Ordering::Equal => found = Some(at as u32),
                    Ordering::Greater => break,
                }
                at += 1;
                if found.is_some() {
                    break;
                }
            }
            olds.push(found);
        }
        gone.extend((at..old.len()).map(|at| at as u32));
        Self { olds, gone }
    }

    /// Where the old entry with the path of the new one at `index` is.
    pub(crate) fn old_of(&self, index: usize) -> Option<usize> {
        self.olds[index].map(|at| at as usize)
    }

    /// The old entries whose paths are no more, in their order.
    pub(crate) fn gone(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.gone.iter().map(|at| *at as usize)
    }
}

/// Whether both are the same; entries that come from one another are not compared.
pub(crate) fn is_same(one: &Arc<Entry>, other: &Arc<Entry>) -> bool {
    Arc::ptr_eq(one, other) || one == other
}

impl Manifest {
    /// The digests known for the entry at `index`; none when it is no file.
    pub(crate) fn digests_of(&self, index: usize) -> Option<&Arc<Vec<Digest>>> {
        matches!(self.entries[index].kind, Kind::File { .. }).then(|| &self.digests[index])
    }

    /// All bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size()).sum()
    }

    /// How many files there are, hard links not counted.
    #[must_use]
    pub fn files(&self) -> u64 {
        self.entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::File { .. }))
            .count() as u64
    }

    /// The hash of everything: metadata, content, names. Equal roots mean equal trees. It is the hash of the hashes of
    /// runs of entries, which several threads make.
    #[must_use]
    pub fn root(&self) -> Digest {
        let runs: Vec<Run<'_>> = self
            .entries
            .chunks(RUN_ENTRIES)
            .zip(self.digests.chunks(RUN_ENTRIES))
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = runs.len().div_ceil(threads.min(ROOT_THREADS_MAX)).max(1);
        let mut hasher = blake3::Hasher::new_derive_key("hopgate tree manifest 2");
        let mut add = |hashes: Vec<blake3::Hash>| {
            hashes.iter().for_each(|hash| {
                hasher.update(hash.as_bytes());
            });
        };
        let hash = |runs: &[Run<'_>]| runs.iter().map(hash_run).collect();
        if share == runs.len() {
            add(hash(&runs));
        } else {
            std::thread::scope(|scope| {
                let shares = runs.chunks(share);
                let threads: Vec<_> = shares.map(|runs| scope.spawn(move || hash(runs))).collect();
                // A thread that panics would change the hash, and the tree be refused.
                let hashes = threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_default());
                hashes.for_each(&mut add);
            });
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

/// Some consecutive entries of a tree with their digests.
type Run<'a> = (&'a [Arc<Entry>], &'a [Arc<Vec<Digest>>]);

fn hash_run((entries, digests): &Run<'_>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(2 * HASHED_AT_ONCE);
    for (entry, digests) in entries.iter().zip(*digests) {
        // Serialising these plain types into memory cannot fail; what is lost would only change the hash. Each says
        // itself where it ends.
        bytes = postcard::to_extend(&**entry, bytes).unwrap_or_default();
        bytes.extend_from_slice(&(digests.len() as u64).to_le_bytes());
        for digest in digests.iter() {
            bytes.extend_from_slice(&digest.0);
            if bytes.len() >= HASHED_AT_ONCE {
                hasher.update(&bytes);
                bytes.clear();
            }
        }
    }
    hasher.update(&bytes);
    hasher.finalize()
}

/// Checks entries that a peer sent.
///
/// # Errors
/// Names the first entry that breaks a rule.
pub fn check(entries: &[Arc<Entry>]) -> Result<(), ManifestError> {
    let shown = |entry: &Entry| String::from_utf8_lossy(&entry.path).into_owned();
    let mut open: Vec<&[u8]> = Vec::new();
    let blocks = entries.iter().fold(0_u64, |sum, entry| {
        sum.saturating_add(blocks::count(entry.size()))
    });
    if blocks > TREE_BLOCKS_MAX {
        return Err(ManifestError::TooLarge);
    }
    let is_rooted = entries
        .first()
        .is_some_and(|root| root.path.is_empty() && root.kind == Kind::Directory);
    if !is_rooted {
        return Err(ManifestError::Order(String::new()));
    }
    for (index, entry) in entries.iter().enumerate().skip(1) {
        let path = entry.path.as_slice();
        if !is_contained(path) {
            return Err(ManifestError::Path(shown(entry)));
        }
        if index > 1 && order(&entries[index - 1].path, path) != Ordering::Less {
            return Err(ManifestError::Order(shown(entry)));
        }
        let parent = path
            .iter()
            .rposition(|byte| *byte == b'/')
            .map_or(&path[..0], |cut| &path[..cut]);
        while open.last().is_some_and(|directory| *directory != parent) {
            open.pop();
        }
        if !parent.is_empty() && open.is_empty() {
            return Err(ManifestError::Order(shown(entry)));
        }
        match &entry.kind {
            Kind::Directory => open.push(path),
            Kind::HardLink { to } => {
                let first = entries[..index].binary_search_by(|earlier| order(&earlier.path, to));
                let is_file = first.is_ok_and(|at| matches!(entries[at].kind, Kind::File { .. }));
                if !is_file {
                    return Err(ManifestError::Link(shown(entry)));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_contained(path: &[u8]) -> bool {
    path.len() <= PATH_BYTES_MAX
        && !path.contains(&0)
        && path
            .split(|byte| *byte == b'/')
            .all(|part| !part.is_empty() && part != b"." && part != b"..")
}

/// A manifest's entries as differences from a base both sides know, so that a round costs what changed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Step {
    /// So many entries of the base, from this index on, unchanged.
    Same { from: u32, count: u32 },
    /// An entry that is new or changed.
    Entry(Arc<Entry>),
}

/// Expresses `entries` through `base`.
pub(crate) fn difference(
    base: &[Arc<Entry>],
    entries: &[Arc<Entry>],
    pairs: &Pairing,
) -> Vec<Step> {
    let mut steps = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let known = pairs.old_of(index).filter(|at| is_same(&base[*at], entry));
        let Some(at) = known else {
            steps.push(Step::Entry(Arc::clone(entry)));
            continue;
        };
        match steps.last_mut() {
            Some(Step::Same { from, count }) if *from + *count == at as u32 => *count += 1,
            _ => steps.push(Step::Same {
                from: at as u32,
                count: 1,
            }),
        }
    }
    steps
}

/// The entries that `steps` describe.
///
/// # Errors
/// When they refer to entries the base does not have.
pub(crate) fn rebuild(
    base: &[Arc<Entry>],
    steps: Vec<Step>,
) -> Result<Vec<Arc<Entry>>, ManifestError> {
    let mut entries = Vec::new();
    for step in steps {
        match step {
            Step::Entry(entry) => entries.push(entry),
            Step::Same { from, count } => {
                let range = from as usize..(from as usize).saturating_add(count as usize);
                entries.extend_from_slice(base.get(range).ok_or(ManifestError::Garbled)?);
            }
        }
        if entries.len() > u32::MAX as usize {
            return Err(ManifestError::Garbled);
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Arc<Entry> {
        let path = path.as_bytes().to_vec();
        Arc::new(Entry {
            path,
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime_ns: 0,
            attributes: Vec::new(),
        })
    }

    fn tree(entries: &[(&str, Kind)]) -> Vec<Arc<Entry>> {
        let root = std::iter::once(entry("", Kind::Directory));
        root.chain(entries.iter().map(|(path, kind)| entry(path, kind.clone())))
            .collect()
    }

    const FILE: Kind = Kind::File { size: 1 };

    #[test]
    fn a_peer_can_not_name_a_path_outside_the_tree() {
        for path in [
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a//b",
            "./a",
            "a/.",
            "a\0b",
            "a/",
        ] {
            let refused = check(&tree(&[("a", Kind::Directory), (path, FILE)]));
            assert!(
                matches!(refused, Err(ManifestError::Path(_))),
                "{path:?}: {refused:?}"
            );
        }
    }

    #[test]
    fn nothing_can_sit_inside_a_symlink_or_a_file_or_nowhere() {
        let link = Kind::Symlink {
            to: b"/etc".to_vec(),
        };
        for parent in [link, FILE, Kind::Fifo] {
            let refused = check(&tree(&[("a", parent), ("a/passwd", FILE)]));
            assert_eq!(refused, Err(ManifestError::Order("a/passwd".into())));
        }
        assert!(check(&tree(&[("a/b", FILE)])).is_err());
        assert!(check(&tree(&[("b", FILE), ("a", FILE)])).is_err());
        assert!(check(&tree(&[("a", FILE), ("a", FILE)])).is_err());
        assert!(check(&[entry("a", FILE)]).is_err());
        assert!(check(&[]).is_err());
    }

    #[test]
    fn a_hard_link_leads_to_an_earlier_file_and_sizes_are_bounded() {
        let link = |to: &str| Kind::HardLink {
            to: to.as_bytes().to_vec(),
        };
        assert_eq!(check(&tree(&[("a", FILE), ("b", link("a"))])), Ok(()));
        for to in ["b", "c", "../a", ""] {
            assert_eq!(
                check(&tree(&[("a", FILE), ("b", link(to)), ("c", FILE)])),
                Err(ManifestError::Link("b".into()))
            );
        }
        let huge = Kind::File { size: u64::MAX };
        assert_eq!(
            check(&tree(&[("a", huge.clone()), ("b", huge)])),
            Err(ManifestError::TooLarge)
        );
    }

    #[test]
    fn a_directory_comes_before_everything_in_it_and_its_siblings_after() {
        let good = [
            ("a", Kind::Directory),
            ("a/b", Kind::Directory),
            ("a/b/c", FILE),
            ("a/d", FILE),
            ("a b", FILE),
        ];
        assert_eq!(check(&tree(&good)), Ok(()));
    }

    #[test]
    fn old_and_new_entries_are_paired_by_their_paths_and_the_rest_is_gone() {
        let old = tree(&[("a", FILE), ("b", FILE), ("d", FILE), ("e", FILE)]);
        let new = tree(&[("b", Kind::Fifo), ("c", FILE), ("d", FILE)]);
        let pairs = Pairing::of(&old, &new);
        let olds: Vec<_> = (0..new.len()).map(|at| pairs.old_of(at)).collect();
        assert_eq!(olds, [Some(0), Some(2), None, Some(3)]);
        assert_eq!(pairs.gone().collect::<Vec<_>>(), [1, 4]);
    }

    #[test]
    fn a_difference_gives_the_same_entries_back_and_costs_what_changed() {
        let old = tree(&[("a", FILE), ("b", FILE), ("c", FILE), ("d", FILE)]);
        let new = tree(&[("a", FILE), ("bb", FILE), ("c", FILE), ("d", FILE)]);
        let steps = difference(&old, &new, &Pairing::of(&old, &new));
        assert_eq!(steps.len(), 3, "{steps:?}");
        assert_eq!(rebuild(&old, steps).unwrap(), new);
        assert!(rebuild(&old, vec![Step::Same { from: 4, count: 2 }]).is_err());
        assert!(
            rebuild(
                &old,
                vec![Step::Same {
                    from: u32::MAX,
                    count: u32::MAX
                }]
            )
            .is_err()
        );
    }
}
