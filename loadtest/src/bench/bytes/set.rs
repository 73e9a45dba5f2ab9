//! Data sets: what each consists of, and what changes in it between the first copy and the second. Both are the same in
//! every run: content is drawn from numbers, never from a clock.

use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bench::bytes::tree;
use crate::lab::error::{OnFile, Result};
use crate::lab::world::copy;

const MIB: u64 = 1 << 20;
/// Files of the set of small ones.
const FILES: u64 = 100_000;
/// Small files in one folder.
const FILES_A_FOLDER: u64 = 500;
/// Every so many bytes a large file is changed: one block in 64.
const CHANGE_EVERY: u64 = MIB;
/// Every so many small files one is changed.
const CHANGED_FILES: u64 = 100;
/// When everything was made, in seconds since 1970: long ago, so that changes are seen by programs that compare times.
const MADE_S: u64 = 1_700_000_000;

/// A data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// WordPress and PHP as Debian installs them.
    Wordpress,
    /// A data directory of MariaDB that is written to during the first copy, and stands still for the second.
    Mariadb,
    /// Many small files.
    SmallFiles,
    /// One long file that is nearly all holes.
    Sparse,
    /// Large files nothing can compress.
    Noise,
    /// Large logs.
    Text,
    /// A dump that is made again, with some lines more.
    Dump,
}

/// How large a set is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Bytes of content, where the set can choose.
    pub bytes: u64,
    /// Small files.
    pub files: u64,
    /// By how much it was divided.
    pub divisor: u64,
}

impl Set {
    /// All, in the order they are measured.
    pub const ALL: [Self; 7] = [
        Self::Wordpress,
        Self::SmallFiles,
        Self::Noise,
        Self::Text,
        Self::Dump,
        Self::Sparse,
        Self::Mariadb,
    ];

    /// Its name on the command line and in the JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wordpress => "wordpress",
            Self::Mariadb => "mariadb",
            Self::SmallFiles => "small-files",
            Self::Sparse => "sparse",
            Self::Noise => "noise",
            Self::Text => "text",
            Self::Dump => "dump",
        }
    }

    /// What it is, for a person.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Wordpress => "WordPress and PHP as Debian installs them",
            Self::Mariadb => "a MariaDB directory of 1 GiB that is written to",
            Self::SmallFiles => "100,000 small files",
            Self::Sparse => "one sparse file of 4 GiB",
            Self::Noise => "1 GiB that nothing can compress",
            Self::Text => "1 GiB of logs",
            Self::Dump => "a dump of 256 MiB that is made again",
        }
    }

    /// Its size when bytes are divided by `bytes` and small files by `files`.
    #[must_use]
    pub const fn size(self, bytes: u64, files: u64) -> Size {
        let full = match self {
            Self::Sparse => 4096 * MIB,
            Self::SmallFiles | Self::Wordpress => 0,
            Self::Mariadb | Self::Noise | Self::Text => 1024 * MIB,
            Self::Dump => 256 * MIB,
        };
        Size {
            bytes: full / bytes,
            files: FILES / files,
            divisor: bytes,
        }
    }

    /// Makes the set in `folder`, which is empty. `web` is the root file system WordPress is in. MariaDB's directory is
    /// made by a MariaDB, see `database`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn make(self, size: Size, web: &Path, folder: &Path) -> Result<()> {
        match self {
            Self::Mariadb => Ok(()),
            Self::Wordpress => wordpress(size, web, folder),
            Self::SmallFiles => small_files(size.files, folder),
            Self::Sparse => sparse(size.bytes, folder),
            Self::Noise => large(size.bytes, folder, noise),
            Self::Text | Self::Dump => large(size.bytes, folder, text),
        }
    }

    /// What happens to the set between the first copy and the second.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn change(self, size: Size, folder: &Path) -> Result<()> {
        match self {
            Self::Mariadb => Ok(()),
            Self::SmallFiles => change_small_files(size.files, folder),
            Self::Wordpress => change_some(folder),
            Self::Sparse | Self::Noise | Self::Text => patch_all(folder),
            Self::Dump => make_again(folder),
        }
    }
}

