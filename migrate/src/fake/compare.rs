//! In what a restored domain differs from the suspended one.

use std::collections::HashMap;

use super::domain::FakeDomain;
use super::guest_pv::PvGuest;
use super::physmap::PhysMap;
use super::xen::Guest;
use crate::frame::{INVALID_FRAME, Mfn, PAGE_SHIFT, PAGE_SIZE, PageBuf, PageType, Pfn};
use crate::hypervisor::VcpuState;
use crate::target::{Options, Outcome};
use crate::x86::hvm;
use crate::x86::pv::{self, context, get_u32, get_u64, put, shared_info, start_info};

/// Compares all that a move has to preserve, and all that it has to set anew: a line for each
/// difference. `source` is suspended, `target` was restored with `options`, which gave `outcome`.
///
/// Memory that `source` gave back after it had been sent may still be there in `target`: neither
/// stream nor log-dirty can say so.
#[must_use]
pub fn compare(
    source: &FakeDomain,
    target: &FakeDomain,
    options: &Options,
    outcome: &Outcome,
) -> Vec<String> {
    let mut found = Found(Vec::new());
    for (name, host) in [("source", source.host()), ("target", target.host())] {
        found.check(host.mapped_pages() == 0, || format!("{name}: pages are still mapped"));
    }
    found.check(!source.is_logging(), || "source: log-dirty is still on".into());
    let guest = {
        let mut xen = source.host.lock();
        let guest = xen.dom(source.id.0).guest.take();
        found.check(guest.is_some(), || "source: there is no guest".into());
        guest
    };
    let both = Both { source, target, options, outcome };
    both.static_state(&mut found);
    match &guest {
        Some(Guest::Pv(guest)) => both.pv(guest, &mut found),
        Some(Guest::Hvm(_)) => both.hvm(&mut found),
        None => {}
    }
    source.host.lock().dom(source.id.0).guest = guest;
    found.0
}

struct Found(Vec<String>);

impl Found {
    fn check(&mut self, good: bool, what: impl FnOnce() -> String) {
        if !good {
            self.0.push(what());
        }
    }
}

struct Both<'a> {
    source: &'a FakeDomain,
    target: &'a FakeDomain,
    options: &'a Options,
    outcome: &'a Outcome,
}

/// What belongs to one domain; its pages are read as they are asked for. Two domains of one host
/// can be compared.
struct Image<'a> {
    domain: &'a FakeDomain,
    /// pfn to mfn.
    p2m: PhysMap,
    shared_info: u64,
    shared_page: Box<PageBuf>,
    vcpus: Vec<Option<VcpuState>>,
}

impl Image<'_> {
    /// `p2m`: pfn and mfn of all of its memory.
    fn of(domain: &FakeDomain, p2m: PhysMap) -> Image<'_> {
        let mut xen = domain.host.lock();
        let shared_info = xen.dom(domain.id.0).shared_info;
        let shared_page = xen.memory.page(shared_info);
        let vcpus = xen.dom(domain.id.0).vcpus.clone();
        Image { domain, p2m, shared_info, shared_page, vcpus }
    }

    /// With the memory that Xen knows of: all of a translated domain's, and what a PV domain was
    /// populated with.
    fn populated(domain: &FakeDomain) -> Image<'_> {
        let p2m = domain.host.lock().dom(domain.id.0).physmap.clone();
        Image::of(domain, p2m)
    }

    fn mfn(&self, pfn: u64) -> u64 {
        self.p2m.get(pfn).unwrap_or(INVALID_FRAME)
    }

    fn page(&self, pfn: u64) -> Option<(PageType, Box<PageBuf>)> {
        let mfn = self.p2m.get(pfn)?;
        let xen = self.domain.host.lock();
        Some((xen.page_type(self.domain.id.0, mfn), xen.memory.page(mfn)))
    }

    /// The pfn of a frame of it, from the m2p.
    fn pfn(&self, mfn: u64) -> Option<u64> {
        let pfn = self.domain.host.lock().memory.m2p(mfn);
        (self.p2m.get(pfn) == Some(mfn)).then_some(pfn)
    }
}

