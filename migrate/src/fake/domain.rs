//! One domain of a host as tests handle it, and the traits of [`crate::hypervisor`] on it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

use super::guest_hvm::HvmGuest;
use super::guest_pv::PvGuest;
use super::host::Host;
use super::pages::FakePages;
use super::xen::{E2BIG, EACCES, EBUSY, EEXIST, EINVAL, ENOMEM, ESRCH, Errno, Guest, Xen};
use crate::bitmap::PageBitmap;
use crate::frame::{DomId, INVALID_FRAME, Mfn, PAGE_SHIFT, PageBuf, PageType, Pfn, WORDS_PER_PAGE};
use crate::hypervisor::{
    Access, BATCH_PAGES_MAX, CpuCap, CpuPolicy, Domain, DomainInfo, HvError, HvResult, PolicyError,
    SHUTDOWN_SUSPEND, SourceDomain, TargetDomain, TscInfo, VcpuState,
};
use crate::x86::pv::{VCPU_CONTEXT_BYTES, context, get_u64, put, shared_info};

/// Parts of a [`VcpuState`] that have a hypercall of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuPart {
    /// [`VcpuState::extended`].
    Extended,
    /// [`VcpuState::xsave`].
    Xsave,
    /// [`VcpuState::msrs`].
    Msrs,
}

/// One domain of a [`Host`]. Clones are the same domain.
#[derive(Clone, Debug)]
pub struct FakeDomain {
    pub(super) host: Host,
    pub(super) id: DomId,
}

impl FakeDomain {
    pub(super) fn new(host: &Host, id: DomId) -> FakeDomain {
        FakeDomain { host: host.clone(), id }
    }

    /// Its host.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The guest makes ready and is suspended.
    pub fn suspend(&self) {
        let mut xen = self.host.lock();
        xen.with_guest(self.id.0, |xen, guest| {
            if let Guest::Pv(guest) = guest {
                guest.suspend(xen);
            }
        });
        xen.dom(self.id.0).shutdown = Some(SHUTDOWN_SUSPEND);
    }

    /// Fills the guest's ordinary pages: `content` is called for each with its number, and gives
    /// what is to be in it, or nothing if it is to stay as it is. Log-dirty does not see it.
    pub fn fill(&self, mut content: impl FnMut(u64) -> Option<Box<PageBuf>>) {
        let mut xen = self.host.lock();
        xen.with_guest(self.id.0, |xen, guest| {
            let (Guest::Pv(PvGuest { data, .. }) | Guest::Hvm(HvmGuest { data, .. })) = guest;
            let mut pages = data.clone();
            pages.sort_unstable();
            for pfn in pages {
                if let (Some(mfn), Some(page)) = (self.mfn(xen, guest, pfn), content(pfn)) {
                    xen.memory.set_page(mfn, &page);
                }
            }
        });
    }

    /// The guest writes a word of one of its ordinary pages, if it runs.
    pub fn write(&self, pfn: u64, slot: usize, word: u64) {
        let mut xen = self.host.lock();
        let domain = xen.dom(self.id.0);
        if domain.paused || domain.shutdown.is_some() {
            return;
        }
        xen.with_guest(self.id.0, |xen, guest| {
            if let Some(mfn) = self.mfn(xen, guest, pfn) {
                xen.set_word(mfn, slot % WORDS_PER_PAGE, word);
                xen.mark(self.id.0, pfn);
            }
        });
    }

    fn mfn(&self, xen: &mut Xen, guest: &Guest, pfn: u64) -> Option<u64> {
        match guest {
            Guest::Pv(guest) => Some(guest.mfn(pfn)),
            Guest::Hvm(_) => xen.dom(self.id.0).physmap.get(pfn),
        }
    }

    /// The device model reports what it writes, or no longer does.
    pub fn set_qemu_log_dirty(&self, on: bool) {
        self.host.lock().dom(self.id.0).qemu_log_dirty = on;
    }

