//! Streams made by hand, good and bad, against the modelled Xen.

mod hostile;
mod links;

use crate::error::{Error, GuestError};
use crate::fake::{FakeDomain, FakeToolstack, Heard, Host, Script, WIRING, tables};
use crate::frame::{DomId, Mfn, PageBuf, PageType, Pfn};
use crate::hypervisor::{
    Access, Domain, ForeignPages, LogLevel, PolicyError, SourceDomain, TargetDomain, VcpuState,
};
use crate::stream::libxc::{PageEntry, RecordKind};
use crate::target::memory::{self, Populated, Space};
use crate::target::p2m::P2m;
use crate::target::{Outcome, restore};
use crate::x86::hvm;
use crate::x86::pv::{context, get_u64};

/// A new domain of a host of its own, with a toolstack, to restore into.
fn target(hvm: bool) -> (FakeDomain, FakeToolstack) {
    let domain = Host::new(48, 7).create(hvm, 32, 2);
    let toolstack = FakeToolstack::new(&domain);
    (domain, toolstack)
}

fn restored(script: &Script) -> (FakeDomain, FakeToolstack, Outcome) {
    let (domain, mut toolstack) = target(script.hvm);
    let outcome = restore(&domain, &mut script.wire(), &mut toolstack, &WIRING).unwrap();
    assert_eq!(domain.host().mapped_pages(), 0);
    (domain, toolstack, outcome)
}

/// Why the stream of `script` is refused.
fn refusal(script: &Script) -> Error {
    let (domain, mut toolstack) = target(script.hvm);
    let refused = restore(&domain, &mut script.wire(), &mut toolstack, &WIRING);
    assert_eq!(domain.host().mapped_pages(), 0);
    refused.expect_err("a stream that is not valid")
}

/// The page at a frame of `domain`.
fn page(domain: &FakeDomain, frame: u64) -> Box<PageBuf> {
    let mut page = PageBuf::zeroed();
    domain.map(&[frame], Access::Read).unwrap().read_page(0, &mut page);
    page
}

/// The mfn of `pfn` in a restored PV domain.
fn mfn(domain: &FakeDomain, pfn: u64) -> u64 {
    domain.populated_with(Pfn(pfn)).expect("memory").0
}

#[test]
fn the_words_and_the_order_of_a_restore_are_stocks() {
    let (domain, toolstack, outcome) = restored(&Script::pv());
    let info = toolstack.lines(LogLevel::Info);
    let (store, console) = (mfn(&domain, 6), mfn(&domain, 7));
    assert_eq!(outcome, Outcome { store_frame: store, console_frame: console });
    assert_eq!(
        info,
        [
            "Found x86 PV domain from Xen 4.17",
            "Restoring domain",
            "Restore successful",
            &format!("XenStore: mfn {store:#x}, dom 0, evt 17"),
            &format!("Console: mfn {console:#x}, dom 3, evt 18"),
        ]
    );
    let said = Heard::StaticDataDone { missing_cpuid: false, missing_msr: true };
    assert!(toolstack.heard.contains(&said), "{:?}", toolstack.heard);
    let calls: Vec<&str> = domain.host().calls().iter().map(|(_, op)| *op).collect();
    let end = calls.iter().position(|op| *op == "set_vcpu").unwrap();
    // Start info before, p2m after; what this test maps itself comes last.
    assert_eq!(calls[end - 1..][..5], ["map", "set_vcpu", "pin_tables", "map", "seed_grants"]);
    assert!(
        calls.iter().position(|op| *op == "set_cpu_policy")
            < calls.iter().position(|op| *op == "populate")
    );
}

