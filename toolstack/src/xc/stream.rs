//! The stream over a file descriptor, with guest pages going to and from the kernel by address.
//!
//! Nothing is buffered: a read takes no byte more than was asked for, because libxl reads on from
//! the same descriptor. [`crate::abort`] ends a transfer.
//!
//! # Safety
//! `writev` and `readv` take addresses: of the private buffers and guest pages that the caller
//! lent for the call. The kernel copes with a guest that writes a page meanwhile, and with a page
//! that cannot be accessed (`EFAULT`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{SeekFrom, fstat, seek, tell};
use rustix::io::Errno;
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size};
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::hypervisor::{PagePiece, PageSlot, StreamIn, StreamOut};

use super::foreign::Mapping;
use crate::abort;

/// Most pieces that the kernel takes in one call (`IOV_MAX`).
const PIECES_MAX: usize = 1024;

/// What a pipe is made to hold: as much as Linux allows anybody by default. With the 64 KiB that a
/// pipe has at first, both of its ends stop and wake each other several times a millisecond.
pub(crate) const PIPE_BYTES: usize = 1 << 20;

/// A stream that is written to `fd`.
#[derive(Debug)]
pub struct FdOut<F, W = Patience> {
    pub(super) fd: F,
    pub(super) waiting: W,
}

/// A stream that is read from `fd`.
#[derive(Debug)]
pub struct FdIn<F, W = Patience> {
    pub(super) fd: F,
    pub(super) waiting: W,
}

/// A file that is read from any place. Where its descriptor is, which others may share, does not
/// matter and does not change.
#[derive(Debug)]
pub struct FileAt<F> {
    file: F,
    offset: u64,
}

impl<F: AsFd> FileAt<F> {
    /// Reads from the start of `file`.
    pub fn new(file: F) -> FileAt<F> {
        FileAt { file, offset: 0 }
    }

    /// Fills `pieces`, which are as [`transfer`] wants them, and goes on behind them.
    ///
    /// # Safety
    /// As [`transfer`].
    unsafe fn fill(&mut self, pieces: Pieces) -> io::Result<()> {
        let (from, length) = (Direction::ReadAt(self.offset), pieces.bytes());
        // SAFETY: the caller's duty.
        unsafe { transfer(self.file.as_fd(), from, pieces, &mut Patience) }?;
        self.offset = self.offset.saturating_add(length);
        Ok(())
    }
}

impl<F: AsFd> FdOut<F> {
    /// Writes to `fd`, which stays open if it is borrowed. A pipe is made to hold more.
    pub fn new(fd: F) -> FdOut<F> {
        widen(fd.as_fd());
        FdOut { fd, waiting: Patience }
    }
}

impl<F: AsFd> FdIn<F> {
    /// Reads from `fd`, which stays open if it is borrowed. A pipe is made to hold more.
    pub fn new(fd: F) -> FdIn<F> {
        widen(fd.as_fd());
        FdIn { fd, waiting: Patience }
    }
}

/// Lets a pipe hold [`PIPE_BYTES`], if it holds less and may. What is no pipe has no size to ask
/// for.
fn widen(fd: BorrowedFd<'_>) {
    if fcntl_getpipe_size(fd).is_ok_and(|bytes| bytes < PIPE_BYTES)
        && let Err(error) = fcntl_setpipe_size(fd, PIPE_BYTES)
    {
        tracing::debug!(%error, "the pipe stays as small as it is");
    }
}

