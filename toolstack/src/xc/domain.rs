//! [`LiveDomain`]: one domain of this host, and what sender and receiver both ask of it.
//!
//! # Safety
//! `unsafe` is for the one hypercall here whose argument points to a buffer.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::sync::Arc;

use rustix::io::Errno;
use rxl_migrate::counters::Counters;
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{Access, BATCH_PAGES_MAX, Domain, DomainInfo, HvResult};
use rxl_xen_sys::abi;

use super::ahead::Coming;
use super::foreign::{ForeignHandle, Mapping};
use super::handle::{Buffer, Hypercalls};
use super::{hv, op};

/// Pages in the pieces of the machine-to-physical table: 2 MiB.
const M2P_CHUNK_PAGES: u64 = 512;
/// Machine frames that such a piece describes.
const M2P_CHUNK_FRAMES: u64 = M2P_CHUNK_PAGES * 512;
/// Most pieces of that table that are mapped: a host of 2^34 frames (64 TiB).
const M2P_CHUNKS_MAX: u64 = (1 << 34) / M2P_CHUNK_FRAMES;

/// A domain of this host, by hypercalls ([`super`]). It has handles of its own, and may move to
/// another thread but not be used by two at once.
pub struct LiveDomain {
    pub(super) domid: DomId,
    pub(super) xen: Hypercalls,
    pub(super) foreign: Arc<ForeignHandle>,
    /// Room for [`BATCH_PAGES_MAX`] frames.
    pub(super) batch: RefCell<Buffer>,
    /// For the log-dirty bitmap: made for the first reading, kept for all others.
    pub(super) dirty: RefCell<Option<Buffer>>,
    /// What is being mapped ahead.
    pub(super) coming: RefCell<Option<Coming>>,
}

impl std::fmt::Debug for LiveDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveDomain")
            .field("domid", &self.domid)
            .field("domctl_version", &self.xen.domctl_version())
            .finish_non_exhaustive()
    }
}

impl LiveDomain {
    /// Opens the interfaces to Xen for `domid`.
    ///
    /// # Errors
    /// This is not a control domain of Xen (`ENOENT` or `ENODEV`, `EACCES` without privilege),
    /// its Xen is of a release that is not known here, or there is no such domain (`ESRCH`).
    pub fn open(domid: DomId) -> HvResult<LiveDomain> {
        let (xen, info) = Hypercalls::open(domid)?;
        let foreign = ForeignHandle::open(describe(&info).hvm)?;
        let batch = Buffer::new(xen.handle(), 8 * BATCH_PAGES_MAX)?;
        Ok(LiveDomain {
            domid,
            xen,
            foreign,
            batch: RefCell::new(batch),
            dirty: RefCell::new(None),
            coming: RefCell::new(None),
        })
    }

    /// Version of the domctl interface that the running Xen has.
    #[must_use]
    pub fn domctl_version(&self) -> u32 {
        self.xen.domctl_version()
    }

    /// The first machine frames of the pieces of the machine-to-physical table.
    fn m2p_chunks(&self) -> HvResult<Vec<u64>> {
        let frames = self.xen.memory_op(op!(XENMEM_maximum_ram_page), &mut ())?;
        let op = op!(XENMEM_machphys_mfn_list);
        let chunks = frames.div_ceil(M2P_CHUNK_FRAMES);
        let max_extents = u32::try_from(chunks)
            .ok()
            .filter(|chunks| u64::from(*chunks) <= M2P_CHUNKS_MAX)
            .ok_or_else(|| hv(op.0, Errno::TOOBIG))?;
        let mut list = Buffer::new(self.xen.handle(), 8 * max_extents as usize)?;
        let mut argument = abi::xen_machphys_mfn_list {
            max_extents,
            extent_start: abi::__guest_handle_xen_pfn_t { p: list.pointer() },
            nr_extents: 0,
        };
        // SAFETY: the buffer has room for `max_extents` frames.
        unsafe { self.xen.memory_op_with_pointer(op, &mut argument) }?;
        let starts: Vec<u64> =
            list.words().take(argument.nr_extents.min(max_extents) as usize).collect();
        // Xen fills a gap with its neighbour; a zero would be the host's first page.
        if starts.is_empty() || starts.contains(&0) {
            return Err(hv(op.0, Errno::NXIO));
        }
        Ok(starts)
    }
}

