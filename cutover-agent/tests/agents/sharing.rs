//! Trees of several containers with files in common: what one has brought to the target does not cross for another.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cutover_agent::peer::Session;
use cutover_agent::transfer::{SyncOptions, SyncReport, TransferError, TreeName};

use crate::cable::{Cable, Cut};
use crate::transfer::pattern;
use crate::world::{LIMIT, World, picture};

const LARGE_BYTES: usize = 3_000_001;
const SMALL_BYTES: usize = 5_000;
const SMALL_FILES: usize = 200;
/// What [`install`] makes.
const INSTALLED_BYTES: u64 = (LARGE_BYTES + SMALL_FILES * SMALL_BYTES) as u64;

/// Puts the files of an application there; another seed, another one with files of the same sizes.
fn install(folder: &Path, seed: u64) {
    fs::create_dir_all(folder.join("app")).unwrap();
    fs::write(folder.join("app/large"), pattern(seed, LARGE_BYTES)).unwrap();
    let small = pattern(seed + 1, SMALL_FILES * SMALL_BYTES);
    for (number, content) in small.chunks(SMALL_BYTES).enumerate() {
        fs::write(folder.join(format!("app/{number}.php")), content).unwrap();
    }
}

impl World {
    fn source(&self, tree: &str) -> PathBuf {
        self.folder.path().join("source").join(tree)
    }

    fn target(&self, tree: &str) -> PathBuf {
        self.folder.path().join("there").join(tree)
    }

    async fn sync_tree(&self, session: &Session, tree: &str) -> Result<SyncReport, TransferError> {
        let (name, source) = (TreeName::new(tree).unwrap(), self.source(tree));
        session.sync(&name, &source, SyncOptions::live(LIMIT)).await
    }

    fn assert_equal(&self, tree: &str) {
        assert_eq!(picture(&self.source(tree)), picture(&self.target(tree)));
    }
}

