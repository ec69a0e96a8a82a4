//! A PV vCPU's state: registers, callbacks, xsave area, MSRs.
//!
//! The four parts have domctls of their own. Sizes are checked here because Xen takes some of
//! them from its own structures and would read past what a stream brought.
//!
//! # Safety
//! `unsafe` is for hypercalls whose argument points to a buffer; each says why the buffer is
//! large enough.
#![allow(unsafe_code)]

use std::ptr::null_mut;

use rustix::io::Errno;
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{HvResult, VcpuState};
use rxl_migrate::x86::pv::VCPU_CONTEXT_BYTES;
use rxl_xen_sys::abi;

use super::handle::{Buffer, ExtendedBytes, Hypercalls};
use super::{hv, op};

/// Most bytes of an xsave area, with its head of 16 bytes.
const XSAVE_BYTES_MAX: usize = 1 << 20;
/// The area's head: xcr0 and xcr0_accum.
const XSAVE_BYTES_MIN: usize = 16;
/// Most MSRs of a vCPU. Xen 4.22 has 7.
const MSRS_MAX: usize = 1024;
/// Bytes of a `xen_domctl_vcpu_msr`.
const MSR_BYTES: usize = size_of::<abi::xen_domctl_vcpu_msr>();
/// `vcpu` and `size` of `xen_domctl_ext_vcpucontext`.
const EXTENDED_HEAD_BYTES: usize = 8;

// 64-bit guests only, and `getvcpucontext` writes this structure.
const _: () = assert!(size_of::<abi::vcpu_guest_context>() == VCPU_CONTEXT_BYTES);

/// The state of vCPU `id`; `None` where it is offline.
pub(super) fn get(xen: &Hypercalls, domid: DomId, id: u32) -> HvResult<Option<VcpuState>> {
    let mut info = abi::xen_domctl_getvcpuinfo { vcpu: id, ..Default::default() };
    xen.domctl(op!(XEN_DOMCTL_getvcpuinfo), domid, &mut info)?;
    if info.online == 0 {
        return Ok(None);
    }
    Ok(Some(VcpuState {
        basic: get_basic(xen, domid, id)?,
        extended: get_extended(xen, domid, id)?,
        xsave: get_xsave(xen, domid, id)?,
        msrs: get_msrs(xen, domid, id)?,
    }))
}

/// Loads the state of vCPU `id`: `basic`, then the parts that are not empty.
pub(super) fn set(xen: &Hypercalls, domid: DomId, id: u32, state: &VcpuState) -> HvResult<()> {
    set_basic(xen, domid, id, &state.basic)?;
    if !state.extended.is_empty() {
        let mut argument = extended_argument(id, &state.extended)?;
        xen.domctl(op!(XEN_DOMCTL_set_ext_vcpucontext), domid, &mut argument)?;
    }
    if !state.xsave.is_empty() {
        set_xsave(xen, domid, id, &state.xsave)?;
    }
    if !state.msrs.is_empty() {
        set_msrs(xen, domid, id, &state.msrs)?;
    }
    Ok(())
}

fn get_basic(xen: &Hypercalls, domid: DomId, id: u32) -> HvResult<Vec<u8>> {
    let mut buffer = Buffer::new(xen.handle(), VCPU_CONTEXT_BYTES)?;
    let mut argument = context_argument(id, &mut buffer);
    // SAFETY: the buffer has room for a `vcpu_guest_context`.
    unsafe { xen.domctl_with_pointer(op!(XEN_DOMCTL_getvcpucontext), domid, &mut argument) }?;
    Ok(buffer.first(VCPU_CONTEXT_BYTES).to_vec())
}

fn set_basic(xen: &Hypercalls, domid: DomId, id: u32, state: &[u8]) -> HvResult<()> {
    let op = op!(XEN_DOMCTL_setvcpucontext);
    if state.len() != VCPU_CONTEXT_BYTES {
        return Err(hv(op.0, Errno::INVAL));
    }
    let mut buffer = Buffer::with(xen.handle(), state)?;
    let mut argument = context_argument(id, &mut buffer);
    // SAFETY: the buffer has a whole `vcpu_guest_context`.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }
}

fn context_argument(vcpu: u32, buffer: &mut Buffer) -> abi::xen_domctl_vcpucontext {
    let ctxt = abi::__guest_handle_vcpu_guest_context_t { p: buffer.pointer() };
    abi::xen_domctl_vcpucontext { vcpu, ctxt }
}

fn get_extended(xen: &Hypercalls, domid: DomId, id: u32) -> HvResult<Vec<u8>> {
    let mut argument = extended_head(id, 0);
    xen.domctl(op!(XEN_DOMCTL_get_ext_vcpucontext), domid, &mut argument)?;
    let [_, _, _, _, a, b, c, d, ..] = argument.0;
    let size = u32::from_le_bytes([a, b, c, d]) as usize;
    let bytes = argument.0.get(..size);
    bytes.map(<[u8]>::to_vec).ok_or_else(|| hv("XEN_DOMCTL_get_ext_vcpucontext", Errno::TOOBIG))
}

