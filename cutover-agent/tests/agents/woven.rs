//! Files that were written anew: of what the target's old file holds somewhere, nothing crosses again.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use cutover_agent::peer::Session;
use cutover_agent::transfer::SyncOptions;

use crate::world::{LIMIT, World, noise, synced};

/// Bytes of the file: far more than what may cross.
const FILE_BYTES: usize = 4 << 20;
/// What a change of a few bytes may cost: the pieces it is in, of 32 KiB at most, and those beside them.
const FEW_BYTES: u64 = 160 << 10;

/// Gives a file another version, as installers do: beside it first, then in its place.
fn replace(path: &Path, content: &[u8]) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).unwrap();
    fs::rename(&beside, path).unwrap();
}

/// A world whose target has a file, and the file's content.
async fn with_a_file(name: &str) -> (World, Session, Vec<u8>) {
    let world = World::new().await;
    let content = noise(FILE_BYTES);
    fs::write(world.here().join(name), &content).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    (world, session, content)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_inserted_or_removed_cross_and_what_follows_them_does_not() {
    let (world, session, mut content) = with_a_file("app.js").await;
    let mut session = Some(session);
    let file = world.here().join("app.js");
    let changes: [(usize, usize, &str); 4] = [
        (0, 0, "a line more at the beginning\n"),
        (1_000_000, 0, "x"),
        (1_000_000, 77_777, ""),
        (FILE_BYTES / 2, 100, "something else"),
    ];
    for (round, (at, removed, inserted)) in changes.into_iter().enumerate() {
        content.splice(at..at + removed, inserted.bytes());
        replace(&file, &content);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        xattr::set(&file, "user.round", &[round as u8]).unwrap();
        if round == 2 {
            // One that has to ask what the target has.
            drop(session.take());
        }
        let taken = match session.take() {
            Some(session) => session,
            None => world.connect().await,
        };
        let report = synced(&world, session.insert(taken), SyncOptions::live(LIMIT)).await;
        assert!(report.bytes_data < FEW_BYTES, "{round}: {report:?}");
    }
    let session = session.unwrap();
    // The same while everybody waits, and written into the file itself.
    content.splice(5..5, *b"once more");
    fs::write(&file, &content).unwrap();
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let report = synced(&world, &session, frozen).await;
    assert!(report.bytes_data < FEW_BYTES, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_file_is_not_asked_about_while_everybody_waits() {
    let world = World::new().await;
    let (file, mut content) = (world.here().join("small"), noise(200_000));
    fs::write(&file, &content).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    content.insert(0, 1);
    replace(&file, &content);
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let report = synced(&world, &session, frozen).await;
    assert_eq!(report.bytes_data, 200_001);
    content.insert(0, 2);
    replace(&file, &content);
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert!(report.bytes_data < FEW_BYTES, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_written_in_place_and_those_with_further_names_go_by_blocks() {
    let (world, session, mut content) = with_a_file("table.ibd").await;
    let [table, log, linked] = ["table.ibd", "log", "linked"].map(|name| world.here().join(name));
    fs::write(&log, &content).unwrap();
    fs::write(&linked, &content).unwrap();
    fs::hard_link(&linked, world.here().join("second name")).unwrap();
    world.sync(&session).await.unwrap();
    // Its bytes have moved about, but its name says that they do not.
    content.insert(0, 1);
    fs::write(&table, &content).unwrap();
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert_eq!(report.bytes_data, FILE_BYTES as u64 + 1);
    // Moved about otherwise: with blocks of the table, which may be looked at once more, some would not have to cross.
    content.insert(0, 2);
    fs::write(&linked, &content).unwrap();
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert_eq!(report.bytes_data, FILE_BYTES as u64 + 2);
    // A log that grows, and is patched here and there, stays the file it is.
    let inode = || fs::metadata(world.there().join("log")).unwrap().ino();
    let before = inode();
    let open = fs::OpenOptions::new().write(true).open(&log).unwrap();
    open.write_all_at(b"one line more", FILE_BYTES as u64)
        .unwrap();
    open.write_all_at(b"patched", 100_000).unwrap();
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert!(report.bytes_data <= 2 * 16384 + 13, "{report:?}");
    // Records that change at their beginnings do so at regular distances.
    for at in (0..FILE_BYTES as u64).step_by(FILE_BYTES / 16) {
        open.write_all_at(b"changed", at).unwrap();
    }
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert!(report.bytes_data <= 16 * 16384, "{report:?}");
    assert_eq!(inode(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_of_a_file_that_is_written_anew_stay_holes() {
    let world = World::new().await;
    let file = world.here().join("image");
    let data = noise(300_000);
    let write = |shift: u64| {
        let new = fs::File::create(world.here().join("new")).unwrap();
        new.set_len(64 << 20).unwrap();
        for at in [0, 20 << 20, 40_000_123] {
            new.write_all_at(&data, at + shift).unwrap();
        }
        fs::rename(world.here().join("new"), &file).unwrap();
    };
    write(0);
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    write(333);
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert!(report.bytes_data < 2 * FEW_BYTES, "{report:?}");
    let blocks = fs::metadata(world.there().join("image")).unwrap().blocks();
    assert!(blocks * 512 < 2 << 20, "{blocks} blocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_old_file_is_not_what_it_was_gets_the_new_one_all_the_same() {
    let (world, session, mut content) = with_a_file("app.js").await;
    let there = fs::OpenOptions::new()
        .write(true)
        .open(world.there().join("app.js"))
        .unwrap();
    content.insert(0, 1);
    replace(&world.here().join("app.js"), &content);
    // Nobody may write there. If somebody does, it is told what is cut, but not what was hashed before.
    for at in (0..FILE_BYTES as u64).step_by(100_000) {
        there.write_all_at(b"not what it was", at).unwrap();
    }
    synced(&world, &session, SyncOptions::live(LIMIT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_target_weaves_from_what_it_has_then() {
    let (mut world, session, mut content) = with_a_file("app.js").await;
    world.restart().await;
    drop(session);
    let session = world.connect().await;
    content.insert(FILE_BYTES / 2, 1);
    replace(&world.here().join("app.js"), &content);
    let report = synced(&world, &session, SyncOptions::live(LIMIT)).await;
    assert!(report.bytes_data < FEW_BYTES, "{report:?}");
}
