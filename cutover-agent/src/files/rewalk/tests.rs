//! Random changes in trees, told by the kernel: whatever happens, the walk of what has changed finds what a walk of
//! everything finds.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};

use super::walk_changed;
use crate::files::Root;
use crate::files::index::{Changes, Indexes, Watch};
use crate::files::manifest::{Entry, Kind};
use crate::files::remembered::{Remembered, Stamp};
use crate::files::walk::{self, WALKERS, Walked};

const ROUNDS: u32 = 25;
const CHANGES: u32 = 12;

/// Said past the test runner, which would keep it to itself when the test passes.
fn left_out(what: &str) {
    let _ = writeln!(std::io::stderr(), "left out: {what}");
}

/// The watch of a tree; `None` only for whoever may not have one.
fn watch(root: &Root) -> Option<Watch> {
    let watch = Indexes::default().watch(root);
    let may = rustix::process::geteuid().is_root();
    assert!(
        watch.is_some() || !may,
        "root is told of changes in {root:?}"
    );
    if watch.is_none() {
        left_out("an index takes root");
    }
    watch
}

/// A tree that is walked again and again.
struct Tree {
    root: Root,
    entries: Vec<Arc<Entry>>,
    stamps: Vec<Option<Stamp>>,
    scanned_ns: i64,
    contents: BTreeMap<Vec<u8>, Vec<u8>>,
    watch: Watch,
}

fn full(root: &Root) -> Walked {
    walk::walk(root, None, WALKERS, &AtomicBool::new(false)).unwrap()
}

impl Tree {
    fn new(folder: &Path) -> Option<Self> {
        let root = Root::open(folder).unwrap();
        let watch = watch(&root)?;
        let mut tree = Self {
            root,
            entries: Vec::new(),
            stamps: Vec::new(),
            scanned_ns: 0,
            contents: BTreeMap::new(),
            watch,
        };
        tree.remember(full(&tree.root));
        Some(tree)
    }

    fn remember(&mut self, walked: Walked) {
        let is_file = |entry: &&Arc<Entry>| matches!(entry.kind, Kind::File { .. });
        let files = walked.entries.iter().filter(is_file);
        let content = |entry: &Arc<Entry>| {
            let path = self.root.shown(&entry.path);
            (entry.path.clone(), fs::read(path).unwrap())
        };
        self.contents = files.map(content).collect();
        self.entries = walked.entries;
        self.stamps = walked.stamps.into_iter().map(Some).collect();
        self.scanned_ns = walked.started_ns;
    }

    fn again(&self, changes: &Changes) -> Option<Walked> {
        let remembered = Remembered::new(&self.entries, &self.stamps, self.scanned_ns);
        let (none, cancel) = (HashSet::new(), AtomicBool::new(false));
        // Others on the same file system are not for us to count.
        let changes = (changes, usize::MAX);
        walk_changed(&self.root, &remembered, changes, &none, WALKERS, &cancel).unwrap()
    }

    /// Walks what has changed, and compares it with all there is; gives how many entries were looked at.
    fn check(&mut self, when: &str) -> usize {
        let (changes, next) = self.watch.changes(&self.root);
        let changes = changes.expect("nothing was missed");
        let walked = self
            .again(&changes)
            .expect("what has changed is understood");
        let all = full(&self.root);
        for (one, other) in walked.entries.iter().zip(&all.entries) {
            assert_eq!(one, other, "{when}");
        }
        assert_eq!(walked.entries.len(), all.entries.len(), "{when}");
        for (at, entry) in walked.entries.iter().enumerate() {
            let (stamp, there) = (&walked.stamps[at], &all.stamps[at]);
            assert!(
                stamp.is_same(there),
                "{when}: {entry:?} {stamp:?} {there:?}"
            );
            let Some(known) = walked.known[at].map(|known| known as usize) else {
                continue;
            };
            assert_eq!(self.entries[known].path, entry.path);
            if let Kind::File { .. } = entry.kind {
                let now = fs::read(self.root.shown(&entry.path)).unwrap();
                assert!(
                    self.contents[&entry.path] == now,
                    "{when}: {entry:?} is not as known"
                );
            }
        }
        let looked = walked.looked;
        self.watch = next.unwrap();
        self.remember(walked);
        looked
    }
}

/// Makes changes that depend on nothing but the seed and what is there.
struct Chance {
    numbers: blake3::OutputReader,
    top: PathBuf,
    /// Of the same file system, and not in the tree.
    outside: PathBuf,
    /// Files that stay open over the rounds.
    open: Vec<File>,
    made: u32,
}