/// The argument for loading `state`. Its first 8 bytes say which vCPU it was and how much there
/// is; both are known better here.
fn extended_argument(id: u32, state: &[u8]) -> HvResult<ExtendedBytes> {
    let bad = || hv("XEN_DOMCTL_set_ext_vcpucontext", Errno::INVAL);
    let mut argument = extended_head(id, u32::try_from(state.len()).map_err(|_| bad())?);
    let to = argument.0.get_mut(EXTENDED_HEAD_BYTES..state.len()).ok_or_else(bad)?;
    to.copy_from_slice(state.get(EXTENDED_HEAD_BYTES..).ok_or_else(bad)?);
    Ok(argument)
}

fn extended_head(id: u32, size: u32) -> ExtendedBytes {
    let mut bytes = [0; 128];
    let head = [id.to_le_bytes(), size.to_le_bytes()];
    for (to, from) in bytes.iter_mut().zip(head.as_flattened()) {
        *to = *from;
    }
    ExtendedBytes(bytes)
}

fn get_xsave(xen: &Hypercalls, domid: DomId, id: u32) -> HvResult<Vec<u8>> {
    let op = op!(XEN_DOMCTL_getvcpuextstate);
    let mut argument = xsave_argument(id);
    // SAFETY: no address in it: this asks for mask and size.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }?;
    if argument.xfeature_mask == 0 || argument.size == 0 {
        // A host without xsave, or one where it is off.
        return Ok(Vec::new());
    }
    let size = usize::try_from(argument.size)
        .ok()
        .filter(|size| *size <= XSAVE_BYTES_MAX)
        .ok_or_else(|| hv(op.0, Errno::TOOBIG))?;
    let mut buffer = Buffer::new(xen.handle(), size)?;
    argument.buffer.p = buffer.pointer();
    // SAFETY: the buffer has room for `size` bytes.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }?;
    // Newer releases ask for room for the largest state and fill less.
    let filled = usize::try_from(argument.size).unwrap_or(size).min(size);
    Ok(buffer.first(filled).to_vec())
}

fn set_xsave(xen: &Hypercalls, domid: DomId, id: u32, state: &[u8]) -> HvResult<()> {
    let op = op!(XEN_DOMCTL_setvcpuextstate);
    if !(XSAVE_BYTES_MIN..=XSAVE_BYTES_MAX).contains(&state.len()) {
        return Err(hv(op.0, Errno::INVAL));
    }
    let mut buffer = Buffer::with(xen.handle(), state)?;
    let mut argument = xsave_argument(id);
    argument.size = state.len() as u64;
    argument.buffer.p = buffer.pointer();
    // SAFETY: the buffer has `size` bytes.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }
}

fn xsave_argument(vcpu: u32) -> abi::xen_domctl_vcpuextstate {
    let buffer = abi::__guest_handle_uint64 { p: null_mut() };
    abi::xen_domctl_vcpuextstate { vcpu, xfeature_mask: 0, size: 0, buffer }
}

fn get_msrs(xen: &Hypercalls, domid: DomId, id: u32) -> HvResult<Vec<u8>> {
    let op = op!(XEN_DOMCTL_get_vcpu_msrs);
    let mut argument = msrs_argument(id);
    // SAFETY: no address in it: this asks for the most that there can be.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }?;
    let room = argument.msr_count as usize;
    if room == 0 {
        return Ok(Vec::new());
    }
    if room > MSRS_MAX {
        return Err(hv(op.0, Errno::TOOBIG));
    }
    let mut buffer = Buffer::new(xen.handle(), room * MSR_BYTES)?;
    argument.msrs.p = buffer.pointer();
    // SAFETY: the buffer has room for `msr_count` entries.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }?;
    // MSRs that are zero are left out.
    let filled = (argument.msr_count as usize).min(room);
    Ok(buffer.first(filled * MSR_BYTES).to_vec())
}

fn set_msrs(xen: &Hypercalls, domid: DomId, id: u32, state: &[u8]) -> HvResult<()> {
    let op = op!(XEN_DOMCTL_set_vcpu_msrs);
    let count = state.len() / MSR_BYTES;
    if !state.len().is_multiple_of(MSR_BYTES) || count > MSRS_MAX {
        return Err(hv(op.0, Errno::INVAL));
    }
    let mut buffer = Buffer::with(xen.handle(), state)?;
    let mut argument = msrs_argument(id);
    argument.msr_count = u32::try_from(count).unwrap_or(u32::MAX);
    argument.msrs.p = buffer.pointer();
    // SAFETY: the buffer has `msr_count` entries.
    unsafe { xen.domctl_with_pointer(op, domid, &mut argument) }
}

fn msrs_argument(vcpu: u32) -> abi::xen_domctl_vcpu_msrs {
    let msrs = abi::__guest_handle_xen_domctl_vcpu_msr_t { p: null_mut() };
    abi::xen_domctl_vcpu_msrs { vcpu, msr_count: 0, msrs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_an_extended_state_is_not_taken_from_the_stream() {
        let mut state = vec![0xee; 64];
        state[8] = 7;
        let argument = extended_argument(3, &state).unwrap();
        assert_eq!(argument.0[..9], [3, 0, 0, 0, 64, 0, 0, 0, 7]);
        assert_eq!(argument.0[63..66], [0xee, 0, 0]);
    }

    #[test]
    fn an_extended_state_of_a_size_that_it_cannot_have_is_refused() {
        for size in [1, 7, 129, 5000] {
            assert!(extended_argument(0, &vec![0; size]).is_err(), "{size}");
        }
        assert!(extended_argument(0, &[0; 128]).is_ok());
    }
}
