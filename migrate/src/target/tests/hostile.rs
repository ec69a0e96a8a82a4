//! Streams that lie, end early or are damaged: an error, never a panic, and no memory by their
//! word.

use proptest::prelude::*;

use super::{refusal, target};
use crate::error::Error;
use crate::fake::{Script, WIRING, Wire, tables};
use crate::frame::{PageBuf, PageType, Pfn};
use crate::stream::FormatError;
use crate::stream::libxc::{GuestKind, PageEntry, RecordKind, hvm_params, p2m_frames};
use crate::target::restore;
use crate::x86::hvm;

#[test]
fn a_stream_that_ends_early_is_an_error_wherever_it_ends() {
    // Every byte of the HVM stream; of the larger PV stream the heads of records and some others.
    for (script, stride) in [(Script::hvm(), 1), (Script::pv(), 61)] {
        let near =
            |at: usize| script.records.iter().any(|begin| (*begin..begin + 40).contains(&at));
        let ends = (0..script.bytes.len()).filter(|at| at % stride == 0 || near(*at));
        for end in ends {
            let (domain, mut toolstack) = target(script.hvm);
            let mut wire = Wire::new(script.bytes[..end].to_vec());
            match restore(&domain, &mut wire, &mut toolstack, &WIRING) {
                Err(Error::Stream { source, .. }) => {
                    assert_eq!(source.kind(), std::io::ErrorKind::UnexpectedEof, "at {end}");
                }
                other => panic!("at {end}: {other:?}"),
            }
            assert_eq!(domain.host().mapped_pages(), 0, "at {end}");
        }
    }
}

/// Static data of an HVM stream, then a record that is said to be of `length` bytes and has
/// these.
fn hvm_claiming(kind: RecordKind, length: u32, body: &[u8]) -> Script {
    let mut script = Script::new(GuestKind::Hvm, 3);
    script.record(RecordKind::StaticDataEnd, &[]);
    claim(&mut script, kind, length, body);
    script
}

fn claim(script: &mut Script, kind: RecordKind, length: u32, body: &[u8]) {
    script.bytes.extend(kind.code().to_le_bytes());
    script.bytes.extend(length.to_le_bytes());
    script.bytes.extend(body);
}

#[test]
fn lengths_and_counts_are_refused_before_anything_is_read_for_them() {
    let count = |count: u32| u64::from(count).to_le_bytes();
    let most = (128 << 20) - 8;
    for script in [
        hvm_claiming(RecordKind::PageData, u32::MAX, &[]),
        hvm_claiming(RecordKind::PageData, 0, &[]),
        hvm_claiming(RecordKind::PageData, 7, &[0; 8]),
        hvm_claiming(RecordKind::PageData, 8, &count(0)),
        hvm_claiming(RecordKind::PageData, 16, &count(2)),
        hvm_claiming(RecordKind::PageData, 16, &count(u32::MAX)),
        hvm_claiming(RecordKind::PageData, most, &count(most / 8 - 1)),
        hvm_claiming(RecordKind::PageData, 8 + 8 * ((1 << 16) + 1), &count((1 << 16) + 1)),
        hvm_claiming(RecordKind::HvmContext, most, &[]),
        hvm_claiming(RecordKind::HvmParams, most, &[]),
        hvm_claiming(RecordKind::HvmParams, 24, &[0xff; 24]),
        hvm_claiming(RecordKind::X86TscInfo, 32, &[0; 32]),
    ] {
        match refusal(&script) {
            Error::Format(FormatError::Length { .. } | FormatError::TooLong { .. }) => {}
            other => panic!("{other:?} at {:x?}", &script.bytes[48..]),
        }
    }
}