impl Chance {
    fn new(seed: u8, top: &Path, outside: &Path) -> Self {
        Self {
            numbers: blake3::Hasher::new().update(&[seed]).finalize_xof(),
            top: top.to_owned(),
            outside: outside.to_owned(),
            open: Vec::new(),
            made: 0,
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        let mut number = [0; 4];
        self.numbers.fill(&mut number);
        u32::from_ne_bytes(number) as usize % bound.max(1)
    }

    fn fresh(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    /// All that is there of one kind.
    fn all(&self, is_wanted: impl Fn(&fs::FileType) -> bool) -> Vec<PathBuf> {
        let (mut found, mut open) = (Vec::new(), vec![self.top.clone()]);
        while let Some(folder) = open.pop() {
            let mut entries: Vec<_> = fs::read_dir(&folder).unwrap().flatten().collect();
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    open.push(entry.path());
                }
                if is_wanted(&kind) {
                    found.push(entry.path());
                }
            }
        }
        found
    }

    fn file(&mut self) -> PathBuf {
        let files = self.all(fs::FileType::is_file);
        let at = self.below(files.len());
        files
            .get(at)
            .cloned()
            .unwrap_or_else(|| self.top.join("none"))
    }

    /// A folder in the tree.
    fn folder(&mut self) -> PathBuf {
        let folders = self.all(fs::FileType::is_dir);
        let at = self.below(folders.len());
        let found = folders.get(at).cloned();
        found.unwrap_or_else(|| self.top.join("none"))
    }

    fn place(&mut self, what: &str) -> PathBuf {
        let mut folders = self.all(fs::FileType::is_dir);
        folders.push(self.top.clone());
        let at = self.below(folders.len());
        folders[at].join(self.fresh(what))
    }

    /// One change. What is not possible (a folder into itself, say) is no change.
    fn change(&mut self) -> std::io::Result<()> {
        match self.below(28) {
            0 | 1 => fs::write(self.place("new"), self.fresh("content")),
            2 | 3 => {
                let mut file = OpenOptions::new().append(true).open(self.file())?;
                file.write_all(b"more")
            }
            4 => OpenOptions::new().write(true).open(self.file())?.set_len(2),
            5 => {
                let mode = 0o600 + self.below(0o100) as u32;
                fs::set_permissions(self.file(), PermissionsExt::from_mode(mode))
            }
            6 => xattr::set(self.file(), "user.note", self.fresh("note").as_bytes()),
            7 => fs::rename(self.file(), self.place("renamed")),
            8 => fs::rename(self.file(), self.file()),
            9 => fs::rename(self.folder(), self.place("moved")),
            10 => fs::hard_link(self.file(), self.place("linked")),
            11 => symlink("../anywhere", self.place("symlink")),
            12 => fs::remove_file(self.file()),
            13 if self.below(3) == 0 => fs::remove_dir_all(self.folder()),
            13 | 14 => {
                let folder = self.place("folder").join("in/it");
                fs::create_dir_all(&folder)?;
                fs::write(folder.join("deep"), "deep")
            }
            15 => {
                let folder = self.folder();
                fs::remove_dir_all(&folder)?;
                fs::write(folder, "a file now")
            }
            16 => {
                let file = self.file();
                fs::remove_file(&file)?;
                fs::create_dir(&file)?;
                fs::write(file.join("inside"), "of what was a file")
            }
            other => self.rare_change(other),
        }
    }

