//! The libxc migration stream, version 3 (version 2 is also read): headers and records.
//!
//! Specified in Xen's `docs/specs/libxc-migration-stream.pandoc`. All integers are little endian
//! but those of the image header. A record is a type, a length, a body, and zeros up to the next
//! multiple of 8. Writers here return the bytes; readers take bytes that have already been
//! bounded by [`RECORD_BYTES_MAX`]. They hold no state: order is [`crate::target::machine`]'s.

use serde::{Deserialize, Serialize};
use zerocopy::byteorder::{big_endian as be, little_endian as le};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::{PAGE_SIZE, PFN_MASK, PageType, Pfn};
use crate::hypervisor::TscInfo;

/// Longest padded body of a record: 128 MiB, as stock enforces on both sides.
pub const RECORD_BYTES_MAX: u32 = 128 << 20;
/// Bytes of a record's type and length.
pub const RECORD_HEADER_BYTES: usize = 8;
/// `"XENF"`.
const IMAGE_ID: u32 = 0x5845_4e46;
/// The version written.
pub const VERSION: u32 = 3;
/// Bit 0 of the options: a big-endian stream, which nobody makes.
const OPTION_BIG_ENDIAN: u16 = 1;
/// Bit 31 of a type: a reader that does not know it may skip it.
pub const OPTIONAL: u32 = 1 << 31;

/// Bytes that are not a stream of this format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// The first bytes are something else.
    #[error("not a libxc stream (marker {marker:#x}, id {id:#x})")]
    NotAStream {
        /// Should be all ones.
        marker: u64,
        /// Should be `XENF`.
        id: u32,
    },
    /// A version from the past or the future.
    #[error("stream version {0}; this program reads 2 and 3")]
    Version(u32),
    /// A big-endian stream.
    #[error("the stream is big endian")]
    BigEndian,
    /// Domain header: unknown type.
    #[error("the stream holds a domain of unknown type {0}")]
    DomainType(u32),
    /// Domain header: a kind of guest other than the domain that was made for it.
    #[error("the stream holds {stream} guest, the domain was made for {domain} guest")]
    WrongGuest {
        /// "a PV" or "an HVM".
        stream: &'static str,
        /// "a PV" or "an HVM".
        domain: &'static str,
    },
    /// Domain header: page size.
    #[error("the stream has pages of 2^{0} bytes")]
    PageShift(u16),
    /// A record that claims more than any may have.
    #[error("record {kind:#x} claims {length} bytes, the limit is {RECORD_BYTES_MAX}")]
    TooLong {
        /// Its type.
        kind: u32,
        /// The claim.
        length: u32,
    },
    /// A body of a length that its type cannot have.
    #[error("record {kind:#x} has {length} bytes: {why}")]
    Length {
        /// Its type.
        kind: u32,
        /// Its length.
        length: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A mandatory record of unknown type.
    #[error("unknown mandatory record {0:#x}")]
    UnknownRecord(u32),
    /// A known record where it may not be.
    #[error("record {kind:#x} {why}")]
    Order {
        /// Its type.
        kind: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// An entry of a page-data record.
    #[error("page data: entry {entry:#018x} {why}")]
    PageEntry {
        /// As in the stream.
        entry: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// Anything else in a record's body.
    #[error("record {kind:#x}: {why}")]
    Content {
        /// Its type.
        kind: u32,
        /// What is wrong.
        why: &'static str,
    },
}

/// Types of records. Those that nobody here reads or writes are not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum RecordKind {
    End = 0x00,
    PageData = 0x01,
    X86PvInfo = 0x02,
    X86PvP2mFrames = 0x03,
    X86PvVcpuBasic = 0x04,
    X86PvVcpuExtended = 0x05,
    X86PvVcpuXsave = 0x06,
    SharedInfo = 0x07,
    X86TscInfo = 0x08,
    HvmContext = 0x09,
    HvmParams = 0x0a,
    X86PvVcpuMsrs = 0x0c,
    Verify = 0x0d,
    StaticDataEnd = 0x10,
    X86CpuidPolicy = 0x11,
    X86MsrPolicy = 0x12,
    // rxl's own (`super::link`, `super::reduced`): optional, so that others skip them.
    RxlOffer = OPTIONAL | 0x5258_0001,
    RxlPass = OPTIONAL | 0x5258_0002,
    RxlPassEnd = OPTIONAL | 0x5258_0003,
    RxlLinkLost = OPTIONAL | 0x5258_0004,
    RxlReduced = OPTIONAL | 0x5258_0005,
    // The same, but mandatory (`super::digest`): who does not know them must not go on.
    RxlVerify = 0x5258_0006,
    RxlDigests = 0x5258_0007,
}

impl RecordKind {
    pub(crate) const ALL: [RecordKind; 23] = [
        RecordKind::End,
        RecordKind::PageData,
        RecordKind::X86PvInfo,
        RecordKind::X86PvP2mFrames,
        RecordKind::X86PvVcpuBasic,
        RecordKind::X86PvVcpuExtended,
        RecordKind::X86PvVcpuXsave,
        RecordKind::SharedInfo,
        RecordKind::X86TscInfo,
        RecordKind::HvmContext,
        RecordKind::HvmParams,
        RecordKind::X86PvVcpuMsrs,
        RecordKind::Verify,
        RecordKind::StaticDataEnd,
        RecordKind::X86CpuidPolicy,
        RecordKind::X86MsrPolicy,
        RecordKind::RxlOffer,
        RecordKind::RxlPass,
        RecordKind::RxlPassEnd,
        RecordKind::RxlLinkLost,
        RecordKind::RxlReduced,
        RecordKind::RxlVerify,
        RecordKind::RxlDigests,
    ];

    /// The number in the stream.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }
}

/// The type field of a record that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadKind {
    /// One to process.
    Known(RecordKind),
    /// One to skip.
    Optional(u32),
}

