//! A 64-bit PV guest as the sender sees it: its p2m, which it keeps in its own memory and may
//! change at any time, Xen's m2p, and the state records in which mfns become pfns.
//!
//! An mfn counts as the guest's only if m2p and p2m agree on it. The guest describes its p2m in
//! the shared info page, either as a linear list mapped in its address space (`p2m_cr3` is set)
//! or as a tree of three levels. All of it is the guest's word and is checked.

use crate::error::{GuestError, Result};
use crate::frame::{Mfn, PAGE_SHIFT, PageBuf, Pfn, WORDS_PER_PAGE};
use crate::hypervisor::{Access, DomainInfo, ForeignPages, SourceDomain, VcpuState};
use crate::stream::libxc::{self, RecordKind};
use crate::x86::pv::{
    P2M_ENTRIES_PER_FRAME, PTE_FRAME_MASK, XEN_VIRT, context, get_u32, get_u64, put, shared_info,
};

/// Bits of a virtual address that page tables translate.
const VADDR_BITS: u32 = 48;
/// Most p2m frames of a guest that the stream format can express (2^32 pages).
const P2M_FRAMES_MAX: u64 = (1 << 32) / P2M_ENTRIES_PER_FRAME;
/// Pfns that any guest may claim: those of 1 TiB. Linux claims 512 GiB, to add memory later.
const PAGES_ALWAYS: u64 = 1 << 28;
/// Pfns that a guest may claim for each page that it has. A pfn costs bits of several bitmaps and
/// a look in each pass, and a guest of a few pages can make a p2m of any size with them.
const PAGES_PER_PAGE_MAX: u64 = 16;

/// The physical map of a PV guest.
pub(super) struct PhysMap<P> {
    m2p: P,
    m2p_entries: u64,
    p2m: P,
    shared_info: P,
    /// Pfns covered: `0..pages`.
    pages: u64,
    /// Generation at the start, if the p2m is a linear list.
    generation: Option<u64>,
    /// Frames in which the guest keeps the p2m.
    frames: Vec<Pfn>,
}

/// The p2m as the guest describes it.
struct Described {
    pages: u64,
    leaves: Vec<u64>,
    generation: Option<u64>,
}

impl<P: ForeignPages> PhysMap<P> {
    /// Maps m2p, shared info and p2m.
    ///
    /// # Errors
    /// Xen's, or a p2m that makes no sense.
    pub(super) fn open<D>(domain: &D, info: &DomainInfo) -> Result<PhysMap<P>>
    where
        D: SourceDomain<Pages = P>,
    {
        let m2p = domain.map_m2p()?;
        let m2p_entries = m2p.page_count() as u64 * WORDS_PER_PAGE as u64;
        let shared_info = domain.map(&[info.shared_info_mfn], Access::Read)?;
        let word = |offset: usize| shared_info.read_u64(offset / 8);
        let max_pfn = word(shared_info::MAX_PFN)
            .checked_sub(1)
            .filter(|max| max / P2M_ENTRIES_PER_FRAME < P2M_FRAMES_MAX)
            .ok_or(GuestError::P2m("the guest gives no sensible size for it; is it booting?"))?;
        let walk = Walk { domain, m2p_entries };
        let described = if word(shared_info::P2M_CR3) == 0 {
            walk.tree(word(shared_info::FRAME_LIST_LIST), max_pfn)?
        } else {
            let generation = word(shared_info::P2M_GENERATION);
            let (cr3, vaddr) = (word(shared_info::P2M_CR3), word(shared_info::P2M_VADDR));
            Described { generation: Some(generation), ..walk.list(cr3, vaddr, max_pfn)? }
        };
        if described.pages > PAGES_ALWAYS.max(info.total_pages.saturating_mul(PAGES_PER_PAGE_MAX)) {
            return Err(GuestError::P2m("it is far larger than the guest's memory").into());
        }
        let p2m = domain.map(&described.leaves, Access::Read)?;
        let Described { pages, leaves, generation } = described;
        let mut map =
            PhysMap { m2p, m2p_entries, p2m, shared_info, pages, generation, frames: vec![] };
        map.frames = leaves
            .iter()
            .map(|&mfn| map.known_pfn("p2m frame", mfn))
            .collect::<std::result::Result<_, _>>()?;
        Ok(map)
    }

