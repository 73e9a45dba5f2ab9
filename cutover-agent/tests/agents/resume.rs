//! Links that break in the middle of a round: the session is taken up again, and the round goes on from what has arrived.

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use cutover_agent::peer::{self, PeerTimeouts, Session};
use cutover_agent::transfer::SyncOptions;

use crate::cable::{Cable, Cut};
use crate::world::{LIMIT, TIMEOUTS, World, picture, volume};

const MIB: u64 = 1 << 20;
const TREE_BYTES: u64 = 192 * MIB;
/// Where in a copy the link breaks.
const BREAK_BYTES: u64 = 80 * MIB;

/// A target behind a cable, and a tree that nothing can compress.
async fn world(dead_after: Duration) -> (World, Cable, Session) {
    let world = World::new().await;
    let mut data = vec![0; TREE_BYTES as usize / 4];
    for number in 0..4_u8 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[number]).finalize_xof().fill(&mut data);
        fs::write(world.here().join(format!("file-{number}")), &data).unwrap();
    }
    let cable = Cable::to(world.addr).await;
    let session = cable.connect(&world, dead_after).await;
    (world, cable, session)
}

fn assert_little_moved_twice(cable: &Cable) {
    let carried = *cable.carried.borrow();
    // Two in a hundred, and what greetings, records and lists take.
    let most = TREE_BYTES / 100 * 102 + MIB;
    assert!(
        carried <= most,
        "{carried} bytes were carried for {TREE_BYTES}"
    );
}

