//! The limit that `tests/bench engine` holds the save helpers against: the bytes of a machine's
//! memory, straight from a mapping to a stream (`out`, standard output) or from a stream into a
//! mapping (`in`, standard input), and nothing else. `back` only makes the memory, in large pages
//! if there are any.
//!
//! # Safety
//! The mapping is memory that others write, so no reference to it is made: the kernel copies it.

use std::ffi::{c_int, c_void};
use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

const PAGE: usize = 4096;
/// Bytes of one read or write.
const PIECE: usize = 4 << 20;
/// What a pipe is made to hold.
const PIPE: c_int = 1 << 20;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [direction, memory, first, pages] = args.as_slice() else {
        return Err(Error::other("usage: rxl-plain-copy out|in|back MEMORY FIRST-PAGE PAGES"));
    };
    let number = |text: &String| text.parse::<usize>().map_err(Error::other);
    let (offset, bytes) = (number(first)? * PAGE, number(pages)? * PAGE);
    if direction == "back" {
        return back(map(memory, offset, bytes, libc::MAP_SHARED)?, bytes);
    }
    let out = direction == "out";
    // Filled in at once, as what the helpers map.
    let start = map(memory, offset, bytes, libc::MAP_SHARED | libc::MAP_POPULATE)?;
    // SAFETY: it changes only the size, if this is a pipe, and fails else.
    unsafe { libc::fcntl(if out { 1 } else { 0 }, libc::F_SETPIPE_SZ, PIPE) };
    let mut done = 0;
    while done < bytes {
        let (at, count) = (start.wrapping_byte_add(done), PIECE.min(bytes - done));
        let moved = match out {
            // SAFETY: `count` bytes are mapped there.
            true => unsafe { libc::write(1, at, count) },
            // SAFETY: as above, and for writing.
            false => unsafe { libc::read(0, at, count) },
        };
        match usize::try_from(moved) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(_) => return Err(Error::last_os_error()),
        }
    }
    Ok(())
}

/// Gives the mapping its pages.
fn back(start: *mut c_void, bytes: usize) -> Result<()> {
    // Without large pages it works as well.
    // SAFETY: the mapping, all of it.
    unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
    // SAFETY: as above; its content does not change.
    match unsafe { libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

fn map(memory: &str, offset: usize, bytes: usize, flags: c_int) -> Result<*mut c_void> {
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let prot: c_int = libc::PROT_READ | libc::PROT_WRITE;
    let offset = i64::try_from(offset).map_err(Error::other)?;
    let fd = memory.as_raw_fd();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(null_mut(), bytes, prot, flags, fd, offset) };
    if start == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(start) }
}
