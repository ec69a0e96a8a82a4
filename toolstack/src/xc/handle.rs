//! Hypercalls through libxencall: the handle, buffers that Xen may write, and the calling
//! conventions of domctl, memory_op, hvm_op and mmuext_op.
//!
//! # Safety
//! All `unsafe` here is of two kinds. Calls of libxencall: they need a handle that is open, which
//! [`CallHandle`] is from its making to its drop, and a buffer keeps its handle alive. Hypercalls:
//! they make Xen read and write memory by address; the structure itself is always in a buffer of
//! this module, and where it holds addresses in turn, the caller vouches for them.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::mem::{align_of, offset_of, size_of};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rxl_migrate::frame::{DomId, PAGE_SIZE};
use rxl_migrate::hypervisor::HvResult;
use rxl_xen_sys::{abi, stable};

use super::hv;

/// Most bytes of one hypercall buffer: the log-dirty bitmap of a p2m of 2^33 pages (32 TiB).
const BUFFER_BYTES_MAX: usize = 1 << 30;
/// Versions of the domctl interface with the structures that are used here: Xen 4.22 to 4.14.
const DOMCTL_VERSIONS: [u32; 7] = [0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12];

/// A structure that Xen reads and writes in place.
///
/// # Safety
/// Every sequence of bytes is a value of the type.
pub(super) unsafe trait Argument: Copy {}

/// An [`Argument`] that holds no address, so that any value of it is safe to hand to Xen.
///
/// # Safety
/// Xen takes no field of it for an address.
pub(super) unsafe trait WithoutPointer: Argument {}

/// `XEN_DOMCTL_{get,set}_ext_vcpucontext` as bytes: its size is the sender's Xen's choice.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct ExtendedBytes(pub(super) [u8; 128]);

macro_rules! arguments {
    ($marker:ident: $($t:ty),* $(,)?) => {$(
        // SAFETY: integers and raw pointers only (`domctl.h`, `memory.h`, `hvm_op.h`); the types
        // listed under `WithoutPointer` have no guest handle.
        unsafe impl $marker for $t {}
    )*};
}
arguments!(Argument:
    (), u16, ExtendedBytes,
    abi::xen_domctl, abi::xen_domctl_address_size, abi::xen_domctl_cpu_policy,
    abi::xen_domctl_getdomaininfo, abi::xen_domctl_getpageframeinfo3,
    abi::xen_domctl_getvcpuinfo, abi::xen_domctl_hvmcontext, abi::xen_domctl_scheduler_op,
    abi::xen_domctl_shadow_op,
    abi::xen_domctl_tsc_info, abi::xen_domctl_vcpu_msrs, abi::xen_domctl_vcpucontext,
    abi::xen_domctl_vcpuextstate, abi::xen_hvm_param, abi::xen_machphys_mfn_list,
    abi::xen_memory_reservation, abi::xen_sysctl, abi::xen_sysctl_physinfo,
);
arguments!(WithoutPointer:
    (), u16, ExtendedBytes,
    abi::xen_domctl_address_size, abi::xen_domctl_getdomaininfo, abi::xen_domctl_getvcpuinfo,
    abi::xen_domctl_tsc_info, abi::xen_hvm_param, abi::xen_sysctl_physinfo,
);

/// An open handle of libxencall.
pub(super) struct CallHandle(NonNull<stable::xencall_handle>);

// SAFETY: `xencall.h`: unless opened as XENCALL_OPENFLAG_NON_REENTRANT, a handle may be used by
// several threads.
unsafe impl Send for CallHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for CallHandle {}

impl CallHandle {
    fn open() -> HvResult<Arc<CallHandle>> {
        // SAFETY: the logger lives for ever; no flags.
        let raw = unsafe { stable::xencall_open(silent_logger(), 0) };
        NonNull::new(raw)
            .map(|raw| Arc::new(CallHandle(raw)))
            .ok_or_else(|| hv("xencall_open (/dev/xen/privcmd)", io::Error::last_os_error()))
    }
}

impl Drop for CallHandle {
    fn drop(&mut self) {
        // SAFETY: open, and nothing can use it any more; buffers hold an `Arc` of it.
        unsafe { stable::xencall_close(self.0.as_ptr()) };
    }
}

