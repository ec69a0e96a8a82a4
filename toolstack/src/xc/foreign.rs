//! Guest memory mapped into this process: through libxenforeignmemory and the kernel's privcmd, or
//! the windows of rxl's own kernel module ([`super::window`]), by what is wanted ([`want_mapper`]).
//!
//! # Safety
//! A [`Mapping`] is memory that the guest (or Xen) may write at any moment, so no reference to it
//! is ever made, not even for the length of a copy: it is accessed by volatile reads and writes of
//! aligned words, or handed to the kernel by address (`stream`). Its address and size are those of
//! one mapping that it owns and removes when dropped, has another thread remove ([`super::ahead`]),
//! or leaves to the end of the process. Calls of the library need an open handle, which
//! [`ForeignHandle`] is from its making to its drop; a mapping keeps its handle alive. Whoever made
//! a mapping ([`Mapper`]) removes it.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::io::Errno;
use rxl_migrate::counters::Counters;
#[cfg(test)]
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::frame::{PageBuf, WORDS_PER_PAGE};
use rxl_migrate::hypervisor::{Access, ForeignPages, HvResult};
use rxl_xen_sys::stable;

use super::ahead::{Coming, Helper};
use super::handle::silent_logger;
use super::hv;
use super::window::Windows;

const MAP: &str = "xenforeignmemory_map";
/// Frames have 40 bits, as many as a page-table entry has for them. The kernel of a PV dom0 cuts
/// off the others, and would map a page that nobody asked for.
const FRAMES_END: u64 = 1 << 40;

/// What maps frames of guests into this process.
pub(super) trait Mapper: Send + Sync {
    /// Maps `frames` of `domain`, in order. `errors` is as long, and gets 0 or an errno, of either
    /// sign, for each; pages that are paged out are waited for.
    fn map(
        &self,
        domain: u32,
        frames: &[u64],
        access: Access,
        errors: &mut [c_int],
    ) -> io::Result<NonNull<u64>>;

    /// Removes a mapping.
    ///
    /// # Safety
    /// This mapper made it, at `start` and of `pages`, and nobody uses it any more.
    unsafe fn unmap(&self, start: NonNull<u64>, pages: usize) -> io::Result<()>;
}

/// The way to map that is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapperWanted {
    /// By the kernel module where it is loaded, else by privcmd.
    #[default]
    Auto,
    /// By privcmd, which every kernel has: what one process maps waits for one lock.
    Privcmd,
    /// By rxl's kernel module (`rxl_map`), or not at all.
    Module,
}

const WORDS: [(MapperWanted, &str); 3] = [
    (MapperWanted::Auto, "auto"),
    (MapperWanted::Privcmd, "privcmd"),
    (MapperWanted::Module, "module"),
];

impl FromStr for MapperWanted {
    type Err = String;

    fn from_str(text: &str) -> Result<MapperWanted, String> {
        let found = WORDS.into_iter().find(|(_, word)| *word == text);
        found.map(|(wanted, _)| wanted).ok_or_else(|| {
            format!("a mapper is \"auto\", \"privcmd\" or \"module\", not \"{text}\"")
        })
    }
}

impl fmt::Display for MapperWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = WORDS.into_iter().find(|(wanted, _)| wanted == self);
        f.write_str(found.map_or("", |(_, word)| word))
    }
}

static WANTED: OnceLock<MapperWanted> = OnceLock::new();

/// Says how this process is to map, before it opens a domain. Only the first time counts.
pub fn want_mapper(wanted: MapperWanted) {
    // Set before: that was the first time.
    let _ = WANTED.set(wanted);
}

/// The windows that are to be used, if any are.
fn windows() -> io::Result<Option<&'static Windows>> {
    match WANTED.get().copied().unwrap_or_default() {
        MapperWanted::Privcmd => Ok(None),
        MapperWanted::Module => Windows::of_this_process().map(Some),
        MapperWanted::Auto => Ok(Windows::of_this_process().ok()),
    }
}

/// An open handle of libxenforeignmemory, which maps through privcmd.
struct Library(NonNull<stable::xenforeignmemory_handle>);

// SAFETY: the library keeps no state but the descriptor that it opened, on which mmap and ioctl
// may be called by any thread.
unsafe impl Send for Library {}
// SAFETY: as for `Send`.
unsafe impl Sync for Library {}

