//! Page data over a link, into a domain of a modelled host, and the same over the stream: the
//! one is taken if the other is, and the guests are the same.
//!
//! An input is a byte about the domain, then records, with pages as in [`crate::block`]. They go
//! into the memory of a small guest that the stream has brought. What the worker asks is answered
//! by the engine; or either of them is [`alone`].

use std::cell::RefCell;
use std::rc::Rc;

use rxl_migrate::Error;
use rxl_migrate::fake::{FakeDomain, FakeToolstack, Script, WIRING};
use rxl_migrate::frame::{PAGE_SIZE, PageBuf, PageType, Pfn};
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages, SourceDomain};
use rxl_migrate::stream::libxc::{
    PageEntry, RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind, page_data_head,
};
use rxl_migrate::target::restore_with;

use crate::input::Input;
use crate::linked::{Linked, pages, reduced, table, to};
use crate::receivers::Receivers;
use crate::ways::{Stream, Wires};
use crate::{FRAMES_LARGE, alone, assert_told, block, empty_domain};

/// Longest record that is made of an input.
const RECORD_BYTES_MAX: usize = 1 << 20;
/// Pages of a PV guest that hold machine frames, which differ from host to host.
const WITH_FRAMES: [Pfn; 2] = [Pfn(5), Pfn(9)];

/// Bits of the first byte.
mod flag {
    pub(super) const HVM: u8 = 1;
    pub(super) const LARGE: u8 = 2;
    pub(super) const FRAGMENTED: u8 = 4;
    /// The link ends where the input does, without a word of the next pass.
    pub(super) const ENDS: u8 = 8;
    /// Mapping fails after a while.
    pub(super) const FAILS: u8 = 16;
    /// The worker alone, or its owner.
    pub(super) const WORKER_ALONE: u8 = 32;
    pub(super) const OWNER_ALONE: u8 = 64;
}

pub(crate) fn run(bytes: &[u8]) {
    let _ = is_taken(bytes);
}

/// The records of an input, each of the length that it says, and whether all are page data.
fn unpack(mut input: Input<'_>) -> (Vec<u8>, bool) {
    let (mut records, mut is_data) = (Vec::new(), true);
    while !input.is_empty() {
        let mut head = [0; RECORD_HEADER_BYTES];
        head.iter_mut().zip(input.bytes(RECORD_HEADER_BYTES)).for_each(|(to, from)| *to = *from);
        let header = RecordHeader::parse(head).ok();
        let header = header.filter(|header| header.length <= RECORD_BYTES_MAX);
        records.extend(head);
        let Some(header) = header else { return (records, false) };
        let length = header.length.next_multiple_of(8);
        let end = records.len() + length;
        if header.kind == ReadKind::Known(RecordKind::PageData) {
            let count = usize::try_from(input.u32()).unwrap_or(0);
            records.extend(u64::try_from(count).unwrap_or(0).to_le_bytes());
            records.extend(input.bytes(count.saturating_mul(8).min(header.length)));
            let mut page = [0; PAGE_SIZE];
            while records.len() + PAGE_SIZE <= end && block::read(&mut input, &mut page).is_some() {
                records.extend(page);
            }
        } else {
            is_data = false;
            // With what fills it up.
            records.extend(input.bytes(length));
        }
        records.resize(end, 0);
    }
    (records, is_data)
}

/// A guest that was restored from a stream and links, or why not.
fn restored(flags: u8, ways: Vec<Vec<u8>>) -> Result<FakeDomain, Error> {
    let has = |flag| flags & flag != 0;
    let domain = empty_domain(has(flag::HVM), has(flag::LARGE), has(flag::FRAGMENTED));
    let host = domain.host();
    if has(flag::FAILS) {
        host.fail("map", 4, 5);
    }
    let source = Rc::new(RefCell::new(Wires::new(ways, 0)));
    let links = Box::new(Receivers::new(&domain, &source));
    let (mut stream, mut toolstack) = (Stream::new(&source), FakeToolstack::new(&domain));
    let restored = restore_with(&domain, &mut stream, &mut toolstack, Some(links), &WIRING);
    host.heal();
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
    restored.map(|_| domain)
}

