//! Small files that survive a crash: written beside, synced, renamed, and the folder synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Replaces a JSON file so that a crash leaves either the old content or the new.
///
/// # Errors
/// What the file system says; the old content is then still there.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(folder)?.sync_all()
}

/// Reads a JSON file; the default when there is none.
///
/// # Errors
/// When it is there and cannot be read.
pub fn read_json<T: DeserializeOwned + Default>(path: &Path) -> io::Result<T> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error),
    }
}

/// Removes everything in a folder and keeps the folder, which may be a mount point of its own.
///
/// # Errors
/// What the file system says; a folder that does not exist is empty.
pub fn empty_folder(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes everything of a folder's file system to its disk (syncfs(2)); a folder that does not exist has nothing.
///
/// # Errors
/// What the disk says.
pub fn sync_file_system(folder: &Path) -> io::Result<()> {
    match File::open(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => Ok(rustix::fs::syncfs(other?)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_back_and_a_missing_file_is_the_default() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/state.json");
        assert_eq!(read_json::<Option<u32>>(&path).unwrap(), None);
        write_json(&path, &Some(7)).unwrap();
        assert_eq!(read_json::<Option<u32>>(&path).unwrap(), Some(7));
    }

    #[test]
    fn a_broken_file_is_an_error_and_not_a_default() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state.json");
        fs::write(&path, "{").unwrap();
        assert!(read_json::<Option<u32>>(&path).is_err());
    }
}