impl Mapper for Library {
    fn map(
        &self,
        domain: u32,
        frames: &[u64],
        access: Access,
        errors: &mut [c_int],
    ) -> io::Result<NonNull<u64>> {
        if frames.len() != errors.len() {
            return Err(Errno::INVAL.into());
        }
        let prot = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: the handle is open; both arrays have as many entries as the count says.
        let start = unsafe {
            stable::xenforeignmemory_map(
                self.0.as_ptr(),
                domain,
                prot,
                frames.len(),
                frames.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)
    }

    unsafe fn unmap(&self, start: NonNull<u64>, pages: usize) -> io::Result<()> {
        // SAFETY: the handle is open, and mapped this.
        let result = unsafe {
            stable::xenforeignmemory_unmap(self.0.as_ptr(), start.as_ptr().cast(), pages)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: open, and nothing can use it any more; mappings hold an `Arc` of its owner.
        unsafe { stable::xenforeignmemory_close(self.0.as_ptr()) };
    }
}

/// What maps for one domain: handles that it has to itself, and this process's windows.
pub(super) struct ForeignHandle {
    library: Library,
    windows: Option<&'static Windows>,
    done: Done,
    /// Whether mappings are left to the end of the process.
    leaving: AtomicBool,
    /// Whether what can be written may stay mapped a little longer than it is used.
    lingers: bool,
    /// What maps and unmaps beside the thread that moves pages; `None`: nothing does.
    helper: OnceLock<Option<Helper>>,
}

/// What has been mapped so far.
#[derive(Debug, Default)]
struct Done {
    mappings: AtomicU64,
    pages: AtomicU64,
    /// Of these, pages that the module mapped.
    module_pages: AtomicU64,
    map_ns: AtomicU64,
    unmap_ns: AtomicU64,
}

fn add(to: &AtomicU64, count: u128) {
    to.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
}

impl ForeignHandle {
    /// `lingers`: it does no harm if what can be written is unmapped a little later than its user
    /// says. Of a PV guest it does: Xen takes no page table that is mapped so.
    pub(super) fn open(lingers: bool) -> HvResult<Arc<ForeignHandle>> {
        // SAFETY: the logger lives for ever; no flags.
        let raw = unsafe { stable::xenforeignmemory_open(silent_logger(), 0) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| hv("xenforeignmemory_open", io::Error::last_os_error()))?;
        let library = Library(raw);
        let windows = windows().map_err(|e| hv("opening /dev/rxl_map", e))?;
        let (done, leaving, helper) = (Done::default(), false.into(), OnceLock::new());
        Ok(Arc::new(ForeignHandle { library, windows, done, leaving, lingers, helper }))
    }

    pub(super) fn raw(&self) -> *mut stable::xenforeignmemory_handle {
        self.library.0.as_ptr()
    }

    /// Removes no mapping any more: the process ends soon. A PV dom0's kernel pays a trap for each
    /// page that it unmaps, and none when a whole address space goes.
    pub(super) fn leave_mapped(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Begins to map `frames` of `domain` for reading. `None`: there is nobody who could now.
    pub(super) fn map_ahead(self: &Arc<Self>, domain: u32, frames: &[u64]) -> Option<Coming> {
        self.helper.get_or_init(Helper::start).as_ref()?.map(self, domain, frames)
    }

    /// Who is to remove a mapping, if not its user. One that was for reading may have been kept for
    /// long, and is left to it only where there is one already.
    fn helper_to_unmap(&self, writable: bool) -> Option<&Helper> {
        match writable {
            false => self.helper.get()?.as_ref(),
            true if self.lingers => self.helper.get_or_init(Helper::start).as_ref(),
            true => None,
        }
    }

    /// Notes in `counters` what has been mapped.
    pub(super) fn count(&self, counters: &mut Counters) {
        let Done { mappings, pages, module_pages, map_ns, unmap_ns } = &self.done;
        counters.mappings = mappings.load(Ordering::Relaxed);
        counters.mapped_pages = pages.load(Ordering::Relaxed);
        counters.module_pages = module_pages.load(Ordering::Relaxed);
        counters.map_ns = map_ns.load(Ordering::Relaxed);
        counters.unmap_ns = unmap_ns.load(Ordering::Relaxed);
    }

    /// Maps `frames` of `domain`, in order; a frame may occur more than once. Pages that are
    /// paged out are waited for (the library does that).
    ///
    /// # Errors
    /// The first frame's that cannot be mapped; nothing is mapped then.
    pub(super) fn map(
        self: &Arc<Self>,
        domain: u32,
        frames: &[u64],
        access: Access,
    ) -> HvResult<Mapping> {
        if frames.is_empty() {
            return Ok(Mapping { pages: None });
        }
        check_frames(frames).map_err(|e| hv(MAP, e))?;
        let mut errors = vec![0; frames.len()];
        let started = Instant::now();
        let (mut way, mut mapped) = (Way::Library, Err(Errno::NOSPC.into()));
        if let Some(windows) = self.windows {
            (way, mapped) =
                (Way::Windows(windows), windows.map(domain, frames, access, &mut errors));
        }
        // Windows are small, and there may not be many: what has no room there goes by privcmd.
        if mapped.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ENOSPC)) {
            (way, mapped) = (Way::Library, self.library.map(domain, frames, access, &mut errors));
        }
        add(&self.done.map_ns, started.elapsed().as_nanos());
        add(&self.done.mappings, 1);
        add(&self.done.pages, frames.len() as u128);
        if let Way::Windows(_) = way {
            add(&self.done.module_pages, frames.len() as u128);
        }
        let start = mapped.map_err(|e| hv(MAP, e))?;
        let backing = Backing::Foreign(Arc::clone(self), way);
        let writable = access == Access::ReadWrite;
        // From here on dropping it unmaps.
        let pages = Pages { start, count: frames.len(), writable, backing };
        match frames.iter().zip(&errors).find(|(_, error)| **error != 0) {
            None => Ok(Mapping { pages: Some(pages) }),
            Some((frame, error)) => {
                tracing::debug!(domain, frame, error, "a frame cannot be mapped");
                // The header promises an errno; the Linux driver writes it negated.
                Err(hv(MAP, io::Error::from_raw_os_error(error.saturating_abs())))
            }
        }
    }
}

fn check_frames(frames: &[u64]) -> Result<(), Errno> {
    if frames.iter().all(|frame| *frame < FRAMES_END) { Ok(()) } else { Err(Errno::INVAL) }
}

/// Guest frames in this process ([`ForeignPages`]). Unmapped when dropped. It may move to another
/// thread but is never shared by two.
#[derive(Debug)]
pub struct Mapping {
    /// `None`: no page at all, which cannot be mapped.
    pages: Option<Pages>,
}

#[derive(Debug)]
struct Pages {
    start: NonNull<u64>,
    count: usize,
    writable: bool,
    backing: Backing,
}

// SAFETY: a mapping belongs to the process, not to a thread, and this is its only owner.
unsafe impl Send for Pages {}

/// What made a mapping.
#[derive(Clone, Copy)]
enum Way {
    Library,
    Windows(&'static Windows),
}

enum Backing {
    Foreign(Arc<ForeignHandle>, Way),
    /// Plain memory of this process, in place of a guest's.
    #[cfg(test)]
    Plain,
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Backing")
    }
}

impl Pages {
    /// The first word of page `index`.
    fn page(&self, index: usize) -> Option<NonNull<u64>> {
        // SAFETY: within the mapping, as just tested.
        (index < self.count).then(|| unsafe { self.start.add(index * WORDS_PER_PAGE) })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Backing::Foreign(handle, _) = &self.backing
            && handle.leaving.load(Ordering::Relaxed)
        {
            return;
        }
        match &self.backing {
            Backing::Foreign(handle, way) => {
                let (start, pages, way) = (self.start, self.count, *way);
                let disused = Disused { handle: Arc::clone(handle), way, start, pages };
                match handle.helper_to_unmap(self.writable) {
                    Some(helper) => helper.unmap(disused),
                    None => disused.unmap(),
                }
            }
            #[cfg(test)]
            Backing::Plain => {
                let (start, bytes) = (self.start.as_ptr().cast(), self.count * PAGE_SIZE);
                // SAFETY: mapped by `Mapping::plain`, of this size; no reference to it exists.
                assert_eq!(unsafe { libc::munmap(start, bytes) }, 0);
            }
        }
    }
}

/// A mapping that nobody uses any more: it is to be removed, by whatever thread.
pub(super) struct Disused {
    handle: Arc<ForeignHandle>,
    way: Way,
    start: NonNull<u64>,
    pages: usize,
}

// SAFETY: as for `Pages`, whose place it takes.
unsafe impl Send for Disused {}

impl Disused {
    /// Removes it.
    pub(super) fn unmap(self) {
        let started = Instant::now();
        let mapper: &dyn Mapper = match self.way {
            Way::Library => &self.handle.library,
            Way::Windows(windows) => windows,
        };
        // SAFETY: mapped by this, and of this size; no reference to it exists.
        if let Err(error) = unsafe { mapper.unmap(self.start, self.pages) } {
            tracing::warn!(%error, "guest memory stays mapped");
        }
        add(&self.handle.done.unmap_ns, started.elapsed().as_nanos());
    }
}

impl Mapping {
    /// Where page `index` is, for the kernel to read or write.
    pub(super) fn address(&self, index: usize) -> io::Result<NonNull<u8>> {
        let page = self.pages.as_ref().and_then(|pages| pages.page(index));
        page.map(NonNull::cast).ok_or_else(|| Errno::FAULT.into())
    }
}

impl ForeignPages for Mapping {
    fn page_count(&self) -> usize {
        self.pages.as_ref().map_or(0, |pages| pages.count)
    }

