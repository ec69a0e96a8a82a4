//! That the model refuses what Xen refuses.

use super::{FakeDomain, Host, HvmSpec};
use crate::frame::{PAGE_SHIFT, PageBuf, PageType, Pfn};
use crate::hypervisor::{Access, Domain, ForeignPages, HvResult, SourceDomain, TargetDomain};
use crate::x86::pv::put;

fn refused<T>(result: HvResult<T>) -> Option<i32> {
    result.err().and_then(|error| error.source.raw_os_error())
}

/// A PV domain with `pages` pages at pfns from 0, and their mfns.
fn pv(host: &Host, pages: u64) -> (FakeDomain, Vec<u64>) {
    let domain = host.create(false, pages, 1);
    let pfns: Vec<Pfn> = (0..pages).map(Pfn).collect();
    let mfns = domain.populate(&pfns, 0).unwrap();
    let empty = PageBuf::zeroed();
    let all = domain.map(&mfns, Access::ReadWrite).unwrap();
    (0..mfns.len()).for_each(|index| all.write_page(index, &empty));
    (domain, mfns)
}

/// Makes the page at `table` a table with one entry.
fn write_table(domain: &FakeDomain, table: u64, entry: u64) {
    let mut page = PageBuf::zeroed();
    put(&mut page.0, 0, &entry.to_le_bytes());
    domain.map(&[table], Access::ReadWrite).unwrap().write_page(0, &page);
}

const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

#[test]
fn a_table_is_pinned_only_if_its_entries_are_fit() {
    let host = Host::new(64, 1);
    let (domain, mfns) = pv(&host, 4);
    let (_, foreign) = pv(&host, 1);
    let entry = |mfn: u64, flags: u64| mfn << PAGE_SHIFT | flags;
    for (level, pte, fit) in [
        (1, entry(mfns[1], 3), true),
        (1, entry(foreign[0], 1), false),
        (1, entry(foreign[0], 0), true),
        (1, entry(mfns[0], 3), false), // itself, writable
        (1, entry(mfns[0], 1), true),
        (2, entry(mfns[1], 3), true),
        (2, entry(mfns[1], 0x83), false), // a superpage
        (2, entry(mfns[0], 1), false),    // itself, at another level
        (1, entry(1 << 30, 1), false),
    ] {
        let (domain, mfns) = (&domain, &mfns);
        write_table(domain, mfns[0], pte);
        let pinned = domain.pin_tables(&[(level, mfns[0])]);
        assert_eq!(pinned.is_ok(), fit, "level {level}, {pte:#x}");
        if fit {
            let kinds = domain.page_types(&mfns[..2]).unwrap();
            assert_eq!(kinds[0], PageType::Table { level, pinned: true });
            let below = PageType::Table { level: 1, pinned: false };
            assert_eq!(kinds[1] == below, level == 2);
            host.lock().unpin(domain.id.0, mfns[0]);
        }
        assert_eq!(domain.page_types(mfns).unwrap(), [PageType::Normal; 4]);
    }
}

#[test]
fn a_frame_is_a_table_or_mapped_writable_but_not_both() {
    let host = Host::new(64, 1);
    let (domain, mfns) = pv(&host, 2);
    let writable = domain.map(&mfns[..1], Access::ReadWrite).unwrap();
    assert_eq!(refused(domain.pin_tables(&[(1, mfns[0])])), Some(EBUSY));
    drop(writable);
    let read_only = domain.map(&mfns[..1], Access::Read).unwrap();
    domain.pin_tables(&[(1, mfns[0])]).unwrap();
    drop(read_only);
    assert_eq!(refused(domain.map(&mfns[..1], Access::ReadWrite)), Some(EINVAL));
}

#[test]
fn a_mapping_is_all_or_nothing_and_only_of_what_the_domain_owns() {
    let host = Host::new(64, 1);
    let (domain, mfns) = pv(&host, 2);
    let (_, foreign) = pv(&host, 1);
    assert_eq!(refused(domain.map(&[mfns[0], foreign[0]], Access::Read)), Some(EINVAL));
    assert_eq!(refused(domain.map(&[u64::MAX], Access::Read)), Some(EINVAL));
    assert_eq!(host.mapped_pages(), 0);
}

#[test]
fn a_mapping_sees_its_frame_after_the_guest_gave_it_away_and_nobody_gets_it_meanwhile() {
    let host = Host::new(700, 1);
    let domain = HvmSpec { pages: 512, seed: 1 }.build(&host);
    let mapping = domain.map(&[3], Access::Read).unwrap();
    let mut before = PageBuf::zeroed();
    mapping.read_page(0, &mut before);
    let mfn = {
        let mut xen = host.lock();
        let mfn = xen.dom(domain.id.0).physmap.remove(3).unwrap();
        xen.release(mfn);
        mfn
    };
    let other = host.create(true, 700, 1);
    let mut taken = 0;
    while !other.populate(&[Pfn(taken)], 0).unwrap().is_empty() {
        taken += 1;
    }
    let mut after = PageBuf::zeroed();
    mapping.read_page(0, &mut after);
    assert_eq!(before.0, after.0);
    drop(mapping);
    other.populate(&[Pfn(taken)], 0).unwrap();
    assert_eq!(host.lock().dom(other.id.0).physmap.get(taken), Some(mfn));
}

#[test]
fn log_dirty_sees_guests_and_only_when_told_to_the_device_model_and_xen() {
    let host = Host::new(700, 1);
    let domain = HvmSpec { pages: 512, seed: 1 }.build(&host);
    let mut dirty = crate::bitmap::PageBitmap::new(domain.maximum_gpfn().unwrap() + 1);
    assert_eq!(refused(domain.log_dirty_clean(&mut dirty, false)), Some(EINVAL));
    domain.log_dirty_on().unwrap();
    assert_eq!(refused(domain.log_dirty_on()), Some(EINVAL));
    host.run_guests(1);
    (0..200).for_each(|_| drop(domain.info()));
    host.run_guests(0);
    let by_xen = Pfn(512 + 0x300 + 7);
    domain.log_dirty_clean(&mut dirty, false).unwrap();
    assert!(dirty.count() > 20 && !dirty.get(by_xen));
    dirty.clear_all();
    domain.log_dirty_clean(&mut dirty, false).unwrap();
    assert_eq!(dirty.count(), 0);
    domain.log_dirty_clean(&mut dirty, true).unwrap();
    assert!(dirty.get(by_xen) && dirty.count() == 1);
}

#[test]
fn a_call_fails_when_it_is_told_to_and_once() {
    let host = Host::new(64, 1);
    let domain = host.create(true, 4, 1);
    host.fail("info", 1, 5);
    let results: Vec<Option<i32>> = (0..3).map(|_| refused(domain.info())).collect();
    assert_eq!(results, [None, Some(5), None]);
}
