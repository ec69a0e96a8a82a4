//! Windows of the kernel module `rxl_map`: address space that a process takes once, and into parts
//! of which it maps frames without the kernel's lock on its address space.
//!
//! It is specified in `dom0-setup/kmod/rxl_map.h`. All threads of the process share its windows;
//! which parts of them are taken is kept here, and parts that are taken belong to one mapping.
//!
//! # Safety
//! A window is a mapping of this process that nothing else knows, at an address range that was
//! reserved for it, and stays to the end of the process. What the module is told by address are
//! arrays that live as long as the call and have as many entries as it says.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::hypervisor::{Access, BATCH_PAGES_MAX};

use super::foreign::Mapper;

const DEVICE: &str = "/dev/rxl_map";

/// Pages of a part, which is what one mapping takes at least. A part has its page tables to
/// itself: Xen locks a page table for each entry that it writes.
const PART_PAGES: usize = BATCH_PAGES_MAX;
/// Parts of a window. A larger one would take as long to make as it has page tables, each of which
/// Xen checks.
const PARTS: u32 = 16;
/// Most windows of a process, each of which is an open file: 4 GiB.
const WINDOWS_MAX: usize = 64;
const WINDOW_BYTES: usize = PARTS as usize * PART_PAGES * PAGE_SIZE;
/// Memory that one page table describes.
const TABLE_BYTES: usize = 512 * PAGE_SIZE;

/// How long to wait for a page that is paged out before asking again; the library does so too.
const PAGED_OUT_WAIT: Duration = Duration::from_micros(100);

const WRITE: u32 = 1;

/// `struct rxl_map_frames`.
#[repr(C)]
struct MapFrames {
    first: u64,
    count: u64,
    frames: u64,
    errors: u64,
    domain: u32,
    flags: u32,
}

/// `struct rxl_map_range`.
#[repr(C)]
struct MapRange {
    first: u64,
    count: u64,
}

/// `_IOW('R', number, …)` for an argument of `bytes`.
const fn iow(number: u64, bytes: usize) -> u64 {
    1 << 30 | (bytes as u64) << 16 | (b'R' as u64) << 8 | number
}

const MAP: u64 = iow(0x70, size_of::<MapFrames>());
const UNMAP: u64 = iow(0x71, size_of::<MapRange>());

/// Which parts of a window are taken: a bit for each.
#[derive(Debug, Default)]
struct Parts(u64);

impl Parts {
    fn mask(first: u32, count: u32) -> u64 {
        u64::MAX.checked_shr(u64::BITS - count).unwrap_or(0) << first
    }

    /// Takes `count` parts in a row, from 1 to all; the first of them.
    fn take(&mut self, count: u32) -> Option<u32> {
        let first = (0..=PARTS.checked_sub(count)?)
            .find(|first| self.0 & Parts::mask(*first, count) == 0)?;
        self.0 |= Parts::mask(first, count);
        Some(first)
    }

    fn give(&mut self, first: u32, count: u32) {
        self.0 &= !Parts::mask(first, count);
    }
}

/// One window, with the open file that it belongs to.
struct Window {
    file: OwnedFd,
    start: NonNull<u8>,
    taken: Mutex<Parts>,
}

// SAFETY: the address is the process's, not a thread's; the rest may be shared anyway.
unsafe impl Send for Window {}
// SAFETY: as for `Send`.
unsafe impl Sync for Window {}

