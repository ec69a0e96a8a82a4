//! What the receiver asks of its domain: memory, state, pins, grants.
//!
//! # Safety
//! `unsafe` is for hypercalls whose argument points to a buffer; each says why the buffer is
//! large enough.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rxl_migrate::frame::{DomId, INVALID_FRAME, Pfn};
use rxl_migrate::hypervisor::{
    BATCH_PAGES_MAX, CpuPolicy, HvResult, PolicyError, TargetDomain, TscInfo, VcpuState,
};
use rxl_xen_sys::abi;

use super::domain::LiveDomain;
use super::handle::Buffer;
use super::{grants, hv, op, policy, vcpu};

/// Page tables that are pinned in one hypercall.
const PINS_PER_CALL: usize = 1024;

impl LiveDomain {
    /// [`TargetDomain::populate`] for up to [`BATCH_PAGES_MAX`] extents. Whether all of them have
    /// memory comes back.
    fn populate_batch(&self, pfns: &[Pfn], order: u32, frames: &mut Vec<u64>) -> HvResult<bool> {
        let op = op!(XENMEM_populate_physmap);
        let mut batch = self.batch.borrow_mut();
        batch.put_words(pfns.iter().map(|pfn| pfn.0));
        let mut argument = abi::xen_memory_reservation {
            extent_start: abi::__guest_handle_xen_pfn_t { p: batch.pointer() },
            nr_extents: pfns.len() as u64,
            extent_order: order,
            mem_flags: 0,
            domid: self.domid.0,
        };
        // SAFETY: the buffer has room for `BATCH_PAGES_MAX` frames, and there are no more.
        let done = unsafe { self.xen.memory_op_with_pointer(op, &mut argument) }?;
        // Xen says how many it did before it ran out.
        let done = usize::try_from(done).unwrap_or(usize::MAX).min(pfns.len());
        let got = || batch.words().take(done);
        if got().any(|frame| frame == INVALID_FRAME) {
            return Err(hv(op.0, Errno::NOMEM));
        }
        frames.extend(got());
        Ok(done == pfns.len())
    }
}

impl TargetDomain for LiveDomain {
    fn populate(&self, pfns: &[Pfn], order: u32) -> HvResult<Vec<u64>> {
        let mut frames = Vec::with_capacity(pfns.len());
        for batch in pfns.chunks(BATCH_PAGES_MAX) {
            if !self.populate_batch(batch, order, &mut frames)? {
                break;
            }
        }
        Ok(frames)
    }

    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), PolicyError> {
        policy::set(&self.xen, self.domid, policy)
    }

    fn set_tsc_info(&self, tsc: &TscInfo) -> HvResult<()> {
        let mut argument = abi::xen_domctl_tsc_info {
            tsc_mode: tsc.mode,
            gtsc_khz: tsc.khz,
            incarnation: tsc.incarnation,
            pad: 0,
            elapsed_nsec: tsc.nsec,
        };
        self.xen.domctl(op!(XEN_DOMCTL_settscinfo), self.domid, &mut argument)
    }

    fn set_hvm_context(&self, context: &[u8]) -> HvResult<()> {
        let op = op!(XEN_DOMCTL_sethvmcontext);
        let size = u32::try_from(context.len()).map_err(|_| hv(op.0, Errno::TOOBIG))?;
        let mut buffer = Buffer::with(self.xen.handle(), context)?;
        let mut argument = abi::xen_domctl_hvmcontext {
            size,
            buffer: abi::__guest_handle_uint8 { p: buffer.pointer() },
        };
        // SAFETY: the buffer has `size` bytes.
        unsafe { self.xen.domctl_with_pointer(op, self.domid, &mut argument) }
    }

    fn set_hvm_param(&self, index: u32, value: u64) -> HvResult<()> {
        let mut param = abi::xen_hvm_param { domid: self.domid.0, pad: 0, index, value };
        self.xen.hvm_param(op!(HVMOP_set_param), &mut param)
    }

    fn set_address_bits(&self, bits: u32) -> HvResult<()> {
        let mut width = abi::xen_domctl_address_size { size: bits };
        self.xen.domctl(op!(XEN_DOMCTL_set_address_size), self.domid, &mut width)
    }

    fn set_vcpu(&self, id: u32, state: &VcpuState) -> HvResult<()> {
        vcpu::set(&self.xen, self.domid, id, state)
    }

    fn pin_tables(&self, tables: &[(u8, u64)]) -> HvResult<()> {
        for chunk in tables.chunks(PINS_PER_CALL) {
            let ops: Vec<u8> = chunk
                .iter()
                .map(|(level, mfn)| pin_op(*level, *mfn))
                .collect::<HvResult<Vec<_>>>()?
                .concat();
            let mut buffer = Buffer::with(self.xen.handle(), &ops)?;
            self.xen.mmuext(&mut buffer, chunk.len(), self.domid)?;
        }
        Ok(())
    }

    fn seed_grants(&self, console: (u64, DomId), xenstore: (u64, DomId)) -> HvResult<()> {
        grants::seed(&self.foreign, self.domid, [console, xenstore])
    }
}

/// A `struct mmuext_op` that pins `mfn` as a table of `level`: command, padding, frame, unused.
fn pin_op(level: u8, mfn: u64) -> HvResult<[u8; size_of::<abi::mmuext_op>()]> {
    let command: u32 = match level {
        1 => abi::MMUEXT_PIN_L1_TABLE,
        2 => abi::MMUEXT_PIN_L2_TABLE,
        3 => abi::MMUEXT_PIN_L3_TABLE,
        4 => abi::MMUEXT_PIN_L4_TABLE,
        _ => return Err(hv("mmuext_op", Errno::INVAL)),
    };
    let mut op = [0; size_of::<abi::mmuext_op>()];
    let words = [u64::from(command), mfn];
    for (to, word) in op.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    Ok(op)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_laid_out_as_the_header_says() {
        // SAFETY: every sequence of bytes is an `mmuext_op`: integers and addresses.
        let op: abi::mmuext_op =
            unsafe { std::mem::transmute(pin_op(3, 0x1234_5678_9abc).unwrap()) };
        assert_eq!(op.cmd, abi::MMUEXT_PIN_L3_TABLE);
        // SAFETY: both are integers of the same size.
        assert_eq!(unsafe { op.arg1.mfn }, 0x1234_5678_9abc);
        assert!(pin_op(0, 1).is_err() && pin_op(5, 1).is_err());
    }
}