/// Waits until frames of a round were handed to the streams.
async fn under_way(options: &SyncOptions) {
    while options.progress.bytes_wire() == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_trees_of_equal_content_that_begin_at_once_only_one_crosses() {
    let world = World::new().await;
    let trees = ["one/data", "two/data", "three/data"];
    for tree in trees {
        install(&world.source(tree), 1);
        fs::write(world.source(tree).join("own"), tree).unwrap();
    }
    let session = world.connect().await;
    let (one, two, three) = tokio::join!(
        world.sync_tree(&session, trees[0]),
        world.sync_tree(&session, trees[1]),
        world.sync_tree(&session, trees[2]),
    );
    trees.iter().for_each(|tree| world.assert_equal(tree));
    let mut moved = [one, two, three].map(|report| report.unwrap().bytes_data);
    moved.sort_unstable();
    assert!(moved[1] < INSTALLED_BYTES / 50, "{moved:?}");
    assert!(moved[2] >= INSTALLED_BYTES, "{moved:?}");
    // Later rounds go by what was sealed.
    fs::write(world.source("two/data").join("app/1.php"), "changed").unwrap();
    let report = world.sync_tree(&session, "two/data").await.unwrap();
    assert_eq!(report.bytes_data, 7);
    world.assert_equal("two/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_begins_later_finds_what_is_there() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 1);
    let session = world.connect().await;
    let report = world.sync_tree(&session, "one/data").await.unwrap();
    assert_eq!(report.bytes_data, INSTALLED_BYTES);
    let report = world.sync_tree(&session, "two/data").await.unwrap();
    assert_eq!(report.bytes_data, 0);
    world.assert_equal("two/data");
    // Another session is told nothing of the trees of this one.
    drop(session);
    let session = world.connect().await;
    install(&world.source("three/data"), 1);
    let report = world.sync_tree(&session, "three/data").await.unwrap();
    assert_eq!(report.bytes_data, INSTALLED_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_equal_sizes_and_other_content_both_arrive() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 10);
    let session = world.connect().await;
    let (one, two) = tokio::join!(
        world.sync_tree(&session, "one/data"),
        world.sync_tree(&session, "two/data"),
    );
    assert_eq!(one.unwrap().bytes_data, INSTALLED_BYTES);
    assert_eq!(two.unwrap().bytes_data, INSTALLED_BYTES);
    world.assert_equal("one/data");
    world.assert_equal("two/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_goes_on_when_the_one_it_waits_for_fails() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 1);
    // Sockets are no part of a tree, so nobody knows of it before the file is written.
    fs::create_dir_all(world.target("one/data/app")).unwrap();
    let in_the_way = UnixListener::bind(world.target("one/data/app/large")).unwrap();
    let session = world.connect().await;
    let (one, two) = tokio::join!(
        world.sync_tree(&session, "one/data"),
        world.sync_tree(&session, "two/data"),
    );
    let error = one.unwrap_err().to_string();
    assert!(error.contains("one/data/app/large"), "{error}");
    assert_eq!(two.unwrap().bytes_data, INSTALLED_BYTES);
    world.assert_equal("two/data");
    // And now it is the other way round.
    drop(in_the_way);
    fs::remove_file(world.target("one/data/app/large")).unwrap();
    let report = world.sync_tree(&session, "one/data").await.unwrap();
    assert_eq!(report.bytes_data, 0);
    world.assert_equal("one/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_goes_on_when_the_one_it_waits_for_is_given_up() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 1);
    let session = world.connect().await;
    // The first cannot come to its end before it is given up.
    session.limit_bandwidth(Some(64 << 10));
    let (name, source) = (TreeName::new("one/data").unwrap(), world.source("one/data"));
    let options = SyncOptions::live(LIMIT);
    let mut first = Box::pin(session.sync(&name, &source, options.clone()));
    tokio::select! {
        early = &mut first => panic!("{early:?}"),
        () = under_way(&options) => {}
    }
    let (second, ()) = tokio::join!(world.sync_tree(&session, "two/data"), async {
        drop(first);
        session.limit_bandwidth(None);
    });
    assert_eq!(second.unwrap().bytes_data, INSTALLED_BYTES);
    world.assert_equal("two/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_changed_at_the_target_is_found_out_and_done_without() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 1);
    let session = world.connect().await;
    world.sync_tree(&session, "one/data").await.unwrap();
    // By somebody of whom the agent does not know; it would find the same whenever it looked.
    let there = world.target("one/data/app");
    fs::write(there.join("large"), pattern(5, LARGE_BYTES)).unwrap();
    fs::remove_file(there.join("1.php")).unwrap();
    fs::create_dir(there.join("1.php")).unwrap();
    world.sync_tree(&session, "two/data").await.unwrap();
    world.assert_equal("two/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_may_change_while_another_one_uses_its_files() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    let session = world.connect().await;
    world.sync_tree(&session, "one/data").await.unwrap();
    // Each gets what the first tree has still got, and is about to lose.
    for (tree, seed) in [("two/data", 2), ("three/data", 4)] {
        fs::create_dir_all(world.source(tree).parent().unwrap()).unwrap();
        fs::rename(world.source("one/data"), world.source(tree)).unwrap();
        install(&world.source("one/data"), seed);
        let (one, other) = tokio::join!(
            world.sync_tree(&session, "one/data"),
            world.sync_tree(&session, tree),
        );
        one.unwrap();
        other.unwrap();
        world.assert_equal("one/data");
        world.assert_equal(tree);
    }
}

/// A folder under all its names at the same time; what of it has crossed.
async fn sync_shared(world: &World, session: &Session) -> u64 {
    let folder = world.source("one/data");
    let sync = async |tree: &str| {
        let name = TreeName::new(tree).unwrap();
        let syncing = session.sync(&name, &folder, SyncOptions::live(LIMIT));
        Box::pin(syncing).await.unwrap().bytes_data
    };
    let moved = tokio::join!(
        sync("one/data"),
        sync("beside-1/data"),
        sync("beside-2/data"),
        sync("beside-3/data"),
        sync("beside-4/data"),
        sync("beside-5/data"),
    );
    world.assert_equal("one/data");
    moved.0 + moved.1 + moved.2 + moved.3 + moved.4 + moved.5
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_several_containers_have_crosses_once() {
    let world = World::new().await;
    let here = world.source("one/data");
    install(&here, 1);
    let session = world.connect().await;
    let moved = sync_shared(&world, &session).await;
    assert!(moved < INSTALLED_BYTES / 50 * 51, "{moved}");
    assert_eq!(sync_shared(&world, &session).await, 0);
    drop(session);
    // In the next hop the target tells of files under names that one of the trees takes away meanwhile.
    fs::rename(here.join("app/large"), here.join("app/larger")).unwrap();
    fs::remove_file(here.join("app/1.php")).unwrap();
    fs::create_dir(here.join("app/1.php")).unwrap();
    fs::write(here.join("app/1.php/large"), pattern(8, LARGE_BYTES)).unwrap();
    let session = world.connect().await;
    let moved = sync_shared(&world, &session).await;
    assert!(moved < LARGE_BYTES as u64 / 50 * 51, "{moved}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sealed_before_connections_broke_is_used_after_it() {
    let world = World::new().await;
    install(&world.source("one/data"), 1);
    install(&world.source("two/data"), 1);
    let cable = Cable::to(world.addr).await;
    let session = cable.connect(&world, LIMIT).await;
    world.sync_tree(&session, "one/data").await.unwrap();
    cable.breaks(Cut::Closed, &session).await;
    let report = world.sync_tree(&session, "two/data").await.unwrap();
    assert_eq!(report.bytes_data, 0);
    world.assert_equal("two/data");
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_that_wait_for_one_go_on_doing_so_when_connections_break() {
    const MIB: u64 = 1 << 20;
    const TREE_BYTES: u64 = 48 * MIB;
    let world = World::new().await;
    let trees = ["one/data", "two/data", "three/data"];
    let content = pattern(1, TREE_BYTES as usize);
    for tree in trees {
        fs::create_dir_all(world.source(tree)).unwrap();
        for (number, part) in content.chunks(4 * MIB as usize).enumerate() {
            fs::write(world.source(tree).join(format!("file-{number}")), part).unwrap();
        }
    }
    let cable = Cable::to(world.addr).await;
    let session = cable.connect(&world, LIMIT).await;
    let (one, two, three, ()) = tokio::join!(
        world.sync_tree(&session, trees[0]),
        world.sync_tree(&session, trees[1]),
        world.sync_tree(&session, trees[2]),
        async {
            cable.has_carried(20 * MIB).await;
            cable.breaks(Cut::Closed, &session).await;
        },
    );
    for report in [one, two, three] {
        report.unwrap();
    }
    trees.iter().for_each(|tree| world.assert_equal(tree));
    let carried = *cable.carried.borrow();
    // Two in a hundred, and what greetings, records and the lists of three trees take.
    let most = TREE_BYTES / 100 * 102 + 2 * MIB;
    assert!(carried <= most, "{carried} bytes were carried");
}
