//! Frames that are packed one after the other, each with what was in those before it: their blocks are "linked", as the LZ4
//! frame format says.
//!
//! A row of a database that changed is in its page, in the log and in the undo log, megabytes apart, so a frame alone has
//! little of what is there twice. Over a slow link the frames of a round are therefore one zstd stream with long-distance
//! matching, flushed at the end of each frame. The target unpacks them in their order.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use super::wire::{Codec, DATA_BYTES_MAX, Fault};

/// log2 of the bytes before a frame that it is packed with, 16 MiB: each end of a round keeps so many, and the source tables
/// of some 8 MiB beside them.
const WINDOW_LOG: u32 = 24;
/// Higher levels make the tables larger and hardly anything else smaller.
const LEVEL: i32 = 6;
/// Rounds of a session at once that may be linked, to bound memory.
pub(super) const ROUNDS_MAX: usize = 2;

/// The source's end of a round.
#[derive(Default)]
pub(crate) struct Linker(OnceLock<Option<Mutex<Packing>>>);

struct Packing {
    encoder: Encoder<'static>,
    next: u64,
    is_broken: bool,
    _place: OwnedSemaphorePermit,
}

/// The right to pack the next frame. It has to be queued before the turn is over: frames must set out in their order, or one
/// could be behind another on a stream that waits for it.
pub(crate) struct Turn<'a>(MutexGuard<'a, Packing>);

impl Linker {
    /// Waits for one's turn. `None` if frames of this round are not linked: as many rounds as may be are, or memory ran out.
    pub(super) fn turn(&self, places: &Arc<Semaphore>) -> Option<Turn<'_>> {
        let packing = self.0.get_or_init(|| {
            let place = Arc::clone(places).try_acquire_owned().ok()?;
            Packing::new(place).ok().map(Mutex::new)
        });
        let packing = packing.as_ref()?.lock();
        let packing = packing.unwrap_or_else(PoisonError::into_inner);
        (!packing.is_broken).then_some(Turn(packing))
    }
}

impl Packing {
    fn new(place: OwnedSemaphorePermit) -> std::io::Result<Self> {
        let mut encoder = Encoder::new(LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        let mut packing = Self {
            encoder,
            next: 0,
            is_broken: false,
            _place: place,
        };
        // Makes the tables: it is not part of what the first frame takes.
        let mut none = [0; 0];
        let mut output = OutBuffer::around(none.as_mut_slice());
        packing
            .encoder
            .run(&mut InBuffer::around(&[]), &mut output)?;
        Ok(packing)
    }

    fn pack(&mut self, plain: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut packed = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()));
        let mut input = InBuffer::around(plain);
        let mut is_flushed = false;
        while !is_flushed {
            packed.reserve(1);
            let at = packed.len();
            let mut output = OutBuffer::around_pos(&mut packed, at);
            if input.pos < plain.len() {
                self.encoder.run(&mut input, &mut output)?;
            } else {
                is_flushed = self.encoder.flush(&mut output)? == 0;
            }
        }
        Ok(packed)
    }
}

impl Turn<'_> {
    /// Packs a frame's bytes. `None` when memory ran out: the round's other frames are not linked any more.
    pub(super) fn pack(&mut self, plain: &[u8]) -> Option<(Codec, Vec<u8>)> {
        let Ok(packed) = self.0.pack(plain) else {
            self.0.is_broken = true;
            return None;
        };
        let number = self.0.next;
        self.0.next += 1;
        // Frames are far below 4 GiB; see DATA_BYTES_MAX.
        let bytes = plain.len() as u32;
        Some((Codec::Linked { bytes, number }, packed))
    }
}

/// The target's end of a round.
#[derive(Default)]
pub(super) struct Unlinker(Mutex<Unpacking>);

#[derive(Default)]
struct Unpacking {
    decoder: Option<Decoder<'static>>,
    next: u64,
}

impl Unlinker {
    /// Unpacks the next frame's bytes, trusting no length.
    ///
    /// # Errors
    /// [`Fault::Garbled`] when it is not the next one, or not of so many bytes.
    pub(super) fn unpack(
        &self,
        number: u64,
        packed: &[u8],
        bytes: usize,
    ) -> Result<Vec<u8>, Fault> {
        let mut unpacking = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > DATA_BYTES_MAX || number != unpacking.next {
            return Err(Fault::Garbled);
        }
        unpacking.next += 1;
        let unpacked = unpacking.unpack(packed, bytes);
        unpacked.map_err(|_| Fault::Garbled)
    }
}

