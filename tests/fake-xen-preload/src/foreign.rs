//! libxenforeignmemory: pages of the machine's memory, mapped where the machine says they are.

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use crate::connection::{self, Connection, number, set_errno};
use crate::wire;

const PAGE: usize = 4096;

/// What is mapped at an address, to be unmapped again.
struct Resource {
    start: *mut c_void,
    pages: usize,
}

#[unsafe(no_mangle)]
extern "C" fn xenforeignmemory_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    crate::calls::xencall_open(null_mut(), 0)
}

#[unsafe(no_mangle)]
extern "C" fn xenforeignmemory_close(_handle: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn xenforeignmemory_map(
    handle: *mut c_void,
    domain: u32,
    prot: c_int,
    pages: usize,
    frames: *const u64,
    errors: *mut c_int,
) -> *mut c_void {
    // SAFETY: the caller's duty, which is the same.
    unsafe { xenforeignmemory_map2(handle, domain, null_mut(), prot, 0, pages, frames, errors) }
}

/// Without room for errors, a page that cannot be mapped fails the whole. With it, its place in
/// the mapping cannot be accessed, and its error is negated, as the Linux driver's is.
#[unsafe(no_mangle)]
unsafe extern "C" fn xenforeignmemory_map2(
    _handle: *mut c_void,
    domain: u32,
    address: *mut c_void,
    prot: c_int,
    _flags: c_int,
    pages: usize,
    frames: *const u64,
    errors: *mut c_int,
) -> *mut c_void {
    // SAFETY: the caller's array of `pages` frames.
    let frames = unsafe { std::slice::from_raw_parts(frames, pages) };
    let writable = u64::from(prot & libc::PROT_WRITE != 0);
    let request = |start: u64| {
        let request = [wire::MAP, start, u64::from(domain), writable, pages as u64];
        (request.to_vec(), frames)
    };
    let (start, failed) = match map(address, prot, pages, request) {
        Ok(mapped) => mapped,
        Err(error) => {
            set_errno(&error);
            return null_mut();
        }
    };
    if errors.is_null() {
        if let Some(errno) = failed.iter().find(|errno| **errno != 0) {
            unmap(start, pages);
            set_errno(&io::Error::from_raw_os_error(*errno));
            return null_mut();
        }
        return start;
    }
    for (index, errno) in failed.into_iter().enumerate() {
        // SAFETY: the caller's array of `pages` errors.
        let place = unsafe { errors.add(index) };
        // SAFETY: as above.
        unsafe { place.write(-errno) };
    }
    start
}

#[unsafe(no_mangle)]
extern "C" fn xenforeignmemory_unmap(
    _handle: *mut c_void,
    address: *mut c_void,
    pages: usize,
) -> c_int {
    unmap(address, pages)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn xenforeignmemory_map_resource(
    _handle: *mut c_void,
    domain: u16,
    kind: c_uint,
    id: c_uint,
    frame: c_ulong,
    frames: c_ulong,
    address: *mut *mut c_void,
    prot: c_int,
    _flags: c_int,
) -> *mut c_void {
    let request = |start: u64| {
        let what = [u64::from(domain), u64::from(kind), u64::from(id), frame, frames];
        ([&[wire::RESOURCE, start], &what[..]].concat(), &[][..])
    };
    let pages = frames as usize;
    match map(null_mut(), prot, pages, request) {
        Ok((start, _)) => {
            // SAFETY: the caller's place for the address.
            unsafe { address.write(start) };
            Box::into_raw(Box::new(Resource { start, pages })).cast()
        }
        Err(error) => {
            set_errno(&error);
            null_mut()
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn xenforeignmemory_unmap_resource(
    _handle: *mut c_void,
    resource: *mut c_void,
) -> c_int {
    // SAFETY: the caller had it from `xenforeignmemory_map_resource`.
    let resource = unsafe { Box::from_raw(resource.cast::<Resource>()) };
    unmap(resource.start, resource.pages)
}

/// Reserves room for `pages`, tells the machine where it is, and maps what the machine says. The
/// address comes back, and an errno for each page (0: it is there).
fn map<'a>(
    address: *mut c_void,
    prot: c_int,
    pages: usize,
    request: impl FnOnce(u64) -> (Vec<u64>, &'a [u64]),
) -> io::Result<(*mut c_void, Vec<c_int>)> {
    let start = reserve(address, pages)?;
    let (request, frames) = request(start.addr() as u64);
    let mapped = connection::with(|connection| {
        connection.ask(&request, frames)?;
        let places = connection.receive(pages)?;
        replace(connection, start, prot, &places)?;
        Ok(places)
    });
    match mapped {
        Ok(places) => {
            let errno = |place: u64| (place & wire::PAGE_ERROR != 0).then_some(place as c_int);
            Ok((start, places.into_iter().map(|place| errno(place).unwrap_or(0)).collect()))
        }
        Err(error) => {
            // SAFETY: reserved above; nobody knows of it.
            unsafe { libc::munmap(start, pages * PAGE) };
            Err(error)
        }
    }
}

/// Room that cannot be accessed yet.
fn reserve(address: *mut c_void, pages: usize) -> io::Result<*mut c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping; the address is a hint only.
    let start = unsafe { libc::mmap(address, pages * PAGE, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start) }
}

/// Puts the machine's pages into the room, neighbours in one go.
fn replace(
    connection: &Connection,
    start: *mut c_void,
    prot: c_int,
    places: &[u64],
) -> io::Result<()> {
    let mut done = 0;
    for run in places.chunk_by(|a, b| a & wire::PAGE_ERROR == 0 && a + 1 == *b) {
        let at = start.wrapping_byte_add(done * PAGE);
        done += run.len();
        let Some(place) = run.first().filter(|place| *place & wire::PAGE_ERROR == 0) else {
            continue;
        };
        // Filled in now, as the Linux driver does: what is mapped of a guest never faults.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        let (bytes, fd) = (run.len() * PAGE, connection.memory.as_raw_fd());
        let offset = (place * PAGE as u64) as i64;
        // SAFETY: within the room that was reserved, to which there is no reference yet.
        let got = unsafe { libc::mmap(at, bytes, prot, flags, fd, offset) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Removes a mapping, first here, then from the machine's books.
fn unmap(start: *mut c_void, pages: usize) -> c_int {
    // SAFETY: the caller had it from one of the functions that map.
    let result = unsafe { libc::munmap(start, pages * PAGE) };
    if result != 0 {
        return result;
    }
    number(connection::with(|c| c.ask(&[wire::UNMAP, start.addr() as u64], &[]))) as c_int
}
