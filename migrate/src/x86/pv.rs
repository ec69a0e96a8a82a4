//! 64-bit PV guests: page tables between mfns and pfns, and the fields of a vCPU context, of the
//! start info page and of the shared info page that hold frame numbers.
//!
//! *Normalising* turns the mfns of a page table into pfns (sender), *localising* turns them back
//! into the mfns of the new domain (receiver). Offsets are those of the public headers
//! `xen/arch-x86/xen.h`, `arch-x86/xen-x86_64.h` and `xen.h` for 64-bit guests; they are ABI.
//! 32-bit PV guests are refused elsewhere.

use std::ops::Range;

use crate::frame::{Mfn, PAGE_SHIFT, PageBuf, Pfn, WORDS_PER_PAGE};

/// Entries of a p2m frame.
pub const P2M_ENTRIES_PER_FRAME: u64 = WORDS_PER_PAGE as u64;
/// Bit 0 of a PTE.
const PTE_PRESENT: u64 = 1;
/// Bit 7 of a PTE of level 2 or above: a superpage.
const PTE_PSE: u64 = 1 << 7;
/// Bits 51..12 of a PTE: the frame.
pub const PTE_FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;
/// Slots of a top-level table that belong to Xen; zero in the stream.
const XEN_L4_SLOTS: Range<usize> = 256..272;

/// Addresses that Xen keeps for itself, where no p2m can be (`HYPERVISOR_VIRT_START..END`).
pub const XEN_VIRT: Range<u64> = 0xffff_8000_0000_0000..0xffff_8800_0000_0000;

/// Why a table cannot be normalised now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// An entry holds a frame that is not the guest's: the table is in motion, or it maps a
    /// grant.
    Frame {
        /// 0 to 511.
        entry: usize,
        /// The frame.
        mfn: u64,
    },
    /// An entry maps a superpage.
    Superpage,
}

/// Turns the mfns of `table` into pfns. `to_pfn` gives the pfn of a frame that is consistently
/// the guest's.
///
/// # Errors
/// The first entry that cannot be turned; `table` is then half done and worthless.
pub fn normalise(
    level: u8,
    table: &mut PageBuf,
    to_pfn: impl Fn(Mfn) -> Option<Pfn>,
) -> Result<(), Unfit> {
    table.try_map_words(|entry, pte| {
        if level == 4 && XEN_L4_SLOTS.contains(&entry) {
            return Ok(0);
        }
        if pte & PTE_PRESENT == 0 {
            return Ok(pte);
        }
        if level > 1 && pte & PTE_PSE != 0 {
            return Err(Unfit::Superpage);
        }
        let mfn = (pte & PTE_FRAME_MASK) >> PAGE_SHIFT;
        let pfn = to_pfn(Mfn(mfn)).ok_or(Unfit::Frame { entry, mfn })?;
        Ok(pte & !PTE_FRAME_MASK | pfn.0 << PAGE_SHIFT & PTE_FRAME_MASK)
    })
}

/// Turns the pfns of `table` into mfns.
///
/// # Errors
/// The first error of `to_mfn`; `table` is then half done and worthless.
pub fn localise<E>(
    table: &mut PageBuf,
    mut to_mfn: impl FnMut(Pfn) -> Result<Mfn, E>,
) -> Result<(), E> {
    table.try_map_words(|_, pte| {
        if pte & PTE_PRESENT == 0 {
            return Ok(pte);
        }
        let mfn = to_mfn(Pfn((pte & PTE_FRAME_MASK) >> PAGE_SHIFT))?;
        Ok(pte & !PTE_FRAME_MASK | mfn.0 << PAGE_SHIFT & PTE_FRAME_MASK)
    })
}

/// Pfns that the present entries of a normalised `table` refer to, in order.
pub fn referenced(table: &PageBuf) -> impl Iterator<Item = Pfn> + '_ {
    table
        .words()
        .filter(|pte| pte & PTE_PRESENT != 0)
        .map(|pte| Pfn((pte & PTE_FRAME_MASK) >> PAGE_SHIFT))
}

/// `sizeof(vcpu_guest_context_t)`.
pub const VCPU_CONTEXT_BYTES: usize = 5168;

/// Byte offsets in `vcpu_guest_context_t`.
pub mod context {
    /// `flags` (32 bits).
    pub const FLAGS: usize = 512;
    /// `user_regs.rdx` (vCPU 0 of a suspended guest: frame of its start info page).
    pub const START_INFO: usize = 616;
    /// `gdt_frames[16]`.
    pub const GDT_FRAMES: usize = 4832;
    /// `gdt_ents`.
    pub const GDT_ENTRIES: usize = 4960;
    /// `ctrlreg[1]`: the top-level table of user mode.
    pub const CR1: usize = 4992;
    /// `ctrlreg[3]`: the top-level table of kernel mode.
    pub const CR3: usize = 5008;
    /// Entries of the GDT that a guest may use (`FIRST_RESERVED_GDT_ENTRY`).
    pub const GDT_ENTRIES_MAX: u64 = 7168;
    /// GDT entries in a frame.
    pub const GDT_ENTRIES_PER_FRAME: u64 = 512;
    /// `VGCF_online` in `flags`.
    pub const FLAG_ONLINE: u32 = 1 << 5;
}

