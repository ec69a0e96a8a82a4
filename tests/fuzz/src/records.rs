//! Headers and records of the libxc stream: what can be read can be written, to the same bytes
//! but for what is reserved.

use rxl_migrate::Error;
use rxl_migrate::bitmap::PageBitmap;
use rxl_migrate::frame::{PageType, Pfn};
use rxl_migrate::stream::libxc::{
    FormatError, GuestKind, OPTIONAL, P2mFrames, PageEntry, RECORD_BYTES_MAX, RECORD_HEADER_BYTES,
    ReadKind, RecordHeader, RecordKind, StreamHeader, hvm_params, p2m_frames, page_data_count,
    page_data_entries, page_data_head, parse_hvm_params, parse_tsc_info, parse_vcpu, record,
    tsc_info, vcpu_head,
};
use rxl_migrate::target::machine::{Action, Event, Machine};

use crate::assert_told;
use crate::input::Input;

type Reader = fn(&[u8]) -> Result<(), FormatError>;

/// How each kind of input is read; the first byte is one of these.
const READERS: [Reader; 9] =
    [stream_header, record_header, page_data, p2m, tsc, params, vcpu, bitmap, order];

/// What the types of rxl's own records begin with.
const RXL_KINDS: u32 = OPTIONAL | 0x5258_0000;

const VCPU_KINDS: [RecordKind; 4] = [
    RecordKind::X86PvVcpuBasic,
    RecordKind::X86PvVcpuExtended,
    RecordKind::X86PvVcpuXsave,
    RecordKind::X86PvVcpuMsrs,
];

pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let reader = input.choice(&READERS).expect("there are readers");
    if let Err(error) = reader(input.rest()) {
        assert_told(&error);
    }
}

fn stream_header(bytes: &[u8]) -> Result<(), FormatError> {
    let Some(bytes) = bytes.first_chunk() else { return Ok(()) };
    let header = StreamHeader::parse(*bytes)?;
    assert!(header.guest.describe().starts_with('a'));
    assert_eq!(StreamHeader::parse(header.to_bytes()), Ok(header));
    Ok(())
}