/// The whole of what Debian installs for WordPress and PHP, or on slow links only its administration pages.
fn wordpress(size: Size, web: &Path, folder: &Path) -> Result<()> {
    let parts: &[&str] = if size.divisor > 100 {
        &["usr/share/wordpress/wp-admin"]
    } else {
        &[
            "usr/share/wordpress",
            "usr/lib/php",
            "usr/share/php",
            "usr/bin",
            "usr/lib/x86_64-linux-gnu",
        ]
    };
    for part in parts {
        let from = web.join(part);
        if from.exists() {
            copy(&from, &folder.join(part.replace('/', "-")))?;
        }
    }
    Ok(())
}

fn small_files(files: u64, folder: &Path) -> Result<()> {
    for number in 0..files {
        let path = small_path(folder, number);
        if number % FILES_A_FOLDER == 0
            && let Some(parent) = path.parent()
        {
            fs::create_dir_all(parent).on("create", parent)?;
        }
        // From 100 to 1,500 bytes; half of each compresses.
        let bytes = 100 + (number * 7919) % 1400;
        let mut content = noise(number, bytes / 2);
        content.resize(bytes as usize, b'a' + (number % 26) as u8);
        write_old(&path, &content)?;
    }
    Ok(())
}

fn small_path(folder: &Path, number: u64) -> std::path::PathBuf {
    let sub = number / FILES_A_FOLDER;
    folder.join(format!("{}/{sub}/file-{number}", sub % 16))
}

fn change_small_files(files: u64, folder: &Path) -> Result<()> {
    for number in (0..files).step_by(CHANGED_FILES as usize) {
        let path = small_path(folder, number);
        match (number / CHANGED_FILES) % 4 {
            0 => fs::remove_file(&path).on("remove", &path)?,
            1 => {
                let to = path.with_extension("renamed");
                fs::rename(&path, &to).on("rename", &path)?;
            }
            2 => fs::write(&path, noise(number + 1, 700)).on("write", &path)?,
            _ => {
                let new = path.with_extension("new");
                fs::write(&new, noise(number + 2, 500)).on("write", &new)?;
            }
        }
    }
    Ok(())
}

/// A sixty-fourth of the length is data, in pieces of 1 MiB.
fn sparse(bytes: u64, folder: &Path) -> Result<()> {
    let path = folder.join("sparse");
    let file = File::create(&path).on("create", &path)?;
    file.set_len(bytes).on("write", &path)?;
    let mut at = 0;
    while at < bytes {
        let length = MIB.min(bytes - at);
        file.write_all_at(&noise(at, length), at)
            .on("write", &path)?;
        at += 64 * MIB;
    }
    make_old(&file).on("write", &path)
}

fn large(bytes: u64, folder: &Path, content: fn(u64, u64) -> Vec<u8>) -> Result<()> {
    // Files of up to 256 MiB, as a site's uploads and logs are not one file either.
    let (mut left, mut number) = (bytes, 0);
    while left > 0 {
        let size = left.min(256 * MIB);
        let path = folder.join(format!("large-{number}"));
        let file = File::create(&path).on("create", &path)?;
        let mut writer = BufWriter::new(&file);
        let mut written = 0;
        while written < size {
            let piece = content(number << 32 | written, MIB.min(size - written));
            writer.write_all(&piece).on("write", &path)?;
            written += piece.len() as u64;
        }
        writer.flush().on("write", &path)?;
        drop(writer);
        make_old(&file).on("write", &path)?;
        left -= size;
        number += 1;
    }
    Ok(())
}

/// Overwrites a few bytes in every MiB of every file, and appends a line.
fn patch_all(folder: &Path) -> Result<()> {
    for path in tree::files(folder)? {
        let open = OpenOptions::new().write(true).open(&path);
        let file = open.on("open", &path)?;
        let size = file.metadata().on("read", &path)?.len();
        for at in (5000..size).step_by(CHANGE_EVERY as usize) {
            file.write_all_at(&noise(at, 100), at).on("write", &path)?;
        }
        file.write_all_at(b"one more line\n", size)
            .on("write", &path)?;
    }
    Ok(())
}

