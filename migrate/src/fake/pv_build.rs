//! Makes a PV guest: memory, p2m, page tables, vCPUs, as Linux lays them out.
//!
//! The kernel's part of every address space: all memory that is not a page table or GDT mapped
//! writable at slot 272 of the top-level table, the linear p2m (if it has one) at 402, the shared
//! info page at 511. A process has a tree of its own in slot 0 and a second top-level table that
//! holds nothing else, for user mode.

use std::collections::BTreeSet;

use super::domain::FakeDomain;
use super::guest_pv::{Process, PvGuest};
use super::host::Host;
use super::policy::cpu_policy;
use super::rng::Rng;
use super::xen::{Dom, Guest, PRESENT, RW, USER, Xen};
use crate::frame::{DomId, INVALID_FRAME, PAGE_SHIFT};
use crate::hypervisor::{TscInfo, VcpuState};
use crate::x86::pv::{self, context, shared_info, start_info};

/// How the guest keeps its p2m.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tree of three levels of frames.
    Tree,
    /// An array in its address space.
    Linear,
}

/// A PV guest to make.
#[derive(Clone, Copy, Debug)]
pub struct PvSpec {
    /// pfns, holes included; a few hundred at least, and at most 2^26.
    pub pages: u64,
    /// One pfn in so many has no memory.
    pub one_hole_in: u64,
    /// How it keeps its p2m.
    pub p2m: Kind,
    /// Whether the p2m claims more pfns than the guest can have, all without memory.
    pub long_tail: bool,
    /// vCPUs; of three or more the last is offline.
    pub vcpus: u32,
    /// Processes, one at least.
    pub processes: usize,
    /// Determines all else.
    pub seed: u64,
}

/// Slots of a top-level table.
const DIRECT_SLOT: usize = 272;
const P2M_SLOT: usize = 402;
const FIXMAP_SLOT: usize = 511;
/// Address of slot [`P2M_SLOT`].
const P2M_VADDR: u64 = 0xffff_0000_0000_0000 | (P2M_SLOT as u64) << 39;
/// pfns that a mid-level frame of the p2m covers.
const PFNS_PER_MID: u64 = 512 * 512;
/// Mid-level frames that a p2m with a long tail claims and does not need.
const TAIL_MIDS: u64 = 2;

impl PvSpec {
    /// Makes the guest on `host`. It runs, as far as [`Host::run_guests`] says.
    #[must_use]
    pub fn build(&self, host: &Host) -> FakeDomain {
        self.build_ballooned(host, self.pages)
    }

    /// The same with all memory from pfn `memory` on given back, as of a guest that may grow.
    #[must_use]
    pub fn build_ballooned(&self, host: &Host, memory: u64) -> FakeDomain {
        let mut xen = host.lock();
        let id = xen.create(Dom { max_pages: self.pages, ..Dom::default() });
        let mut builder = Builder::new(&mut xen, id, self, memory);
        let guest = builder.build();
        let domain = xen.dom(id);
        domain.paused = false;
        domain.guest = Some(Guest::Pv(guest));
        drop(xen);
        FakeDomain::new(host, DomId(id))
    }
}

struct Builder<'a> {
    xen: &'a mut Xen,
    id: u16,
    spec: &'a PvSpec,
    rng: Rng,
    p2m: Vec<u64>,
    holes: Vec<u64>,
    /// pfns not yet used for anything.
    spare: Vec<u64>,
    /// pfns that must not be mapped writable.
    read_only: BTreeSet<u64>,
}

