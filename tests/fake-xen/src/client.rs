//! One program on the machine: its requests, and what it has mapped.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::io::Errno;
use rxl_migrate::fake::FakePages;
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{Access, HvError};
use rxl_xen_sys::abi;

use crate::hypercall;
use crate::machine::Shared;
use crate::memory::{ClientMemory, Hypercall};
use crate::wire::{self, PAGE_ERROR};

/// Pages that Xen's headers promise at each place of the machine-to-physical table: 2 MiB.
const M2P_CHUNK_PAGES: u64 = 512;
/// Pages of one mapping at most: 16 GiB.
const MAP_PAGES_MAX: u64 = 1 << 22;

pub(crate) struct Client<'a> {
    pub(crate) machine: &'a Shared,
    pub(crate) memory: ClientMemory,
    /// By the address at which the client has them.
    mappings: HashMap<u64, Held>,
}

/// What is mapped.
enum Held {
    /// References to frames of a domain, dropped with it.
    Pages { _pages: FakePages },
    /// Xen's own memory.
    Xen,
}

/// Answers requests until the client goes away, and then drops what it had mapped.
pub(crate) fn serve(mut socket: UnixStream, machine: &Shared) {
    // A client that ends in the middle of a request is as gone as any other.
    let _ = serve_until_end(&mut socket, machine);
}

fn serve_until_end(socket: &mut UnixStream, machine: &Shared) -> io::Result<()> {
    let [wire::HELLO, pid, ..] = receive(socket)? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let memory = ClientMemory::of(pid)?;
    answer(socket, Ok(0), &machine.memory_place())?;
    let mut client = Client { machine, memory, mappings: HashMap::new() };
    loop {
        let request = receive(socket)?;
        machine.note_request();
        if !machine.delay().is_zero() {
            thread::sleep(machine.delay());
        }
        let [what, args @ ..] = request;
        match what {
            wire::CALL => {
                let [op, a, b, c, d, e, _] = args;
                let result = hypercall::hypercall(&client, op, [a, b, c, d, e]);
                answer(socket, result, &[])?;
            }
            wire::MAP => {
                let count = args[3];
                if count > MAP_PAGES_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let frames = receive_words(socket, count)?;
                answer_places(socket, client.map(args, &frames))?;
            }
            wire::RESOURCE => answer_places(socket, client.map_resource(args))?,
            wire::UNMAP => {
                let held = client.mappings.remove(&args[0]);
                answer(socket, held.map(|_| 0).ok_or(Errno::INVAL), &[])?;
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Client<'_> {
    /// Maps frames; the place of each comes back.
    fn map(&mut self, args: [u64; 7], frames: &[u64]) -> Hypercall<Vec<u64>> {
        let [address, domain, writable, ..] = args;
        if domain == u64::from(abi::DOMID_XEN) {
            let place = |frame: &u64| self.m2p_place(*frame, writable != 0);
            let places = frames.iter().map(place).collect();
            self.mappings.insert(address, Held::Xen);
            return Ok(places);
        }
        let access = if writable == 0 { Access::Read } else { Access::ReadWrite };
        let domain = u16::try_from(domain).map_err(|_| Errno::SRCH)?;
        let domain = self.machine.host.domain(DomId(domain)).ok_or(Errno::SRCH)?;
        let (pages, errors) = domain.map_each(frames, access).map_err(|e| errno(&e))?;
        let place = |(page, errno): (Option<_>, i32)| match page {
            Some(rxl_migrate::frame::Mfn(mfn)) => mfn,
            None => page_error(errno),
        };
        let places = pages.machine_frames().into_iter().zip(errors).map(place).collect();
        self.mappings.insert(address, Held::Pages { _pages: pages });
        Ok(places)
    }

    /// The place of a page of the machine-to-physical table. Where a chunk of it goes on after
    /// its end, Xen shows a neighbour.
    fn m2p_place(&self, page: u64, writable: bool) -> u64 {
        let (start, pages) = self.machine.host.size();
        let chunks_end = start + pages.next_multiple_of(M2P_CHUNK_PAGES);
        if writable || !(start..chunks_end).contains(&page) {
            return page_error(Errno::PERM.raw_os_error());
        }
        page.min(start + pages - 1)
    }

    fn map_resource(&mut self, args: [u64; 7]) -> Hypercall<Vec<u64>> {
        let [address, domain, kind, id, frame, count, _] = args;
        let wanted = (abi::XENMEM_resource_grant_table, abi::XENMEM_resource_grant_table_id_shared);
        if (kind, id, frame, count) != (wanted.0.into(), wanted.1.into(), 0, 1) {
            let what = format!("XENMEM_acquire_resource: type {kind}, id {id}, frame {frame}");
            self.machine.note_unknown(what);
            return Err(Errno::NOSYS);
        }
        let domain = u16::try_from(domain).map_err(|_| Errno::SRCH)?;
        let domain = self.machine.host.domain(DomId(domain)).ok_or(Errno::SRCH)?;
        let table = domain.grant_table().map_err(|e| errno(&e))?;
        self.mappings.insert(address, Held::Xen);
        Ok(vec![table.0])
    }
}

/// What the model refused a call with.
pub(crate) fn errno(error: &HvError) -> Errno {
    Errno::from_raw_os_error(error.source.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
}

fn page_error(errno: i32) -> u64 {
    PAGE_ERROR | u64::from(errno.unsigned_abs())
}

fn receive(socket: &mut UnixStream) -> io::Result<[u64; wire::REQUEST_WORDS]> {
    let words = receive_words(socket, wire::REQUEST_WORDS as u64)?;
    words.try_into().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn receive_words(socket: &mut UnixStream, count: u64) -> io::Result<Vec<u64>> {
    let bytes = usize::try_from(count * 8).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; bytes];
    socket.read_exact(&mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
}

fn answer(socket: &mut UnixStream, result: Hypercall<u64>, words: &[u64]) -> io::Result<()> {
    let result = result.unwrap_or_else(|errno| i64::from(-errno.raw_os_error()).cast_unsigned());
    let all = [&[result], words].concat();
    socket.write_all(&all.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>())
}

fn answer_places(socket: &mut UnixStream, places: Hypercall<Vec<u64>>) -> io::Result<()> {
    match places {
        Ok(places) => answer(socket, Ok(0), &places),
        Err(errno) => answer(socket, Err(errno), &[]),
    }
}
