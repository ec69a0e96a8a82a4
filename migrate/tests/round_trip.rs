//! The sender and the receiver together: a guest that is saved on one modelled host and restored
//! on another is the same guest, whatever it did meanwhile.

use proptest::prelude::*;
use rxl_migrate::fake::compare;
use rxl_migrate::fake::{FakeDomain, FakeToolstack, Heard, Host, HvmSpec, P2mKind, PvSpec, Wire};
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{Domain, LogLevel};
use rxl_migrate::source::{self, save};
use rxl_migrate::target::{Options, Outcome, restore};

const LIVE: source::Options = source::Options { live: true, verify: false };
const STOPPED: source::Options = source::Options { live: false, verify: false };
const WIRING: Options = Options {
    store_evtchn: 17,
    store_domid: DomId(0),
    console_evtchn: 18,
    console_domid: DomId(3),
};

fn pv(p2m: P2mKind, seed: u64) -> PvSpec {
    PvSpec { pages: 1500, one_hole_in: 20, p2m, long_tail: false, vcpus: 3, processes: 3, seed }
}

/// Frames of a host that has room for the guests of this file.
const HOST_FRAMES: u64 = 8192;

fn source_host(seed: u64) -> Host {
    Host::new(HOST_FRAMES, seed)
}

/// Restores `wire` into a new domain of a host of its own.
fn restored(source: &FakeDomain, wire: &mut Wire, seed: u64) -> (FakeDomain, Outcome) {
    let info = source.info().unwrap();
    let host = Host::new(HOST_FRAMES, seed ^ 0x5eed);
    let target = host.create(info.hvm, info.total_pages + 600, info.max_vcpu_id + 1);
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
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

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
