//! A stream in memory.

use std::io;

use super::pages::FakePages;
use crate::frame::{PAGE_SIZE, PageBuf};
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

    fn write_pages(
        &mut self,
        head: &[u8],
        pages: &FakePages,
        pieces: &[PagePiece<'_>],
    ) -> io::Result<()> {
        self.write_all(head)?;
        let mut buffer = PageBuf::zeroed();
        for piece in pieces {
            match piece {
                PagePiece::Mapped(index) => {
                    pages.read_page(*index, &mut buffer);
                    self.write_all(&buffer.0)?;
                }
                PagePiece::Copied(copy) => self.write_all(&copy.0)?,
            }
        }
        Ok(())
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
        let mut buffer = PageBuf([0; PAGE_SIZE]);
        for slot in slots {
            match slot {
                PageSlot::Mapped(index) => {
                    self.read_exact(&mut buffer.0)?;
                    pages.write_page(*index, &buffer);
                }
                PageSlot::Copied(copy) => self.read_exact(&mut copy.0)?,
            }
        }
        Ok(())
    }
}