/// A record's header, as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it is.
    pub kind: ReadKind,
    /// Bytes of its body, padding not counted.
    pub length: usize,
}

impl RecordHeader {
    /// Reads the 8 bytes before a body.
    ///
    /// # Errors
    /// A length over [`RECORD_BYTES_MAX`], or a mandatory type that is unknown.
    pub fn parse(bytes: [u8; RECORD_HEADER_BYTES]) -> Result<RecordHeader, FormatError> {
        let raw: RawRecordHeader = zerocopy::transmute!(bytes);
        let (code, length) = (raw.kind.get(), raw.length.get());
        if length > RECORD_BYTES_MAX - 7 {
            return Err(FormatError::TooLong { kind: code, length });
        }
        let known = RecordKind::ALL.into_iter().find(|k| k.code() == code);
        let kind = match known {
            Some(kind) => ReadKind::Known(kind),
            None if code & OPTIONAL != 0 => ReadKind::Optional(code),
            None => return Err(FormatError::UnknownRecord(code)),
        };
        Ok(RecordHeader { kind, length: length as usize })
    }

    /// Zero bytes between the body and the next record.
    #[must_use]
    pub fn padding(&self) -> usize {
        self.length.next_multiple_of(8) - self.length
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecordHeader {
    kind: le::U32,
    length: le::U32,
}

/// PV or translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// x86 PV.
    Pv,
    /// x86 HVM, which includes PVH.
    Hvm,
}

impl GuestKind {
    /// With its article, for messages.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            GuestKind::Pv => "a PV",
            GuestKind::Hvm => "an HVM",
        }
    }
}

/// Image header and domain header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// 2 or 3.
    pub version: u32,
    /// What is in it.
    pub guest: GuestKind,
    /// Version of the Xen that wrote it.
    pub xen: (u32, u32),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStreamHeader {
    marker: be::U64,
    id: be::U32,
    version: be::U32,
    options: be::U16,
    reserved0: [u8; 6],
    domain_type: le::U32,
    page_shift: le::U16,
    reserved1: [u8; 2],
    xen_major: le::U32,
    xen_minor: le::U32,
}

impl StreamHeader {
    /// Bytes of both headers.
    pub const BYTES: usize = size_of::<RawStreamHeader>();

