//! The libxc stream's bytes: golden bytes of each header and record both ways, what is refused,
//! and properties of readers and writers over arbitrary input.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a panic is a failed test")]

use proptest::prelude::*;

use rxl_migrate::frame::{PAGE_SIZE, PFN_MASK, PageType, Pfn};
use rxl_migrate::hypervisor::TscInfo;
use rxl_migrate::stream::libxc::{self, *};
use rxl_migrate::x86::pv::VCPU_CONTEXT_BYTES;

const PV_HEADER: [u8; 40] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // marker
    b'X', b'E', b'N', b'F', 0, 0, 0, 3, // id, version: big endian
    0, 0, 0, 0, 0, 0, 0, 0, // options, reserved
    1, 0, 0, 0, 12, 0, 0, 0, // PV, page shift: little endian
    4, 0, 0, 0, 17, 0, 0, 0, // Xen 4.17
];

fn patched(at: usize, value: u8) -> [u8; 40] {
    let mut bytes = PV_HEADER;
    bytes[at] = value;
    bytes
}

#[test]
fn the_headers_have_the_bytes_of_the_specification_both_ways() {
    let pv = StreamHeader { version: 3, guest: GuestKind::Pv, xen: (4, 17) };
    assert_eq!(pv.to_bytes(), PV_HEADER);
    assert_eq!(StreamHeader::parse(PV_HEADER), Ok(pv));
    let hvm = StreamHeader { guest: GuestKind::Hvm, ..pv };
    assert_eq!(hvm.to_bytes(), patched(24, 2));
    assert_eq!(StreamHeader::parse(patched(24, 2)), Ok(hvm));
    let old = StreamHeader { version: 2, ..pv };
    assert_eq!(StreamHeader::parse(patched(15, 2)), Ok(old));
}

#[test]
fn reserved_parts_of_the_headers_are_ignored() {
    let header = StreamHeader::parse(PV_HEADER);
    for at in [16, 18, 23, 30, 31] {
        assert_eq!(StreamHeader::parse(patched(at, 0xfe)), header, "byte {at}");
    }
}

