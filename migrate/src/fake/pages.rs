//! Guest memory mapped into the toolstack.

use super::domain::Host;
use super::xen::Xen;
use crate::frame::{DomId, PageBuf, WORDS_PER_PAGE};
use crate::hypervisor::{Access, ForeignPages};

/// A mapping. It sees its frames, whatever becomes of them, until it is dropped.
#[derive(Debug)]
pub struct FakePages {
    host: Host,
    what: Mapped,
}

#[derive(Debug)]
enum Mapped {
    Frames { mfns: Vec<u64>, write: bool },
    M2p,
}

impl FakePages {
    /// Maps `mfns`, all or nothing.
    pub(super) fn map(
        host: &Host,
        xen: &mut Xen,
        domain: DomId,
        mfns: Vec<u64>,
        access: Access,
    ) -> Result<FakePages, i32> {
        let write = access == Access::ReadWrite;
        for (index, &mfn) in mfns.iter().enumerate() {
            if let Err(errno) = xen.map(domain.0, mfn, write) {
                mfns.iter().take(index).for_each(|&mfn| xen.unmap(mfn, write));
                return Err(errno);
            }
        }
        Ok(FakePages { host: host.clone(), what: Mapped::Frames { mfns, write } })
    }

    /// Maps the m2p.
    pub(super) fn m2p(host: &Host) -> FakePages {
        FakePages { host: host.clone(), what: Mapped::M2p }
    }
}

impl ForeignPages for FakePages {
    fn page_count(&self) -> usize {
        match &self.what {
            Mapped::Frames { mfns, .. } => mfns.len(),
            Mapped::M2p => self.host.lock().m2p.len() / WORDS_PER_PAGE,
        }
    }

    fn read_page(&self, index: usize, into: &mut PageBuf) {
        let mut xen = self.host.lock();
        xen.tick();
        let Mapped::Frames { mfns, .. } = &self.what else { panic!("the m2p read as pages") };
        match mfns.get(index) {
            Some(mfn) => into.0.copy_from_slice(&*xen.frame(*mfn).data),
            None => into.0.fill(0),
        }
    }

    fn write_page(&self, index: usize, from: &PageBuf) {
        let mut xen = self.host.lock();
        let Mapped::Frames { mfns, write: true } = &self.what else {
            panic!("a write through a mapping that is read only")
        };
        if let Some(mfn) = mfns.get(index) {
            xen.frame(*mfn).data.copy_from_slice(&from.0);
        }
    }

    fn read_u64(&self, index: usize) -> u64 {
        let mut xen = self.host.lock();
        xen.tick();
        match &self.what {
            Mapped::M2p => xen.m2p.get(index).copied().unwrap_or(0),
            Mapped::Frames { mfns, .. } => {
                let mfn = mfns.get(index / WORDS_PER_PAGE);
                mfn.map_or(0, |mfn| xen.word(*mfn, index % WORDS_PER_PAGE))
            }
        }
    }
}

impl Drop for FakePages {
    fn drop(&mut self) {
        if let Mapped::Frames { mfns, write } = &self.what {
            let mut xen = self.host.lock();
            mfns.iter().for_each(|mfn| xen.unmap(*mfn, *write));
        }
    }
}
