//! The sender and the receiver together: a guest that is saved on one modelled host and restored
//! on another is the same guest, whatever it did meanwhile.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "what is not there is to stop the test"
)]

use std::io;

use proptest::prelude::*;
use rxl_migrate::error::{Error, GuestError};
use rxl_migrate::fake::compare;
use rxl_migrate::fake::{
    FakeDomain, FakePages, FakeToolstack, Heard, Host, HvmSpec, P2mKind, PvSpec, WIRING, Wire,
    fill_pages,
};
use rxl_migrate::hypervisor::{Domain, LogLevel, PageSlot, StreamIn};
use rxl_migrate::report::Event;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::{self, Verify, save};
use rxl_migrate::target::{Outcome, restore};

const LIVE: source::Options =
    source::Options { live: true, verify: Verify::No, policy: Policy::Stock };
const STOPPED: source::Options =
    source::Options { live: false, verify: Verify::No, policy: Policy::Stock };
fn pv(p2m: P2mKind, seed: u64) -> PvSpec {
    PvSpec { pages: 1500, one_hole_in: 20, p2m, long_tail: false, vcpus: 3, processes: 3, seed }
}

/// Frames of a host that has room for the guests of this file.
const HOST_FRAMES: u64 = 8192;
/// Pages that a copy may have more than the guest had when it was suspended: what it gave back
/// meanwhile comes along.
const BALLOONED_PAGES_MAX: u64 = 2000;

fn source_host(seed: u64) -> Host {
    Host::new(HOST_FRAMES, seed)
}

/// Restores `wire` into a new domain of a host of its own.
fn restored(source: &FakeDomain, wire: &mut Wire, seed: u64) -> (FakeDomain, Outcome) {
    let info = source.info().unwrap();
    let host = Host::new(HOST_FRAMES, seed ^ 0x5eed);
    let target =
        host.create(info.hvm, info.total_pages + BALLOONED_PAGES_MAX, info.max_vcpu_id + 1);
    let mut toolstack = FakeToolstack::new(&target);
    let outcome = restore(&target, wire, &mut toolstack, &WIRING).unwrap();
    assert_eq!(toolstack.lines(LogLevel::Error), [""; 0]);
    (target, outcome)
}

/// Moves `source` and says in what the copy differs.
fn moved(source: &FakeDomain, options: &source::Options, seed: u64) -> Vec<String> {
    let mut wire = Wire::default();
    let summary = save(source, &mut wire, &mut FakeToolstack::new(source), options).unwrap();
    assert_eq!(summary.bytes, wire.bytes.len() as u64);
    wire.bytes.extend(b"libxl reads on here");
    let (target, outcome) = restored(source, &mut wire, seed);
    assert_eq!(&wire.bytes[wire.position..], b"libxl reads on here");
    compare(source, &target, &WIRING, &outcome)
}

const SAME: [&str; 0] = [];

/// A share of the usual number of cases, for a case is a whole migration; `PROPTEST_CASES` scales
/// it.
fn one_in(share: u32) -> ProptestConfig {
    let usual = ProptestConfig::default();
    ProptestConfig { cases: usual.cases.div_ceil(share), failure_persistence: None, ..usual }
}

#[test]
fn a_stopped_hvm_guest_arrives_as_it_was() {
    let source = HvmSpec { pages: 1600, seed: 1 }.build(&source_host(1));
    assert_eq!(moved(&source, &STOPPED, 1), SAME);
}

#[test]
fn a_stopped_pv_guest_arrives_as_it_was() {
    for kind in [P2mKind::Linear, P2mKind::Tree] {
        for long_tail in [false, true] {
            let spec = PvSpec { long_tail, ..pv(kind, 2) };
            let source = spec.build(&source_host(2));
            assert_eq!(moved(&source, &STOPPED, 2), SAME, "{spec:?}");
        }
    }
}