    /// Reads both headers.
    ///
    /// # Errors
    /// Anything but a little-endian stream of version 2 or 3 of an x86 guest with 4 KiB pages.
    pub fn parse(bytes: [u8; Self::BYTES]) -> Result<StreamHeader, FormatError> {
        let raw: RawStreamHeader = zerocopy::transmute!(bytes);
        if raw.marker.get() != u64::MAX || raw.id.get() != IMAGE_ID {
            return Err(FormatError::NotAStream { marker: raw.marker.get(), id: raw.id.get() });
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(FormatError::Version(version));
        }
        if raw.options.get() & OPTION_BIG_ENDIAN != 0 {
            return Err(FormatError::BigEndian);
        }
        if raw.page_shift.get() != 12 {
            return Err(FormatError::PageShift(raw.page_shift.get()));
        }
        let guest = match raw.domain_type.get() {
            1 => GuestKind::Pv,
            2 => GuestKind::Hvm,
            other => return Err(FormatError::DomainType(other)),
        };
        Ok(StreamHeader { version, guest, xen: (raw.xen_major.get(), raw.xen_minor.get()) })
    }

    /// Both headers as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        zerocopy::transmute!(RawStreamHeader {
            marker: u64::MAX.into(),
            id: IMAGE_ID.into(),
            version: self.version.into(),
            options: 0.into(),
            reserved0: [0; 6],
            domain_type: match self.guest {
                GuestKind::Pv => 1,
                GuestKind::Hvm => 2,
            }
            .into(),
            page_shift: 12.into(),
            reserved1: [0; 2],
            xen_major: self.xen.0.into(),
            xen_minor: self.xen.1.into(),
        })
    }
}

/// A whole record: header, body, padding.
///
/// # Errors
/// A body over [`RECORD_BYTES_MAX`].
pub fn record(kind: RecordKind, body: &[&[u8]]) -> Result<Vec<u8>, FormatError> {
    let length: usize = body.iter().map(|part| part.len()).sum();
    let mut out = record_header(kind, length)?.to_vec();
    for part in body {
        out.extend_from_slice(part);
    }
    out.resize(out.len().next_multiple_of(8), 0);
    Ok(out)
}

/// The header of a record with a body of `length` bytes.
fn record_header(kind: RecordKind, length: usize) -> Result<[u8; 8], FormatError> {
    let code = kind.code();
    let length = u32::try_from(length)
        .ok()
        .filter(|l| *l <= RECORD_BYTES_MAX - 7)
        .ok_or(FormatError::Length { kind: code, length, why: "longer than any record may be" })?;
    Ok(zerocopy::transmute!(RawRecordHeader { kind: code.into(), length: length.into() }))
}

/// One entry of a page-data record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageEntry {
    /// Which page.
    pub pfn: Pfn,
    /// What it is; data follows if [`PageType::has_data`].
    pub kind: PageType,
}

impl PageEntry {
    /// As in the stream: type in bits 63..60, pfn in bits 51..0.
    #[must_use]
    pub fn encode(self) -> u64 {
        u64::from(self.kind.nibble()) << 60 | self.pfn.0 & PFN_MASK
    }

    pub(crate) fn parse(entry: u64) -> Result<PageEntry, FormatError> {
        let nibble = u8::try_from(entry >> 60).unwrap_or(0xf);
        let kind = PageType::from_nibble(nibble)
            .ok_or(FormatError::PageEntry { entry, why: "has a reserved type" })?;
        if entry & !PFN_MASK & !(0xf << 60) != 0 {
            return Err(FormatError::PageEntry { entry, why: "has reserved bits set" });
        }
        Ok(PageEntry { pfn: Pfn(entry & PFN_MASK), kind })
    }
}