/// Whether what an input brings can be placed.
fn is_taken(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let flags = input.u8();
    let has = |flag| flags & flag != 0;
    if has(flag::WORKER_ALONE) {
        alone::worker(input, has(flag::HVM), has(flag::ENDS));
        return false;
    }
    if has(flag::OWNER_ALONE) {
        return alone::owner(input, has(flag::HVM));
    }
    let (records, is_data) = unpack(input);
    let script = || if has(flag::HVM) { Script::hvm() } else { Script::pv() };
    let end = if has(flag::ENDS) { Vec::new() } else { to(u32::MAX) };
    let link = [to(1), records.clone(), end].concat();
    // The link's pages are those of the second pass.
    let linked = Linked::new(script(), 1).ends(0, &[]).ends(1, &[0]).over(0, &link).finish();
    let over_link = restored(flags, linked.ways());
    if let Err(error) = &over_link {
        assert!(!matches!(error, Error::Machine { .. } | Error::Aborted), "{error}");
        assert_told(error);
    }
    if has(flag::ENDS) {
        assert!(over_link.is_err() || !is_data, "a guest without all of its pages");
    } else if is_data && !has(flag::FAILS) {
        let mut plain = Linked::new(script(), 1);
        plain.script.bytes.extend(records);
        let over_stream = restored(flags, plain.finish().ways());
        compare(&over_link, &over_stream);
    }
    over_link.is_ok()
}

/// Both are refused, or both guests are the same.
fn compare(over_link: &Result<FakeDomain, Error>, over_stream: &Result<FakeDomain, Error>) {
    let (one, other) = match (over_link, over_stream) {
        (Ok(one), Ok(other)) => (one, other),
        (Err(_), Err(_)) => return,
        (Ok(_), Err(error)) => panic!("only over a link: {error}"),
        (Err(error), Ok(_)) => panic!("only over the stream: {}", error.chain()),
    };
    for pfn in (0..FRAMES_LARGE).map(Pfn) {
        match (page(one, pfn), page(other, pfn)) {
            (None, None) => {}
            (Some((kind, page)), Some((other_kind, other))) => {
                assert_eq!(kind, other_kind, "pfn {pfn}");
                let holds_frames = kind.table_level().is_some() || WITH_FRAMES.contains(&pfn);
                assert!(holds_frames || page.0 == other.0, "pfn {pfn} differs");
            }
            (one, _) => panic!("pfn {pfn} has memory over one way only ({})", one.is_some()),
        }
    }
}

/// Type and content of a page, if there is one.
fn page(domain: &FakeDomain, pfn: Pfn) -> Option<(PageType, Box<PageBuf>)> {
    let mfn = domain.populated_with(pfn)?;
    let frame = if domain.info().expect("a domain").hvm { pfn.0 } else { mfn.0 };
    let kind = domain.page_types(&[frame]).expect("a type").first().copied()?;
    let mut content = Box::new(PageBuf([0; PAGE_SIZE]));
    domain.map(&[frame], Access::Read).expect("memory").read_page(0, &mut content);
    Some((kind, content))
}