    /// Whether log-dirty is on, in Xen or in the device model.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        let mut xen = self.host.lock();
        let domain = xen.dom(self.id.0);
        domain.dirty.is_some() || domain.qemu_log_dirty
    }

    /// Log-dirty cannot be switched on (a PCI device, no shadow paging).
    pub fn forbid_log_dirty(&self) {
        self.host.lock().dom(self.id.0).no_log_dirty = true;
    }

    /// The guest replaces a part of its linear p2m.
    pub fn move_p2m(&self) {
        let mut xen = self.host.lock();
        let mfn = xen.dom(self.id.0).shared_info;
        let generation = xen.word(mfn, shared_info::P2M_GENERATION / 8);
        xen.set_word(mfn, shared_info::P2M_GENERATION / 8, generation + 1);
    }

    /// A PV guest maps a page of somebody else's and does not let go of it to be suspended.
    pub fn hold_grant(&self) {
        self.host.lock().with_guest(self.id.0, |xen, guest| {
            if let Guest::Pv(guest) = guest {
                guest.hold_grant(xen);
            }
        });
    }

    /// From now on the guest does nothing by itself: what it does is the caller's to say.
    pub fn take_over(&self) {
        self.host.lock().dom(self.id.0).guest = None;
    }

    /// Puts `word` into a machine frame of a PV domain, past all checks: a page table may hold
    /// anything when its type was asked for a moment ago. Frames of others are left alone.
    pub fn poke(&self, mfn: Mfn, slot: usize, word: u64) {
        let mut xen = self.host.lock();
        if xen.is_owned(self.id.0, mfn.0) {
            xen.set_word(mfn.0, slot % WORDS_PER_PAGE, word);
            xen.mark_frame(self.id.0, mfn.0);
        }
    }

    /// Puts `word` into the context of a PV vCPU, if it is online and the context that long.
    pub fn poke_vcpu(&self, vcpu: usize, offset: usize, word: u64) {
        let mut xen = self.host.lock();
        if let Some(Some(state)) = xen.dom(self.id.0).vcpus.get_mut(vcpu) {
            put(&mut state.basic, offset, &word.to_le_bytes());
        }
    }

    /// A digest of all that is in its memory, where, and of which types.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut xen = self.host.lock();
        let mut hasher = DefaultHasher::new();
        xen.dom(self.id.0).physmap.iter().for_each(|pair| pair.hash(&mut hasher));
        for mfn in (0..xen.frames.len() as u64).filter(|mfn| xen.is_owned(self.id.0, *mfn)) {
            (mfn, xen.page_type(self.id.0, mfn)).hash(&mut hasher);
            hasher.write(&xen.memory.page(mfn).0);
        }
        hasher.finish()
    }

    /// The machine frame that `pfn` was populated with.
    #[must_use]
    pub fn populated_with(&self, pfn: Pfn) -> Option<Mfn> {
        self.host.lock().dom(self.id.0).physmap.get(pfn.0).map(Mfn)
    }

    /// Extents of 2 MiB that it was given.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.host.lock().dom(self.id.0).extents
    }

    /// Maps those of `frames` that can be mapped, and says of each why it cannot (an errno, or
    /// 0). An access to a page that is not there is a bug and panics.
    ///
    /// # Errors
    /// The call as a whole fails.
    pub fn map_each(&self, frames: &[u64], access: Access) -> HvResult<(FakePages, Vec<i32>)> {
        self.call("map", |xen| {
            let mut map = |frame: &u64| {
                let mfn = self.machine_frame(xen, *frame)?;
                if let Some(errno) = xen.fault("map_page") {
                    return Err(errno);
                }
                let stale = (access == Access::Read).then(|| xen.map_stale(self.id.0, mfn));
                match stale.flatten() {
                    Some(stale) => Ok(stale),
                    None => xen.map(self.id.0, mfn, access == Access::ReadWrite).map(|()| mfn),
                }
            };
            let mapped: Vec<Errno<u64>> = frames.iter().map(&mut map).collect();
            let errors = mapped.iter().map(|mfn| mfn.err().unwrap_or(0)).collect();
            let mfns = mapped.into_iter().map(Result::ok).collect();
            Ok((FakePages::of(&self.host, mfns, access), errors))
        })
    }

    /// The frame of its grant table (`XENMEM_acquire_resource`).
    ///
    /// # Errors
    /// There is no such domain.
    pub fn grant_table(&self) -> HvResult<Mfn> {
        self.call("grant_table", |xen| Ok(Mfn(xen.dom(self.id.0).grant_table)))
    }

    /// Loads a part of a vCPU that [`TargetDomain::set_vcpu`] has loaded the rest of, as a
    /// hypercall of its own does.
    ///
    /// # Errors
    /// There is no such vCPU, or it has no context yet.
    pub fn set_vcpu_part(&self, id: u32, part: VcpuPart, bytes: &[u8]) -> HvResult<()> {
        self.call("set_vcpu_part", |xen| {
            let vcpu = xen.dom(self.id.0).vcpus.get_mut(id as usize).and_then(Option::as_mut);
            let vcpu = vcpu.ok_or(EINVAL)?;
            let place = match part {
                VcpuPart::Extended => &mut vcpu.extended,
                VcpuPart::Xsave => &mut vcpu.xsave,
                VcpuPart::Msrs => &mut vcpu.msrs,
            };
            *place = bytes.to_vec();
            Ok(())
        })
    }

    /// The frame behind a frame number of this domain, which is a gfn or an mfn.
    fn machine_frame(&self, xen: &mut Xen, frame: u64) -> Errno<u64> {
        let domain = xen.dom(self.id.0);
        if domain.hvm { domain.physmap.get(frame).ok_or(EINVAL) } else { Ok(frame) }
    }

    /// Notes the call, lets guests run, and does what it is to do unless it is to fail.
    fn call<T>(&self, op: &'static str, act: impl FnOnce(&mut Xen) -> Errno<T>) -> HvResult<T> {
        let mut xen = self.host.lock();
        xen.calls.push((self.id.0, op));
        xen.tick();
        let done = match xen.fault(op) {
            Some(errno) => Err(errno),
            None if !xen.domains.contains_key(&self.id.0) => Err(ESRCH),
            None => act(&mut xen),
        };
        done.map_err(|errno| HvError { op, source: io::Error::from_raw_os_error(errno) })
    }
}

