//! Mappings of guest pages that are kept for later passes.
//!
//! A page that was dirty once is likely to be so again, and removing a mapping costs a PV dom0 more
//! than making it (one trap a page). So the pages of later passes stay mapped, and the pause finds
//! most of what it has to send.
//!
//! A kept mapping shows a frame, whatever becomes of the page that it was. Therefore a page is
//! found only with the frame that the guest's p2m has for it *now*. If that is the frame that is
//! mapped, it has been this page all the time: Xen counts a mapping as a reference, and gives a
//! frame to nobody, this guest included, as long as there is one. Only a PV guest has such a p2m.
//! Of others a frame behind a gfn can change without a word (Xen 4.22 is the first to mark the gfn
//! as dirty then), so nothing of theirs is ever looked for here.
//!
//! What a guest gives back while it is mapped stays charged to it, and it cannot exchange a page
//! that is mapped for one elsewhere (`XENMEM_exchange`). So what is kept is limited, and what is
//! stale goes when a new pass begins.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::frame::Pfn;
use crate::hypervisor::BATCH_PAGES_MAX;

/// Pages that are kept while the guest runs: 64 MiB of it, 16 full batches. For each page there are
/// 8 bytes of this process's page tables (128 KiB in all) and some 50 here; on Xen a mapping of
/// another domain's memory is no memory of this process.
pub(super) const PAGES_MAX: usize = 16 * BATCH_PAGES_MAX;
/// The same in the last pass, so that nothing has to go before the last page is out, unless this
/// process sends more than 64 MiB in the pause.
pub(super) const LAST_PASS_PAGES_MAX: usize = 2 * PAGES_MAX;

/// Mappings of type `P`.
pub(super) struct Kept<P> {
    /// By number, the oldest first.
    mappings: BTreeMap<u64, Mapping<P>>,
    /// Where the mapping is that has a page, the latest if there are several.
    places: BTreeMap<Pfn, Place>,
    /// Pages of all mappings.
    pages: usize,
    /// The number of the next one.
    next: u64,
}

struct Mapping<P> {
    memory: Rc<P>,
    pages: Vec<(Pfn, u64)>,
}

/// Which page of which mapping.
struct Place {
    mapping: u64,
    index: usize,
}

impl<P> Kept<P> {
    /// Nothing yet.
    pub(super) fn new() -> Kept<P> {
        Kept { mappings: BTreeMap::new(), places: BTreeMap::new(), pages: 0, next: 0 }
    }

    /// The mapping that has `pfn`, and which of its pages it is, if the frame that is mapped is
    /// `frame`, the one that it has now.
    pub(super) fn find(&self, pfn: Pfn, frame: u64) -> Option<(Rc<P>, usize)> {
        let place = self.places.get(&pfn)?;
        let mapping = self.mappings.get(&place.mapping)?;
        let (_, mapped) = mapping.pages.get(place.index)?;
        (*mapped == frame).then(|| (Rc::clone(&mapping.memory), place.index))
    }

    /// Keeps `memory`, whose pages and their frames are `pages`, in order. The oldest mappings go
    /// if there are more than `pages_max` pages.
    pub(super) fn keep(&mut self, memory: Rc<P>, pages: Vec<(Pfn, u64)>, pages_max: usize) {
        let mapping = self.next;
        self.next += 1;
        self.pages += pages.len();
        let places = pages.iter().enumerate();
        self.places.extend(places.map(|(index, (pfn, _))| (*pfn, Place { mapping, index })));
        self.mappings.insert(mapping, Mapping { memory, pages });
        while self.pages > pages_max
            && let Some((number, oldest)) = self.mappings.pop_first()
        {
            self.forget(number, &oldest.pages);
        }
    }

    /// Lets go of every mapping with a page that has not the frame any more that is mapped:
    /// `frame` is what it has now.
    pub(super) fn let_go_of_stale(&mut self, frame: impl Fn(Pfn) -> Option<u64>) {
        let is_stale = |(pfn, mapped): &(Pfn, u64)| frame(*pfn) != Some(*mapped);
        let stale = self.mappings.iter().filter(|(_, mapping)| mapping.pages.iter().any(is_stale));
        for number in stale.map(|(number, _)| *number).collect::<Vec<_>>() {
            if let Some(mapping) = self.mappings.remove(&number) {
                self.forget(number, &mapping.pages);
            }
        }
    }

    /// Mapping `number`, which had `pages`, is no more.
    fn forget(&mut self, number: u64, pages: &[(Pfn, u64)]) {
        self.pages -= pages.len();
        for (pfn, _) in pages {
            if self.places.get(pfn).is_some_and(|place| place.mapping == number) {
                self.places.remove(pfn);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps a mapping, which is counted: each is a clone of the same.
    fn keep(kept: &mut Kept<()>, all: &Rc<()>, pages: &[(u64, u64)]) {
        let pages = pages.iter().map(|(pfn, frame)| (Pfn(*pfn), *frame)).collect();
        kept.keep(Rc::clone(all), pages, 4);
    }

    fn found(kept: &Kept<()>, pfn: u64, frame: u64) -> Option<usize> {
        kept.find(Pfn(pfn), frame).map(|(_, index)| index)
    }

    #[test]
    fn a_page_is_found_only_with_the_frame_that_is_mapped() {
        let (mut kept, all) = (Kept::new(), Rc::new(()));
        keep(&mut kept, &all, &[(7, 70), (8, 80)]);
        assert_eq!((found(&kept, 8, 80), found(&kept, 7, 70)), (Some(1), Some(0)));
        assert_eq!((found(&kept, 8, 70), found(&kept, 9, 80)), (None, None));
        // Mapped anew, because it has another frame now; the old one may come back.
        keep(&mut kept, &all, &[(8, 81)]);
        assert_eq!((found(&kept, 8, 81), found(&kept, 8, 80)), (Some(0), None));
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let (mut kept, all) = (Kept::new(), Rc::new(()));
        keep(&mut kept, &all, &[(1, 10), (2, 20)]);
        keep(&mut kept, &all, &[(3, 30), (1, 11)]);
        assert_eq!(Rc::strong_count(&all), 3);
        keep(&mut kept, &all, &[(4, 40)]);
        assert_eq!(Rc::strong_count(&all), 3);
        // What a later mapping has too is still found there.
        let places = [(1, 11), (2, 20), (3, 30), (4, 40)].map(|(p, f)| found(&kept, p, f));
        assert_eq!(places, [Some(1), None, Some(0), Some(0)]);
    }

    #[test]
    fn mappings_with_a_page_that_has_moved_are_let_go() {
        let (mut kept, all) = (Kept::new(), Rc::new(()));
        keep(&mut kept, &all, &[(1, 10), (2, 20)]);
        keep(&mut kept, &all, &[(3, 30)]);
        kept.let_go_of_stale(|pfn| Some(pfn.0 * 10));
        assert_eq!(Rc::strong_count(&all), 3);
        // Given back; and another frame in its place.
        kept.let_go_of_stale(|pfn| (pfn.0 != 2).then_some(pfn.0 * 10));
        assert_eq!((found(&kept, 1, 10), found(&kept, 3, 30)), (None, Some(0)));
        kept.let_go_of_stale(|_| Some(31));
        assert_eq!((found(&kept, 3, 30), Rc::strong_count(&all)), (None, 1));
        assert!(kept.places.is_empty() && kept.pages == 0);
    }
}
