//! The contents of the machine's page frames, and the machine-to-physical table behind them.
//!
//! They are private, or in a file that other processes map (a memfd): then page `n` of the file
//! is frame `n`, and the table follows the last frame. It is copied from and to by offset; what
//! another process does to it at the same moment is seen or not, as with real memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::frame::{INVALID_FRAME, PAGE_SIZE, PageBuf, WORDS_PER_PAGE};

#[derive(Debug)]
pub(super) struct Memory {
    bytes: Bytes,
    frames: u64,
}

#[derive(Debug)]
enum Bytes {
    Private(Vec<u8>),
    File(File),
}

impl Memory {
    /// `frames` frames of zeros, and a table in which none is anybody's. `file`, if given, is
    /// empty.
    pub(super) fn new(frames: u64, file: Option<File>) -> Memory {
        let pages = frames + frames.div_ceil(WORDS_PER_PAGE as u64);
        let length = pages * PAGE_SIZE as u64;
        let bytes = match file {
            None => Bytes::Private(vec![0; length as usize]),
            Some(file) => {
                file.set_len(length).expect("room for the machine's memory");
                Bytes::File(file)
            }
        };
        let mut memory = Memory { bytes, frames };
        (frames..pages).for_each(|page| memory.fill(page, 0xff));
        memory
    }

    /// The first page of the machine-to-physical table, counted like a frame.
    pub(super) fn m2p_start(&self) -> u64 {
        self.frames
    }

    /// Pages of the table. It is whole pages: the last one may have entries of no frame.
    pub(super) fn m2p_pages(&self) -> u64 {
        self.frames.div_ceil(WORDS_PER_PAGE as u64)
    }

    /// The pfn of `mfn` in the domain that has it, or all ones.
    pub(super) fn m2p(&self, mfn: u64) -> u64 {
        let (page, slot) = self.m2p_entry(mfn);
        if mfn < self.frames { self.word(page, slot) } else { INVALID_FRAME }
    }

    pub(super) fn set_m2p(&mut self, mfn: u64, pfn: u64) {
        let (page, slot) = self.m2p_entry(mfn);
        self.set_word(page, slot, pfn);
    }

    /// As [`Memory::set_m2p`] for each pair of mfn and pfn; those of neighbours in one go.
    pub(super) fn set_m2p_entries(&mut self, owners: &[(u64, u64)]) {
        for run in owners.chunk_by(|a, b| a.0 + 1 == b.0) {
            let entries: Vec<u8> = run.iter().flat_map(|(_, pfn)| pfn.to_le_bytes()).collect();
            let first = run.first().map_or(0, |(mfn, _)| *mfn) as usize;
            self.write(self.frames, first * 8, &entries);
        }
    }

    fn m2p_entry(&self, mfn: u64) -> (u64, usize) {
        let words = WORDS_PER_PAGE as u64;
        (self.frames + mfn / words, (mfn % words) as usize)
    }

    pub(super) fn word(&self, mfn: u64, slot: usize) -> u64 {
        let mut word = [0; 8];
        self.read(mfn, slot * 8, &mut word);
        u64::from_le_bytes(word)
    }

    pub(super) fn set_word(&mut self, mfn: u64, slot: usize, word: u64) {
        self.write(mfn, slot * 8, &word.to_le_bytes());
    }

    pub(super) fn page(&self, mfn: u64) -> Box<PageBuf> {
        let mut page = PageBuf::zeroed();
        self.read(mfn, 0, &mut page.0);
        page
    }

    pub(super) fn set_page(&mut self, mfn: u64, page: &PageBuf) {
        self.write(mfn, 0, &page.0);
    }

    pub(super) fn fill(&mut self, mfn: u64, byte: u8) {
        self.write(mfn, 0, &[byte; PAGE_SIZE]);
    }

    fn read(&self, mfn: u64, offset: usize, into: &mut [u8]) {
        let start = mfn as usize * PAGE_SIZE + offset;
        match &self.bytes {
            Bytes::Private(bytes) => into.copy_from_slice(&bytes[start..][..into.len()]),
            Bytes::File(file) => file.read_exact_at(into, start as u64).expect("its memory"),
        }
    }

    fn write(&mut self, mfn: u64, offset: usize, from: &[u8]) {
        let start = mfn as usize * PAGE_SIZE + offset;
        match &mut self.bytes {
            Bytes::Private(bytes) => bytes[start..][..from.len()].copy_from_slice(from),
            Bytes::File(file) => file.write_all_at(from, start as u64).expect("its memory"),
        }
    }
}
