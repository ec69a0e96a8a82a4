//! 64-bit PV guests: their records, localising page tables, and what has to happen at the end.
//!
//! The end has an order: contexts of vCPUs, pins, the p2m in the guest's own memory, grants. The
//! hypervisor validates page tables in the first two steps, and a frame that is mapped writable
//! here would fail that; so no mapping of any page outlives the function that made it.

use std::collections::BTreeMap;

use crate::error::{Error, GuestError, Result};
use crate::frame::{Mfn, PAGE_SIZE, PageBuf, PageType, Pfn};
use crate::hypervisor::{
    Access, BATCH_PAGES_MAX, DomainInfo, ForeignPages, TargetDomain, VcpuState,
};
use crate::stream::FormatError;
use crate::stream::libxc::{P2mFrames, PageEntry, RecordKind, parse_vcpu};
use crate::target::driver::{Options, Outcome};
use crate::target::guest::Guest;
use crate::target::memory::{self, NO_MEMORY};
use crate::target::p2m::P2m;
use crate::target::vcpu;
use crate::x86::pv::{P2M_ENTRIES_PER_FRAME, localise, referenced, shared_info};

/// A PV guest that is being received.
pub(super) struct Pv<'a, D: TargetDomain> {
    domain: &'a D,
    info: DomainInfo,
    p2m: P2m<D::Pages>,
    /// pfns of the frames where the guest keeps its p2m.
    p2m_frames: Vec<Pfn>,
    vcpus: BTreeMap<u32, VcpuState>,
    has_shared_info: bool,
}

impl<'a, D: TargetDomain> Pv<'a, D> {
    pub(super) fn new(domain: &'a D, info: DomainInfo) -> Result<Self> {
        Ok(Pv {
            domain,
            info,
            p2m: P2m::new(domain.map_m2p()?),
            p2m_frames: Vec::new(),
            vcpus: BTreeMap::new(),
            has_shared_info: false,
        })
    }

    fn set_width(&self, body: &[u8]) -> Result<()> {
        match body {
            [8, 4, _, _, _, _, _, _] => {}
            [4, 3, _, _, _, _, _, _] => {
                return Err(Error::Unsupported("the stream holds a 32-bit PV guest"));
            }
            _ => return Err(content(RecordKind::X86PvInfo, "a width that no guest has")),
        }
        if self.domain.address_bits()? != 64 {
            self.domain.set_address_bits(64)?;
        }
        Ok(())
    }

    /// Makes room for the pfns that the record covers; a later record may only extend the range.
    fn set_p2m_frames(&mut self, body: &[u8]) -> Result<()> {
        let kind = RecordKind::X86PvP2mFrames;
        let P2mFrames { start, end, frames } = P2mFrames::parse(body)?;
        let first = Pfn(start.0 / P2M_ENTRIES_PER_FRAME).index();
        let first = first.filter(|first| *first <= self.p2m_frames.len());
        let first = first.ok_or(content(kind, "it leaves out the start of the p2m"))?;
        let old = first..self.p2m_frames.len().min(first + frames.len());
        self.p2m_frames.splice(old, frames);
        self.p2m.grow(end.0 + 1);
        Ok(())
    }

    fn keep_vcpu(&mut self, kind: RecordKind, body: &[u8]) -> Result<()> {
        let (id, state) = parse_vcpu(kind, body)?;
        if id > self.info.max_vcpu_id {
            return Err(content(kind, "it is for a vCPU that the domain does not have"));
        }
        let vcpu = self.vcpus.entry(id).or_default();
        let part = match kind {
            RecordKind::X86PvVcpuBasic => &mut vcpu.basic,
            RecordKind::X86PvVcpuExtended => &mut vcpu.extended,
            RecordKind::X86PvVcpuXsave => &mut vcpu.xsave,
            _ => &mut vcpu.msrs,
        };
        *part = state.to_vec();
        Ok(())
    }

    /// Carries over what the shared info page holds of the guest's own: nothing of events, which
    /// it sets up again.
    fn set_shared_info(&mut self, body: &[u8]) -> Result<()> {
        if body.len() != PAGE_SIZE {
            return Err(content(RecordKind::SharedInfo, "not a page"));
        }
        let shared = self.domain.map(&[self.info.shared_info_mfn], Access::ReadWrite)?;
        let mut page = PageBuf::zeroed();
        shared.read_page(0, &mut page);
        copy(&mut page.0, body, shared_info::VCPU_INFO);
        copy(&mut page.0, body, shared_info::ARCH);
        for vcpu in shared_info::VCPU_INFO.step_by(shared_info::VCPU_INFO_BYTES) {
            fill(&mut page.0, vcpu + shared_info::PENDING_SEL, 8, 0);
        }
        fill(&mut page.0, shared_info::FRAME_LIST_LIST, 8, 0);
        fill(&mut page.0, shared_info::EVTCHN_PENDING.start, shared_info::EVTCHN_PENDING.len(), 0);
        fill(&mut page.0, shared_info::EVTCHN_MASK.start, shared_info::EVTCHN_MASK.len(), 0xff);
        shared.write_page(0, &page);
        self.has_shared_info = true;
        Ok(())
    }