proptest! {
    #![proptest_config(one_in(20))]

    #[test]
    fn a_running_hvm_guest_arrives_as_it_was_when_it_was_suspended(
        seed: u64, pages in 512_u64..2000, every in 1_u64..40,
    ) {
        let host = source_host(seed);
        let source = HvmSpec { pages, seed }.build(&host);
        host.run_guests(every);
        prop_assert_eq!(moved(&source, &LIVE, seed), SAME);
    }

    #[test]
    fn a_running_pv_guest_arrives_as_it_was_when_it_was_suspended(
        seed: u64, linear: bool, pages in 700_u64..2000, every in 1_u64..2000,
    ) {
        let host = source_host(seed);
        let kind = if linear { P2mKind::Linear } else { P2mKind::Tree };
        let source = PvSpec { pages, ..pv(kind, seed) }.build(&host);
        host.run_guests(every);
        prop_assert_eq!(moved(&source, &LIVE, seed), SAME);
    }
}

#[test]
fn an_hvm_guest_gets_superpages_where_the_host_has_them() {
    let source = HvmSpec { pages: 2048, seed: 4 }.build(&source_host(4));
    let mut wire = Wire::default();
    save(&source, &mut wire, &mut FakeToolstack::new(&source), &STOPPED).unwrap();
    // The first 2 MiB have a hole, and one page is broken.
    let (target, _) = restored(&source, &mut wire, 4);
    assert!(target.extents() >= 2, "{}", target.extents());
}

#[test]
fn a_comparison_after_the_move_finds_nothing_in_a_good_copy() {
    let options = source::Options { live: true, verify: Verify::Again, policy: Policy::Stock };
    let host = source_host(5);
    let source = pv(P2mKind::Linear, 5).build(&host);
    host.run_guests(50);
    assert_eq!(moved(&source, &options, 5), SAME);
    let host = source_host(6);
    let source = HvmSpec { pages: 700, seed: 6 }.build(&host);
    host.run_guests(5);
    assert_eq!(moved(&source, &options, 6), SAME);
}

#[test]
fn digests_of_a_good_copy_are_those_of_the_guest() {
    let options = source::Options { verify: Verify::Digests, ..LIVE };
    for (linear, seed) in [(true, 7), (false, 8)] {
        let host = source_host(seed);
        let source = pv(if linear { P2mKind::Linear } else { P2mKind::Tree }, seed).build(&host);
        host.run_guests(50);
        assert_eq!(moved(&source, &options, seed), SAME);
    }
    let host = source_host(9);
    let source = HvmSpec { pages: 700, seed: 9 }.build(&host);
    host.run_guests(5);
    assert_eq!(moved(&source, &options, 9), SAME);
}

/// A stream in which one page, counted from 0, changes on its way.
struct Changing {
    wire: Wire,
    page: usize,
}

impl StreamIn<FakePages> for Changing {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        StreamIn::<FakePages>::read_exact(&mut self.wire, buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |page| {
            StreamIn::<FakePages>::read_exact(&mut self.wire, page)?;
            page[2047] ^= if self.page == 0 { 0x20 } else { 0 };
            self.page = self.page.wrapping_sub(1);
            Ok(())
        })
    }
}

/// What becomes of a guest of which page number `page` of the stream changes on its way: the
/// differences, if it is restored, and what is logged.
fn changed(hvm: bool, verify: Verify, page: usize) -> (Result<Vec<String>, Error>, Vec<String>) {
    let host = source_host(11);
    let source = match hvm {
        true => HvmSpec { pages: 700, seed: 11 }.build(&host),
        false => pv(P2mKind::Linear, 11).build(&host),
    };
    let mut wire = Wire::default();
    let options = source::Options { verify, ..STOPPED };
    save(&source, &mut wire, &mut FakeToolstack::new(&source), &options).unwrap();
    let info = source.info().unwrap();
    let target = Host::new(HOST_FRAMES, 3).create(hvm, info.total_pages, info.max_vcpu_id + 1);
    let mut toolstack = FakeToolstack::new(&target);
    let restored = restore(&target, &mut Changing { wire, page }, &mut toolstack, &WIRING);
    assert_eq!(target.host().mapped_pages(), 0);
    let differences = restored.map(|outcome| compare(&source, &target, &WIRING, &outcome));
    let lines = toolstack.lines(LogLevel::Error).iter().map(ToString::to_string).collect();
    (differences, lines)
}

