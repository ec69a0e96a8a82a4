//! Streams made by hand, record by record: small ones, and those that no sender would write.

use super::Wire;
use crate::frame::{DomId, PageBuf, PageType, Pfn};
use crate::hypervisor::TscInfo;
use crate::stream::libxc::{
    GuestKind, PV_INFO_64BIT, PageEntry, RecordKind, StreamHeader, hvm_params, p2m_frames,
    page_data_head, record, tsc_info, vcpu_head,
};
use crate::target::Options;
use crate::x86::hvm;
use crate::x86::pv::{VCPU_CONTEXT_BYTES, context, put, start_info};

/// What the domains that such a stream is for are wired to.
pub const WIRING: Options = Options {
    store_evtchn: 17,
    store_domid: DomId(0),
    console_evtchn: 18,
    console_domid: DomId(3),
};

/// A stream.
#[derive(Clone, Debug)]
pub struct Script {
    /// Of an HVM guest.
    pub hvm: bool,
    /// All of it so far.
    pub bytes: Vec<u8>,
    /// Where each record begins.
    pub records: Vec<usize>,
    /// Records before the state.
    memory_ends: usize,
}

/// A table, normalised: slots and the pfns in them, all writable.
#[must_use]
pub fn tables(entries: &[(usize, u64)]) -> Box<PageBuf> {
    let mut page = PageBuf::zeroed();
    for (slot, pfn) in entries {
        put(&mut page.0, slot * 8, &(pfn << 12 | 0x63).to_le_bytes());
    }
    page
}

fn normal(pfn: u64, byte: u8) -> (u64, PageType, Box<PageBuf>) {
    (pfn, PageType::Normal, Box::new(PageBuf([byte; 4096])))
}

fn table(pfn: u64, level: u8, below: &[(usize, u64)]) -> (u64, PageType, Box<PageBuf>) {
    (pfn, PageType::Table { level, pinned: level == 4 }, tables(below))
}

impl Script {
    /// The headers alone.
    #[must_use]
    pub fn new(guest: GuestKind, version: u32) -> Script {
        let header = StreamHeader { version, guest, xen: (4, 17) };
        Script {
            hvm: guest == GuestKind::Hvm,
            bytes: header.to_bytes().to_vec(),
            records: Vec::new(),
            memory_ends: 0,
        }
    }

    /// A small PV guest: 16 pfns, of which 0 and 15 have no memory. 1 to 3 and 10 are tables,
    /// top level first, 5 the start info page, 6 and 7 the rings, 8 a GDT, 9 the p2m.
    #[must_use]
    pub fn pv() -> Script {
        Script::pv_memory().finish_pv()
    }

    /// [`Script::pv`] up to its state.
    fn pv_memory() -> Script {
        let mut script = Script::new(GuestKind::Pv, 3);
        script.record(RecordKind::X86PvInfo, &PV_INFO_64BIT);
        script.record(RecordKind::X86CpuidPolicy, &[1; 24]);
        script.record(RecordKind::StaticDataEnd, &[]);
        script.record(RecordKind::X86PvP2mFrames, &p2m_frames(Pfn(15), &[Pfn(9)]).unwrap());
        let mut start = PageBuf::zeroed();
        put(&mut start.0, start_info::STORE_MFN, &6_u64.to_le_bytes());
        put(&mut start.0, start_info::CONSOLE_MFN, &7_u64.to_le_bytes());
        script.pages(&[
            table(1, 4, &[(0, 2), (300, 2)]),
            table(2, 3, &[(0, 3)]),
            table(3, 2, &[(0, 10)]),
            normal(4, 0x44),
            (5, PageType::Normal, start),
        ]);
        script.pages(&[normal(6, 6), normal(7, 7), normal(8, 8), normal(9, 9)]);
        script.pages(&[table(10, 1, &[(0, 4), (1, 5), (2, 9), (3, 11)])]);
        script
    }

    /// An HVM guest of four pages.
    #[must_use]
    pub fn hvm() -> Script {
        let mut script = Script::new(GuestKind::Hvm, 3);
        script.record(RecordKind::X86CpuidPolicy, &[1; 24]);
        script.record(RecordKind::X86MsrPolicy, &[1; 16]);
        script.record(RecordKind::StaticDataEnd, &[]);
        script.hvm_pages();
        script.finish_hvm()
    }

