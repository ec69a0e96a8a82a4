//! The start of a stream that is saved, held back until libxl starts its save helper.
//!
//! libxl (4.14 to 4.22) calls a null pointer, which ends this process, if what it writes before
//! its save helper has started cannot be written (see [`super::start`]): a peer that dies then,
//! or a full disk, is enough. So libxl writes those few bytes into a pipe, which cannot fail. When
//! it is about to start the helper, they are passed on, and libxl's descriptor becomes the
//! stream's: the helper, and libxl after it, write to the stream itself.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

/// How often a request to end is looked for.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// More than libxl writes before the helper: a stream's header and one record's, 32 bytes.
const START_MAX: usize = 4096;

/// A stream whose start is held back.
#[derive(Debug)]
pub(super) struct HeldStart {
    held: OwnedFd,
    libxls: OwnedFd,
    stream: OwnedFd,
    /// What the stream's were.
    flags: OFlags,
    passed_on: io::Result<()>,
}

impl HeldStart {
    /// Holds back the start of what goes to `stream`.
    ///
    /// # Errors
    /// The system's: no descriptors are left.
    pub(super) fn new(stream: BorrowedFd<'_>) -> io::Result<HeldStart> {
        let (held, libxls) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let flags = fcntl_getfl(stream)?;
        let stream = stream.try_clone_to_owned()?;
        Ok(HeldStart { held, libxls, stream, flags, passed_on: Ok(()) })
    }

    /// What libxl writes to, before and after.
    pub(super) fn descriptor(&self) -> RawFd {
        self.libxls.as_raw_fd()
    }

    /// Passes on what libxl has written, and has its descriptor be the stream's. On an error, or
    /// when `given_up`, the helper must not write.
    pub(super) fn release(&mut self, given_up: impl Fn() -> bool) -> Result<(), ()> {
        let passed_on = self.pass_on(given_up);
        let switched = rustix::io::dup2(&self.stream, &mut self.libxls).map_err(io::Error::from);
        self.passed_on = passed_on.and(switched);
        self.passed_on.as_ref().map_err(|_| ()).copied()
    }

    fn pass_on(&self, given_up: impl Fn() -> bool) -> io::Result<()> {
        // As libxl has it for the time of a save: the helper's writes are to wait.
        fcntl_setfl(&self.stream, self.flags - OFlags::NONBLOCK)?;
        let mut room = [MaybeUninit::uninit(); START_MAX];
        let mut left: &[u8] = match rustix::io::read(&self.held, &mut room) {
            Ok((start, _)) => start,
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        while !left.is_empty() {
            let mut fds = [PollFd::new(&self.stream, PollFlags::OUT)];
            match poll(&mut fds, Some(&PATIENCE)) {
                Ok(0) | Err(Errno::INTR) if given_up() => return Err(Errno::INTR.into()),
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match rustix::io::write(&self.stream, left) {
                Ok(written) => left = left.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The save is over: the stream's flags are as they were.
    ///
    /// # Errors
    /// The stream's start was not passed on; so neither was the rest.
    pub(super) fn finish(self) -> io::Result<()> {
        let restored = fcntl_setfl(&self.stream, self.flags).map_err(io::Error::from);
        self.passed_on.and(restored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{ErrorKind, Read, Write};
    use std::os::fd::AsFd;

    fn writer(held: &HeldStart) -> File {
        held.libxls.try_clone().unwrap().into()
    }

    #[test]
    fn the_start_comes_first_and_the_rest_goes_straight_to_the_stream() {
        let (mut reader, stream) = io::pipe().unwrap();
        fcntl_setfl(&stream, OFlags::NONBLOCK).unwrap();
        let mut held = HeldStart::new(stream.as_fd()).unwrap();
        writer(&held).write_all(b"start ").unwrap();
        held.release(|| false).unwrap();
        assert!(!fcntl_getfl(&stream).unwrap().contains(OFlags::NONBLOCK));
        writer(&held).write_all(b"rest").unwrap();
        held.finish().unwrap();
        assert!(fcntl_getfl(&stream).unwrap().contains(OFlags::NONBLOCK));
        drop(stream);
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!(all, "start rest");
    }

    #[test]
    fn a_stream_that_nobody_reads_takes_the_start_and_fails_only_then() {
        let (reader, stream) = io::pipe().unwrap();
        let mut held = HeldStart::new(stream.as_fd()).unwrap();
        drop(reader);
        writer(&held).write_all(b"start").unwrap();
        held.release(|| false).unwrap_err();
        assert_eq!(writer(&held).write(b"rest").unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert_eq!(held.finish().unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn whoever_waits_for_a_stream_that_takes_nothing_can_give_up() {
        let (_reader, stream) = io::pipe().unwrap();
        fcntl_setfl(&stream, OFlags::NONBLOCK).unwrap();
        while rustix::io::write(&stream, &[0; 4096]).is_ok() {}
        let mut held = HeldStart::new(stream.as_fd()).unwrap();
        writer(&held).write_all(b"start").unwrap();
        held.release(|| true).unwrap_err();
        assert_eq!(held.finish().unwrap_err().kind(), ErrorKind::Interrupted);
    }
}
