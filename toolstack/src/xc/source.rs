//! What the sender asks of its domain: log-dirty, page types, state, the scheduler's limit.
//!
//! # Safety
//! `unsafe` is for hypercalls whose argument can point to a buffer; each says why the buffer is
//! large enough. And for the argument's union.
#![allow(unsafe_code)]

use std::io;
use std::ptr::null_mut;

use rustix::io::Errno;
use rxl_migrate::bitmap::PageBitmap;
use rxl_migrate::frame::PageType;
use rxl_migrate::hypervisor::{
    BATCH_PAGES_MAX, CpuCap, CpuPolicy, HvError, HvResult, SourceDomain, TscInfo, VcpuState,
};
use rxl_migrate::xl::movable::{Facts, Unmovable};
use rxl_xen_sys::abi;

use super::domain::LiveDomain;
use super::handle::Buffer;
use super::{hv, op, policy, vcpu};

/// Most bytes of HVM save records: some 10 KiB a vCPU.
const HVM_CONTEXT_BYTES_MAX: u32 = 64 << 20;

impl LiveDomain {
    /// Switches log-dirty on or off.
    fn shadow_switch(&self, name: &'static str, command: u32) -> HvResult<()> {
        let mut argument = shadow_op(command);
        let op = (name, abi::XEN_DOMCTL_shadow_op);
        // SAFETY: no address in it.
        unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) }
    }

    fn enable_log_dirty(&self) -> HvResult<()> {
        let (name, command) = op!(XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY);
        self.shadow_switch(name, command)
    }

    /// The same error, or what it says of a PV guest.
    fn why_no_log_dirty(&self, error: HvError) -> HvError {
        match self.facts() {
            Ok(Facts { pv: true, shadow_paging: false, .. }) => {
                let reason = Unmovable::NoShadowPaging.to_string();
                hv(error.op, io::Error::new(io::ErrorKind::Unsupported, reason))
            }
            _ => error,
        }
    }
}

/// The schedulers that can limit a domain's processor time, Xen's default first.
const SCHEDULERS: [u32; 2] = [abi::XEN_SCHEDULER_CREDIT2, abi::XEN_SCHEDULER_CREDIT];

