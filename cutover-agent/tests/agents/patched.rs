//! Rows of databases: they cross with what is beside them, not with their whole blocks.

use std::fs;
use std::os::unix::fs::FileExt;

use cutover_agent::transfer::{SyncOptions, SyncReport};

use crate::world::{LIMIT, World, picture};

const BLOCK_BYTES: u64 = 16 << 10;
const SUBBLOCK_BYTES: u64 = 512;
const BLOCKS: u64 = 64;

/// A world with a table of blocks that are all different, and the table, open.
async fn with_a_table() -> (World, fs::File) {
    let world = World::new().await;
    let mut content = vec![0; (BLOCKS * BLOCK_BYTES) as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    let file = world.here().join("posts.ibd");
    fs::write(&file, content).unwrap();
    let table = fs::OpenOptions::new().write(true).open(file).unwrap();
    (world, table)
}

/// Writes a row at the beginning of every eighth block, and the end of its page.
fn write_rows(table: &fs::File, row: &str) {
    for at in (0..BLOCKS).step_by(8) {
        table
            .write_all_at(row.as_bytes(), at * BLOCK_BYTES)
            .unwrap();
        let end = (at + 1) * BLOCK_BYTES - 1;
        table.write_all_at(&row.as_bytes()[..1], end).unwrap();
    }
}

fn assert_equal(world: &World) {
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

async fn synced(world: &World, session: &cutover_agent::peer::Session) -> SyncReport {
    let report = world.sync(session).await.unwrap();
    assert_equal(world);
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_changed_crosses_with_its_neighbours_round_by_round_and_while_frozen() {
    let (world, table) = with_a_table().await;
    let session = world.connect().await;
    assert_eq!(
        synced(&world, &session).await.bytes_data,
        BLOCKS * BLOCK_BYTES
    );
    let rows = BLOCKS / 8;
    for row in ["first", "second", "third"] {
        write_rows(&table, row);
        let report = synced(&world, &session).await;
        assert_eq!(report.bytes_data, rows * 2 * SUBBLOCK_BYTES, "{row}");
    }
    write_rows(&table, "last");
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let (tree, here) = (crate::world::volume(), world.here());
    let report = session.sync(&tree, &here, frozen).await.unwrap();
    assert_eq!(report.bytes_data, rows * 2 * SUBBLOCK_BYTES);
    assert_equal(&world);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_compared_blocks_only_knows_them_as_well_as_who_has_sent_them() {
    let (world, table) = with_a_table().await;
    synced(&world, &world.connect().await).await;
    let session = world.connect().await;
    write_rows(&table, "unknown");
    let rows = BLOCKS / 8;
    let report = synced(&world, &session).await;
    assert_eq!(report.bytes_data, rows * BLOCK_BYTES);
    write_rows(&table, "known");
    table.write_all_at(b"x", BLOCK_BYTES).unwrap();
    let report = synced(&world, &session).await;
    assert_eq!(report.bytes_data, (rows * 2 + 1) * SUBBLOCK_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_may_grow_shrink_become_holes_and_get_another_name() {
    let (world, table) = with_a_table().await;
    let session = world.connect().await;
    synced(&world, &session).await;
    let size = BLOCKS * BLOCK_BYTES;
    table.write_all_at(b"beyond the end", size + 100).unwrap();
    synced(&world, &session).await;
    table.write_all_at(b"and in it", size + 200).unwrap();
    synced(&world, &session).await;
    table.set_len(size - 100).unwrap();
    synced(&world, &session).await;
    table.set_len(size).unwrap();
    table.write_all_at(&[0; 40_000], 5 * BLOCK_BYTES).unwrap();
    synced(&world, &session).await;
    table.write_all_at(b"data again", 6 * BLOCK_BYTES).unwrap();
    synced(&world, &session).await;
    let [old, new] = ["posts.ibd", "archive.ibd"].map(|name| world.here().join(name));
    fs::rename(old, new).unwrap();
    write_rows(&table, "renamed");
    synced(&world, &session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_block_is_not_what_it_was_gets_the_whole_one() {
    let (world, table) = with_a_table().await;
    let session = world.connect().await;
    synced(&world, &session).await;
    // Nobody may write there.
    let there = fs::OpenOptions::new()
        .write(true)
        .open(world.there().join("posts.ibd"))
        .unwrap();
    there
        .write_all_at(b"not what it was", 8 * BLOCK_BYTES + 9000)
        .unwrap();
    write_rows(&table, "row");
    synced(&world, &session).await;
}