    fn rare_change(&mut self, which: usize) -> std::io::Result<()> {
        match which {
            17 => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(self.file())?;
                self.open.push(file);
                Ok(())
            }
            18 | 19 if !self.open.is_empty() => {
                let at = self.below(self.open.len());
                self.open[at].write_all_at(b"through an open file", 3)
            }
            18 | 19 => Ok(()),
            20 => {
                // A file that had no name while it was written to, and is written to after it has one.
                let folder = File::open(self.folder())?;
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&folder, ".", flags, Mode::RWXU)?;
                let file = File::from(made);
                (&file).write_all(b"nameless")?;
                rustix::fs::linkat(&file, "", CWD, self.place("named"), AtFlags::EMPTY_PATH)?;
                self.open.push(file);
                Ok(())
            }
            21 => {
                let out = self.fresh("out");
                fs::rename(self.folder(), self.outside.join(out))
            }
            22 => {
                let name = self.fresh("in");
                let folder = self.outside.join(name);
                fs::create_dir(&folder)?;
                fs::write(folder.join("came"), "from outside")?;
                fs::rename(folder, self.place("came"))
            }
            23 => {
                let (one, other) = (self.folder(), self.folder());
                let exchanged = RenameFlags::EXCHANGE;
                Ok(rustix::fs::renameat_with(CWD, one, CWD, other, exchanged)?)
            }
            24 => {
                let (kind, mode) = (FileType::Fifo, Mode::RWXU);
                Ok(rustix::fs::mknodat(CWD, self.place("pipe"), kind, mode, 0)?)
            }
            25 => std::os::unix::net::UnixListener::bind(self.place("socket")).map(drop),
            26 => {
                let time =
                    std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.below(99) as u64);
                File::open(self.folder())?.set_modified(time)
            }
            _ => {
                // Made anew at once: with the same inode number, as a rule.
                let folder = self.folder();
                fs::remove_dir_all(&folder)?;
                fs::create_dir(&folder)
            }
        }
    }

    /// Changes a tree for some rounds, and checks it after each.
    fn run(mut self, mut tree: Tree) {
        let mut done = 0;
        for round in 0..ROUNDS {
            for _ in 0..CHANGES {
                done += u32::from(self.change().is_ok());
            }
            tree.check(&format!("round {round}"));
        }
        assert!(done > ROUNDS * CHANGES / 2, "{done} changes were possible");
        assert_eq!(
            tree.check("at the end"),
            1 + linked(&tree),
            "nothing changed any more"
        );
    }
}

/// Entries that are looked at in any walk.
fn linked(tree: &Tree) -> usize {
    tree.stamps
        .iter()
        .flatten()
        .filter(|stamp| stamp.is_linked)
        .count()
}