#[test]
fn a_page_that_changes_on_its_way_is_found_by_its_digest_and_by_nothing_else() {
    for (hvm, page) in [(true, 9), (true, 555), (false, 9), (false, 300), (false, 1100)] {
        let differences = changed(hvm, Verify::No, page).0.unwrap();
        assert_eq!(differences.len(), 1, "page {page}: {differences:?}");
        let (found, lines) = changed(hvm, Verify::Digests, page);
        let Err(Error::Differs { pages: 1, first }) = found else { panic!("{page}: {found:?}") };
        assert_eq!(lines, [format!("verify: pfn {first} differs")]);
    }
}

/// A guest that runs, of either kind.
fn running(hvm: bool, seed: u64) -> FakeDomain {
    let host = source_host(seed);
    let source = if hvm {
        HvmSpec { pages: 600, seed }.build(&host)
    } else {
        PvSpec { pages: 800, ..pv(P2mKind::Linear, seed) }.build(&host)
    };
    host.run_guests(10);
    source
}

#[test]
fn guests_that_once_did_not_arrive_as_they_were_do() {
    // A table is put off because it vanishes between two calls, and nothing marks it afterwards;
    // a frame becomes another page, a table, between two calls.
    for seed in [4_859_627_639_660_159_751, 9_004_201_111_697_879_024] {
        assert_eq!(moved(&running(false, seed), &LIVE, seed), SAME, "{seed}");
    }
}

/// Pages that a live save of `source` sends from mappings that it has made before.
fn kept_pages(source: &FakeDomain) -> u64 {
    let mut toolstack = FakeToolstack::new(source);
    save(source, &mut Wire::default(), &mut toolstack, &LIVE).unwrap();
    let kept = toolstack.heard.iter().map(|heard| match heard {
        Heard::Event(Event::Counted { counters, .. }) => counters.kept_pages,
        _ => 0,
    });
    kept.sum()
}

#[test]
fn what_a_pv_guest_writes_again_is_sent_from_where_it_is_mapped_and_of_others_mapped_anew() {
    assert!(kept_pages(&running(false, 12)) > 100);
    assert_eq!(kept_pages(&running(true, 12)), 0);
}

/// Saves `source` live, which is to fail; it is to be left as a failure may leave it.
fn failed_save(
    source: &FakeDomain,
    prepare: impl FnOnce(&mut FakeToolstack, &mut Wire),
) -> (Error, bool) {
    let (mut toolstack, mut wire) = (FakeToolstack::new(source), Wire::default());
    prepare(&mut toolstack, &mut wire);
    let error = save(source, &mut wire, &mut toolstack, &LIVE).expect_err("a failure");
    assert!(!source.is_logging());
    assert_eq!(source.host().mapped_pages(), 0);
    (error, source.info().unwrap().shutdown.is_some())
}

#[test]
fn a_guest_that_does_not_suspend_runs_on() {
    for hvm in [false, true] {
        let (error, suspended) =
            failed_save(&running(hvm, 7), |toolstack, _| toolstack.refuses_to_suspend = true);
        assert!(matches!(error, Error::NotSuspended), "{error}");
        assert!(!suspended);
    }
}

#[test]
fn a_device_model_that_cannot_log_stops_the_save_at_its_start() {
    let source = running(true, 8);
    let (error, suspended) = failed_save(&source, |toolstack, _| toolstack.qemu_fails = true);
    assert!(matches!(error, Error::Toolstack { .. }), "{error}");
    assert!(!suspended);
}

