//! Frames, their types and references, and the domains that own them.
//!
//! A PV frame is one of: not referenced as anything; referenced as a page table of one level (by
//! a pin, a control register or a table above); referenced as a GDT; or referenced writable (by
//! an entry of a level 1 table or by a mapping of the toolstack). Xen's rule is that these
//! exclude each other, and that a table's references are taken entry by entry when it is first
//! referenced as a table and dropped with the last one.

use std::collections::{BTreeMap, BTreeSet};

use super::guest_hvm::HvmGuest;
use super::guest_pv::PvGuest;
use super::host::HostSpec;
use super::memory::Memory;
use super::physmap::PhysMap;
use super::rng::Rng;
use crate::frame::{INVALID_FRAME, PAGE_SHIFT, PageType};
use crate::hypervisor::{CpuPolicy, TscInfo, VcpuState};
use crate::x86::pv::PTE_FRAME_MASK;

pub(super) const ESRCH: i32 = 3;
pub(super) const E2BIG: i32 = 7;
pub(super) const ENOMEM: i32 = 12;
pub(super) const EACCES: i32 = 13;
pub(super) const EBUSY: i32 = 16;
pub(super) const EEXIST: i32 = 17;
pub(super) const EINVAL: i32 = 22;

pub(super) const PRESENT: u64 = 1;
pub(super) const RW: u64 = 2;
pub(super) const USER: u64 = 4;
const SUPERPAGE: u64 = 1 << 7;
/// Slots of a top-level table that Xen fills with its own entries.
pub(super) const XEN_SLOTS: std::ops::Range<usize> = 256..272;
/// A frame of Xen's own, which those entries refer to.
const XEN_FRAME: u64 = 1;
/// What memory holds that was somebody else's.
const RUBBISH: u8 = 0xc2;

/// An errno.
pub(super) type Errno<T> = Result<T, i32>;

#[derive(Clone, Default)]
pub(super) struct Frame {
    pub(super) owner: Option<u16>,
    /// Xen's own memory that it shares with the owner (shared info, grant table).
    pub(super) special: bool,
    pub(super) broken: bool,
    /// Mappings of the toolstack, which keep a frame from being reused.
    mappings: u32,
    writable: u32,
    gdts: u32,
    level: u8,
    tables: u32,
    pub(super) pinned: bool,
}

impl Frame {
    /// Whether it is in use as a page table of `level`.
    pub(super) fn is_table(&self, level: u8) -> bool {
        self.tables > 0 && self.level == level
    }

    /// A writable entry of a table goes.
    pub(super) fn drop_writable(&mut self) {
        self.writable -= 1;
    }

    /// It is no table and no GDT any more.
    pub(super) fn drop_types(&mut self) {
        (self.tables, self.gdts, self.pinned) = (0, 0, false);
    }
}

pub(super) enum Guest {
    Pv(PvGuest),
    Hvm(HvmGuest),
}

/// One domain. A new one is empty and paused.
#[derive(Default)]
pub(super) struct Dom {
    pub(super) hvm: bool,
    pub(super) max_pages: u64,
    pub(super) total_pages: u64,
    pub(super) paused: bool,
    pub(super) shutdown: Option<u8>,
    pub(super) shared_info: u64,
    /// The first frame of its grant table. It is in no p2m.
    pub(super) grant_table: u64,
    pub(super) address_bits: u32,
    /// HVM: gfn to frame. A PV domain has a p2m of its own; here is what it was populated with.
    pub(super) physmap: PhysMap,
    pub(super) max_gfn: u64,
    /// Extents of 2 MiB that it was given.
    pub(super) extents: u64,
    /// PV: pfns; HVM: gfns.
    pub(super) dirty: Option<BTreeSet<u64>>,
    pub(super) no_log_dirty: bool,
    /// HVM: gfns that Xen itself writes, which are dirty whenever the last bitmap is read.
    pub(super) written_by_xen: BTreeSet<u64>,
    /// HVM: whether the device model reports what it writes.
    pub(super) qemu_log_dirty: bool,
    pub(super) vcpus: Vec<Option<VcpuState>>,
    pub(super) params: BTreeMap<u32, u64>,
    pub(super) context: Vec<u8>,
    pub(super) policy: CpuPolicy,
    pub(super) tsc: TscInfo,
    pub(super) guest: Option<Guest>,
    /// The scheduler's limit, in percent of a processor; 0: none.
    pub(super) cpu_cap: u16,
    /// Of the turns that it would have had, those that this has left it, in percent.
    pub(crate) turns: u64,
}