impl Domain for FakeDomain {
    type Pages = FakePages;

    fn domid(&self) -> DomId {
        self.id
    }

    fn xen_version(&self) -> HvResult<(u32, u32)> {
        self.call("xen_version", |_| Ok((4, 17)))
    }

    fn info(&self) -> HvResult<DomainInfo> {
        self.call("info", |xen| {
            let domain = xen.dom(self.id.0);
            Ok(DomainInfo {
                hvm: domain.hvm,
                paused: domain.paused,
                shutdown: domain.shutdown,
                dying: false,
                total_pages: domain.total_pages,
                shared_info_mfn: domain.shared_info,
                max_vcpu_id: (domain.vcpus.len() as u32).saturating_sub(1),
            })
        })
    }

    fn maximum_gpfn(&self) -> HvResult<u64> {
        self.call("maximum_gpfn", |xen| Ok(xen.dom(self.id.0).max_gfn))
    }

    fn address_bits(&self) -> HvResult<u32> {
        self.call("address_bits", |xen| Ok(xen.dom(self.id.0).address_bits))
    }

    fn map(&self, frames: &[u64], access: Access) -> HvResult<FakePages> {
        let (pages, errors) = self.map_each(frames, access)?;
        match errors.into_iter().find(|errno| *errno != 0) {
            None => Ok(pages),
            Some(errno) => Err(HvError { op: "map", source: io::Error::from_raw_os_error(errno) }),
        }
    }

    fn map_m2p(&self) -> HvResult<FakePages> {
        self.call("map_m2p", |_| Ok(FakePages::m2p(&self.host)))
    }
}

impl SourceDomain for FakeDomain {
    fn log_dirty_on(&self) -> HvResult<()> {
        self.call("log_dirty_on", |xen| {
            let domain = xen.dom(self.id.0);
            if domain.dirty.is_some() || domain.no_log_dirty {
                return Err(EINVAL);
            }
            domain.dirty = Some(Default::default());
            Ok(())
        })
    }

    fn log_dirty_off(&self) -> HvResult<()> {
        self.call("log_dirty_off", |xen| {
            xen.dom(self.id.0).dirty = None;
            Ok(())
        })
    }

    fn log_dirty_clean(&self, bitmap: &mut PageBitmap, last: bool) -> HvResult<()> {
        self.call("log_dirty_clean", |xen| {
            let domain = xen.dom(self.id.0);
            let mut dirty = std::mem::take(domain.dirty.as_mut().ok_or(EINVAL)?);
            if last {
                dirty.extend(&domain.written_by_xen);
            }
            xen.forgotten_clean = match xen.forgotten_clean {
                Some(0) => {
                    dirty.clear();
                    None
                }
                later => later.map(|readings| readings - 1),
            };
            dirty.iter().for_each(|pfn| bitmap.set(Pfn(*pfn)));
            Ok(())
        })
    }

