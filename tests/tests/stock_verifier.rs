//! Streams made with the engine's writers, judged by Debian's `verify-stream-v2`.
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use rxl_migrate::frame::{PageType, Pfn};
use rxl_migrate::hypervisor::TscInfo;
use rxl_migrate::stream::libxc::*;
use rxl_migrate::x86::pv::VCPU_CONTEXT_BYTES;
use rxl_tests::stock::{Format, verify_stream};

/// A record of `entries` with a page of `0x5a` for each that has data.
fn page_data(entries: &[(u64, PageType)]) -> Vec<u8> {
    let entries: Vec<_> =
        entries.iter().map(|(pfn, kind)| PageEntry { pfn: Pfn(*pfn), kind: *kind }).collect();
    let pages = entries.iter().filter(|e| e.kind.has_data()).count();
    [page_data_head(&entries).unwrap(), vec![0x5a; 4096 * pages]].concat()
}

fn stream(guest: GuestKind, records: &[Vec<u8>]) -> Vec<u8> {
    let header = StreamHeader { version: VERSION, guest, xen: (4, 17) };
    [&header.to_bytes()[..], &records.concat()].concat()
}

fn empty(kind: RecordKind) -> Vec<u8> {
    record(kind, &[]).unwrap()
}

fn of(kind: RecordKind, body: &[u8]) -> Vec<u8> {
    record(kind, &[body]).unwrap()
}

fn tsc() -> Vec<u8> {
    of(RecordKind::X86TscInfo, &tsc_info(&TscInfo { khz: 2_400_000, ..TscInfo::default() }))
}

fn vcpu(kind: RecordKind, bytes: usize) -> Vec<u8> {
    record(kind, &[&vcpu_head(0), &vec![1; bytes]]).unwrap()
}

/// Every kind of record of a PV guest.
fn pv_stream() -> Vec<u8> {
    let table = PageType::Table { level: 4, pinned: true };
    let pages = [(0, PageType::Normal), (1, table), (2, PageType::Invalid), (9, PageType::Broken)];
    let records = [
        of(RecordKind::X86PvInfo, &PV_INFO_64BIT),
        of(RecordKind::X86CpuidPolicy, &[0; 48]),
        of(RecordKind::X86MsrPolicy, &[0; 16]),
        empty(RecordKind::StaticDataEnd),
        of(RecordKind::X86PvP2mFrames, &p2m_frames(Pfn(1000), &[Pfn(7), Pfn(8)]).unwrap()),
        page_data(&pages),
        page_data(&[(3, PageType::AllocOnly)]),
        empty(RecordKind::Verify),
        page_data(&[(0, PageType::Normal)]),
        tsc(),
        of(RecordKind::SharedInfo, &[0; 4096]),
        vcpu(RecordKind::X86PvVcpuBasic, VCPU_CONTEXT_BYTES),
        vcpu(RecordKind::X86PvVcpuExtended, 64),
        vcpu(RecordKind::X86PvVcpuXsave, 832),
        vcpu(RecordKind::X86PvVcpuMsrs, 16),
        empty(RecordKind::End),
    ];
    stream(GuestKind::Pv, &records)
}

/// Every kind of record of an HVM or PVH guest; the context has a length that needs padding.
fn hvm_stream() -> Vec<u8> {
    let records = [
        of(RecordKind::X86CpuidPolicy, &[0; 24]),
        of(RecordKind::X86MsrPolicy, &[0; 16]),
        empty(RecordKind::StaticDataEnd),
        page_data(&[(0, PageType::Normal), (0xfeffc, PageType::Normal)]),
        tsc(),
        of(RecordKind::HvmContext, &[3; 1021]),
        of(RecordKind::HvmParams, &hvm_params(&[(1, 0xfeffc), (17, 0xfeffd)])),
        empty(RecordKind::End),
    ];
    stream(GuestKind::Hvm, &records)
}

#[test]
fn stock_reads_a_pv_stream() {
    let summary = verify_stream(&pv_stream(), Format::Libxc).unwrap();
    for line in [
        "Libxc Image Header: Version 3, little endian",
        "Domain Header: x86 PV from Xen 4.17",
        "64bit guest, 4 levels of pagetables",
        "Start pfn 0x0, End 0x3e8",
        "Squashed 2 Page Data records together",
        "Mode 0, 2400000 kHz, 0 ns, incarnation 0",
        "vcpu0 basic context, 5168 bytes",
        "vcpu0 msrs context, 16 bytes",
        "Libxc Record: End, length 0",
    ] {
        assert!(summary.contains(line), "{line:?} is not in:\n{summary}");
    }
}

#[test]
fn stock_reads_an_hvm_stream() {
    let summary = verify_stream(&hvm_stream(), Format::Libxc).unwrap();
    for line in [
        "Domain Header: x86 HVM from Xen 4.17",
        "Libxc Record: HVM context, length 1021",
        "Libxc Record: HVM params, length 40",
        "Libxc Record: End, length 0",
    ] {
        assert!(summary.contains(line), "{line:?} is not in:\n{summary}");
    }
}

#[test]
fn stock_refuses_a_stream_that_ends_early_or_has_a_wrong_bit() {
    let stream = pv_stream();
    let complaint = |bytes: &[u8]| verify_stream(bytes, Format::Libxc).unwrap_err().to_string();
    let cut = complaint(&stream[..stream.len() - 8]);
    assert!(cut.contains("Stream truncated"), "{cut}");
    let mut reserved = stream.clone();
    reserved[18] = 1;
    let reserved = complaint(&reserved);
    assert!(reserved.contains("Reserved bits set in image header"), "{reserved}");
}