#[test]
fn a_page_keeps_the_last_type_and_content_that_came() {
    let page_of = |byte| Box::new(PageBuf([byte; 4096]));
    let pinned = PageType::Table { level: 1, pinned: true };
    let mut script = Script::pv();
    // Table 12 becomes data, data page 13 becomes a table, within one record and across records.
    script.pages(&[(12, pinned, tables(&[(0, 4)])), (13, PageType::Normal, page_of(1))]);
    script.pages(&[
        (13, PageType::Normal, page_of(2)),
        (13, pinned, tables(&[(3, 4)])),
        (12, pinned, tables(&[(1, 4)])),
        (12, PageType::Normal, page_of(3)),
    ]);
    script.pages(&[(14, pinned, tables(&[(0, 4)]))]);
    script.entries(&[PageEntry { pfn: Pfn(14), kind: PageType::Invalid }]);
    let (domain, ..) = restored(&script.finish_pv());
    assert_eq!(page(&domain, mfn(&domain, 12)).0, [3; 4096]);
    let pte = page(&domain, mfn(&domain, 13)).words().nth(3).unwrap();
    assert_eq!(pte >> 12, mfn(&domain, 4));
    let kinds = [12, 13, 14].map(|pfn| mfn(&domain, pfn));
    let kinds = domain.page_types(&kinds).unwrap();
    assert_eq!(kinds, [PageType::Normal, pinned, PageType::Normal]);
}

#[test]
fn a_page_that_a_table_refers_to_has_memory_before_it_comes() {
    let mut script = Script::pv();
    let table = PageType::Table { level: 1, pinned: true };
    script.pages(&[(12, table, tables(&[(0, 13), (1, 14), (2, 13)]))]);
    let before = script.record_count();
    script.pages(&[(13, PageType::Normal, Box::new(PageBuf([5; 4096])))]);
    assert_eq!(script.record_count(), before + 1);
    let (domain, ..) = restored(&script.finish_pv());
    let ptes: Vec<u64> = page(&domain, mfn(&domain, 12)).words().take(3).collect();
    assert_eq!(
        ptes.iter().map(|pte| pte >> 12).collect::<Vec<_>>(),
        [13, 14, 13].map(|pfn| mfn(&domain, pfn))
    );
    assert_eq!(page(&domain, mfn(&domain, 13)).0, [5; 4096]);
}

#[test]
fn contexts_of_vcpus_hold_frames_of_the_new_domain() {
    let (domain, ..) = restored(&Script::pv());
    let VcpuState { basic, extended, .. } = domain.vcpu(0).unwrap().unwrap();
    let word = |offset| get_u64(&basic, offset).unwrap();
    assert_eq!(word(context::CR3), mfn(&domain, 1) << 12);
    assert_eq!(word(context::CR1), mfn(&domain, 1) << 12);
    assert_eq!(word(context::START_INFO), mfn(&domain, 5));
    assert_eq!(word(context::GDT_FRAMES), mfn(&domain, 8));
    assert_eq!(word(context::FLAGS) & 0x20, 0x20);
    assert_eq!(extended, [9; 64]);
    assert_eq!(domain.vcpu(1).unwrap(), None);
}

#[test]
fn the_guest_finds_its_new_p2m_where_it_kept_the_old_one() {
    let (domain, ..) = restored(&Script::pv());
    let p2m: Vec<u64> = page(&domain, mfn(&domain, 9)).words().collect();
    assert_eq!(p2m[4], mfn(&domain, 4));
    assert_eq!(p2m[15], u64::MAX);
    assert!(p2m[16..].iter().all(|entry| *entry == u64::MAX));
}

#[test]
fn pages_that_hvm_parameters_share_with_backends_are_cleared() {
    let (domain, toolstack, outcome) = restored(&Script::hvm());
    assert_eq!(outcome, Outcome { store_frame: 1, console_frame: 2 });
    assert_eq!(page(&domain, 0).0, [0x11; 4096]);
    assert_eq!(page(&domain, 1).0, [0; 4096]);
    assert_eq!(page(&domain, 2).0, [0; 4096]);
    let params = [hvm::STORE_EVTCHN, hvm::CONSOLE_EVTCHN, hvm::PAE_ENABLED]
        .map(|index| domain.hvm_param(index).unwrap());
    assert_eq!(params, [17, 18, 0]);
    assert_eq!(toolstack.lines(LogLevel::Info)[0], "Found x86 HVM domain from Xen 4.17");
}

