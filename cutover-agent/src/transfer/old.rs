//! The target's end of files that are written anew: their old content, which new content is put together from.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::wire::{Fault, Part, REPLACED_MAX};
use crate::files::blocks;
use crate::files::cuts::{self, Cut};
use crate::files::{FilesError, Kind, Manifest, Root, apply};

/// Cuts these files of a tree. One that has further names, or cannot be read, has no cuts.
///
/// # Errors
/// When there are too many, one is no file, or it was cancelled.
pub(super) fn cut(
    root: &Root,
    manifest: &Manifest,
    files: &[u32],
    cancel: &AtomicBool,
) -> Result<Vec<Vec<Cut>>, Fault> {
    if files.len() > REPLACED_MAX {
        return Err(Fault::Garbled);
    }
    let cut = |file: &u32| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Fault::Abandoned);
        }
        let opened = open(root, path(manifest, *file)?);
        Ok(opened
            .and_then(|file| cuts::of_file(&file))
            .unwrap_or_default())
    };
    files.iter().map(cut).collect()
}

fn path(manifest: &Manifest, file: u32) -> Result<&[u8], Fault> {
    let entry = manifest.entries.get(file as usize);
    let entry = entry.filter(|entry| matches!(entry.kind, Kind::File { .. }));
    entry
        .map(|entry| entry.path.as_slice())
        .ok_or(Fault::Garbled)
}

/// Opens a file that no other name leads to.
fn open(root: &Root, path: &[u8]) -> Result<OwnedFd, Errno> {
    let file = root.open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK, 0)?;
    let stat = rustix::fs::fstat(&file)?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file && stat.st_nlink == 1 {
        Ok(file)
    } else {
        Err(Errno::MLINK)
    }
}

/// The old content of a round's files that are written anew, by their places in its base. Their names are free.
#[derive(Debug, Default)]
pub(super) struct OldFiles(HashMap<u32, OwnedFd>);

impl OldFiles {
    /// Opens these files of the base and takes their names away.
    ///
    /// # Errors
    /// When there are too many, one is no file, has further names, or the tree cannot be changed.
    pub(super) fn set_aside(root: &Root, base: &Manifest, files: &[u32]) -> Result<Self, Fault> {
        if files.len() > REPLACED_MAX {
            return Err(Fault::Garbled);
        }
        let mut old = HashMap::new();
        for &file in files {
            let path = path(base, file)?;
            let failed = |errno| Fault::from(FilesError::read(root.shown(path), errno));
            old.insert(file, open(root, path).map_err(failed)?);
            apply::remove(root, &base.entries[file as usize])?;
        }
        Ok(Self(old))
    }

    pub(super) fn contains(&self, file: usize) -> bool {
        u32::try_from(file).is_ok_and(|file| self.0.contains_key(&file))
    }

    /// Puts bytes together: parts of the old file, and `new` ones in their order. Gives the new ones that are left.
    ///
    /// # Errors
    /// When a part cannot be read, or is not all there.
    pub(super) fn weave<'a>(
        &self,
        from: u32,
        parts: &[Part],
        mut new: &'a [u8],
        woven: &mut [u8],
    ) -> Result<&'a [u8], Fault> {
        let old = self.0.get(&from).ok_or(Fault::Garbled)?;
        let mut rest = woven;
        for part in parts {
            let length = part.length() as usize;
            let (place, after) = rest.split_at_mut_checked(length).ok_or(Fault::Garbled)?;
            rest = after;
            match part {
                Part::New(_) => {
                    let bytes;
                    (bytes, new) = new.split_at_checked(length).ok_or(Fault::Garbled)?;
                    place.copy_from_slice(bytes);
                }
                Part::Old { at, .. } => read(old, place, *at)?,
            }
        }
        if rest.is_empty() {
            Ok(new)
        } else {
            Err(Fault::Garbled)
        }
    }
}

/// Fills a buffer from a place in a file that reaches beyond it.
fn read(file: &OwnedFd, buffer: &mut [u8], at: u64) -> Result<(), Fault> {
    match blocks::read_at(file, buffer, at) {
        Ok(filled) if filled == buffer.len() => Ok(()),
        // It ends before, or no file reaches that far.
        Ok(_) | Err(Errno::INVAL) => Err(Fault::Garbled),
        Err(errno) => {
            let reason = format!(
                "cannot read the old content of a file: {}",
                std::io::Error::from(errno)
            );
            Err(Fault::Files { reason })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::content;

    /// A tree with a file, one with two names, and a folder.
    fn tree() -> (tempfile::TempDir, Root, Manifest) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a"), b"old content").unwrap();
        std::fs::write(at("b"), b"of two names").unwrap();
        std::fs::hard_link(at("b"), at("c")).unwrap();
        std::fs::create_dir(at("d")).unwrap();
        let root = Root::open(folder.path()).unwrap();
        let manifest = content::scan(&root, &AtomicBool::new(false)).unwrap();
        (folder, root, manifest)
    }

    const FILE: u32 = 1;
    const LINKED: u32 = 2;

    #[test]
    fn what_is_no_file_of_the_tree_is_neither_cut_nor_set_aside() {
        let (_folder, root, manifest) = tree();
        let cancel = AtomicBool::new(false);
        for other in [0, 3, 4, 5, u32::MAX] {
            let refused = cut(&root, &manifest, &[FILE, other], &cancel);
            assert_eq!(refused, Err(Fault::Garbled), "{other}");
            let refused = OldFiles::set_aside(&root, &manifest, &[other]);
            assert!(matches!(refused, Err(Fault::Garbled)), "{other}");
        }
        let many = vec![FILE; REPLACED_MAX + 1];
        assert_eq!(cut(&root, &manifest, &many, &cancel), Err(Fault::Garbled));
        assert!(OldFiles::set_aside(&root, &manifest, &many).is_err());
        let cancelled = cut(&root, &manifest, &[FILE], &AtomicBool::new(true));
        assert_eq!(cancelled, Err(Fault::Abandoned));
    }

    #[test]
    fn a_file_of_two_names_keeps_both() {
        let (folder, root, manifest) = tree();
        let cuts = cut(&root, &manifest, &[LINKED, FILE], &AtomicBool::new(false)).unwrap();
        assert!(cuts[0].is_empty());
        assert_eq!(cuts[1].len(), 1);
        assert!(OldFiles::set_aside(&root, &manifest, &[LINKED]).is_err());
        assert!(folder.path().join("b").exists());
    }

    #[test]
    fn old_content_is_read_after_its_name_is_gone_and_never_beyond_its_end() {
        let (folder, root, manifest) = tree();
        let old = OldFiles::set_aside(&root, &manifest, &[FILE]).unwrap();
        assert!(!folder.path().join("a").exists());
        assert!(old.contains(FILE as usize) && !old.contains(LINKED as usize));
        let take = |at, length| Part::Old { at, length };
        let mut woven = [0; 10];
        let rest = old.weave(FILE, &[take(4, 7), Part::New(3)], b"new left", &mut woven);
        assert_eq!((rest, &woven), (Ok(&b" left"[..]), b"contentnew"));
        for parts in [
            vec![take(4, 8), Part::New(2)],
            vec![take(u64::MAX, 10)],
            vec![take(0, 9)],
            vec![take(0, 11)],
            vec![Part::New(9), take(0, 1)],
        ] {
            let refused = old.weave(FILE, &parts, b"short", &mut woven);
            assert_eq!(refused, Err(Fault::Garbled), "{parts:?}");
        }
        assert_eq!(
            old.weave(LINKED, &[take(0, 10)], b"", &mut woven),
            Err(Fault::Garbled)
        );
    }
}