/// Memory of this process that Xen may read and write during a hypercall. Whole pages, zeros at
/// first. Xen touches it only while a hypercall that was given its address runs.
pub(super) struct Buffer {
    call: Arc<CallHandle>,
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: it owns its memory, and its handle is `Send` and `Sync`.
unsafe impl Send for Buffer {}

impl Buffer {
    /// For at least `bytes`.
    pub(super) fn new(call: &Arc<CallHandle>, bytes: usize) -> HvResult<Buffer> {
        const OP: &str = "xencall_alloc_buffer_pages";
        if bytes > BUFFER_BYTES_MAX {
            return Err(hv(OP, Errno::TOOBIG));
        }
        let pages = bytes.div_ceil(PAGE_SIZE).max(1);
        // SAFETY: the handle is open.
        let raw = unsafe { stable::xencall_alloc_buffer_pages(call.0.as_ptr(), pages) };
        let start = NonNull::new(raw.cast()).ok_or_else(|| hv(OP, io::Error::last_os_error()))?;
        let buffer = Buffer { call: Arc::clone(call), start, pages };
        // SAFETY: `pages` pages were allocated there. That the library zeroes them is not in its
        // header, and `bytes` relies on it.
        unsafe { start.as_ptr().write_bytes(0, buffer.len()) };
        Ok(buffer)
    }

    /// With `content` at its start.
    pub(super) fn with(call: &Arc<CallHandle>, content: &[u8]) -> HvResult<Buffer> {
        let mut buffer = Buffer::new(call, content.len())?;
        if let Some(to) = buffer.bytes_mut().get_mut(..content.len()) {
            to.copy_from_slice(content);
        }
        Ok(buffer)
    }

    /// Its size in bytes.
    pub(super) fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// What is in it.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes, owned; Xen writes them only during a hypercall, which
        // takes its address from `pointer` and so needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len()) }
    }

    /// What is in it.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len()) }
    }

    /// The first `count` bytes; fewer where there are fewer.
    pub(super) fn first(&self, count: usize) -> &[u8] {
        self.bytes().get(..count).unwrap_or(self.bytes())
    }

    /// Its 64-bit words.
    pub(super) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.bytes().as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w))
    }

    /// Writes `words` from its start on; those that do not fit are left out.
    pub(super) fn put_words(&mut self, words: impl IntoIterator<Item = u64>) {
        for (to, word) in self.bytes_mut().as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_ne_bytes();
        }
    }

    /// Its address, for a guest handle in a hypercall's argument.
    pub(super) fn pointer<T>(&mut self) -> *mut T {
        self.start.as_ptr().cast()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this handle and this size.
        unsafe {
            stable::xencall_free_buffer_pages(
                self.call.0.as_ptr(),
                self.start.as_ptr().cast(),
                self.pages,
            );
        }
    }
}

/// A hypercall whose result is a `long`: through libxencall it would be cut to an `int`, so it
/// goes in a multicall of one entry, which has room for it.
#[derive(Clone, Copy)]
#[repr(C)]
struct LongCall<T> {
    entry: abi::multicall_entry,
    argument: T,
}

// SAFETY: integers, and an argument.
unsafe impl<T: Argument> Argument for LongCall<T> {}

/// A way to Xen, and the version of its domctl interface. `Send` but not `Sync`: one thread at a
/// time uses the page in which arguments are put.
pub(super) struct Hypercalls {
    call: Arc<CallHandle>,
    /// One page, for the argument itself.
    argument: RefCell<Buffer>,
    domctl_version: u32,
    /// Calls so far, by the name of the operation.
    calls: RefCell<BTreeMap<&'static str, u64>>,
}

impl Hypercalls {
    /// Opens the way to Xen and finds its domctl version by asking for `domid`, which must exist.
    pub(super) fn open(domid: DomId) -> HvResult<(Hypercalls, abi::xen_domctl_getdomaininfo)> {
        let call = CallHandle::open()?;
        let argument = RefCell::new(Buffer::new(&call, PAGE_SIZE)?);
        let mut xen = Hypercalls { call, argument, domctl_version: 0, calls: RefCell::default() };
        for version in DOMCTL_VERSIONS {
            xen.domctl_version = version;
            match xen.domain_info(domid) {
                Ok(info) => return Ok((xen, info)),
                Err(e) if e.source.raw_os_error() == Some(libc::EACCES) => {}
                Err(e) => return Err(e),
            }
        }
        let text = "this Xen has none of the domctl interfaces 0x12 to 0x18 (Xen 4.14 to 4.22)";
        Err(hv("XEN_DOMCTL_getdomaininfo", io::Error::new(io::ErrorKind::Unsupported, text)))
    }

    /// For buffers.
    pub(super) fn handle(&self) -> &Arc<CallHandle> {
        &self.call
    }

    /// Calls so far, by the name of the operation.
    pub(super) fn calls(&self) -> BTreeMap<String, u64> {
        self.calls.borrow().iter().map(|(op, count)| ((*op).to_owned(), *count)).collect()
    }

    fn count(&self, op: &'static str) {
        *self.calls.borrow_mut().entry(op).or_default() += 1;
    }

