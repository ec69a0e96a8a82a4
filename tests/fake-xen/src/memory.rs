//! The memory of a program that made a hypercall, and structures in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

/// A result with an errno.
pub(crate) type Hypercall<T> = Result<T, Errno>;

/// Bytes that one hypercall may read or write at an address: the log-dirty bitmap of 1 TiB.
const BYTES_MAX: usize = 32 << 20;

/// The memory of a process that waits for the answer to a hypercall.
#[derive(Debug)]
pub(crate) struct ClientMemory(File);

impl ClientMemory {
    pub(crate) fn of(pid: u64) -> io::Result<ClientMemory> {
        let path = format!("/proc/{pid}/mem");
        OpenOptions::new().read(true).write(true).open(path).map(ClientMemory)
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Hypercall<Vec<u8>> {
        if bytes > BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        let mut into = vec![0; bytes];
        self.0.read_exact_at(&mut into, address).map_err(|_| Errno::FAULT)?;
        Ok(into)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Hypercall<()> {
        self.0.write_all_at(bytes, address).map_err(|_| Errno::FAULT)
    }

    pub(crate) fn read_words(&self, address: u64, count: u64) -> Hypercall<Vec<u64>> {
        let count = usize::try_from(count).ok().filter(|count| *count <= BYTES_MAX / 8);
        let bytes = self.read(address, count.ok_or(Errno::TOOBIG)? * 8)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    pub(crate) fn write_words(&self, address: u64, words: &[u64]) -> Hypercall<()> {
        self.write(address, &words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>())
    }
}

/// A structure of Xen's interface: a copy, with fields by their offsets. Past its end there are
/// zeros, and writes are lost.
#[derive(Debug)]
pub(crate) struct Block(pub(crate) Vec<u8>);

impl Block {
    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        u16::from_ne_bytes(self.get(offset))
    }

    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32::from_ne_bytes(self.get(offset))
    }

    pub(crate) fn u64(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.get(offset))
    }

    pub(crate) fn put(&mut self, offset: usize, value: &[u8]) {
        rxl_migrate::x86::pv::put(&mut self.0, offset, value);
    }

    pub(crate) fn put_u32(&mut self, offset: usize, value: u32) {
        self.put(offset, &value.to_ne_bytes());
    }

    pub(crate) fn put_u64(&mut self, offset: usize, value: u64) {
        self.put(offset, &value.to_ne_bytes());
    }
}
