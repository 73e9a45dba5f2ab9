//! Reads the memory of a running container, page by page, and ships what the target lacks. It stops nothing and writes
//! nothing; a page torn by a writer just counts as another page, for the dump decides what is restored.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;

use super::MemoryError;
use super::digest::PAGE_BYTES;
use super::maps::{self, Kind, Mapping};
use super::ship::Shipper;
use super::wire::FRAME_DATA_MAX;

/// Pagemap entries read at once: 64 MiB of address space.
const ENTRIES: usize = 16 << 10;
/// Bytes of a pagemap entry.
const ENTRY_BYTES: usize = 8;

/// Which memory of a container is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    /// What processes share: CRIU's own rounds leave it out.
    Shared,
}

/// Reads the memory of all processes in `pids` and ships what the target lacks. Blocks its thread; ends early, and well,
/// when `cancel` is set.
///
/// # Errors
/// When the session is lost or there are too many different pages. A process that ends meanwhile is no error.
pub(crate) fn read_container(
    shipper: Shipper,
    pids: &[u32],
    part: Part,
    cancel: &AtomicBool,
) -> Result<(), MemoryError> {
    let mut reader = Reader {
        shipper,
        part,
        shared: HashSet::new(),
        buffer: vec![0; FRAME_DATA_MAX],
        entries: vec![0; ENTRIES * ENTRY_BYTES],
        cancel,
    };
    for pid in pids {
        reader.process(*pid)?;
    }
    reader.shipper.flush()
}

/// Bytes of memory that [`read_container`] and a dump look at, by the kernel's own count.
pub(crate) fn resident_bytes(pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let is_ours = |line: &&str| {
            ["RssAnon:", "RssShmem:", "VmSwap:"]
                .iter()
                .any(|name| line.starts_with(name))
        };
        let kibibytes = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        text.lines()
            .filter(is_ours)
            .filter_map(kibibytes)
            .sum::<u64>()
            << 10
    };
    pids.iter().map(of).sum()
}

struct Reader<'a> {
    shipper: Shipper,
    part: Part,
    shared: HashSet<u64>,
    buffer: Vec<u8>,
    entries: Vec<u8>,
    cancel: &'a AtomicBool,
}

impl Reader<'_> {
    fn process(&mut self, pid: u32) -> Result<(), MemoryError> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let open = |name| File::open(format!("/proc/{pid}/{name}"));
        let (Ok(memory), Ok(pagemap)) = (open("mem"), open("pagemap")) else {
            // It has ended.
            return Ok(());
        };
        for mapping in maps::parse(&text) {
            if self.cancel.load(Ordering::Relaxed) {
                return Ok(());
            }
            match mapping.kind {
                Kind::Private if self.part == Part::Shared => {}
                Kind::Private => self.private(&memory, &pagemap, mapping)?,
                Kind::Shared { inode } => {
                    if self.shared.insert(inode) {
                        self.shared(pid, mapping)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn private(
        &mut self,
        memory: &File,
        pagemap: &File,
        mapping: Mapping,
    ) -> Result<(), MemoryError> {
        let mut at = mapping.start;
        while at < mapping.end && !self.cancel.load(Ordering::Relaxed) {
            let pages = ((mapping.end - at) / PAGE_BYTES as u64).min(ENTRIES as u64) as usize;
            let wanted = &mut self.entries[..pages * ENTRY_BYTES];
            let place = at / PAGE_BYTES as u64 * ENTRY_BYTES as u64;
            if pages == 0 || pagemap.read_exact_at(wanted, place).is_err() {
                // Unmapped meanwhile, or the process has ended.
                return Ok(());
            }
            let entries: Vec<u64> = wanted
                .chunks_exact(ENTRY_BYTES)
                .map(|entry| entry.try_into().map_or(0, u64::from_ne_bytes))
                .collect();
            for (first, count) in maps::own_runs(&entries) {
                let start = at + (first * PAGE_BYTES) as u64;
                self.range(memory, start, count * PAGE_BYTES)?;
            }
            at += (pages * PAGE_BYTES) as u64;
        }
        Ok(())
    }

    /// Reads a range of whole pages; what cannot be read any more is left out.
    fn range(&mut self, file: &File, start: u64, length: usize) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < length {
            let wanted = (length - done).min(self.buffer.len());
            let read = file
                .read_at(&mut self.buffer[..wanted], start + done as u64)
                .unwrap_or(0);
            let whole = read / PAGE_BYTES * PAGE_BYTES;
            if whole == 0 {
                return Ok(());
            }
            self.shipper.take(&self.buffer[..whole])?;
            done += whole;
        }
        Ok(())
    }

    /// Shared memory is read as a file: through the mapping a hole would be filled by being looked at.
    fn shared(&mut self, pid: u32, mapping: Mapping) -> Result<(), MemoryError> {
        let (start, end) = (mapping.start, mapping.end);
        let Ok(file) = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")) else {
            return Ok(());
        };
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        let mut at = 0;
        while at < size && !self.cancel.load(Ordering::Relaxed) {
            let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) else {
                return Ok(());
            };
            let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap_or(size);
            if hole <= data {
                return Ok(());
            }
            self.range(&file, data, usize::try_from(hole - data).unwrap_or(0))?;
            at = hole;
        }
        Ok(())
    }
}
