//! Hypercalls but domctls: from numbers and structures to the model.
//!
//! Numbers and layouts are those of `xen/include/public`, by way of the headers that
//! `rxl-xen-sys` reads. Of each hypercall there is what a save helper uses.

use std::mem::offset_of;

use rustix::io::Errno;
use rxl_migrate::fake::FakeDomain;
use rxl_migrate::frame::{DomId, Pfn};
use rxl_migrate::hypervisor::{Domain, SourceDomain, TargetDomain};
use rxl_xen_sys::abi;

use crate::client::{Client, errno};
use crate::domctl;
use crate::memory::{Block, Hypercall};

/// `__HYPERVISOR_sysctl`.
const SYSCTL: u32 = 35;
/// `XEN_SYSCTL_get_cpu_policy`, and the version of the interface in Xen 4.17.
const SYSCTL_GET_CPU_POLICY: u32 = 29;
const SYSCTL_VERSION: u32 = 0x15;
/// Offsets of `nr_leaves` and `nr_msrs` in a `xen_sysctl`.
const SYSCTL_COUNTS: [usize; 2] = [12, 16];
/// Most leaves and MSRs that a policy of this machine has.
const POLICY_COUNTS_MAX: [u32; 2] = [256, 64];
/// Bytes of a `xen_sysctl`.
const SYSCTL_BYTES: usize = 136;
/// Calls of one multicall at most.
const MULTICALLS_MAX: u64 = 64;
/// The version of this Xen: 4.17.
const VERSION: u64 = 4 << 16 | 17;
/// Operations of one `mmuext_op` at most.
const MMUEXT_OPS_MAX: u64 = 1024;

/// Does a hypercall for `client`.
pub(crate) fn hypercall(client: &Client<'_>, op: u64, args: [u64; 5]) -> Hypercall<u64> {
    match u32::try_from(op).unwrap_or(u32::MAX) {
        abi::__HYPERVISOR_domctl => domctl::domctl(client, args[0]),
        abi::__HYPERVISOR_memory_op => memory_op(client, args[0], args[1]),
        abi::__HYPERVISOR_hvm_op => hvm_op(client, args[0], args[1]),
        abi::__HYPERVISOR_mmuext_op => mmuext_op(client, args),
        abi::__HYPERVISOR_multicall => multicall(client, args[0], args[1]),
        abi::__HYPERVISOR_xen_version if args[0] == u64::from(abi::XENVER_version) => Ok(VERSION),
        SYSCTL => sysctl(client, args[0]),
        _ => unknown(client, format!("hypercall {op}, first argument {:#x}", args[0])),
    }
}

/// Refuses what is not modelled, and remembers it.
pub(crate) fn unknown<T>(client: &Client<'_>, what: String) -> Hypercall<T> {
    client.machine.note_unknown(what);
    Err(Errno::NOSYS)
}

/// The domain of that number.
pub(crate) fn domain(client: &Client<'_>, id: u16) -> Hypercall<FakeDomain> {
    client.machine.host.domain(DomId(id)).ok_or(Errno::SRCH)
}

/// Xen says how each call of the list ended in the list itself.
fn multicall(client: &Client<'_>, list: u64, count: u64) -> Hypercall<u64> {
    type Entry = abi::multicall_entry;
    if count > MULTICALLS_MAX {
        return Err(Errno::TOOBIG);
    }
    let size = size_of::<Entry>() as u64;
    for address in (0..count).map(|index| list + index * size) {
        let entry = Block(client.memory.read(address, size_of::<Entry>())?);
        let arg = |index| entry.u64(offset_of!(Entry, args) + 8 * index);
        let args = std::array::from_fn(arg);
        let result = hypercall(client, entry.u64(offset_of!(Entry, op)), args);
        let result = result.unwrap_or_else(|e| i64::from(-e.raw_os_error()).cast_unsigned());
        let place = address + offset_of!(Entry, result) as u64;
        client.memory.write_words(place, &[result])?;
    }
    Ok(0)
}

