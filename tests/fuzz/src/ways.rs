//! What comes over the stream and over links, and in which order.
//!
//! There is one sequence of bytes for all of them: whoever reads takes the next of it. So an input
//! is what happened, in its order, and a change of it is mostly a change of what one way brings or
//! of whose turn it is. Large blocks are written as in [`crate::block`].

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use rxl_migrate::fake::{FakePages, Rng, fill_pages};
use rxl_migrate::hypervisor::{PageSlot, StreamIn};

use crate::block::{self, BLOCK_BYTES_MIN};
use crate::input::{Input, Owned};

/// Largest block that is made from a few bytes. The largest bodies have to be there as they are,
/// or an input of a few bytes would take seconds.
const BLOCK_BYTES_MAX: usize = 64 << 10;

/// The stream; link n is way n + 1.
pub(crate) const STREAM: usize = 0;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The stream is read.
    Stream,
    /// One of the links that can go on does, by its number among them.
    GoesOn(usize),
    /// It ends instead.
    Ends(usize),
    /// It breaks.
    Breaks(usize),
}

impl Turn {
    /// By a byte, for `count` links that can go on; `stream`: so can that.
    fn read(byte: u8, count: usize, stream: bool) -> Turn {
        let link = usize::from(byte >> 3).checked_rem(count).unwrap_or(0);
        match byte & 7 {
            0 if stream => Turn::Stream,
            6 => Turn::Ends(link),
            7 => Turn::Breaks(link),
            _ => Turn::GoesOn(link),
        }
    }

    /// The byte that is read as this.
    fn byte(self) -> u8 {
        let (kind, link) = match self {
            Turn::Stream => (0, 0),
            Turn::GoesOn(link) => (1, link),
            Turn::Ends(link) => (6, link),
            Turn::Breaks(link) => (7, link),
        };
        kind | u8::try_from(link << 3).unwrap_or_default()
    }
}

/// Where bytes come from.
pub(crate) trait Source {
    /// Fills `block` with what comes next over `way`.
    fn fill(&mut self, way: usize, block: &mut [u8]) -> io::Result<()>;
    /// Whose turn it is, if one of the links `able` can go on; `stream`: so can that.
    fn turn(&mut self, able: &[u8], stream: bool) -> Turn;
}

fn is_packed(block: &[u8]) -> bool {
    (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block.len())
}

/// An input.
#[derive(Debug)]
pub(crate) struct Packed {
    input: Owned,
    /// Blocks are there as they are.
    plain: bool,
}

impl Packed {
    pub(crate) fn new(mut input: Input<'_>, plain: bool) -> Packed {
        Packed { input: Owned::new(input.rest()), plain }
    }

    /// Takes what is no way's.
    pub(crate) fn take<T>(&mut self, take: impl FnOnce(&mut Input<'_>) -> T) -> T {
        self.input.take(take)
    }
}

impl Source for Packed {
    fn fill(&mut self, _way: usize, block: &mut [u8]) -> io::Result<()> {
        let plain = self.plain || !is_packed(block);
        let filled = self.input.take(|input| {
            if !plain {
                return block::read(input, block);
            }
            let from = input.bytes(block.len());
            (from.len() == block.len()).then(|| block.copy_from_slice(from))
        });
        filled.ok_or(io::ErrorKind::UnexpectedEof.into())
    }

    fn turn(&mut self, able: &[u8], stream: bool) -> Turn {
        if self.input.is_empty() {
            return if stream { Turn::Stream } else { Turn::Ends(0) };
        }
        self.input.take(|input| Turn::read(input.u8(), able.len(), stream))
    }
}

/// Streams that are there, and a note of all that is read of them: an input.
#[derive(Debug)]
pub(crate) struct Wires {
    /// The bytes of each way that have not been read.
    ways: Vec<Vec<u8>>,
    read: Vec<usize>,
    /// `None`: links go first.
    order: Option<Rng>,
    pub(crate) input: Vec<u8>,
}

impl Wires {
    /// Ways with these bytes. `seed`: in which order they are read; 0: links first.
    pub(crate) fn new(ways: Vec<Vec<u8>>, seed: u64) -> Wires {
        let read = vec![0; ways.len()];
        let order = (seed != 0).then(|| Rng::new(seed));
        Wires { ways, read, order, input: Vec::new() }
    }

    fn is_at_end(&self, way: usize) -> bool {
        self.ways.get(way).map(Vec::len) == self.read.get(way).copied()
    }
}

impl Source for Wires {
    fn fill(&mut self, way: usize, block: &mut [u8]) -> io::Result<()> {
        let eof = io::ErrorKind::UnexpectedEof;
        let (bytes, read) = self.ways.get(way).zip(self.read.get_mut(way)).ok_or(eof)?;
        let from = bytes.get(*read..).and_then(|rest| rest.get(..block.len())).ok_or(eof)?;
        *read += block.len();
        block.copy_from_slice(from);
        if is_packed(block) {
            self.input.extend(block::write(block));
        } else {
            self.input.extend_from_slice(block);
        }
        Ok(())
    }

    fn turn(&mut self, able: &[u8], stream: bool) -> Turn {
        let choices = able.len() + usize::from(stream && self.order.is_some());
        let number = self.order.as_mut().map_or(0, Rng::next);
        let chosen = usize::try_from(number % 97).unwrap_or(0).checked_rem(choices).unwrap_or(0);
        let turn = match able.get(chosen) {
            None => Turn::Stream,
            Some(link) if self.is_at_end(usize::from(*link) + 1) => Turn::Ends(chosen),
            Some(_) => Turn::GoesOn(chosen),
        };
        self.input.push(turn.byte());
        turn
    }
}

/// The stream of a source.
#[derive(Debug)]
pub(crate) struct Stream<S> {
    source: Rc<RefCell<S>>,
    /// What was read.
    pub(crate) taken: Vec<u8>,
    /// The last of it that was read at once, if it was eight bytes.
    pub(crate) last: Option<[u8; 8]>,
}

impl<S: Source> Stream<S> {
    pub(crate) fn new(source: &Rc<RefCell<S>>) -> Stream<S> {
        Stream { source: Rc::clone(source), taken: Vec::new(), last: None }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.source.borrow_mut().fill(STREAM, bytes)?;
        self.taken.extend_from_slice(bytes);
        self.last = (*bytes).try_into().ok();
        Ok(())
    }
}

impl<S: Source> StreamIn<FakePages> for Stream<S> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.fill(buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |block| self.fill(block))
    }
}
