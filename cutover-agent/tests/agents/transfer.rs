//! Trees moved between two agents over mutual TLS on loopback, compared entry by entry.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use crate::world::{LIMIT, Mounted, World, picture, volume};
use cutover_agent::transfer::{Fault, SyncOptions, TransferError, TreeName};

pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut data);
    data
}

/// Said past the test runner, which would keep it to itself when the test passes.
fn left_out(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "left out: {what}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_arrives_with_content_metadata_and_links() {
    let world = World::new().await;
    let here = world.here();
    fs::create_dir_all(here.join("data/empty")).unwrap();
    fs::write(here.join("data/large"), pattern(1, 3_000_001)).unwrap();
    fs::write(here.join("data/none"), "").unwrap();
    fs::hard_link(here.join("data/large"), here.join("second name")).unwrap();
    symlink("../outside", here.join("link")).unwrap();
    fs::write(here.join("private"), "x").unwrap();
    xattr::set(here.join("private"), "user.note", b"kept").unwrap();
    fs::set_permissions(here.join("private"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(here.join("data/empty"), fs::Permissions::from_mode(0o555)).unwrap();
    let session = world.connect().await;
    let report = world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    assert_eq!((report.files, report.bytes_tree), (3, 3_000_002));
    let again = world.sync(&session).await.unwrap();
    assert_eq!(again.bytes_data, 0, "nothing changed, nothing moves");
    assert!(again.bytes_wire < 200, "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_changed_blocks_move_in_later_rounds_and_after_a_reconnect() {
    let world = World::new().await;
    let file = world.here().join("blob");
    fs::write(&file, pattern(2, 40 * 16384)).unwrap();
    let session = world.connect().await;
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 40 * 16384);
    let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.write_all_at(b"changed", 7 * 16384 + 5).unwrap();
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 16384);
    drop(session);
    let session = world.connect().await;
    open.write_all_at(b"changed", 9 * 16384).unwrap();
    assert_eq!(
        world.sync(&session).await.unwrap().bytes_data,
        16384,
        "the target told what it has"
    );
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_stays_sparse_and_costs_nothing() {
    let world = World::new().await;
    let file = fs::File::create(world.here().join("sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(b"in the middle", 500 << 20).unwrap();
    let session = world.connect().await;
    let report = world.sync(&session).await.unwrap();
    assert_eq!(report.bytes_data, 16384);
    let there = fs::metadata(world.there().join("sparse")).unwrap();
    assert_eq!(there.len(), 1 << 30);
    assert!(there.blocks() * 512 < 1 << 20, "{} blocks", there.blocks());
    // What became zero in the meantime becomes a hole.
    fs::write(world.here().join("sparse"), pattern(3, 1 << 20)).unwrap();
    world.sync(&session).await.unwrap();
    fs::write(world.here().join("sparse"), vec![0; 1 << 20]).unwrap();
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 0);
    assert_eq!(
        fs::metadata(world.there().join("sparse")).unwrap().blocks(),
        0
    );
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_may_change_their_kind_their_name_and_their_links() {
    let world = World::new().await;
    let here = world.here();
    let session = world.connect().await;
    fs::create_dir_all(here.join("a/b/c")).unwrap();
    fs::write(here.join("a/b/c/file"), "1").unwrap();
    fs::write(here.join("f"), "2").unwrap();
    fs::hard_link(here.join("f"), here.join("g")).unwrap();
    world.sync(&session).await.unwrap();
    fs::remove_dir_all(here.join("a")).unwrap();
    fs::write(here.join("a"), "a file now").unwrap();
    fs::remove_file(here.join("g")).unwrap();
    fs::write(here.join("g"), "no link any more").unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    assert_eq!(
        fs::read_to_string(world.there().join("f")).unwrap(),
        "2",
        "the broken link did not write through"
    );
    fs::remove_file(here.join("a")).unwrap();
    fs::create_dir(here.join("a")).unwrap();
    fs::rename(here.join("g"), here.join("a/g")).unwrap();
    fs::remove_file(here.join("f")).unwrap();
    fs::hard_link(here.join("a/g"), here.join("f")).unwrap();
    symlink("a", here.join("z")).unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    fs::remove_file(here.join("z")).unwrap();
    fs::create_dir(here.join("z")).unwrap();
    fs::write(here.join("z/inside"), "not in a").unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_devices_and_overlay_marks_arrive() {
    if !is_root() {
        left_out("device nodes: only root can make them");
        return;
    }
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let world = World::new().await;
    let here = world.here();
    mknodat(
        CWD,
        here.join("whiteout"),
        FileType::CharacterDevice,
        Mode::empty(),
        0,
    )
    .unwrap();
    mknodat(
        CWD,
        here.join("null"),
        FileType::CharacterDevice,
        Mode::RUSR,
        makedev(1, 3),
    )
    .unwrap();
    mknodat(CWD, here.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    fs::create_dir(here.join("opaque")).unwrap();
    fs::write(here.join("owned"), "x").unwrap();
    std::os::unix::fs::chown(here.join("owned"), Some(1234), Some(4321)).unwrap();
    // Not every file system keeps them.
    let _ = xattr::set(here.join("opaque"), "trusted.overlay.opaque", b"y");
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    fs::remove_file(here.join("whiteout")).unwrap();
    fs::write(here.join("whiteout"), "back again").unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_trees_move_at_once_and_are_dropped_one_by_one() {
    let world = World::new().await;
    let other = world.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(world.here().join("x"), pattern(4, 5 << 20)).unwrap();
    fs::write(other.join("y"), pattern(5, 5 << 20)).unwrap();
    let session = world.connect().await;
    let upper = TreeName::new("web/upper").unwrap();
    let images = SyncOptions::images(LIMIT);
    let (one, two) = tokio::join!(world.sync(&session), session.sync(&upper, &other, images));
    assert_eq!((one.unwrap().files, two.unwrap().files), (1, 1));
    let there = world.folder.path().join("there/web/upper");
    assert_eq!(picture(&other), picture(&there));
    assert_eq!(session.size(&upper, LIMIT).await.unwrap(), (5 << 20, 2));
    session.drop_tree(&upper, LIMIT).await.unwrap();
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    assert_eq!(picture(&world.here()), picture(&world.there()));
    assert!(session.space(&upper, LIMIT).await.unwrap().free_bytes > 0);
    session
        .sync(&upper, &other, SyncOptions::live(LIMIT))
        .await
        .unwrap();
    assert_eq!(picture(&other), picture(&there));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_open_for_writing_is_read_again_although_its_times_did_not_change() {
    let world = World::new().await;
    let path = world.here().join("mapped");
    fs::write(&path, pattern(6, 4 * 16384)).unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(old).unwrap();
    let meta = file.metadata().unwrap();
    let always = [(meta.dev(), meta.ino())].into();
    let report = session
        .sync(&volume(), &world.here(), SyncOptions::frozen(LIMIT, always))
        .await
        .unwrap();
    assert_eq!((report.bytes_read, report.bytes_data), (4 * 16384, 0));
}

/// An access list as the kernel keeps it (linux/posix_acl_xattr.h): the owner, one more user, group, mask, others.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_round_looks_only_at_what_has_changed_since_the_round_before() {
    // Nobody else writes there, so that nobody else's changes are too many.
    let world = World::within(tempfile::tempdir_in("/dev/shm").unwrap()).await;
    let here = world.here();
    for number in 0..300 {
        fs::create_dir_all(here.join(format!("{}", number % 10))).unwrap();
        fs::write(here.join(format!("{}/{number}", number % 10)), "x").unwrap();
    }
    let session = world.connect().await;
    let all = world.sync(&session).await.unwrap().looked;
    assert_eq!(all, 1 + 10 + 300);
    fs::write(here.join("7/7"), "changed").unwrap();
    fs::rename(here.join("8"), here.join("9/moved")).unwrap();
    let frozen = || SyncOptions::frozen(LIMIT, Default::default());
    let report = session.sync(&volume(), &here, frozen()).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    if is_root() {
        // The root, one file, the folder's old place, where it moved to, itself, its 30 files.
        assert_eq!(report.looked, 1 + 1 + 1 + 1 + 1 + 30);
        assert_eq!(report.bytes_read, 7 + 30, "nothing else was read");
    } else {
        assert_eq!(report.looked, all);
        left_out("what changed is told to root only");
    }
    // A frozen round that is done again builds on the one before.
    fs::remove_file(here.join("1/1")).unwrap();
    let report = session.sync(&volume(), &here, frozen()).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    // The root, the folder, the place of the file.
    assert!(report.looked == 3 || !is_root(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_does_not_tell_of_changes_is_looked_at_as_a_whole() {
    // An overlay itself: it is told of in its upper layer only.
    if !is_root() {
        return left_out("mounting takes root");
    }
    let world = World::new().await;
    let folder = world.folder.path();
    for name in ["lower", "upper", "work"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    let layer = |name: &str| folder.join(name).display().to_string();
    let (lower, upper, work) = (layer("lower"), layer("upper"), layer("work"));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let Some(mounted) = Mounted::of("overlay", &options, world.here()) else {
        return left_out("an overlay cannot be mounted");
    };
    fs::write(world.here().join("a"), "1").unwrap();
    fs::write(world.here().join("b"), "2").unwrap();
    let session = world.connect().await;
    assert_eq!(world.sync(&session).await.unwrap().looked, 3);
    fs::write(world.here().join("a"), "changed").unwrap();
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let report = session
        .sync(&volume(), &world.here(), frozen)
        .await
        .unwrap();
    assert_eq!(report.looked, 3);
    assert_eq!(picture(&world.here()), picture(&world.there()));
    drop(mounted);
}

fn acl(user: u32, permissions: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let lines: [(u16, u16, u32); 5] = [
        (0x01, 6, NOBODY),
        (0x02, permissions, user),
        (0x04, 4, NOBODY),
        (0x10, 6, NOBODY),
        (0x20, 0, NOBODY),
    ];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in lines {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn access_lists_arrive_and_new_files_do_not_inherit_one_that_the_source_lacks() {
    let world = World::new().await;
    let here = world.here();
    fs::create_dir(here.join("shared")).unwrap();
    fs::write(here.join("shared/plain"), "made before there was a default").unwrap();
    fs::write(here.join("shared/empty"), "").unwrap();
    fs::write(here.join("shared/listed"), "x").unwrap();
    let access = ("system.posix_acl_access", acl(1234, 4));
    if let Err(error) = xattr::set(here.join("shared/listed"), access.0, &access.1) {
        left_out(&format!(
            "access lists: this file system has none ({error})"
        ));
        return;
    }
    xattr::set(
        here.join("shared"),
        "system.posix_acl_default",
        &acl(4321, 6),
    )
    .unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    // With the default in place at the target, a new file would get it from there.
    fs::write(here.join("shared/plain"), pattern(12, 40_000)).unwrap();
    fs::write(here.join("shared/late"), "y").unwrap();
    xattr::remove(here.join("shared/late"), access.0).unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_file_costs_nothing() {
    let world = World::new().await;
    let here = world.here();
    fs::create_dir(here.join("uploads")).unwrap();
    fs::write(here.join("uploads/photo"), pattern(10, 3_000_001)).unwrap();
    fs::write(here.join("small"), pattern(11, 700)).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    fs::rename(here.join("uploads"), here.join("archive")).unwrap();
    fs::rename(here.join("small"), here.join("archive/smaller")).unwrap();
    let report = world.sync(&session).await.unwrap();
    assert_eq!(report.bytes_data, 0, "{report:?}");
    assert!(report.bytes_wire < 20_000, "{report:?}");
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_a_layer_at_the_target_does_not_cross() {
    let world = World::new().await;
    let (here, layer) = (world.here(), world.folder.path().join("layer"));
    fs::create_dir_all(layer.join("usr/src")).unwrap();
    for (name, seed, bytes) in [("large", 20, 40 * 16384 + 5), ("page.php", 21, 5000)] {
        let content = pattern(seed, bytes);
        fs::write(layer.join("usr/src").join(name), &content).unwrap();
        fs::write(here.join(format!("copy of {name}")), &content).unwrap();
    }
    // Of the same size, and with most of its blocks.
    let changed = here.join("changed");
    fs::copy(here.join("copy of large"), &changed).unwrap();
    let open = fs::OpenOptions::new().write(true).open(&changed).unwrap();
    open.write_all_at(b"changed", 7 * 16384).unwrap();
    fs::write(here.join("own"), pattern(22, 3000)).unwrap();
    let session = world.connect().await;
    let report = world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
    assert_eq!(report.bytes_data, 16384 + 3000);
    // Later rounds go by what was sealed.
    fs::write(here.join("own"), pattern(23, 3000)).unwrap();
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 3000);
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_there_is_done_without() {
    let world = World::new().await;
    fs::remove_dir(world.folder.path().join("layer")).unwrap();
    fs::write(world.here().join("page.php"), pattern(24, 5000)).unwrap();
    let session = world.connect().await;
    assert_eq!(world.sync(&session).await.unwrap().bytes_data, 5000);
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_take_the_place_of_a_folder_that_was_renamed() {
    let world = World::new().await;
    let here = world.here();
    fs::create_dir(here.join("uploads")).unwrap();
    fs::write(here.join("uploads/photo"), pattern(10, 3_000_001)).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    fs::rename(here.join("uploads"), here.join("archive")).unwrap();
    fs::write(here.join("uploads"), pattern(11, 700)).unwrap();
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&here), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_file_is_named() {
    if is_root() {
        left_out("unreadable files: root can read everything");
        return;
    }
    let world = World::new().await;
    fs::write(world.here().join("secret"), "x").unwrap();
    fs::set_permissions(
        world.here().join("secret"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
    let text = world
        .sync(&world.connect().await)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("at the source: cannot read") && text.contains("here/secret"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_tree_and_an_unknown_one_are_named() {
    let world = World::new().await;
    let session = world.connect().await;
    let nowhere = session
        .sync(
            &volume(),
            Path::new("/nonexistent/tree"),
            SyncOptions::live(LIMIT),
        )
        .await
        .unwrap_err();
    assert!(
        nowhere.to_string().contains("/nonexistent/tree"),
        "{nowhere}"
    );
    let unknown = TreeName::new("db/elsewhere").unwrap();
    let refused = session
        .sync(&unknown, &world.here(), SyncOptions::live(LIMIT))
        .await
        .unwrap_err();
    assert!(matches!(refused, TransferError::Target(Fault::UnknownTree(tree)) if tree == unknown));
    world.sync(&session).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_was_given_up_leaves_the_next_one_free() {
    let world = World::new().await;
    fs::write(world.here().join("x"), pattern(8, 30 << 20)).unwrap();
    let session = world.connect().await;
    let hasty = SyncOptions::live(Duration::from_millis(40));
    let outcome = session.sync(&volume(), &world.here(), hasty).await;
    assert!(matches!(outcome, Err(TransferError::Deadline { .. })) || outcome.is_ok());
    world.sync(&session).await.unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_at_the_target_is_said_and_the_source_can_try_again() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let world = World::new().await;
    fs::create_dir_all(world.there()).unwrap();
    let size = c"size=4m";
    if let Err(error) = mount("none", world.there(), "tmpfs", MountFlags::empty(), size) {
        left_out(&format!(
            "a full disk: cannot mount a small file system ({error}); whole hops need root as well: cargo lab test"
        ));
        return;
    }
    fs::write(world.here().join("big"), pattern(9, 8 << 20)).unwrap();
    let session = world.connect().await;
    let full = world.sync(&session).await.unwrap_err().to_string();
    fs::write(world.here().join("big"), pattern(9, 2 << 20)).unwrap();
    let after = world.sync(&session).await;
    let pictures = (picture(&world.here()), picture(&world.there()));
    unmount(world.there(), UnmountFlags::DETACH).unwrap();
    assert!(
        full.contains("no space left at the target for") && full.contains("big"),
        "{full}"
    );
    after.unwrap();
    assert_eq!(pictures.0, pictures.1);
}