/// Everything of a page-data record but the pages: header, count, entries. The pages of those
/// entries that have data must follow, in order; no padding is needed, they are multiples of 8.
///
/// # Errors
/// More pages than a record may hold.
pub fn page_data_head(entries: &[PageEntry]) -> Result<Vec<u8>, FormatError> {
    let data = entries.iter().filter(|e| e.kind.has_data()).count();
    let length = 8 + 8 * entries.len() + PAGE_SIZE * data;
    let header = record_header(RecordKind::PageData, length)?;
    let mut out = Vec::with_capacity(header.len() + 8 + 8 * entries.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.extend(entries.iter().flat_map(|e| e.encode().to_le_bytes()));
    Ok(out)
}

/// The number of entries of a page-data record of `length` bytes whose body starts with `head`.
///
/// # Errors
/// None at all, or more than `length` can hold.
pub fn page_data_count(head: [u8; 8], length: usize) -> Result<usize, FormatError> {
    let err = |why| FormatError::Length { kind: RecordKind::PageData.code(), length, why };
    let [a, b, c, d, ..] = head;
    let count = u32::from_le_bytes([a, b, c, d]) as usize;
    match count {
        0 => Err(err("no page in it")),
        n if length.checked_sub(8).is_none_or(|room| room / 8 < n) => {
            Err(err("shorter than its count of pages"))
        }
        n => Ok(n),
    }
}

/// The entries of a page-data record of `length` bytes, checked against each other: the pages
/// that must follow fill the record exactly.
///
/// # Errors
/// A reserved type or bit, or a length that does not fit.
pub fn page_data_entries(bytes: &[u8], length: usize) -> Result<Vec<PageEntry>, FormatError> {
    let entries: Vec<PageEntry> = le_u64s(bytes).map(PageEntry::parse).collect::<Result<_, _>>()?;
    let data = entries.iter().filter(|e| e.kind.has_data()).count();
    if length != 8 + bytes.len() + PAGE_SIZE * data {
        return Err(FormatError::Length {
            kind: RecordKind::PageData.code(),
            length,
            why: "not the length that its entries ask for",
        });
    }
    Ok(entries)
}

/// The whole 64-bit words of `bytes`.
pub fn le_u64s(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w))
}

/// Body of `X86_PV_INFO` for a 64-bit guest with four levels of page tables.
pub const PV_INFO_64BIT: [u8; 8] = [8, 4, 0, 0, 0, 0, 0, 0];

/// Body of `X86_PV_P2M_FRAMES`: pfns of the frames that hold the p2m of pfns `0..=max_pfn`.
///
/// # Errors
/// A guest of 2^32 pages or more, which the format cannot express.
pub fn p2m_frames(max_pfn: Pfn, frames: &[Pfn]) -> Result<Vec<u8>, FormatError> {
    let end = u32::try_from(max_pfn.0).map_err(|_| FormatError::Content {
        kind: RecordKind::X86PvP2mFrames.code(),
        why: "a PV guest of 2^32 pages or more cannot be put in this stream",
    })?;
    let mut out = Vec::with_capacity(8 + 8 * frames.len());
    out.extend_from_slice(&0_u32.to_le_bytes());
    out.extend_from_slice(&end.to_le_bytes());
    out.extend(frames.iter().flat_map(|f| f.0.to_le_bytes()));
    Ok(out)
}

/// `X86_PV_P2M_FRAMES` as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct P2mFrames {
    /// First pfn covered.
    pub start: Pfn,
    /// Last pfn covered.
    pub end: Pfn,
    /// Where the guest keeps the p2m, a frame for each 512 pfns from `start` rounded down.
    pub frames: Vec<Pfn>,
}

impl P2mFrames {
    /// Reads the body, for a 64-bit guest.
    ///
    /// # Errors
    /// A range that is empty, or frames that do not cover it exactly.
    pub fn parse(body: &[u8]) -> Result<P2mFrames, FormatError> {
        let kind = RecordKind::X86PvP2mFrames.code();
        let err = |why| FormatError::Length { kind, length: body.len(), why };
        let (head, rest) = body.split_at_checked(8).ok_or(err("shorter than its range"))?;
        let range = le_u64s(head).next().unwrap_or(0);
        let (start, end) = (range & 0xffff_ffff, range >> 32);
        if start > end {
            return Err(FormatError::Content { kind, why: "its range is upside down" });
        }
        let frames: Vec<Pfn> = le_u64s(rest).map(Pfn).collect();
        let want = end / 512 - start / 512 + 1;
        if frames.len() as u64 != want || !rest.len().is_multiple_of(8) {
            return Err(err("its frames do not cover its range"));
        }
        Ok(P2mFrames { start: Pfn(start), end: Pfn(end), frames })
    }
}