/// What happens where a descriptor that does not block cannot go on.
pub(super) trait Wait {
    /// Waits until `fd` may go on in that direction, or until a signal.
    fn wait(&mut self, fd: BorrowedFd<'_>, to: Direction) -> io::Result<()>;
}

/// Waits as long as it takes: whoever shares the descriptor may have made it so.
#[derive(Debug)]
pub struct Patience;

impl Wait for Patience {
    fn wait(&mut self, fd: BorrowedFd<'_>, to: Direction) -> io::Result<()> {
        match poll(&mut [PollFd::from_borrowed_fd(fd, to.readiness())], None) {
            // A signal: the next transfer finds out what it was.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl<F: AsFd, W: Wait> StreamOut<Mapping> for FdOut<F, W> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut pieces = Pieces::default();
        pieces.push(bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: `bytes` is borrowed until the end of the call, and only read.
        unsafe { transfer(self.fd.as_fd(), Direction::Write, pieces, &mut self.waiting) }
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, Mapping>]) -> io::Result<()> {
        let mut all = Pieces::default();
        all.push(head.as_ptr().cast_mut(), head.len());
        for piece in pieces {
            let start = match piece {
                PagePiece::Mapped(pages, index) => pages.address(*index)?.as_ptr(),
                PagePiece::Copied(page) => page.0.as_ptr().cast_mut(),
            };
            all.push(start, PAGE_SIZE);
        }
        // SAFETY: `head`, the copies and the mappings are borrowed until the end of the call; they
        // are only read.
        unsafe { transfer(self.fd.as_fd(), Direction::Write, all, &mut self.waiting) }
    }
}

impl<F: AsFd, W: Wait> StreamIn<Mapping> for FdIn<F, W> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut pieces = Pieces::default();
        pieces.push(buf.as_mut_ptr(), buf.len());
        // SAFETY: `buf` is borrowed exclusively until the end of the call.
        unsafe { transfer(self.fd.as_fd(), Direction::Read, pieces, &mut self.waiting) }
    }

    fn read_pages(&mut self, pages: &Mapping, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        let all = Pieces::of_slots(pages, slots)?;
        // SAFETY: the copies are borrowed exclusively until the end of the call, the mapping is
        // borrowed as well, and no reference to its memory exists.
        unsafe { transfer(self.fd.as_fd(), Direction::Read, all, &mut self.waiting) }
    }

    fn position(&mut self) -> io::Result<u64> {
        Ok(tell(&self.fd)?)
    }

    fn go_to(&mut self, offset: u64) -> io::Result<()> {
        let size = fstat(&self.fd)?.st_size;
        if u64::try_from(size).is_ok_and(|size| size < offset) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seek(&self.fd, SeekFrom::Start(offset))?;
        Ok(())
    }
}

impl<F: AsFd> StreamIn<Mapping> for FileAt<F> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut pieces = Pieces::default();
        pieces.push(buf.as_mut_ptr(), buf.len());
        // SAFETY: `buf` is borrowed exclusively until the end of the call.
        unsafe { self.fill(pieces) }
    }

    fn read_pages(&mut self, pages: &Mapping, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        let all = Pieces::of_slots(pages, slots)?;
        // SAFETY: as for a stream: the copies are borrowed exclusively until the end of the call,
        // the mapping is borrowed as well, and no reference to its memory exists.
        unsafe { self.fill(all) }
    }

    fn position(&mut self) -> io::Result<u64> {
        Ok(self.offset)
    }

    /// A place behind the end of the file shows when something is read there.
    fn go_to(&mut self, offset: u64) -> io::Result<()> {
        self.offset = offset;
        Ok(())
    }
}

/// Pieces of memory, in the order of the stream. None is empty, no two could be one.
#[derive(Default)]
struct Pieces(Vec<libc::iovec>);

impl Pieces {
    /// Where the pages of `slots` belong, some of them in `pages`.
    fn of_slots(pages: &Mapping, slots: &mut [PageSlot<'_>]) -> io::Result<Pieces> {
        let mut all = Pieces::default();
        for slot in slots {
            let start = match slot {
                PageSlot::Mapped(index) => pages.address(*index)?.as_ptr(),
                PageSlot::Copied(page) => page.0.as_mut_ptr(),
            };
            all.push(start, PAGE_SIZE);
        }
        Ok(all)
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.iov_len as u64).sum()
    }

