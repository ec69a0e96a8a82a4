//! A domain's CPU policy: the CPUID leaves and MSRs that it sees.
//!
//! # Safety
//! `unsafe` is for hypercalls whose argument points to buffers; each says why they are large
//! enough.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{CpuPolicy, HvResult, PolicyError};
use rxl_migrate::x86::cpuid;
use rxl_xen_sys::abi;

use super::handle::{Buffer, Hypercalls};
use super::{hv, op};

/// CPUID leaves and MSRs that there is room for at first: some 100 and 2 are usual.
const ROOM: (usize, usize) = (512, 64);
/// Most leaves of a policy. There are as many MSRs at most.
const ENTRIES_MAX: usize = 16 << 10;
/// Bytes of a `xen_cpuid_leaf_t`.
const LEAF_BYTES: usize = size_of::<abi::xen_cpuid_leaf_t>();
/// Bytes of a `xen_msr_entry_t`.
const MSR_BYTES: usize = size_of::<abi::xen_msr_entry_t>();
/// In the fields for what is at fault: not that.
const NOT_THIS: u32 = u32::MAX;

/// The policy of `domid`. How large it can be is known only to a sysctl, whose interface has a
/// version of its own; so room is made, and more where Xen says that it is too little.
pub(super) fn get(xen: &Hypercalls, domid: DomId) -> HvResult<CpuPolicy> {
    let (mut leaves, mut msrs) = ROOM;
    loop {
        match get_sized(xen, domid, leaves, msrs) {
            Err(e) if e.source.raw_os_error() == Some(libc::ENOBUFS) && leaves < ENTRIES_MAX => {
                leaves *= 2;
                msrs *= 2;
            }
            result => return result,
        }
    }
}

fn get_sized(xen: &Hypercalls, domid: DomId, leaves: usize, msrs: usize) -> HvResult<CpuPolicy> {
    let mut leaf_buffer = Buffer::new(xen.handle(), leaves * LEAF_BYTES)?;
    let mut msr_buffer = Buffer::new(xen.handle(), msrs * MSR_BYTES)?;
    let mut argument = argument((leaves, &mut leaf_buffer), (msrs, &mut msr_buffer));
    // SAFETY: the buffers have room for the numbers of entries that the argument says.
    unsafe { xen.domctl_with_pointer(op!(XEN_DOMCTL_get_cpu_policy), domid, &mut argument) }?;
    let leaves = leaves.min(argument.nr_leaves as usize);
    let msrs = msrs.min(argument.nr_msrs as usize);
    Ok(CpuPolicy {
        leaves: leaf_buffer.first(leaves * LEAF_BYTES).to_vec(),
        msrs: msr_buffer.first(msrs * MSR_BYTES).to_vec(),
    })
}

/// Gives `policy` to `domid`. Xen refuses what makes no sense on this host, but takes away in
/// silence the features that the host lacks; so what it made of it is looked at.
pub(super) fn set(xen: &Hypercalls, domid: DomId, policy: &CpuPolicy) -> Result<(), PolicyError> {
    put(xen, domid, policy)?;
    let given = get(xen, domid)?;
    match cpuid::lost(&policy.leaves, &given.leaves) {
        Some(feature) => Err(PolicyError::Lost(feature)),
        None => Ok(()),
    }
}

fn put(xen: &Hypercalls, domid: DomId, policy: &CpuPolicy) -> Result<(), PolicyError> {
    let op = op!(XEN_DOMCTL_set_cpu_policy);
    let leaves = entries(&policy.leaves, LEAF_BYTES).map_err(|e| hv(op.0, e))?;
    let msrs = entries(&policy.msrs, MSR_BYTES).map_err(|e| hv(op.0, e))?;
    let mut leaf_buffer = Buffer::with(xen.handle(), &policy.leaves)?;
    let mut msr_buffer = Buffer::with(xen.handle(), &policy.msrs)?;
    let mut argument = argument((leaves, &mut leaf_buffer), (msrs, &mut msr_buffer));
    // SAFETY: the buffers have the numbers of entries that the argument says.
    let result = unsafe { xen.domctl_with_pointer(op, domid, &mut argument) };
    let fault = (argument.err_leaf, argument.err_subleaf, argument.err_msr);
    match (result, fault) {
        (Ok(()), _) => Ok(()),
        (Err(e), (NOT_THIS, NOT_THIS, NOT_THIS)) => Err(e.into()),
        (Err(_), (leaf, subleaf, msr)) => Err(PolicyError::Refused { leaf, subleaf, msr }),
    }
}

/// The number of entries of `size` in `bytes`, if they are that and not too many.
fn entries(bytes: &[u8], size: usize) -> Result<usize, Errno> {
    match bytes.len() / size {
        _ if !bytes.len().is_multiple_of(size) => Err(Errno::INVAL),
        count if count > ENTRIES_MAX => Err(Errno::TOOBIG),
        count => Ok(count),
    }
}

/// Both numbers are at most [`ENTRIES_MAX`].
fn argument(
    (leaves, leaf_buffer): (usize, &mut Buffer),
    (msrs, msr_buffer): (usize, &mut Buffer),
) -> abi::xen_domctl_cpu_policy {
    abi::xen_domctl_cpu_policy {
        nr_leaves: u32::try_from(leaves).unwrap_or(0),
        nr_msrs: u32::try_from(msrs).unwrap_or(0),
        leaves: abi::__guest_handle_xen_cpuid_leaf_t { p: leaf_buffer.pointer() },
        msrs: abi::__guest_handle_xen_msr_entry_t { p: msr_buffer.pointer() },
        err_leaf: NOT_THIS,
        err_subleaf: NOT_THIS,
        err_msr: NOT_THIS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_entries_within_the_limit_are_a_policy() {
        assert_eq!(entries(&[0; 48], LEAF_BYTES), Ok(2));
        assert_eq!(entries(&[], MSR_BYTES), Ok(0));
        assert_eq!(entries(&[0; 47], LEAF_BYTES), Err(Errno::INVAL));
        let many = vec![0; (ENTRIES_MAX + 1) * MSR_BYTES];
        assert_eq!(entries(&many, MSR_BYTES), Err(Errno::TOOBIG));
    }
}
