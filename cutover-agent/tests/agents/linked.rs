//! Over a slow link the frames of a round are packed with what was in those before them.

use std::fs;

use cutover_agent::transfer::SyncOptions;

use crate::cable::{Cable, Cut};
use crate::world::{LIMIT, World, noise, picture, synced, volume};

const MIB: usize = 1 << 20;
const ROW_BYTES: usize = 1000;
/// What rows take that nothing can compress; they are in the table and in the log, and neither has two of them.
const ROWS_BYTES: usize = 2 * MIB;

/// A table and the log of what was written to it, megabytes apart and at other places of their blocks.
fn write_database(world: &World) {
    let (mut table, mut log) = (Vec::new(), Vec::new());
    for row in noise(ROWS_BYTES).chunks(ROW_BYTES) {
        for (file, head) in [(&mut table, "row of posts; "), (&mut log, "write: ")] {
            file.extend_from_slice(head.as_bytes());
            file.extend_from_slice(row);
            file.extend_from_slice(&[b' '; ROW_BYTES]);
        }
    }
    fs::write(world.here().join("posts.ibd"), table).unwrap();
    fs::write(world.here().join("ib_logfile0"), log).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_in_the_table_and_in_the_log_crosses_once() {
    let world = World::new().await;
    write_database(&world);
    let session = world.connect().await;
    session.limit_bandwidth(Some(2 * MIB as u64));
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    let (wire, rows) = (report.bytes_wire, ROWS_BYTES as u64);
    assert!(wire < rows / 2 * 3, "{wire} bytes for rows of {rows}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_whose_link_is_cut_begins_anew_with_nothing_before_its_frames() {
    let world = World::new().await;
    write_database(&world);
    let cable = Cable::to(world.addr).await;
    let session = cable.connect(&world, LIMIT).await;
    session.limit_bandwidth(Some(2 * MIB as u64));
    let (tree, here) = (volume(), world.here());
    let options = SyncOptions::live(LIMIT);
    let (synced, ()) = tokio::join!(session.sync(&tree, &here, options), async {
        cable.has_carried(MIB as u64).await;
        cable.breaks(Cut::Closed, &session).await;
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
    // All rows of the other file may cross again with it, and nothing else.
    let carried = *cable.carried.borrow();
    assert!(carried < 2 * ROWS_BYTES as u64, "{carried}");
}
