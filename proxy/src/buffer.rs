//! Byte buffers that are lent, not owned: a worker keeps a few, a connection borrows one while bytes are under way
//! and gives it back when it falls idle or is held.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::stream::splice::Pipes;

/// Buffers a worker keeps for later; more than that are freed.
const SPARE_MAX: usize = 64;
/// Vectors for heads that it keeps: two for each request under way, on a busy worker.
const OUTPUTS_MAX: usize = 512;
/// Room for most heads. Larger vectors are kept like buffers, few.
const OUTPUT_BYTES: usize = 1024;

/// A run of bytes with room behind it.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Box<[u8]>,
    start: u32,
    end: u32,
}

impl Buffer {
    fn with_size(size: usize) -> Self {
        Self {
            bytes: vec![0; size].into(),
            start: 0,
            end: 0,
        }
    }

    const fn start(&self) -> usize {
        self.start as usize
    }

    const fn end(&self) -> usize {
        self.end as usize
    }

    /// Buffers are far smaller than 4 GiB.
    fn set(&mut self, start: usize, end: usize) {
        let narrow = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
        (self.start, self.end) = (narrow(start), narrow(end));
    }

    /// What has been read and not consumed.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[self.start()..self.end()]
    }

    /// The same, to be changed in place.
    pub(crate) fn filled_mut(&mut self) -> &mut [u8] {
        let filled = self.start()..self.end();
        &mut self.bytes[filled]
    }

    /// Whether nothing is left to consume.
    pub(crate) const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes bytes off the front.
    pub(crate) fn consume(&mut self, count: usize) {
        let start = self.start().saturating_add(count);
        if start >= self.end() {
            self.set(0, 0);
        } else {
            self.set(start, self.end());
        }
    }

    /// Room for the next read; moves what is filled to the front when there is none behind it. Empty only when the
    /// buffer is full.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.end() == self.bytes.len() && self.start > 0 {
            let filled = self.start()..self.end();
            self.set(0, filled.len());
            self.bytes.copy_within(filled, 0);
        }
        let end = self.end();
        &mut self.bytes[end..]
    }

    /// Says how much of the room was filled.
    pub(crate) fn advance(&mut self, count: usize) {
        let end = self.end().saturating_add(count);
        self.set(self.start(), end.min(self.bytes.len()));
    }
}

/// A worker's spare buffers, all of one size.
#[derive(Debug)]
pub(crate) struct Buffers {
    size: Cell<usize>,
    spare: RefCell<Vec<Buffer>>,
    outputs: RefCell<Vec<Vec<u8>>>,
    pub(crate) pipes: Pipes,
}

impl Buffers {
    /// `size` bounds the longest head and the largest single read.
    pub(crate) fn new(size: usize) -> Rc<Self> {
        Rc::new(Self {
            size: Cell::new(size),
            spare: RefCell::default(),
            outputs: RefCell::default(),
            pipes: Pipes::default(),
        })
    }

    /// Buffers lent from now on have this size; those of another are not kept when they come back.
    pub(crate) fn resize(&self, size: usize) {
        if self.size.replace(size) != size {
            self.spare.borrow_mut().clear();
        }
    }

    /// An empty buffer of full size.
    pub(crate) fn take(&self) -> Buffer {
        self.spare
            .borrow_mut()
            .pop()
            .unwrap_or_else(|| Buffer::with_size(self.size.get()))
    }

    /// Gives a buffer back; what it still held is forgotten.
    pub(crate) fn give(&self, mut buffer: Buffer) {
        let mut spare = self.spare.borrow_mut();
        if buffer.bytes.len() == self.size.get() && spare.len() < SPARE_MAX {
            buffer.set(0, 0);
            spare.push(buffer);
        }
    }

    /// Gives a buffer back if there is nothing in it.
    pub(crate) fn give_empty(&self, buffer: &mut Buffer) {
        if buffer.is_empty() {
            self.give(std::mem::take(buffer));
        }
    }

    /// Replaces a buffer by one just large enough for what it holds, for a wait of unknown length.
    pub(crate) fn shrink(&self, buffer: &mut Buffer) {
        let mut small = Buffer {
            bytes: buffer.filled().into(),
            start: 0,
            end: 0,
        };
        small.advance(usize::MAX);
        self.give(std::mem::replace(buffer, small));
    }

    /// The reverse of [`Buffers::shrink`].
    pub(crate) fn grow(&self, buffer: &mut Buffer) {
        if buffer.bytes.len() < self.size.get() {
            let mut full = self.take();
            let count = buffer.filled().len();
            full.room()[..count].copy_from_slice(buffer.filled());
            full.advance(count);
            *buffer = full;
        }
    }

    /// An empty vector for a head to be written.
    pub(crate) fn take_output(&self) -> Vec<u8> {
        let kept = self.outputs.borrow_mut().pop();
        kept.unwrap_or_else(|| Vec::with_capacity(OUTPUT_BYTES))
    }

    /// Gives such a vector back.
    pub(crate) fn give_output(&self, mut output: Vec<u8>) {
        let mut outputs = self.outputs.borrow_mut();
        let (most, size) = if outputs.len() < SPARE_MAX {
            (SPARE_MAX, 2 * self.size.get())
        } else {
            (OUTPUTS_MAX, 2 * OUTPUT_BYTES)
        };
        if outputs.len() < most && output.capacity() <= size {
            output.clear();
            outputs.push(output);
        }
    }
}