impl Both<'_> {
    fn static_state(&self, found: &mut Found) {
        let state = |domain: &FakeDomain| {
            let mut xen = domain.host.lock();
            let domain = xen.dom(domain.id.0);
            (domain.policy.clone(), domain.tsc, domain.context.clone())
        };
        let (source, target) = (state(self.source), state(self.target));
        found.check(source.0 == target.0, || "the CPU policy differs".into());
        found.check(source.1 == target.1, || "the TSC differs".into());
        found.check(source.2 == target.2, || "the HVM context differs".into());
        let grants = {
            let mut xen = self.target.host.lock();
            let table = xen.dom(self.target.id.0).grant_table;
            [0, 1].map(|slot| xen.word(table, slot))
        };
        let wanted = [
            (self.outcome.console_frame, self.options.console_domid),
            (self.outcome.store_frame, self.options.store_domid),
        ];
        // GTF_permit_access, the domain, the frame.
        let wanted = wanted.map(|(frame, domain)| 1 | u64::from(domain.0) << 16 | frame << 32);
        found.check(grants == wanted, || format!("grants {grants:x?}, wanted {wanted:x?}"));
    }

    fn hvm(&self, found: &mut Found) {
        let (source, target) = (Image::populated(self.source), Image::populated(self.target));
        let params = |domain: &FakeDomain| domain.host.lock().dom(domain.id.0).params.clone();
        let mut wanted = params(self.source);
        let cleared = [hvm::STORE_PFN, hvm::CONSOLE_PFN, hvm::IOREQ_PFN, hvm::BUFIOREQ_PFN]
            .map(|index| wanted.get(&index).copied());
        let pages = source.p2m.iter().filter_map(|(gfn, _)| Some((gfn, source.page(gfn)?)));
        for (gfn, (_, page)) in pages.filter(|(_, (kind, _))| kind.has_data()) {
            let Some((_, there)) = target.page(gfn) else {
                found.0.push(format!("gfn {gfn:#x} is missing"));
                continue;
            };
            let page = if cleared.contains(&Some(gfn)) { PageBuf::zeroed() } else { page };
            found.check(page.0 == there.0, || format!("gfn {gfn:#x} differs"));
        }
        wanted.remove(&hvm::PAE_ENABLED);
        wanted.insert(hvm::STORE_EVTCHN, self.options.store_evtchn.into());
        wanted.insert(hvm::CONSOLE_EVTCHN, self.options.console_evtchn.into());
        let there = params(self.target);
        found.check(there == wanted, || format!("params {there:?}, wanted {wanted:?}"));
        let rings = [Some(self.outcome.store_frame), Some(self.outcome.console_frame)];
        found.check(rings == cleared[..2], || format!("the rings are said to be at {rings:?}"));
    }

    fn pv(&self, guest: &PvGuest, found: &mut Found) {
        let valid = (0..).zip(&guest.p2m).filter(|(_, mfn)| **mfn != INVALID_FRAME);
        let source = Image::of(self.source, valid.map(|(pfn, mfn)| (pfn, *mfn)).collect());
        let target = Image::populated(self.target);
        let leaves: HashMap<u64, usize> = guest.leaves.iter().copied().zip(0..).collect();
        let pages = source.p2m.iter().filter_map(|(pfn, _)| Some((pfn, source.page(pfn)?)));
        for (pfn, (kind, mut page)) in pages {
            let Some((there_kind, mut there)) = target.page(pfn) else {
                found.0.push(format!("pfn {pfn:#x} ({kind:?}) is missing"));
                continue;
            };
            found.check(kind == there_kind, || {
                format!("pfn {pfn:#x} is {there_kind:?}, was {kind:?}")
            });
            if let Some(leaf) = leaves.get(&pfn) {
                expect_leaf(&mut page, *leaf, &target);
            } else if pfn == guest.start_info {
                self.expect_start_info(&mut page, &there, guest, &target);
            } else if let (Some(level), Some(_)) = (kind.table_level(), there_kind.table_level()) {
                let good =
                    normalise(level, &mut page, &source) && normalise(level, &mut there, &target);
                found.check(good, || format!("table {pfn:#x} refers to foreign frames"));
            }
            found.check(page.0 == there.0, || format!("pfn {pfn:#x} ({kind:?}) differs"));
        }
        compare_vcpus(&source, &target, found);
        compare_shared_info(&source, &target, found);
        let rings = [self.outcome.store_frame, self.outcome.console_frame];
        let wanted = [target.mfn(guest.store), target.mfn(guest.console)];
        found.check(rings == wanted, || format!("the rings are said to be at {rings:?}"));
    }

    /// Makes `page`, the source's start info page, what the target's should be.
    fn expect_start_info(
        &self,
        page: &mut PageBuf,
        there: &PageBuf,
        guest: &PvGuest,
        target: &Image<'_>,
    ) {
        // The size of the p2m is the source's to decide, but not below what is in use.
        let pages = get_u64(&there.0, start_info::NR_PAGES).unwrap_or(0);
        for (offset, word) in [
            (start_info::NR_PAGES, pages.max(guest.p2m.len() as u64)),
            (start_info::SHARED_INFO, target.shared_info << PAGE_SHIFT),
            (start_info::STORE_MFN, target.mfn(guest.store)),
            (start_info::CONSOLE_MFN, target.mfn(guest.console)),
        ] {
            put(&mut page.0, offset, &word.to_le_bytes());
        }
        for (offset, word) in [
            (start_info::FLAGS, 0),
            (start_info::STORE_EVTCHN, self.options.store_evtchn),
            (start_info::CONSOLE_EVTCHN, self.options.console_evtchn),
        ] {
            put(&mut page.0, offset, &word.to_le_bytes());
        }
    }
}