    /// Number of pfns in the map.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The mfn behind `pfn` at this moment; `None` where the p2m has none of this host's memory.
    pub(super) fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        let mfn = self.entry(pfn)?;
        (mfn < self.m2p_entries).then_some(Mfn(mfn))
    }

    /// The pfn of `mfn`, if m2p and p2m agree on it.
    pub(super) fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        if mfn.0 >= self.m2p_entries {
            return None;
        }
        let pfn = Pfn(self.m2p.read_u64(mfn.index()?));
        (self.entry(pfn)? == mfn.0).then_some(pfn)
    }

    fn known_pfn(&self, what: &'static str, mfn: u64) -> std::result::Result<Pfn, GuestError> {
        self.pfn(Mfn(mfn)).ok_or(GuestError::ForeignFrame { what, mfn })
    }

    /// The raw p2m entry of `pfn`: a frame, or a marker that is larger than any frame.
    fn entry(&self, pfn: Pfn) -> Option<u64> {
        if pfn.0 >= self.pages {
            return None;
        }
        Some(self.p2m.read_u64(pfn.index()?))
    }

    /// # Errors
    /// [`GuestError::P2mMoved`] if the guest replaced part of its linear p2m since the start:
    /// then the mapping of it is stale.
    pub(super) fn check_unmoved(&self) -> Result<()> {
        let now = self.shared_info.read_u64(shared_info::P2M_GENERATION / 8);
        match self.generation {
            Some(before) if before != now => Err(GuestError::P2mMoved { before, now }.into()),
            _ => Ok(()),
        }
    }

    /// The records before the first page: where the guest keeps its p2m.
    ///
    /// # Errors
    /// A guest too large for the format.
    pub(super) fn start_record(&self) -> Result<Vec<u8>> {
        let body = libxc::p2m_frames(Pfn(self.pages.saturating_sub(1)), &self.frames)?;
        Ok(libxc::record(RecordKind::X86PvP2mFrames, &[&body])?)
    }

    /// Shared info and the vCPUs, as records. The guest is suspended.
    ///
    /// # Errors
    /// The hypercalls', or a register that holds a frame that is not the guest's.
    pub(super) fn state_records<D>(&self, domain: &D, info: &DomainInfo) -> Result<Vec<Vec<u8>>>
    where
        D: SourceDomain<Pages = P>,
    {
        let mut page = PageBuf::zeroed();
        self.shared_info.read_page(0, &mut page);
        let mut records = vec![libxc::record(RecordKind::SharedInfo, &[&page.0])?];
        for id in 0..=info.max_vcpu_id {
            if let Some(mut vcpu) = domain.vcpu(id)? {
                self.normalise_vcpu(id, &mut vcpu)?;
                records.extend(vcpu_records(id, &vcpu)?);
            }
        }
        Ok(records)
    }

    /// Turns the mfns in a vCPU's registers into pfns.
    fn normalise_vcpu(&self, id: u32, vcpu: &mut VcpuState) -> std::result::Result<(), GuestError> {
        let regs = &mut vcpu.basic;
        let get = |regs: &[u8], at| {
            get_u64(regs, at).ok_or(GuestError::State("a vCPU context of the wrong size"))
        };
        if id == 0 {
            let mfn = get(regs, context::START_INFO)?;
            let pfn = self.known_pfn("start info", mfn)?;
            put(regs, context::START_INFO, &pfn.0.to_le_bytes());
        }
        let entries = get(regs, context::GDT_ENTRIES)?;
        if entries > context::GDT_ENTRIES_MAX {
            return Err(GuestError::State("a GDT larger than Xen allows"));
        }
        let frames = usize::try_from(entries.div_ceil(context::GDT_ENTRIES_PER_FRAME)).unwrap_or(0);
        for at in (context::GDT_FRAMES..).step_by(8).take(frames) {
            let pfn = self.known_pfn("GDT frame", get(regs, at)?)?;
            put(regs, at, &pfn.0.to_le_bytes());
        }
        let cr3 = get(regs, context::CR3)?;
        let pfn = self.known_pfn("cr3", cr3 >> PAGE_SHIFT)?;
        put(regs, context::CR3, &(pfn.0 << PAGE_SHIFT).to_le_bytes());
        let cr1 = get(regs, context::CR1)?;
        if cr1 != 0 {
            // Bit 0 marks it as valid in the stream: pfn 0 would read as "none".
            let pfn = self.known_pfn("user mode cr3", cr1 >> PAGE_SHIFT)?;
            put(regs, context::CR1, &(pfn.0 << PAGE_SHIFT | 1).to_le_bytes());
        }
        Ok(())
    }
}

/// The records of one vCPU; parts that Xen has not are left out.
fn vcpu_records(id: u32, vcpu: &VcpuState) -> Result<Vec<Vec<u8>>> {
    let mut extended = vcpu.extended.as_slice();
    // Xen says how much of it is in use.
    if let Some(size) = get_u32(extended, 4)
        && let Some(used) = extended.get(..size as usize)
    {
        extended = used;
    }
    let parts = [
        (RecordKind::X86PvVcpuBasic, vcpu.basic.as_slice()),
        (RecordKind::X86PvVcpuExtended, extended),
        (RecordKind::X86PvVcpuXsave, &vcpu.xsave),
        (RecordKind::X86PvVcpuMsrs, &vcpu.msrs),
    ];
    let present = parts.into_iter().filter(|(_, state)| !state.is_empty());
    present.map(|(kind, state)| Ok(libxc::record(kind, &[&libxc::vcpu_head(id), state])?)).collect()
}

/// Finds the frames of a p2m.
struct Walk<'a, D> {
    domain: &'a D,
    m2p_entries: u64,
}