fn record_header(bytes: &[u8]) -> Result<(), FormatError> {
    let Some((head, body)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else {
        return Ok(());
    };
    let header = RecordHeader::parse(*head)?;
    let padded = header.length + header.padding();
    assert!(padded <= RECORD_BYTES_MAX as usize && padded.is_multiple_of(8));
    match header.kind {
        ReadKind::Optional(code) => assert!(code & OPTIONAL != 0),
        ReadKind::Known(kind) => {
            let written = record(kind, &[body])?;
            assert_eq!(written.get(..4), head.get(..4));
            assert!(written.len().is_multiple_of(8) && written.len() < 16 + body.len());
        }
    }
    Ok(())
}

/// The body of a page-data record, up to its pages.
fn page_data(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    let claimed = input.u32();
    let length = claimed as usize;
    let body = input.rest();
    let Some((head, rest)) = body.split_first_chunk() else { return Ok(()) };
    let count = page_data_count(*head, length)?;
    assert!(count > 0 && 8 + 8 * count <= length);
    let Some(entries) = rest.get(..8 * count) else { return Ok(()) };
    let parsed = page_data_entries(entries, length)?;
    let written = page_data_head(&parsed)?;
    assert_eq!(written.get(4..8), Some(&claimed.to_le_bytes()[..]));
    assert_eq!(written.get(16..), Some(entries));
    for entry in parsed {
        let kind = PageType::from_nibble(entry.kind.nibble());
        assert_eq!(kind, Some(entry.kind));
        assert!(entry.kind.needs_memory() || !entry.kind.has_data());
        assert!(entry.kind.table_level().is_none_or(|level| (1..=4).contains(&level)));
    }
    Ok(())
}

fn p2m(body: &[u8]) -> Result<(), FormatError> {
    if let Some(word) = body.first_chunk().map(|word| u64::from_le_bytes(*word)) {
        assert_eq!(p2m_frames(Pfn(word), &[]).is_ok(), u32::try_from(word).is_ok());
    }
    let parsed = P2mFrames::parse(body)?;
    assert!(parsed.start <= parsed.end);
    let whole = p2m_frames(parsed.end, &parsed.frames)?;
    assert_eq!(whole.get(4..), body.get(4..));
    if parsed.start == Pfn(0) {
        assert_eq!(P2mFrames::parse(&whole), Ok(parsed));
    }
    Ok(())
}

fn tsc(body: &[u8]) -> Result<(), FormatError> {
    let parsed = parse_tsc_info(body)?;
    assert_eq!(body.get(..20), tsc_info(&parsed).get(..20));
    Ok(())
}

fn params(body: &[u8]) -> Result<(), FormatError> {
    let parsed = parse_hvm_params(body)?;
    let written = hvm_params(&parsed);
    assert_eq!((written.get(..4), written.get(8..)), (body.get(..4), body.get(8..)));
    Ok(())
}

fn vcpu(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    let kind = input.choice(&VCPU_KINDS).expect("there are kinds");
    // A context is long: the missing end of one is zero.
    let mut body = input.rest().to_vec();
    if kind == RecordKind::X86PvVcpuBasic && body.len() > 64 {
        body.resize(body.len().max(8 + 5168), 0);
    }
    let (id, state) = parse_vcpu(kind, &body)?;
    let written = [&vcpu_head(id)[..], state].concat();
    assert_eq!((written.get(..4), written.get(8..)), (body.get(..4), body.get(8..)));
    Ok(())
}

/// Records in any order, and events that answer no action: those are named, and change nothing.
fn order(bytes: &[u8]) -> Result<(), FormatError> {
    let Some((head, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    let mut machine = Machine::new(&StreamHeader::parse(*head)?);
    let mut input = Input::new(rest);
    let (mut awaited, mut bodies) = (None, 0);
    while !input.is_empty() {
        let event = match input.u8() % 4 {
            0 => Event::Begin,
            1 => Event::Done,
            _ => {
                let head = [kind(input.u8()), input.u32()].map(u32::to_le_bytes).concat();
                let head = head.first_chunk().copied().unwrap_or_default();
                Event::Record(RecordHeader::parse(head)?)
            }
        };
        let fits = match (awaited, event) {
            (None, Event::Begin) => true,
            (Some(Action::ReadHeader), Event::Record(_)) => true,
            (None | Some(Action::ReadHeader | Action::Complete), _) => false,
            (Some(_), event) => event == Event::Done,
        };
        match machine.step(event) {
            Ok(action) => {
                assert!(fits, "{event:?} after {awaited:?}");
                if let Action::Body { length, .. } = action {
                    bodies += 1;
                    assert!(length <= 8 + (64 << 20));
                }
                // State comes after memory that it can be in.
                assert!(action != Action::Complete || bodies > 0);
                awaited = Some(action);
            }
            Err(Error::Format(error)) => {
                assert!(fits);
                return Err(error);
            }
            Err(error) => {
                assert!(!fits && matches!(error, Error::Machine { .. }), "{error}");
                assert_told(&error);
            }
        }
    }
    assert!(!format!("{machine:?}").is_empty());
    Ok(())
}

/// The type of a record: Xen's, or, above 128, one of rxl's own.
fn kind(byte: u8) -> u32 {
    match byte.checked_sub(128) {
        None => byte.into(),
        Some(own) => RXL_KINDS + u32::from(own),
    }
}

/// The bytes of a log-dirty bitmap. They are Xen's, and the bits of pfns that a guest picks.
fn bitmap(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    let (len, other, pfn) = (u64::from(input.u16()), u64::from(input.u16()), Pfn(input.u64()));
    let mut map = PageBitmap::new(len);
    map.add_le_bytes(input.rest());
    assert!(map.iter().all(|pfn| pfn.0 < len && map.get(pfn)));
    assert_eq!(map.iter().count() as u64, map.count());
    assert_eq!(map.is_empty(), len == 0);
    let before = map.count();
    let mut full = PageBitmap::new(other);
    full.set_all();
    map.take(&mut full);
    assert_eq!(full.count(), 0);
    assert!(map.count() >= before.max(len.min(other)) && map.count() <= len);
    map.set(pfn);
    assert_eq!(map.get(pfn), pfn.0 < len);
    map.grow(other);
    map.clear(pfn);
    assert!(!map.get(pfn) && map.len() == len.max(other));
    assert!(!format!("{map:?}").is_empty());
    map.clear_all();
    assert_eq!(map.count(), 0);
    Ok(())
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let header = |guest| StreamHeader { version: 3, guest, xen: (4, 17) }.to_bytes().to_vec();
    let entry = |pfn, nibble| PageEntry {
        pfn: Pfn(pfn),
        kind: PageType::from_nibble(nibble).unwrap_or(PageType::Invalid),
    };
    let entries: Vec<PageEntry> =
        (0..16).map(|nibble| entry(u64::from(nibble) << 3, nibble)).collect();
    let pages = page_data_head(&entries).unwrap_or_default();
    let frames = p2m_frames(Pfn(1000), &[Pfn(7), Pfn(9)]).unwrap_or_default();
    let vcpu = |kind: u8, state: &[u8]| [&[kind][..], &vcpu_head(1), state].concat();
    let seeds = [
        (0, header(GuestKind::Pv)),
        (0, header(GuestKind::Hvm)),
        (1, record(RecordKind::Verify, &[]).unwrap_or_default()),
        (1, record(RecordKind::X86PvInfo, &[b"12345"]).unwrap_or_default()),
        (1, [OPTIONAL.to_le_bytes(), [9, 0, 0, 0]].concat()),
        (2, [pages.get(4..8), pages.get(8..)].into_iter().flatten().flatten().copied().collect()),
        (3, frames),
        (4, tsc_info(&Default::default()).to_vec()),
        (5, hvm_params(&[(1, 2), (17, u64::MAX)])),
        (6, vcpu(0, &[0x66; 100])),
        (6, vcpu(1, &[1; 64])),
        (6, vcpu(2, &[1; 32])),
        (6, vcpu(3, &[1; 32])),
        (7, [&[200, 0, 100, 0][..], &7_u64.to_le_bytes(), &[0xa5; 30]].concat()),
    ];
    // Kind and length of records; 0 and 1 are the other events.
    let orders: [(GuestKind, &[u8]); 5] = [
        (GuestKind::Pv, &[2, 2, 1, 16, 1, 3, 1, 7, 4, 5, 0]),
        (GuestKind::Pv, &[129, 2, 16, 3, 131, 1, 132, 131, 7, 4, 0]),
        (GuestKind::Hvm, &[17, 18, 16, 13, 1, 8, 9, 10, 0]),
        (GuestKind::Hvm, &[129, 16, 131, 132, 133, 1, 9, 10, 131]),
        (GuestKind::Hvm, &[129, 129, 16, 130]),
    ];
    let orders = orders.map(|(guest, kinds)| {
        let event = |kind: &u8| [2, *kind, 0, 0, 0, 0, 1];
        let events: Vec<u8> = kinds.iter().flat_map(event).collect();
        (8, [&header(guest)[..], &[1, 0], &events, &[0, 1]].concat())
    });
    seeds
        .into_iter()
        .chain(orders)
        .map(|(reader, bytes)| [&[reader][..], &bytes].concat())
        .collect()
}