impl<'a> Builder<'a> {
    fn new(xen: &'a mut Xen, id: u16, spec: &'a PvSpec, memory: u64) -> Builder<'a> {
        let mut rng = Rng::new(spec.seed);
        let (mut p2m, mut holes, mut spare) = (Vec::new(), Vec::new(), Vec::new());
        for pfn in 0..spec.pages {
            if pfn >= memory || rng.one_in(spec.one_hole_in) {
                p2m.push(INVALID_FRAME);
                holes.push(pfn);
                continue;
            }
            let mfn = xen.allocate(id).expect("memory for the guest");
            xen.memory.set_m2p(mfn, pfn);
            xen.fill_first(mfn, Some((rng.index(512), rng.next())));
            p2m.push(mfn);
            spare.push(pfn);
        }
        rng.shuffle(&mut spare);
        let read_only = BTreeSet::new();
        Builder { xen, id, spec, rng, p2m, holes, spare, read_only }
    }

    fn build(&mut self) -> PvGuest {
        let leaves: Vec<u64> = (0..self.spec.pages.div_ceil(512)).map(|_| self.take()).collect();
        for (pfn, mfn) in (0..).zip(self.p2m.clone()) {
            self.xen.set_word(self.mfn(leaves[pfn / 512]), pfn % 512, mfn);
        }
        for unused in self.spec.pages as usize..leaves.len() * 512 {
            self.xen.set_word(self.mfn(leaves[unused / 512]), unused % 512, INVALID_FRAME);
        }
        let (start_info, store, console) = (self.take(), self.take(), self.take());
        self.fill_start_info(start_info, store, console);
        let direct: Vec<u64> = (0..leaves.len()).map(|_| self.take_table()).collect();
        let fixmap = self.take_table();
        let shared = self.xen.dom(self.id).shared_info;
        self.xen.set_word(self.mfn(fixmap), 7, shared << PAGE_SHIFT | PRESENT | RW);

        let mut kernel =
            vec![(DIRECT_SLOT, self.hang(&direct)), (FIXMAP_SLOT, self.hang(&[fixmap]))];
        self.describe_p2m(&leaves, &mut kernel);
        let kernel_top = self.top(&kernel);
        if self.spec.p2m == Kind::Linear {
            let cr3 = self.mfn(kernel_top) << PAGE_SHIFT;
            self.xen.set_word(shared, shared_info::P2M_CR3 / 8, cr3);
        }
        let processes: Vec<Process> =
            (0..self.spec.processes).map(|_| self.process(&kernel)).collect();
        let gdts: Vec<u64> = (0..=self.spec.vcpus).map(|_| self.take_table()).collect();

        self.fill_direct_map(&direct);
        processes.iter().for_each(|process| self.fill_process(process));
        let tops = processes.iter().flat_map(|p| [p.top, p.user_top]).chain([kernel_top]);
        for top in tops {
            let mfn = self.mfn(top);
            self.xen.pin(self.id, 4, mfn).expect("valid tables");
        }
        for process in processes.iter().filter(|p| p.leaf_pinned) {
            let mfn = self.mfn(process.leaf);
            self.xen.pin(self.id, 1, mfn).expect("a valid table");
        }
        let vcpus = (0..self.spec.vcpus).map(|v| self.vcpu(v, &processes, kernel_top, &gdts));
        let mut vcpus: Vec<Option<VcpuState>> = vcpus.collect();
        let boot = vcpus[0].as_mut().expect("vCPU 0 is online");
        pv::put(&mut boot.basic, context::START_INFO, &self.mfn(start_info).to_le_bytes());
        self.xen.dom(self.id).vcpus = vcpus;
        self.fill_state();
        PvGuest {
            id: self.id,
            rng: self.rng.clone(),
            p2m: std::mem::take(&mut self.p2m),
            leaves,
            start_info,
            store,
            console,
            direct,
            fixmap,
            kernel,
            data: std::mem::take(&mut self.spare),
            unentered: Vec::new(),
            holes: std::mem::take(&mut self.holes),
            busy: (self.spec.vcpus as usize).min(self.spec.processes),
            processes,
            grants: Vec::new(),
        }
    }

    fn mfn(&self, pfn: u64) -> u64 {
        self.p2m[pfn as usize]
    }

    /// An unused page, zeroed.
    fn take(&mut self) -> u64 {
        let pfn = self.spare.pop().expect("a guest that is large enough");
        let mfn = self.mfn(pfn);
        self.xen.memory.fill(mfn, 0);
        pfn
    }

    fn take_table(&mut self) -> u64 {
        let pfn = self.take();
        self.read_only.insert(pfn);
        pfn
    }

    /// The entry for `pfn`.
    fn pte(&self, pfn: u64, flags: u64) -> u64 {
        self.mfn(pfn) << PAGE_SHIFT | flags | PRESENT
    }

    fn set(&mut self, table: u64, slot: usize, pte: u64) {
        self.xen.set_word(self.mfn(table), slot, pte);
    }

    /// Hangs level 1 tables below a new level 3 table, whose entry comes back.
    fn hang(&mut self, leaves: &[u64]) -> u64 {
        let upper = self.take_table();
        for (upper_slot, leaves) in leaves.chunks(512).enumerate() {
            let lower = self.take_table();
            self.set(upper, upper_slot, self.pte(lower, RW | USER));
            for (slot, leaf) in leaves.iter().enumerate() {
                self.set(lower, slot, self.pte(*leaf, RW | USER));
            }
        }
        self.pte(upper, RW | USER)
    }

    fn top(&mut self, slots: &[(usize, u64)]) -> u64 {
        let top = self.take_table();
        slots.iter().for_each(|(slot, pte)| self.set(top, *slot, *pte));
        top
    }

    fn process(&mut self, kernel: &[(usize, u64)]) -> Process {
        let leaf = self.take_table();
        let user = self.hang(&[leaf]);
        let top = self.top(&[kernel, &[(0, user)]].concat());
        let user_top = self.top(&[(0, user)]);
        let [upper, lower] = [user, self.xen.word(user >> PAGE_SHIFT, 0)]
            .map(|pte| self.xen.memory.m2p(pte >> PAGE_SHIFT));
        Process { top, user_top, upper, lower, leaf, leaf_pinned: self.rng.one_in(2) }
    }

    /// Maps pages that are used for nothing else into a process.
    fn fill_process(&mut self, process: &Process) {
        for slot in 0..40 {
            let pfn = self.spare[self.rng.index(self.spare.len())];
            let flags = if self.rng.one_in(3) { USER } else { USER | RW };
            self.set(process.leaf, slot * 7, self.pte(pfn, flags));
        }
    }

    /// Builds what leads to the p2m and tells of it in the shared info page.
    fn describe_p2m(&mut self, leaves: &[u64], kernel: &mut Vec<(usize, u64)>) {
        let shared = self.xen.dom(self.id).shared_info;
        // A guest points what its p2m lacks at one leaf that says so, through one frame or table.
        let missing = self.take();
        let mfn = self.mfn(missing);
        (0..512).for_each(|slot| self.xen.set_word(mfn, slot, INVALID_FRAME));
        let own_mids = self.spec.pages.div_ceil(PFNS_PER_MID);
        let max = match self.spec.long_tail {
            true => (own_mids + TAIL_MIDS) * PFNS_PER_MID,
            false => self.spec.pages,
        };
        let mids = max.div_ceil(PFNS_PER_MID) as usize;
        self.xen.set_word(shared, shared_info::MAX_PFN / 8, max);
        // What leads to 512 leaves of the p2m: a table, or a frame of the tree. One serves for
        // all that the guest lacks.
        let linear = self.spec.p2m == Kind::Linear;
        let take = |builder: &mut Builder<'_>, leaves: &[u64]| {
            let mid = if linear { builder.take_table() } else { builder.take() };
            for slot in 0..512 {
                let leaf = leaves.get(slot).copied().unwrap_or(missing);
                let flags = if slot < leaves.len() { RW } else { 0 };
                let entry = if linear { builder.pte(leaf, flags) } else { builder.mfn(leaf) };
                builder.set(mid, slot, entry);
            }
            mid
        };
        let top = (!linear).then(|| self.take());
        let mut frames: Vec<u64> = leaves.chunks(512).map(|chunk| take(self, chunk)).collect();
        let rest = take(self, &[]);
        frames.resize(mids, rest);
        match top {
            None => {
                let entry = self.hang(&frames);
                kernel.push((P2M_SLOT, entry));
                self.xen.set_word(shared, shared_info::P2M_VADDR / 8, P2M_VADDR);
                self.xen.set_word(shared, shared_info::P2M_GENERATION / 8, 1);
            }
            Some(top) => {
                for (slot, frame) in frames.into_iter().enumerate() {
                    self.set(top, slot, self.mfn(frame));
                }
                let mfn = self.mfn(top);
                self.xen.set_word(shared, shared_info::FRAME_LIST_LIST / 8, mfn);
            }
        }
        // Some of what must not survive the journey.
        self.xen.set_word(shared, shared_info::EVTCHN_PENDING.start / 8, 0xff);
        self.xen.set_word(shared, shared_info::PENDING_SEL / 8, 1);
        self.xen.set_word(shared, 2, self.rng.next());
    }

    fn fill_direct_map(&mut self, direct: &[u64]) {
        for pfn in 0..self.spec.pages {
            if self.mfn(pfn) == INVALID_FRAME {
                continue;
            }
            let flags = if self.read_only.contains(&pfn) { 0 } else { RW };
            self.set(direct[pfn as usize / 512], pfn as usize % 512, self.pte(pfn, flags));
        }
    }

    fn fill_start_info(&mut self, page: u64, store: u64, console: u64) {
        let mfn = self.mfn(page);
        let shared = self.xen.dom(self.id).shared_info;
        for (offset, value) in [
            (0, self.rng.next()),
            (start_info::NR_PAGES, self.spec.pages),
            (start_info::SHARED_INFO, shared << PAGE_SHIFT),
            (start_info::FLAGS, 2),
            (start_info::STORE_MFN, self.mfn(store)),
            (start_info::STORE_EVTCHN, 1),
            (start_info::CONSOLE_MFN, self.mfn(console)),
            (start_info::CONSOLE_EVTCHN, 2),
        ] {
            self.xen.set_word(mfn, offset / 8, value);
        }
    }

    /// vCPU `number`, which runs a process, or the kernel alone if there are not enough.
    fn vcpu(
        &mut self,
        number: u32,
        processes: &[Process],
        kernel_top: u64,
        gdts: &[u64],
    ) -> Option<VcpuState> {
        if number >= 2 && number + 1 == self.spec.vcpus {
            return None;
        }
        let mut basic = self.rng.bytes(pv::VCPU_CONTEXT_BYTES);
        let (top, user) = match processes.get(number as usize) {
            Some(process) => (process.top, Some(process.user_top)),
            None => (kernel_top, None),
        };
        let user = user.map(|pfn| self.mfn(pfn));
        let mut put = |offset, word: u64| pv::put(&mut basic, offset, &word.to_le_bytes());
        // vCPU 0 has two frames of GDT, the others one each.
        let own: &[u64] = match number {
            0 => &gdts[..2],
            n => &gdts[n as usize + 1..][..1],
        };
        put(context::GDT_ENTRIES, own.len() as u64 * 512 - 3);
        for slot in 0..16 {
            let mfn = own.get(slot).map_or(0, |pfn| self.p2m[*pfn as usize]);
            put(context::GDT_FRAMES + 8 * slot, mfn);
        }
        put(context::CR3, self.p2m[top as usize] << PAGE_SHIFT);
        put(context::CR1, user.map_or(0, |mfn| mfn << PAGE_SHIFT));
        for table in [Some(self.mfn(top)), user].into_iter().flatten() {
            self.xen.get_table(self.id, table, 4).expect("a top-level table");
        }
        for gdt in own {
            self.xen.get_gdt(self.id, self.mfn(*gdt)).expect("a frame for a GDT");
        }
        let mut extended = self.rng.bytes(64);
        pv::put(&mut extended, 0, &(u64::from(number) | 64 << 32).to_le_bytes());
        let msrs = self.rng.bytes(if number == 0 { 32 } else { 0 });
        let xsave = self.rng.bytes(16 + 576);
        Some(VcpuState { basic, extended, xsave, msrs })
    }

    fn fill_state(&mut self) {
        let policy = cpu_policy(&mut self.rng);
        let nsec = self.rng.next();
        let domain = self.xen.dom(self.id);
        domain.policy = policy;
        domain.tsc = TscInfo { mode: 0, khz: 2_400_000, nsec, incarnation: 3 };
    }
}