    fn cpu_cap(&self) -> HvResult<CpuCap> {
        self.call("cpu_cap", |xen| Ok(CpuCap(xen.dom(self.id.0).cpu_cap)))
    }

    fn set_cpu_cap(&self, cap: CpuCap) -> HvResult<()> {
        self.call("set_cpu_cap", |xen| {
            xen.dom(self.id.0).cpu_cap = cap.0;
            Ok(())
        })
    }

    fn page_types(&self, frames: &[u64]) -> HvResult<Vec<PageType>> {
        self.call("page_types", |xen| {
            if frames.len() > BATCH_PAGES_MAX {
                return Err(E2BIG);
            }
            let kind = |frame: &u64| match self.machine_frame(xen, *frame) {
                Ok(mfn) => xen.page_type(self.id.0, mfn),
                Err(_) => PageType::Invalid,
            };
            Ok(frames.iter().map(kind).collect())
        })
    }

    fn tsc_info(&self) -> HvResult<TscInfo> {
        self.call("tsc_info", |xen| Ok(xen.dom(self.id.0).tsc))
    }

    fn cpu_policy(&self) -> HvResult<CpuPolicy> {
        self.call("cpu_policy", |xen| Ok(xen.dom(self.id.0).policy.clone()))
    }

    fn hvm_context(&self) -> HvResult<Vec<u8>> {
        self.call("hvm_context", |xen| Ok(xen.dom(self.id.0).context.clone()))
    }

    fn hvm_param(&self, index: u32) -> HvResult<u64> {
        self.call("hvm_param", |xen| {
            Ok(xen.dom(self.id.0).params.get(&index).copied().unwrap_or(0))
        })
    }

    fn vcpu(&self, id: u32) -> HvResult<Option<VcpuState>> {
        self.call("vcpu", |xen| xen.dom(self.id.0).vcpus.get(id as usize).cloned().ok_or(EINVAL))
    }
}

