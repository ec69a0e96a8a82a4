//! The first entries of a new guest's grant table, which let the backends of its console and of
//! xenstore map their rings.
//!
//! Specified in `xen/include/public/grant_table.h` (version 1 entries: flags, domain, frame).
//!
//! # Safety
//! The grant table is memory that the guest shares; it is only written, by volatile writes of
//! whole entries within the one frame that is mapped.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rustix::io::Errno;
use rxl_migrate::frame::{DomId, INVALID_FRAME};
use rxl_migrate::hypervisor::{HvError, HvResult};
use rxl_xen_sys::{abi, stable};

use super::foreign::ForeignHandle;
use super::hv;

const OP: &str = "XENMEM_acquire_resource (grant table)";
/// `GNTTAB_RESERVED_CONSOLE`, `GNTTAB_RESERVED_XENSTORE`.
const RESERVED: [usize; 2] = [0, 1];

/// The first frame of a domain's grant table, mapped.
struct GrantFrame {
    foreign: Arc<ForeignHandle>,
    resource: NonNull<stable::xenforeignmemory_resource_handle>,
    /// Each a `grant_entry_v1`.
    entries: NonNull<u64>,
}

impl GrantFrame {
    fn map(foreign: &Arc<ForeignHandle>, domain: DomId) -> HvResult<GrantFrame> {
        let mut start = null_mut();
        // SAFETY: the handle is open; `start` may be written; one frame, the kernel's choice of
        // address, no flags.
        let resource = unsafe {
            stable::xenforeignmemory_map_resource(
                foreign.raw(),
                domain.0,
                abi::XENMEM_resource_grant_table,
                abi::XENMEM_resource_grant_table_id_shared,
                0,
                1,
                &raw mut start,
                libc::PROT_READ | libc::PROT_WRITE,
                0,
            )
        };
        let error = io::Error::last_os_error();
        let resource = NonNull::new(resource).ok_or_else(|| refused(error))?;
        let entries = NonNull::new(start.cast()).ok_or_else(|| hv(OP, Errno::FAULT))?;
        Ok(GrantFrame { foreign: Arc::clone(foreign), resource, entries })
    }

    /// Makes `entry` the grant `index`. All of it at once, as Xen and the guest see it.
    fn write(&self, index: usize, entry: u64) {
        // SAFETY: 512 entries are mapped, and the reserved ones are the first.
        let at = unsafe { self.entries.add(index) };
        // SAFETY: mapped for writing and aligned.
        unsafe { at.write_volatile(entry) };
    }
}

impl Drop for GrantFrame {
    fn drop(&mut self) {
        // SAFETY: mapped with this handle; nothing refers to it any more.
        unsafe {
            stable::xenforeignmemory_unmap_resource(self.foreign.raw(), self.resource.as_ptr());
        }
    }
}

/// Writes the entries of console and xenstore: frame of the ring, domain that may map it.
pub(super) fn seed(
    foreign: &Arc<ForeignHandle>,
    domain: DomId,
    rings: [(u64, DomId); 2],
) -> HvResult<()> {
    let entries = entries(domain, rings)?;
    if entries.iter().all(Option::is_none) {
        return Ok(());
    }
    let table = GrantFrame::map(foreign, domain)?;
    for (index, entry) in RESERVED.into_iter().zip(entries) {
        if let Some(entry) = entry {
            table.write(index, entry);
        }
    }
    Ok(())
}

/// The entries to write. None for a ring that does not exist, nor for one whose backend is the
/// guest itself, which maps it as its own memory.
fn entries(domain: DomId, rings: [(u64, DomId); 2]) -> HvResult<[Option<u64>; 2]> {
    let mut entries = [None; 2];
    for (entry, (frame, backend)) in entries.iter_mut().zip(rings) {
        if frame != INVALID_FRAME && backend != domain {
            // Version 1 has 32 bits for a frame.
            let frame = u32::try_from(frame).map_err(|_| hv(OP, Errno::OVERFLOW))?;
            *entry = Some(permit(frame, backend));
        }
    }
    Ok(entries)
}

/// A `grant_entry_v1` that lets `backend` map `frame`: flags, domain, frame from the low bits up.
fn permit(frame: u32, backend: DomId) -> u64 {
    u64::from(abi::GTF_permit_access) | u64::from(backend.0) << 16 | u64::from(frame) << 32
}

fn refused(error: io::Error) -> HvError {
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
        let text = "this kernel cannot map a guest's grant table (Linux can from 4.18 on)";
        return hv(OP, io::Error::new(io::ErrorKind::Unsupported, text));
    }
    hv(OP, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rings_that_exist_and_belong_to_another_domain_get_a_grant() {
        let guest = DomId(5);
        let got = |rings| entries(guest, rings).unwrap();
        assert_eq!(got([(INVALID_FRAME, DomId(0)), (7, guest)]), [None, None]);
        let both = [Some(permit(8, DomId(0))), Some(permit(7, DomId(3)))];
        assert_eq!(got([(8, DomId(0)), (7, DomId(3))]), both);
    }

    #[test]
    fn an_entry_is_laid_out_as_the_header_says() {
        let entry = permit(0x1234_5678, DomId(0x7abc));
        // SAFETY: integers of the same size in all.
        let entry: abi::grant_entry_v1 = unsafe { std::mem::transmute(entry) };
        assert_eq!(u32::from(entry.flags), abi::GTF_permit_access);
        assert_eq!((entry.domid, entry.frame), (0x7abc, 0x1234_5678));
    }

    #[test]
    fn a_frame_of_more_than_32_bits_is_refused_and_not_cut() {
        assert!(entries(DomId(5), [(1 << 32, DomId(0)), (7, DomId(0))]).is_err());
    }
}