/// An input of `records`, all of them page data.
fn packed(flags: u8, records: &[Vec<u8>]) -> Vec<u8> {
    let mut input = vec![flags];
    for record in records {
        let (head, body) = record.split_at(RECORD_HEADER_BYTES);
        let (count, body) = body.split_at(8);
        let count: [u8; 4] = count.first_chunk().copied().expect("a count");
        let entries = 8 * usize::try_from(u32::from_le_bytes(count)).expect("a few");
        let (entries, content) = body.split_at(entries);
        input.extend([head, &count, entries].concat());
        content.chunks(PAGE_SIZE).for_each(|page| input.extend(block::write(page)));
    }
    input
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let entries = |entries: &[(u64, PageType)]| {
        let entry = |entry: &(u64, PageType)| PageEntry { pfn: Pfn(entry.0), kind: entry.1 };
        page_data_head(&entries.iter().map(entry).collect::<Vec<_>>()).expect("a few entries")
    };
    let low = [(2, 0x52), (3, 0x53)];
    let high = [(12, 0x52), (11, 0x53), (12, 0x54)];
    let kinds = [(11, PageType::AllocOnly), (14, PageType::Broken), (13, PageType::Invalid)];
    let extent: Vec<(u64, PageType)> = (512..1024).map(|pfn| (pfn, PageType::AllocOnly)).collect();
    let many: Vec<(u64, PageType)> = (0..1100).map(|n| (n % 4, PageType::AllocOnly)).collect();
    let hvm = [pages(&low), pages(&high), entries(&kinds)];
    let pv = [
        pages(&high),
        table(10, &[(0, 4), (1, 5), (2, 9), (3, 14)]),
        entries(&kinds),
        table(11, &[(0, 12)]),
        pages(&[(11, 0x11)]),
    ];
    let large = flag::HVM | flag::LARGE;
    let asked = [0, 0, 6, 0, 1, 6, 1, 1, 6, 0, 3, 6, 3, 0];
    // One record of two pages, after the answer to which pass it is.
    let answered = |answers: &[u8]| {
        let of = |record: &[u8], answer: &[u8]| {
            let (head, content) = record.split_at(RECORD_HEADER_BYTES + 8 + 8);
            let pages = content.chunks(PAGE_SIZE).flat_map(block::write);
            head.iter().chain(answer).copied().chain(pages).collect::<Vec<u8>>()
        };
        let head = [&[flag::WORKER_ALONE][..], &to(0), &[6]].concat();
        [head, of(&table(3, &[(0, 4), (1, 5)]), answers)].concat()
    };
    vec![
        packed(flag::HVM, &hvm),
        packed(0, &pv),
        packed(large, &[entries(&extent), entries(&many)]),
        packed(large | flag::FRAGMENTED, &[entries(&extent)]),
        [&[flag::HVM][..], &reduced(1, 0x22)].concat(),
        // Passes 1 and 3 of the first link, pass 1 of the second.
        vec![flag::OWNER_ALONE, 0, 0, 6, 0, 1, 6, 1, 1, 6, 0, 3],
        [&[flag::OWNER_ALONE | flag::HVM, 6, 0, 0, 2, 0, 1, 2, 0][..], &asked].concat(),
        packed(flag::HVM | flag::ENDS, &hvm),
        packed(flag::FAILS, &pv),
        // Too much, what cannot be, and what is not for links.
        packed(flag::HVM, &[entries(&extent)]),
        packed(0, &[pages(&[(16, 1)])]),
        packed(0, &[table(12, &[(0, 300)])]),
        [&[flag::HVM][..], &to(1), packed(0, &hvm).get(1..).unwrap_or_default()].concat(),
        [&[flag::HVM][..], &[1, 0, 0, 0x80, 3, 0, 0, 0, 1, 2, 3]].concat(),
        [&[flag::HVM][..], &RecordKind::Verify.code().to_le_bytes(), &[0; 4]].concat(),
        [&[flag::HVM][..], &reduced(0, 0x22)].concat(),
        // Workers and owners on their own: too few frames, too many, none, nobody there.
        [&answered(&[0, 3])[..], &[0, 4, 5], &answered(&[6]), &[6]].concat(),
        answered(&[5, 1, 2]),
        [&[flag::WORKER_ALONE | flag::ENDS][..], &to(0), &[6]].concat(),
        answered(&[6]),
        answered(&[7]),
        [&answered(&[0, 3])[..], &[5, 1, 2, 3]].concat(),
        vec![flag::OWNER_ALONE | flag::HVM, 0, 0, 4, 0, 1, 3, 0],
        vec![flag::OWNER_ALONE, 0, 0, 5, 0],
        vec![flag::OWNER_ALONE, 0, 0, 6, 1, 1, 1, 1],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_honest_sender_sends_is_taken_and_nothing_else() {
        let taken: Vec<bool> = seeds().iter().map(|seed| is_taken(seed)).collect();
        let expected = [[true; 7].as_slice(), &[false; 18]].concat();
        assert_eq!(taken, expected);
    }
}
