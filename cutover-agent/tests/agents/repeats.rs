//! Blocks that are in a tree more than once cross once.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use cutover_agent::transfer::SyncOptions;

use crate::world::{LIMIT, World, noise, synced};

const BLOCK_BYTES: u64 = 16 << 10;
const FILE_BYTES: u64 = 40 * BLOCK_BYTES;

#[tokio::test(flavor = "multi_thread")]
async fn of_equal_files_one_crosses_and_the_others_only_with_what_is_no_whole_block() {
    let world = World::new().await;
    let content = noise(FILE_BYTES as usize + 5);
    for name in ["release-1/app", "release-2/app", "locked"] {
        let path = world.here().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &content).unwrap();
    }
    let locked = world.here().join("locked");
    fs::set_permissions(locked, fs::Permissions::from_mode(0o400)).unwrap();
    let session = world.connect().await;
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert_eq!(report.bytes_data, FILE_BYTES + 3 * 5);
    assert!(report.bytes_wire < FILE_BYTES + 4096, "{report:?}");
    let inode = |name: &str| fs::metadata(world.there().join(name)).unwrap().ino();
    assert_ne!(inode("release-1/app"), inode("release-2/app"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_a_database_writes_twice_crosses_once() {
    let world = World::new().await;
    let content = noise(FILE_BYTES as usize);
    let [table, system] = ["posts.ibd", "undo_001"].map(|name| world.here().join(name));
    fs::write(&table, &content).unwrap();
    fs::write(&system, vec![0; FILE_BYTES as usize]).unwrap();
    let session = world.connect().await;
    synced(&world, &session, SyncOptions::live(LIMIT)).await;
    let system = fs::OpenOptions::new().write(true).open(system).unwrap();
    // What is there already and was not changed is as good, if it is read before.
    let pages = 7 * BLOCK_BYTES as usize..11 * BLOCK_BYTES as usize;
    system.write_all_at(&content[pages], BLOCK_BYTES).unwrap();
    let rewritten = fs::OpenOptions::new().write(true).open(&table).unwrap();
    rewritten.write_all_at(b"x", FILE_BYTES - 1).unwrap();
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let report = synced(&world, &session, frozen.clone()).await;
    assert!(report.bytes_data <= 512, "{report:?}");
    let page: Vec<u8> = content.iter().rev().take(16 << 10).copied().collect();
    system.write_all_at(&page, 20 * BLOCK_BYTES).unwrap();
    rewritten.write_all_at(&page, 3 * BLOCK_BYTES).unwrap();
    let report = synced(&world, &session, frozen).await;
    assert_eq!(report.bytes_data, BLOCK_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_block_is_not_what_it_was_makes_no_other_of_it() {
    let world = World::new().await;
    let content = noise(FILE_BYTES as usize);
    fs::write(world.here().join("one"), &content).unwrap();
    let session = world.connect().await;
    synced(&world, &session, SyncOptions::live(LIMIT)).await;
    // Nobody may write there.
    let there = fs::OpenOptions::new()
        .write(true)
        .open(world.there().join("one"))
        .unwrap();
    there.write_all_at(b"not what it was", 9000).unwrap();
    fs::write(world.here().join("other"), &content).unwrap();
    let open = fs::OpenOptions::new()
        .write(true)
        .open(world.here().join("one"))
        .unwrap();
    open.write_all_at(b"x", FILE_BYTES - 1).unwrap();
    synced(&world, &session, SyncOptions::live(LIMIT)).await;
}
