//! A libxc stream into an empty domain of a modelled host.
//!
//! An input is a few bytes about the domain and the host, then the stream as it is on the wire,
//! but that large blocks (pages, vCPU contexts) are written as in [`crate::block`]. So what the
//! fuzzer changes is mostly heads, entries and fields. If the stream offers links and they are
//! opened, what they bring is between the bytes of the stream ([`crate::ways`]).

use std::cell::RefCell;
use std::rc::Rc;

use rxl_migrate::Error;
use rxl_migrate::fake::{
    FakeDomain, FakeToolstack, Heard, Host, HvmSpec, P2mKind, PvSpec, Script, WIRING, Wire, tables,
};
use rxl_migrate::frame::{INVALID_FRAME, PAGE_SIZE, PageBuf, PageType, Pfn};
use rxl_migrate::hypervisor::{Access, Domain, TargetDomain};
use rxl_migrate::report::Event;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::{self, save};
use rxl_migrate::stream::libxc::{
    GuestKind, PageEntry, RecordKind, hvm_params, p2m_frames, record,
};
use rxl_migrate::target::links::Links;
use rxl_migrate::target::{Outcome, restore, restore_with};

use crate::input::Input;
use crate::linked::{Linked, two_links};
use crate::receivers::Receivers;
use crate::ways::{Packed, Stream, Wires};
use crate::{FRAMES_LARGE, assert_told, empty_domain, file};

/// Highest pfn of a domain that is saved again: its bitmaps grow with that.
const AGAIN_PFN_MAX: u64 = 1 << 16;

/// Bits of the first byte.
mod flag {
    /// The domain is an HVM guest's.
    pub(super) const HVM: u8 = 1;
    /// The host has no extents of 2 MiB.
    pub(super) const FRAGMENTED: u8 = 2;
    /// The host refuses the CPUID leaf of [`super::REFUSED_LEAF`].
    pub(super) const REFUSES_LEAF: u8 = 4;
    /// The host is the larger one.
    pub(super) const LARGE: u8 = 8;
    /// Blocks are there as they are.
    pub(super) const PLAIN: u8 = 16;
    /// The domain was made 32 bits wide.
    pub(super) const NARROW: u8 = 32;
    /// Somebody wants an end, after a while.
    pub(super) const ABORTED: u8 = 64;
    /// Links that the stream offers are opened.
    pub(super) const LINKS: u8 = 128;
}

const REFUSED_LEAF: u32 = 0x0101_0101;

/// Calls that may be told to fail, by the second byte; 0 and what is past the list is none.
const CALLS: [&str; 12] = [
    "",
    "info",
    "map",
    "map_m2p",
    "populate",
    "set_cpu_policy",
    "set_tsc_info",
    "set_hvm_param",
    "set_hvm_context",
    "set_vcpu",
    "pin_tables",
    "seed_grants",
];
const EIO: i32 = 5;

pub(crate) fn run(bytes: &[u8]) {
    let _ = is_taken(bytes);
}

/// Whether the stream of an input makes a domain.
fn is_taken(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let (flags, call, succeed) = (input.u8(), usize::from(input.u8()), input.u8());
    let has = |flag| flags & flag != 0;
    let domain = new_domain(flags);
    let host = domain.host();
    let fails = CALLS.get(call).filter(|call| !call.is_empty());
    if let Some(call) = fails {
        host.fail(call, u64::from(succeed), EIO);
    }
    let mut toolstack = FakeToolstack::new(&domain);
    toolstack.abort_at = has(flag::ABORTED).then_some(u64::from(succeed));
    let source = Rc::new(RefCell::new(Packed::new(input, has(flag::PLAIN))));
    let mut stream = Stream::new(&source);
    let links = has(flag::LINKS).then(|| Box::new(Receivers::new(&domain, &source)) as _);

    let restored = restore_with(&domain, &mut stream, &mut toolstack, links, &WIRING);
    host.heal();
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
    if !has(flag::LINKS) && !has(flag::ABORTED) && fails.is_none() {
        file::check(&domain, &new_domain(flags), stream.taken.clone(), restored.is_ok());
    }
    match restored {
        Ok(outcome) => {
            complete(&domain, &stream, &toolstack, outcome);
            true
        }
        Err(error) => {
            assert_told(&error);
            match error {
                Error::Machine { .. } | Error::NotSuspended => {
                    panic!("{error}")
                }
                Error::Aborted => assert!(has(flag::ABORTED)),
                _ => {}
            }
            false
        }
    }
}

/// An empty domain, as the flags say.
fn new_domain(flags: u8) -> FakeDomain {
    let has = |flag| flags & flag != 0;
    let domain = empty_domain(has(flag::HVM), has(flag::LARGE), has(flag::FRAGMENTED));
    let host = domain.host();
    if has(flag::REFUSES_LEAF) {
        host.refuse_leaf(REFUSED_LEAF);
    }
    if has(flag::NARROW) {
        domain.set_address_bits(32).expect("a domain without memory");
    }
    domain
}

