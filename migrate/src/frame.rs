//! Frame numbers and page types.
//!
//! Xen's words are kept: a *pfn* is the guest's own idea of a page's number, an *mfn* the
//! machine's. For an HVM or PVH guest the toolstack addresses memory by pfn (the hypervisor
//! translates); for a PV guest it addresses memory by mfn and converts through the p2m. A
//! *frame* in this crate is whichever of the two the hypervisor takes for the guest at hand.
//!
//! Sources: `xen/include/public/xen.h`, `domctl.h` (`XEN_DOMCTL_PFINFO_*`) and the libxc
//! migration stream specification, "Page data".

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page, the unit of everything here.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bits 51..0 of a page-data entry: the pfn.
pub const PFN_MASK: u64 = 0x000f_ffff_ffff_ffff;
/// A frame number that means "none" (all ones, for pfn and mfn alike).
pub const INVALID_FRAME: u64 = u64::MAX;

/// A guest-physical frame number, 0-based.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pfn(pub u64);

/// A machine frame number. `Mfn::INVALID` marks a pfn without memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mfn(pub u64);

/// A domain's number (0 is dom0).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl Pfn {
    /// The bit index in a bitmap or the slot in a table of this process; `None` on a host whose
    /// pointers are too small.
    #[must_use]
    pub fn index(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }
}

impl Mfn {
    /// No frame.
    pub const INVALID: Mfn = Mfn(INVALID_FRAME);

    /// The slot in a table of this process; `None` where it cannot be one.
    #[must_use]
    pub fn index(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }
}

macro_rules! hex_debug {
    ($($t:ident),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($t), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
hex_debug!(Pfn, Mfn);

impl fmt::Debug for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}
impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a page is to the hypervisor, and so to the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
pub enum PageType {
    /// Ordinary memory.
    #[default]
    Normal,
    /// A PV page table of `level` 1 to 4; `pinned` says that the guest pinned it.
    Table {
        /// 1 (PTEs) to 4 (top).
        level: u8,
        /// Whether the guest asked the hypervisor to keep it validated.
        pinned: bool,
    },
    /// Memory that the hardware lost.
    Broken,
    /// To be allocated on the receiver, its content immaterial.
    AllocOnly,
    /// No memory behind the pfn, or none that may be copied.
    Invalid,
}

/// Bit 3 of the nibble: a pinned table (`XEN_DOMCTL_PFINFO_LPINTAB`).
const NIBBLE_PINNED: u8 = 0x8;

impl PageType {
    /// From the type nibble of the hypercall (bits 31..28) or the stream (bits 63..60).
    /// The values 5 to 8 mean nothing and give `None`.
    #[must_use]
    pub fn from_nibble(nibble: u8) -> Option<PageType> {
        match nibble {
            0x0 => Some(PageType::Normal),
            0x1..=0x4 => Some(PageType::Table { level: nibble, pinned: false }),
            0x9..=0xc => Some(PageType::Table { level: nibble & 0x7, pinned: true }),
            0xd => Some(PageType::Broken),
            0xe => Some(PageType::AllocOnly),
            0xf => Some(PageType::Invalid),
            _ => None,
        }
    }

    /// The type nibble of stream and hypercall.
    #[must_use]
    pub fn nibble(self) -> u8 {
        match self {
            PageType::Normal => 0x0,
            PageType::Table { level, pinned: false } => level & 0x7,
            PageType::Table { level, pinned: true } => (level & 0x7) | NIBBLE_PINNED,
            PageType::Broken => 0xd,
            PageType::AllocOnly => 0xe,
            PageType::Invalid => 0xf,
        }
    }

    /// Whether page data follows such an entry in the stream.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, PageType::Normal | PageType::Table { .. })
    }

    /// Whether the receiver needs memory for such an entry.
    #[must_use]
    pub fn needs_memory(self) -> bool {
        matches!(self, PageType::Normal | PageType::Table { .. } | PageType::AllocOnly)
    }

    /// 1 to 4 for a page table, else `None`.
    #[must_use]
    pub fn table_level(self) -> Option<u8> {
        match self {
            PageType::Table { level, .. } => Some(level),
            _ => None,
        }
    }
}

/// A private copy of one page. Page aligned, so that it may be handed to the kernel as it is.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct PageBuf(pub [u8; PAGE_SIZE]);

/// 64-bit words in a page: PTEs of a table, entries of a 64-bit p2m frame.
pub const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;

impl PageBuf {
    /// A page of zeros, on the heap.
    #[must_use]
    pub fn zeroed() -> Box<PageBuf> {
        Box::new(PageBuf([0; PAGE_SIZE]))
    }

    /// The little-endian 64-bit words of the page, in order.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w))
    }

    /// Replaces every word by `f(index, word)`.
    ///
    /// # Errors
    /// The first error of `f`; words before it are replaced already.
    pub fn try_map_words<E>(
        &mut self,
        mut f: impl FnMut(usize, u64) -> Result<u64, E>,
    ) -> Result<(), E> {
        for (index, word) in self.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = f(index, u64::from_le_bytes(*word))?.to_le_bytes();
        }
        Ok(())
    }
}

impl fmt::Debug for PageBuf {
    /// Guest memory does not belong in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageBuf(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_nibble_survives_a_round_trip_and_the_reserved_ones_are_refused() {
        for nibble in 0..=0xf_u8 {
            match PageType::from_nibble(nibble) {
                Some(t) => assert_eq!(t.nibble(), nibble),
                None => assert!((5..=8).contains(&nibble), "{nibble}"),
            }
        }
    }

    #[test]
    fn alloc_only_needs_memory_but_has_no_data() {
        assert!(PageType::AllocOnly.needs_memory() && !PageType::AllocOnly.has_data());
        assert!(!PageType::Broken.needs_memory() && !PageType::Invalid.has_data());
    }
}