impl<D: SourceDomain> Walk<'_, D> {
    /// Words `first..=last` of the pages `mfns`, as one array; each must be a frame of this host.
    fn frames(&self, mfns: &[u64], first: u64, last: u64, mask: u64) -> Result<Vec<u64>> {
        let pages = self.domain.map(mfns, Access::Read)?;
        let mut out = Vec::new();
        for index in first..=last {
            let word = pages.read_u64(usize::try_from(index).unwrap_or(usize::MAX));
            let mfn = if mask == u64::MAX { word } else { (word & mask) >> PAGE_SHIFT };
            if mfn == 0 || mfn >= self.m2p_entries {
                return Err(GuestError::ForeignFrame { what: "p2m structure", mfn }.into());
            }
            out.push(mfn);
        }
        Ok(out)
    }

    /// The linear list at `vaddr` under the page tables of `cr3`.
    fn list(&self, cr3: u64, vaddr: u64, mut max_pfn: u64) -> Result<Described> {
        let bytes = (max_pfn + 1) * 8;
        let end = vaddr
            .checked_add(bytes - 1)
            .filter(|end| is_canonical(vaddr) && is_canonical(*end))
            .filter(|end| *end < XEN_VIRT.start || vaddr >= XEN_VIRT.end)
            .ok_or(GuestError::P2m("its address range is not one a guest can use"))?;
        let translated = (1_u64 << VADDR_BITS) - 1;
        let (start, mut end) = (vaddr & translated, end & translated);
        if start % (1 << PAGE_SHIFT) != 0 || end < start {
            return Err(GuestError::P2m("its address range is not one a guest can use").into());
        }
        let mut tables = vec![cr3 >> PAGE_SHIFT];
        for level in (1..=4_u32).rev() {
            let shift = PAGE_SHIFT + 9 * (level - 1);
            let (first, last) = (start >> shift, end >> shift);
            let base = first & !(WORDS_PER_PAGE as u64 - 1);
            let mut entries = self.frames(&tables, first - base, last - base, PTE_FRAME_MASK)?;
            if level == 2 && drop_shared_tail(&mut entries) {
                let covered = ((first + entries.len() as u64) << shift) - start;
                max_pfn = max_pfn.min(covered / 8 - 1);
                end = start + (max_pfn + 1) * 8 - 1;
            }
            tables = entries;
        }
        Ok(Described { pages: max_pfn + 1, leaves: tables, generation: None })
    }

    /// The tree below `top`.
    fn tree(&self, top: u64, max_pfn: u64) -> Result<Described> {
        if top == 0 || top >= self.m2p_entries {
            return Err(GuestError::P2m("its top frame is not a frame of this host").into());
        }
        let per_mid = P2M_ENTRIES_PER_FRAME * P2M_ENTRIES_PER_FRAME;
        let mids = max_pfn / per_mid + 1;
        if mids > P2M_ENTRIES_PER_FRAME {
            return Err(GuestError::P2m("it is larger than a tree of three levels").into());
        }
        let mut mid = self.frames(&[top], 0, mids - 1, u64::MAX)?;
        drop_shared_tail(&mut mid);
        let max_pfn = max_pfn.min(mid.len() as u64 * per_mid - 1);
        let leaves = self.frames(&mid, 0, max_pfn / P2M_ENTRIES_PER_FRAME, u64::MAX)?;
        Ok(Described { pages: max_pfn + 1, leaves, generation: None })
    }
}

/// A guest points the unused end of its p2m again and again at one table that says "no memory".
/// Drops that end; whether there was one.
fn drop_shared_tail(entries: &mut Vec<u64>) -> bool {
    let Some(&last) = entries.last() else { return false };
    let shared = entries.iter().rev().take_while(|e| **e == last).count();
    // Once is no repetition, and something must be left.
    if shared < 2 || shared == entries.len() {
        return false;
    }
    entries.truncate(entries.len() - shared);
    true
}

fn is_canonical(vaddr: u64) -> bool {
    matches!(vaddr >> (VADDR_BITS - 1), 0 | 0x1_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_repeated_end_is_dropped() {
        let tail = |list: &[u64]| {
            let mut entries = list.to_vec();
            let dropped = drop_shared_tail(&mut entries);
            (dropped, entries)
        };
        assert_eq!(tail(&[5, 9, 9, 9]), (true, vec![5]));
        assert_eq!(tail(&[5, 9, 7]), (false, vec![5, 9, 7]));
        assert_eq!(tail(&[9, 9]), (false, vec![9, 9]));
        assert_eq!(tail(&[]), (false, vec![]));
    }

    #[test]
    fn canonical_addresses_are_the_two_halves() {
        assert!(is_canonical(0x7fff_ffff_ffff) && is_canonical(0xffff_8000_0000_0000));
        assert!(!is_canonical(0x8000_0000_0000) && !is_canonical(0xffff_7fff_ffff_ffff));
    }
}