/// A stream that was taken: it was read up to its END and no further, the toolstack was told what
/// it has to know, and whoever got such a domain can send it on.
fn complete(
    domain: &FakeDomain,
    stream: &Stream<Packed>,
    toolstack: &FakeToolstack,
    outcome: Outcome,
) {
    assert_eq!(stream.last, Some([0; 8]), "the last that was read is not END");
    let static_data = |heard: &&Heard| matches!(heard, Heard::StaticDataDone { .. });
    assert_eq!(toolstack.heard.iter().filter(static_data).count(), 1);
    let bytes = stream.taken.len() as u64;
    let finished = Heard::Event(Event::Finished { bytes });
    assert!(toolstack.heard.contains(&finished), "wrong about the {bytes} bytes");
    let info = domain.info().expect("a domain");
    for frame in [outcome.store_frame, outcome.console_frame] {
        let none = info.hvm && frame == INVALID_FRAME;
        assert!(none || domain.map(&[frame], Access::Read).is_ok(), "no ring at {frame:#x}");
    }
    if can_be_sent_on(domain) {
        send_on(domain);
    }
}

/// Whether it is an HVM guest, and not too large.
pub(crate) fn can_be_sent_on(domain: &FakeDomain) -> bool {
    domain.info().is_ok_and(|info| info.hvm)
        && domain.maximum_gpfn().is_ok_and(|max| max <= AGAIN_PFN_MAX)
}

/// Saves the HVM guest `domain` and restores the stream, twice: both streams are the same.
fn send_on(domain: &FakeDomain) {
    let first = saved(domain);
    let host = Host::new(FRAMES_LARGE, 8);
    let copy = host.create(true, FRAMES_LARGE - 16, 2);
    restore(&copy, &mut first.clone(), &mut FakeToolstack::new(&copy), &WIRING)
        .expect("rxl restores what it saved");
    assert!(saved(&copy).bytes == first.bytes, "a guest changed on its second move");
}

pub(crate) fn saved(domain: &FakeDomain) -> Wire {
    let mut wire = Wire::default();
    let options =
        source::Options { live: false, verify: source::Verify::No, policy: Policy::Stock };
    save(domain, &mut wire, &mut FakeToolstack::new(domain), &options)
        .expect("rxl saves what it restored");
    wire
}

/// The input that makes the stream `bytes`, by reading it and noting how.
fn from_stream(flags: u8, bytes: &[u8]) -> Vec<u8> {
    from_ways(flags, vec![bytes.to_vec()], 0)
}

/// The same of a stream and links, read in an order that `seed` decides.
fn from_ways(flags: u8, ways: Vec<Vec<u8>>, seed: u64) -> Vec<u8> {
    let host = Host::new(FRAMES_LARGE, 7);
    let domain = host.create(flags & flag::HVM != 0, FRAMES_LARGE - 16, 3);
    let source = Rc::new(RefCell::new(Wires::new(ways, seed)));
    let mut stream = Stream::new(&source);
    let links = (flags & flag::LINKS != 0)
        .then(|| Box::new(Receivers::new(&domain, &source)) as Box<dyn Links>);
    let mut toolstack = FakeToolstack::new(&domain);
    // Seeds may be streams that are refused: what was read until then is the input.
    let _ = restore_with(&domain, &mut stream, &mut toolstack, links, &WIRING);
    [&[flags, 0, 0], &source.borrow().input[..]].concat()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let scripts = [Script::pv(), Script::hvm(), Script::hvm_v2(), verified(Script::pv())];
    let scripts = scripts.into_iter().chain([verified(Script::hvm()), pv_v2(), mixed(), narrow()]);
    let small =
        scripts.map(|script| from_stream(if script.hvm { flag::HVM } else { 0 }, &script.bytes));
    let mut seeds: Vec<Vec<u8>> = small.collect();
    let extents = runs();
    for flags in [flag::LARGE, flag::LARGE | flag::FRAGMENTED] {
        seeds.push(from_stream(flag::HVM | flags, &extents.bytes));
    }
    // As the modelled Xen's guests are saved.
    for p2m in [P2mKind::Linear, P2mKind::Tree] {
        let spec = PvSpec {
            pages: 200,
            one_hole_in: 20,
            p2m,
            long_tail: false,
            vcpus: 2,
            processes: 1,
            seed: 1,
        };
        let domain = spec.build(&Host::new(500, 1));
        seeds.push(from_stream(flag::LARGE, &saved(&domain).bytes));
    }
    let domain = HvmSpec { pages: 512, seed: 1 }.build(&Host::new(700, 1));
    seeds.push(from_stream(flag::HVM | flag::LARGE, &saved(&domain).bytes));
    seeds.push([&[flag::HVM | flag::PLAIN, 0, 0], &Script::hvm().bytes[..]].concat());
    for seed in 0..4 {
        seeds.push(from_ways(flag::LINKS, two_links(false).ways(), seed));
        seeds.push(from_ways(flag::LINKS | flag::HVM, two_links(true).ways(), seed));
    }
    // Links that are offered, and that this side does not open; with no pages, and with some.
    let offered = Linked::new(Script::hvm(), 2).ends(0, &[]).loses(0).finish();
    seeds.push(from_stream(flag::HVM, &offered.script.bytes));
    // The end of a pass that cannot be the next.
    let skips = Linked::new(Script::hvm(), 2).ends(1, &[]).finish();
    seeds.push(from_stream(flag::HVM, &skips.script.bytes));
    seeds
}