/// Most vCPU state, HVM parameters and page tables are taken as they are: a guest of its own
/// making could have them. What Xen refuses is refused.
impl TargetDomain for FakeDomain {
    fn populate(&self, pfns: &[Pfn], order: u32) -> HvResult<Vec<u64>> {
        self.call("populate", |xen| {
            let mut frames = Vec::new();
            let mut owners = Vec::new();
            let mut extents = pfns.iter().map(|pfn| {
                let frame = populate_extent(xen, self.id.0, pfn.0, order, &mut owners)?;
                frames.push(frame);
                Ok(())
            });
            let failed = extents.find_map(Result::err);
            xen.memory.set_m2p_entries(&owners);
            match failed {
                None | Some(ENOMEM) => Ok(frames),
                Some(errno) => Err(errno),
            }
        })
    }

    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), PolicyError> {
        let refused = self.call("set_cpu_policy", |xen| {
            let leaves = policy.leaves.as_chunks::<24>().0.iter();
            let mut leaves = leaves.map(|leaf| get_u64(leaf, 0).unwrap_or(0));
            let refused = leaves.find(|leaf| Some(*leaf as u32) == xen.refused_leaf);
            let mut given = policy.clone();
            let lacking = xen.lacking.map(u32::to_le_bytes);
            for leaf in given.leaves.as_chunks_mut::<24>().0 {
                if lacking.is_some_and(|lacking| leaf.starts_with(&lacking)) {
                    leaf[20..].fill(0);
                }
            }
            xen.dom(self.id.0).policy = given;
            Ok(refused)
        })?;
        match refused {
            Some(leaf) => {
                let (leaf, subleaf) = (leaf as u32, (leaf >> 32) as u32);
                Err(PolicyError::Refused { leaf, subleaf, msr: u32::MAX })
            }
            None => Ok(()),
        }
    }

    fn set_tsc_info(&self, tsc: &TscInfo) -> HvResult<()> {
        self.call("set_tsc_info", |xen| {
            xen.dom(self.id.0).tsc = *tsc;
            Ok(())
        })
    }

    fn set_hvm_context(&self, context: &[u8]) -> HvResult<()> {
        self.call("set_hvm_context", |xen| {
            xen.dom(self.id.0).context = context.to_vec();
            Ok(())
        })
    }

    fn set_hvm_param(&self, index: u32, value: u64) -> HvResult<()> {
        self.call("set_hvm_param", |xen| {
            xen.dom(self.id.0).params.insert(index, value);
            Ok(())
        })
    }

    fn set_address_bits(&self, bits: u32) -> HvResult<()> {
        self.call("set_address_bits", |xen| {
            let domain = xen.dom(self.id.0);
            if domain.total_pages > 0 {
                return Err(EACCES);
            }
            domain.address_bits = bits;
            Ok(())
        })
    }

    fn set_vcpu(&self, id: u32, state: &VcpuState) -> HvResult<()> {
        self.call("set_vcpu", |xen| {
            let exists = (id as usize) < xen.dom(self.id.0).vcpus.len();
            if !exists || state.basic.len() != VCPU_CONTEXT_BYTES {
                return Err(EINVAL);
            }
            let word = |offset| get_u64(&state.basic, offset).unwrap_or(0);
            let gdt_frames = word(context::GDT_ENTRIES).div_ceil(context::GDT_ENTRIES_PER_FRAME);
            for index in 0..gdt_frames as usize {
                xen.get_gdt(self.id.0, word(context::GDT_FRAMES + 8 * index))?;
            }
            xen.get_table(self.id.0, word(context::CR3) >> PAGE_SHIFT, 4)?;
            if word(context::CR1) != 0 {
                xen.get_table(self.id.0, word(context::CR1) >> PAGE_SHIFT, 4)?;
            }
            xen.dom(self.id.0).vcpus[id as usize] = Some(state.clone());
            Ok(())
        })
    }

    fn pin_tables(&self, tables: &[(u8, u64)]) -> HvResult<()> {
        self.call("pin_tables", |xen| {
            tables.iter().try_for_each(|(level, mfn)| xen.pin(self.id.0, *level, *mfn))
        })
    }

    fn seed_grants(&self, console: (u64, DomId), xenstore: (u64, DomId)) -> HvResult<()> {
        self.call("seed_grants", |xen| {
            for (frame, _) in [console, xenstore].into_iter().filter(|g| g.0 != INVALID_FRAME) {
                let mfn = self.machine_frame(xen, frame)?;
                if !xen.is_owned(self.id.0, mfn) {
                    return Err(EINVAL);
                }
            }
            let table = xen.dom(self.id.0).grant_table;
            for (slot, (frame, domid)) in [console, xenstore].into_iter().enumerate() {
                if xen.word(table, slot) != 0 {
                    return Err(EBUSY);
                }
                // GTF_permit_access, the domain, the frame.
                let entry = 1 | u64::from(domid.0) << 16 | frame << 32;
                if frame != INVALID_FRAME && domid != self.id {
                    xen.set_word(table, slot, entry);
                }
            }
            Ok(())
        })
    }
}

/// Gives memory to an extent, which exists whole or not at all. For the table of owners, the
/// pairs of mfn and pfn are added to `owners`.
fn populate_extent(
    xen: &mut Xen,
    id: u16,
    pfn: u64,
    order: u32,
    owners: &mut Vec<(u64, u64)>,
) -> Errno<u64> {
    let size = 1 << order;
    if !pfn.is_multiple_of(size) {
        return Err(EINVAL);
    }
    if order > 0 && (xen.fragmented || xen.room(id) < size) {
        return Err(ENOMEM);
    }
    let pages = (pfn..pfn + size).map(|pfn| populate_page(xen, id, pfn, owners));
    let pages: Errno<Vec<u64>> = pages.collect();
    xen.dom(id).extents += u64::from(order == 9);
    Ok(pages?[0])
}

/// Gives `pfn` memory, which it must not have yet.
fn populate_page(xen: &mut Xen, id: u16, pfn: u64, owners: &mut Vec<(u64, u64)>) -> Errno<u64> {
    if xen.dom(id).physmap.get(pfn).is_some() {
        return Err(EEXIST);
    }
    let mfn = xen.allocate(id)?;
    let domain = xen.dom(id);
    domain.physmap.insert(pfn, mfn);
    if domain.hvm {
        domain.max_gfn = domain.max_gfn.max(pfn);
        return Ok(pfn);
    }
    owners.push((mfn, pfn));
    Ok(mfn)
}