#[test]
fn a_stream_of_version_2_has_the_toolstack_make_a_policy_once() {
    let (_, toolstack, _) = restored(&Script::hvm_v2());
    let said = toolstack.heard.iter().filter(|h| matches!(h, Heard::StaticDataDone { .. }));
    let missing = Heard::StaticDataDone { missing_cpuid: true, missing_msr: true };
    assert_eq!(said.collect::<Vec<_>>(), [&missing]);
}

#[test]
fn a_policy_that_this_host_cannot_give_ends_the_restore_and_names_the_leaf() {
    let (domain, mut toolstack) = target(true);
    domain.host().refuse_leaf(0x0101_0101);
    let refused = restore(&domain, &mut Script::hvm().wire(), &mut toolstack, &WIRING);
    let Err(Error::Policy(PolicyError::Refused { leaf, .. })) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(leaf, 0x0101_0101);
    assert!(domain.host().calls().iter().all(|(_, op)| *op != "populate"));
}

#[test]
fn pages_that_differ_after_a_verify_record_are_told_and_change_nothing() {
    let mut script = Script::hvm();
    script.rewind();
    script.record(RecordKind::Verify, &[]);
    let sent = |pfn, byte| (pfn, PageType::Normal, Box::new(PageBuf([byte; 4096])));
    script.pages(&[sent(0, 0x11), sent(2, 0x77), sent(3, 0x33)]);
    let (domain, toolstack, _) = restored(&script.finish_hvm());
    assert_eq!(
        toolstack.lines(LogLevel::Error),
        ["verify: pfn 0x2 differs", "1 pages differ from what was sent before (first: pfn 0x2)"]
    );
    assert_eq!(page(&domain, 3).0, [0x33; 4096]);
}

#[test]
fn a_toolstack_that_wants_an_end_gets_it_at_the_next_record() {
    let (domain, mut toolstack) = target(true);
    toolstack.abort_at = Some(2);
    let mut wire = Script::hvm().wire();
    let ended = restore(&domain, &mut wire, &mut toolstack, &WIRING);
    assert!(matches!(ended, Err(Error::Aborted)));
    assert!(wire.position < 200);
}

#[test]
fn whole_aligned_runs_of_2_mib_are_populated_as_one() {
    let populate = |fragmented: bool| {
        let host = Host::new(4096, 1);
        let domain = host.create(true, 4000, 1);
        if fragmented {
            host.fragment();
        }
        let mut space = Populated::default();
        // 512..1024 is whole; 1024..1536 lacks a page that another record brings.
        let first = (500..1536).filter(|pfn| *pfn != 1100);
        memory::populate(&domain, &mut space, first.map(Pfn)).unwrap();
        memory::populate(&domain, &mut space, (1024..1536).map(Pfn)).unwrap();
        assert!((500..1536).all(|pfn| space.frame(Pfn(pfn)) == Some(pfn)));
        assert_eq!(space.frame(Pfn(499)).or(space.frame(Pfn(1536))), None);
        assert_eq!(domain.info().unwrap().total_pages, 1036);
        domain.extents()
    };
    assert_eq!((populate(false), populate(true)), (1, 0));
}