    /// Gives memory to those of `pfns`, which page tables refer to, that have none.
    fn give_memory(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<()> {
        let mut missing = Vec::new();
        for pfn in pfns {
            if pfn.0 >= self.p2m.end() {
                let why = "a page table refers to a page outside of the guest's p2m";
                return Err(content(RecordKind::PageData, why));
            }
            if self.p2m.mfn(pfn).is_none() {
                missing.push(pfn);
            }
        }
        self.populate(missing.into_iter())
    }

    /// Writes the new p2m over the old one in the guest's memory.
    fn write_p2m(&self) -> Result<()> {
        let mut done = 0;
        for pfns in self.p2m_frames.chunks(BATCH_PAGES_MAX) {
            let mfns = pfns.iter().map(|pfn| normal_mfn(&self.p2m, *pfn, "p2m frame"));
            let mfns: Vec<u64> = mfns.map(|mfn| Ok(mfn?.0)).collect::<Result<_>>()?;
            let pages = self.domain.map(&mfns, Access::ReadWrite)?;
            for index in 0..pfns.len() {
                pages.write_page(index, &self.p2m.leaf_page(done + index));
            }
            done += pfns.len();
        }
        Ok(())
    }
}

impl<D: TargetDomain> Guest for Pv<'_, D> {
    fn check(&self, entry: &PageEntry) -> Result<()> {
        if entry.pfn.0 < self.p2m.end() {
            return Ok(());
        }
        let why = "is outside of the guest's p2m";
        Err(FormatError::PageEntry { entry: entry.encode(), why }.into())
    }

    fn populate(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<()> {
        memory::populate(self.domain, &mut self.p2m, pfns)
    }

    fn frame(&self, pfn: Pfn) -> Option<u64> {
        memory::Space::frame(&self.p2m, pfn)
    }

    fn set_type(&mut self, pfn: Pfn, kind: PageType) {
        self.p2m.set_type(pfn, kind);
    }

    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
        memory::frames(&self.p2m, pfns)
    }

    fn resolve(&mut self, pfns: &[Pfn]) -> Result<Vec<u64>> {
        self.give_memory(pfns.iter().copied())?;
        Guest::frames(self, pfns.iter().copied())
    }

    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()> {
        let pfns: Vec<Pfn> = tables.iter().flat_map(|table| referenced(table)).collect();
        self.give_memory(pfns.into_iter())?;
        for table in tables {
            localise(table, |pfn| self.p2m.mfn(pfn).ok_or(GuestError::State(NO_MEMORY)))?;
        }
        Ok(())
    }

    fn record(&mut self, kind: RecordKind, body: Vec<u8>) -> Result<()> {
        match kind {
            RecordKind::X86PvInfo => self.set_width(&body),
            RecordKind::X86PvP2mFrames => self.set_p2m_frames(&body),
            RecordKind::SharedInfo => self.set_shared_info(&body),
            RecordKind::X86PvVcpuBasic
            | RecordKind::X86PvVcpuExtended
            | RecordKind::X86PvVcpuXsave
            | RecordKind::X86PvVcpuMsrs => self.keep_vcpu(kind, &body),
            other => Err(FormatError::UnknownRecord(other.code()).into()),
        }
    }

    fn complete(&mut self, options: &Options) -> Result<Outcome> {
        if !self.has_shared_info {
            let why = "comes without a SHARED_INFO before it";
            return Err(FormatError::Order { kind: RecordKind::End.code(), why }.into());
        }
        let start_info = vcpu::localise_contexts(&mut self.vcpus, &self.p2m)?;
        let outcome =
            vcpu::update_start_info(self.domain, &self.info, &self.p2m, start_info, options)?;
        for (id, vcpu) in &self.vcpus {
            self.domain.set_vcpu(*id, vcpu)?;
        }
        let pins: Vec<(u8, u64)> = self.p2m.pinned().collect();
        for pins in pins.chunks(BATCH_PAGES_MAX) {
            self.domain.pin_tables(pins)?;
        }
        self.write_p2m()?;
        self.domain.seed_grants(
            (outcome.console_frame, options.console_domid),
            (outcome.store_frame, options.store_domid),
        )?;
        Ok(outcome)
    }
}

/// The mfn of `pfn`, which is to be an ordinary page.
pub(super) fn normal_mfn<P: ForeignPages>(
    p2m: &P2m<P>,
    pfn: Pfn,
    what: &'static str,
) -> Result<Mfn, GuestError> {
    let mfn = p2m.mfn(pfn).filter(|_| p2m.page_type(pfn) == PageType::Normal);
    mfn.ok_or(GuestError::NotOrdinary { what, pfn })
}

fn content(kind: RecordKind, why: &'static str) -> Error {
    FormatError::Content { kind: kind.code(), why }.into()
}

fn copy(to: &mut [u8], from: &[u8], range: std::ops::Range<usize>) {
    if let (Some(to), Some(from)) = (to.get_mut(range.clone()), from.get(range)) {
        to.copy_from_slice(from);
    }
}

fn fill(bytes: &mut [u8], offset: usize, length: usize, value: u8) {
    bytes.iter_mut().skip(offset).take(length).for_each(|byte| *byte = value);
}