    fn read_page(&self, index: usize, into: &mut PageBuf) {
        let Some(page) = self.pages.as_ref().and_then(|pages| pages.page(index)) else {
            into.0.fill(0);
            return;
        };
        for (word, to) in into.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: within the page: a `PageBuf` has as many words as a page.
            let from = unsafe { page.add(word) };
            // SAFETY: mapped and aligned; volatile, because the guest may write it meanwhile.
            *to = unsafe { from.read_volatile() }.to_ne_bytes();
        }
    }

    fn write_page(&self, index: usize, from: &PageBuf) {
        let Some(pages) = &self.pages else { return };
        debug_assert!(pages.writable, "a mapping for reading is written");
        let Some(page) = pages.page(index).filter(|_| pages.writable) else { return };
        for (word, bytes) in from.0.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: within the page: a `PageBuf` has as many words as a page.
            let to = unsafe { page.add(word) };
            // SAFETY: mapped for writing and aligned; volatile, because the guest may access it
            // meanwhile.
            unsafe { to.write_volatile(u64::from_ne_bytes(*bytes)) };
        }
    }

    fn read_u64(&self, index: usize) -> u64 {
        let page = self.pages.as_ref().and_then(|pages| pages.page(index / WORDS_PER_PAGE));
        page.map_or(0, |page| {
            // SAFETY: within the page, whose words are 0 to 511.
            let word = unsafe { page.add(index % WORDS_PER_PAGE) };
            // SAFETY: mapped and aligned; volatile, because the guest may write it meanwhile.
            u64::from_le(unsafe { word.read_volatile() })
        })
    }
}

