//! An HVM guest: memory with holes, parameters, a context; and what it does while it runs.

use super::domain::FakeDomain;
use super::host::Host;
use super::policy::cpu_policy;
use super::rng::Rng;
use super::xen::{Dom, Guest, Xen};
use crate::frame::DomId;
use crate::hypervisor::TscInfo;
use crate::x86::hvm;

/// An HVM guest to make.
#[derive(Clone, Copy, Debug)]
pub struct HvmSpec {
    /// Pages of ordinary memory, 16 at least. It begins at 0 and has a hole at the VGA's place;
    /// the pages that it shares with the toolstack are above it, after another hole.
    pub pages: u64,
    /// Determines all else.
    pub seed: u64,
}

/// The hole below 1 MiB.
const VGA: std::ops::Range<u64> = 0xa0..0x100;
/// Hole between memory and special pages.
const GAP: u64 = 0x300;

/// An HVM guest at work.
pub(super) struct HvmGuest {
    id: u16,
    rng: Rng,
    /// gfns with memory that it, or its device model, writes to.
    pub(super) data: Vec<u64>,
    holes: Vec<u64>,
    /// A gfn that Xen writes to.
    written_by_xen: u64,
    pub(super) has_device_model: bool,
}

/// Pages that it keeps when it gives memory back.
const PAGES_MIN: usize = 8;

impl HvmSpec {
    /// Makes the guest on `host`. It runs, as far as [`Host::run_guests`] says.
    #[must_use]
    pub fn build(&self, host: &Host) -> FakeDomain {
        self.build_ballooned(host, self.pages)
    }

    /// The same with all ordinary memory from gfn `memory` on given back, as of a guest that may
    /// grow.
    #[must_use]
    pub fn build_ballooned(&self, host: &Host, memory: u64) -> FakeDomain {
        let mut xen = host.lock();
        let mut rng = Rng::new(self.seed);
        let special = self.pages + GAP;
        let max_pages = self.pages + 16;
        let id = xen.create(Dom { hvm: true, max_pages, ..Dom::default() });
        let mut data: Vec<u64> = (0..memory).filter(|gfn| !VGA.contains(gfn)).collect();
        for gfn in data.iter().copied().chain(special..special + 8) {
            populate(&mut xen, id, gfn);
            let mfn = frame(&mut xen, id, gfn);
            let word = (!rng.one_in(3)).then(|| (rng.index(512), rng.next()));
            xen.fill_first(mfn, word);
        }
        // A page of Xen's own, and one that the hardware lost.
        let shared = xen.dom(id).shared_info;
        xen.dom(id).physmap.insert(special + 9, shared);
        let lost = data.swap_remove(rng.index(data.len()));
        let lost = frame(&mut xen, id, lost);
        xen.frame(lost).broken = true;
        let domain = xen.dom(id);
        domain.max_gfn = special + 9;
        domain.paused = false;
        domain.written_by_xen.insert(special + 7);
        domain.params = [
            (hvm::STORE_PFN, special),
            (hvm::IOREQ_PFN, special + 1),
            (hvm::BUFIOREQ_PFN, special + 2),
            (hvm::CONSOLE_PFN, special + 3),
            (12, special + 4), // IDENT_PT
            (9, 0x27),         // VIRIDIAN
            (hvm::STORE_EVTCHN, 1),
            (hvm::CONSOLE_EVTCHN, 2),
            (hvm::PAE_ENABLED, 1),
        ]
        .into();
        domain.context = rng.bytes(3000);
        domain.policy = cpu_policy(&mut rng);
        domain.tsc = TscInfo { mode: 2, khz: 2_000_000, nsec: rng.next(), incarnation: 1 };
        let guest = HvmGuest {
            id,
            rng,
            data,
            holes: vec![0xa5],
            written_by_xen: special + 7,
            has_device_model: true,
        };
        domain.guest = Some(Guest::Hvm(guest));
        drop(xen);
        FakeDomain::new(host, DomId(id))
    }
}

/// The frame of `gfn`, which has memory.
fn frame(xen: &mut Xen, id: u16, gfn: u64) -> u64 {
    xen.dom(id).physmap.get(gfn).expect("memory")
}

/// Gives `gfn` a frame; the caller knows that there is room.
fn populate(xen: &mut Xen, id: u16, gfn: u64) {
    let mfn = xen.allocate(id).expect("memory for the guest");
    xen.dom(id).physmap.insert(gfn, mfn);
}

impl HvmGuest {
    /// A few things, at random.
    pub(super) fn run(&mut self, xen: &mut Xen) {
        for _ in 0..1 + self.rng.below(4) {
            match self.rng.below(20) {
                0 if xen.guests_balloon => self.balloon_out(xen),
                1 if xen.guests_balloon => self.balloon_in(xen),
                2..=4 => self.write_by_device(xen),
                5 => self.write_by_xen(xen),
                _ => self.write(xen),
            }
        }
    }

    fn write(&mut self, xen: &mut Xen) {
        let gfn = self.data[self.rng.index(self.data.len())];
        self.put(xen, gfn);
        xen.mark(self.id, gfn);
    }

    /// Only the device model knows of this one.
    fn write_by_device(&mut self, xen: &mut Xen) {
        let gfn = self.data[self.rng.index(self.data.len())];
        self.put(xen, gfn);
        if !self.has_device_model || xen.dom(self.id).qemu_log_dirty {
            xen.mark(self.id, gfn);
        }
    }

    /// Nobody marks this one.
    fn write_by_xen(&mut self, xen: &mut Xen) {
        self.put(xen, self.written_by_xen);
    }

    fn put(&mut self, xen: &mut Xen, gfn: u64) {
        let mfn = frame(xen, self.id, gfn);
        xen.set_word(mfn, self.rng.index(512), self.rng.next());
    }

    /// Log-dirty does not see a page go.
    fn balloon_out(&mut self, xen: &mut Xen) {
        if self.data.len() <= PAGES_MIN {
            return;
        }
        let gfn = self.data.swap_remove(self.rng.index(self.data.len()));
        let mfn = xen.dom(self.id).physmap.remove(gfn).expect("memory");
        xen.release(mfn);
        self.holes.push(gfn);
    }

    fn balloon_in(&mut self, xen: &mut Xen) {
        if !self.holes.is_empty() {
            let gfn = self.holes.swap_remove(self.rng.index(self.holes.len()));
            populate(xen, self.id, gfn);
            self.put(xen, gfn);
            xen.mark(self.id, gfn);
            self.data.push(gfn);
        }
    }
}