    fn push(&mut self, start: *mut u8, length: usize) {
        if length == 0 {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => {
                last.iov_len += length;
            }
            _ => self.0.push(libc::iovec { iov_base: start.cast(), iov_len: length }),
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    /// From this offset of a file.
    ReadAt(u64),
    Write,
}

impl Direction {
    /// What to wait for.
    pub(super) fn readiness(self) -> PollFlags {
        match self {
            Direction::Read | Direction::ReadAt(_) => PollFlags::IN,
            Direction::Write => PollFlags::OUT,
        }
    }

    /// After `moved` bytes.
    fn after(self, moved: usize) -> Direction {
        match self {
            Direction::ReadAt(offset) => Direction::ReadAt(offset.saturating_add(moved as u64)),
            other => other,
        }
    }
}

/// Moves all of `pieces`.
///
/// # Safety
/// Each piece is memory that may be read, or written if something is read into it, until this
/// returns; no reference to what is written exists but the caller's own, which it does not use
/// meanwhile.
unsafe fn transfer(
    fd: BorrowedFd<'_>,
    mut to: Direction,
    mut pieces: Pieces,
    waiting: &mut impl Wait,
) -> io::Result<()> {
    let mut rest = pieces.0.as_mut_slice();
    while !rest.is_empty() {
        let now = rest.get(..PIECES_MAX).unwrap_or(rest);
        // SAFETY: the caller's duty.
        match unsafe { transfer_some(fd, to, now) } {
            Ok(0) if to == Direction::Write => return Err(io::ErrorKind::WriteZero.into()),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => {
                rest = advance(rest, moved);
                to = to.after(moved);
            }
            // Whatever the error: with the descriptor taken away it would be an odd one.
            Err(_) if abort::requested() => return Err(Errno::CANCELED.into()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => waiting.wait(fd, to)?,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// One system call.
///
/// # Safety
/// As [`transfer`].
unsafe fn transfer_some(
    fd: BorrowedFd<'_>,
    to: Direction,
    pieces: &[libc::iovec],
) -> Result<usize, Errno> {
    // At most `PIECES_MAX`.
    let count = libc::c_int::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    let moved = match to {
        // SAFETY: `count` pieces, each memory that may be written: the caller's duty.
        Direction::Read => unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), count) },
        Direction::ReadAt(offset) => {
            let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
            // SAFETY: as above.
            unsafe { libc::preadv(fd.as_raw_fd(), pieces.as_ptr(), count, offset) }
        }
        // SAFETY: `count` pieces, each memory that may be read: the caller's duty.
        Direction::Write => unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), count) },
    };
    usize::try_from(moved)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// What is left of `pieces` after `moved` bytes.
fn advance(pieces: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let done = pieces
        .iter()
        .take_while(|piece| {
            let whole = moved >= piece.iov_len;
            moved -= if whole { piece.iov_len } else { 0 };
            whole
        })
        .count();
    let (_, rest) = pieces.split_at_mut(done);
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(moved);
        first.iov_len -= moved;
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use proptest::prelude::*;
    use rxl_migrate::frame::PageBuf;
    use rxl_migrate::hypervisor::ForeignPages;

    use super::*;

    fn page(byte: u8) -> PageBuf {
        PageBuf([byte; PAGE_SIZE])
    }

    /// A mapping whose page n is full of the byte n, as a guest whose memory is in no order.
    fn numbered(count: u8) -> Mapping {
        let mapping = Mapping::plain(&(0..u64::from(count)).rev().collect::<Vec<_>>(), true);
        (0..count).for_each(|n| mapping.write_page(n.into(), &page(n)));
        mapping
    }

    /// All that `write` puts into a socket whose other end is read in small pieces, so that most
    /// writes are partial.
    fn written(write: impl FnOnce(&mut FdOut<UnixStream>) -> io::Result<()>) -> Vec<u8> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        let reader = thread::spawn(move || {
            let (mut all, mut piece) = (Vec::new(), [0; 1777]);
            while let Ok(n @ 1..) = rustix::io::read(&theirs, &mut piece) {
                all.extend_from_slice(&piece[..n]);
            }
            all
        });
        write(&mut FdOut::new(ours)).unwrap();
        reader.join().unwrap()
    }

