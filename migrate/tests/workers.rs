//! A guest that several workers send over one stream arrives as it was, in whatever order they
//! are done.

#![allow(clippy::unwrap_used, reason = "what is not there is to stop the test")]

mod common;

use std::sync::{Arc, Mutex};

use common::{HOST_FRAMES, Senders, Shared, WIRING};
use rxl_migrate::error::Error;
use rxl_migrate::fake::{FakeDomain, FakeToolstack, Host, HvmSpec, P2mKind, PvSpec, Wire, compare};
use rxl_migrate::hypervisor::Domain;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::{self, Verify, save_with};
use rxl_migrate::target::restore;

const LIVE: source::Options =
    source::Options { live: true, verify: Verify::No, policy: Policy::Stock };
/// Pages that a copy may have more than the guest had when it was suspended: what it gave back
/// meanwhile comes along.
const BALLOONED_PAGES_MAX: u64 = 2000;

fn crew(count: usize, domain: &FakeDomain, out: &Shared<Wire>, leaves: Option<u32>) -> Senders {
    let mut senders = Senders::new(domain);
    (0..count).for_each(|_| senders.employ(out.clone(), None, leaves));
    senders
}

/// Moves a guest that writes, with so many workers; says in what the copy differs.
fn moved(source: &FakeDomain, count: usize, seed: u64) -> Vec<String> {
    let mut out = Shared(Arc::new(Mutex::new(Wire::default())));
    let workers = Box::new(crew(count, source, &out, None));
    let mut toolstack = FakeToolstack::new(source);
    let saved = save_with(source, &mut out, &mut toolstack, Some(workers), &LIVE).unwrap();
    let mut wire = out.0.lock().unwrap().clone();
    assert_eq!(saved.bytes, wire.bytes.len() as u64);
    let info = source.info().unwrap();
    let host = Host::new(HOST_FRAMES, seed ^ 0x5eed);
    let target =
        host.create(info.hvm, info.total_pages + BALLOONED_PAGES_MAX, info.max_vcpu_id + 1);
    let outcome = restore(&target, &mut wire, &mut FakeToolstack::new(&target), &WIRING).unwrap();
    compare(source, &target, &WIRING, &outcome)
}

#[test]
fn a_guest_that_writes_arrives_as_it_was_when_it_was_suspended() {
    for seed in 0..4 {
        for count in [1, 2, 5] {
            let host = Host::new(HOST_FRAMES, seed);
            let source = HvmSpec { pages: 6000, seed }.build(&host);
            host.run_guests(7);
            assert_eq!(moved(&source, count, seed), [""; 0], "HVM, {count} workers, {seed}");

            let host = Host::new(HOST_FRAMES, seed);
            let p2m = if seed % 2 == 0 { P2mKind::Linear } else { P2mKind::Tree };
            let spec = PvSpec {
                pages: 5000,
                one_hole_in: 20,
                p2m,
                long_tail: false,
                vcpus: 3,
                processes: 3,
                seed,
            };
            let source = spec.build(&host);
            host.run_guests(50);
            assert_eq!(moved(&source, count, seed), [""; 0], "PV, {count} workers, {seed}");
        }
    }
}

/// What a worker cannot send, and workers that are gone, end the save; the guest is as it was.
#[test]
fn a_worker_that_fails_ends_the_save_and_log_dirty() {
    let source = HvmSpec { pages: 6000, seed: 1 }.build(&Host::new(HOST_FRAMES, 1));
    for leaves in [Some(0), Some(1), None] {
        let mut out = Shared(Arc::new(Mutex::new(Wire::default())));
        out.0.lock().unwrap().breaks_at = leaves.is_none().then_some(1 << 20);
        let workers = Box::new(crew(2, &source, &out, leaves));
        let mut toolstack = FakeToolstack::new(&source);
        let saved = save_with(&source, &mut out, &mut toolstack, Some(workers), &LIVE);
        match (saved, leaves) {
            (Err(Error::Batch(why)), Some(_)) => assert!(why.contains("interrupted"), "{why}"),
            (Err(Error::Batch(why)), None) => assert!(why.contains("broken pipe"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert!(!source.is_logging() && source.is_running());
    }
}