/// Byte offsets in `start_info_t`.
pub mod start_info {
    /// `nr_pages`.
    pub const NR_PAGES: usize = 32;
    /// `shared_info`: machine *address*.
    pub const SHARED_INFO: usize = 40;
    /// `flags` (32 bits).
    pub const FLAGS: usize = 48;
    /// `store_mfn`.
    pub const STORE_MFN: usize = 56;
    /// `store_evtchn` (32 bits).
    pub const STORE_EVTCHN: usize = 64;
    /// `console.domU.mfn`.
    pub const CONSOLE_MFN: usize = 72;
    /// `console.domU.evtchn` (32 bits).
    pub const CONSOLE_EVTCHN: usize = 80;
}

/// Byte offsets in `shared_info_t`.
pub mod shared_info {
    use std::ops::Range;

    /// Legacy vCPUs' `vcpu_info`, 64 bytes each.
    pub const VCPU_INFO: Range<usize> = 0..2048;
    /// Bytes of one `vcpu_info`.
    pub const VCPU_INFO_BYTES: usize = 64;
    /// `evtchn_pending_sel` within a `vcpu_info`.
    pub const PENDING_SEL: usize = 8;
    /// `evtchn_pending[64]`.
    pub const EVTCHN_PENDING: Range<usize> = 2048..2560;
    /// `evtchn_mask[64]`.
    pub const EVTCHN_MASK: Range<usize> = 2560..3072;
    /// `arch`.
    pub const ARCH: Range<usize> = 3088..3136;
    /// `arch.max_pfn`: number of pfns.
    pub const MAX_PFN: usize = 3088;
    /// `arch.pfn_to_mfn_frame_list_list`.
    pub const FRAME_LIST_LIST: usize = 3096;
    /// `arch.p2m_cr3`: 0, or the top-level table under which the linear p2m is mapped.
    pub const P2M_CR3: usize = 3112;
    /// `arch.p2m_vaddr`.
    pub const P2M_VADDR: usize = 3120;
    /// `arch.p2m_generation`.
    pub const P2M_GENERATION: usize = 3128;
}

/// The little-endian `u64` at byte `offset`; `None` past the end.
#[must_use]
pub fn get_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|w| u64::from_le_bytes(*w))
}

/// The little-endian `u32` at byte `offset`; `None` past the end.
#[must_use]
pub fn get_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|w| u32::from_le_bytes(*w))
}

/// Writes `bytes[offset..]`; past the end nothing happens.
pub fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(offset..).and_then(|b| b.get_mut(..value.len())) {
        to.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A p2m of 1000 pages, pfn n at mfn 5000 - n.
    fn to_pfn(mfn: Mfn) -> Option<Pfn> {
        (4001..=5000).contains(&mfn.0).then(|| Pfn(5000 - mfn.0))
    }

    proptest! {
        #[test]
        fn localising_undoes_normalising(
            level in 1_u8..=4,
            ptes in prop::collection::vec((0_u64..1000, any::<u64>()), 512),
        ) {
            let mut table = PageBuf::zeroed();
            table.try_map_words(|i, _| {
                let (pfn, flags) = ptes[i];
                let flags = flags & !PTE_FRAME_MASK & !PTE_PSE;
                Ok::<_, ()>(if level == 4 && XEN_L4_SLOTS.contains(&i) { 0 }
                            else { flags | (5000 - pfn) << PAGE_SHIFT })
            }).unwrap();
            let before = table.clone();
            normalise(level, &mut table, to_pfn).unwrap();
            localise(&mut table, |pfn| Ok::<_, ()>(Mfn(5000 - pfn.0))).unwrap();
            prop_assert!(before.0 == table.0);
        }
    }

    #[test]
    fn a_frame_of_somebody_else_stops_normalisation_unless_the_entry_is_not_present() {
        let mut table = PageBuf::zeroed();
        put(&mut table.0, 8 * 7, &(77_u64 << PAGE_SHIFT | 6).to_le_bytes());
        assert_eq!(normalise(1, &mut table.clone(), to_pfn), Ok(()));
        put(&mut table.0, 8 * 7, &(77_u64 << PAGE_SHIFT | 7).to_le_bytes());
        assert_eq!(normalise(1, &mut table, to_pfn), Err(Unfit::Frame { entry: 7, mfn: 77 }));
    }

    #[test]
    fn superpages_are_seen_at_level_2_and_are_the_pat_bit_at_level_1() {
        let mut table = PageBuf::zeroed();
        put(&mut table.0, 0, &(4500_u64 << PAGE_SHIFT | PTE_PSE | 1).to_le_bytes());
        assert_eq!(normalise(2, &mut table.clone(), to_pfn), Err(Unfit::Superpage));
        assert_eq!(normalise(1, &mut table, to_pfn), Ok(()));
    }

    #[test]
    fn xens_slots_are_zeroed_only_in_the_top_level() {
        let mut table = PageBuf::zeroed();
        put(&mut table.0, 8 * 256, &(4500_u64 << PAGE_SHIFT | 1).to_le_bytes());
        let mut top = table.clone();
        normalise(4, &mut top, to_pfn).unwrap();
        assert_eq!(get_u64(&top.0, 8 * 256), Some(0));
        normalise(3, &mut table, to_pfn).unwrap();
        assert_eq!(get_u64(&table.0, 8 * 256), Some(500 << PAGE_SHIFT | 1));
    }
}