fn memory_op(client: &Client<'_>, command: u64, address: u64) -> Hypercall<u64> {
    let memory = &client.memory;
    match u32::try_from(command).unwrap_or(u32::MAX) {
        abi::XENMEM_maximum_ram_page => Ok(client.machine.host.size().0),
        abi::XENMEM_maximum_gpfn => {
            let id = Block(memory.read(address, 2)?).u16(0);
            domain(client, id)?.maximum_gpfn().map_err(|e| errno(&e))
        }
        abi::XENMEM_machphys_mfn_list => {
            type List = abi::xen_machphys_mfn_list;
            let mut list = Block(memory.read(address, size_of::<List>())?);
            let (start, pages) = client.machine.host.size();
            let room = list.u32(offset_of!(List, max_extents)) as usize;
            let chunks: Vec<u64> = (start..start + pages).step_by(512).take(room).collect();
            memory.write_words(list.u64(offset_of!(List, extent_start)), &chunks)?;
            let count = u32::try_from(chunks.len()).map_err(|_| Errno::TOOBIG)?;
            list.put_u32(offset_of!(List, nr_extents), count);
            memory.write(address, &list.0).map(|()| 0)
        }
        abi::XENMEM_populate_physmap => populate(client, address),
        _ => unknown(client, format!("memory_op {command}")),
    }
}

/// Extent by extent: the result is how many there are before the first that cannot be had.
fn populate(client: &Client<'_>, address: u64) -> Hypercall<u64> {
    type Reservation = abi::xen_memory_reservation;
    let reservation = Block(client.memory.read(address, size_of::<Reservation>())?);
    let domain = domain(client, reservation.u16(offset_of!(Reservation, domid)))?;
    let order = reservation.u32(offset_of!(Reservation, extent_order));
    let list = reservation.u64(offset_of!(Reservation, extent_start));
    let count = reservation.u64(offset_of!(Reservation, nr_extents));
    let extents = client.memory.read_words(list, count)?;
    let extents: Vec<Pfn> = extents.into_iter().map(Pfn).collect();
    let frames = match domain.populate(&extents, order).map_err(|e| errno(&e)) {
        Ok(frames) => frames,
        Err(Errno::NOMEM) => Vec::new(),
        Err(errno) => return Err(errno),
    };
    client.memory.write_words(list, &frames)?;
    Ok(frames.len() as u64)
}

fn hvm_op(client: &Client<'_>, command: u64, address: u64) -> Hypercall<u64> {
    type Param = abi::xen_hvm_param;
    let mut param = Block(client.memory.read(address, size_of::<Param>())?);
    let domain = domain(client, param.u16(offset_of!(Param, domid)))?;
    let index = param.u32(offset_of!(Param, index));
    match u32::try_from(command).unwrap_or(u32::MAX) {
        abi::HVMOP_get_param => {
            let value = domain.hvm_param(index).map_err(|e| errno(&e))?;
            param.put_u64(offset_of!(Param, value), value);
            client.memory.write(address, &param.0).map(|()| 0)
        }
        abi::HVMOP_set_param => {
            let value = param.u64(offset_of!(Param, value));
            domain.set_hvm_param(index, value).map_err(|e| errno(&e)).map(|()| 0)
        }
        _ => unknown(client, format!("hvm_op {command}")),
    }
}

/// Pins only.
fn mmuext_op(client: &Client<'_>, args: [u64; 5]) -> Hypercall<u64> {
    type Op = abi::mmuext_op;
    let [list, count, _, id, _] = args;
    if count > MMUEXT_OPS_MAX {
        return Err(Errno::TOOBIG);
    }
    let domain = domain(client, u16::try_from(id).map_err(|_| Errno::SRCH)?)?;
    let mut tables = Vec::new();
    for address in (0..count).map(|index| list + index * size_of::<Op>() as u64) {
        let op = Block(client.memory.read(address, size_of::<Op>())?);
        let level = match op.u32(offset_of!(Op, cmd)) {
            abi::MMUEXT_PIN_L1_TABLE => 1,
            abi::MMUEXT_PIN_L2_TABLE => 2,
            abi::MMUEXT_PIN_L3_TABLE => 3,
            abi::MMUEXT_PIN_L4_TABLE => 4,
            other => return unknown(client, format!("mmuext_op {other}")),
        };
        tables.push((level, op.u64(offset_of!(Op, arg1))));
    }
    domain.pin_tables(&tables).map_err(|e| errno(&e)).map(|()| 0)
}

/// How large a CPU policy can be, and nothing else.
fn sysctl(client: &Client<'_>, address: u64) -> Hypercall<u64> {
    let mut sysctl = Block(client.memory.read(address, SYSCTL_BYTES)?);
    if sysctl.u32(4) != SYSCTL_VERSION {
        return Err(Errno::ACCESS);
    }
    match sysctl.u32(0) {
        SYSCTL_GET_CPU_POLICY => {
            for (offset, count) in SYSCTL_COUNTS.into_iter().zip(POLICY_COUNTS_MAX) {
                sysctl.put_u32(offset, count);
            }
            client.memory.write(address, &sysctl.0).map(|()| 0)
        }
        other => unknown(client, format!("sysctl {other}")),
    }
}