#[test]
fn entries_that_no_page_can_have_are_refused() {
    let mut pv = Script::pv();
    pv.rewind();
    let raw = |script: &Script, entry: u64| {
        let mut script = script.clone();
        claim(
            &mut script,
            RecordKind::PageData,
            16,
            &[&[1, 0, 0, 0, 0, 0, 0, 0], &entry.to_le_bytes()[..]].concat(),
        );
        script
    };
    let mut hvm = Script::hvm();
    hvm.rewind();
    for script in [
        raw(&hvm, 5 << 60),             // reserved type
        raw(&hvm, 0xf << 60 | 1 << 52), // reserved bit
        raw(&hvm, 0xe << 60 | 1 << 36), // more than a guest can address
        raw(&hvm, 0xf00f_ffff_ffff_ffff),
        raw(&pv, 0xe << 60 | 16), // past the p2m
        raw(&pv, 0xf << 60 | 1 << 40),
    ] {
        let error = refusal(&script);
        assert!(matches!(error, Error::Format(FormatError::PageEntry { .. })), "{error:?}");
    }
    let mut script = hvm.clone();
    script.pages(&[(1, PageType::Table { level: 1, pinned: false }, tables(&[(0, 1)]))]);
    let error = refusal(&script);
    assert!(matches!(error, Error::Format(FormatError::PageEntry { .. })), "{error:?}");
}

#[test]
fn a_guest_larger_than_its_domain_is_the_hypervisors_to_refuse() {
    let mut script = Script::hvm();
    script.rewind();
    let many = (0..60_000).map(|pfn| PageEntry { pfn: Pfn(pfn << 20), kind: PageType::AllocOnly });
    script.entries(&many.collect::<Vec<_>>());
    assert!(matches!(refusal(&script), Error::NoMemory(_)));
}

#[test]
fn content_that_makes_no_sense_is_refused() {
    let pv_with = |kind, body: &[u8]| {
        let mut script = Script::new(GuestKind::Pv, 3);
        script.record(kind, body);
        script
    };
    let hvm_with = |kind, body: &[u8]| {
        let mut script = Script::hvm();
        script.rewind();
        script.record(kind, body);
        script
    };
    let pv_state_with = |kind, body: &[u8]| {
        let mut script = Script::pv();
        script.rewind();
        script.record(kind, body);
        script
    };
    let params = |index: u64, value: u64| hvm_params(&[(index, value)]);
    for script in [
        pv_with(RecordKind::X86PvInfo, &[8, 3, 0, 0, 0, 0, 0, 0]),
        pv_with(RecordKind::X86PvInfo, &[8, 4]),
        pv_with(RecordKind::X86CpuidPolicy, &[0; 25]),
        pv_with(RecordKind::X86MsrPolicy, &[]),
        hvm_with(RecordKind::HvmParams, &params(u64::from(hvm::STORE_PFN), 20)),
        hvm_with(RecordKind::HvmParams, &params(u64::from(hvm::IOREQ_PFN), u64::MAX)),
        hvm_with(RecordKind::HvmParams, &params(1 << 32, 0)),
        pv_state_with(RecordKind::X86PvVcpuBasic, &[0; 5167]),
        pv_state_with(RecordKind::X86PvVcpuMsrs, &[0; 9]),
        pv_state_with(
            RecordKind::X86PvVcpuXsave,
            &[&[2, 0, 0, 0, 0, 0, 0, 0], &[0; 64][..]].concat(),
        ),
        pv_state_with(RecordKind::SharedInfo, &[0; 4095]),
        pv_state_with(
            RecordKind::X86PvP2mFrames,
            &p2m_frames(Pfn(u64::from(u32::MAX)), &[Pfn(9)]).unwrap(),
        ),
        pv_state_with(
            RecordKind::X86PvP2mFrames,
            &[0, 4, 0, 0, 0, 4, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0],
        ),
    ] {
        let error = refusal(&script);
        assert!(matches!(error, Error::Format(_)), "{error:?}");
    }
}

#[test]
fn a_table_that_refers_to_a_page_outside_of_the_p2m_is_refused() {
    let mut script = Script::pv();
    let table = PageType::Table { level: 1, pinned: false };
    script.pages(&[(12, table, tables(&[(511, 16)]))]);
    assert!(matches!(refusal(&script), Error::Format(FormatError::Content { .. })));
}

