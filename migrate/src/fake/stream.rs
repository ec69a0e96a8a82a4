//! A stream in memory, and what all streams without a descriptor have in common.

use std::io;

use super::pages::FakePages;
use crate::frame::PageBuf;
use crate::hypervisor::{ForeignPages, PagePiece, PageSlot, StreamIn, StreamOut};

/// Bytes that were written, and how many of them have been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wire {
    /// All of them.
    pub bytes: Vec<u8>,
    /// Read so far.
    pub position: usize,
    /// Writing fails (`EPIPE`) once this many bytes are there.
    pub breaks_at: Option<usize>,
}

impl Wire {
    /// A stream of `bytes`, to be read.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Wire {
        Wire { bytes, ..Wire::default() }
    }
}

/// Puts `head` and a page for each piece, one after the other.
///
/// # Errors
/// Those of `put`.
pub fn put_pages(
    head: &[u8],
    pieces: &[PagePiece<'_, FakePages>],
    mut put: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    put(head)?;
    let mut page = PageBuf::zeroed();
    for piece in pieces {
        match piece {
            PagePiece::Mapped(pages, index) => {
                pages.read_page(*index, &mut page);
                put(&page.0)?;
            }
            PagePiece::Copied(copy) => put(&copy.0)?,
        }
    }
    Ok(())
}

/// Fills `slots` with pages from `fill`.
///
/// # Errors
/// Those of `fill`.
pub fn fill_pages(
    pages: &FakePages,
    slots: &mut [PageSlot<'_>],
    mut fill: impl FnMut(&mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut page = PageBuf::zeroed();
    for slot in slots {
        match slot {
            PageSlot::Mapped(index) => {
                fill(&mut page.0)?;
                pages.write_page(*index, &page);
            }
            PageSlot::Copied(copy) => fill(&mut copy.0)?,
        }
    }
    Ok(())
}

impl StreamOut<FakePages> for Wire {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        match self.breaks_at {
            Some(limit) if self.bytes.len() > limit => {
                self.bytes.truncate(limit);
                Err(io::ErrorKind::BrokenPipe.into())
            }
            _ => Ok(()),
        }
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        put_pages(head, pieces, |bytes| self.write_all(bytes))
    }
}

impl StreamIn<FakePages> for Wire {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let rest = self.bytes.get(self.position..).unwrap_or_default();
        let Some(bytes) = rest.get(..buf.len()) else {
            self.position = self.bytes.len();
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        buf.copy_from_slice(bytes);
        self.position += buf.len();
        Ok(())
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |page| self.read_exact(page))
    }

    fn position(&mut self) -> io::Result<u64> {
        Ok(self.position as u64)
    }

    fn go_to(&mut self, offset: u64) -> io::Result<()> {
        let there = usize::try_from(offset).ok().filter(|offset| *offset <= self.bytes.len());
        self.position = there.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}
