//! The frame numbers in a PV guest's vCPU contexts and in its start info page.

use std::collections::BTreeMap;

use crate::error::{GuestError, Result};
use crate::frame::{Mfn, PAGE_SHIFT, PageBuf, Pfn};
use crate::hypervisor::{Access, DomainInfo, ForeignPages, TargetDomain, VcpuState};
use crate::target::driver::{Options, Outcome};
use crate::target::p2m::P2m;
use crate::target::pv::normal_mfn;
use crate::x86::pv::{context, get_u32, get_u64, put, start_info};

/// Bit 0 of `ctrlreg[1]` in the stream: there is a table of user mode.
const USER_TABLE: u64 = 1;
/// Level of the tables that `cr3` may hold.
const TOP_LEVEL: u8 = 4;

/// Turns the pfns in the contexts of all vCPUs into mfns. The mfn of the start info page, which
/// is in vCPU 0's, comes back.
pub(super) fn localise_contexts<P: ForeignPages>(
    vcpus: &mut BTreeMap<u32, VcpuState>,
    p2m: &P2m<P>,
) -> Result<Mfn, GuestError> {
    for state in vcpus.values_mut() {
        localise_context(&mut state.basic, p2m)?;
    }
    let boot = vcpus.get_mut(&0).ok_or(GuestError::State("the stream holds no vCPU 0"))?;
    let pfn = Pfn(word(&boot.basic, context::START_INFO)?);
    let mfn = normal_mfn(p2m, pfn, "start info page")?;
    put(&mut boot.basic, context::START_INFO, &mfn.0.to_le_bytes());
    Ok(mfn)
}

fn localise_context<P: ForeignPages>(basic: &mut [u8], p2m: &P2m<P>) -> Result<(), GuestError> {
    let flags = get_u32(basic, context::FLAGS).ok_or(NO_CONTEXT)?;
    put(basic, context::FLAGS, &(flags | context::FLAG_ONLINE).to_le_bytes());

    let entries = word(basic, context::GDT_ENTRIES)?;
    if entries > context::GDT_ENTRIES_MAX {
        return Err(GuestError::State("a vCPU's GDT is longer than a guest's may be"));
    }
    let frames = entries.div_ceil(context::GDT_ENTRIES_PER_FRAME);
    for offset in (context::GDT_FRAMES..).step_by(8).zip(0..frames).map(|(offset, _)| offset) {
        let mfn = normal_mfn(p2m, Pfn(word(basic, offset)?), "frame of a GDT")?;
        put(basic, offset, &mfn.0.to_le_bytes());
    }

    let kernel = top_table(p2m, word(basic, context::CR3)?)?;
    put(basic, context::CR3, &kernel.to_le_bytes());
    let user = word(basic, context::CR1)?;
    if user & USER_TABLE != 0 {
        put(basic, context::CR1, &top_table(p2m, user)?.to_le_bytes());
    } else if user != 0 {
        return Err(GuestError::State("a vCPU's user page table is marked as not there"));
    }
    Ok(())
}

/// The control register that stands for the top-level table at the pfn in `register`.
fn top_table<P: ForeignPages>(p2m: &P2m<P>, register: u64) -> Result<u64, GuestError> {
    let pfn = Pfn(register >> PAGE_SHIFT);
    let is_top = p2m.page_type(pfn).table_level() == Some(TOP_LEVEL);
    let mfn = p2m.mfn(pfn).filter(|_| is_top);
    Ok(mfn.ok_or(GuestError::NotTopTable { pfn })?.0 << PAGE_SHIFT)
}

/// Tells the guest where it is now: its start info page, at `mfn`, holds pfns of the rings that
/// become mfns here, and the event channels of the new domain.
pub(super) fn update_start_info<D: TargetDomain>(
    domain: &D,
    info: &DomainInfo,
    p2m: &P2m<D::Pages>,
    mfn: Mfn,
    options: &Options,
) -> Result<Outcome> {
    let pages = domain.map(&[mfn.0], Access::ReadWrite)?;
    let mut page = PageBuf::zeroed();
    pages.read_page(0, &mut page);
    let store_frame = localise_ring(&mut page, start_info::STORE_MFN, "xenstore's ring", p2m)?;
    let console_frame = localise_ring(&mut page, start_info::CONSOLE_MFN, "console's ring", p2m)?;
    let shared_info = info.shared_info_mfn << PAGE_SHIFT;
    put(&mut page.0, start_info::NR_PAGES, &p2m.end().to_le_bytes());
    put(&mut page.0, start_info::SHARED_INFO, &shared_info.to_le_bytes());
    put(&mut page.0, start_info::FLAGS, &0_u32.to_le_bytes());
    put(&mut page.0, start_info::STORE_EVTCHN, &options.store_evtchn.to_le_bytes());
    put(&mut page.0, start_info::CONSOLE_EVTCHN, &options.console_evtchn.to_le_bytes());
    pages.write_page(0, &page);
    Ok(Outcome { store_frame, console_frame })
}

fn localise_ring<P: ForeignPages>(
    page: &mut PageBuf,
    offset: usize,
    what: &'static str,
    p2m: &P2m<P>,
) -> Result<u64, GuestError> {
    let mfn = normal_mfn(p2m, Pfn(word(&page.0, offset)?), what)?;
    put(&mut page.0, offset, &mfn.0.to_le_bytes());
    Ok(mfn.0)
}

/// Only a vCPU without the basic record has a context that is too short to hold its fields.
const NO_CONTEXT: GuestError = GuestError::State("a vCPU has state but no context");

fn word(bytes: &[u8], offset: usize) -> Result<u64, GuestError> {
    get_u64(bytes, offset).ok_or(NO_CONTEXT)
}