/// Body of `X86_TSC_INFO`.
#[must_use]
pub fn tsc_info(tsc: &TscInfo) -> [u8; 24] {
    zerocopy::transmute!(RawTscInfo {
        mode: tsc.mode.into(),
        khz: tsc.khz.into(),
        nsec: tsc.nsec.into(),
        incarnation: tsc.incarnation.into(),
        reserved: 0.into(),
    })
}

/// Reads `X86_TSC_INFO`.
///
/// # Errors
/// Not 24 bytes.
pub fn parse_tsc_info(body: &[u8]) -> Result<TscInfo, FormatError> {
    let raw = RawTscInfo::read_from_bytes(body).map_err(|_| FormatError::Length {
        kind: RecordKind::X86TscInfo.code(),
        length: body.len(),
        why: "must be 24",
    })?;
    Ok(TscInfo {
        mode: raw.mode.get(),
        khz: raw.khz.get(),
        nsec: raw.nsec.get(),
        incarnation: raw.incarnation.get(),
    })
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTscInfo {
    mode: le::U32,
    khz: le::U32,
    nsec: le::U64,
    incarnation: le::U32,
    reserved: le::U32,
}

/// Body of `HVM_PARAMS`: index and value of each parameter.
#[must_use]
pub fn hvm_params(params: &[(u64, u64)]) -> Vec<u8> {
    let mut out = (params.len() as u64).to_le_bytes().to_vec();
    out.extend(params.iter().flat_map(|(i, v)| [i.to_le_bytes(), v.to_le_bytes()]).flatten());
    out
}

/// Reads `HVM_PARAMS`; none at all is allowed, old senders write that.
///
/// # Errors
/// A length that does not fit the count.
pub fn parse_hvm_params(body: &[u8]) -> Result<Vec<(u64, u64)>, FormatError> {
    let err =
        |why| FormatError::Length { kind: RecordKind::HvmParams.code(), length: body.len(), why };
    let (head, rest) = body.split_at_checked(8).ok_or(err("shorter than its count"))?;
    let count = le_u64s(head).next().unwrap_or(0) & 0xffff_ffff;
    if !rest.len().is_multiple_of(16) || (rest.len() / 16) as u64 != count {
        return Err(err("not the length that its count asks for"));
    }
    let mut words = le_u64s(rest);
    Ok(std::iter::from_fn(|| Some((words.next()?, words.next()?))).collect())
}

/// Body of one of the `X86_PV_VCPU_*` records: the vCPU's number, then its state.
#[must_use]
pub fn vcpu_head(id: u32) -> [u8; 8] {
    u64::from(id).to_le_bytes()
}

/// Splits the body of one of the `X86_PV_VCPU_*` records into vCPU number and state.
///
/// # Errors
/// Shorter than its head, or a state of a size that its kind cannot have.
pub fn parse_vcpu(kind: RecordKind, body: &[u8]) -> Result<(u32, &[u8]), FormatError> {
    let err = |why| FormatError::Length { kind: kind.code(), length: body.len(), why };
    let (head, state) = body.split_at_checked(8).ok_or(err("shorter than its head"))?;
    let id = le_u64s(head).next().unwrap_or(0) & 0xffff_ffff;
    let fits = match kind {
        RecordKind::X86PvVcpuBasic => state.len() == crate::x86::pv::VCPU_CONTEXT_BYTES,
        RecordKind::X86PvVcpuExtended => state.len() <= 128,
        RecordKind::X86PvVcpuXsave => state.is_empty() || state.len() >= 16,
        _ => state.len().is_multiple_of(16),
    };
    if !fits {
        return Err(err("its state has a size that it cannot have"));
    }
    Ok((u32::try_from(id).unwrap_or(u32::MAX), state))
}