impl Domain for LiveDomain {
    type Pages = Mapping;

    fn domid(&self) -> DomId {
        self.domid
    }

    fn xen_version(&self) -> HvResult<(u32, u32)> {
        self.xen.version()
    }

    fn info(&self) -> HvResult<DomainInfo> {
        self.xen.domain_info(self.domid).map(|info| describe(&info))
    }

    fn maximum_gpfn(&self) -> HvResult<u64> {
        self.xen.memory_op(op!(XENMEM_maximum_gpfn), &mut self.domid.0.clone())
    }

    fn address_bits(&self) -> HvResult<u32> {
        let mut width = abi::xen_domctl_address_size::default();
        self.xen.domctl(op!(XEN_DOMCTL_get_address_size), self.domid, &mut width)?;
        Ok(width.size)
    }

    fn map(&self, frames: &[u64], access: Access) -> HvResult<Mapping> {
        let coming = self
            .coming
            .borrow_mut()
            .take_if(|coming| access == Access::Read && coming.is_of(frames));
        let mapped = coming.and_then(Coming::wait);
        mapped.unwrap_or_else(|| self.foreign.map(self.domid.0.into(), frames, access))
    }

    fn map_m2p(&self) -> HvResult<Mapping> {
        let starts = self.m2p_chunks()?;
        let frames: Vec<u64> =
            starts.into_iter().flat_map(|start| start..start + M2P_CHUNK_PAGES).collect();
        // Xen's own memory has a domain's number.
        self.foreign.map(abi::DOMID_XEN, &frames, Access::Read)
    }

    fn counters(&self) -> Counters {
        let mut counters = Counters { hypercalls: self.xen.calls(), ..Counters::default() };
        self.foreign.count(&mut counters);
        counters
    }

    fn leave_mapped(&self) {
        self.foreign.leave_mapped();
    }
}

