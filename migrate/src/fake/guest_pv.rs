//! What a PV guest does: it writes memory, changes page tables through the hypervisor, starts
//! and ends processes (pages become tables and back), balloons, and maps grants.

use std::collections::BTreeSet;

use super::rng::Rng;
use super::xen::{PRESENT, RW, USER, Xen};
use crate::frame::{INVALID_FRAME, PAGE_SHIFT};
use crate::x86::pv::{PTE_FRAME_MASK, start_info};

/// A PV guest. Frames in it are pfns.
pub(super) struct PvGuest {
    pub(super) id: u16,
    pub(super) rng: Rng,
    /// What is, or will be, in `leaves`.
    pub(super) p2m: Vec<u64>,
    pub(super) leaves: Vec<u64>,
    pub(super) start_info: u64,
    pub(super) store: u64,
    pub(super) console: u64,
    /// Level 1 tables that map all of its memory.
    pub(super) direct: Vec<u64>,
    /// Level 1 table that maps the shared info page.
    pub(super) fixmap: u64,
    /// Slots of every top-level table.
    pub(super) kernel: Vec<(usize, u64)>,
    /// Ordinary pages that it writes to.
    pub(super) data: Vec<u64>,
    /// Pages that are mapped and not yet in the p2m that others see.
    pub(super) unentered: Vec<u64>,
    /// pfns without memory.
    pub(super) holes: Vec<u64>,
    pub(super) processes: Vec<Process>,
    /// So many of them run on a vCPU and cannot end.
    pub(super) busy: usize,
    /// Tables and slots with a grant of somebody else's page.
    pub(super) grants: Vec<(u64, usize)>,
}

/// A process's page tables. `top` has the kernel's slots, `user_top` only its own.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) top: u64,
    pub(super) user_top: u64,
    pub(super) upper: u64,
    pub(super) lower: u64,
    pub(super) leaf: u64,
    /// Whether `leaf` is pinned by itself, too.
    pub(super) leaf_pinned: bool,
}

impl Process {
    fn tables(&self) -> [u64; 5] {
        [self.top, self.user_top, self.upper, self.lower, self.leaf]
    }
}

/// Ordinary pages that it keeps when it gives memory back.
const DATA_MIN: usize = 16;
/// Processes that it starts at most.
const PROCESSES_MAX: usize = 8;

impl PvGuest {
    /// A few things, at random.
    pub(super) fn run(&mut self, xen: &mut Xen) {
        for _ in 0..1 + self.rng.below(4) {
            match self.rng.below(20) {
                0 if xen.guests_balloon => self.balloon_out(xen),
                1 if xen.guests_balloon => self.balloon_in(xen),
                2 => self.start_process(xen),
                3 => self.end_process(xen),
                4 => self.map_grant(xen),
                5 => self.unmap_grant(xen),
                6 => self.enter_pages(xen),
                7..=9 => self.map_page(xen),
                _ => self.write(xen),
            }
        }
    }

    /// Makes ready to be moved, as Linux does, and asks to be suspended.
    pub(super) fn suspend(&mut self, xen: &mut Xen) {
        while !self.grants.is_empty() {
            self.unmap_grant(xen);
        }
        self.enter_pages(xen);
        self.update(xen, self.fixmap, 7, 0);
        let page = self.mfn(self.start_info);
        xen.guest_write(self.id, page, start_info::STORE_MFN / 8, self.store);
        xen.guest_write(self.id, page, start_info::CONSOLE_MFN / 8, self.console);
    }

    /// Takes back what [`PvGuest::suspend`] did, as Linux does when it was not moved.
    pub(super) fn resume(&mut self, xen: &mut Xen) {
        let shared = xen.dom(self.id).shared_info;
        self.update(xen, self.fixmap, 7, shared << PAGE_SHIFT | PRESENT | RW);
        let page = self.mfn(self.start_info);
        for (offset, pfn) in
            [(start_info::STORE_MFN, self.store), (start_info::CONSOLE_MFN, self.console)]
        {
            xen.guest_write(self.id, page, offset / 8, self.mfn(pfn));
        }
    }