    /// The same as an old sender writes it.
    #[must_use]
    pub fn hvm_v2() -> Script {
        let mut script = Script::new(GuestKind::Hvm, 2);
        script.hvm_pages();
        script.finish_hvm()
    }

    fn hvm_pages(&mut self) {
        self.pages(&[normal(0, 0x11), normal(1, 0x22), normal(2, 0x22)]);
        self.pages(&[normal(3, 0x33)]);
    }

    /// Adds state and END.
    #[must_use]
    pub fn finish_hvm(mut self) -> Script {
        self.memory_ends = self.records.len();
        self.tsc();
        self.record(RecordKind::HvmContext, &[7; 40]);
        let (store, console) = (u64::from(hvm::STORE_PFN), u64::from(hvm::CONSOLE_PFN));
        let params = [(store, 1), (console, 2), (u64::from(hvm::PAE_ENABLED), 1)];
        self.record(RecordKind::HvmParams, &hvm_params(&params));
        self.record(RecordKind::End, &[]);
        self
    }

    /// Ends the memory, if need be, and adds state and END.
    #[must_use]
    pub fn finish_pv(self) -> Script {
        self.finish_pv_with(|_| ())
    }

    /// The same with a change to the context of vCPU 0.
    #[must_use]
    pub fn finish_pv_with(mut self, change: impl FnOnce(&mut [u8])) -> Script {
        self.rewind();
        self.memory_ends = self.records.len();
        self.tsc();
        self.record(RecordKind::SharedInfo, &[0x55; 4096]);
        let mut basic = vec![0x66; VCPU_CONTEXT_BYTES];
        let mut put = |offset, word: u64| put(&mut basic, offset, &word.to_le_bytes());
        put(context::START_INFO, 5);
        put(context::GDT_ENTRIES, 32);
        put(context::GDT_FRAMES, 8);
        put(context::CR3, 1 << 12);
        put(context::CR1, 1 << 12 | 1);
        put(context::FLAGS, 0);
        change(&mut basic);
        self.vcpu(RecordKind::X86PvVcpuBasic, 0, &basic);
        self.vcpu(RecordKind::X86PvVcpuExtended, 0, &[9; 64]);
        self.vcpu(RecordKind::X86PvVcpuXsave, 0, &[8; 600]);
        self.vcpu(RecordKind::X86PvVcpuMsrs, 0, &[]);
        self.record(RecordKind::End, &[]);
        self
    }

    fn tsc(&mut self) {
        let tsc = TscInfo { mode: 1, khz: 2, nsec: 3, incarnation: 4 };
        self.record(RecordKind::X86TscInfo, &tsc_info(&tsc));
    }

    /// Takes the state away again, so that more memory can follow.
    pub fn rewind(&mut self) {
        if self.memory_ends > 0 {
            self.cut(self.memory_ends);
            self.memory_ends = 0;
        }
    }

    /// Keeps only the first `records` records.
    pub fn cut(&mut self, records: usize) {
        self.bytes.truncate(self.records[records]);
        self.records.truncate(records);
    }

    /// Records so far.
    #[must_use]
    pub fn record_count(&self) -> usize {
        self.records.len()
    }

    /// A record.
    pub fn record(&mut self, kind: RecordKind, body: &[u8]) {
        self.records.push(self.bytes.len());
        self.bytes.extend(record(kind, &[body]).unwrap());
    }

    /// One of the records of a vCPU.
    pub fn vcpu(&mut self, kind: RecordKind, id: u32, state: &[u8]) {
        self.record(kind, &[&vcpu_head(id), state].concat());
    }

    /// A page-data record; it takes the state away.
    pub fn pages(&mut self, pages: &[(u64, PageType, Box<PageBuf>)]) {
        self.rewind();
        self.records.push(self.bytes.len());
        let entry = |page: &(u64, PageType, _)| PageEntry { pfn: Pfn(page.0), kind: page.1 };
        let entries: Vec<PageEntry> = pages.iter().map(entry).collect();
        self.bytes.extend(page_data_head(&entries).unwrap());
        pages.iter().for_each(|page| self.bytes.extend(page.2.0));
    }

    /// A page-data record without data; it takes the state away.
    pub fn entries(&mut self, entries: &[PageEntry]) {
        self.rewind();
        self.records.push(self.bytes.len());
        self.bytes.extend(page_data_head(entries).unwrap());
    }

    /// To be read.
    #[must_use]
    pub fn wire(&self) -> Wire {
        Wire::new(self.bytes.clone())
    }
}