impl Unpacking {
    fn unpack(&mut self, packed: &[u8], bytes: usize) -> std::io::Result<Vec<u8>> {
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => {
                let mut new = Decoder::new()?;
                new.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
                none.insert(new)
            }
        };
        // One more, so that too many are seen.
        let mut plain = Vec::with_capacity(bytes + 1);
        let mut input = InBuffer::around(packed);
        loop {
            let (taken, at) = (input.pos, plain.len());
            decoder.run(&mut input, &mut OutBuffer::around_pos(&mut plain, at))?;
            if input.pos == taken && plain.len() == at {
                break;
            }
        }
        if plain.len() == bytes && input.pos == packed.len() {
            Ok(plain)
        } else {
            Err(std::io::ErrorKind::InvalidData.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::send::noise;

    fn places() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(ROUNDS_MAX))
    }

    fn packed(linker: &Linker, plain: &[u8]) -> Vec<u8> {
        let (_, packed) = linker.turn(&places()).unwrap().pack(plain).unwrap();
        packed
    }

    #[test]
    fn what_was_in_a_frame_long_before_is_not_packed_again() {
        let (linker, unlinker) = (Linker::default(), Unlinker::default());
        let noise = noise(100_000 + 14 * DATA_BYTES_MAX);
        let (row, frames) = noise.split_at(100_000);
        for (number, frame) in (0..).zip(frames.chunks(DATA_BYTES_MAX)) {
            let mut frame = frame.to_vec();
            if [0, 13].contains(&number) {
                frame[number as usize * 777..][..row.len()].copy_from_slice(row);
            }
            let (codec, packed) = linker.turn(&places()).unwrap().pack(&frame).unwrap();
            let bytes = frame.len() as u32;
            assert_eq!(codec, Codec::Linked { bytes, number });
            if number == 13 {
                assert!(packed.len() < DATA_BYTES_MAX - row.len() + 1000);
            }
            let unpacked = unlinker.unpack(number, &packed, frame.len()).unwrap();
            assert!(unpacked == frame, "{number}");
        }
    }

    #[test]
    fn frames_of_any_length_are_what_they_were() {
        let (linker, unlinker) = (Linker::default(), Unlinker::default());
        let text = b"one row of a table; ".repeat(DATA_BYTES_MAX / 20);
        let lengths = [1, 0, 20_000, 131_072, 5, text.len()];
        for (number, length) in (0..).zip(lengths) {
            let sent = packed(&linker, &text[..length]);
            assert!(sent.len() < 2_000);
            let unpacked = unlinker.unpack(number, &sent, length).unwrap();
            assert!(unpacked == text[..length], "{length}");
        }
    }

    #[test]
    fn a_frame_out_of_turn_or_of_another_length_is_refused() {
        let linker = Linker::default();
        let noise = noise(2000);
        let [first, second] = [&noise[..1000], &noise[1000..]].map(|plain| packed(&linker, plain));
        let refuses = |number, packed: &[u8], bytes| {
            let unlinker = Unlinker::default();
            unlinker.unpack(0, &first, 1000).unwrap();
            unlinker.unpack(number, packed, bytes) == Err(Fault::Garbled)
        };
        assert!(!refuses(1, &second, 1000));
        assert!(refuses(0, &second, 1000));
        assert!(refuses(2, &second, 1000));
        assert!(refuses(1, &second, 999));
        assert!(refuses(1, &second, 1001));
        assert!(refuses(1, &second, usize::MAX));
        assert!(refuses(1, &second[..900], 1000));
        assert!(refuses(1, &first, 1000));
        assert!(refuses(1, b"", 1000));
        // A window of more than we keep.
        let mut wide = Encoder::new(1).unwrap();
        wide.set_parameter(CParameter::WindowLog(WINDOW_LOG + 1))
            .unwrap();
        let mut sent = vec![0; 2000];
        let mut output = OutBuffer::around(sent.as_mut_slice());
        wide.run(&mut InBuffer::around(b"wide"), &mut output)
            .unwrap();
        wide.flush(&mut output).unwrap();
        let length = output.pos();
        let refused = Unlinker::default().unpack(0, &sent[..length], 4);
        assert_eq!(refused, Err(Fault::Garbled));
    }

    #[test]
    fn only_so_many_rounds_are_linked_at_once() {
        let places = places();
        let mut linkers: Vec<Linker> = (0..=ROUNDS_MAX).map(|_| Linker::default()).collect();
        let is_linked = |linker: &Linker| linker.turn(&places).is_some();
        let linked: Vec<bool> = linkers.iter().map(is_linked).collect();
        assert_eq!(linked, [true, true, false]);
        // A round's frames are linked from the first on, or not at all.
        linkers.remove(0);
        assert_eq!([&linkers[0], &linkers[1]].map(is_linked), [true, false]);
        assert!(is_linked(&Linker::default()));
    }
}
