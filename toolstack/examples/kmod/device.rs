//! The module's device, with calls that may be wrong. Specified in `dom0-setup/kmod/rxl_map.h`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use crate::Result;

const PAGE: usize = 4096;

/// `struct rxl_map_frames`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MapFrames {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) frames: u64,
    pub(crate) errors: u64,
    pub(crate) domain: u32,
    pub(crate) flags: u32,
}

const MAP: u64 = 0x4028_5270;
const UNMAP: u64 = 0x4010_5271;
const RESTRICT: u64 = 0x4004_5272;

/// An open file, and its window.
pub(crate) struct Device {
    file: File,
    start: usize,
    pages: usize,
}

/// The number of an error, as `Err`.
pub(crate) type Answer = std::result::Result<(), i32>;

fn answer(result: i32) -> Answer {
    let number = || io::Error::last_os_error().raw_os_error().unwrap_or_default();
    if result == 0 { Ok(()) } else { Err(number()) }
}

impl Device {
    /// Opens the device and makes a window of `pages`.
    pub(crate) fn open(pages: usize) -> Result<Device> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/rxl_map")?;
        let mut device = Device { file, start: 0, pages };
        device.start =
            device.window(pages, libc::MAP_SHARED).map_err(io::Error::from_raw_os_error)?;
        Ok(device)
    }

    /// Makes a window; there can be one.
    pub(crate) fn window(&self, pages: usize, flags: i32) -> std::result::Result<usize, i32> {
        let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, self.file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, prot, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or_default());
        }
        Ok(at.expose_provenance())
    }

    pub(crate) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// A call as it stands.
    pub(crate) fn map_raw(&self, what: MapFrames) -> Answer {
        // SAFETY: what the module may write is what it is told of; the callers see to that.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), MAP, &raw const what) })
    }

    /// Maps frames; each has an error.
    pub(crate) fn map(
        &self,
        first: usize,
        domain: u32,
        frames: &[u64],
        errors: &mut Vec<i32>,
    ) -> Answer {
        errors.clear();
        errors.resize(frames.len(), 0);
        self.map_raw(MapFrames {
            first: first as u64,
            count: frames.len() as u64,
            frames: frames.as_ptr().expose_provenance() as u64,
            errors: errors.as_mut_ptr().expose_provenance() as u64,
            domain,
            flags: 0,
        })
    }

    pub(crate) fn unmap(&self, first: u64, count: u64) -> Answer {
        let what = [first, count];
        // SAFETY: the argument is two words.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), UNMAP, &raw const what) })
    }

    pub(crate) fn restrict(&self, domain: u32) -> Answer {
        // SAFETY: the argument is a word.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), RESTRICT, &raw const domain) })
    }

    /// Has the kernel read a page into `file`. Whether there was one, to the end.
    pub(crate) fn read_into(&self, page: usize, file: &File) -> Result<bool> {
        let at = std::ptr::with_exposed_provenance(self.address(page));
        // SAFETY: the kernel reads, and says EFAULT if there is nothing.
        let wrote = unsafe { libc::pwrite(file.as_raw_fd(), at, PAGE, 0) };
        match (usize::try_from(wrote), io::Error::last_os_error()) {
            // Fewer bytes: another thread emptied the page in the middle of it.
            (Ok(wrote), _) => Ok(wrote == PAGE),
            (Err(_), error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(false),
            (Err(_), error) => Err(format!("pwrite of a page: {error}").into()),
        }
    }

    /// Has the kernel write to a page. Whether it could.
    pub(crate) fn can_be_written(&self, page: usize) -> Result<bool> {
        let zeros = File::open("/dev/zero")?;
        let at = std::ptr::with_exposed_provenance_mut(self.address(page));
        // SAFETY: the kernel writes, and says EFAULT if it may not. Callers name an empty page.
        Ok(unsafe { libc::read(zeros.as_raw_fd(), at, 8) } >= 0)
    }

    /// Tries what may not be done to a window: each with the error that it has to have.
    pub(crate) fn mistreat(&self) -> Vec<(&'static str, Answer, i32)> {
        let whole = self.pages * PAGE;
        let window = std::ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: within the window.
        let middle = unsafe { libc::munmap(window, PAGE) };
        let middle = answer(middle);
        // SAFETY: the window, of which there is no reference.
        let protect = answer(unsafe { libc::mprotect(window, whole, libc::PROT_READ) });
        // SAFETY: as above.
        let grow = unsafe { libc::mremap(window, whole, whole * 2, libc::MREMAP_MAYMOVE) };
        let grow = answer(if grow == libc::MAP_FAILED { -1 } else { 0 });
        // SAFETY: as above.
        let inherit = answer(unsafe { libc::madvise(window, whole, libc::MADV_DOFORK) });
        // SAFETY: as above.
        let drop = answer(unsafe { libc::madvise(window, whole, libc::MADV_DONTNEED) });
        vec![
            ("unmapping one page", middle, libc::EINVAL),
            ("mprotect", protect, libc::EACCES),
            ("growing", grow, libc::EFAULT),
            ("inheriting", inherit, libc::EINVAL),
            ("MADV_DONTNEED", drop, libc::EINVAL),
        ]
    }

    /// Moves the window, which closes it.
    pub(crate) fn move_window(&self) -> Answer {
        let whole = self.pages * PAGE;
        let anywhere = std::ptr::null_mut();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let to = unsafe { libc::mmap(anywhere, whole, libc::PROT_NONE, flags, -1, 0) };
        let window = std::ptr::with_exposed_provenance_mut(self.start);
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the window, and a mapping that was just made.
        let moved = unsafe { libc::mremap(window, whole, whole, how, to) };
        answer(if moved == libc::MAP_FAILED { -1 } else { 0 })
    }

    /// Unmaps the window.
    pub(crate) fn unmap_window(&self) -> Answer {
        let window = std::ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: the window, of which there is no reference.
        answer(unsafe { libc::munmap(window, self.pages * PAGE) })
    }

    /// What the module has counted for this file.
    pub(crate) fn fdinfo(&self) -> Result<BTreeMap<String, u64>> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.file.as_raw_fd()))?;
        let pairs = text.lines().filter_map(|line| line.split_once(":\t"));
        let own = ["window_pages", "pages_", "hypercalls", "locks", "wait"];
        let counts = pairs.filter(|(key, _)| own.iter().any(|start| key.starts_with(start)));
        counts.map(|(key, value)| Ok((key.to_owned(), value.trim().parse()?))).collect()
    }
}
