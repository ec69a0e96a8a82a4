//! The p2m of a PV guest while it is received: pfn to mfn, and the type that each pfn had last.

use crate::error::GuestError;
use crate::frame::{INVALID_FRAME, Mfn, PageBuf, PageType, Pfn};
use crate::hypervisor::ForeignPages;
use crate::target::memory::Space;
use crate::x86::pv::P2M_ENTRIES_PER_FRAME;

/// Entries of a leaf: those of one p2m frame of the guest.
const LEAF_ENTRIES: usize = 512;
const _: () = assert!(LEAF_ENTRIES as u64 == P2M_ENTRIES_PER_FRAME);

/// The p2m, with the hypervisor's m2p to check it against. A leaf exists once one of its pfns
/// has memory, so a guest that claims a large p2m costs 8 bytes for each frame of it.
pub(super) struct P2m<P> {
    m2p: P,
    /// First pfn that the guest cannot have.
    end: u64,
    leaves: Vec<Option<Box<Leaf>>>,
}

struct Leaf {
    mfns: [u64; LEAF_ENTRIES],
    types: [PageType; LEAF_ENTRIES],
}

impl Leaf {
    fn new() -> Box<Leaf> {
        Box::new(Leaf {
            mfns: [INVALID_FRAME; LEAF_ENTRIES],
            types: [PageType::Invalid; LEAF_ENTRIES],
        })
    }
}

impl<P: ForeignPages> P2m<P> {
    /// No pfn at all.
    pub(super) fn new(m2p: P) -> P2m<P> {
        P2m { m2p, end: 0, leaves: Vec::new() }
    }

    /// First pfn that the guest cannot have.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Makes room for pfns below `end`. Never shrinks.
    pub(super) fn grow(&mut self, end: u64) {
        if end > self.end {
            self.end = end;
            let leaves = usize::try_from(end.div_ceil(P2M_ENTRIES_PER_FRAME));
            self.leaves.resize_with(leaves.unwrap_or(usize::MAX), || None);
        }
    }

    /// The mfn of `pfn`, if it has memory.
    pub(super) fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        let mfn = *self.leaf(pfn)?.mfns.get(slot(pfn))?;
        (mfn != INVALID_FRAME).then_some(Mfn(mfn))
    }

    /// The last type of `pfn`; [`PageType::Invalid`] where it has no memory or none came.
    pub(super) fn page_type(&self, pfn: Pfn) -> PageType {
        let kind = self.leaf(pfn).and_then(|leaf| leaf.types.get(slot(pfn)));
        kind.copied().unwrap_or(PageType::Invalid)
    }

    /// Remembers the type of `pfn`. Without memory there is nothing to remember it for.
    pub(super) fn set_type(&mut self, pfn: Pfn, kind: PageType) {
        if let Some(leaf) = self.leaf_index(pfn).and_then(|i| self.leaves.get_mut(i)?.as_mut())
            && let Some(slot) = leaf.types.get_mut(slot(pfn))
        {
            *slot = kind;
        }
    }

    /// Level and mfn of the tables that are pinned, in the order of their pfns.
    pub(super) fn pinned(&self) -> impl Iterator<Item = (u8, u64)> + '_ {
        let leaves = self.leaves.iter().flatten();
        let pages = leaves.flat_map(|leaf| leaf.types.iter().zip(&leaf.mfns));
        pages.filter_map(|(kind, mfn)| match kind {
            PageType::Table { level, pinned: true } => Some((*level, *mfn)),
            _ => None,
        })
    }

    /// Leaf `index` as the guest keeps it.
    pub(super) fn leaf_page(&self, index: usize) -> Box<PageBuf> {
        let mut page = PageBuf::zeroed();
        let leaf = self.leaves.get(index).and_then(Option::as_ref);
        let mfns = leaf.map_or(&[INVALID_FRAME; LEAF_ENTRIES], |leaf| &leaf.mfns);
        for (to, mfn) in page.0.as_chunks_mut::<8>().0.iter_mut().zip(mfns) {
            *to = mfn.to_le_bytes();
        }
        page
    }

    fn leaf(&self, pfn: Pfn) -> Option<&Leaf> {
        self.leaves.get(self.leaf_index(pfn)?)?.as_deref()
    }

    fn leaf_index(&self, pfn: Pfn) -> Option<usize> {
        Pfn(pfn.0 / P2M_ENTRIES_PER_FRAME).index().filter(|_| pfn.0 < self.end)
    }

    /// Whether the hypervisor agrees that `mfn` is the guest's page `pfn`.
    fn is_consistent(&self, pfn: Pfn, mfn: Mfn) -> bool {
        let known = 512 * self.m2p.page_count();
        mfn.index().is_some_and(|i| i < known && self.m2p.read_u64(i) == pfn.0)
    }
}

impl<P: ForeignPages> Space for P2m<P> {
    const EXTENTS: bool = false;

    fn frame(&self, pfn: Pfn) -> Option<u64> {
        self.mfn(pfn).map(|mfn| mfn.0)
    }

    fn set_frame(&mut self, pfn: Pfn, frame: u64) -> Result<(), GuestError> {
        if !self.is_consistent(pfn, Mfn(frame)) {
            return Err(GuestError::ForeignFrame { what: "new page", mfn: frame });
        }
        if let Some(leaf) = self.leaf_index(pfn).and_then(|i| self.leaves.get_mut(i))
            && let Some(slot) = leaf.get_or_insert_with(Leaf::new).mfns.get_mut(slot(pfn))
        {
            *slot = frame;
        }
        Ok(())
    }
}

fn slot(pfn: Pfn) -> usize {
    usize::try_from(pfn.0 % P2M_ENTRIES_PER_FRAME).unwrap_or_default()
}