/// The hypercall's words in the engine's.
fn describe(info: &abi::xen_domctl_getdomaininfo) -> DomainInfo {
    let flag = |bit| info.flags & bit != 0;
    let reason = info.flags >> abi::XEN_DOMINF_shutdownshift & abi::XEN_DOMINF_shutdownmask;
    DomainInfo {
        hvm: flag(abi::XEN_DOMINF_hvm_guest),
        paused: flag(abi::XEN_DOMINF_paused),
        shutdown: flag(abi::XEN_DOMINF_shutdown).then(|| u8::try_from(reason).unwrap_or(u8::MAX)),
        dying: flag(abi::XEN_DOMINF_dying),
        total_pages: info.tot_pages,
        shared_info_mfn: info.shared_info_frame,
        max_vcpu_id: info.max_vcpu_id,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use rxl_migrate::hypervisor::SHUTDOWN_SUSPEND;
    use rxl_migrate::x86::hvm;
    use rxl_migrate::x86::pv::{VCPU_CONTEXT_BYTES, context, shared_info, start_info};

    use super::*;

    #[test]
    fn without_xen_or_without_the_domain_opening_it_says_so() {
        let error = LiveDomain::open(DomId(0x7fef)).unwrap_err();
        if std::path::Path::new("/dev/xen/privcmd").exists() {
            assert_eq!(error.source.raw_os_error(), Some(libc::ESRCH), "{error:?}");
        } else {
            assert_eq!(error.to_string(), "xencall_open (/dev/xen/privcmd) failed");
            assert_eq!(error.source.raw_os_error(), Some(libc::ENOENT));
        }
    }

    #[test]
    fn the_flags_of_a_suspended_guest_are_read() {
        let info = abi::xen_domctl_getdomaininfo {
            flags: abi::XEN_DOMINF_hvm_guest | abi::XEN_DOMINF_shutdown | 2 << 16,
            tot_pages: 1000,
            max_vcpu_id: 3,
            ..Default::default()
        };
        let expected = DomainInfo {
            hvm: true,
            paused: false,
            shutdown: Some(SHUTDOWN_SUSPEND),
            dying: false,
            total_pages: 1000,
            shared_info_mfn: 0,
            max_vcpu_id: 3,
        };
        assert_eq!(describe(&info), expected);
        // The reason means nothing while the guest runs.
        let running = abi::xen_domctl_getdomaininfo { flags: 2 << 16, ..Default::default() };
        assert_eq!(describe(&running).shutdown, None);
    }

    #[test]
    fn the_engines_offsets_in_guest_structures_are_the_headers() {
        type Context = abi::vcpu_guest_context;
        assert_eq!(size_of::<Context>(), VCPU_CONTEXT_BYTES);
        assert_eq!(offset_of!(Context, flags), context::FLAGS);
        assert_eq!(offset_of!(Context, gdt_frames), context::GDT_FRAMES);
        assert_eq!(offset_of!(Context, gdt_ents), context::GDT_ENTRIES);
        assert_eq!(offset_of!(Context, ctrlreg) + 8, context::CR1);
        assert_eq!(offset_of!(Context, ctrlreg) + 24, context::CR3);
        assert_eq!(abi::VGCF_online, context::FLAG_ONLINE);
        type Start = abi::start_info;
        assert_eq!(offset_of!(Start, nr_pages), start_info::NR_PAGES);
        assert_eq!(offset_of!(Start, shared_info), start_info::SHARED_INFO);
        assert_eq!(offset_of!(Start, flags), start_info::FLAGS);
        assert_eq!(offset_of!(Start, store_mfn), start_info::STORE_MFN);
        assert_eq!(offset_of!(Start, store_evtchn), start_info::STORE_EVTCHN);
        assert_eq!(offset_of!(Start, console), start_info::CONSOLE_MFN);
        type Shared = abi::shared_info;
        assert_eq!(offset_of!(Shared, evtchn_pending), shared_info::EVTCHN_PENDING.start);
        assert_eq!(offset_of!(Shared, evtchn_mask), shared_info::EVTCHN_MASK.start);
        assert_eq!(offset_of!(Shared, arch), shared_info::ARCH.start);
        assert_eq!(size_of::<Shared>(), shared_info::ARCH.end);
        assert_eq!(size_of::<abi::vcpu_info>(), shared_info::VCPU_INFO_BYTES);
        assert_eq!(offset_of!(abi::vcpu_info, evtchn_pending_sel), shared_info::PENDING_SEL);
        assert_eq!(offset_of!(Shared, arch.max_pfn), shared_info::MAX_PFN);
        assert_eq!(
            offset_of!(Shared, arch.pfn_to_mfn_frame_list_list),
            shared_info::FRAME_LIST_LIST
        );
        assert_eq!(offset_of!(Shared, arch.p2m_cr3), shared_info::P2M_CR3);
        assert_eq!(offset_of!(Shared, arch.p2m_vaddr), shared_info::P2M_VADDR);
        assert_eq!(offset_of!(Shared, arch.p2m_generation), shared_info::P2M_GENERATION);
    }

    #[test]
    fn the_engines_numbers_are_the_headers() {
        assert_eq!(u32::from(SHUTDOWN_SUSPEND), abi::SHUTDOWN_suspend);
        assert_eq!(hvm::STORE_PFN, abi::HVM_PARAM_STORE_PFN);
        assert_eq!(hvm::STORE_EVTCHN, abi::HVM_PARAM_STORE_EVTCHN);
        assert_eq!(hvm::PAE_ENABLED, abi::HVM_PARAM_PAE_ENABLED);
        assert_eq!(hvm::CONSOLE_EVTCHN, abi::HVM_PARAM_CONSOLE_EVTCHN);
        let sent = [
            abi::HVM_PARAM_STORE_PFN,
            abi::HVM_PARAM_IOREQ_PFN,
            abi::HVM_PARAM_BUFIOREQ_PFN,
            abi::HVM_PARAM_PAGING_RING_PFN,
            abi::HVM_PARAM_MONITOR_RING_PFN,
            abi::HVM_PARAM_SHARING_RING_PFN,
            abi::HVM_PARAM_VM86_TSS_SIZED,
            abi::HVM_PARAM_CONSOLE_PFN,
            abi::HVM_PARAM_ACPI_IOPORTS_LOCATION,
            abi::HVM_PARAM_VIRIDIAN,
            abi::HVM_PARAM_IDENT_PT,
            abi::HVM_PARAM_VM_GENERATION_ID_ADDR,
            abi::HVM_PARAM_IOREQ_SERVER_PFN,
            abi::HVM_PARAM_NR_IOREQ_SERVER_PAGES,
            abi::HVM_PARAM_X87_FIP_WIDTH,
            abi::HVM_PARAM_MCA_CAP,
        ];
        assert_eq!(hvm::SENT, sent);
    }
}