    pub(super) fn mfn(&self, pfn: u64) -> u64 {
        self.p2m[pfn as usize]
    }

    fn update(&self, xen: &mut Xen, table: u64, slot: usize, pte: u64) {
        let done = xen.update_entry(self.id, self.mfn(table), slot, pte);
        done.expect("a guest that makes no mistakes");
    }

    /// Changes how `pfn` is mapped in the kernel's map of all memory.
    fn map_directly(&self, xen: &mut Xen, pfn: u64, flags: Option<u64>) {
        let pte = flags.map_or(0, |flags| self.mfn(pfn) << PAGE_SHIFT | PRESENT | flags);
        self.update(xen, self.direct[pfn as usize / 512], pfn as usize % 512, pte);
    }

    fn set_p2m(&mut self, xen: &mut Xen, pfn: u64, mfn: u64) {
        self.p2m[pfn as usize] = mfn;
        let leaf = self.mfn(self.leaves[pfn as usize / 512]);
        xen.guest_write(self.id, leaf, pfn as usize % 512, mfn);
    }

    fn write(&mut self, xen: &mut Xen) {
        let pfn = self.data[self.rng.index(self.data.len())];
        let mfn = self.mfn(pfn);
        xen.guest_write(self.id, mfn, self.rng.index(512), self.rng.next());
    }

    /// A data page that no process maps, taken out of use, if there is one.
    fn take_unmapped(&mut self, xen: &Xen) -> Option<u64> {
        let mapped: BTreeSet<u64> = self
            .processes
            .iter()
            .flat_map(|process| xen.memory.page(self.mfn(process.leaf)).words().collect::<Vec<_>>())
            .filter(|pte| pte & PRESENT != 0)
            .map(|pte| (pte & PTE_FRAME_MASK) >> PAGE_SHIFT)
            .collect();
        if self.data.iter().all(|pfn| mapped.contains(&self.mfn(*pfn))) {
            return None;
        }
        loop {
            let index = self.rng.index(self.data.len());
            if !mapped.contains(&self.mfn(self.data[index])) {
                return Some(self.data.swap_remove(index));
            }
        }
    }

    fn balloon_out(&mut self, xen: &mut Xen) {
        if self.data.len() > DATA_MIN
            && let Some(pfn) = self.take_unmapped(xen)
        {
            self.give_back(xen, pfn);
        }
    }

    /// Gives back the memory of `pfn`, which no process maps.
    fn give_back(&mut self, xen: &mut Xen, pfn: u64) {
        let mfn = self.mfn(pfn);
        self.map_directly(xen, pfn, None);
        self.set_p2m(xen, pfn, INVALID_FRAME);
        xen.release(mfn);
        self.holes.push(pfn);
    }

    fn balloon_in(&mut self, xen: &mut Xen) {
        if self.holes.is_empty() {
            return;
        }
        let Ok(mfn) = xen.allocate(self.id) else { return };
        let pfn = self.holes.swap_remove(self.rng.index(self.holes.len()));
        xen.memory.set_m2p(mfn, pfn);
        // Its p2m may be the last to know: until then its tables make no sense to others.
        self.p2m[pfn as usize] = mfn;
        self.map_directly(xen, pfn, Some(RW));
        xen.guest_write(self.id, mfn, 0, self.rng.next());
        self.unentered.push(pfn);
        if self.rng.one_in(2) {
            self.enter_pages(xen);
        }
    }

    /// Enters new pages into the p2m, after which they are in use.
    fn enter_pages(&mut self, xen: &mut Xen) {
        while let Some(pfn) = self.unentered.pop() {
            self.set_p2m(xen, pfn, self.mfn(pfn));
            self.data.push(pfn);
        }
    }