impl Window {
    fn open() -> io::Result<Window> {
        let file = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let (anywhere, reserve) = (std::ptr::null_mut(), WINDOW_BYTES + TABLE_BYTES);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe { libc::mmap(anywhere, reserve, libc::PROT_NONE, flags, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // What is left of the reservation at both ends costs nothing.
        let skip = reserved.addr().wrapping_neg() % TABLE_BYTES;
        // SAFETY: less than what the reservation has beyond the window's size.
        let at = unsafe { reserved.byte_add(skip) };
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: takes the place of a part of the reservation, which nothing uses.
        let start = unsafe { libc::mmap(at, WINDOW_BYTES, prot, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: the reservation, which nothing uses.
            unsafe { libc::munmap(reserved, reserve) };
            return Err(error);
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::FAULT)?;
        Ok(Window { file, start, taken: Mutex::default() })
    }

    fn take(&self, parts: u32) -> Option<u32> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).take(parts)
    }

    fn give(&self, first: u32, parts: u32) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).give(first, parts);
    }

    fn page(&self, page: usize) -> NonNull<u64> {
        // SAFETY: callers name pages of the window, which ends after a whole number of them.
        unsafe { self.start.byte_add(page * PAGE_SIZE) }.cast()
    }

    /// The page of the window at this address, if it is one of its own.
    fn page_at(&self, address: NonNull<u64>) -> Option<usize> {
        let bytes = address.addr().get().checked_sub(self.start.addr().get())?;
        (bytes < WINDOW_BYTES).then_some(bytes / PAGE_SIZE)
    }

    /// Maps `frames` from page `first` on; every frame gets its error, negated as the kernel has
    /// it, or 0.
    fn map(
        &self,
        first: usize,
        domain: u32,
        frames: &[u64],
        access: Access,
        errors: &mut [c_int],
    ) -> io::Result<()> {
        if frames.len() != errors.len() {
            return Err(Errno::INVAL.into());
        }
        let what = MapFrames {
            first: first as u64,
            count: frames.len() as u64,
            frames: frames.as_ptr().addr() as u64,
            errors: errors.as_mut_ptr().expose_provenance() as u64,
            domain,
            flags: if access == Access::ReadWrite { WRITE } else { 0 },
        };
        // SAFETY: both arrays have as many entries as it says.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), MAP, &raw const what) })
    }

    fn unmap(&self, first: usize, count: usize) -> io::Result<()> {
        let what = MapRange { first: first as u64, count: count as u64 };
        // SAFETY: the argument is the structure that the number is of.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), UNMAP, &raw const what) })
    }

    /// Maps those frames again that were paged out, until none is.
    fn map_paged_out(
        &self,
        first: usize,
        domain: u32,
        frames: &[u64],
        access: Access,
        errors: &mut [c_int],
    ) -> io::Result<()> {
        for (slot, (frame, error)) in frames.iter().zip(errors).enumerate() {
            while *error == -libc::ENOENT {
                thread::sleep(PAGED_OUT_WAIT);
                let one = std::slice::from_mut(error);
                match self.map(first + slot, domain, &[*frame], access, one) {
                    Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The windows of this process: another one is made when none has room.
#[derive(Default)]
pub(super) struct Windows {
    windows: Mutex<Vec<Arc<Window>>>,
}

impl Windows {
    /// Those of this process, the first of which is made when they are asked for first.
    ///
    /// # Errors
    /// The module is not loaded (`ENOENT`), or has no windows here (`EOPNOTSUPP`).
    pub(super) fn of_this_process() -> io::Result<&'static Windows> {
        static WINDOWS: OnceLock<Windows> = OnceLock::new();
        if let Some(windows) = WINDOWS.get() {
            return Ok(windows);
        }
        let first = Arc::new(Window::open()?);
        Ok(WINDOWS.get_or_init(|| Windows { windows: Mutex::new(vec![first]) }))
    }

    fn reserve(&self, parts: u32) -> io::Result<(Arc<Window>, u32)> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        for window in windows.iter() {
            if let Some(first) = window.take(parts) {
                return Ok((Arc::clone(window), first));
            }
        }
        if parts > PARTS || windows.len() == WINDOWS_MAX {
            return Err(Errno::NOSPC.into());
        }
        let window = Arc::new(Window::open()?);
        let first = window.take(parts).ok_or(Errno::NOSPC)?;
        windows.push(Arc::clone(&window));
        Ok((window, first))
    }

    fn find(&self, address: NonNull<u64>) -> Option<(Arc<Window>, usize)> {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find_map(|window| Some((Arc::clone(window), window.page_at(address)?)))
    }
}

fn parts_for(pages: usize) -> io::Result<u32> {
    u32::try_from(pages.div_ceil(PART_PAGES)).map_err(|_| Errno::NOSPC.into())
}

/// Mapping fails with `ENOSPC`, and has done nothing, if there is no room in windows.
impl Mapper for Windows {
    fn map(
        &self,
        domain: u32,
        frames: &[u64],
        access: Access,
        errors: &mut [c_int],
    ) -> io::Result<NonNull<u64>> {
        let parts = parts_for(frames.len())?;
        let (window, part) = self.reserve(parts)?;
        let first = part as usize * PART_PAGES;
        let mut result = window.map(first, domain, frames, access, errors);
        if result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT)) {
            result = window.map_paged_out(first, domain, frames, access, errors);
        }
        match result {
            Ok(()) => Ok(window.page(first)),
            Err(error) => {
                // Some may be mapped. What cannot be unmapped stays taken.
                if window.unmap(first, frames.len()).is_ok() {
                    window.give(part, parts);
                }
                Err(error)
            }
        }
    }

    unsafe fn unmap(&self, start: NonNull<u64>, pages: usize) -> io::Result<()> {
        let (window, first) = self.find(start).ok_or(Errno::FAULT)?;
        window.unmap(first, pages)?;
        let part = u32::try_from(first / PART_PAGES).map_err(|_| Errno::FAULT)?;
        window.give(part, parts_for(pages)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_taken_in_a_row_and_used_again() {
        let mut parts = Parts::default();
        assert_eq!((parts.take(2), parts.take(1), parts.take(3)), (Some(0), Some(2), Some(3)));
        parts.give(2, 1);
        assert_eq!((parts.take(2), parts.take(1)), (Some(6), Some(2)));
        assert_eq!((parts.take(9), parts.take(8), parts.take(1)), (None, Some(8), None));
        assert_eq!(Parts::default().take(PARTS), Some(0));
        assert_eq!(Parts::default().take(PARTS + 1), None);
    }

    #[test]
    fn the_numbers_of_calls_are_the_headers() {
        // As the C compiler has them: direction, size, letter, number.
        assert_eq!((MAP, UNMAP), (0x4028_5270, 0x4010_5271));
    }

    #[test]
    fn where_the_module_is_not_loaded_there_are_no_windows() {
        if !std::path::Path::new(DEVICE).exists() {
            let error = Windows::of_this_process().err().and_then(|error| error.raw_os_error());
            assert_eq!(error, Some(libc::ENOENT));
        }
    }
}
