//! Random trees, random changes between rounds: the target's tree is the source's, whatever happened.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use crate::world::{World, picture};

/// One thing that can happen to a tree; names are drawn from a few, so that they meet.
#[derive(Debug, Clone)]
enum Change {
    Write { name: u8, blocks: u8, seed: u8 },
    Patch { name: u8, at: u32, seed: u8 },
    Insert { name: u8, at: u32, bytes: u16 },
    Cut { name: u8, size: u32 },
    Folder { name: u8 },
    Link { name: u8, to: u8 },
    HardLink { name: u8, to: u8 },
    Rename { name: u8, to: u8 },
    Remove { name: u8 },
    Mode { name: u8, mode: u16 },
    Attribute { name: u8, value: u8 },
}

fn change() -> impl Strategy<Value = Change> {
    let name = 0..24_u8;
    prop_oneof![
        4 => (name.clone(), 0..9_u8, any::<u8>()).prop_map(|(name, blocks, seed)| Change::Write { name, blocks, seed }),
        3 => (name.clone(), 0..100_000_u32, any::<u8>()).prop_map(|(name, at, seed)| Change::Patch { name, at, seed }),
        3 => (name.clone(), 0..100_000_u32, any::<u16>()).prop_map(|(name, at, bytes)| Change::Insert { name, at, bytes }),
        2 => (name.clone(), 0..200_000_u32).prop_map(|(name, size)| Change::Cut { name, size }),
        3 => name.clone().prop_map(|name| Change::Folder { name }),
        1 => (name.clone(), name.clone()).prop_map(|(name, to)| Change::Link { name, to }),
        2 => (name.clone(), name.clone()).prop_map(|(name, to)| Change::HardLink { name, to }),
        2 => (name.clone(), name.clone()).prop_map(|(name, to)| Change::Rename { name, to }),
        2 => name.clone().prop_map(|name| Change::Remove { name }),
        1 => (name.clone(), 0..0o1000_u16).prop_map(|(name, mode)| Change::Mode { name, mode }),
        1 => (name, any::<u8>()).prop_map(|(name, value)| Change::Attribute { name, value }),
    ]
}

/// 24 places on three levels; the lowest are databases, whose blocks are patched.
fn place(root: &Path, name: u8) -> PathBuf {
    let parts = ["a", "b", "c", "d"];
    let part = |number: u8| parts[usize::from(number % 4)];
    match name / 8 {
        0 => root.join(part(name)),
        1 => root.join(part(name)).join(part(name / 4)),
        _ => root.join(part(name)).join(part(name / 4)).join("e.db"),
    }
}

/// Does it if it can be done; what fails (no such file, a folder in the way) is no change.
fn happen(root: &Path, change: &Change) {
    let at = |name: &u8| place(root, *name);
    let is_plain = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_file());
    let _: std::io::Result<()> = match change {
        Change::Write { name, blocks, seed } if !at(name).is_symlink() => {
            let bytes = usize::from(*blocks) * 16384 + usize::from(*seed);
            // Every third is zeros, every third compresses well.
            let data = (0..bytes).map(|at| match seed % 3 {
                0 => 0,
                1 => *seed,
                _ => blake3::hash(&(at as u64 / 32).to_le_bytes()).as_bytes()[at % 32] ^ seed,
            });
            fs::write(at(name), data.collect::<Vec<_>>())
        }
        Change::Patch {
            name,
            at: offset,
            seed,
        } if is_plain(&at(name)) => fs::OpenOptions::new()
            .write(true)
            .open(at(name))
            .and_then(|file| file.write_all_at(&[*seed; 100], u64::from(*offset))),
        Change::Insert {
            name,
            at: offset,
            bytes,
        } if is_plain(&at(name)) => fs::read(at(name)).and_then(|mut data| {
            let offset = (*offset as usize).min(data.len());
            data.splice(offset..offset, vec![7; usize::from(*bytes)]);
            fs::write(at(name), data)
        }),
        Change::Cut { name, size } if is_plain(&at(name)) => fs::OpenOptions::new()
            .write(true)
            .open(at(name))
            .and_then(|file| file.set_len(u64::from(*size))),
        Change::Folder { name } => fs::create_dir(at(name)),
        Change::Link { name, to } => symlink(place(Path::new(""), *to), at(name)),
        Change::HardLink { name, to } if is_plain(&at(to)) => fs::hard_link(at(to), at(name)),
        Change::Rename { name, to } => fs::rename(at(name), at(to)),
        Change::Remove { name } => {
            fs::remove_file(at(name)).or_else(|_| fs::remove_dir_all(at(name)))
        }
        Change::Mode { name, mode } if !at(name).is_symlink() => {
            // Always readable for us: an unreadable file is another test.
            fs::set_permissions(
                at(name),
                fs::Permissions::from_mode(u32::from(*mode) | 0o500),
            )
        }
        Change::Attribute { name, value } if is_plain(&at(name)) => {
            xattr::set(at(name), "user.test", &[*value])
        }
        _ => Ok(()),
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn after_every_round_both_trees_are_equal(
        rounds in proptest::collection::vec((proptest::collection::vec(change(), 0..25), any::<bool>()), 1..5)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::new().await;
            let mut session = world.connect().await;
            for (changes, is_new_session) in &rounds {
                changes.iter().for_each(|change| happen(&world.here(), change));
                if *is_new_session {
                    drop(session);
                    session = world.connect().await;
                }
                world.sync(&session).await.unwrap();
                prop_assert_eq!(picture(&world.here()), picture(&world.there()));
            }
            Ok(())
        })?;
    }
}