fn plant(folder: &Path) {
    for name in ["a/b/deep", "a/other", "a b/file", "c/d/e/f/g", "top"] {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
}

fn random_changes(within: &Path, seed: u8) {
    let folder = tempfile::tempdir_in(within).unwrap();
    let (top, outside) = (folder.path().join("tree"), folder.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    plant(&top);
    if let Some(tree) = Tree::new(&top) {
        Chance::new(seed, &top, &outside).run(tree);
    }
}

#[test]
fn random_changes_come_out_as_in_a_walk_of_everything() {
    for seed in 0..8 {
        random_changes(&std::env::temp_dir(), seed);
    }
}

#[test]
fn random_changes_in_memory_come_out_as_in_a_walk_of_everything() {
    for seed in 100..104 {
        random_changes(Path::new("/dev/shm"), seed);
    }
}

/// An overlay, unmounted at its end.
struct Overlay(PathBuf);

impl Overlay {
    fn mount(folder: &Path) -> Option<Self> {
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| folder.join(name));
        let (lower, upper, work) = (lower.display(), upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let merged = folder.join("merged");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged);
        let is_mounted = mount.status().is_ok_and(|status| status.success());
        if !is_mounted {
            left_out("an overlay cannot be mounted");
        }
        is_mounted.then(|| Self(merged))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn random_changes_through_an_overlay_come_out_as_in_a_walk_of_everything() {
    for seed in 200..206 {
        let folder = tempfile::tempdir().unwrap();
        plant(&folder.path().join("lower"));
        let Some(overlay) = Overlay::mount(folder.path()) else {
            return;
        };
        let outside = overlay.0.join("outside of nothing");
        if let Some(tree) = Tree::new(&folder.path().join("upper")) {
            Chance::new(seed, &overlay.0.clone(), &outside).run(tree);
        }
    }
}

#[test]
fn what_is_written_through_an_overlay_is_told_of_whenever_it_was_opened() {
    let folder = tempfile::tempdir().unwrap();
    plant(&folder.path().join("lower"));
    let Some(overlay) = Overlay::mount(folder.path()) else {
        return;
    };
    let file = overlay.0.join("a/other");
    let open = OpenOptions::new().append(true).open(&file).unwrap();
    let Some(mut tree) = Tree::new(&folder.path().join("upper")) else {
        return;
    };
    (&open).write_all(b"one").unwrap();
    assert!(tree.check("open since before the index") <= 3);
    drop(open);
    let mut open = OpenOptions::new().append(true).open(&file).unwrap();
    open.write_all(b"two").unwrap();
    assert!(tree.check("copied up before, written to again") <= 3);
}

#[test]
fn only_what_has_changed_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..3000 {
        let path = folder.path().join(format!("{}/{number}", number % 50));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    let Some(mut tree) = Tree::new(folder.path()) else {
        return;
    };
    assert_eq!(tree.check("nothing"), 1, "the root");
    fs::write(folder.path().join("7/7"), "changed").unwrap();
    fs::write(folder.path().join("8/new"), "new").unwrap();
    // The root, the file, the folder of the new one, the new one.
    assert_eq!(tree.check("two files"), 4);
    // Of another file system's directory, or of this one outside: nothing is looked at.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "x").unwrap();
    assert_eq!(tree.check("outside"), 1);
}

#[test]
fn what_changes_between_the_mark_and_the_walk_is_looked_at_once_more() {
    let folder = tempfile::tempdir().unwrap();
    plant(folder.path());
    let Some(mut tree) = Tree::new(folder.path()) else {
        return;
    };
    tree.watch = watch(&tree.root).unwrap();
    fs::write(folder.path().join("top"), "changed").unwrap();
    fs::write(folder.path().join("a/new"), "new").unwrap();
    tree.remember(full(&tree.root));
    assert_eq!(tree.check("meanwhile"), 4);
    assert_eq!(tree.check("nothing"), 1);
}

#[test]
fn a_file_that_was_unsteady_or_is_open_for_writing_is_looked_at_although_nobody_was_told() {
    let folder = tempfile::tempdir().unwrap();
    plant(folder.path());
    let Some(mut tree) = Tree::new(folder.path()) else {
        return;
    };
    let place = |path: &[u8]| tree.entries.iter().position(|entry| entry.path == path);
    let (unsteady, open) = (place(b"a/other").unwrap(), place(b"top").unwrap());
    tree.stamps[unsteady] = None;
    let stamp = tree.stamps[open].unwrap();
    let written = HashSet::from([(stamp.device, stamp.inode)]);
    let remembered = Remembered::new(&tree.entries, &tree.stamps, tree.scanned_ns);
    let (changes, cancel) = (Changes::default(), AtomicBool::new(false));
    let walked = walk_changed(&tree.root, &remembered, (&changes, 9), &written, 1, &cancel);
    let walked = walked.unwrap().unwrap();
    assert_eq!(walked.looked, 3, "the root, the unsteady one, the open one");
    assert_eq!(walked.known[unsteady], None);
    assert_eq!(walked.entries, full(&tree.root).entries);
}

#[test]
fn too_many_changes_and_another_root_are_for_a_walk_of_everything() {
    let folder = tempfile::tempdir().unwrap();
    let top = folder.path().join("tree");
    plant(&top);
    let Some(mut tree) = Tree::new(&top) else {
        return;
    };
    let few = super::most(tree.entries.len());
    for number in 0..=few {
        fs::write(top.join(format!("{number}")), "").unwrap();
    }
    let (changes, next) = tree.watch.changes(&tree.root);
    let (changes, none, cancel) = (changes.unwrap(), HashSet::new(), AtomicBool::new(false));
    let remembered = Remembered::new(&tree.entries, &tree.stamps, tree.scanned_ns);
    let walked = walk_changed(&tree.root, &remembered, (&changes, few), &none, 1, &cancel);
    assert!(walked.unwrap().is_none());
    tree.watch = next.unwrap();
    tree.remember(full(&tree.root));
    fs::rename(&top, folder.path().join("old")).unwrap();
    plant(&top);
    tree.root = Root::open(&top).unwrap();
    let (changes, _) = tree.watch.changes(&tree.root);
    assert!(tree.again(&changes.unwrap()).is_none());
}

#[test]
fn what_is_mounted_in_the_tree_meanwhile_makes_changes_unknown() {
    let folder = tempfile::tempdir().unwrap();
    plant(folder.path());
    let Some(mut tree) = Tree::new(folder.path()) else {
        return;
    };
    let point = folder.path().join("a");
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "tmpfs"]).arg(&point);
    if !mount.status().is_ok_and(|status| status.success()) {
        return left_out("nothing can be mounted");
    }
    let mounted = Overlay(point);
    let (changes, next) = tree.watch.changes(&tree.root);
    assert!(changes.is_none());
    tree.watch = next.unwrap();
    tree.remember(full(&tree.root));
    assert_eq!(tree.check("mounted"), 2, "the root and the mount point");
    drop(mounted);
    let (changes, _) = tree.watch.changes(&tree.root);
    assert!(changes.is_none());
}
