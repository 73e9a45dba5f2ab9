//! A page server for CRIU: a dump goes from its socket into a `Sink`, and never to a disk.
//!
//! One connection, one dump: the final one, or a round. What it never does: answer that all is well when a page was not taken. Whatever goes
//! wrong ends the connection or answers the close with an error, and CRIU then lets the tasks run on.

mod cork;
pub mod frames;
mod listen;

use std::io::{BufReader, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use frames::{Command, FLAG_PRESENT, HEADER_BYTES};

pub(crate) use cork::Uncorked;
pub(crate) use listen::Listener;

use super::MemoryError;
use super::digest::PAGE_BYTES;
use super::wire::{FRAME_DATA_MAX, ImageId, Region};

/// What becomes of the pages.
pub(crate) trait Sink {
    /// Whether pages of an image may be left out when they have not changed since a round before.
    fn has_parent(&self, image: ImageId) -> bool;
    /// An image begins, or goes on.
    fn open(&mut self, image: ImageId) -> Result<(), MemoryError>;
    /// The pages of a region follow, in order, if it says that they are present.
    fn region(&mut self, image: ImageId, region: Region) -> Result<(), MemoryError>;
    /// Whole pages of the last region.
    fn pages(&mut self, bytes: &[u8]) -> Result<(), MemoryError>;
    /// Nothing comes for a while: CRIU is busy with something else, or has no more pages.
    fn pause(&mut self) -> Result<(), MemoryError>;
    /// Everything has come; an error keeps the source alive.
    fn close(&mut self) -> Result<(), MemoryError>;
}

/// What CRIU says.
pub(crate) trait Says: Read {
    /// Waits for a moment; whether nothing came.
    fn is_silent(&mut self) -> bool;
}

/// Bytes read ahead: memory is full of regions of a few pages, and each would cost two system calls.
const READ_AHEAD_BYTES: usize = 256 << 10;

/// Serves one dump to its end. `Ok(())` only when the sink took everything and CRIU was told so.
///
/// # Errors
/// When the stream breaks, does not speak the protocol, or the sink fails.
pub(crate) fn serve(
    says: impl Says,
    hears: &mut impl Write,
    sink: &mut impl Sink,
) -> Result<(), MemoryError> {
    let mut says = BufReader::with_capacity(READ_AHEAD_BYTES, says);
    let mut buffer = vec![0; FRAME_DATA_MAX];
    let mut answer = |bytes: &[u8]| hears.write_all(bytes).map_err(MemoryError::Dump);
    loop {
        if says.buffer().is_empty() && says.get_mut().is_silent() {
            sink.pause()?;
        }
        let mut header = [0; HEADER_BYTES];
        says.read_exact(&mut header).map_err(MemoryError::Dump)?;
        match frames::decode(&header)? {
            Command::Open { image, asks } => {
                sink.open(image)?;
                if asks {
                    answer(&[u8::from(sink.has_parent(image))])?;
                }
            }
            Command::HasParent { image } => {
                answer(&i32::from(sink.has_parent(image)).to_ne_bytes())?;
            }
            Command::Add { image, region } => {
                sink.region(image, region)?;
                if region.flags & FLAG_PRESENT != 0 {
                    pages(&mut says, sink, &mut buffer, region)?;
                }
            }
            Command::Close => {
                let taken = sink.close();
                let verdict: i32 = if taken.is_ok() { 0 } else { -1 };
                answer(&verdict.to_ne_bytes())?;
                return taken;
            }
        }
    }
}

/// Waits so long for something to be read or accepted; whether nothing came.
fn is_silent_for(from: impl AsFd, time: Duration) -> bool {
    let mut waited = [PollFd::new(&from, PollFlags::IN)];
    let time = Timespec::try_from(time).ok();
    matches!(poll(&mut waited, time.as_ref()), Ok(0))
}

fn pages(
    stream: &mut impl Read,
    sink: &mut impl Sink,
    buffer: &mut [u8],
    region: Region,
) -> Result<(), MemoryError> {
    let mut left = u64::from(region.pages) * PAGE_BYTES as u64;
    while left > 0 {
        let length = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        stream
            .read_exact(&mut buffer[..length])
            .map_err(MemoryError::Dump)?;
        sink.pages(&buffer[..length])?;
        left -= length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::frames::tests::header;
    use super::*;

    /// CRIU's end: what it sends, and what it was answered.
    #[derive(Default)]
    struct Criu {
        sends: Vec<u8>,
        answered: Vec<u8>,
    }

    impl Criu {
        fn served(&mut self, sink: &mut Notes) -> Result<(), MemoryError> {
            serve(Script(&self.sends), &mut self.answered, sink)
        }
    }

    /// Falls silent before its last word.
    struct Script<'b>(&'b [u8]);

    impl Read for Script<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let before_last = self.0.len().saturating_sub(HEADER_BYTES);
            let end = if before_last > 0 {
                before_last
            } else {
                self.0.len()
            };
            let (now, later) = self.0.split_at(end.min(buffer.len()));
            buffer[..now.len()].copy_from_slice(now);
            self.0 = later;
            Ok(now.len())
        }
    }

    impl Says for Script<'_> {
        fn is_silent(&mut self) -> bool {
            self.0.len() == HEADER_BYTES
        }
    }

    #[derive(Default)]
    struct Notes {
        opened: Vec<ImageId>,
        regions: Vec<Region>,
        bytes: usize,
        bytes_at_pause: usize,
        fails_at_close: bool,
    }

    impl Sink for Notes {
        fn has_parent(&self, image: ImageId) -> bool {
            image == ImageId::Shared(7)
        }
        fn open(&mut self, image: ImageId) -> Result<(), MemoryError> {
            self.opened.push(image);
            Ok(())
        }
        fn region(&mut self, _: ImageId, region: Region) -> Result<(), MemoryError> {
            self.regions.push(region);
            Ok(())
        }
        fn pages(&mut self, bytes: &[u8]) -> Result<(), MemoryError> {
            self.bytes += bytes.len();
            Ok(())
        }
        fn pause(&mut self) -> Result<(), MemoryError> {
            self.bytes_at_pause = self.bytes;
            Ok(())
        }
        fn close(&mut self) -> Result<(), MemoryError> {
            if self.fails_at_close {
                return Err(MemoryError::Full);
            }
            Ok(())
        }
    }

    fn dump(pages: u64) -> Criu {
        let mut criu = Criu::default();
        criu.sends.extend(header(4, 0, 0, 1 << 8 | 1));
        criu.sends
            .extend(header(6 | 4 << 16, pages, 0x1000, 1 << 8 | 1));
        let content = vec![5_u8; usize::try_from(pages).unwrap() * PAGE_BYTES];
        criu.sends.extend(content);
        criu.sends.extend(header(0x1023, 0, 0, 0));
        criu
    }

    #[test]
    fn a_whole_dump_is_taken_and_answered() {
        let (mut criu, mut notes) = (dump(300), Notes::default());
        criu.served(&mut notes).unwrap();
        assert_eq!(notes.opened, [ImageId::Process(1)]);
        assert_eq!(notes.bytes, 300 * PAGE_BYTES);
        assert_eq!(criu.answered, [0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_pause_comes_when_nothing_is_left_to_take() {
        let mut notes = Notes::default();
        dump(300).served(&mut notes).unwrap();
        assert_eq!(notes.bytes_at_pause, 300 * PAGE_BYTES);
    }

    #[test]
    fn criu_hears_which_images_have_a_parent() {
        let mut criu = Criu::default();
        for image in [7 << 8 | 1, 7 << 8 | 2] {
            criu.sends.extend(header(4, 0, 0, image));
            criu.sends.extend(header(5, 0, 0, image));
        }
        criu.sends.extend(header(0x1023, 0, 0, 0));
        criu.served(&mut Notes::default()).unwrap();
        assert_eq!(criu.answered, [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_sink_that_fails_at_the_end_is_a_veto() {
        let mut criu = dump(1);
        let mut notes = Notes {
            fails_at_close: true,
            ..Notes::default()
        };
        assert!(criu.served(&mut notes).is_err());
        assert_eq!(criu.answered[1..], (-1_i32).to_ne_bytes());
    }

    #[test]
    fn a_dump_cut_short_is_never_answered_well() {
        let whole = dump(2).sends.len();
        for length in [0, 31, 33, whole - 1, whole - HEADER_BYTES] {
            let mut criu = dump(2);
            criu.sends.truncate(length);
            assert!(criu.served(&mut Notes::default()).is_err(), "{length}");
            assert!(criu.answered.len() <= 1);
        }
    }
}
