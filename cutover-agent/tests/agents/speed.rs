//! How fast a round is; run by hand: `cargo test --release --test agents speed -- --ignored --nocapture --test-threads 1`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cutover_agent::transfer::{SyncOptions, SyncReport, TreeName};

use crate::world::{LIMIT, Mounted, World, volume};

/// Pages as a checkpoint of a database has them: a fifth zero, half text-like, the rest noise.
fn images(folder: &Path, mib: usize) {
    fs::create_dir_all(folder).unwrap();
    let mut noise = blake3::Hasher::new().finalize_xof();
    let mut page = [0; 4096];
    let mut data = Vec::with_capacity(mib << 20);
    for number in 0..mib << 8 {
        noise.fill(&mut page);
        match number % 10 {
            0 | 1 => page.fill(0),
            2..=7 => page.iter_mut().enumerate().for_each(|(at, byte)| {
                if at % 8 != 0 {
                    *byte = b"innodb_record_"[(at + number) % 14];
                }
            }),
            _ => {}
        }
        data.extend_from_slice(&page);
    }
    fs::write(folder.join("pages-1.img"), &data[..data.len() / 2]).unwrap();
    fs::write(folder.join("pages-2.img"), &data[data.len() / 2..]).unwrap();
    for number in 0..60 {
        fs::write(
            folder.join(format!("core-{number}.img")),
            &data[number * 4096..][..2000],
        )
        .unwrap();
    }
}

/// CPU seconds of the process so far, both ends together: on a busy machine more telling than the clock.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn show(what: &str, report: &SyncReport) {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{what}: {:.3} s, {:.1} MB read, {:.1} MB data, {:.1} MB on the wire",
        report.took.as_secs_f64(),
        mb(report.bytes_read),
        mb(report.bytes_data),
        mb(report.bytes_wire)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn a_hundred_and_fifty_megabytes_of_images_and_a_database_delta() {
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let world = World::within(shm).await;
    let session = world.connect().await;
    let before = cpu_seconds();
    println!("{:?}", session.measure(64 << 20, LIMIT).await.unwrap());
    println!("CPU {:.2} s", cpu_seconds() - before);
    let pages = world.folder.path().join("images");
    images(&pages, 150);
    let before = cpu_seconds();
    let upper = TreeName::new("web/upper").unwrap();
    show(
        "new images, 150 MB",
        &session
            .sync(&upper, &pages, SyncOptions::images(LIMIT))
            .await
            .unwrap(),
    );
    let again = SyncOptions::frozen(LIMIT, Default::default());
    show(
        "same images, frozen",
        &session.sync(&upper, &pages, again.clone()).await.unwrap(),
    );
    println!("CPU {:.2} s", cpu_seconds() - before);
    images(&world.here(), 150);
    show("database, first", &world.sync(&session).await.unwrap());
    let file = fs::OpenOptions::new()
        .write(true)
        .open(world.here().join("pages-1.img"))
        .unwrap();
    for number in 0..100 {
        file.write_all_at(b"row", number * 500_000).unwrap();
    }
    session.drop_tree(&upper, LIMIT).await.unwrap();
    let fresh = SyncOptions::images(LIMIT);
    let (start, before) = (std::time::Instant::now(), cpu_seconds());
    let (volume, here) = (volume(), world.here());
    let (delta, fresh) = tokio::join!(
        session.sync(&volume, &here, again),
        session.sync(&upper, &pages, fresh)
    );
    show("frozen: database delta", &delta.unwrap());
    show("frozen: new images beside it", &fresh.unwrap());
    println!(
        "both: {:.3} s, CPU {:.2} s",
        start.elapsed().as_secs_f64(),
        cpu_seconds() - before
    );
    let status = fs::read_to_string("/proc/self/status").unwrap();
    println!(
        "{}",
        status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn the_frozen_round_of_a_tree_of_many_files() {
    const FOLDERS: usize = 10_000;
    const FILES: usize = 100;
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let world = World::within(shm).await;
    // On a file system of its own where we may mount one: what the target writes is told to nobody in real hops.
    let mounted = Mounted::of("tmpfs", "size=50%", world.here());
    let planting = std::time::Instant::now();
    for folder in 0..FOLDERS {
        let path = world
            .here()
            .join(format!("uploads/{}/{}", folder / 100, folder % 100));
        fs::create_dir_all(&path).unwrap();
        for file in 0..FILES {
            fs::write(path.join(format!("image-{file}.jpg")), [folder as u8; 10]).unwrap();
        }
    }
    println!(
        "{} files in {FOLDERS} folders, made in {:.1?}",
        FOLDERS * FILES,
        planting.elapsed()
    );
    let session = world.connect().await;
    show("first", &world.sync(&session).await.unwrap());
    // Stamps are relied upon when they are old enough.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    show("second", &world.sync(&session).await.unwrap());
    fs::write(world.here().join("uploads/7/7/image-7.jpg"), "new").unwrap();
    fs::write(world.here().join("uploads/9/9/one more.jpg"), "new").unwrap();
    let before = cpu_seconds();
    let frozen = SyncOptions::frozen(LIMIT, Default::default());
    let report = session.sync(&volume(), &world.here(), frozen).await;
    let report = report.unwrap();
    show("frozen, two files changed", &report);
    println!("CPU {:.2} s", cpu_seconds() - before);
    println!("{} entries were looked at", report.looked);
    // What it costs those who write: the index ends with the session.
    let plant = |what: &str| {
        let begun = std::time::Instant::now();
        for file in 0..100_000 {
            fs::write(world.here().join(format!("{what} {file}")), [7; 10]).unwrap();
        }
        println!("100,000 files more, {what}: {:.2?}", begun.elapsed());
    };
    plant("told of");
    drop(session);
    plant("told to nobody");
    drop(mounted);
}