impl Dom {
    /// Whether it has its turn now, which a limit may cost it.
    fn has_turn(&mut self) -> bool {
        if self.cpu_cap == 0 {
            return true;
        }
        let all = 100 * self.vcpus.len().max(1) as u64;
        self.turns += u64::from(self.cpu_cap).min(all);
        let turn = self.turns >= all;
        self.turns -= if turn { all } else { 0 };
        turn
    }
}

/// All of the machine.
pub(super) struct Xen {
    pub(super) frames: Vec<Frame>,
    pub(super) memory: Memory,
    /// Memory that is handed out holds what its last owner left, and zeros before the first.
    scrubbed_at_boot: bool,
    free: Vec<u64>,
    pub(super) domains: BTreeMap<u16, Dom>,
    /// Frames of other domains that guests may map through grants.
    pub(super) granted: Vec<u64>,
    pub(super) calls: Vec<(u16, &'static str)>,
    /// Operation, calls of it that still succeed, errno.
    pub(super) faults: Vec<(&'static str, u64, i32)>,
    pub(super) fragmented: bool,
    pub(super) refused_leaf: Option<u32>,
    /// A leaf whose features in edx the host lacks.
    pub(super) lacking: Option<u32>,
    /// Guests do something at every so many accesses; 0: never.
    pub(super) guests_run_every: u64,
    /// Whether they give memory back and take some.
    pub(super) guests_balloon: bool,
    /// Bitmaps of log-dirty that are to come back empty, after so many that do not.
    pub(super) forgotten_clean: Option<u64>,
    /// If mappings are to be stale: the frame that a page of a PV domain was mapped with first.
    pub(super) first_mapped: Option<BTreeMap<(u16, u64), u64>>,
    /// How often another frame was asked for than was mapped.
    pub(super) mapped_stale: u64,
    accesses: u64,
    pub(super) mappings: u64,
}

impl Xen {
    pub(super) fn new(spec: HostSpec) -> Xen {
        let HostSpec { frames, seed, file, fresh } = spec;
        // Frames 0 and 1 are nobody's, and the last ones a granting domain's.
        let mut free: Vec<u64> = (2..frames).rev().collect();
        if !fresh {
            Rng::new(seed).shuffle(&mut free);
        }
        let granted: Vec<u64> = free.drain(..4).collect();
        let mut memory = Memory::new(frames, file);
        // What is granted has pfns of its own in another domain.
        (3..).zip(&granted).for_each(|(pfn, mfn)| memory.set_m2p(*mfn, pfn));
        Xen {
            frames: vec![Frame::default(); frames as usize],
            memory,
            scrubbed_at_boot: fresh,
            free,
            domains: BTreeMap::new(),
            granted,
            calls: Vec::new(),
            faults: Vec::new(),
            fragmented: false,
            refused_leaf: None,
            lacking: None,
            guests_run_every: 0,
            guests_balloon: true,
            forgotten_clean: None,
            first_mapped: None,
            mapped_stale: 0,
            accesses: 0,
            mappings: 0,
        }
    }

    pub(super) fn create(&mut self, domain: Dom) -> u16 {
        let id = self.domains.keys().next_back().map_or(1, |last| last + 1);
        let [shared_info, grant_table] = std::array::from_fn(|_| {
            let mfn = self.free.pop().expect("a free frame");
            let frame = self.frame(mfn);
            (frame.owner, frame.special) = (Some(id), true);
            self.memory.fill(mfn, 0);
            mfn
        });
        let blank = Dom { paused: true, address_bits: 64, shared_info, grant_table, ..domain };
        self.domains.insert(id, blank);
        id
    }

    pub(super) fn dom(&mut self, id: u16) -> &mut Dom {
        self.domains.get_mut(&id).expect("a domain of this host")
    }

    pub(super) fn frame(&mut self, mfn: u64) -> &mut Frame {
        &mut self.frames[mfn as usize]
    }

    /// Whether `mfn` is memory of `id` (or shared with it by Xen).
    pub(super) fn is_owned(&self, id: u16, mfn: u64) -> bool {
        self.frames.get(mfn as usize).is_some_and(|frame| frame.owner == Some(id))
    }

    /// Lets the guests that run do something, now and then.
    pub(super) fn tick(&mut self) {
        self.accesses += 1;
        if self.guests_run_every > 0 && self.accesses.is_multiple_of(self.guests_run_every) {
            self.run_guests();
        }
    }

    /// Every guest that runs does a few things.
    pub(super) fn run_guests(&mut self) {
        for id in self.domains.keys().copied().collect::<Vec<_>>() {
            if self.dom(id).shutdown.is_none() && self.dom(id).has_turn() {
                self.with_guest(id, |xen, guest| match guest {
                    Guest::Pv(guest) => guest.run(xen),
                    Guest::Hvm(guest) => guest.run(xen),
                });
            }
        }
    }

    pub(super) fn with_guest(&mut self, id: u16, act: impl FnOnce(&mut Xen, &mut Guest)) {
        if let Some(mut guest) = self.dom(id).guest.take() {
            act(self, &mut guest);
            self.dom(id).guest = Some(guest);
        }
    }

    /// Pages that `id` could still be given.
    pub(super) fn room(&mut self, id: u16) -> u64 {
        let domain = self.dom(id);
        let allowed = domain.max_pages.saturating_sub(domain.total_pages);
        allowed.min(self.free.len() as u64)
    }

    /// A frame for `id`, with rubbish in it, or what a scrubbing host has left there.
    pub(super) fn allocate(&mut self, id: u16) -> Errno<u64> {
        if self.room(id) == 0 {
            return Err(ENOMEM);
        }
        let mfn = self.free.pop().ok_or(ENOMEM)?;
        self.dom(id).total_pages += 1;
        self.frame(mfn).owner = Some(id);
        if !self.scrubbed_at_boot {
            self.memory.fill(mfn, RUBBISH);
        }
        Ok(mfn)
    }

    /// Makes the first content of a page of a guest that is built: zeros, and a word somewhere. On
    /// a machine that is fresh from a boot the guest has not touched it yet.
    pub(super) fn fill_first(&mut self, mfn: u64, word: Option<(usize, u64)>) {
        if !self.scrubbed_at_boot {
            self.memory.fill(mfn, 0);
            word.into_iter().for_each(|(slot, word)| self.set_word(mfn, slot, word));
        }
    }

    /// The owner gives `mfn` back. It is free once nobody maps it any more.
    pub(super) fn release(&mut self, mfn: u64) {
        let frame = self.frame(mfn);
        assert!(frame.tables == 0 && frame.gdts == 0, "a table in use was given back");
        let owner = frame.owner.take().expect("an owner");
        self.dom(owner).total_pages -= 1;
        self.free_if_unused(mfn);
    }

    pub(super) fn free_if_unused(&mut self, mfn: u64) {
        let frame = self.frame(mfn);
        if frame.owner.is_none() && frame.mappings == 0 {
            assert_eq!(frame.writable, 0, "a freed frame is mapped by its old owner");
            self.memory.set_m2p(mfn, INVALID_FRAME);
            self.free.push(mfn);
        }
    }

    /// The toolstack maps `mfn`. Of a PV guest a writable mapping counts like any other.
    pub(super) fn map(&mut self, id: u16, mfn: u64, write: bool) -> Errno<()> {
        if !self.is_owned(id, mfn) || self.frame(mfn).broken {
            return Err(EINVAL);
        }
        if write {
            self.get_writable(mfn)?;
        }
        self.reference(mfn);
        Ok(())
    }

    fn reference(&mut self, mfn: u64) {
        self.frame(mfn).mappings += 1;
        self.mappings += 1;
    }

    /// Maps the page that has `mfn` to be read, as who has kept a mapping of it and does not look
    /// where it is now. The frame that is mapped, if it is another one.
    pub(super) fn map_stale(&mut self, id: u16, mfn: u64) -> Option<u64> {
        let hvm = self.dom(id).hvm;
        let pfn = self.memory.m2p(mfn);
        if hvm || pfn == INVALID_FRAME || !self.is_owned(id, mfn) {
            return None;
        }
        let first = *self.first_mapped.as_mut()?.entry((id, pfn)).or_insert(mfn);
        if first == mfn {
            // It stays mapped, and so nobody gets the frame.
            self.frame(mfn).mappings += 1;
            return None;
        }
        self.reference(first);
        self.mapped_stale += 1;
        Some(first)
    }

    pub(super) fn unmap(&mut self, mfn: u64, write: bool) {
        let frame = self.frame(mfn);
        frame.writable -= u32::from(write);
        frame.mappings -= 1;
        self.mappings -= 1;
        self.free_if_unused(mfn);
    }

    fn get_writable(&mut self, mfn: u64) -> Errno<()> {
        let frame = self.frame(mfn);
        if frame.tables > 0 || frame.gdts > 0 {
            return Err(EINVAL);
        }
        frame.writable += 1;
        Ok(())
    }

    pub(super) fn get_gdt(&mut self, id: u16, mfn: u64) -> Errno<()> {
        if !self.is_owned(id, mfn) {
            return Err(EINVAL);
        }
        let frame = self.frame(mfn);
        if frame.tables > 0 || frame.writable > 0 {
            return Err(EINVAL);
        }
        frame.gdts += 1;
        Ok(())
    }

    /// References `mfn` as a table of `level`, validating it if it is the first reference.
    pub(super) fn get_table(&mut self, id: u16, mfn: u64, level: u8) -> Errno<()> {
        if !self.is_owned(id, mfn) || self.frame(mfn).special {
            return Err(EINVAL);
        }
        let frame = self.frame(mfn);
        if frame.tables > 0 {
            if frame.level != level {
                return Err(EINVAL);
            }
            frame.tables += 1;
            return Ok(());
        }
        if frame.writable > 0 || frame.gdts > 0 {
            return Err(EBUSY);
        }
        (frame.tables, frame.level) = (1, level);
        let table: Vec<u64> = self.memory.page(mfn).words().collect();
        for (slot, pte) in table.iter().enumerate() {
            if let Err(errno) = self.get_entry(id, level, slot, *pte) {
                (0..slot).for_each(|slot| self.put_entry(level, slot, table[slot]));
                self.frame(mfn).tables = 0;
                return Err(errno);
            }
        }
        if level == 4 {
            for slot in XEN_SLOTS {
                self.set_word(mfn, slot, XEN_FRAME << PAGE_SHIFT | PRESENT | RW);
            }
        }
        self.mark_frame(id, mfn);
        Ok(())
    }

    /// Drops a reference as a table; with the last one it is ordinary memory again.
    pub(super) fn put_table(&mut self, mfn: u64) {
        let frame = self.frame(mfn);
        frame.tables -= 1;
        if frame.tables > 0 {
            return;
        }
        let (level, owner) = (frame.level, frame.owner);
        let table = self.memory.page(mfn);
        table.words().enumerate().for_each(|(slot, pte)| self.put_entry(level, slot, pte));
        self.mark_frame(owner.expect("an owner"), mfn);
    }

    fn get_entry(&mut self, id: u16, level: u8, slot: usize, pte: u64) -> Errno<()> {
        if pte & PRESENT == 0 || level == 4 && XEN_SLOTS.contains(&slot) {
            return Ok(());
        }
        let mfn = (pte & PTE_FRAME_MASK) >> PAGE_SHIFT;
        if level == 1 && self.granted.contains(&mfn) {
            return Ok(());
        }
        if !self.is_owned(id, mfn) {
            return Err(EINVAL);
        }
        match level {
            1 if pte & RW != 0 => self.get_writable(mfn),
            1 => Ok(()),
            _ if pte & SUPERPAGE != 0 => Err(EINVAL),
            _ => self.get_table(id, mfn, level - 1),
        }
    }

    fn put_entry(&mut self, level: u8, slot: usize, pte: u64) {
        let mfn = (pte & PTE_FRAME_MASK) >> PAGE_SHIFT;
        if pte & PRESENT == 0
            || level == 4 && XEN_SLOTS.contains(&slot)
            || level == 1 && (pte & RW == 0 || self.granted.contains(&mfn))
        {
            return;
        }
        if level == 1 {
            self.frame(mfn).writable -= 1;
        } else {
            self.put_table(mfn);
        }
    }

    pub(super) fn pin(&mut self, id: u16, level: u8, mfn: u64) -> Errno<()> {
        if self.is_owned(id, mfn) && self.frame(mfn).pinned {
            return Err(EINVAL);
        }
        self.get_table(id, mfn, level)?;
        self.frame(mfn).pinned = true;
        self.mark_frame(id, mfn);
        Ok(())
    }

    pub(super) fn unpin(&mut self, id: u16, mfn: u64) {
        self.frame(mfn).pinned = false;
        self.mark_frame(id, mfn);
        self.put_table(mfn);
    }

    /// The guest changes an entry of a table in use.
    pub(super) fn update_entry(&mut self, id: u16, mfn: u64, slot: usize, pte: u64) -> Errno<()> {
        let level = self.frame(mfn).level;
        assert!(self.frame(mfn).tables > 0, "an update of a table that is none");
        self.get_entry(id, level, slot, pte)?;
        self.put_entry(level, slot, self.word(mfn, slot));
        self.set_word(mfn, slot, pte);
        self.mark_frame(id, mfn);
        Ok(())
    }

    /// What `getpageframeinfo` says of a frame.
    pub(super) fn page_type(&self, id: u16, mfn: u64) -> PageType {
        match self.frames.get(mfn as usize).filter(|frame| frame.owner == Some(id)) {
            None => PageType::Invalid,
            Some(frame) if frame.special => PageType::Invalid,
            Some(frame) if frame.broken => PageType::Broken,
            Some(frame) if frame.tables > 0 => {
                PageType::Table { level: frame.level, pinned: frame.pinned }
            }
            Some(_) => PageType::Normal,
        }
    }

    pub(super) fn word(&self, mfn: u64, slot: usize) -> u64 {
        self.memory.word(mfn, slot)
    }

    /// Writes without marking: what Xen does, or a guest that is being built.
    pub(super) fn set_word(&mut self, mfn: u64, slot: usize, word: u64) {
        self.memory.set_word(mfn, slot, word);
    }

    /// A PV guest writes a word of its own ordinary memory.
    pub(super) fn guest_write(&mut self, id: u16, mfn: u64, slot: usize, word: u64) {
        assert_eq!(self.frame(mfn).tables, 0, "a guest wrote to a table in use");
        self.set_word(mfn, slot, word);
        self.mark_frame(id, mfn);
    }

    /// Log-dirty for a frame of a PV guest: by the m2p.
    pub(super) fn mark_frame(&mut self, id: u16, mfn: u64) {
        let pfn = self.memory.m2p(mfn);
        if !self.dom(id).hvm && pfn != INVALID_FRAME {
            self.mark(id, pfn);
        }
    }

    /// The errno that a call of `op` is to fail with now, if it is.
    pub(super) fn fault(&mut self, op: &str) -> Option<i32> {
        let mut fault = None;
        self.faults.retain_mut(|(name, succeed, errno)| {
            let due = *name == op && *succeed == 0;
            if due {
                fault = Some(*errno);
            } else if *name == op {
                *succeed -= 1;
            }
            !due
        });
        fault
    }

    pub(super) fn mark(&mut self, id: u16, pfn: u64) {
        if let Some(dirty) = &mut self.dom(id).dirty {
            dirty.insert(pfn);
        }
    }
}
