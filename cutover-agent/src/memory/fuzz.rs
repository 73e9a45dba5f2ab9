//! Ways into the readers of this module, for `crate::fuzzing`.

use std::io::{Read, Write};

use super::MemoryError;
use super::server::{Says, Sink, serve};
use super::wire::{ImageId, PageAnswer, PageAsk, PagesHead, Region};

/// Counts what a dump brings.
#[derive(Default)]
pub(crate) struct FuzzedSink {
    pub(crate) bytes: usize,
    pub(crate) is_closed: bool,
}

impl Sink for FuzzedSink {
    fn has_parent(&self, _: ImageId) -> bool {
        true
    }

    fn open(&mut self, _: ImageId) -> Result<(), MemoryError> {
        Ok(())
    }

    fn region(&mut self, _: ImageId, _: Region) -> Result<(), MemoryError> {
        Ok(())
    }

    fn pages(&mut self, bytes: &[u8]) -> Result<(), MemoryError> {
        self.bytes += bytes.len();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn close(&mut self) -> Result<(), MemoryError> {
        self.is_closed = true;
        Ok(())
    }
}

/// Says everything without a pause.
struct Fluent<'b>(&'b [u8]);

impl Read for Fluent<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Says for Fluent<'_> {
    fn is_silent(&mut self) -> bool {
        false
    }
}

pub(crate) fn fuzz_dump(
    says: &[u8],
    hears: &mut impl Write,
    sink: &mut FuzzedSink,
) -> Result<(), MemoryError> {
    serve(Fluent(says), hears, sink)
}

pub(crate) fn fuzz_peer_words(bytes: &[u8]) {
    let _ = postcard::from_bytes::<PageAsk>(bytes);
    let _ = postcard::from_bytes::<PageAnswer>(bytes);
    let _ = postcard::from_bytes::<PagesHead>(bytes);
}
