//! The memory under test and its versions.

use std::collections::BTreeSet;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::pattern::{Content, PAGE_WORDS};
use crate::ticker::sleep_to_next;

pub(crate) const PAGE_BYTES: usize = PAGE_WORDS * size_of::<u64>();

/// Locks shared by all pages; a page belongs to the one of its index.
const STRIPES: usize = 64;

/// Bad pages that are remembered one by one.
const BAD_PAGES_MAX: usize = 1 << 16;

/// The background check looks at this many pages, then sleeps: 32 pages a second, little enough
/// to be lost in the noise of an emulated machine.
const BACKGROUND_BATCH: usize = 32;
const BACKGROUND_SLEEP: Duration = Duration::from_secs(1);

/// Pages with known content. What each should hold is in a table apart from them.
pub(crate) struct GuestMemory {
    /// Atomic words: several threads read and write them, and the compiler may assume nothing
    /// about what they hold.
    words: &'static [AtomicU64],
    /// Version of each page's content; changes with its page's lock held.
    versions: Vec<AtomicU32>,
    locks: [Mutex<()>; STRIPES],
    /// Pages ever found bad: a later rewrite repairs a page but not the record.
    bad: Mutex<BTreeSet<usize>>,
    content: Content,
    seed: u64,
}

impl GuestMemory {
    /// Reserves memory; it is populated by [`Self::fill`].
    pub(crate) fn allocate(bytes: usize, content: Content, seed: u64) -> Result<Self> {
        let pages = bytes / PAGE_BYTES;
        ensure!(pages > 0, "No memory to take");
        let words = map_words(pages * PAGE_WORDS)?;
        let versions = (0..pages).map(|_| AtomicU32::new(0)).collect();
        let locks = [const { Mutex::new(()) }; STRIPES];
        Ok(Self { words, versions, locks, bad: Mutex::default(), content, seed })
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.versions.len()
    }

    /// Gives every page its first content.
    pub(crate) fn fill(&self) {
        for page in 0..self.pages() {
            let _held = self.lock(page);
            self.write(page, 0);
        }
    }

    /// Gives a page its next content.
    pub(crate) fn rewrite(&self, page: usize) {
        let Some(version) = self.versions.get(page) else { return };
        let _held = self.lock(page);
        let next = version.load(Ordering::Relaxed).wrapping_add(1);
        version.store(next, Ordering::Relaxed);
        self.write(page, next);
    }

    /// Verifies every page; gives the number of pages that are, or once were found, bad.
    pub(crate) fn check_all(&self) -> usize {
        for page in 0..self.pages() {
            self.check(page);
        }
        self.bad_pages().len()
    }

    /// Pages found bad so far.
    pub(crate) fn bad_pages(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Verifies page after page, slowly, for ever.
    pub(crate) fn check_in_background(&self) {
        for (count, page) in (0..self.pages()).cycle().enumerate() {
            self.check(page);
            if count % BACKGROUND_BATCH == 0 {
                sleep_to_next(BACKGROUND_SLEEP);
            }
        }
    }

    fn check(&self, page: usize) {
        let is_good = {
            let _held = self.lock(page);
            self.is_good(page)
        };
        if !is_good {
            let mut bad = self.bad_pages();
            if bad.len() < BAD_PAGES_MAX {
                bad.insert(page);
            }
        }
    }

    fn is_good(&self, page: usize) -> bool {
        let version = self.versions.get(page).map_or(0, |version| version.load(Ordering::Relaxed));
        let expected = self.content.words(self.seed, page as u64, version);
        self.page(page)
            .iter()
            .zip(expected)
            .all(|(word, expected)| word.load(Ordering::Relaxed) == expected)
    }

    fn write(&self, page: usize, version: u32) {
        let content = self.content.words(self.seed, page as u64, version);
        for (word, value) in self.page(page).iter().zip(content) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        self.words.chunks_exact(PAGE_WORDS).nth(page).unwrap_or_default()
    }

    fn lock(&self, page: usize) -> Option<MutexGuard<'_, ()>> {
        let lock = self.locks.get(page % STRIPES)?;
        Some(lock.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// # Safety
/// The one place that makes references from raw memory.
fn map_words(count: usize) -> Result<&'static [AtomicU64]> {
    let length = count * size_of::<u64>();
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { mmap_anonymous(null_mut(), length, access, flags) }
        .context("Cannot map the memory to check")?;
    // SAFETY: the mapping is page-aligned, `length` bytes long, never unmapped, and known to
    // nobody else; zero bytes are valid atomics, and atomics may change under a shared reference.
    Ok(unsafe { std::slice::from_raw_parts(start.cast::<AtomicU64>(), count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(content: Content) -> GuestMemory {
        let memory = GuestMemory::allocate(5 * PAGE_BYTES, content, 3).expect("five pages");
        memory.fill();
        memory
    }

    #[test]
    fn test_check_all_after_rewrites_finds_nothing() {
        for content in [Content::Zero, Content::Random, Content::Text] {
            let memory = memory(content);
            memory.rewrite(2);
            memory.rewrite(2);
            assert_eq!(memory.check_all(), 0);
        }
    }

    #[test]
    fn test_check_all_one_flipped_bit_is_found_and_remembered() {
        let memory = memory(Content::Zero);
        memory.page(4)[511].store(1, Ordering::Relaxed);
        assert_eq!(memory.check_all(), 1);
        memory.rewrite(4);
        assert_eq!(memory.check_all(), 1, "a repaired page stays on record");
    }

    #[test]
    fn test_check_all_stale_page_is_found() {
        let memory = memory(Content::Random);
        let stale: Vec<u64> = memory.page(1).iter().map(|w| w.load(Ordering::Relaxed)).collect();
        memory.rewrite(1);
        for (word, old) in memory.page(1).iter().zip(stale) {
            word.store(old, Ordering::Relaxed);
        }
        assert_eq!(memory.check_all(), 1);
    }
}
