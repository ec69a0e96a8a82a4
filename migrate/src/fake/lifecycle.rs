//! What a toolstack does to a domain as a whole, and what can be seen of it from outside.

use super::domain::FakeDomain;
use super::host::Host;
use super::xen::{Guest, PRESENT, RW, Xen};
use crate::frame::{DomId, PAGE_SHIFT};
use crate::hypervisor::SHUTDOWN_SUSPEND;
use crate::x86::pv::PTE_FRAME_MASK;

impl Host {
    /// The domains that there are.
    #[must_use]
    pub fn domains(&self) -> Vec<DomId> {
        self.lock().domains.keys().map(|id| DomId(*id)).collect()
    }
}

impl FakeDomain {
    /// Whether it has not been destroyed.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.host.lock().domains.contains_key(&self.id.0)
    }

    /// Whether its vCPUs may run: it is there, not paused and not shut down.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let xen = self.host.lock();
        xen.domains.get(&self.id.0).is_some_and(|dom| !dom.paused && dom.shutdown.is_none())
    }

    /// Whether it has shut down to be suspended.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        let xen = self.host.lock();
        xen.domains.get(&self.id.0).is_some_and(|dom| dom.shutdown == Some(SHUTDOWN_SUSPEND))
    }

    /// Lets a paused domain run.
    pub fn unpause(&self) {
        self.host.lock().dom(self.id.0).paused = false;
    }

    /// Lets a suspended domain run on, which hears that its suspension was cancelled.
    pub fn resume(&self) {
        let mut xen = self.host.lock();
        xen.dom(self.id.0).shutdown = None;
        xen.with_guest(self.id.0, |xen, guest| {
            if let Guest::Pv(guest) = guest {
                guest.resume(xen);
            }
        });
    }

    /// Makes an HVM guest a PVH guest: there is no device model that writes its memory.
    pub fn remove_device_model(&self) {
        self.host.lock().with_guest(self.id.0, |_, guest| {
            if let Guest::Hvm(guest) = guest {
                guest.has_device_model = false;
            }
        });
    }

    /// Ends the domain. Its frames are free, but for those that somebody still maps.
    pub fn destroy(&self) {
        let mut xen = self.host.lock();
        let Some(domain) = xen.domains.remove(&self.id.0) else { return };
        let frames = 0..xen.frames.len() as u64;
        let owned: Vec<u64> = frames.filter(|mfn| xen.is_owned(self.id.0, *mfn)).collect();
        if !domain.hvm {
            drop_table_references(&mut xen, &owned);
        }
        for mfn in owned {
            let frame = xen.frame(mfn);
            (frame.owner, frame.special, frame.broken) = (None, false, false);
            xen.free_if_unused(mfn);
        }
    }
}

/// Takes apart what page tables, pins, control registers and GDTs hold of `owned`, which is all of
/// a domain's memory.
fn drop_table_references(xen: &mut Xen, owned: &[u64]) {
    for &mfn in owned {
        if xen.frame(mfn).is_table(1) {
            for slot in 0..512 {
                let pte = xen.word(mfn, slot);
                let maps = (pte & PTE_FRAME_MASK) >> PAGE_SHIFT;
                if pte & (PRESENT | RW) == PRESENT | RW && !xen.granted.contains(&maps) {
                    xen.frame(maps).drop_writable();
                }
            }
        }
    }
    owned.iter().for_each(|mfn| xen.frame(*mfn).drop_types());
}