async fn breaks_and_heals(cut: Cut, options: SyncOptions) {
    // Only silence has to be waited for.
    let dead_after = match cut {
        Cut::Silent => Duration::from_secs(2),
        _ => LIMIT,
    };
    let (world, cable, session) = world(dead_after).await;
    let (volume, here) = (volume(), world.here());
    let (synced, ()) = tokio::join!(session.sync(&volume, &here, options), async {
        cable.has_carried(BREAK_BYTES).await;
        cable.breaks(cut, &session).await;
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
    assert_little_moved_twice(&cable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_was_sealed_is_left_alone_when_only_the_answer_was_lost() {
    let world = World::new().await;
    let cable = Cable::to(world.addr).await;
    let timeouts = PeerTimeouts {
        resume_within: LIMIT,
        ..TIMEOUTS
    };
    fs::write(world.here().join("file"), "sealed").unwrap();
    let session = peer::connect(cable.addr, world.tls(), timeouts, 2)
        .await
        .unwrap();
    world.sync(&session).await.unwrap();
    // What a container does that is built on it: CRIU puts files there that were open and deleted.
    fs::write(world.there().join("ghost"), "restored").unwrap();
    cable.breaks(Cut::Closed, &session).await;
    let again = world.sync(&session).await.unwrap();
    assert_eq!(again.bytes_data, 0);
    assert!(world.there().join("ghost").exists());
    // Another session looks for itself.
    drop(session);
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    assert!(!world.there().join("ghost").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_goes_on_after_every_connection_was_closed() {
    breaks_and_heals(Cut::Closed, SyncOptions::live(LIMIT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_goes_on_after_the_link_fell_silent() {
    breaks_and_heals(Cut::Silent, SyncOptions::live(LIMIT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_frozen_pass_and_new_images_go_on_as_well() {
    breaks_and_heals(Cut::Closed, SyncOptions::frozen(LIMIT, HashSet::new())).await;
    breaks_and_heals(Cut::Closed, SyncOptions::images(LIMIT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_files_that_are_written_anew_goes_on_as_well() {
    let (world, cable, session) = world(LIMIT).await;
    let (volume, here) = (volume(), world.here());
    world.sync(&session).await.unwrap();
    for number in 0..4 {
        let file = here.join(format!("file-{number}"));
        let mut content = fs::read(&file).unwrap();
        content.insert(0, 7);
        // Half of it stays what it was.
        let middle = content.len() / 2;
        content[middle..].reverse();
        fs::write(&file, content).unwrap();
    }
    let before = *cable.carried.borrow();
    let options = SyncOptions::live(LIMIT);
    let (synced, ()) = tokio::join!(session.sync(&volume, &here, options), async {
        cable.has_carried(before + 40 * MIB).await;
        cable.breaks(Cut::Closed, &session).await;
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_rows_that_changed_goes_on_as_well() {
    const BLOCK_BYTES: usize = 16 << 10;
    let (world, cable, session) = world(LIMIT).await;
    let (volume, here) = (volume(), world.here());
    for number in 0..4 {
        let [file, table] = ["", ".ibd"].map(|end| here.join(format!("file-{number}{end}")));
        fs::rename(file, table).unwrap();
    }
    world.sync(&session).await.unwrap();
    let mut row = vec![0; 4000];
    for number in 0..4_u8 {
        let file = here.join(format!("file-{number}.ibd"));
        let mut content = fs::read(&file).unwrap();
        for (at, block) in content.chunks_mut(BLOCK_BYTES).enumerate() {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&[number]).update(&at.to_le_bytes());
            hasher.finalize_xof().fill(&mut row);
            block[100..][..row.len()].copy_from_slice(&row);
        }
        fs::write(&file, content).unwrap();
    }
    let before = *cable.carried.borrow();
    let options = SyncOptions::frozen(LIMIT, HashSet::new());
    let (synced, ()) = tokio::join!(session.sync(&volume, &here, options), async {
        cable.has_carried(before + 20 * MIB).await;
        cable.breaks(Cut::Closed, &session).await;
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
    // Nine sub-blocks of 512 bytes of each block, a list of digests, and what was on its way.
    let carried = *cable.carried.borrow() - before;
    assert!(carried < TREE_BYTES / 2, "{carried}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_and_its_bytes_are_fetched_again() {
    let (world, cable, session) = world(LIMIT).await;
    let (volume, here) = (volume(), world.here());
    let options = SyncOptions::live(LIMIT);
    let (synced, ()) = tokio::join!(session.sync(&volume, &here, options), async {
        for part in 1..=3 {
            cable.has_carried(part * BREAK_BYTES / 2).await;
            cable.cut.send_replace(Cut::Flip);
            let mut cut = cable.cut.subscribe();
            cut.wait_for(|cut| *cut == Cut::Whole).await.unwrap();
        }
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_goes_on_with_a_target_that_was_restarted_in_the_middle() {
    let (mut world, cable, session) = world(LIMIT).await;
    let (volume, here) = (volume(), world.here());
    let syncing = session.sync(&volume, &here, SyncOptions::live(LIMIT));
    let (synced, ()) = tokio::join!(syncing, async {
        cable.has_carried(BREAK_BYTES).await;
        world.restart().await;
    });
    synced.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_stays_broken_is_given_up_when_its_time_is_over() {
    let world = World::new().await;
    let cable = Cable::to(world.addr).await;
    let timeouts = PeerTimeouts {
        resume_within: Duration::from_secs(3),
        ..TIMEOUTS
    };
    let session = peer::connect(cable.addr, world.tls(), timeouts, 2)
        .await
        .unwrap();
    cable.cut.send_replace(Cut::Closed);
    session.lost().await;
    let began = Instant::now();
    // Only the first one waits: whoever undoes a hop asks for many things.
    for _ in 0..10 {
        let error = world.sync(&session).await.unwrap_err().to_string();
        assert!(
            error.contains("the connection to the peer is lost"),
            "{error}"
        );
    }
    assert!(began.elapsed() < 10 * timeouts.resume_within);
    // And a peer that is back is found all the same.
    cable.cut.send_replace(Cut::Whole);
    world.sync(&session).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_bandwidth_holds_for_all_streams_together() {
    let world = World::new().await;
    let mut noise = vec![0; 2 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    fs::write(world.here().join("noise"), &noise).unwrap();
    let session = world.connect().await;
    session.limit_bandwidth(Some(4 << 20));
    let report = world.sync(&session).await.unwrap();
    // The first piece of all goes at once, and nothing makes a copy faster than its limit.
    assert!(
        report.took > Duration::from_millis(450),
        "{:?}",
        report.took
    );
    session.limit_bandwidth(None);
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 0);
    assert_eq!(picture(&world.here()), picture(&world.there()));
}