#[test]
fn a_guest_that_cannot_be_logged_is_not_saved_live() {
    let source = running(false, 9);
    source.forbid_log_dirty();
    let (error, suspended) = failed_save(&source, |_, _| ());
    assert!(matches!(error, Error::Hv(_)) && !suspended, "{error}");
}

#[test]
fn a_page_table_that_cannot_be_sent_at_the_end_fails_the_save() {
    let source = running(false, 10);
    source.hold_grant();
    let (error, _) = failed_save(&source, |_, _| ());
    assert!(matches!(error, Error::Guest(GuestError::Table { level: 1, .. })), "{error}");
}

#[test]
fn a_p2m_that_is_replaced_meanwhile_fails_the_save() {
    let source = running(false, 11);
    let (error, suspended) = failed_save(&source, |toolstack, _| {
        toolstack.on_progress = Some(FakeDomain::move_p2m);
    });
    assert!(matches!(error, Error::Guest(GuestError::P2mMoved { .. })), "{error}");
    assert!(!suspended);
}

/// What either end asks of the hypervisor.
const SOURCE_CALLS: [&str; 12] = [
    "info",
    "maximum_gpfn",
    "address_bits",
    "map",
    "map_m2p",
    "log_dirty_on",
    "log_dirty_clean",
    "page_types",
    "tsc_info",
    "cpu_policy",
    "hvm_param",
    "vcpu",
];
const TARGET_CALLS: [&str; 12] = [
    "info",
    "map",
    "map_m2p",
    "populate",
    "set_cpu_policy",
    "set_tsc_info",
    "set_hvm_context",
    "set_hvm_param",
    "set_vcpu",
    "pin_tables",
    "seed_grants",
    "address_bits",
];
const EIO: i32 = 5;

proptest! {
    #![proptest_config(one_in(8))]

    #[test]
    fn whatever_fails_at_the_source_leaves_nothing_behind_or_does_not_matter(
        seed: u64, hvm: bool,
        call in prop::sample::select(&SOURCE_CALLS[..]), succeed in 0_u64..12,
        breaks_at in prop::option::of(0_usize..4_000_000),
        abort_at in prop::option::of(0_u64..60),
    ) {
        let source = running(hvm, seed);
        source.host().fail(call, succeed, EIO);
        let (mut toolstack, mut wire) = (FakeToolstack::new(&source), Wire::default());
        (toolstack.abort_at, wire.breaks_at) = (abort_at, breaks_at);
        let saved = save(&source, &mut wire, &mut toolstack, &LIVE);
        source.host().heal();
        prop_assert!(!source.is_logging());
        prop_assert_eq!(source.host().mapped_pages(), 0);
        match saved {
            Ok(_) => {
                let (target, outcome) = restored(&source, &mut wire, seed);
                prop_assert_eq!(compare(&source, &target, &WIRING, &outcome), SAME);
            }
            Err(error) => {
                let told = toolstack.heard.iter().any(|heard| {
                    matches!(heard, Heard::Event(Event::Failed { .. }))
                });
                prop_assert!(told, "{error}");
            }
        }
    }

    #[test]
    fn whatever_fails_at_the_target_is_an_error_or_does_not_matter(
        seed: u64, hvm: bool,
        call in prop::sample::select(&TARGET_CALLS[..]), succeed in 0_u64..12,
    ) {
        let source = running(hvm, seed);
        let mut wire = Wire::default();
        save(&source, &mut wire, &mut FakeToolstack::new(&source), &STOPPED).unwrap();
        let host = Host::new(HOST_FRAMES, seed);
        let target = host.create(hvm, 2000, 3);
        host.fail(call, succeed, EIO);
        let restored = restore(&target, &mut wire, &mut FakeToolstack::new(&target), &WIRING);
        prop_assert_eq!(host.mapped_pages(), 0);
        if let Ok(outcome) = restored {
            prop_assert_eq!(compare(&source, &target, &WIRING, &outcome), SAME);
        }
    }
}