/// The same with a second pass over some pages, to compare; one of them differs.
fn verified(mut script: Script) -> Script {
    script.rewind();
    script.record(RecordKind::Verify, &[]);
    let normal = |pfn, byte| (pfn, PageType::Normal, Box::new(PageBuf([byte; PAGE_SIZE])));
    let mut pages = vec![normal(2, 0x22), normal(3, 0x34)];
    if !script.hvm {
        let table = PageType::Table { level: 1, pinned: false };
        pages = vec![normal(4, 0x44), (10, table, tables(&[(0, 4), (1, 5), (2, 9), (3, 11)]))];
    }
    script.pages(&pages);
    if script.hvm { script.finish_hvm() } else { script.finish_pv() }
}

/// A PV stream of version 2: no record ends the static data.
fn pv_v2() -> Script {
    let mut script = Script::new(GuestKind::Pv, 2);
    let from = Script::pv();
    let ends = from.records.iter().skip(1).copied().chain([from.bytes.len()]);
    for (begin, end) in from.records.iter().copied().zip(ends) {
        let bytes = from.bytes.get(begin..end).unwrap_or_default();
        if !bytes.starts_with(&RecordKind::StaticDataEnd.code().to_le_bytes()) {
            script.bytes.extend(bytes);
        }
    }
    script
}

/// Pages that come again as something else, empty ones, a longer p2m, records to be skipped.
fn mixed() -> Script {
    let mut script = Script::pv();
    let page = |byte| Box::new(PageBuf([byte; PAGE_SIZE]));
    let pinned = PageType::Table { level: 1, pinned: true };
    script.pages(&[
        (12, pinned, tables(&[(0, 4)])),
        (13, PageType::Normal, page(1)),
        (12, PageType::Normal, page(2)),
    ]);
    let kinds = [PageType::AllocOnly, PageType::Broken, PageType::Invalid];
    let entries = (13..).zip(kinds).map(|(pfn, kind)| PageEntry { pfn: Pfn(pfn), kind });
    script.entries(&entries.collect::<Vec<_>>());
    script.bytes.extend([1, 0, 0, 0x80, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0]);
    let longer = p2m_frames(Pfn(600), &[Pfn(9), Pfn(14)]).unwrap_or_default();
    script.record(RecordKind::X86PvP2mFrames, &longer);
    script.pages(&[(599, PageType::Normal, page(3)), (14, PageType::Normal, page(4))]);
    script.finish_pv()
}

/// A 32-bit PV guest's, as far as that is read.
fn narrow() -> Script {
    let mut script = Script::new(GuestKind::Pv, 3);
    script.record(RecordKind::X86PvInfo, &[4, 3, 0, 0, 0, 0, 0, 0]);
    script
}

/// An HVM guest with a whole extent of 2 MiB, parameters that need pages, and none of them.
fn runs() -> Script {
    let mut script = Script::hvm();
    script.rewind();
    let entries = (512..1024).map(|pfn| PageEntry { pfn: Pfn(pfn), kind: PageType::AllocOnly });
    script.entries(&entries.collect::<Vec<_>>());
    let params: Vec<(u64, u64)> = [(5, 1), (6, 2), (9, 0x27), (36, 8)].into();
    let mut script = script.finish_hvm();
    let end = script.records.last().copied().unwrap_or_default();
    script.bytes.truncate(end);
    for params in [params, Vec::new()] {
        let body = hvm_params(&params);
        script.bytes.extend(record(RecordKind::HvmParams, &[&body]).unwrap_or_default());
    }
    script.bytes.extend(record(RecordKind::End, &[]).unwrap_or_default());
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest of one is 32 bits wide, the other leaves a pass out.
    #[test]
    fn every_seed_but_two_makes_a_domain() {
        let taken: Vec<bool> = seeds().iter().map(|seed| is_taken(seed)).collect();
        assert_eq!(taken.iter().filter(|taken| !**taken).count(), 2, "{taken:?}");
    }
}