    #[test]
    fn head_and_pages_go_out_in_order_even_if_they_are_more_than_one_call_takes() {
        let mapping = numbered(3);
        let copy = page(0xcc);
        // Never two neighbours, so nothing is merged: 3001 pieces.
        let mapped = |index| PagePiece::Mapped(&mapping, index);
        let one = [mapped(2), PagePiece::Copied(&copy), mapped(0)];
        let pieces: Vec<_> = (0..1000).flat_map(|_| &one).map(reborrow).collect();
        let got = written(|out| out.write_pages(b"head", &pieces));
        let (head, pages) = got.split_at(4);
        assert_eq!(head, b"head");
        assert_eq!(pages.len(), 3000 * PAGE_SIZE);
        for (n, got) in pages.chunks(PAGE_SIZE).enumerate() {
            assert!(got.iter().all(|byte| *byte == [2, 0xcc, 0][n % 3]), "page {n}");
        }
    }

    fn reborrow<'a>(piece: &PagePiece<'a, Mapping>) -> PagePiece<'a, Mapping> {
        match piece {
            PagePiece::Mapped(pages, index) => PagePiece::Mapped(pages, *index),
            PagePiece::Copied(page) => PagePiece::Copied(page),
        }
    }

    #[test]
    fn neighbouring_pages_are_one_piece() {
        let mapping = numbered(4);
        let mut pieces = Pieces::default();
        for index in [0, 1, 2, 0, 3] {
            pieces.push(mapping.address(index).unwrap().as_ptr(), PAGE_SIZE);
        }
        pieces.push(std::ptr::null_mut(), 0);
        let lengths: Vec<_> = pieces.0.iter().map(|piece| piece.iov_len / PAGE_SIZE).collect();
        assert_eq!(lengths, [3, 1, 1]);
    }

    #[test]
    fn a_page_outside_the_mapping_is_an_error_before_anything_is_moved() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mapping = numbered(1);
        let mut out = FdOut::new(&ours);
        let pieces = [0, 1].map(|index| PagePiece::Mapped(&mapping, index));
        assert!(out.write_pages(b"head", &pieces).is_err());
        theirs.set_nonblocking(true).unwrap();
        assert_eq!(rustix::io::read(&theirs, &mut [0; 1][..]), Err(Errno::AGAIN));
    }

    #[test]
    fn pages_are_read_into_their_slots_and_not_a_byte_more_is_taken() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || {
            let mut out = FdOut::new(theirs);
            for byte in 1..=5 {
                out.write_pages(&[], &[PagePiece::Copied(&page(byte))]).unwrap();
            }
            StreamOut::<Mapping>::write_all(&mut out, b"rest").unwrap();
        });
        let mapping = numbered(6);
        let (mut first, mut last) = (page(0), page(0));
        let mut slots = [
            PageSlot::Mapped(4),
            PageSlot::Copied(&mut first),
            PageSlot::Mapped(1),
            PageSlot::Mapped(2),
            PageSlot::Copied(&mut last),
        ];
        let mut input = FdIn::new(&ours);
        input.read_pages(&mapping, &mut slots).unwrap();
        assert_eq!((first.0[0], last.0[4095]), (2, 5));
        let mut got = page(0);
        let pages = (0..6).map(|index| {
            mapping.read_page(index, &mut got);
            assert!(got.0.iter().all(|byte| *byte == got.0[0]));
            got.0[0]
        });
        assert_eq!(pages.collect::<Vec<_>>(), [0, 3, 4, 3, 1, 5]);
        let mut rest = [0; 4];
        StreamIn::<Mapping>::read_exact(&mut input, &mut rest).unwrap();
        assert_eq!(&rest, b"rest");
        sender.join().unwrap();
    }

    /// Pages that are full of the bytes 0 to `count - 1`, and a few bytes more, in a file.
    fn file_of_pages(count: u8) -> std::fs::File {
        use std::io::Write;

        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::memfd_create("stream", flags).unwrap());
        (0..count).for_each(|byte| file.write_all(&page(byte).0).unwrap());
        file.write_all(b"rest").unwrap();
        file
    }

    #[test]
    fn a_file_is_read_from_any_place_and_the_descriptors_own_stays() {
        let file = file_of_pages(3);
        let mut input = FdIn::new(&file);
        StreamIn::<Mapping>::go_to(&mut input, 4096).unwrap();
        let mapping = numbered(5);
        let (mut at, mut copy) = (FileAt::new(&file), page(9));
        StreamIn::<Mapping>::go_to(&mut at, 4096).unwrap();
        let mut slots = [PageSlot::Mapped(4), PageSlot::Copied(&mut copy)];
        at.read_pages(&mapping, &mut slots).unwrap();
        let mut got = page(0);
        mapping.read_page(4, &mut got);
        assert_eq!((got.0[4095], copy.0[0]), (1, 2));
        let mut rest = [0; 4];
        StreamIn::<Mapping>::read_exact(&mut at, &mut rest).unwrap();
        assert_eq!(&rest, b"rest");
        assert_eq!(StreamIn::<Mapping>::position(&mut at).unwrap(), 3 * 4096 + 4);
        let end = StreamIn::<Mapping>::read_exact(&mut at, &mut rest).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(StreamIn::<Mapping>::position(&mut input).unwrap(), 4096);
    }

    #[test]
    fn one_can_go_to_the_end_of_a_file_but_no_further() {
        let file = file_of_pages(1);
        let mut input = FdIn::new(&file);
        StreamIn::<Mapping>::go_to(&mut input, 4100).unwrap();
        let error = StreamIn::<Mapping>::go_to(&mut input, 4101).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(StreamIn::<Mapping>::position(&mut FdIn::new(ours)).is_err());
    }

    #[test]
    fn a_pipe_is_made_large_and_a_larger_one_is_left_alone() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let _out = FdOut::new(&writer);
        assert_eq!(fcntl_getpipe_size(&writer), Ok(PIPE_BYTES));
        fcntl_setpipe_size(&reader, PIPE_BYTES / 2).unwrap();
        let _in = FdIn::new(&reader);
        assert_eq!(fcntl_getpipe_size(&reader), Ok(PIPE_BYTES));
        if fcntl_setpipe_size(&reader, 2 * PIPE_BYTES).is_ok() {
            let _in = FdIn::new(&reader);
            assert_eq!(fcntl_getpipe_size(&reader), Ok(2 * PIPE_BYTES));
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_unexpected_eof() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::write(&theirs, b"abc").unwrap();
        drop(theirs);
        let mut input = FdIn::new(ours);
        let error = StreamIn::<Mapping>::read_exact(&mut input, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_descriptor_that_does_not_block_is_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let sender = thread::spawn(move || {
            thread::sleep(std::time::Duration::from_millis(50));
            rustix::io::write(&theirs, b"late").unwrap();
        });
        let mut got = [0; 4];
        StreamIn::<Mapping>::read_exact(&mut FdIn::new(ours), &mut got).unwrap();
        assert_eq!(&got, b"late");
        sender.join().unwrap();
    }

    proptest! {
        #[test]
        fn advancing_leaves_the_bytes_after_those_that_were_moved(
            lengths in prop::collection::vec(1_usize..20, 0..12),
            cut in 0_usize..300,
        ) {
            let bytes: Vec<usize> = lengths.iter().zip(1..).flat_map(|(length, piece)| {
                (0..*length).map(move |offset| piece * 1000 + offset)
            }).collect();
            let mut pieces: Vec<_> = lengths.iter().zip(1..).map(|(length, piece)| libc::iovec {
                iov_base: std::ptr::without_provenance_mut(piece * 1000),
                iov_len: *length,
            }).collect();
            let moved = cut.min(bytes.len());
            let rest: Vec<usize> = advance(&mut pieces, moved).iter().flat_map(|piece| {
                (0..piece.iov_len).map(|offset| piece.iov_base.addr() + offset)
            }).collect();
            prop_assert_eq!(&rest, &bytes[moved..]);
        }
    }
}