#[test]
fn a_stream_without_the_state_that_a_guest_needs_is_refused() {
    let without = |script: Script, kind: RecordKind| {
        let mut kept = script.clone();
        kept.bytes.truncate(script.records[0]);
        let ends = script.records.iter().copied().skip(1).chain([script.bytes.len()]);
        for (begin, end) in script.records.iter().zip(ends) {
            let record = &script.bytes[*begin..end];
            if record[..4] != kind.code().to_le_bytes() {
                kept.bytes.extend(record);
            }
        }
        refusal(&kept)
    };
    for (script, kind) in [
        (Script::hvm(), RecordKind::HvmContext),
        (Script::pv(), RecordKind::SharedInfo),
        (Script::pv(), RecordKind::X86PvVcpuBasic),
    ] {
        let error = without(script, kind);
        assert!(matches!(error, Error::Format(_) | Error::Guest(_)), "{kind:?}: {error:?}");
    }
}

#[test]
fn other_guests_than_this_version_and_this_domain_are_for_are_named() {
    let (domain, mut toolstack) = target(true);
    let refused = restore(&domain, &mut Script::pv().wire(), &mut toolstack, &WIRING);
    assert_eq!(
        refused.map_err(|e| std::error::Error::source(&e).unwrap().to_string()).unwrap_err(),
        "the stream holds a PV guest, the domain was made for an HVM guest"
    );
    let mut script = Script::new(GuestKind::Pv, 3);
    script.record(RecordKind::X86PvInfo, &[4, 3, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(refusal(&script), Error::Unsupported(_)));
}

#[test]
fn a_record_that_may_be_skipped_is_skipped_and_a_checkpoint_is_not() {
    let inserted = |code: u32| {
        let script = Script::hvm();
        let mut bytes = script.bytes.clone();
        let extra = [&code.to_le_bytes()[..], &9001_u32.to_le_bytes(), &[0xaa; 9008]].concat();
        bytes.splice(script.records[3]..script.records[3], extra);
        let (domain, mut toolstack) = target(true);
        restore(&domain, &mut Wire::new(bytes), &mut toolstack, &WIRING)
    };
    assert!(inserted(0x8000_1234).is_ok());
    let checkpoint = inserted(0x0e);
    assert!(matches!(checkpoint, Err(Error::Format(FormatError::UnknownRecord(0x0e)))));
}

#[test]
fn a_page_that_comes_twice_in_a_record_costs_no_more_than_itself() {
    let mut script = Script::hvm();
    let page = |byte| (9, PageType::Normal, Box::new(PageBuf([byte; 4096])));
    script.pages(&(0..40).map(page).collect::<Vec<_>>());
    let (domain, ..) = super::restored(&script.finish_hvm());
    assert_eq!(super::page(&domain, 9).0, [39; 4096]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Damage is mostly done to heads: in pages it is content.
    #[test]
    fn a_damaged_stream_never_makes_it_panic(
        hvm: bool,
        damage in prop::collection::vec(
            (any::<prop::sample::Index>(), 0_usize..48, any::<u8>()), 1..4,
        ),
    ) {
        let mut script = if hvm { Script::hvm() } else { Script::pv() };
        for (record, offset, byte) in damage {
            let at = record.get(&script.records) + offset;
            if let Some(there) = script.bytes.get_mut(at) {
                *there = byte;
            }
        }
        let (domain, mut toolstack) = target(hvm);
        let _ = restore(&domain, &mut script.wire(), &mut toolstack, &WIRING);
        prop_assert_eq!(domain.host().mapped_pages(), 0);
    }

    #[test]
    fn tables_and_contexts_of_any_content_never_make_it_panic(
        ptes in prop::collection::vec((0_usize..512, any::<u64>()), 0..20),
        words in prop::collection::vec((0_usize..646, any::<u64>()), 0..6),
    ) {
        let mut table = PageBuf::zeroed();
        for (slot, pte) in ptes {
            // Present, and of a pfn below 16.
            let pte = pte & !0x000f_ffff_ffff_0000 | 1;
            table.0[slot * 8..][..8].copy_from_slice(&pte.to_le_bytes());
        }
        let mut script = Script::pv();
        script.pages(&[(12, PageType::Table { level: 1, pinned: true }, table)]);
        let script = script.finish_pv_with(|basic| for (slot, word) in words {
            basic[slot * 8..][..8].copy_from_slice(&word.to_le_bytes());
        });
        let (domain, mut toolstack) = target(false);
        let _ = restore(&domain, &mut script.wire(), &mut toolstack, &WIRING);
        prop_assert_eq!(domain.host().mapped_pages(), 0);
    }
}