/// Writes every file anew, with a line inserted in every MiB, and gives it the old one's name.
fn make_again(folder: &Path) -> Result<()> {
    for path in tree::files(folder)? {
        let old = fs::read(&path).on("read", &path)?;
        let beside = path.with_extension("new");
        let file = File::create(&beside).on("create", &beside)?;
        let mut writer = BufWriter::new(file);
        for (number, piece) in old.chunks(MIB as usize).enumerate() {
            let line = format!("one line more, number {number}\n");
            let written = writer.write_all(line.as_bytes());
            written
                .and_then(|()| writer.write_all(piece))
                .on("write", &beside)?;
        }
        writer.flush().on("write", &beside)?;
        fs::rename(&beside, &path).on("rename", &beside)?;
    }
    Ok(())
}

/// Changes one file in a hundred, removes one and adds one.
fn change_some(folder: &Path) -> Result<()> {
    let files = tree::files(folder)?;
    for path in files.iter().step_by(CHANGED_FILES as usize) {
        let file = OpenOptions::new().append(true).open(path);
        file.and_then(|mut file| file.write_all(b"// changed\n"))
            .on("write", path)?;
    }
    if let Some(path) = files.get(1) {
        fs::remove_file(path).on("remove", path)?;
    }
    let new = folder.join("uploaded");
    fs::write(&new, noise(77, MIB)).on("write", &new)
}

fn write_old(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).on("create", path)?;
    file.write_all(content).on("write", path)?;
    make_old(&file).on("write", path)
}

fn make_old(file: &File) -> std::io::Result<()> {
    let made: SystemTime = UNIX_EPOCH + Duration::from_secs(MADE_S);
    file.set_times(FileTimes::new().set_modified(made).set_accessed(made))
}

/// Bytes that nothing can compress, the same for the same seed.
fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut content);
    content
}

/// Lines as a web server logs them.
fn text(seed: u64, bytes: u64) -> Vec<u8> {
    const PAGES: [&str; 6] = [
        "/wp-login.php",
        "/wp-content/uploads/2026/11/photo",
        "/",
        "/feed/",
        "/?p=",
        "/wp-json/wp/v2/posts",
    ];
    let mut content = Vec::with_capacity(bytes as usize + 200);
    let mut state = seed | 1;
    while (content.len() as u64) < bytes {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Writing into a vector cannot fail.
        let _ = writeln!(
            content,
            "198.51.{}.{} - - [26/Nov/2026:{:02}:{:02}:{:02} +0000] \"GET {}{} HTTP/1.1\" 200 {} \"-\" \"Mozilla/5.0 (X11; Linux x86_64)\"",
            state >> 8 & 255,
            state >> 16 & 255,
            state >> 24 & 15,
            (state >> 28 & 63) % 60,
            (state >> 34 & 63) % 60,
            PAGES[(state >> 40) as usize % PAGES.len()],
            state >> 43 & 1023,
            state >> 50,
        );
    }
    content.truncate(bytes as usize);
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(set: Set, size: Size) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        set.make(size, Path::new("/nowhere"), folder.path())
            .unwrap();
        folder
    }

    #[test]
    fn every_set_that_is_drawn_from_numbers_is_the_same_twice_and_differs_after_its_change() {
        let drawn = [
            Set::SmallFiles,
            Set::Sparse,
            Set::Noise,
            Set::Text,
            Set::Dump,
        ];
        for set in drawn {
            let size = set.size(1024, 200);
            let (one, two) = (made(set, size), made(set, size));
            // Folders are as old as the test; files are not.
            assert_eq!(
                tree::changed_blocks(one.path(), two.path()).unwrap(),
                0,
                "{set:?}"
            );
            let counts = [&one, &two].map(|made| tree::files(made.path()).unwrap().len());
            assert_eq!(counts[0], counts[1], "{set:?}");
            set.change(size, one.path()).unwrap();
            let changed = tree::changed_blocks(two.path(), one.path()).unwrap();
            assert!(changed > 0, "{set:?}");
        }
    }

    #[test]
    fn noise_does_not_compress_and_text_does() {
        let distinct = |bytes: &[u8]| {
            bytes
                .iter()
                .collect::<std::collections::BTreeSet<_>>()
                .len()
        };
        assert_eq!(distinct(&noise(1, 100_000)), 256);
        assert!(distinct(&text(1, 100_000)) < 100);
    }
}