#[cfg(test)]
impl Mapping {
    /// Pages of a memfd in place of a guest's memory; page n is page `order[n]` of the file.
    pub(super) fn plain(order: &[u64], writable: bool) -> Mapping {
        use rustix::fs::MemfdFlags;
        use std::os::fd::AsRawFd;

        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let size = order.iter().max().map_or(0, |last| last + 1) * PAGE_SIZE as u64;
        rustix::fs::ftruncate(&file, size).unwrap();
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let length = order.len() * PAGE_SIZE;
        let (anywhere, flags) = (std::ptr::null_mut(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(anywhere, length, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        for (index, page) in order.iter().enumerate() {
            // SAFETY: within the mapping.
            let at = unsafe { start.byte_add(index * PAGE_SIZE) };
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let offset = i64::try_from(*page).unwrap() * 4096;
            // SAFETY: replaces one page of the mapping, to which there is no reference.
            let got = unsafe { libc::mmap(at, PAGE_SIZE, prot, flags, file.as_raw_fd(), offset) };
            assert_eq!(got, at);
        }
        let start = NonNull::new(start.cast()).unwrap();
        let pages = Pages { start, count: order.len(), writable, backing: Backing::Plain };
        Mapping { pages: Some(pages) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page whose words are `seed`, `seed + 1`, ...
    fn pattern(seed: u64) -> Box<PageBuf> {
        let mut page = PageBuf::zeroed();
        page.try_map_words(|i, _| Ok::<_, ()>(seed + i as u64)).unwrap();
        page
    }

    #[test]
    fn what_is_written_to_a_page_is_read_from_every_place_where_it_is_mapped() {
        let mapping = Mapping::plain(&[1, 0, 1], true);
        mapping.write_page(0, &pattern(1000));
        mapping.write_page(1, &pattern(7));
        let mut got = PageBuf::zeroed();
        mapping.read_page(2, &mut got);
        assert!(got.0 == pattern(1000).0);
        assert_eq!(mapping.read_u64(WORDS_PER_PAGE + 511), 7 + 511);
    }

    #[test]
    fn past_the_end_there_are_zeros_and_nothing_is_written() {
        let mapping = Mapping::plain(&[0, 1], true);
        mapping.write_page(2, &pattern(1));
        let mut got = pattern(1);
        mapping.read_page(2, &mut got);
        assert!(got.0 == PageBuf::zeroed().0);
        assert_eq!(mapping.read_u64(2 * WORDS_PER_PAGE), 0);
        assert!(mapping.address(2).is_err() && mapping.address(1).is_ok());
    }

    #[test]
    fn a_frame_that_the_kernel_would_cut_is_refused() {
        assert_eq!(check_frames(&[0, FRAMES_END - 1]), Ok(()));
        assert_eq!(check_frames(&[0, FRAMES_END]), Err(Errno::INVAL));
        assert_eq!(check_frames(&[u64::MAX]), Err(Errno::INVAL));
    }

    #[test]
    fn mappers_have_the_names_that_the_user_gives() {
        for (wanted, word) in WORDS {
            assert_eq!((word.parse(), wanted.to_string()), (Ok(wanted), word.to_owned()));
        }
        assert!("threads".parse::<MapperWanted>().is_err());
    }

    #[test]
    fn no_frames_make_an_empty_mapping() {
        let mapping = Mapping { pages: None };
        assert_eq!((mapping.page_count(), mapping.read_u64(0)), (0, 0));
    }
}
