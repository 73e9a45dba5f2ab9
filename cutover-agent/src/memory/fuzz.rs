//! Ways into the readers of this module, for `crate::fuzzing`.

use std::io::{Read, Write};

use super::MemoryError;
use super::server::{Sink, serve};
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

    fn close(&mut self) -> Result<(), MemoryError> {
        self.is_closed = true;
        Ok(())
    }
}

pub(crate) fn fuzz_dump(
    says: impl Read,
    hears: &mut impl Write,
    sink: &mut FuzzedSink,
) -> Result<(), MemoryError> {
    serve(says, hears, sink)
}

pub(crate) fn fuzz_peer_words(bytes: &[u8]) {
    let _ = postcard::from_bytes::<PageAsk>(bytes);
    let _ = postcard::from_bytes::<PageAnswer>(bytes);
    let _ = postcard::from_bytes::<PagesHead>(bytes);
}