impl LiveDomain {
    /// Has the scheduler that the domain is under do `command`: with `cap`, or what comes back.
    fn scheduler_op(&self, (name, command): (&'static str, u32), cap: u16) -> HvResult<u16> {
        let mut refused = hv(name, Errno::INVAL);
        for scheduler in SCHEDULERS {
            let mut argument = abi::xen_domctl_scheduler_op::default();
            (argument.sched_id, argument.cmd) = (scheduler, command);
            // Both schedulers have the same two numbers; a weight of 0 changes none.
            argument.u.credit2 = abi::xen_domctl_sched_credit2 { weight: 0, cap };
            let op = (name, abi::XEN_DOMCTL_scheduler_op);
            // SAFETY: these commands take no address.
            match unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) } {
                // SAFETY: it was written above, and all bytes are values of it.
                Ok(()) => return Ok(unsafe { argument.u.credit2.cap }),
                // The domain is under another.
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

impl SourceDomain for LiveDomain {
    fn log_dirty_on(&self) -> HvResult<()> {
        if let Err(first) = self.enable_log_dirty() {
            // VRAM tracking of the device model may hold it. Whether it could be taken away, the
            // second try tells.
            let off = self.log_dirty_off();
            tracing::debug!(error = %first.source, ?off, "log-dirty was refused at first");
            self.enable_log_dirty().map_err(|error| self.why_no_log_dirty(error))?;
        }
        Ok(())
    }

    fn log_dirty_off(&self) -> HvResult<()> {
        let (name, command) = op!(XEN_DOMCTL_SHADOW_OP_OFF);
        self.shadow_switch(name, command)
    }

    fn log_dirty_clean(&self, bitmap: &mut PageBitmap, last: bool) -> HvResult<()> {
        let (name, command) = op!(XEN_DOMCTL_SHADOW_OP_CLEAN);
        let pages = bitmap.len();
        let bytes = usize::try_from(pages.div_ceil(8)).unwrap_or(usize::MAX);
        let mut kept = self.dirty.borrow_mut();
        let mut buffer = match kept.take().filter(|buffer| buffer.len() >= bytes) {
            Some(buffer) => buffer,
            None => Buffer::new(self.xen.handle(), bytes)?,
        };
        let mut argument = abi::xen_domctl_shadow_op {
            mode: if last { abi::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL } else { 0 },
            dirty_bitmap: abi::__guest_handle_uint8 { p: buffer.pointer() },
            pages,
            ..shadow_op(command)
        };
        let op = (name, abi::XEN_DOMCTL_shadow_op);
        // SAFETY: Xen writes a bit for each of `pages`, for which the buffer has room.
        let result = unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) };
        if result.is_ok() {
            bitmap.add_le_bytes(buffer.first(bytes));
        }
        *kept = Some(buffer);
        result?;
        if argument.pages != pages {
            // The p2m is not as large as was thought: pages would be missed.
            return Err(hv(name, Errno::RANGE));
        }
        Ok(())
    }

    fn map_ahead(&self, frames: &[u64]) {
        // The one before goes first: it would only be in the way.
        self.coming.take();
        if !frames.is_empty() {
            self.coming.replace(self.foreign.map_ahead(self.domid.0.into(), frames));
        }
    }

    fn page_types(&self, frames: &[u64]) -> HvResult<Vec<PageType>> {
        let op = op!(XEN_DOMCTL_getpageframeinfo3);
        if frames.len() > BATCH_PAGES_MAX {
            return Err(hv(op.0, Errno::TOOBIG));
        }
        let mut batch = self.batch.borrow_mut();
        batch.put_words(frames.iter().copied());
        let mut argument = abi::xen_domctl_getpageframeinfo3 {
            num: frames.len() as u64,
            array: abi::__guest_handle_xen_pfn_t { p: batch.pointer() },
        };
        // SAFETY: the buffer has room for `BATCH_PAGES_MAX` frames, and there are no more.
        unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) }?;
        batch
            .words()
            .take(frames.len())
            .map(|word| page_type(word).ok_or_else(|| hv(op.0, Errno::INVAL)))
            .collect()
    }

    fn tsc_info(&self) -> HvResult<TscInfo> {
        let mut tsc = abi::xen_domctl_tsc_info::default();
        self.xen.domctl(op!(XEN_DOMCTL_gettscinfo), self.domid, &mut tsc)?;
        Ok(TscInfo {
            mode: tsc.tsc_mode,
            khz: tsc.gtsc_khz,
            nsec: tsc.elapsed_nsec,
            incarnation: tsc.incarnation,
        })
    }

    fn cpu_policy(&self) -> HvResult<CpuPolicy> {
        policy::get(&self.xen, self.domid)
    }

    fn hvm_context(&self) -> HvResult<Vec<u8>> {
        let op = op!(XEN_DOMCTL_gethvmcontext);
        let mut argument = abi::xen_domctl_hvmcontext {
            size: 0,
            buffer: abi::__guest_handle_uint8 { p: null_mut() },
        };
        // SAFETY: no address in it: this asks for the size.
        unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) }?;
        if argument.size > HVM_CONTEXT_BYTES_MAX {
            return Err(hv(op.0, Errno::TOOBIG));
        }
        let mut buffer = Buffer::new(self.xen.handle(), argument.size as usize)?;
        argument.buffer.p = buffer.pointer();
        // SAFETY: the buffer has room for `size` bytes.
        unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) }?;
        Ok(buffer.first(argument.size as usize).to_vec())
    }

    fn hvm_param(&self, index: u32) -> HvResult<u64> {
        let mut param = abi::xen_hvm_param { domid: self.domid.0, pad: 0, index, value: 0 };
        self.xen.hvm_param(op!(HVMOP_get_param), &mut param)?;
        Ok(param.value)
    }

    fn vcpu(&self, id: u32) -> HvResult<Option<VcpuState>> {
        vcpu::get(&self.xen, self.domid, id)
    }

    fn cpu_cap(&self) -> HvResult<CpuCap> {
        self.scheduler_op(op!(XEN_DOMCTL_SCHEDOP_getinfo), 0).map(CpuCap)
    }

    fn set_cpu_cap(&self, CpuCap(cap): CpuCap) -> HvResult<()> {
        self.scheduler_op(op!(XEN_DOMCTL_SCHEDOP_putinfo), cap).map(drop)
    }
}

/// A log-dirty request without a bitmap.
fn shadow_op(op: u32) -> abi::xen_domctl_shadow_op {
    abi::xen_domctl_shadow_op {
        op,
        mode: 0,
        mb: 0,
        dirty_bitmap: abi::__guest_handle_uint8 { p: null_mut() },
        pages: 0,
        stats: abi::xen_domctl_shadow_op_stats::default(),
    }
}

/// The type in bits 31 to 28 of Xen's answer; `None` where nobody knows it.
fn page_type(word: u64) -> Option<PageType> {
    let nibble = word >> abi::XEN_DOMCTL_PFINFO_LTAB_SHIFT & 0xf;
    u8::try_from(nibble).ok().and_then(PageType::from_nibble)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_types_are_those_of_the_header() {
        let table = |level, pinned| Some(PageType::Table { level, pinned });
        let cases = [
            (abi::XEN_DOMCTL_PFINFO_NOTAB, Some(PageType::Normal)),
            (abi::XEN_DOMCTL_PFINFO_L1TAB, table(1, false)),
            (abi::XEN_DOMCTL_PFINFO_L4TAB, table(4, false)),
            (abi::XEN_DOMCTL_PFINFO_L4TAB | abi::XEN_DOMCTL_PFINFO_LPINTAB, table(4, true)),
            (abi::XEN_DOMCTL_PFINFO_XTAB, Some(PageType::Invalid)),
            (abi::XEN_DOMCTL_PFINFO_XALLOC, Some(PageType::AllocOnly)),
            (abi::XEN_DOMCTL_PFINFO_BROKEN, Some(PageType::Broken)),
            (5 << 28, None),
        ];
        for (word, expected) in cases {
            assert_eq!(page_type(word.into()), expected, "{word:#x}");
        }
    }
}