#[test]
fn whole_runs_are_asked_for_together_and_what_is_not_to_be_had_so_page_by_page() {
    let host = Host::new(4096, 1);
    // Room for two extents, and half of a third.
    let domain = host.create(true, 1024 + 256, 1);
    let mut space = Populated::default();
    let wanted = (0..1024).chain(2048..2048 + 256).map(Pfn);
    memory::populate(&domain, &mut space, wanted).unwrap();
    assert_eq!((domain.extents(), calls_of(&host, "populate")), (2, 2));

    let host = Host::new(4096, 1);
    let domain = host.create(true, 1024 + 256, 1);
    let mut space = Populated::default();
    let wanted = (0..512).chain(1024..1536).chain(2048..2560).map(Pfn);
    assert!(memory::populate(&domain, &mut space, wanted).is_err());
    // The third extent, then its pages.
    assert_eq!((domain.extents(), calls_of(&host, "populate")), (2, 2));
    assert_eq!(space.frame(Pfn(1535)), Some(1535));
    assert_eq!(space.frame(Pfn(2048)), None);
}

fn calls_of(host: &Host, wanted: &str) -> usize {
    host.calls().iter().filter(|(_, op)| *op == wanted).count()
}

#[test]
fn memory_that_the_hypervisor_did_not_give_is_not_counted_on() {
    let domain = Host::new(64, 1).create(true, 4, 1);
    let mut space = Populated::default();
    let all = (0..8).map(Pfn);
    assert!(memory::populate(&domain, &mut space, all).is_err());
    assert_eq!(space.frame(Pfn(0)), None);
}

#[test]
fn a_frame_counts_only_if_the_m2p_knows_it_by_its_pfn() {
    let domain = Host::new(64, 1).create(false, 4, 1);
    let mfn = domain.populate(&[Pfn(3)], 0).unwrap()[0];
    let mut p2m = P2m::new(domain.map_m2p().unwrap());
    p2m.grow(8);
    for (pfn, frame) in [(Pfn(4), mfn), (Pfn(3), u64::MAX - 1)] {
        let error = GuestError::ForeignFrame { what: "new page", mfn: frame };
        assert_eq!(p2m.set_frame(pfn, frame), Err(error));
        assert_eq!(p2m.mfn(pfn), None);
    }
    p2m.set_frame(Pfn(3), mfn).unwrap();
    assert_eq!(p2m.mfn(Pfn(3)), Some(Mfn(mfn)));
}

#[test]
fn a_pv_guest_gets_a_width_only_if_it_has_the_wrong_one() {
    let (domain, mut toolstack) = target(false);
    domain.set_address_bits(32).unwrap();
    restore(&domain, &mut Script::pv().wire(), &mut toolstack, &WIRING).unwrap();
    assert_eq!(domain.address_bits().unwrap(), 64);
    let (domain, ..) = restored(&Script::pv());
    assert!(!domain.host().calls().contains(&(DomId(1), "set_address_bits")));
}

#[test]
fn state_that_points_to_the_wrong_kind_of_page_is_refused() {
    let word = |offset: usize, value: u64| {
        let mut script = Script::pv();
        script.rewind();
        script.finish_pv_with(|basic| basic[offset..][..8].copy_from_slice(&value.to_le_bytes()))
    };
    for (script, wanted) in [
        (word(context::CR3, 4 << 12), GuestError::NotTopTable { pfn: Pfn(4) }),
        (word(context::CR3, 2 << 12), GuestError::NotTopTable { pfn: Pfn(2) }),
        (word(context::CR3, 99 << 12), GuestError::NotTopTable { pfn: Pfn(99) }),
        (word(context::CR1, 4 << 12 | 1), GuestError::NotTopTable { pfn: Pfn(4) }),
        (
            word(context::GDT_FRAMES, 2),
            GuestError::NotOrdinary { what: "frame of a GDT", pfn: Pfn(2) },
        ),
        (
            word(context::START_INFO, 15),
            GuestError::NotOrdinary { what: "start info page", pfn: Pfn(15) },
        ),
        (
            word(context::GDT_ENTRIES, 7169),
            GuestError::State("a vCPU's GDT is longer than a guest's may be"),
        ),
    ] {
        match refusal(&script) {
            Error::Guest(error) => assert_eq!(error, wanted),
            other => panic!("{other:?}, wanted {wanted:?}"),
        }
    }
}
