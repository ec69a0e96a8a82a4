//! Guest memory mapped into the toolstack.

use super::host::Host;
use super::xen::Xen;
use crate::frame::{Mfn, PageBuf, WORDS_PER_PAGE};
use crate::hypervisor::{Access, ForeignPages};

/// A mapping. It sees its frames, whatever becomes of them, until it is dropped.
#[derive(Debug)]
pub struct FakePages {
    host: Host,
    what: Mapped,
}

#[derive(Debug)]
enum Mapped {
    /// Frames of a domain; none where one could not be mapped.
    Frames {
        mfns: Vec<Option<u64>>,
        write: bool,
    },
    M2p,
}

impl FakePages {
    /// `mfns` are mapped already.
    pub(super) fn of(host: &Host, mfns: Vec<Option<u64>>, access: Access) -> FakePages {
        let write = access == Access::ReadWrite;
        FakePages { host: host.clone(), what: Mapped::Frames { mfns, write } }
    }

    /// Maps the m2p.
    pub(super) fn m2p(host: &Host) -> FakePages {
        FakePages { host: host.clone(), what: Mapped::M2p }
    }

    /// The machine frames in the order of the pages; none where one could not be mapped.
    #[must_use]
    pub fn machine_frames(&self) -> Vec<Option<Mfn>> {
        match &self.what {
            Mapped::Frames { mfns, .. } => mfns.iter().map(|mfn| mfn.map(Mfn)).collect(),
            Mapped::M2p => {
                let (start, pages) = self.host.size();
                (start..start + pages).map(|page| Some(Mfn(page))).collect()
            }
        }
    }

    /// The frame of page `index`, which is mapped.
    fn frame(&self, xen: &Xen, index: usize) -> Option<u64> {
        match &self.what {
            Mapped::Frames { mfns, .. } => {
                mfns.get(index).map(|mfn| mfn.expect("a page that could be mapped"))
            }
            Mapped::M2p => {
                let mfn = xen.memory.m2p_start() + index as u64;
                (index < xen.memory.m2p_pages() as usize).then_some(mfn)
            }
        }
    }
}

impl ForeignPages for FakePages {
    fn page_count(&self) -> usize {
        match &self.what {
            Mapped::Frames { mfns, .. } => mfns.len(),
            Mapped::M2p => self.host.size().1 as usize,
        }
    }

    fn read_page(&self, index: usize, into: &mut PageBuf) {
        let mut xen = self.host.lock();
        xen.tick();
        match self.frame(&xen, index) {
            Some(mfn) => into.0 = xen.memory.page(mfn).0,
            None => into.0.fill(0),
        }
    }

    fn write_page(&self, index: usize, from: &PageBuf) {
        let mut xen = self.host.lock();
        let Mapped::Frames { write: true, .. } = &self.what else {
            panic!("a write through a mapping that is read only")
        };
        if let Some(mfn) = self.frame(&xen, index) {
            xen.memory.set_page(mfn, from);
        }
    }

    fn read_u64(&self, index: usize) -> u64 {
        let mut xen = self.host.lock();
        xen.tick();
        let mfn = self.frame(&xen, index / WORDS_PER_PAGE);
        mfn.map_or(0, |mfn| xen.word(mfn, index % WORDS_PER_PAGE))
    }
}

impl Drop for FakePages {
    fn drop(&mut self) {
        if let Mapped::Frames { mfns, write } = &self.what {
            let mut xen = self.host.lock();
            mfns.iter().flatten().for_each(|mfn| xen.unmap(*mfn, *write));
        }
    }
}
