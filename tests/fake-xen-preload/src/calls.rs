//! libxencall, and what libxenctrl opens besides it.

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::io;
use std::ptr::{NonNull, null_mut};

use crate::connection::{self, number, set_errno};
use crate::wire;

/// Alignment of hypercall buffers, and what their sizes are rounded up to.
const PAGE: usize = 4096;

fn call(op: c_uint, args: [u64; 5]) -> io::Result<u64> {
    let [a, b, c, d, e] = args;
    connection::with(|c_| c_.ask(&[wire::CALL, u64::from(op), a, b, c, d, e], &[]))
}

/// A handle: not null, and never looked into.
fn opened() -> *mut c_void {
    match connection::open() {
        Ok(()) => NonNull::<u64>::dangling().as_ptr().cast(),
        Err(error) => {
            set_errno(&error);
            null_mut()
        }
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn xencall_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    opened()
}

#[unsafe(no_mangle)]
extern "C" fn xencall_close(_handle: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn xendevicemodel_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    opened()
}

#[unsafe(no_mangle)]
extern "C" fn xendevicemodel_close(_handle: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn xencall0(_handle: *mut c_void, op: c_uint) -> c_int {
    number(call(op, [0; 5])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall1(_handle: *mut c_void, op: c_uint, a: u64) -> c_int {
    number(call(op, [a, 0, 0, 0, 0])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall2(_handle: *mut c_void, op: c_uint, a: u64, b: u64) -> c_int {
    number(call(op, [a, b, 0, 0, 0])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall3(_handle: *mut c_void, op: c_uint, a: u64, b: u64, c: u64) -> c_int {
    number(call(op, [a, b, c, 0, 0])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall4(_handle: *mut c_void, op: c_uint, a: u64, b: u64, c: u64, d: u64) -> c_int {
    number(call(op, [a, b, c, d, 0])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall5(
    _handle: *mut c_void,
    op: c_uint,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    e: u64,
) -> c_int {
    number(call(op, [a, b, c, d, e])) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn xencall2L(_handle: *mut c_void, op: c_uint, a: u64, b: u64) -> c_long {
    number(call(op, [a, b, 0, 0, 0]))
}

#[unsafe(no_mangle)]
extern "C" fn xencall_buffers_never_fault(_handle: *mut c_void) -> c_int {
    1
}

#[unsafe(no_mangle)]
extern "C" fn xencall_alloc_buffer_pages(_handle: *mut c_void, pages: usize) -> *mut c_void {
    xencall_alloc_buffer(null_mut(), pages.saturating_mul(PAGE))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn xencall_free_buffer_pages(
    _handle: *mut c_void,
    buffer: *mut c_void,
    _pages: usize,
) {
    // SAFETY: the caller had it from `xencall_alloc_buffer_pages`.
    unsafe { libc::free(buffer) };
}

/// Whole pages of zeros.
#[unsafe(no_mangle)]
extern "C" fn xencall_alloc_buffer(_handle: *mut c_void, bytes: usize) -> *mut c_void {
    let bytes = bytes.max(1).saturating_add(PAGE - 1) & !(PAGE - 1);
    let mut buffer = null_mut();
    // SAFETY: `buffer` may be written; the alignment is a power of two.
    let result = unsafe { libc::posix_memalign(&raw mut buffer, PAGE, bytes) };
    if result != 0 {
        set_errno(&io::Error::from_raw_os_error(result));
        return null_mut();
    }
    // SAFETY: `bytes` bytes were allocated there.
    unsafe { buffer.cast::<u8>().write_bytes(0, bytes) };
    buffer
}

#[unsafe(no_mangle)]
unsafe extern "C" fn xencall_free_buffer(_handle: *mut c_void, buffer: *mut c_void) {
    // SAFETY: the caller had it from `xencall_alloc_buffer`.
    unsafe { libc::free(buffer) };
}