    /// The version of the domctl interface that Xen has.
    pub(super) fn domctl_version(&self) -> u32 {
        self.domctl_version
    }

    /// `XEN_DOMCTL_getdomaininfo`. Older releases answer with the next domain where there is none
    /// of that number.
    pub(super) fn domain_info(&self, domid: DomId) -> HvResult<abi::xen_domctl_getdomaininfo> {
        let op = super::op!(XEN_DOMCTL_getdomaininfo);
        let mut info = abi::xen_domctl_getdomaininfo::default();
        self.domctl(op, domid, &mut info)?;
        if info.domain != domid.0 {
            return Err(hv(op.0, Errno::SRCH));
        }
        Ok(info)
    }

    /// A domctl whose argument holds no address.
    pub(super) fn domctl<T: WithoutPointer>(
        &self,
        op: (&'static str, u32),
        domid: DomId,
        argument: &mut T,
    ) -> HvResult<()> {
        // SAFETY: there is no address in it.
        unsafe { self.domctl_with_pointer(op, domid, argument) }
    }

    /// A domctl. `argument` is what Xen made of it, also after an error.
    ///
    /// # Safety
    /// Every address in `argument` is null or that of a [`Buffer`] which has all the bytes that
    /// Xen may read or write there by the other fields, and which nobody else uses during the
    /// call.
    pub(super) unsafe fn domctl_with_pointer<T: Argument>(
        &self,
        op: (&'static str, u32),
        domid: DomId,
        argument: &mut T,
    ) -> HvResult<()> {
        const { assert!(size_of::<T>() <= 128 && align_of::<T>() <= 8) };
        self.count(op.0);
        let mut domctl = abi::xen_domctl {
            cmd: op.1,
            interface_version: self.domctl_version,
            domain: domid.0,
            ..Default::default()
        };
        let place = (&raw mut domctl.u).cast::<T>();
        // SAFETY: the union has 128 bytes, aligned to 8, as asserted above.
        unsafe { place.write(*argument) };
        let result = self.exchange(&mut domctl, |handle, address| {
            // SAFETY: the handle is open, `address` is that of the whole structure, and the
            // caller vouches for the addresses in it.
            unsafe { stable::xencall1(handle, abi::__HYPERVISOR_domctl, address) }
        });
        let place = (&raw const domctl.u).cast::<T>();
        // SAFETY: as for the write; every sequence of bytes is a `T`.
        *argument = unsafe { place.read() };
        result.map(drop).map_err(|e| hv(op.0, e))
    }

    /// A sysctl of that version of the interface whose argument holds no address; what Xen made
    /// of the argument comes back.
    pub(super) fn sysctl<T: WithoutPointer>(
        &self,
        op: (&'static str, u32),
        version: u32,
        argument: T,
    ) -> HvResult<T> {
        const { assert!(size_of::<T>() <= 128 && align_of::<T>() <= 8) };
        self.count(op.0);
        let mut sysctl =
            abi::xen_sysctl { cmd: op.1, interface_version: version, ..Default::default() };
        let place = (&raw mut sysctl.u).cast::<T>();
        // SAFETY: the union has 128 bytes, aligned to 8, as asserted above.
        unsafe { place.write(argument) };
        let result = self.exchange(&mut sysctl, |handle, address| {
            // SAFETY: the handle is open, `address` is that of the whole structure, and there is
            // no address in it.
            unsafe { stable::xencall1(handle, abi::__HYPERVISOR_sysctl, address) }
        });
        result.map_err(|e| hv(op.0, e))?;
        let place = (&raw const sysctl.u).cast::<T>();
        // SAFETY: as for the write; every sequence of bytes is a `T`.
        Ok(unsafe { place.read() })
    }

    /// A memory_op whose argument holds no address.
    pub(super) fn memory_op<T: WithoutPointer>(
        &self,
        op: (&'static str, u32),
        argument: &mut T,
    ) -> HvResult<u64> {
        // SAFETY: there is no address in it.
        unsafe { self.memory_op_with_pointer(op, argument) }
    }

    /// A memory_op. `argument` is what Xen made of it.
    ///
    /// # Safety
    /// As [`Hypercalls::domctl_with_pointer`].
    pub(super) unsafe fn memory_op_with_pointer<T: Argument>(
        &self,
        op: (&'static str, u32),
        argument: &mut T,
    ) -> HvResult<u64> {
        self.count(op.0);
        let page = self.argument.borrow_mut().pointer::<u8>();
        let inner = page.expose_provenance() + offset_of!(LongCall<T>, argument);
        let entry = abi::multicall_entry {
            op: abi::__HYPERVISOR_memory_op.into(),
            result: 0,
            args: [op.1.into(), inner as u64, 0, 0, 0, 0],
        };
        let mut call = LongCall { entry, argument: *argument };
        let result = self.exchange(&mut call, |handle, address| {
            // SAFETY: the handle is open; `address` is that of one entry, and the address in it
            // is the argument's behind it. The caller vouches for those in the argument.
            unsafe { stable::xencall2(handle, abi::__HYPERVISOR_multicall, address, 1) }
        });
        *argument = call.argument;
        result.map_err(|e| hv(op.0, e))?;
        long_result(call.entry.result).map_err(|e| hv(op.0, e))
    }

    /// `HVMOP_get_param` or `HVMOP_set_param`.
    pub(super) fn hvm_param(
        &self,
        op: (&'static str, u32),
        param: &mut abi::xen_hvm_param,
    ) -> HvResult<()> {
        self.count(op.0);
        let result = self.exchange(param, |handle, address| {
            // SAFETY: the handle is open, `address` is that of a whole `xen_hvm_param`.
            unsafe { stable::xencall2(handle, abi::__HYPERVISOR_hvm_op, op.1.into(), address) }
        });
        result.map(drop).map_err(|e| hv(op.0, e))
    }

    /// The first `count` entries of `ops`, an array of `mmuext_op`.
    pub(super) fn mmuext(&self, ops: &mut Buffer, count: usize, domid: DomId) -> HvResult<()> {
        const OP: &str = "mmuext_op";
        self.count(OP);
        if count > ops.len() / size_of::<abi::mmuext_op>() {
            return Err(hv(OP, Errno::INVAL));
        }
        let address = ops.pointer::<u8>().expose_provenance() as u64;
        // SAFETY: the handle is open; `count` entries are in the buffer, as just tested; no place
        // for the number of those that were done is given.
        let result = unsafe {
            stable::xencall4(
                self.call.0.as_ptr(),
                abi::__HYPERVISOR_mmuext_op,
                address,
                count as u64,
                0,
                domid.0.into(),
            )
        };
        outcome(result).map(drop).map_err(|e| hv(OP, e))
    }

    /// `XENVER_version`: major, minor.
    pub(super) fn version(&self) -> HvResult<(u32, u32)> {
        let (name, number) = super::op!(XENVER_version);
        // SAFETY: the handle is open; this command has no argument.
        let result = unsafe {
            stable::xencall2(self.call.0.as_ptr(), abi::__HYPERVISOR_xen_version, number.into(), 0)
        };
        let version = outcome(result).map_err(|e| hv(name, e))?;
        Ok((version >> 16, version & 0xffff))
    }

    /// Puts `value` into the page for arguments, does `call` with its address, and takes it out
    /// again.
    fn exchange<T: Argument>(
        &self,
        value: &mut T,
        call: impl FnOnce(*mut stable::xencall_handle, u64) -> libc::c_int,
    ) -> io::Result<u32> {
        const { assert!(size_of::<T>() <= PAGE_SIZE) };
        let mut page = self.argument.borrow_mut();
        let place = page.pointer::<T>();
        // SAFETY: a page has room for it and is aligned for everything.
        unsafe { place.write(*value) };
        let result = outcome(call(self.call.0.as_ptr(), place.expose_provenance() as u64));
        // SAFETY: as above; what Xen wrote there is a `T`, as all bytes are.
        *value = unsafe { place.read() };
        result
    }
}

/// What libxencall's result means: less than zero says that `errno` is set.
fn outcome(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What the result of a multicall's entry means: less than zero is an error number.
fn long_result(result: u64) -> io::Result<u64> {
    match i64::try_from(result) {
        Ok(_) => Ok(result),
        Err(_) => {
            let code = i32::try_from(result.wrapping_neg()).unwrap_or(libc::EINVAL);
            Err(io::Error::from_raw_os_error(code))
        }
    }
}

/// A logger that drops everything: these libraries write to stderr otherwise, and what they know
/// is in `errno`.
pub(super) fn silent_logger() -> *mut stable::xentoollog_logger {
    unsafe extern "C" fn message(
        _: *mut stable::xentoollog_logger,
        _: stable::xentoollog_level,
        _: libc::c_int,
        _: *const libc::c_char,
        _: *const libc::c_char,
        _: *mut stable::__va_list_tag,
    ) {
    }
    unsafe extern "C" fn destroy(_: *mut stable::xentoollog_logger) {}
    static SILENT: stable::xentoollog_logger = stable::xentoollog_logger {
        vmessage: Some(message),
        progress: None,
        destroy: Some(destroy),
    };
    // The libraries never write to a logger.
    (&raw const SILENT).cast_mut()
}