    fn map_page(&mut self, xen: &mut Xen) {
        let leaf = self.processes[self.rng.index(self.processes.len())].leaf;
        let pfn = self.data[self.rng.index(self.data.len())];
        // Grants have slots of their own.
        let slot = self.rng.index(499);
        let flags = [USER, USER | RW][self.rng.index(2)];
        let pte = self.mfn(pfn) << PAGE_SHIFT | PRESENT | flags;
        let pte = if self.rng.one_in(4) { 0 } else { pte };
        self.update(xen, leaf, slot, pte);
    }

    fn map_grant(&mut self, xen: &mut Xen) {
        let leaf = self.processes[self.rng.index(self.processes.len())].leaf;
        let slot = 500 + self.rng.index(12);
        let mfn = xen.granted[self.rng.index(xen.granted.len())];
        if !self.grants.contains(&(leaf, slot)) {
            self.grants.push((leaf, slot));
            self.update(xen, leaf, slot, mfn << PAGE_SHIFT | PRESENT | RW | USER);
        }
    }

    /// Maps a grant for good.
    pub(super) fn hold_grant(&mut self, xen: &mut Xen) {
        let mfn = xen.granted[0];
        let leaf = self.processes[0].leaf;
        self.update(xen, leaf, 499, mfn << PAGE_SHIFT | PRESENT | USER);
    }

    fn unmap_grant(&mut self, xen: &mut Xen) {
        if let Some((table, slot)) = self.grants.pop() {
            self.update(xen, table, slot, 0);
        }
    }

    fn start_process(&mut self, xen: &mut Xen) {
        if self.processes.len() >= PROCESSES_MAX || self.data.len() < 100 {
            return;
        }
        let pages: Vec<u64> = (0..5).map_while(|_| self.take_unmapped(xen)).collect();
        let &[top, user_top, upper, lower, leaf] = pages.as_slice() else {
            self.data.extend(pages);
            return;
        };
        let process =
            Process { top, user_top, upper, lower, leaf, leaf_pinned: self.rng.one_in(2) };
        for table in process.tables() {
            let mfn = self.mfn(table);
            (0..512).for_each(|slot| xen.guest_write(self.id, mfn, slot, 0));
        }
        let pte = |pfn: u64, flags| self.mfn(pfn) << PAGE_SHIFT | PRESENT | USER | flags;
        let mut entries = vec![
            (top, 0, pte(upper, RW)),
            (user_top, 0, pte(upper, RW)),
            (upper, 0, pte(lower, RW)),
            (lower, 0, pte(leaf, RW)),
        ];
        entries.extend(self.kernel.iter().map(|(slot, pte)| (top, *slot, *pte)));
        for slot in 0..20 {
            let pfn = self.data[self.rng.index(self.data.len())];
            entries.push((leaf, slot, self.mfn(pfn) << PAGE_SHIFT | PRESENT | USER | RW));
        }
        for (table, slot, pte) in entries {
            xen.guest_write(self.id, self.mfn(table), slot, pte);
        }
        for table in process.tables() {
            self.map_directly(xen, table, Some(0));
        }
        for top in [top, user_top] {
            xen.pin(self.id, 4, self.mfn(top)).expect("valid tables");
        }
        if process.leaf_pinned {
            xen.pin(self.id, 1, self.mfn(leaf)).expect("a valid table");
        }
        self.processes.push(process);
    }

    /// Its tables become ordinary memory, with what was in them, or are given back.
    fn end_process(&mut self, xen: &mut Xen) {
        if self.processes.len() <= self.busy.max(1) {
            return;
        }
        let index = self.busy + self.rng.index(self.processes.len() - self.busy);
        let process = self.processes.swap_remove(index);
        self.grants.retain(|(table, _)| *table != process.leaf);
        if process.leaf_pinned {
            xen.unpin(self.id, self.mfn(process.leaf));
        }
        for top in [process.top, process.user_top] {
            xen.unpin(self.id, self.mfn(top));
        }
        for table in process.tables() {
            self.map_directly(xen, table, Some(RW));
            if xen.guests_balloon && self.rng.one_in(3) {
                self.give_back(xen, table);
            } else {
                self.data.push(table);
            }
        }
    }
}