/// Makes `page` leaf `leaf` of the target's p2m.
fn expect_leaf(page: &mut PageBuf, leaf: usize, target: &Image<'_>) {
    for slot in 0..512 {
        let mfn = target.mfn((leaf * 512 + slot) as u64);
        put(&mut page.0, slot * 8, &mfn.to_le_bytes());
    }
}

fn normalise(level: u8, table: &mut PageBuf, of: &Image<'_>) -> bool {
    pv::normalise(level, table, |mfn: Mfn| of.pfn(mfn.0).map(Pfn)).is_ok()
}

fn compare_vcpus(source: &Image<'_>, target: &Image<'_>, found: &mut Found) {
    found.check(source.vcpus.len() == target.vcpus.len(), || "vCPUs are missing".into());
    for (id, (was, is)) in source.vcpus.iter().zip(&target.vcpus).enumerate() {
        let in_pfns = |state: &Option<VcpuState>, of: &Image<'_>| {
            state.as_ref().map(|state| VcpuState {
                basic: context_in_pfns(&state.basic, id == 0, of),
                ..state.clone()
            })
        };
        let mut was = in_pfns(was, source);
        if let Some(state) = &mut was {
            let flags = get_u32(&state.basic, context::FLAGS).unwrap() | context::FLAG_ONLINE;
            put(&mut state.basic, context::FLAGS, &flags.to_le_bytes());
        }
        found.check(was == in_pfns(is, target), || format!("vCPU {id} differs"));
    }
}

/// A context with pfns for mfns; a frame that is not the domain's becomes all ones.
fn context_in_pfns(basic: &[u8], boot: bool, of: &Image<'_>) -> Vec<u8> {
    let mut basic = basic.to_vec();
    let entries = get_u64(&basic, context::GDT_ENTRIES).unwrap();
    let gdt = (0..entries.div_ceil(512) as usize).map(|slot| (context::GDT_FRAMES + 8 * slot, 0));
    let start = boot.then_some((context::START_INFO, 0));
    let user = get_u64(&basic, context::CR1).unwrap() != 0;
    let user = user.then_some((context::CR1, PAGE_SHIFT));
    let fields = gdt.chain(start).chain(user).chain([(context::CR3, PAGE_SHIFT)]);
    for (offset, shift) in fields.collect::<Vec<_>>() {
        let mfn = get_u64(&basic, offset).unwrap() >> shift;
        let pfn = of.pfn(mfn).unwrap_or(INVALID_FRAME);
        put(&mut basic, offset, &pfn.to_le_bytes());
    }
    basic
}

fn compare_shared_info(source: &Image<'_>, target: &Image<'_>, found: &mut Found) {
    let mut wanted = [0; PAGE_SIZE];
    for range in [shared_info::VCPU_INFO, shared_info::ARCH] {
        wanted[range.clone()].copy_from_slice(&source.shared_page.0[range]);
    }
    for vcpu in shared_info::VCPU_INFO.step_by(shared_info::VCPU_INFO_BYTES) {
        put(&mut wanted, vcpu + shared_info::PENDING_SEL, &[0; 8]);
    }
    put(&mut wanted, shared_info::FRAME_LIST_LIST, &[0; 8]);
    wanted[shared_info::EVTCHN_MASK].fill(0xff);
    found.check(wanted == target.shared_page.0, || "the shared info page differs".into());
}