#[test]
fn headers_of_other_streams_are_refused_by_name() {
    let cases = [
        (patched(0, 0), "not a libxc stream (marker 0xffffffffffffff, id 0x58454e46)"),
        (patched(11, b'X'), "not a libxc stream"),
        (patched(15, 1), "stream version 1; this program reads 2 and 3"),
        (patched(15, 4), "stream version 4"),
        (patched(17, 1), "the stream is big endian"),
        (patched(24, 3), "a domain of unknown type 3"),
        (patched(24, 0), "a domain of unknown type 0"),
        (patched(28, 16), "pages of 2^16 bytes"),
    ];
    for (bytes, expected) in cases {
        let error = StreamHeader::parse(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Every kind of record with its number, from the specification's table.
const KINDS: [(RecordKind, u32); 16] = [
    (RecordKind::End, 0x00),
    (RecordKind::PageData, 0x01),
    (RecordKind::X86PvInfo, 0x02),
    (RecordKind::X86PvP2mFrames, 0x03),
    (RecordKind::X86PvVcpuBasic, 0x04),
    (RecordKind::X86PvVcpuExtended, 0x05),
    (RecordKind::X86PvVcpuXsave, 0x06),
    (RecordKind::SharedInfo, 0x07),
    (RecordKind::X86TscInfo, 0x08),
    (RecordKind::HvmContext, 0x09),
    (RecordKind::HvmParams, 0x0a),
    (RecordKind::X86PvVcpuMsrs, 0x0c),
    (RecordKind::Verify, 0x0d),
    (RecordKind::StaticDataEnd, 0x10),
    (RecordKind::X86CpuidPolicy, 0x11),
    (RecordKind::X86MsrPolicy, 0x12),
];

/// The header at the start of `record`.
fn header_of(record: &[u8]) -> Result<RecordHeader, FormatError> {
    RecordHeader::parse(*record.first_chunk().expect("a record has a header"))
}

/// The body of `record` as a reader sees it, its padding checked.
fn body_of(record: &[u8]) -> (RecordKind, &[u8]) {
    let header = header_of(record).unwrap();
    let (body, padding) = record[RECORD_HEADER_BYTES..].split_at(header.length);
    assert_eq!(padding, vec![0; header.padding()]);
    match header.kind {
        ReadKind::Known(kind) => (kind, body),
        ReadKind::Optional(code) => panic!("optional record {code:#x}"),
    }
}

#[test]
fn a_record_is_type_length_body_and_zeros_up_to_a_multiple_of_8() {
    for (kind, code) in KINDS {
        let code = u8::try_from(code).unwrap();
        assert_eq!(record(kind, &[]).unwrap(), [code, 0, 0, 0, 0, 0, 0, 0]);
        let padded = [code, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0];
        let bytes = record(kind, &[&[1, 2], &[], &[3, 4, 5]]).unwrap();
        assert_eq!(bytes, padded);
        assert_eq!(body_of(&bytes), (kind, &[1, 2, 3, 4, 5][..]));
    }
}

#[test]
fn unknown_records_are_skipped_if_optional_and_refused_if_not() {
    let head = |code: u32| [code.to_le_bytes(), 16_u32.to_le_bytes()].concat();
    // TOOLSTACK, CHECKPOINT and its list are known to the specification, not to this program.
    for code in [0x0b, 0x0e, 0x0f, 0x13, 0x7fff_ffff] {
        assert_eq!(header_of(&head(code)), Err(FormatError::UnknownRecord(code)));
    }
    for code in [OPTIONAL, OPTIONAL | 1, 0xffff_ffff] {
        let expected = RecordHeader { kind: ReadKind::Optional(code), length: 16 };
        assert_eq!(header_of(&head(code)), Ok(expected));
    }
}

#[test]
fn no_record_is_longer_than_128_mib_padding_included() {
    let longest = RECORD_BYTES_MAX - 7;
    let head = |length: u32| [9_u32.to_le_bytes(), length.to_le_bytes()].concat();
    let header = header_of(&head(longest)).unwrap();
    assert!(header.length + header.padding() <= RECORD_BYTES_MAX as usize);
    for length in [longest + 1, RECORD_BYTES_MAX, u32::MAX] {
        assert_eq!(header_of(&head(length)), Err(FormatError::TooLong { kind: 9, length }));
    }
    let mib = vec![0; 1 << 20];
    let too_much = record(RecordKind::HvmContext, &[&mib[..]; 128]).unwrap_err();
    assert!(too_much.to_string().contains("longer than any record may be"), "{too_much}");
}

fn entry(pfn: u64, kind: PageType) -> PageEntry {
    PageEntry { pfn: Pfn(pfn), kind }
}

#[test]
fn page_data_has_the_bytes_of_the_specification_both_ways() {
    let pinned = PageType::Table { level: 4, pinned: true };
    let entries =
        [entry(0x123, PageType::Normal), entry(PFN_MASK, PageType::Invalid), entry(5, pinned)];
    let head = page_data_head(&entries).unwrap();
    let length = 8 + 3 * 8 + 2 * 4096;
    let expected = [
        &[1, 0, 0, 0, 0x20, 0x20, 0, 0][..], // type, length
        &[3, 0, 0, 0, 0, 0, 0, 0],           // count, reserved
        &[0x23, 1, 0, 0, 0, 0, 0, 0],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f, 0xf0],
        &[5, 0, 0, 0, 0, 0, 0, 0xc0],
    ];
    assert_eq!(head, expected.concat());
    let header = header_of(&head).unwrap();
    assert_eq!((header.kind, header.length), (ReadKind::Known(RecordKind::PageData), length));
    let count = page_data_count(*head[8..].first_chunk().unwrap(), length).unwrap();
    assert_eq!(count, 3);
    assert_eq!(page_data_entries(&head[16..16 + 8 * count], length).unwrap(), entries);
}

#[test]
fn page_data_that_contradicts_its_length_is_refused() {
    let count = |n: u32, length| page_data_count(u64::from(n).to_le_bytes(), length);
    assert!(count(0, 8).unwrap_err().to_string().contains("no page in it"));
    assert_eq!(count(2, 24), Ok(2));
    for (n, length) in [(2, 23), (1, 8), (1, 0), (u32::MAX, 0x07ff_fff8)] {
        let error = count(n, length).unwrap_err().to_string();
        assert!(error.contains("shorter than its count"), "{n} in {length}: {error}");
    }
    let one = entry(1, PageType::Normal).encode().to_le_bytes();
    for length in [16, 16 + 4095, 16 + 4097, 16 + 8192] {
        let error = page_data_entries(&one, length).unwrap_err().to_string();
        assert!(error.contains("not the length that its entries ask for"), "{error}");
    }
}

#[test]
fn page_entries_with_reserved_types_or_bits_are_refused() {
    for nibble in 5..=8_u64 {
        let error = page_data_entries(&(nibble << 60).to_le_bytes(), 16).unwrap_err();
        assert!(error.to_string().contains("has a reserved type"), "{error}");
    }
    for bit in 52..60 {
        let error = page_data_entries(&(0xf << 60 | 1_u64 << bit).to_le_bytes(), 16).unwrap_err();
        assert!(error.to_string().contains("has reserved bits set"), "{error}");
    }
}

#[test]
fn more_pages_than_a_record_holds_cannot_be_written() {
    let too_many = vec![entry(0, PageType::Normal); RECORD_BYTES_MAX as usize / PAGE_SIZE];
    assert!(page_data_head(&too_many).is_err());
}

#[test]
fn p2m_frames_have_the_bytes_of_the_specification_both_ways() {
    let body = p2m_frames(Pfn(0x2ff), &[Pfn(0x10), Pfn(0xabcd)]).unwrap();
    let expected = [
        &[0, 0, 0, 0, 0xff, 2, 0, 0][..],
        &[0x10, 0, 0, 0, 0, 0, 0, 0],
        &[0xcd, 0xab, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(body, expected.concat());
    let frames = vec![Pfn(0x10), Pfn(0xabcd)];
    let parsed = P2mFrames { start: Pfn(0), end: Pfn(0x2ff), frames };
    assert_eq!(P2mFrames::parse(&body), Ok(parsed));
    assert!(p2m_frames(Pfn(1 << 32), &[]).unwrap_err().to_string().contains("2^32 pages"));
}

#[test]
fn p2m_frames_that_do_not_cover_their_range_are_refused() {
    let body = |start: u32, end: u32, bytes: usize| {
        [&start.to_le_bytes()[..], &end.to_le_bytes(), &vec![0; bytes]].concat()
    };
    // Frames are counted from the start rounded down to the end rounded up.
    for (start, end, frames) in [(0, 0, 1), (511, 512, 2), (512, 1023, 1), (0, 512, 2)] {
        assert!(P2mFrames::parse(&body(start, end, 8 * frames)).is_ok(), "{start}..={end}");
        for bytes in [8 * frames - 8, 8 * frames - 1, 8 * frames + 1, 8 * frames + 8] {
            assert!(P2mFrames::parse(&body(start, end, bytes)).is_err(), "{start}..={end}");
        }
    }
    let upside_down = P2mFrames::parse(&body(1, 0, 8)).unwrap_err().to_string();
    assert!(upside_down.contains("upside down"), "{upside_down}");
    assert!(P2mFrames::parse(&[0; 7]).is_err());
    assert!(P2mFrames::parse(&body(0, u32::MAX, 8)).is_err());
}

#[test]
fn tsc_info_has_the_bytes_of_the_specification_both_ways() {
    let tsc = TscInfo { mode: 2, khz: 0x0102_0304, nsec: 0x0506_0708_090a_0b0c, incarnation: 7 };
    let body = [2, 0, 0, 0, 4, 3, 2, 1, 12, 11, 10, 9, 8, 7, 6, 5, 7, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(libxc::tsc_info(&tsc), body);
    assert_eq!(parse_tsc_info(&body), Ok(tsc));
    let mut reserved = body;
    reserved[20] = 1;
    assert_eq!(parse_tsc_info(&reserved), Ok(tsc));
    for length in [0, 23, 25] {
        assert!(parse_tsc_info(&vec![0; length]).is_err(), "{length}");
    }
}

#[test]
fn hvm_params_have_the_bytes_of_the_specification_both_ways() {
    let params = vec![(1, 0xfeff_c000), (17, 2)];
    let body = [
        &[2, 0, 0, 0, 0, 0, 0, 0][..],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xfe, 0, 0, 0, 0],
        &[17, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(libxc::hvm_params(&params), body);
    assert_eq!(parse_hvm_params(&body), Ok(params));
    assert_eq!(parse_hvm_params(&[0; 8]), Ok(vec![]));
    for length in [0, 7, 8, 23, 25, 39] {
        assert!(parse_hvm_params(&body[..length]).is_err(), "{length}");
    }
    assert!(parse_hvm_params(&[&body[..], &[0; 16]].concat()).is_err());
}

#[test]
fn vcpu_records_start_with_the_number_and_have_sizes_that_fit_their_kind() {
    assert_eq!(vcpu_head(0x0102), [2, 1, 0, 0, 0, 0, 0, 0]);
    let sizes = [
        (RecordKind::X86PvVcpuBasic, vec![VCPU_CONTEXT_BYTES], vec![0, VCPU_CONTEXT_BYTES - 1]),
        (RecordKind::X86PvVcpuExtended, vec![0, 64, 128], vec![129]),
        (RecordKind::X86PvVcpuXsave, vec![0, 16, 832], vec![1, 15]),
        (RecordKind::X86PvVcpuMsrs, vec![0, 16, 48], vec![1, 15, 17]),
    ];
    for (kind, good, bad) in sizes {
        let body = |size| [&vcpu_head(3)[..], &vec![0xaa; size]].concat();
        for size in good {
            assert_eq!(parse_vcpu(kind, &body(size)), Ok((3, &vec![0xaa; size][..])), "{kind:?}");
        }
        for size in bad {
            assert!(parse_vcpu(kind, &body(size)).is_err(), "{kind:?} of {size}");
        }
        assert!(parse_vcpu(kind, &[0; 7]).is_err(), "{kind:?}");
    }
}

#[test]
fn pv_info_says_8_bytes_and_4_levels() {
    let bytes = record(RecordKind::X86PvInfo, &[&PV_INFO_64BIT]).unwrap();
    assert_eq!(bytes, [2, 0, 0, 0, 8, 0, 0, 0, 8, 4, 0, 0, 0, 0, 0, 0]);
}

fn any_entry() -> impl Strategy<Value = PageEntry> {
    let kind = (0..=0xf_u8).prop_filter_map("reserved", PageType::from_nibble);
    (0..=PFN_MASK, kind).prop_map(|(pfn, kind)| PageEntry { pfn: Pfn(pfn), kind })
}

proptest! {
    #[test]
    fn page_data_survives_a_round_trip(entries in prop::collection::vec(any_entry(), 1..200)) {
        let head = page_data_head(&entries).unwrap();
        let length = header_of(&head).unwrap().length;
        let count = page_data_count(*head[8..].first_chunk().unwrap(), length).unwrap();
        prop_assert_eq!(count, entries.len());
        prop_assert_eq!(head.len(), 16 + 8 * count);
        prop_assert_eq!(page_data_entries(&head[16..], length).unwrap(), entries);
    }

    #[test]
    fn a_record_of_any_length_survives_a_round_trip(
        body in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        for (kind, _) in KINDS {
            let bytes = record(kind, &[&body]).unwrap();
            prop_assert!(bytes.len().is_multiple_of(8));
            prop_assert_eq!(body_of(&bytes), (kind, &body[..]));
        }
    }

    #[test]
    fn p2m_frames_survive_a_round_trip(max_pfn in 0..20_000_u64, seed in any::<u64>()) {
        let frames: Vec<Pfn> = (0..=max_pfn / 512).map(|n| Pfn(seed.wrapping_mul(n + 1))).collect();
        let parsed = P2mFrames::parse(&p2m_frames(Pfn(max_pfn), &frames).unwrap()).unwrap();
        prop_assert_eq!(parsed, P2mFrames { start: Pfn(0), end: Pfn(max_pfn), frames });
    }

    #[test]
    fn hvm_params_survive_a_round_trip(
        params in prop::collection::vec(any::<(u64, u64)>(), 0..40),
    ) {
        prop_assert_eq!(parse_hvm_params(&libxc::hvm_params(&params)).unwrap(), params);
    }

    #[test]
    fn headers_that_are_read_are_written_the_same(
        bytes in any::<[u8; 40]>(), version in 0..5_u8, kind in 0..4_u8, valid in any::<bool>(),
    ) {
        let mut header = PV_HEADER;
        (header[15], header[24]) = (version, kind);
        header[32..].copy_from_slice(&bytes[32..]);
        let bytes = if valid { header } else { bytes };
        if let Ok(parsed) = StreamHeader::parse(bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
        } else {
            prop_assert!(!(valid && (2..=3).contains(&version) && (1..=2).contains(&kind)));
        }
    }

    #[test]
    fn no_body_whatever_makes_a_reader_panic_or_give_more_than_it_was_given(
        body in prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 0..300),
        length in 0..=RECORD_BYTES_MAX as usize,
    ) {
        if let Ok(entries) = page_data_entries(&body, length) {
            prop_assert!(entries.len() <= body.len() / 8);
        }
        if let Some(head) = body.first_chunk() {
            prop_assert!(page_data_count(*head, length).unwrap_or(0) <= length / 8);
        }
        if let Ok(p2m) = P2mFrames::parse(&body) {
            prop_assert_eq!(8 * p2m.frames.len() + 8, body.len());
        }
        if let Ok(params) = parse_hvm_params(&body) {
            prop_assert_eq!(16 * params.len() + 8, body.len());
        }
        for (kind, _) in KINDS {
            if let Ok((_, state)) = parse_vcpu(kind, &body) {
                prop_assert_eq!(state.len() + 8, body.len());
            }
        }
        prop_assert_eq!(parse_tsc_info(&body).is_ok(), body.len() == 24);
    }
}
