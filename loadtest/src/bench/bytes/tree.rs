//! Looks at trees with nothing but the standard library: this is what proves a copy, so it shares no code with those
//! who made it.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::lab::error::{OnFile, Result};

/// The unit in which changes are counted: InnoDB's page.
const BLOCK_BYTES: usize = 16 << 10;
/// Differences named at most.
const NAMED_MAX: usize = 5;

/// All regular files below `folder`, sorted.
///
/// # Errors
/// When a folder cannot be read.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = entries(folder)?;
    let files = entries.into_iter().filter(|(_, meta)| meta.is_file());
    Ok(files.map(|(path, _)| folder.join(path)).collect())
}

/// Bytes of all regular files below `folder`.
///
/// # Errors
/// When a folder cannot be read.
pub fn bytes(folder: &Path) -> Result<u64> {
    let entries = entries(folder)?;
    let files = entries.values().filter(|meta| meta.is_file());
    Ok(files.map(Metadata::len).sum())
}

/// Everything below `folder` but sockets, by its path there.
fn entries(folder: &Path) -> Result<BTreeMap<PathBuf, Metadata>> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(relative) = folders.pop() {
        let at = folder.join(&relative);
        for entry in fs::read_dir(&at).on("read", &at)? {
            let entry = entry.on("read", &at)?;
            let path = relative.join(entry.file_name());
            let meta = entry.metadata().on("read", &at)?;
            if meta.is_dir() {
                folders.push(path.clone());
            }
            if !meta.file_type().is_socket() {
                found.insert(path, meta);
            }
        }
    }
    Ok(found)
}

/// In what two trees differ: names, kinds, owners, modes, times, links, content. At most a few are named.
///
/// # Errors
/// When something cannot be read.
pub fn differences(one: &Path, two: &Path) -> Result<Vec<String>> {
    let (ours, theirs) = (entries(one)?, entries(two)?);
    let mut named = Vec::new();
    for path in theirs.keys().filter(|path| !ours.contains_key(*path)) {
        named.push(format!("{} should not be there", path.display()));
    }
    for (path, meta) in &ours {
        if named.len() >= NAMED_MAX {
            break;
        }
        let problem = match theirs.get(path) {
            None => Some("is missing".to_owned()),
            Some(other) => difference(&one.join(path), meta, &two.join(path), other)?,
        };
        named.extend(problem.map(|problem| format!("{} {problem}", path.display())));
    }
    named.truncate(NAMED_MAX);
    Ok(named)
}

fn difference(
    one: &Path,
    ours: &Metadata,
    two: &Path,
    theirs: &Metadata,
) -> Result<Option<String>> {
    let parts = |meta: &Metadata| {
        let size = if meta.is_file() { meta.len() } else { 0 };
        // rsync keeps whole nanoseconds as well; a symlink's own time not every file system can set.
        let time = if meta.is_symlink() {
            (0, 0)
        } else {
            (meta.mtime(), meta.mtime_nsec())
        };
        (meta.mode(), meta.uid(), meta.gid(), size, time)
    };
    if parts(ours) != parts(theirs) {
        return Ok(Some(format!(
            "is {:?}, not {:?}",
            parts(theirs),
            parts(ours)
        )));
    }
    if ours.is_symlink() {
        let (to, other) = (
            fs::read_link(one).on("read", one)?,
            fs::read_link(two).on("read", two)?,
        );
        return Ok((to != other).then(|| "points elsewhere".to_owned()));
    }
    if !ours.is_file() {
        return Ok(None);
    }
    let changed = blocks(one, two)?;
    Ok((changed > 0).then(|| format!("differs in {changed} blocks")))
}

/// How many blocks of the files of `new` are not the same at the same place in `old`, zeros beyond its end not counted.
///
/// # Errors
/// When something cannot be read.
pub fn changed_blocks(old: &Path, new: &Path) -> Result<u64> {
    let mut changed = 0;
    for path in files(new)? {
        let relative = path.strip_prefix(new).unwrap_or(&path);
        let other = old.join(relative);
        changed += if other.is_file() {
            blocks(&path, &other)?
        } else {
            blocks(&path, Path::new("/dev/null"))?
        };
    }
    Ok(changed)
}

fn blocks(one: &Path, two: &Path) -> Result<u64> {
    let (mut ours, mut theirs) = (
        File::open(one).on("open", one)?,
        File::open(two).on("open", two)?,
    );
    let (mut buffer, mut other) = (vec![0; BLOCK_BYTES * 16], vec![0; BLOCK_BYTES * 16]);
    let mut changed = 0;
    loop {
        let read = fill(&mut ours, &mut buffer).on("read", one)?;
        if read == 0 {
            return Ok(changed);
        }
        let got = fill(&mut theirs, &mut other).on("read", two)?;
        other[got..].fill(0);
        let pairs = buffer[..read]
            .chunks(BLOCK_BYTES)
            .zip(other.chunks(BLOCK_BYTES));
        changed += pairs
            .filter(|(block, other)| **block != other[..block.len()])
            .count() as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_changed_or_too_much_is_named() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, content) in [("a", "1"), ("b", "2")] {
            fs::write(one.path().join(name), content).unwrap();
        }
        fs::write(two.path().join("c"), "3").unwrap();
        let named = differences(one.path(), two.path()).unwrap();
        assert_eq!(
            named,
            ["c should not be there", "a is missing", "b is missing"]
        );
    }

    #[test]
    fn changed_blocks_are_counted_by_place() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut content = vec![7; BLOCK_BYTES * 20 + 5];
        fs::write(one.path().join("file"), &content).unwrap();
        content[BLOCK_BYTES * 3] = 8;
        content[BLOCK_BYTES * 20 + 4] = 8;
        fs::write(two.path().join("file"), &content).unwrap();
        fs::write(two.path().join("new"), "x").unwrap();
        assert_eq!(changed_blocks(one.path(), two.path()).unwrap(), 3);
    }
}
