//! PV guests that describe themselves with malice.
#![allow(clippy::unwrap_used, reason = "what is not there is to stop the test")]

use rxl_migrate::error::{Error, GuestError};
use rxl_migrate::fake::{FakeDomain, FakeToolstack, Host, P2mKind, PvSpec, Wire};
use rxl_migrate::frame::{Mfn, PAGE_SHIFT};
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages};
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::{Options, Verify, save};
use rxl_migrate::x86::pv::{PTE_FRAME_MASK, shared_info};

/// Slot of the top-level table where the modelled guests keep a linear p2m.
const P2M_SLOT: usize = 402;

fn word(domain: &FakeDomain, mfn: u64, slot: usize) -> u64 {
    domain.map(&[mfn], Access::Read).unwrap().read_u64(slot)
}

/// The frame in entry `slot` of the table at `mfn`.
fn below(domain: &FakeDomain, mfn: u64, slot: usize) -> u64 {
    (word(domain, mfn, slot) & PTE_FRAME_MASK) >> PAGE_SHIFT
}

#[test]
fn a_p2m_that_a_few_pages_make_out_to_be_of_2_32_pfns_is_refused() {
    let spec = PvSpec {
        pages: 700,
        one_hole_in: 20,
        p2m: P2mKind::Linear,
        long_tail: true,
        vcpus: 1,
        processes: 1,
        seed: 1,
    };
    let domain = spec.build(&Host::new(1024, 1));
    let shared = domain.info().unwrap().shared_info_mfn;
    let top = word(&domain, shared, shared_info::P2M_CR3 / 8) >> PAGE_SHIFT;
    let upper = below(&domain, top, P2M_SLOT);
    let lower = below(&domain, upper, 0);
    // The same tables again and again, in turn, so that it is not the end that repeats itself.
    for slot in 0..32 {
        domain.poke(Mfn(upper), slot, lower << PAGE_SHIFT | 3);
    }
    let leaves = [word(&domain, lower, 0), word(&domain, lower, 1)];
    for (slot, leaf) in (0..512).zip(leaves.into_iter().cycle()) {
        domain.poke(Mfn(lower), slot, leaf);
    }
    domain.poke(Mfn(shared), shared_info::MAX_PFN / 8, 1 << 32);

    let (mut wire, mut toolstack) = (Wire::default(), FakeToolstack::new(&domain));
    let options = Options { live: true, verify: Verify::No, policy: Policy::Stock };
    let error = save(&domain, &mut wire, &mut toolstack, &options).unwrap_err();
    let expected = GuestError::P2m("it is far larger than the guest's memory");
    assert!(matches!(&error, Error::Guest(guest) if *guest == expected), "{error}");
    assert!(!domain.is_logging());
    assert_eq!(wire.bytes, [0; 0]);
}
